"""Curricula: training that starts in few dimensions and short contexts and ends on the problem itself.

Garg et al., arXiv 2208.01066, train this way: the inputs' trailing coordinates are zero at first.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from attnlab.checks import check_range
from attnlab.icl.tasks import LinearRegression
from attnlab.objectives import Objective
from attnlab.training import Trajectory, train
from attnlab.types import Params, PRNGKey


def leading_coordinates(problem: LinearRegression, count: int) -> LinearRegression:
    """The problem with all but the first `count` coordinates of the inputs zero; shapes stay."""
    check_range("count", count, 1, problem.dimension, "It is a number of coordinates of the inputs.")
    kept = (jnp.arange(problem.dimension) < count).astype(problem.mixing.dtype)
    return replace(problem, mixing=kept[:, None] * problem.mixing)


def train_in_stages(
    stages: Sequence[Objective],
    params: Params,
    optimizer: optax.GradientTransformation,
    key: PRNGKey,
    *,
    steps: int,
    **options: Any,
) -> list[Trajectory]:
    """Train on each objective in turn, `steps` steps each, from where the one before ended; the optimizer starts anew.

    `options` are those of `attnlab.training.train`, keys of shape (m,) train an ensemble. Stages of one structure, such
    as `population_objective(leading_coordinates(problem, k), length)`, share a compiled loop. Raises `ValueError`
    for no stage at all.
    """
    if not stages:
        raise ValueError("stages is empty; expected at least one objective, the problem itself.")
    fold = jax.vmap(jax.random.fold_in, (0, None)) if key.ndim else jax.random.fold_in
    trajectories: list[Trajectory] = []
    for number, stage in enumerate(stages):
        trajectories.append(train(stage, params, optimizer, fold(key, number), steps=steps, **options))
        params = trajectories[-1].params
    return trajectories
