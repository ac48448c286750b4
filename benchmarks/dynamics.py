"""What tracking the sharpness costs: the training loop against a plain optax loop, tracked eigenvalues against ARPACK.

    python benchmarks/dynamics.py [--quick] [--json FILE]

Interleaved runs, least CPU time; accuracy is checked before anything is timed. A ratio above 1: attnlab is ahead.
An overhead is the extra time of a step with the probe over one without; the time of a step is that of 2 N steps less
that of one of N: what a run costs once (tracing, the cold start of the eigenvectors) is counted apart, as set-up.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse.linalg
from rich.console import Console
from rich.table import Table

from attnlab.curvature.operators import hessian
from attnlab.data.digits import digits
from attnlab.dynamics.krylov import fastest_batching
from attnlab.dynamics.problems import digits_attention
from attnlab.dynamics.sharpness import Tracking, top_eigenvalues
from attnlab.losses import square_loss
from attnlab.models.adapters import from_linen
from attnlab.models.attention import AttentionConfig
from attnlab.models.transformer import Transformer, TransformerConfig
from attnlab.objective import objective
from attnlab.runs import manifest
from attnlab.training import probe, train
from attnlab.trees import dimension, ravel


def transformer_problem(key):
    """A two-layer transformer of width 64 on patches of digits."""
    data = digits(key, 32, patch=(1, 2), positions="one_hot", targets="one_hot")
    tokens = data.inputs @ jax.random.normal(key, (data.inputs.shape[-1], 64)) / 4
    targets = jnp.pad(data.targets, ((0, 0), (0, 0), (0, 54)))
    model = Transformer(TransformerConfig(AttentionConfig(16, 16, heads=4, output_dim=64), 2, 256))
    return objective(from_linen(model), square_loss, tokens, targets), model.init(key, tokens)["params"]


PROBLEMS = {"digits attention": lambda key: digits_attention(key, key), "transformer": transformer_problem}
STEPS = {"digits attention": 2000, "transformer": 100}
OPTIMIZER = optax.sgd(0.05)


@partial(jax.jit, static_argnames=("steps",))
def plain_loop(risk, params, steps):
    """The loop that one writes by hand."""

    def step(carry, _):
        params, state = carry
        loss, gradient = jax.value_and_grad(risk)(params)
        updates, state = OPTIMIZER.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), loss

    return jax.lax.scan(step, (params, OPTIMIZER.init(params)), length=steps)


def interleaved(functions, repeats):
    """Least CPU seconds of each function, their runs interleaved; compiled before. What disturbs a run only adds to its
    time, and differences of medians would carry that."""
    for function in functions.values():
        jax.block_until_ready(function())
    times = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            started = time.process_time()
            jax.block_until_ready(function())
            times[name].append(time.process_time() - started)
    return {name: min(values) for name, values in times.items()}


def trained(risk, params, steps, every, probes=None):
    run = train(risk, params, OPTIMIZER, jax.random.key(0), steps=steps, every=every, probes=probes)
    return run.params, run.records


def accuracy(risk, params, steps, every, tracking):
    """95th percentile of the relative error of lambda_1 against ARPACK, warm-started along a run."""
    probes = {"top": top_eigenvalues(tracking), "point": probe(lambda risk, params: params)}
    _, records = trained(risk, params, steps, every, probes)
    errors = []
    for i in range(0, len(records.steps), max(1, len(records.steps) // 12)):
        point = jax.tree.map(lambda leaf, i=i: leaf[i], records.values["point"])
        exact = cold_arpack(hessian(risk, point), 1e-9)[0]
        errors.append(abs(float(records.values["top"]["values"][i, -1]) / exact - 1))
    return float(np.percentile(errors, 95))


def cold_arpack(operator, tolerance):
    """lambda_1 by SciPy's ARPACK from a random start, and how many products it took."""
    products = 0
    flat, unravel = jax.flatten_util.ravel_pytree(operator.point)

    def product(vector):
        nonlocal products
        products += 1
        return np.asarray(ravel(operator.mv(unravel(jnp.asarray(vector, flat.dtype)))), float)

    linear = scipy.sparse.linalg.LinearOperator((flat.size, flat.size), matvec=product, dtype=float)
    start = np.random.default_rng(0).standard_normal(flat.size)
    value = scipy.sparse.linalg.eigsh(linear, 1, which="LA", tol=tolerance, v0=start, return_eigenvectors=False)[0]
    return value, products


def measure(name, quick):
    """All numbers of one problem."""
    risk, params = PROBLEMS[name](jax.random.key(1))
    steps, repeats = (STEPS[name] // 2, 3) if quick else (STEPS[name], 5)
    batched = fastest_batching(hessian(risk, params))
    one, two = Tracking(1, batched=batched), Tracking(2, batched=batched)
    probes = {
        "bare": (50, None),
        "one every 50": (50, {"top": top_eigenvalues(one)}),
        "one every 20": (20, {"top": top_eigenvalues(one)}),
        "two every 50": (50, {"top": top_eigenvalues(two)}),
        "two every 20": (20, {"top": top_eigenvalues(two)}),
    }
    if quick:
        del probes["one every 20"], probes["two every 20"]
    trackings = {"one": one, "two": two}
    errors = {
        f"p95 error, {key}": accuracy(risk, params, steps, every, trackings[key[:3]])
        for key, (every, probe_) in probes.items()
        if probe_
    }
    runs = {}
    for length in (steps, 2 * steps):
        runs["plain", length] = partial(plain_loop, risk, params, length)
        runs |= {(key, length): partial(trained, risk, params, length, *choice) for key, choice in probes.items()}
    totals = interleaved(runs, repeats)
    seconds = {key: (totals[key, 2 * steps] - totals[key, steps]) / steps for key in ("plain", *probes)}
    setup = {key: 2 * totals[key, steps] - totals[key, 2 * steps] for key in probes}
    _, products = cold_arpack(hessian(risk, params), 5e-3)
    found = {"steps per second, attnlab over plain loop": seconds["plain"] / seconds["bare"]}
    found |= {f"overhead, {key}": seconds[key] / seconds["bare"] - 1 for key in list(probes)[1:]}
    found |= {f"set-up seconds, {key}": value for key, value in setup.items()}
    found |= errors
    found["products, cold ARPACK at 0.5 % over two certified"] = products / (two.count * (two.depth + 1))
    return {f"{name} ({dimension(params)} parameters): {key}": value for key, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few steps and repeats")
    parser.add_argument("--json", type=Path, help="write the numbers, the machine and the versions here")
    options = parser.parse_args()
    numbers = {}
    for name in list(PROBLEMS)[: 1 if options.quick else None]:
        found = measure(name, options.quick)
        table = Table("what", "value")
        for key, value in found.items():
            table.add_row(key, f"{value:.3g}")
        Console().print(table)
        numbers |= found
    if options.json:
        options.json.write_text(json.dumps({"ratios": numbers, **manifest({})}, indent=2) + "\n")


if __name__ == "__main__":
    main()
