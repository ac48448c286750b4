"""Gradients against autodiff of the losses written plainly, steps against their definitions, and where they lead."""

from decimal import Decimal, localcontext

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from margin_cases import ones, random_tokens

from attnlab.losses import cross_entropy
from attnlab.margin import (
    attention_problem,
    attention_risk,
    correlation,
    decision_risk,
    decoupled,
    decoupled_matrix,
    equality_basis,
    equality_solution,
    imbalance,
    log_odds,
    margin_probe,
    max_margin,
    mirror_descent,
    next_token_problem,
    normalize_gradient,
    normalized_descent,
    project_on_equalities,
    rescaled,
)
from attnlab.training import probe, train
from compare import assert_close

N, T, D, E, K = 4, 5, 6, 3, 2
PARAMS = {
    "matrix": {"query_key": (D, E)},
    "factors": {"key": (D, K), "query": (E, K)},
    "prompt": {"prompt": (D,)},
    "joint": {"prompt": (D,), "readout": (D,)},
}


def case(key, kind):
    """A risk of one of the parametrisations, and a point of it."""
    random = np.random.default_rng(np.asarray(jax.random.key_data(key)))  # NumPy's: nothing to compile

    def normal(*shape):
        return jnp.asarray(random.normal(size=shape))

    readout = None if kind == "joint" else normal(D)
    queries = None if "prompt" in PARAMS[kind] else normal(N, E)
    risk = attention_risk(normal(N, T, D), jnp.sign(normal(N)), queries=queries, readout=readout)
    return risk, {name: normal(*shape) for name, shape in PARAMS[kind].items()}


def plain_loss(params, inputs, labels):
    """The definition, sequence by sequence."""
    w = {"key": 0, **params}
    total = 0.0
    for x, z, y in zip(inputs["tokens"], inputs["queries"], labels, strict=True):
        image = w["prompt"] if "prompt" in w else (w["query_key"] if "query_key" in w else w["key"] @ w["query"].T) @ z
        v = w.get("readout", inputs.get("readout"))
        total += jnp.log(1 + jnp.exp(-y * v @ x.T @ jax.nn.softmax(x @ image)))
    return total / len(labels)


plainly = jax.jit(jax.value_and_grad(plain_loss))


@pytest.mark.parametrize("kind", PARAMS)
def test_value_and_gradient_are_those_of_the_definition(kind, key):
    risk, params = case(key, kind)
    expected = plainly(params, risk.inputs, risk.targets)
    assert_close(jax.jit(jax.value_and_grad(risk))(params), expected, 1e-12)


@pytest.mark.parametrize(
    ("kind", "select"),
    [
        ("matrix", False),
        ("matrix", True),
        pytest.param("factors", False, marks=pytest.mark.slow),
        pytest.param("factors", True, marks=pytest.mark.slow),
        ("prompt", False),
        pytest.param("prompt", True, marks=pytest.mark.slow),
    ],
)
def test_rescaled_gradient_is_parallel_to_the_plain_one(kind, select, key):
    risk, params = case(key, kind)
    selection = jnp.arange(N) % T if select else None
    _, gradient = plainly(params, risk.inputs, risk.targets)
    value, found = jax.jit(jax.value_and_grad(rescaled(risk, selection)))(params)
    name = next(iter(params))
    factor = jnp.vdot(found[name], gradient[name]) / jnp.vdot(gradient[name], gradient[name])
    assert_close(found, jax.tree.map(lambda leaf: factor * leaf, gradient), 1e-12)
    assert factor >= 1
    if select:
        values = risk.inputs["tokens"][jnp.arange(N), selection] @ risk.inputs["readout"]
        excess = risk(params) - jnp.mean(jnp.log1p(jnp.exp(-risk.targets * values)))
        assert_close(value, factor * excess, 1e-11)


def precise_direction(risk, matrix, digits):
    """The gradient in W over its norm, from the definition, with so many digits."""

    def exact(array):
        return np.vectorize(Decimal, otypes=[object])(np.asarray(array))

    with localcontext() as context:
        context.prec, context.Emin = digits, -(10**8)
        total = exact(np.zeros(matrix.shape))
        readout = exact(risk.inputs["readout"])
        for x, z, y in zip(exact(risk.inputs["tokens"]), exact(risk.inputs["queries"]), risk.targets, strict=True):
            exponentials = np.array([score.exp() for score in x @ (exact(matrix) @ z)])
            weights, values = exponentials / exponentials.sum(), Decimal(float(y)) * (x @ readout)
            output = weights @ values
            coefficients = -weights * (values - output) / (1 + output.exp())
            total = total + np.outer(coefficients @ x, z)
        return (total / np.sum(total**2).sqrt()).astype(float)


def test_rescaled_risk_where_the_attended_token_is_very_wrong():
    tokens = jnp.array([[[-60.0], [60.0]]])
    risk = attention_risk(tokens, jnp.ones(1), queries=jnp.ones((1, 1)), readout=jnp.ones(1))
    params = {"query_key": jnp.zeros((1, 1))}  # both tokens have the weight 1/2, and the first is the reference
    value, found = jax.jit(jax.value_and_grad(rescaled(risk)))(params)
    np.testing.assert_allclose(value, 2 * (np.log(2) - 60), rtol=1e-14)
    np.testing.assert_allclose(found["query_key"], 2 * jax.grad(risk)(params)["query_key"], rtol=1e-14)


@pytest.mark.parametrize(("scale", "digits"), [(1.0, 40), (30.0, 300), (300.0, 2000)])
def test_direction_of_descent_keeps_its_digits_far_away(scale, digits):
    risk, params = case(jax.random.key(1), "matrix")
    far = {"query_key": scale * params["query_key"]}
    found, _ = normalize_gradient().update(jax.jit(jax.grad(rescaled(risk)))(far), optax.EmptyState())
    assert_close(found["query_key"], precise_direction(risk, np.asarray(far["query_key"]), digits), 1e-10)


def test_normalized_gradient_neither_underflows_nor_divides_by_zero():
    tiny = {"a": jnp.array([3e-300, 0.0]), "b": jnp.array(4e-300)}
    found, _ = normalize_gradient().update(tiny, optax.EmptyState())
    assert_close(found, {"a": jnp.array([0.6, 0.0]), "b": jnp.array(0.8)}, 1e-14)
    still, _ = normalize_gradient().update({"a": jnp.zeros(2)}, optax.EmptyState())
    assert not still["a"].any()


@pytest.mark.parametrize("p", [1.75, 2.0, 3.0])
def test_mirror_step_minimises_its_model(p, key):
    """w' minimises step <g, w'> + D(w', w): the gradient of that, written by autodiff of the potential, vanishes."""
    weights, gradient = jax.random.normal(key, (2, 7))
    optimizer = mirror_descent(0.1, p)
    change, _ = optimizer.update(gradient, optimizer.init(weights), weights)

    def potential(w):
        return jnp.sum(jnp.abs(w) ** p) / p

    slope = jax.grad(potential)
    residual = 0.1 * gradient + slope(weights + change) - slope(weights)
    assert float(jnp.max(jnp.abs(residual))) < 1e-12


def test_factors_conserve_their_imbalance_to_first_order(key):
    """K^T K - Q^T Q moves by step^2 (grad_K^T grad_K - grad_Q^T grad_Q), and by nothing of first order."""
    risk, params = case(key, "factors")
    gradient = jax.jit(jax.grad(risk))(params)
    trained = train(risk, params, optax.sgd(1e-2), key, steps=1, probes={"it": probe(lambda r, p: imbalance(p))})
    before, after = trained.records.values["it"]
    assert_close(after, before + 1e-4 * imbalance(gradient), 1e-14)


def separable(seed):
    """Tokens, queries and read-out where the best token of every sequence can win; the solution's direction."""
    tokens, queries, _ = random_tokens(4, 5, 8, seed)
    readout = np.random.default_rng(seed).normal(size=8)
    selection = (tokens @ readout).argmax(1)
    risk = attention_risk(jnp.asarray(tokens), ones(4), queries=jnp.asarray(queries), readout=jnp.asarray(readout))
    return risk, selection, max_margin(attention_problem(tokens, queries, selection))


@pytest.mark.parametrize("name", ["normalized", pytest.param("polyak", marks=pytest.mark.slow)])
def test_descent_converges_to_the_maximal_margin(name, key):
    risk, selection, solution = separable(3)
    step = {"normalized": normalized_descent(0.5), "polyak": optax.polyak_sgd(max_learning_rate=np.inf)}[name]
    trained = train(
        rescaled(risk, None if name == "normalized" else jnp.asarray(selection)),
        {"query_key": jnp.zeros((8, 8))},
        step,
        key,
        steps=2000,
        every=1000,
        probes={"margin": margin_probe({"it": solution.direction}, selection)},
    )
    values = trained.records.values["margin"]
    angles = 1 - np.asarray(values["correlation/it"])
    assert angles[2] < 1e-4
    assert angles[2] < 0.5 * angles[1]
    assert solution.margin * 0.98 < values["smallest_margin"][2] <= solution.margin * (1 + 1e-9)
    assert values["probability"][2] > 0.999
    # far beyond where the plain gradient has lost its digits
    assert values["norm"][2] * solution.margin > 40


def test_decoupled_is_the_cross_entropy():
    """The two terms of `decoupled` add up to the risk, and the second's gradient is the risk's off the span."""
    contexts, supports, probabilities = next_tokens(1)
    risk, basis, inside = next_token_parts(contexts, supports, probabilities)
    split = decoupled(risk, inside, basis)
    keys = jax.random.split(jax.random.key(1))
    params = {"finite": jax.random.normal(keys[0], (5, 8)), "diverging": jax.random.normal(keys[1], (5, 8))}
    matrix = jax.jit(decoupled_matrix)(params, basis)
    logits = contexts @ np.asarray(matrix).T
    excess = np.log(np.exp(logits).sum(1, where=~supports)) - np.log(np.exp(logits).sum(1, where=supports))
    within = cross_entropy(jnp.where(inside, jnp.asarray(logits), -1e30), jnp.asarray(probabilities))
    value, slopes = jax.jit(jax.value_and_grad(split))(params)
    expected, gradient = jax.jit(jax.value_and_grad(risk))({"query_key": matrix})
    added = np.exp(excess.max()) * (value - within)
    assert_close(added + within, expected, 1e-12)
    found = slopes["diverging"] * np.exp(excess.max())
    gradient = np.asarray(gradient["query_key"])
    problem = next_token_problem(contexts, supports)
    assert_close(found, gradient - project_on_equalities(problem, gradient), 1e-10)


def next_tokens(seed, contexts=4, vocabulary=5, dimension=8):
    random = np.random.default_rng(seed)
    supports = random.random((contexts, vocabulary)) < 0.5
    supports[:, 0], supports[:, -1] = True, False
    probabilities = np.where(supports, random.dirichlet(np.ones(vocabulary), size=contexts), 0)
    return random.normal(size=(contexts, dimension)), supports, probabilities / probabilities.sum(1, keepdims=True)


def next_token_parts(contexts, supports, probabilities):
    tokens = jnp.broadcast_to(jnp.eye(supports.shape[1]), (*supports.shape, supports.shape[1]))
    risk = decision_risk(tokens, jnp.asarray(contexts), jnp.asarray(probabilities))
    basis = jnp.asarray(equality_basis(next_token_problem(contexts, supports)))
    return risk, basis, jnp.asarray(supports)


def test_decoupled_training_finds_both_parts(key):
    contexts, supports, probabilities = next_tokens(2)
    risk, basis, inside = next_token_parts(contexts, supports, probabilities)
    problem = next_token_problem(contexts, supports)
    zeros = jnp.zeros((5, 8))
    optimizer = optax.partition(
        {"finite": optax.sgd(0.2), "diverging": normalized_descent(0.5)}, {"finite": "finite", "diverging": "diverging"}
    )
    trained = train(decoupled(risk, inside, basis), {"finite": zeros, "diverging": zeros}, optimizer, key, steps=2000)
    matrix = np.asarray(jax.jit(decoupled_matrix)(trained.params, basis))
    finite = equality_solution(problem, log_odds(problem, probabilities))
    assert_close(project_on_equalities(problem, matrix), finite, 1e-6)
    assert correlation(jnp.asarray(matrix - finite), jnp.asarray(max_margin(problem).direction)) > 0.9999


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": ones(3)}, r"labels have shape \(3,\); expected \(4,\)"),
        ({"queries": ones(3, 2)}, r"queries have shape \(3, 2\); expected \(4, 2\)"),
        ({"readout": ones(2)}, r"readout has shape \(2,\); expected \(6,\)"),
        ({"tokens": ones(4, 1, 6)}, "two tokens at least"),
        ({"tokens": jnp.full((4, 5, 6), jnp.nan)}, "inputs: tokens has 120 non-finite"),
    ],
)
def test_attention_risk_refuses(change, message):
    arguments = {"tokens": ones(4, 5, 6), "labels": ones(4), "queries": ones(4, 2), **change}
    with pytest.raises(ValueError, match=message):
        attention_risk(**arguments)


def test_other_refusals(key):
    with pytest.raises(ValueError, match=r"p is 1.0; expected a finite number above 1"):
        mirror_descent(0.1, 1.0)
    with pytest.raises(ValueError, match="needs the parameters"):
        mirror_descent(0.1, 3.0).update(ones(2), optax.EmptyState())
    risk, params = case(key, "joint")
    with pytest.raises(ValueError, match="params hold a trained readout"):
        rescaled(risk)(params)
    with pytest.raises(ValueError, match="queries and probabilities have shapes"):
        decision_risk(ones(2, 3, 4), ones(2, 4), ones(2, 4))
