"""The training loop and the probes inside it."""

from attnlab.runs import DamagedFileError
from attnlab.runs.session import Session
from attnlab.training.batches import minibatches
from attnlab.training.loop import TrainingProgress, Trajectory, train
from attnlab.training.probe import Probe, TrainingState, probe
from attnlab.training.records import DivergenceError, Records, load_params, load_records
from attnlab.training.report import show_progress

__all__ = [
    "DamagedFileError",
    "DivergenceError",
    "Probe",
    "Records",
    "Session",
    "TrainingProgress",
    "TrainingState",
    "Trajectory",
    "load_params",
    "load_records",
    "minibatches",
    "probe",
    "show_progress",
    "train",
]
