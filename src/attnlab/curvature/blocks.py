"""One measurement for every block of the parameters, each linearised in that block alone."""

import re
from collections.abc import Callable, Iterable
from typing import TypeVar

from attnlab.curvature.density import SpectralDensity, spectral_density
from attnlab.curvature.operators import Block, Operator, Risk, hessian
from attnlab.trees import leaf_names
from attnlab.types import Params, PRNGKey

Measured = TypeVar("Measured")


def per_block(
    measure: Callable[[Operator], Measured],
    risk: Risk,
    params: Params,
    *,
    operator: Callable[..., Operator] = hessian,
    blocks: Iterable[Block] | None = None,
) -> dict[str, Measured]:
    """`measure` of every diagonal block of an operator, by name: `per_block(partial(trace, key=key), risk, params)`.

    `operator` is `hessian`, `ggn` or another that takes `block=`; `blocks` are names or compiled regular expressions,
    by default every leaf. Each block is linearised on its own, which skips the work of the others, and let go before
    the next. Raises `ValueError` for an unknown block.
    """
    if blocks is None:
        named: dict[str, Block] = {name: re.compile(f"^{re.escape(name)}$") for name in leaf_names(params)}
    else:
        named = {block.pattern if isinstance(block, re.Pattern) else block: block for block in blocks}
    return {name: measure(operator(risk, params, block=block)) for name, block in named.items()}


def block_densities(
    risk: Risk,
    params: Params,
    key: PRNGKey,
    *,
    operator: Callable[..., Operator] = hessian,
    blocks: Iterable[Block] | None = None,
    probes: int = 10,
    steps: int = 64,
) -> dict[str, SpectralDensity]:
    """The spectral density of every diagonal block (see `per_block` and `spectral_density`), all with the same probes.

    A block with fewer than `steps` parameters takes as many steps as it has parameters.
    """

    def measure(block: Operator) -> SpectralDensity:
        return spectral_density(block, key, probes=probes, steps=min(steps, block.dimension))

    return per_block(measure, risk, params, operator=operator, blocks=blocks)
