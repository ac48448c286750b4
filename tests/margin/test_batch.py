"""The traced solver of many small problems against the one on the host."""

import jax
import numpy as np
import pytest
from margin_cases import random_problem, unplanned_problem

from attnlab.margin import Status, frobenius_batch, frobenius_traced, max_margin, stack
from attnlab.margin.solvers.traced import CHUNK
from compare import assert_close


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        ((10, 5, 3), CHUNK),
        pytest.param((6, 8, 10), CHUNK + 8, marks=pytest.mark.slow),  # and what is left after whole chunks
    ],
)
def test_batch_solves_each_problem(shape, count):
    problems = [random_problem(*shape, seed=seed) for seed in range(count)]
    found = frobenius_batch(stack(problems))
    assert np.all(found.status == Status.SOLVED)
    assert np.max(found.gap) < 1e-10
    for i in range(0, count, 6):
        alone = max_margin(problems[i])
        assert_close(found.direction[i], alone.direction, 1e-9)
        assert_close(found.multipliers[i], alone.multipliers, 1e-7)
        np.testing.assert_array_equal(found.support[i], alone.support)


def test_batch_proves_infeasibility():
    problems = [unplanned_problem(10, 5, 3, seed) for seed in range(CHUNK)]
    found = frobenius_batch(stack(problems))
    np.testing.assert_array_equal(found.status, [max_margin(problem).status for problem in problems])
    assert np.any(found.status == Status.INFEASIBLE)


@pytest.mark.slow
def test_traced_solver_goes_through_jit_and_vmap():
    problems = stack([random_problem(10, 5, 3, seed=seed) for seed in range(CHUNK)])
    mapped = jax.jit(jax.vmap(frobenius_traced))(problems)
    assert_close(mapped.direction, frobenius_batch(problems).direction)


def test_single_precision_is_refused():
    problem = jax.tree.map(
        lambda leaf: leaf.astype(np.float32) if leaf.dtype == float else leaf, random_problem(3, 4, 6, 1)
    )
    with pytest.raises(RuntimeError, match="jax_enable_x64"):
        frobenius_traced(jax.tree.map(jax.numpy.asarray, problem))
