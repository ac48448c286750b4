"""The phenomena at full size: every finding of the gallery's analyses is reproduced, but for the misses known."""

import os
import subprocess
import sys

import pytest

from attnlab.cli import analysis_scripts, load_script
from attnlab.runs import load_arrays

MISSED = {
    "warmup": {
        "warm-up: sharpness over the edge, last third, the farthest seed",  # 1.109 of 1.1
        "no warm-up, final LayerNorm: steps with a loss that is not finite, the most of a seed",  # overflows at seed 3
    }
}
"""What is not reproduced at the default seeds, by analysis: its figure says so."""


@pytest.mark.slow
@pytest.mark.parametrize("name", load_script(analysis_scripts()["dynamics-gallery"]).MEMBERS)
def test_phenomena_are_reproduced_at_full_size(name, tmp_path):
    """In a process of its own: the tests' compiler options and strict promotion are not those of a user."""
    script = analysis_scripts()[name]
    plain = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    subprocess.run([sys.executable, script, "--output", tmp_path], check=True, env=plain, capture_output=True)
    module = load_script(script)
    found = module.findings(load_arrays(tmp_path / "results" / name), module.ANALYSIS.config())
    missed = {finding.what: finding.record() for finding in found if not finding.passed}
    assert missed.keys() <= MISSED.get(name, set()), missed
    if missed:
        pytest.xfail(f"not reproduced: {missed}")
