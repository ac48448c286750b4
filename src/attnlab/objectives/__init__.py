"""The objective: what a model predicts, how that is scored, and on which data. All that curvature ever sees."""

from attnlab.objectives.batches import BatchedObjective, Risk, batched
from attnlab.objectives.in_memory import (
    Objective,
    as_partial,
    check_loss,
    check_objective,
    curvature_in_outputs,
    example_losses,
    known_loss,
    objective,
    outputs_along_slopes,
    predict_from_block,
)

__all__ = [
    "BatchedObjective",
    "Objective",
    "Risk",
    "as_partial",
    "batched",
    "check_loss",
    "check_objective",
    "curvature_in_outputs",
    "example_losses",
    "known_loss",
    "objective",
    "outputs_along_slopes",
    "predict_from_block",
]
