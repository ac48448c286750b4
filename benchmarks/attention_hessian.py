"""The closed-form Hessian of attention against the best automatic differentiation, in one run.

    python benchmarks/attention_hessian.py [--quick] [--json FILE]

Questions, all from parameters and data to numbers: `norms`, the Frobenius norm of every block of H, H_o and H_f; `norms
of H`, those of H alone; `dense`, the whole matrix H. Peers: jitted `jax.hessian`; columns H e_i (and G e_i for H_o)
through a linearized gradient, chunked. Every answer is checked before anything is timed; ours and the peers take
turns; medians; compile time apart. Ratios are peer / ours: above 1 we are ahead.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from common.results import write_results
from jax.flatten_util import ravel_pytree
from rich.console import Console
from rich.table import Table

from attnlab.attention import attention_hessian
from attnlab.losses import square_loss
from attnlab.models.adapters import from_linen
from attnlab.models.attention import AttentionConfig, SelfAttention
from attnlab.objectives import objective

CHUNKS = (32, 128)
FULL = [(length, width) for length in (16, 32, 64) for width in (8, 16, 32)]
QUICK = [(64, 32)]
LARGE = (512, 64)
BLOCKS = 3  # key, query, value: of equal size here


def problem(length, width, dtype):
    config = AttentionConfig(key_dim=width, value_dim=width)
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = jax.random.normal(keys[0], (1, length, width), dtype)
    params = SelfAttention(config).init(keys[1], inputs)["params"]
    return config, (params, inputs, jax.random.normal(keys[2], inputs.shape, dtype))


def layer_objective(config, inputs, targets):
    return objective(from_linen(SelfAttention(config)), square_loss, inputs, targets)


def our_norms(config, parts):
    def norms(params, inputs, targets):
        hessian = attention_hessian(layer_objective(config, inputs, targets), params)
        names = hessian.names
        return jnp.stack([_matrix(lambda r, c, p=p: hessian.block(r, c, p).norm(), names) for p in parts])

    return norms


def _matrix(entry, names):
    values = {(r, c): entry(r, c) for i, r in enumerate(names) for c in names[i:]}
    return jnp.stack([jnp.stack([values[min(r, c), max(r, c)] for c in names]) for r in names])


def our_dense(config):
    return lambda params, *data: attention_hessian(layer_objective(config, *data), params).dense()


def flat_functions(config, params, inputs, targets):
    """Outputs and loss as functions of the flat parameters, and these."""
    flat, unravel = ravel_pytree(params)
    outputs = lambda vector: SelfAttention(config).apply({"params": unravel(vector)}, inputs)  # noqa: E731
    return flat, outputs, lambda out: square_loss(out, targets)


def autodiff_dense(config):
    def dense(params, inputs, targets):
        flat, outputs, loss = flat_functions(config, params, inputs, targets)
        return jax.hessian(lambda vector: loss(outputs(vector)))(flat)

    return dense


def autodiff_norms(config):
    """Block norms of H from the dense matrix of `jax.hessian`."""

    def norms(*data):
        dense = autodiff_dense(config)(*data)
        blocks = dense.reshape(BLOCKS, dense.shape[0] // BLOCKS, BLOCKS, -1)
        return jnp.linalg.norm(blocks, axis=(1, 3))[None]

    return norms


def product(config, data, part):
    """v -> H v, or G v = J^T H_loss J v, linearized once."""
    flat, outputs, loss = flat_functions(config, *data)
    if part == "hessian":
        return flat, jax.linearize(jax.grad(lambda vector: loss(outputs(vector))), flat)[1]
    out, push = jax.linearize(outputs, flat)
    pull = jax.linear_transpose(push, flat)
    curve = jax.linearize(jax.grad(loss), out)[1]
    return flat, lambda vector: pull(curve(push(vector)))[0]


def column_dense(config, chunk):
    def dense(*data):
        flat, apply = product(config, data, "hessian")
        column = lambda i: apply(jax.nn.one_hot(i, flat.size, dtype=flat.dtype))  # noqa: E731
        return jax.lax.map(column, jnp.arange(flat.size), batch_size=chunk)

    return dense


def column_norms(config, chunk, parts):
    """Squares of the columns summed block by block: the matrix is never stored."""

    def norms(*data):
        flat, full = product(config, data, "hessian")
        outer = product(config, data, "ggn")[1] if "ggn" in parts else None

        def squares(i):
            unit = jax.nn.one_hot(i, flat.size, dtype=flat.dtype)
            columns = [full(unit)]
            if outer is not None:
                columns += [outer(unit), columns[0] - outer(unit)]
            return jnp.stack([jnp.sum(c.reshape(BLOCKS, -1) ** 2, axis=1) for c in columns])

        by_column = jax.lax.map(squares, jnp.arange(flat.size), batch_size=chunk)
        return jnp.sqrt(jnp.einsum("jipr->prj", by_column.reshape(BLOCKS, -1, len(parts), BLOCKS)))

    return norms


@dataclass
class Contender:
    """A compiled function with its costs."""

    name: str
    function: Callable
    compile_seconds: float
    gigaflops: float
    temporary_megabytes: float


def compiled(name, function, data):
    start = time.perf_counter()
    executable = jax.jit(function).lower(*data).compile()
    seconds = time.perf_counter() - start
    flops = (executable.cost_analysis() or {}).get("flops", float("nan")) / 1e9
    memory = executable.memory_analysis()
    return Contender(name, executable, seconds, flops, memory.temp_size_in_bytes / 1e6 if memory else float("nan"))


def check(found, expected, dtype, what):
    error = float(np.linalg.norm(np.asarray(found - expected)) / np.linalg.norm(np.asarray(expected)))
    if not error < (1e-10 if dtype == "float64" else 1e-3):
        raise AssertionError(f"{what}: relative difference {error:.2g}; nothing is timed before the answers agree")


def interleaved(contenders, data, rounds):
    """Median seconds of each; one turn each a round, the quick ones three times a turn."""
    seconds = {contender.name: [] for contender in contenders}
    for _ in range(rounds):
        for contender in contenders:
            for _ in range(3 if contender is contenders[0] else 1):
                start = time.perf_counter()
                jax.block_until_ready(contender.function(*data))
                seconds[contender.name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def questions(config):
    """question -> ours, {peer: function}."""
    parts = ("hessian", "ggn", "functional")
    columns = lambda make: {f"HVP columns, chunks of {chunk}": make(chunk) for chunk in CHUNKS}  # noqa: E731
    autodiff = "jax.hessian"
    return {
        "norms": (our_norms(config, parts), columns(lambda chunk: column_norms(config, chunk, parts))),
        "norms of H": (
            our_norms(config, ("hessian",)),
            {autodiff: autodiff_norms(config), **columns(lambda chunk: column_norms(config, chunk, ("hessian",)))},
        ),
        "dense": (
            our_dense(config),
            {autodiff: autodiff_dense(config), **columns(lambda chunk: column_dense(config, chunk))},
        ),
    }


def compare(length, width, dtype, rounds):
    config, data = problem(length, width, dtype)
    rows = []
    for question, (ours, peers) in questions(config).items():
        where = f"{question}, L={length}, d={width}, {dtype}"
        contenders = [compiled("closed form", ours, data)]
        contenders += [compiled(name, function, data) for name, function in peers.items()]
        expected = contenders[0].function(*data)
        for contender in contenders[1:]:
            check(contender.function(*data), expected, dtype, f"{where}, {contender.name}")
        rows.append((where, contenders, interleaved(contenders, data, rounds)))
    return rows


def compare_large(dtype, rounds):
    """All norms at a size whose dense Hessian no one stores; the peer's time is that of its products, times columns."""
    length, width = LARGE
    config, data = problem(length, width, dtype)
    size, columns = BLOCKS * width**2, 64
    parts = ("hessian", "ggn", "functional")

    def some_columns(*data):
        flat, full = product(config, data, "hessian")
        outer = product(config, data, "ggn")[1]
        both = lambda i: jnp.sum((v := jax.nn.one_hot(i, flat.size, dtype=flat.dtype)) * (full(v) - outer(v)))  # noqa: E731
        return jax.lax.map(both, jnp.arange(columns), batch_size=32)

    name = f"HVP columns (time of {columns}, times {size // columns})"
    contenders = [compiled("closed form", our_norms(config, parts), data), compiled(name, some_columns, data)]
    seconds = interleaved(contenders, data, rounds)
    seconds[name] *= size / columns
    return [(f"norms, L={length}, d={width}, {dtype}", contenders, seconds)]


def report(rows, console):
    table = Table("question", "method", "ms", "ratio", "Gflop", "temp. MB", "compile s")
    ratios = {}
    for where, contenders, seconds in rows:
        ours = seconds[contenders[0].name]
        best = min(seconds[contender.name] for contender in contenders[1:])
        ratios[f"{where}: best autodiff"] = best / ours
        for contender in contenders:
            ratio = seconds[contender.name] / ours
            if contender is not contenders[0]:
                ratios[f"{where}: {contender.name}"] = ratio
            cells = (1e3 * seconds[contender.name], ratio, contender.gigaflops, contender.temporary_megabytes)
            numbers = [f"{cell:.3g}" for cell in (*cells, contender.compile_seconds)]
            table.add_row(where if contender is contenders[0] else "", contender.name, *numbers)
        table.add_section()
    console.print(table)
    console.print("Gflop is XLA's count; it counts the body of a loop once, so chunked columns show one chunk only.")
    return ratios


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one size, few rounds: about a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the ratios there")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    rounds = 3 if arguments.quick else 7
    rows = []
    for dtype in ("float64", "float32"):
        for length, width in QUICK if arguments.quick else FULL:
            rows += compare(length, width, dtype, rounds)
        if not arguments.quick:
            rows += compare_large(dtype, 3)
    write_results(arguments.json, report(rows, Console()))


if __name__ == "__main__":
    main()
