"""The operations of a `KroneckerSum` against the dense block, and the nearest Kronecker product against a dense SVD."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import closed_form_of, problem

from attnlab.attention import KroneckerSum, Leaf, Term, nearest_kronecker
from attnlab.attention import kronecker as module
from attnlab.trees import ravel
from compare import assert_close
from nightly import nightly

LAYERS = ("heads_projection", "merged_heads", "linear_causal")


def blocks_of(name, key):
    """All blocks of a case, every part."""
    config, loss, params, inputs, targets, mask = problem(name, key)
    hessian = closed_form_of(config, loss, params, inputs, targets, mask)
    return [
        hessian.block(row, column, part) for row in params for column in params for part in ("hessian", "functional")
    ]


def rearranged(block, pairing):
    """The dense block with one pair of parameter axes as rows and the other as columns."""
    (r, c), (s, d) = block.row.shape, block.column.shape
    array = np.asarray(block.dense()).reshape(r, c, s, d)
    order = (0, 2, 1, 3) if pairing == "straight" else (0, 3, 1, 2)
    left = r * (s if pairing == "straight" else d)
    return array.transpose(order).reshape(left, -1)


@pytest.mark.parametrize("name", nightly(LAYERS, ("linear_causal",)))
def test_operations_against_the_dense_block(name, key):
    blocks = blocks_of(name, key)
    for block in blocks[::5]:
        dense = np.asarray(block.dense())
        vector = jnp.sin(jnp.arange(block.column.size, dtype=float)).reshape(block.column.shape)
        assert_close(block.mv(vector).ravel(), dense @ np.ravel(vector), 1e-12, 1 + np.linalg.norm(dense))
        if block.row == block.column and block.terms:
            operator = block.operator()
            assert_close(ravel(operator.mv(vector)), operator.dense() @ np.ravel(vector), 1e-12)
            assert_close(operator.dense(), dense, 1e-14)
        assert_close(block.T.dense(), dense.T, 1e-14, 1 + np.linalg.norm(dense))
    first, second = blocks[0], blocks[1]
    dense = [np.asarray(block.dense()) for block in (first, second)]
    assert_close(first.inner(second), np.sum(dense[0] * dense[1]), 1e-12, np.linalg.norm(dense[0]) ** 2)
    assert_close((first - 0.3 * second).dense(), dense[0] - 0.3 * dense[1], 1e-12)
    assert_close((first + second).norm(), np.linalg.norm(dense[0] + dense[1]), 1e-12)


@pytest.mark.parametrize("name", nightly(LAYERS, ("linear_causal",)))
@pytest.mark.parametrize("pairing", nightly(("straight", "crossed"), ("crossed",)))
def test_nearest_kronecker_against_the_dense_svd(name, pairing):
    blocks = blocks_of(name, jax.random.key(1))
    for block in (blocks[0], blocks[3], blocks[6]):
        nearest = nearest_kronecker(block, pairing=pairing)
        values = np.linalg.svd(rearranged(block, pairing), compute_uv=False)
        product = block.product(nearest.left, nearest.right, pairing)
        if not block.terms:
            assert nearest.relative_error == 0
            continue
        norm = np.linalg.norm(values)
        best = np.sqrt(np.sum(values[1:] ** 2)) / norm
        assert abs(nearest.relative_error - best) < 1e-7, f"{nearest.relative_error} against {best}"
        assert abs((block - product).norm() / norm - best) < 1e-7
        if pairing == "straight":
            assert_close(product.dense(), np.kron(nearest.left, nearest.right), 1e-14)
        assert_close(np.linalg.norm(nearest.left), np.linalg.norm(nearest.right))
        assert np.trace(nearest.left) >= 0


def test_one_kronecker_product_is_its_own_nearest(key):
    """Square loss, one head: the value block is M^T M ⊗ I, so K-FAC is exact there."""
    config, loss, params, inputs, targets, _ = problem("batch", key)
    block = closed_form_of(config, loss, params, inputs, targets).block("value", "value")
    nearest = nearest_kronecker(block)
    assert nearest.relative_error < 1e-7
    assert_close(np.kron(nearest.left, nearest.right), block.dense())


def test_a_user_can_measure_k_fac(key):
    """The K-FAC pair of a block, and its error, without the block: never below the nearest product's."""
    config, loss, params, inputs, targets, _ = problem("cross_entropy", key)
    hessian = closed_form_of(config, loss, params, inputs, targets)
    block = hessian.block("value", "value", "ggn")
    tokens = hessian.moments.first[:, 0].reshape(-1, inputs.shape[-1])
    curvature = hessian.curvature.reshape(-1, config.value_dim, config.value_dim)
    k_fac = block.product(tokens.T @ tokens, jnp.mean(curvature, axis=0))
    error = (block - k_fac).norm() / block.norm()
    assert_close(error, np.linalg.norm(block.dense() - k_fac.dense()) / np.linalg.norm(block.dense()))
    assert nearest_kronecker(block).relative_error <= error + 1e-12


def test_stacked_product_is_the_sum_of_the_products(key):
    block = blocks_of("heads_projection", key)[0]
    left = jax.random.normal(key, (3, block.row.shape[0], block.column.shape[0]))
    right = jax.random.normal(key, (3, block.row.shape[1], block.column.shape[1]))
    expected = sum(np.kron(a, b) for a, b in zip(left, right, strict=True))
    assert_close(block.product(left, right).dense(), expected, 1e-14)


def test_in_pieces_over_the_tokens(key, monkeypatch):
    """The pieces of a large inner product add up to the whole, also when they do not divide the tokens."""
    block = blocks_of("heads_projection", key)[2]
    whole, count = block.norm(), module._pieces
    monkeypatch.setattr(module, "_WORKING_ELEMENTS", 1)
    pieces = []
    monkeypatch.setattr(module, "_pieces", lambda *network: pieces.append(count(*network)) or pieces[-1])
    assert_close(block.norm(), whole, 1e-14)
    assert max(pieces) > 1


def test_bad_input(key):
    block = blocks_of("linear_causal", key)[2]
    with pytest.raises(ValueError, match="this block acts on"):
        block.mv(jnp.ones((2, 2)))
    with pytest.raises(ValueError, match="only a diagonal block has a trace"):
        KroneckerSum((), Leaf((4, 3)), Leaf((4, 2)), "float64").trace()
    with pytest.raises(ValueError, match="only a diagonal block is an operator"):
        KroneckerSum((), Leaf((4, 3)), Leaf((4, 2)), "float64").operator()
    with pytest.raises(ValueError, match="expected the same parameters"):
        block.inner(KroneckerSum((), Leaf((4, 3)), Leaf((4, 1)), "float64"))
    with pytest.raises(ValueError, match="straight product for parameters"):
        block.product(jnp.ones((4, 4)), jnp.ones((9, 9)))


def test_zero_block():
    zero = KroneckerSum((), Leaf((4, 3)), Leaf((4, 3)), "float64")
    assert zero.norm() == zero.trace() == zero.inner(zero) == 0
    assert not np.any(zero.dense())
    assert not np.any(zero.mv(jnp.ones((4, 3))))


def test_a_term_transposed_twice_is_itself():
    term = Term((jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.ones((2, 4, 4))), ("nr", "ns", "ncd"), "straight", "A ⊗ B")
    assert term.T.formula == "[A ⊗ B]ᵀ"
    assert (term.T.T.indices, term.T.T.formula) == (term.indices, term.formula)
