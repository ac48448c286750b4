"""Single precision: the closed form loses no more digits than automatic differentiation, offsets included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import closed_form_of, problem, risk_of

from attnlab.attention import attention_hessian
from attnlab.losses import square_loss
from attnlab.models.adapters import from_linen
from attnlab.models.attention import AttentionConfig, SelfAttention
from attnlab.objectives import objective
from compare import relative_error
from oracles import ggn, hessian


def cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def errors(name, key, offset):
    """Relative errors in float32 of the closed form and of autodiff, against the same numbers in float64."""
    config, loss, *single, mask = problem(name, key, jnp.float32, offset)
    double = cast(single, jnp.float64)
    risks = {dtype: risk_of(config, loss, *data[1:], mask) for dtype, data in (("32", single), ("64", double))}
    closed_form = closed_form_of(config, loss, *single, mask)
    found = {}
    for part, oracle in (("hessian", hessian), ("ggn", ggn)):
        exact, autodiff = oracle(risks["64"], double[0]), oracle(risks["32"], single[0])
        assert autodiff.dtype == closed_form.dense(part).dtype == jnp.float32
        found[part] = relative_error(closed_form.dense(part), exact), relative_error(autodiff, exact)
    return found


@pytest.mark.parametrize(
    "offset", [pytest.param(0.0, marks=pytest.mark.slow, id="centred"), pytest.param(30.0, id="offset30")]
)
@pytest.mark.parametrize(
    "name",
    ["linear", *(pytest.param(n, marks=pytest.mark.slow) for n in ("cross_entropy", "batch", "heads_projection"))],
)
def test_at_least_as_accurate_as_autodiff(name, offset):
    """Mean over seeds; where both are at the rounding error itself (linear attention), either may be ahead."""
    draws = [errors(name, jax.random.key(seed), offset) for seed in (1, 2, 3, 4, 5)]
    for part in ("hessian", "ggn"):
        ours, theirs = np.mean([draw[part] for draw in draws], axis=0)
        assert ours <= max(theirs, 2 * np.finfo(np.float32).eps)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e5, 1e9])
def test_huge_tokens_choose_one_and_give_its_curvature(scale):
    """Scores of 1e10 and more, in one compiled program: attention is one-hot, and only the value block is left."""
    layer = SelfAttention(AttentionConfig(key_dim=8, value_dim=4))
    tokens = scale * jax.random.normal(jax.random.key(0), (2, 16, 12), jnp.float32)
    params = layer.init(jax.random.key(1), tokens)["params"]
    params = cast(params, jnp.float32)
    risk = objective(from_linen(layer), square_loss, tokens, jnp.zeros((2, 16, 4), jnp.float32))
    exact = attention_hessian(risk, params)
    winners = jnp.take_along_axis(tokens, jnp.argmax(exact.moments.weights[:, 0], axis=-1)[..., None], axis=1)
    np.testing.assert_array_equal(exact.moments.first[:, 0], winners)
    gram = np.einsum("bia,bic->ac", *[np.asarray(winners, float)] * 2)
    expected = 2 / (2 * 16 * 4) * np.linalg.norm(gram) * 2  # 2 / (L v) of the mean, and four equal columns
    norms = exact.norms()["hessian"]
    np.testing.assert_allclose(norms["value", "value"], expected, rtol=1e-5)
    assert max(float(norms[pair]) for pair in norms if pair != ("value", "value")) == 0
