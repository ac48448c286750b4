"""The report: every claim with its verdict and every figure with its manifest, in one file that needs no network."""

from attnlab.report.page import read_verdicts, write_report
from attnlab.report.staleness import Staleness, staleness

__all__ = ["Staleness", "read_verdicts", "staleness", "write_report"]
