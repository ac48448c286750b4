"""The training loop and the probes inside it."""

from attnlab.training.loop import DivergenceError, Progress, Records, Trajectory, train
from attnlab.training.probe import Probe, TrainingState, probe

__all__ = ["DivergenceError", "Probe", "Progress", "Records", "TrainingState", "Trajectory", "probe", "train"]
