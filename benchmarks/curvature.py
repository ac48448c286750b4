"""Matrix-free curvature against the tools people use for it, on the same weights and data.

    python benchmarks/curvature.py [--quick] [--gates] [--json FILE] [--peers PYTHON]

Cases: `attention`, one attention layer (16,384 parameters, 32 x 32 tokens of width 64, square loss); `gpt`, a LayerNorm
language model of two blocks (535,040 parameters, 16 x 64 tokens, cross-entropy). PyHessian, curvlinops,
hessian-eigenthings (torch) and matfree (JAX) run in the interpreter PYTHON, an environment of their own where
`pip install -e ".[peers]"` was said, one process each, and wait while another runs. What it lacks is skipped with a
message. Everything runs once before it is timed; a peer whose top eigenvalues are not ours to 1 % is not compared, and
that is said; else ours and the peer take turns, each on all cores. Ratios are of medians of wall time, peer / ours:
above 1 we are ahead. Compile time is reported apart: the first call less that median, of a peer in torch its warm-up.
On a busy machine pin it to one core (`taskset -c 0`) and read CPU times.

The gates come last: what each library gets right on a small model (symmetry, unequal batches, a tiny loss, honest
error bars). matfree takes any product, and answers for what it makes of it alone.
"""

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from common.results import write_results
from jax.flatten_util import ravel_pytree
from peers import gates
from peers.cases import CASES, attention, gates_model, gpt
from peers.client import peer_versions, peers_of

from attnlab.analysis import make_cores_devices
from attnlab.attention import attention_hessian
from attnlab.curvature import block_densities, eigenpairs, ggn, hessian, spectral_density
from attnlab.runs.session import Session
from attnlab.trees import dimension, leaf_names

SIZES = {"attention": (10, 64), "gpt": (1, 32)}  # probes, steps of a density
AGREEMENT = 1e-2  # largest relative difference between the top eigenvalues of two libraries that are compared


def clocked(function):
    wall, cpu = time.perf_counter(), time.process_time()
    value = jax.block_until_ready(function())
    return value, time.perf_counter() - wall, time.process_time() - cpu


def alternate(rounds, **functions):
    """Median wall and CPU seconds of functions that take turns, after one run of each."""
    times = {name: [] for name in functions}
    for function in functions.values():
        jax.block_until_ready(function())
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(clocked(function)[1:])
    return {
        name: tuple(statistics.median(column) for column in zip(*rows, strict=True)) for name, rows in times.items()
    }


class Times(NamedTuple):
    """Seconds: wall time of the first call, medians of the wall and CPU times of the others."""

    first: float
    wall: float
    cpu: float


def take_turns(rounds, function, ask):
    """Ours and a peer's, once each, then in turn: both first values, and both times (None where the peer fails)."""
    jax.clear_caches()  # what ours compiled before, a peer in its own process has not
    value, *ours = clocked(function)
    answer = ask()
    if "error" in answer:
        return value, answer, None
    rows = [(ours, answer), *((clocked(function)[1:], ask()) for _ in range(rounds))]
    pairs = ([row for row, _ in rows], [(answer["wall"], answer["cpu"]) for _, answer in rows])
    medians = [map(statistics.median, zip(*column[1:], strict=True)) for column in pairs]
    return value, answer, [Times(column[0][0], *median) for column, median in zip(pairs, medians, strict=True)]


class Table:
    """Prints ratios as they come and keeps them, and the seconds of compiling, ours and the peer's."""

    def __init__(self):
        self.ratios: dict[str, float] = {}
        self.compile_seconds: dict[str, list[float]] = {}

    def add(self, key, ratio, note=""):
        """One line."""
        self.ratios[key] = round(float(ratio), 3)
        print(f"  {key:<88} {ratio:>8.2f}   {note}", flush=True)

    def add_times(self, what, library, size, ours, theirs, note):
        """Wall and CPU time, and what compiling took."""
        note = f"ours {ours.wall:.2f} s, theirs {theirs.wall:.2f} s; {note}"
        self.add(f"{what}, {library} / ours: {size}", theirs.wall / ours.wall, note)
        self.add(f"{what} CPU time, {library} / ours: {size}", theirs.cpu / ours.cpu)
        key, seconds = f"{what}, compile time, {library} and ours: {size}", [t.first - t.wall for t in (theirs, ours)]
        self.compile_seconds[key] = [round(x, 3) for x in seconds]
        print(f"  {key:<88} {'':>8}   ours {seconds[1]:.2f} s, theirs {seconds[0]:.2f} s", flush=True)


def comparable(library, what, error):
    """Whether a peer's numbers are ours to `AGREEMENT`; says it if they are not."""
    if error <= AGREEMENT:
        return True
    print(f"  {library} not compared, {what}: its top eigenvalues differ from ours by {error:.0e}", flush=True)
    return False


def our_density(risk, params, probes, steps):
    return spectral_density(hessian(risk, params), jax.random.key(0), samples=probes, steps=steps)


def compare_densities(table, case, peer, rounds, scale):
    risk, params = CASES[case]()
    probes, steps = SIZES[case][0], max(8, int(SIZES[case][1] * scale))
    if case == "gpt":  # before anything else: what a process once held it keeps for later calls
        compare_memory(table, risk, params, peer, steps=64)
    found, theirs, times = take_turns(
        rounds,
        lambda: our_density(risk, params, probes, steps),
        lambda: peer.ask("density", probes=probes, steps=steps),
    )
    if times is None:
        print(f"  {peer.library} skipped on {case}: {theirs['error'][:160]}")
        return
    size = f"{case}, {dimension(params):,} parameters, {probes} probes x {steps} steps"
    # The top of the spectrum is the same number in both; the first moment has its standard error.
    agreement = abs(theirs["top"] / float(jnp.max(found.nodes)) - 1)
    if comparable(peer.library, f"density: {size}", agreement):
        table.add_times("density", peer.library, size, *times, f"top eigenvalue agrees to {agreement:.0e}")


def compare_memory(table, risk, params, peer, steps):
    """Memory of one probe beyond weights, data and libraries. The two are not measured alike: ours is what XLA plans,
    without compiling; theirs is how far the process's peak rose, which in JAX has the compiler's memory in it."""
    theirs, ours = peer.ask("density", probes=1, steps=steps)["megabytes"], our_megabytes(risk, params, steps)
    note = f"ours {ours:.0f} MiB, planned by XLA; theirs {theirs:.0f} MiB, rise of the process's peak"
    table.add(f"extra memory, {peer.library} / ours: gpt, {steps} steps", theirs / ours, note)


def our_megabytes(risk, params, steps):
    """What a density takes on top of weights and data: saved activations, and the compiled loop's temporaries."""
    from attnlab.curvature.density import _in_one_program

    operator = hessian(risk, params)
    keys = jax.random.split(jax.random.key(0), (1, 1))
    memory = _in_one_program.lower(operator, keys, steps, None).compile().memory_analysis()
    saved = sum(leaf.nbytes for leaf in jax.tree.leaves(operator.linear))
    return (saved + memory.temp_size_in_bytes) / 2**20


def compare_eigenpairs(table, peer, count, rounds):
    risk, params = gpt()
    solve = lambda seed: eigenpairs(hessian(risk, params), jax.random.key(seed), count, tolerance=1e-3)  # noqa: E731
    pairs, theirs, times = take_turns(rounds, lambda: solve(0), lambda: peer.ask("top", count=count))
    if times is None:
        print(f"  {peer.library} skipped: {theirs['error'][:160]}")
        return
    residual = float(jnp.max(pairs.residuals) / jnp.max(jnp.abs(pairs.values)))
    size = f"gpt, top {count}"
    error = max(abs(np.sort(theirs["values"])[-3:] / np.asarray(pairs.values)[-3:] - 1))
    if comparable(peer.library, f"eigenpairs: {size}", error):
        table.add_times("eigenpairs", peer.library, size, *times, f"top three agree to {error:.0e}")
    note = f"ours {residual:.0e}, theirs {theirs['residual']:.0e}"
    table.add(
        f"eigenpairs, largest relative residual, {peer.library} / ours: {size}", theirs["residual"] / residual, note
    )
    if "products" in theirs:
        products = statistics.median(int(solve(seed).products) for seed in range(5))
        note = f"ours {products} (median of 5 starts, with 8 that look for copies), ARPACK {theirs['products']}"
        table.add(f"eigenpairs, products of ARPACK / ours: {size}", theirs["products"] / products, note)


@jax.jit
def gradients(risk, flat, point, count):
    """`count` gradients one after another: each depends on the last, so that none is left out."""
    unravel = ravel_pytree(point)[1]

    def step(_, flat):
        return flat - 1e-9 * ravel_pytree(jax.grad(risk)(unravel(flat)))[0]

    return jax.lax.fori_loop(0, count, step, flat)


@jax.jit
def products(operator, flat, count):
    def step(_, flat):
        image = operator.flat_mv(flat)
        return image / jnp.linalg.norm(image)

    return jax.lax.fori_loop(0, count, step, flat)


@jax.jit
def plain_product(risk, params, vector):
    return jax.jvp(jax.grad(risk), (params,), (vector,))[1]


def product_costs(table, case, rounds):
    risk, params = CASES[case]()
    flat, count = ravel_pytree(params)[0], 8 if case == "gpt" else 40
    full, gauss = hessian(risk, params), ggn(risk, params)
    times = alternate(
        rounds,
        gradient=lambda: gradients(risk, flat, params, count),
        product=lambda: products(full, flat, count),
        ggn=lambda: products(gauss, flat, count),
        apply=lambda: [full.mv(params) for _ in range(count)],
        plain=lambda: [plain_product(risk, params, params) for _ in range(count)],
    )
    cpu = {name: seconds[1] for name, seconds in times.items()}
    size = f"{case}, {dimension(params):,} parameters"
    note = f"gradient {1e3 * cpu['gradient'] / count:.1f} ms of CPU time"
    table.add(f"CPU time, a gradient / one Hessian product in a loop: {size}", cpu["gradient"] / cpu["product"], note)
    table.add(f"CPU time, a gradient / one GGN product in a loop: {size}", cpu["gradient"] / cpu["ggn"])
    table.add(f"CPU time, jitted jvp(grad) / linearised product, one call each: {size}", cpu["plain"] / cpu["apply"])


def long_run_cost(table, case, rounds):
    risk, params = CASES[case]()
    operator, key = hessian(risk, params), jax.random.key(0)
    probes, steps = SIZES[case]
    with tempfile.TemporaryDirectory() as folder:
        number = iter(range(10**6))

        def saved():
            where = Path(folder) / str(next(number))
            reports: list = []
            return spectral_density(
                operator, key, samples=probes, steps=steps, session=Session(directory=where, report=reports.append)
            ).nodes

        times = alternate(
            rounds, single=lambda: spectral_density(operator, key, samples=probes, steps=steps).nodes, saved=saved
        )
    for clock, column in (("", 0), ("CPU time, ", 1)):
        ratio = times["single"][column] / times["saved"][column]
        table.add(f"{clock}density in one jitted call / saved and reported every 16 steps: {case}", ratio)


def block_costs(table, rounds):
    risk, params = gpt()
    key, steps, blocks = jax.random.key(0), 32, len(leaf_names(params))
    times = alternate(
        rounds,
        blocks=lambda: [d.nodes for d in block_densities(risk, params, key, samples=1, steps=steps).values()],
        whole=lambda: spectral_density(hessian(risk, params), key, samples=1, steps=steps).nodes,
    )
    ratio = blocks * times["whole"][1] / times["blocks"][1]
    table.add(f"CPU time, {blocks} x a full density / densities of all {blocks} blocks: gpt, {steps} steps", ratio)


def dense_costs(table, rounds):
    risk, params = attention(width=16)
    flat, unravel = ravel_pytree(params)
    autodiff = jax.jit(lambda risk, flat: jax.hessian(lambda vector: risk(unravel(vector)))(flat))
    functions = {
        "autodiff": lambda: autodiff(risk, flat),
        "products": lambda: hessian(risk, params).dense(),
        "closed form": lambda: attention_hessian(risk, params).dense(),
    }
    expected = functions["autodiff"]()
    times = alternate(rounds, **functions)
    for name in ("products", "closed form"):
        note = f"largest difference {jnp.max(jnp.abs(expected - functions[name]())):.0e}"
        size = f"attention, {flat.size:,} parameters"
        table.add(f"dense, jax.hessian / ours ({name}): {size}", times["autodiff"][0] / times[name][0], note)
        table.add(f"dense CPU time, jax.hessian / ours ({name}): {size}", times["autodiff"][1] / times[name][1])


def memory_of_steps(table):
    risk, params = gpt()
    short, long = (our_megabytes(risk, params, steps) for steps in (16, 64))
    table.add("extra memory of a density, 16 steps / 64 steps: gpt", short / long, f"{long:.0f} MiB")


def performance(table, quick, python):
    rounds = 2 if quick else 5
    print("peer / ours: above 1 we are ahead")
    for case in CASES:
        product_costs(table, case, rounds)
        long_run_cost(table, case, rounds)
    dense_costs(table, rounds)
    memory_of_steps(table)
    if not quick:
        block_costs(table, rounds)
    for case in ("attention",) if quick else CASES:
        for peer in peers_of(case, python):
            compare_densities(table, case, peer, rounds, scale=0.25 if quick else 1.0)
            if case == "gpt" and peer.library != "matfree":
                compare_eigenpairs(table, peer, 10, rounds=3)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds; of the peers the small case alone")
    parser.add_argument("--gates", action="store_true", help="the gates alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the ratios there")
    parser.add_argument("--peers", default=sys.executable, metavar="PYTHON", help="interpreter that has the peers")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    make_cores_devices()
    table = Table()
    if not arguments.gates:
        performance(table, arguments.quick, arguments.peers)
    asks = ((peer.library, peer.ask) for peer in peers_of("gates", arguments.peers))
    found = gates.compare(*gates_model(), asks)
    values = {"gates": found, "compile seconds, peer and ours": table.compile_seconds}
    write_results(arguments.json, table.ratios, values, peer_versions(arguments.peers) if arguments.json else None)


if __name__ == "__main__":
    main()
