"""What tracking the sharpness costs: the training loop against a plain optax loop, tracked eigenvalues against ARPACK.

    python benchmarks/dynamics.py [--quick] [--json FILE]

Interleaved runs on one core, least CPU time; accuracy is checked before anything is timed. A ratio above 1: attnlab is
ahead. An overhead is the extra time of a step with the probe over one without. The time of a step is that of a long run
less that of a short one: what a run costs once (tracing, the cold start of the eigenvectors) is counted apart, as
set-up. Each problem at two learning rates: one with which training is below the edge of stability for long, and one
with which it stays at the edge, where the highest eigenvalues lie close and turn fast, and tracking costs more.
"""

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse.linalg
from common.results import write_results
from rich.console import Console
from rich.table import Table

from attnlab.curvature.operators import hessian
from attnlab.data.digits import digits
from attnlab.dynamics.sharpness import Tracking, fastest_batching, top_eigenvalues
from attnlab.losses import square_loss
from attnlab.models.adapters import from_linen
from attnlab.models.attention import AttentionConfig
from attnlab.models.transformer import Transformer, TransformerConfig
from attnlab.objectives import objective
from attnlab.risks.digits import digits_attention
from attnlab.training import probe, train
from attnlab.trees import dimension, ravel


def transformer_problem(key):
    """A two-layer transformer of width 64 on patches of digits."""
    data = digits(key, 32, patch=(1, 2), positions="one_hot", targets="one_hot")
    tokens = data.inputs @ jax.random.normal(key, (data.inputs.shape[-1], 64)) / 4
    targets = jnp.pad(data.targets, ((0, 0), (0, 0), (0, 54)))
    model = Transformer(TransformerConfig(AttentionConfig(16, 16, heads=4, output_dim=64), 2, 256))
    return objective(from_linen(model), square_loss, tokens, targets), model.init(key, tokens)["params"]


def digits_problem(key):
    return digits_attention(key, key)


class Setting(NamedTuple):
    """A problem, the optimizer, the steps of a short run and a long one, and how often each is timed."""

    build: Callable
    optimizer: optax.GradientTransformation
    short: int
    long: int
    repeats: int


SETTINGS = {
    "digits attention": Setting(digits_problem, optax.sgd(0.05), 200, 2000, 15),
    "digits attention at the edge": Setting(digits_problem, optax.sgd(0.2), 200, 2000, 15),
    "transformer": Setting(transformer_problem, optax.sgd(0.02), 100, 500, 3),
    "transformer at the edge": Setting(transformer_problem, optax.sgd(0.05), 100, 500, 3),
}


@partial(jax.jit, static_argnames=("optimizer", "steps"))
def plain_loop(risk, params, optimizer, steps):
    """The loop that one writes by hand."""

    def step(carry, _):
        params, state = carry
        loss, gradient = jax.value_and_grad(risk)(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), loss

    return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)


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


def trained(risk, params, optimizer, steps, every, probes=None):
    run = train(risk, params, optimizer, jax.random.key(0), steps=steps, every=every, probes=probes)
    return run.params, run.records


def accuracy(risk, params, setting, every, tracking):
    """95th percentile of the relative error of the certified eigenvalues against ARPACK, along the long run."""
    probes = {"top": top_eigenvalues(tracking), "point": probe(lambda risk, params: params)}
    _, records = trained(risk, params, setting.optimizer, setting.long, every, probes)
    errors = []
    for i in range(1, len(records.steps), max(1, len(records.steps) // 15)):
        point = jax.tree.map(lambda leaf, i=i: leaf[i], records.values["point"])
        exact, _ = cold_arpack(hessian(risk, point), 1e-6, tracking.certified)
        found = np.asarray(records.values["top"]["values"][i, -tracking.certified :])
        errors.extend(abs(found / exact - 1))
    return float(np.percentile(errors, 95))


def cold_arpack(operator, tolerance, count=1):
    """The highest eigenvalues by SciPy's ARPACK from a random start, and how many products they took."""
    products = 0
    flat, unravel = jax.flatten_util.ravel_pytree(operator.point)

    def product(vector):
        nonlocal products
        products += 1
        return np.asarray(ravel(operator.mv(unravel(jnp.asarray(vector, flat.dtype)))), float)

    linear = scipy.sparse.linalg.LinearOperator((flat.size, flat.size), matvec=product, dtype=float)
    start = np.random.default_rng(0).standard_normal(flat.size)
    values = scipy.sparse.linalg.eigsh(linear, count, which="LA", tol=tolerance, v0=start, return_eigenvectors=False)
    return np.sort(values), products


def arpack_seconds(operator, repeats):
    """Least CPU seconds of a cold ARPACK for lambda_1 at a residual of 5 %: its value is then good to 0.5 % as well."""
    times = []
    for _ in range(repeats):
        started = time.process_time()
        _, products = cold_arpack(operator, 0.05)
        times.append(time.process_time() - started)
    return min(times), products


def measure(name, quick):
    """All numbers of one setting."""
    setting = SETTINGS[name]
    risk, params = setting.build(jax.random.key(1))
    batched, repeats = fastest_batching(hessian(risk, params)), setting.repeats // 3 if quick else setting.repeats
    trackings = {"one": Tracking(2, batched=batched), "two": Tracking(3, certified=2, batched=batched)}
    probes = {"bare": (50, None)}
    for what, every in (("one", 50), ("one", 20), ("two", 50)):
        probes[f"{what} every {every}"] = (every, {"top": top_eigenvalues(trackings[what])})
    errors = {
        f"p95 error, {key}": accuracy(risk, params, setting, every, trackings[key[:3]])
        for key, (every, probe_) in probes.items()
        if probe_
    }
    runs, optimizer = {}, setting.optimizer
    for length in (setting.short, setting.long):
        runs["plain", length] = partial(plain_loop, risk, params, optimizer, length)
        runs |= {(key, length): partial(trained, risk, params, optimizer, length, *how) for key, how in probes.items()}
    totals = interleaved(runs, repeats)
    between = setting.long - setting.short
    seconds = {key: (totals[key, setting.long] - totals[key, setting.short]) / between for key in ("plain", *probes)}
    end, _ = trained(risk, params, optimizer, setting.long, 50)
    arpack, products = arpack_seconds(hessian(risk, end), repeats)
    found = {"steps per second, attnlab over plain loop": seconds["plain"] / seconds["bare"]}
    found |= {f"overhead, {key}": seconds[key] / seconds["bare"] - 1 for key in list(probes)[1:]}
    found |= errors
    found |= {
        f"set-up seconds, {key}": totals[key, setting.short] - setting.short * seconds[key] for key in list(probes)[1:]
    }
    found["time, cold ARPACK every 50 over one every 50"] = arpack / (50 * (seconds["one every 50"] - seconds["bare"]))
    found["products of cold ARPACK"] = products
    return {f"{name} ({dimension(params)} parameters): {key}": value for key, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the first setting only, fewer repeats")
    parser.add_argument("--json", type=Path, help="write the numbers, the machine and the versions here")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # threads that wait for each other would count twice
    numbers = {}
    for name in list(SETTINGS)[: 1 if options.quick else None]:
        found = measure(name, options.quick)
        table = Table("what", "value")
        for key, value in found.items():
            table.add_row(key, f"{value:.3g}")
        Console().print(table)
        numbers |= found
    ahead = {key: value for key, value in numbers.items() if " over " in key}
    write_results(options.json, ahead, {key: value for key, value in numbers.items() if key not in ahead})


if __name__ == "__main__":
    main()
