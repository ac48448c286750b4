"""One measurement for every block of the parameters, each linearised in that block alone."""

import re
from collections.abc import Callable, Iterable
from typing import TypeVar

from attnlab.checks import check_key, check_whole
from attnlab.curvature.density import SpectralDensity, spectral_density
from attnlab.curvature.guards import NonFiniteProductError
from attnlab.curvature.operator import Operator
from attnlab.curvature.operators import Block, hessian
from attnlab.objectives import Risk
from attnlab.runs.session import AT_ONCE, Session
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
    the next. Raises `ValueError` for an unknown block; `NonFiniteProductError`, with the finished blocks by name as its
    `partial`.
    """
    named = _named(params, blocks)
    return _measure_each(lambda name, block: measure(block), risk, params, operator, named)


def block_densities(
    risk: Risk,
    params: Params,
    key: PRNGKey,
    *,
    operator: Callable[..., Operator] = hessian,
    blocks: Iterable[Block] | None = None,
    samples: int = 10,
    steps: int | None = None,
    session: Session = AT_ONCE,
) -> dict[str, SpectralDensity]:
    """The spectral density of every diagonal block (see `per_block` and `spectral_density`), all with the same samples.

    A block with fewer than `steps` parameters (by default 64) takes as many steps as it has parameters. In the
    directory of the session each block has a folder, with `/` and the like in its name written as in a URL: a run that
    was killed does no finished block again. The report is told the block as `Progress.part`.
    """
    check_key(key)
    if steps is not None:
        check_whole(steps=steps)
    named = _named(params, blocks)
    numbers = {name: number for number, name in enumerate(named, 1)}

    def measure(name: str, block: Operator) -> SpectralDensity:
        return spectral_density(
            block,
            key,
            samples=samples,
            steps=None if steps is None else min(steps, block.dimension),
            session=session.part(name, f"{name} ({numbers[name]} of {len(named)})"),
        )

    return _measure_each(measure, risk, params, operator, named)


def _named(params: Params, blocks: Iterable[Block] | None) -> dict[str, Block]:
    if blocks is None:
        return {name: re.compile(f"^{re.escape(name)}$") for name in leaf_names(params)}
    return {block.pattern if isinstance(block, re.Pattern) else block: block for block in blocks}


def _measure_each(
    measure: Callable[[str, Operator], Measured],
    risk: Risk,
    params: Params,
    operator: Callable[..., Operator],
    named: dict[str, Block],
) -> dict[str, Measured]:
    found: dict[str, Measured] = {}
    for name, block in named.items():
        try:
            found[name] = measure(name, operator(risk, params, block=block))
        except NonFiniteProductError as error:
            raise NonFiniteProductError(f"block {name}: {error}", found) from error
    return found
