"""Long runs: resumed to the bit, reported, refused before they start, and stopped where they go wrong."""

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from attnlab.curvature import density as density_module
from attnlab.curvature import guards
from attnlab.curvature.blocks import block_densities, per_block
from attnlab.curvature.estimators import (
    condition_number,
    diagonal,
    log_determinant,
    squared_frobenius_norm,
    trace,
)
from attnlab.curvature.guards import NonFiniteProductError
from attnlab.curvature.linear_systems import solve
from attnlab.curvature.operator import Operator
from attnlab.curvature.operators import ggn, hessian
from attnlab.curvature.spectrum import eigenpairs, spectral_density
from attnlab.losses import square_loss
from attnlab.objectives import batched, objective
from attnlab.runs import progress as progress_module
from attnlab.runs import session as session_module
from attnlab.runs.progress import Progress, print_progress
from attnlab.runs.session import Session
from compare import assert_close
from nightly import nightly

DIMENSION = 600


@jax.jit
def dense_product(matrix, vector):
    return matrix @ vector


def operator():
    """A dense symmetric matrix as an operator, too large for the dense path."""
    basis, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((DIMENSION, DIMENSION)))
    values = 2 * np.linspace(-1, 1, DIMENSION) ** 9
    return Operator(Partial(dense_product, jnp.asarray((basis * values) @ basis.T)), jnp.zeros(DIMENSION))


class Killed(Exception):
    pass


def kill_after(calls):
    def report(progress):
        nonlocal calls
        calls -= 1
        if calls == 0:
            raise Killed

    return report


def save_always(monkeypatch):
    monkeypatch.setattr(session_module, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(session_module, "SAVE_SHARE", np.inf)


RUNS = {
    "density": (partial(spectral_density, samples=4, steps=40), Session(), 5),
    "density_together": (partial(spectral_density, samples=4, steps=40), Session(together=2), 2),
    "eigenpairs": (partial(eigenpairs, count=2), Session(), 3),
}


@pytest.mark.parametrize("name", nightly(RUNS, ("density", "eigenpairs")))
def test_a_killed_run_resumes_to_the_bit(name, tmp_path, monkeypatch):
    save_always(monkeypatch)
    run, session, calls = RUNS[name]
    key, matrix = jax.random.key(1), operator()
    untouched = run(matrix, key, session=replace(session, directory=tmp_path / "untouched"))
    killed = replace(session, directory=tmp_path / "killed")
    with pytest.raises(Killed):
        run(matrix, key, session=replace(killed, report=kill_after(calls)))
    seen: list[Progress] = []
    resumed = run(matrix, key, session=replace(killed, report=seen.append))
    for a, b in zip(jax.tree.leaves(resumed), jax.tree.leaves(untouched), strict=True):
        np.testing.assert_array_equal(a, b)
    assert seen[0].products > 16  # what was done is not done again
    finished: list[Progress] = []
    again = run(matrix, key, session=replace(killed, report=finished.append))
    assert not finished
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(untouched), strict=True):
        np.testing.assert_array_equal(a, b)
    result = np.load(tmp_path / "killed" / "result.npz")
    for name, array in result.items():
        np.testing.assert_array_equal(array, getattr(untouched, name))
    record, other = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("killed", "untouched"))
    assert record["config"]["dimension"] == DIMENSION
    assert "versions" in record
    assert (record["resumed"], other["resumed"]) == (True, False)
    with pytest.raises(ValueError, match="holds another run"):
        run(matrix, jax.random.key(2), session=killed)


def some_blocks():
    """A risk, and parameters in leaves of 20, 4 and 20."""
    x, y = jax.random.normal(jax.random.key(0), (2, 12, 4))
    params = {"in": jax.random.normal(jax.random.key(1), (4, 5)), "out": {"w": jnp.ones((5, 4)), "b": jnp.ones((1, 4))}}

    def predict(params, inputs):
        return jnp.tanh(inputs @ params["in"]) @ params["out"]["w"] + params["out"]["b"]

    return objective(predict, square_loss, x, y), params


@pytest.mark.slow
def test_densities_of_blocks_resume_at_the_block_that_was_killed(tmp_path, monkeypatch):
    save_always(monkeypatch)
    run = partial(block_densities, *some_blocks(), jax.random.key(1), blocks=["in", "out/w"], samples=2)
    untouched = run(session=Session(directory=tmp_path / "untouched"))
    with pytest.raises(Killed):
        # The first of four reports on the second block.
        run(session=Session(directory=tmp_path / "killed", report=kill_after(5)))
    assert {path.name for path in (tmp_path / "killed").iterdir()} == {"in", "out%2Fw"}
    seen: list[Progress] = []
    resumed = run(session=Session(directory=tmp_path / "killed", report=seen.append))
    assert [(progress.part, progress.products) for progress in seen] == [("out/w (2 of 2)", n) for n in (20, 36, 40)]
    assert list(resumed) == ["in", "out/w"]
    for a, b in zip(jax.tree.leaves(resumed), jax.tree.leaves(untouched), strict=True):
        np.testing.assert_array_equal(a, b)


def test_blocks_before_a_failure_are_kept():
    def measure(block):
        if block.dimension == 4:
            raise NonFiniteProductError("not finite")
        return block.dimension

    with pytest.raises(NonFiniteProductError, match="block out/b: not finite") as caught:
        per_block(measure, *some_blocks())
    assert caught.value.partial == {"in": 20}


@pytest.mark.slow
def test_one_directory_serves_every_damping(tmp_path, monkeypatch):
    save_always(monkeypatch)
    matrix, key = operator(), jax.random.key(1)
    values = 2 * np.linspace(-1, 1, DIMENSION) ** 9
    runs = {
        "determinant": (partial(log_determinant, samples=4, steps=40), lambda d: np.sum(np.log(values + d))),
        "condition": (condition_number, lambda d: (2 + d) / (d - 2)),
    }
    for name, (estimate, exact) in runs.items():
        run, session = partial(estimate, matrix, key), Session(directory=tmp_path / name)
        with pytest.raises(Killed):
            run(damping=3.0, session=replace(session, report=kill_after(2)))
        seen: list[Progress] = []
        for damping in (3.0, 4.0):
            found = run(damping=damping, session=replace(session, report=seen.append))
            # Four samples give Student's t with 3 degrees of freedom.
            assert abs(found.value - exact(damping)) <= 8 * found.error
            if damping == 3.0:
                assert seen[0].products > 26  # what was done is not done again
                seen.clear()
        assert not seen


def test_a_directory_belongs_to_one_operator(tmp_path):
    x = jax.random.normal(jax.random.key(0), (12, 3))
    params = {"w": jnp.ones(3)}

    def predict(params, inputs):
        return jnp.tanh(inputs @ params["w"])

    data, others = ([(x[i : i + 4], x[i : i + 4, 0] + shift) for i in (0, 4, 8)] for shift in (0.0, 1.0))
    risk, other = (batched(predict, square_loss, batches) for batches in (data, others))
    run = partial(spectral_density, key=jax.random.key(1), samples=2, steps=2)
    pairs = [
        (hessian(risk, params), ggn(risk, params)),
        (hessian(risk, params) + ggn(risk, params), hessian(other, params) + ggn(other, params)),
        (2 * hessian(risk, params), 2 * hessian(other, params)),
    ]
    for number, (first, second) in enumerate(pairs):
        run(first, session=Session(directory=tmp_path / str(number)))
        with pytest.raises(ValueError, match="holds another run"):
            run(second, session=Session(directory=tmp_path / str(number)))


@pytest.mark.parametrize("name", nightly(RUNS, ("density",)))
def test_long_runs_give_the_numbers_of_short_ones(name, key, tmp_path):
    run, session, _ = RUNS[name]
    matrix = operator()
    short = run(matrix, key, session=session)
    long = run(matrix, key, session=replace(session, directory=tmp_path / "run"))
    first = jax.tree.leaves(short)[0]
    assert_close(jax.tree.leaves(long)[0], first, 1e-8)


def test_progress_counts_products_and_foresees_the_end(capsys):
    seen: list[Progress] = []
    spectral_density(operator(), jax.random.key(1), samples=2, steps=40, session=Session(report=seen.append))
    assert [progress.products for progress in seen] == [16, 32, 40, 56, 72, 80]
    assert all(progress.total == 80 for progress in seen)
    assert seen[-1].left == 0
    print_progress(seen[-1])
    assert capsys.readouterr().err.endswith("80 of 80 products in 0 s, 0 s left\n")
    seen.clear()
    pairs = eigenpairs(operator(), jax.random.key(1), 2, session=Session(report=seen.append))
    assert seen[-1].products == pairs.products
    assert seen[-1].residual <= 1.5e-8
    assert seen[0].left is None  # no fall of the residual yet, which is what foresees the end
    foreseen = [progress.left for progress in seen if progress.left is not None]
    assert len(foreseen) > 3
    assert foreseen == sorted(foreseen, reverse=True)
    assert foreseen[-1] == 0


def test_the_end_of_an_iteration_is_foreseen_from_its_residual(monkeypatch):
    seen: list[Progress] = []
    times = iter([0.0, 1.0, 2.0, 4.0])
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(times))
    clock = progress_module.Clock(seen.append, 0, tolerance=1e-6)
    for products, residual in ((10, 1e-2), (20, 1e-1), (40, 1e-3)):
        clock.tell(products, residual)
    # Two orders of magnitude in 20 products: the three that are left take 30 more, at 40 products in 4 seconds.
    assert [progress.left for progress in seen[:2]] == [None, None]
    assert_close(seen[2].left, 3.0, 1e-12)


class Fails:
    """A square loss that turns to NaN, with its derivatives, for batches whose first target is large."""

    def __call__(self, outputs, targets):
        poison = jnp.where(targets[0] > 100.0, jnp.nan, 1.0)
        return poison * jnp.mean((outputs - targets) ** 2)


class FailsTwice:
    """A square loss that is finite, but not its derivatives, for batches whose first target is large: a root at 0."""

    def __call__(self, outputs, targets):
        distance = jnp.sum((outputs - jax.lax.stop_gradient(outputs)) ** 2)
        return jnp.mean((outputs - targets) ** 2) + jnp.sqrt(distance + jnp.where(targets[0] > 100.0, 0.0, 1.0))


def test_a_bad_batch_is_named():
    batches = [(np.ones((4, 3)), np.zeros(4)), (np.ones((4, 3)), np.full(4, 1e3)), (np.ones((2, 3)), np.zeros(2))]
    with pytest.raises(ValueError, match="batch 1: the loss is nan at these parameters"):
        hessian(batched(lambda params, x: jnp.tanh(x @ params), Fails(), batches), jnp.ones(3))
    risk = batched(lambda params, x: jnp.tanh(x @ params), FailsTwice(), batches)
    with pytest.raises(NonFiniteProductError, match="step 0 of sample 0; the first batch that gives one is batch 1"):
        spectral_density(hessian(risk, jnp.ones(3), check=False), jax.random.key(1), samples=1, steps=2)


def late_nan(matrix, vector):
    # A coordinate vector is met by no sample before the Krylov space is exhausted; a threshold on an entry is.
    image = matrix @ vector
    return jnp.where(jnp.abs(vector[0]) > 0.5, jnp.nan, image)


def test_a_failure_in_the_first_probe_is_named_alike_by_both_paths(tmp_path):
    matrix = jnp.diag(jnp.r_[100.0, jnp.linspace(-1, 1, DIMENSION - 1)])
    failing = Operator(Partial(late_nan, matrix), jnp.zeros(DIMENSION))
    messages = []
    for options in ({}, {"session": Session(directory=tmp_path / "run")}):
        with pytest.raises(NonFiniteProductError, match=r"at step \d+ of sample 0") as caught:
            spectral_density(failing, jax.random.key(1), samples=2, steps=20, **options)
        messages.append(str(caught.value).split(".")[0])
        assert caught.value.partial is None
    assert messages[0] == messages[1]


@pytest.mark.slow
@pytest.mark.parametrize("long", [False, True])
def test_pairs_before_a_failure_are_kept(long, tmp_path):
    matrix, calls = operator(), []

    def product(matrix, vector):
        def factor(_):
            calls.append(1)
            return np.where(len(calls) > 40, np.nan, 1.0)

        return matrix @ vector * jax.pure_callback(factor, jax.ShapeDtypeStruct((), vector.dtype), vector)

    failing = Operator(Partial(product, *matrix.linear.args), matrix.point)
    options = {"session": Session(directory=tmp_path / "run")} if long else {}
    with pytest.raises(NonFiniteProductError, match=r"within \d+ products") as caught:
        eigenpairs(failing, jax.random.key(1), 2, **options)
    pairs = caught.value.partial
    exact = 2 * np.linspace(-1, 1, DIMENSION)[-2:] ** 9
    assert np.all(np.abs(pairs.values - exact) <= 0.1)
    residuals = np.linalg.norm(pairs.vectors @ matrix.linear.args[0] - pairs.values[:, None] * pairs.vectors, axis=1)
    assert_close(pairs.residuals, residuals, 1e-8)


def test_finished_probes_come_with_the_error(monkeypatch, tmp_path):
    matrix = operator()
    reference = spectral_density(
        matrix, jax.random.key(1), samples=2, steps=20, session=Session(directory=tmp_path / "reference")
    )
    real, calls = density_module._advance_jitted, []

    def advance(*args):
        calls.append(1)
        state, entries = real(*args)
        if len(calls) < 4:
            return state, entries
        return state._replace(norm=state.norm * jnp.nan), entries._replace(norms=entries.norms * jnp.nan)

    monkeypatch.setattr(density_module, "_advance_jitted", advance)
    keys = jax.random.key(1)
    with pytest.raises(NonFiniteProductError, match="at step 16 of sample 1") as caught:
        spectral_density(matrix, keys, samples=2, steps=20, session=Session(directory=tmp_path / "run"))
    np.testing.assert_array_equal(caught.value.partial.nodes, reference.nodes[:1])
    np.testing.assert_array_equal(caught.value.partial.weights, reference.weights[:1])


@pytest.mark.parametrize("run", [spectral_density, partial(eigenpairs, count=2)])
@pytest.mark.parametrize("long", [False, True])
def test_operators_that_are_not_symmetric_are_refused(run, long, tmp_path):
    matrix = np.random.default_rng(0).standard_normal((DIMENSION, DIMENSION)) / DIMENSION**0.5
    tilted = np.diag(np.linspace(-1, 1, DIMENSION)) + 0.02 * (matrix - matrix.T)
    crooked = Operator(Partial(dense_product, jnp.asarray(tilted)), jnp.zeros(DIMENSION))
    options = {"session": Session(directory=tmp_path / "run")} if long else {}
    with pytest.raises(ValueError, match="the operator is not symmetric"):
        run(crooked, jax.random.key(1), **options)


@pytest.mark.parametrize("estimate", [trace, diagonal, squared_frobenius_norm])
def test_estimates_and_solutions_refuse_them_too(estimate):
    twist = np.random.default_rng(0).standard_normal((40, 40)) / 40**0.5
    crooked = Operator(Partial(dense_product, jnp.eye(40) + 0.02 * (twist - twist.T)), jnp.zeros(40))
    with pytest.raises(ValueError, match="the operator is not symmetric"):
        estimate(crooked, jax.random.key(1), samples=4)
    with pytest.raises(ValueError, match="the operator is not symmetric"):
        solve(crooked, jnp.arange(40.0))


def test_an_operator_with_noise_is_refused():
    random = np.random.default_rng(0)

    def noisy(matrix, vector):
        shape = jax.ShapeDtypeStruct(vector.shape, vector.dtype)
        return matrix @ vector + 1e-3 * jax.pure_callback(lambda _: random.standard_normal(DIMENSION), shape, vector)

    matrix = jnp.diag(jnp.linspace(-1, 1, DIMENSION))
    with pytest.raises(ValueError, match="two products with it disagree"):
        spectral_density(Operator(Partial(noisy, matrix), jnp.zeros(DIMENSION)), jax.random.key(1), samples=1, steps=10)


def test_computations_that_do_not_fit_are_refused_before_they_start(monkeypatch):
    monkeypatch.setattr(guards, "available_bytes", lambda: 100_000)
    with pytest.raises(MemoryError, match=r"46 vectors of 600 numbers, for a basis of 40.*Ask for fewer eigenpairs"):
        eigenpairs(operator(), jax.random.key(1), 10)
    with pytest.raises(MemoryError, match=r"10 samples of 600 numbers at once.*Run fewer together"):
        spectral_density(operator(), jax.random.key(1), session=Session(together=10))
