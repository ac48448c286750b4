"""Single precision: the closed form loses no more digits than automatic differentiation, offsets included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import closed_form_of, problem, risk_of

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
