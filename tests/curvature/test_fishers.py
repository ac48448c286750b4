"""Fisher matrices against sums of outer products of single gradients, the preconditioned Hessian."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import oracles
from attnlab.curvature.operators import empirical_fisher, fisher, hessian
from attnlab.curvature.transforms import cross, precondition
from attnlab.losses import square_loss
from attnlab.objectives import objective
from attnlab.trees import block_slices
from cases import CASES
from compare import assert_close


@jax.jit
def gradient_of(risk, params, inputs, targets):
    return ravel_pytree(jax.grad(lambda p: risk.loss(risk.predict(p, inputs), targets))(params))[0]


@pytest.mark.parametrize("name", ["softmax/square", "two_layers/cross_entropy", "language_model/cross_entropy"])
def test_empirical_fisher_is_the_mean_outer_product_of_example_gradients(name, key):
    risk, params = CASES[name](key)
    count = risk.targets.shape[0]
    gradients = [gradient_of(risk, params, risk.inputs[n : n + 1], risk.targets[n : n + 1]) for n in range(count)]
    expected = sum(np.outer(g, g) for g in gradients) / count
    assert_close(empirical_fisher(risk, params, check=False).dense(), expected)
    rows = block_slices(params)
    block = next(iter(rows))
    assert_close(empirical_fisher(risk, params, block=block, check=False).dense(), expected[rows[block], rows[block]])


def test_fisher_of_a_classifier_is_the_expected_outer_product_over_its_own_labels(key):
    risk, params = CASES["softmax/cross_entropy"](key)
    flat, unravel = ravel_pytree(params)
    log_probabilities = jax.jit(lambda vector: jax.nn.log_softmax(risk.outputs(unravel(vector)), axis=-1))
    scores, probabilities = jax.jit(jax.jacrev(log_probabilities))(flat), jnp.exp(log_probabilities(flat))
    expected = jnp.einsum("blc,blci,blcj->ij", probabilities, scores, scores) / probabilities[..., 0].size
    assert_close(fisher(risk, params, check=False).dense(), expected)


def test_fisher_of_a_regression_is_the_gram_matrix_of_its_jacobian(key):
    # Unit mass of a Gaussian of variance 1/2 has Fisher information 2 in its mean.
    risk, params = CASES["softmax/square"](key)
    flat, unravel = ravel_pytree(params)
    jacobian = jax.jit(jax.jacrev(lambda vector: risk.outputs(unravel(vector)).ravel()))(flat)
    assert_close(fisher(risk, params, check=False).dense(), 2 * jacobian.T @ jacobian / jacobian.shape[0])


def test_fisher_of_an_unknown_likelihood(key):
    risk, params = CASES["softmax/square"](key)
    scaled = objective(risk.predict, lambda o, t: 2.0 * square_loss(o, t), risk.inputs, risk.targets)
    with pytest.raises(TypeError, match=r"one of: square_loss, cross_entropy\. Take ggn, or empirical_fisher"):
        fisher(scaled, params)


def test_examples_that_cannot_be_told_apart():
    risk = objective(lambda params, x: params * x, square_loss, jnp.ones(()), jnp.ones(3))
    with pytest.raises(ValueError, match="expected one number of examples"):
        empirical_fisher(risk, jnp.ones(3))


def test_preconditioned_hessian_of_all_parameters_and_of_a_block(key):
    risk, params = CASES["softmax/square"](key)
    preconditioner = jax.tree.map(lambda leaf: 0.1 + leaf**2, params)
    root = np.sqrt(ravel_pytree(preconditioner)[0])
    expected = oracles.hessian(risk, params) / np.outer(root, root)
    assert_close(precondition(hessian(risk, params), preconditioner).dense(), expected)
    rows = block_slices(params)["query"]
    product = jax.jit(lambda params, vector: precondition(hessian(risk, params), preconditioner).flat_mv(vector))
    assert_close(product(params, expected[0]), expected @ expected[0])  # a constant of a jitted program
    block = precondition(hessian(risk, params, block="query"), preconditioner)
    assert_close(block.dense(), expected[rows, rows])


def test_the_preconditioned_sharpness_of_a_quadratic_is_where_rmsprop_turns_unstable(key):
    # With nu held (decay 1), a quadratic and one parameter per eigenvalue, gradient descent preconditioned by P
    # diverges exactly when the learning rate passes 2 / lambda_max(P^-1/2 H P^-1/2).
    root = jnp.diag(jnp.array([1.0, 2.0, 3.0]))
    risk = objective(lambda params, _: root @ params, lambda o, _: 0.5 * jnp.vdot(o, o), jnp.ones(1), jnp.ones(1))
    start = jnp.array([1.0, 1.0, 1.0])
    nu = jax.random.uniform(key, (3,), minval=0.5, maxval=2.0)
    state = optax.ScaleByRmsState(nu=nu)
    operator = precondition(hessian(risk, start), jnp.sqrt(nu + 1e-8))
    sharpness = np.linalg.eigvalsh(operator.dense())[-1]
    optimizer = optax.scale_by_rms(decay=1.0)
    for factor, grows in ((0.98, False), (1.02, True)):
        params = start
        for _ in range(300):
            updates, state = optimizer.update(jax.grad(risk)(params), state, params)
            params = params - factor * 2 / sharpness * updates
        assert (float(jnp.max(jnp.abs(params))) > 1.0) == grows


class TestBadPreconditioners:
    def test_entries_that_are_not_positive(self, key):
        risk, params = CASES["softmax/square"](key)
        with pytest.raises(ValueError, match="zero or negative"):
            precondition(hessian(risk, params), jax.tree.map(jnp.zeros_like, params))

    def test_another_structure(self, key):
        operator = hessian(*CASES["softmax/square"](key))
        with pytest.raises(ValueError, match="preconditioner has the structure"):
            precondition(operator, jnp.ones(3))


def test_cross_blocks(key):
    risk, params = CASES["softmax/square"](key)
    rows = block_slices(params)
    dense = oracles.hessian(risk, params)
    block = cross(hessian(risk, params), "query", "value")
    expected = dense[rows["query"], rows["value"]]
    assert block.shape == expected.shape
    assert_close(block.dense(), expected)
    assert_close(block.transpose.dense(), expected.T)
    assert_close(block.gram().dense(), expected.T @ expected)
    vector = jax.tree.map(jnp.ones_like, block.columns)
    assert_close(block.mv(vector)["query"].ravel(), expected.sum(axis=1))
    with pytest.raises(ValueError, match="structure"):
        block.mv(params)
