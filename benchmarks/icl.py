"""Training in-context learners side by side: `python benchmarks/icl.py [--quick] [--json FILE]`.

One layer with separate W_Q, W_K, W_V and P, d = N = 10, x uniform on (-1/2, 1/2), as in arXiv 2212.07677. Against the
training loop one would write from that paper, rebuilt plainly here: a Python loop, a fresh batch of 2,048 prompts each
step, jitted value_and_grad, AdamW. Ours is a step on the exact risk, and a step on fresh prompts inside the one jitted
training loop, through the layer's effective weights. CPU time, medians of interleaved runs, compilation apart; the
gradients are checked to agree within their sampling error before anything is timed. Ratios are plain loop / ours: above
1, we are ahead.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from common.results import write_results

from attnlab.icl.models import Layer, effective_weights, init_layer, layer_predict
from attnlab.icl.population import population_objective
from attnlab.icl.tasks import Prompt, linear_regression, sample_prompts
from attnlab.objectives import Objective, objective
from attnlab.training import train
from attnlab.types import PRNGKey

D = N = 10
PUBLISHED = 0.20623
"""Half the least risk, which the paper's loss converges to."""


def plain_prompts(key: PRNGKey, batch: int) -> tuple[jax.Array, jax.Array]:
    """Token matrices (batch, N + 1, d + 1) with the query's label slot at 0, and the query's targets."""
    input_key, task_key = jax.random.split(key)
    inputs = jax.random.uniform(input_key, (batch, N + 1, D), minval=-0.5, maxval=0.5)
    labels = jnp.einsum("bnd,bd->bn", inputs, jax.random.normal(task_key, (batch, D)))
    shown = labels.at[:, -1].set(0)
    return jnp.concatenate([inputs, shown[..., None]], axis=-1), labels[:, -1]


def plain_loss(layer: Layer, tokens: jax.Array, targets: jax.Array) -> jax.Array:
    """Half the mean squared error of a residual linear attention layer over all tokens, whose keys leave out the
    query."""
    queries = tokens @ layer["query"]
    keys, values = (tokens[:, :-1] @ layer[name] for name in ("key", "value"))
    scores = queries @ jnp.swapaxes(keys, 1, 2) / N
    updated = tokens + scores @ values @ layer["output"]
    return jnp.mean((-updated[:, -1, -1] - targets) ** 2) / 2


class PlainLoop:
    """The published kind of loop: each call is one step, driven from Python."""

    def __init__(self, layer: Layer, batch: int):
        self.optimizer, self.batch = optax.adamw(1e-3), batch
        self.layer, self.memory, self.key = layer, self.optimizer.init(layer), jax.random.key(0)
        self.draw = jax.jit(plain_prompts, static_argnums=1)
        self.gradient = jax.jit(jax.value_and_grad(plain_loss))
        self.update = jax.jit(self.optimizer.update)

    def step(self) -> jax.Array:
        """One step on a fresh batch; returns its loss."""
        self.key, key = jax.random.split(self.key)
        loss, gradient = self.gradient(self.layer, *self.draw(key, self.batch))
        updates, self.memory = self.update(gradient, self.memory, self.layer)
        self.layer = optax.apply_updates(self.layer, updates)
        return loss


class Draw:
    """Fresh prompts for each step of the training loop."""

    def __init__(self, batch: int):
        self.problem, self.batch = linear_regression(jnp.eye(D) / 12, inputs="uniform"), batch

    def __call__(self, key: PRNGKey, risk: Objective) -> Objective:
        """The same objective on prompts drawn from `key`."""
        prompts = sample_prompts(key, self.problem, N, self.batch)
        return replace(risk, inputs=prompts, targets=prompts.target)


def predict(layer: Layer, prompts: Prompt) -> jax.Array:
    effective = effective_weights(layer)  # all that the prediction depends on, once for the batch
    return jax.vmap(lambda prompt: layer_predict(effective, prompt))(prompts)


def half_mean_square(found: jax.Array, wanted: jax.Array) -> jax.Array:
    return jnp.mean((found - wanted) ** 2) / 2


def cpu_seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    jax.block_until_ready(run())
    return time.process_time() - start


def median_times(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU time of each run after one that compiles, interleaved."""
    for run in runs.values():
        jax.block_until_ready(run())
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(cpu_seconds(run))
    return {name: statistics.median(values) for name, values in times.items()}


def check_agreement(exact: Objective, layer: Layer, batches: int) -> float:
    """Largest gap between the exact gradient and the mean of the plain loop's, in standard errors."""
    keys = jax.random.split(jax.random.key(3), batches)
    gradient = jax.jit(lambda key: jax.grad(plain_loss)(layer, *plain_prompts(key, 2048)))
    samples = jax.lax.map(gradient, keys)
    expected = jax.tree.map(lambda leaf: leaf / 2, jax.grad(exact)(layer))

    def apart(sample: jax.Array, wanted: jax.Array) -> jax.Array:
        error = jnp.std(sample, axis=0, ddof=1) / batches**0.5
        return jnp.max(jnp.abs(jnp.mean(sample, axis=0) - wanted) / jnp.where(error == 0, 1, error))

    return float(jnp.max(jnp.stack(jax.tree.leaves(jax.tree.map(apart, samples, expected)))))


def steps(quick: bool, ratios: dict[str, float], values: dict[str, float]) -> None:
    """Time of a step: the plain loop's, one on fresh prompts in the training loop, and one on the exact risk."""
    batch, rounds = 2048, 3 if quick else 9
    exact = population_objective(linear_regression(jnp.eye(D) / 12, inputs="uniform"), N, "layer")
    key = jax.random.key(1)
    layer = init_layer(key, D + 1, 0.3)
    apart = check_agreement(exact, layer, 20 if quick else 100)
    print(f"Gradients: exact against sampled, largest gap {apart:.1f} standard errors")
    if apart > 6:
        raise ArithmeticError(f"the exact and the sampled gradient are {apart:.1f} standard errors apart.")
    loop, draw, adamw = PlainLoop(layer, batch), Draw(batch), optax.adamw(1e-3)
    first = sample_prompts(key, draw.problem, N, batch)
    empirical = objective(predict, half_mean_square, first, first.target)
    counts = {"plain loop": 20, "sampled": 100, "exact": 2000}
    runs = {
        "plain loop": lambda: [loop.step() for _ in range(counts["plain loop"])],
        "sampled": lambda: (
            train(empirical, layer, adamw, key, steps=counts["sampled"], every=counts["sampled"], resample=draw).params
        ),
        "exact": lambda: train(exact, layer, adamw, key, steps=counts["exact"], every=counts["exact"]).params,
    }
    times = {name: seconds / counts[name] for name, seconds in median_times(runs, rounds).items()}
    for name, seconds in times.items():
        print(f"  {name:12} {seconds * 1e3:9.4f} ms a step", end="")
        if name == "plain loop":
            print()
        else:
            ratios[f"training step, {name}, d = N = 10, batch 2048 | plain loop"] = times["plain loop"] / seconds
            print(f" | plain loop {times['plain loop'] / seconds:.3g}x")
        values[f"training step, {name} | ms"] = seconds * 1e3


def recipe(quick: bool, ratios: dict[str, float], values: dict[str, float]) -> None:
    """32 seeds to the published loss by the exact gradient, compilation included."""
    seeds, length = 32, 500 if quick else 5000
    exact = population_objective(linear_regression(jnp.eye(D) / 12, inputs="uniform"), N, "layer")
    keys = jax.random.split(jax.random.key(2), seeds)
    starts = jax.vmap(partial(init_layer, width=D + 1, scale=0.3))(keys)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.02, length))
    started = time.process_time()
    losses = train(exact, starts, optimizer, keys, steps=length, every=length).records.losses[-1] / 2
    worst = float(jnp.max(jnp.abs(losses - PUBLISHED)))
    seconds = time.process_time() - started
    reached = int(jnp.sum(jnp.abs(losses - PUBLISHED) < 1e-4))
    print(f"Recipe: {seeds} seeds x {length} exact steps in {seconds:.1f} CPU-seconds, compilation included;")
    print(f"  {reached} of {seeds} within 1e-4 of {PUBLISHED}, the worst {worst:.1e} away")
    name = f"recipe, {seeds} seeds x {length} exact steps"
    values |= {f"{name} | CPU-seconds": seconds, f"{name} | seeds within 1e-4 of {PUBLISHED}": reached}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps and rounds")
    parser.add_argument("--json", type=Path, help="write the ratios here")
    options = parser.parse_args()
    ratios: dict[str, float] = {}
    values: dict[str, float] = {}
    for part in (steps, recipe):
        part(options.quick, ratios, values)
    write_results(options.json, ratios, values)


if __name__ == "__main__":
    main()
