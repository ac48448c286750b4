"""What a cheaper sharpness along training would cost in certainty: errors of the ways to spend fewer products.

    python benchmarks/tracking_price.py [--quick] [--json FILE]

Full-batch gradient descent, the highest eigenvalue every 20 steps; the reference is tracked to 1e-4. Each way is
charged in gradients a measurement: 1 for a linearisation and 2 for a product (the count of matrix products; a part of
the batch costs its share). Errors are relative, over all measurements after the first five.

- a guard: the lab's own probe, two vectors; further products where the residual demands them are not counted
- no guard: one vector; nothing tells of an eigenvalue that overtakes
- a quarter of the batch: one vector followed on it, corrected by the difference to the whole batch, which every fourth
  measurement takes
- a quarter alone: the same without correction
- gradients of training: the Rayleigh quotient of the last step from the difference of two gradients; nothing is paid
- keep the last: a measurement of the lab's probe every fourth time, and its value until the next
- on demand: a measurement where the quotient of training's gradients has moved by 5 % since the last, else its value
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from common.results import write_results
from rich.console import Console
from rich.table import Table

from attnlab.curvature.operators import hessian
from attnlab.dynamics.sharpness import Tracking, top_eigenvalues
from attnlab.training import probe
from attnlab.trees import ravel
from dynamics import SETTINGS, trained

EVERY, SKIPPED, PERIOD, SHARE, MOVED = 20, 5, 4, 4, 0.05
GUARDED, ALONE = 5.0, 3.0


def quotient(rate, risk, params):
    """<dw, dg> / <dw, dw> of the step of gradient descent from here."""
    slope = jax.grad(risk)
    before = slope(params)
    after = slope(jax.tree.map(lambda w, g: w - rate * g, params, before))
    step, change = rate * ravel(before), ravel(before) - ravel(after)
    return jnp.vdot(step, change) / jnp.vdot(step, step)


@jax.jit
def product(risk, params, vector):
    return hessian(risk, params).flat_mv(vector)


def along_training(setting, risk, params, steps):
    """Reference values, the lab's probe with and without a guard, the free quotients, and the points."""
    optimizer, one = setting.optimizer, jnp.ones(())
    learning_rate = -float(optimizer.update(one, optimizer.init(one))[0])
    probes = {
        "exact": top_eigenvalues(Tracking(2, accuracy=1e-4)),
        "guard": top_eigenvalues(Tracking(2)),
        "alone": top_eigenvalues(Tracking(1)),
        "free": probe(partial(quotient, learning_rate)),
        "point": probe(lambda risk, params: params),
    }
    _, records = trained(risk, params, optimizer, steps, EVERY, probes)
    highest = {name: np.asarray(records.values[name]["values"])[:, -1] for name in ("exact", "guard", "alone")}
    points = [jax.tree.map(lambda leaf, i=i: leaf[i], records.values["point"]) for i in range(len(records.steps))]
    return highest | {"free": np.asarray(records.values["free"])}, points


def followed_on_a_part(risk, points):
    """The Rayleigh quotient of one vector followed on a part of the batch, at one product a point."""
    count = jax.tree.leaves(risk.inputs)[0].shape[0]
    part = risk.on(lambda leaf: leaf[: count // SHARE])
    vector = jax.random.normal(jax.random.key(0), ravel(points[0]).shape)
    for _ in range(300):
        vector = product(part, points[0], vector / jnp.linalg.norm(vector)) + 0.2 * vector
    values = []
    for point in points:
        vector = vector / jnp.linalg.norm(vector)
        image = product(part, point, vector)
        values.append(float(vector @ image))
        vector = vector + (image - values[-1] * vector) / (0.8 * abs(values[-1]))
    return np.array(values)


def held(values, chosen):
    """The last of the values that are chosen, at every place."""
    last = np.maximum.accumulate(np.where(chosen, np.arange(len(values)), 0))
    return values[last], last


def demanded(free):
    """Where the free quotient has moved since the last measurement."""
    chosen, reference = np.zeros(len(free), bool), np.nan
    for place, value in enumerate(free):
        if not abs(value - reference) <= MOVED * abs(reference):
            chosen[place], reference = True, value
    return chosen


def ways(found, part) -> dict[str, tuple[np.ndarray, float]]:
    """The values that each way gives, and what it costs in gradients."""
    regular = np.arange(len(part)) % PERIOD == 0
    kept, last = held(found["guard"], regular)
    wanted = demanded(found["free"])
    share = ALONE / SHARE
    return {
        "a guard": (found["guard"], GUARDED),
        "no guard": (found["alone"], ALONE),
        "a quarter of the batch": (part + kept - part[last], share + GUARDED / PERIOD),
        "a quarter alone": (part, share),
        "gradients of training": (found["free"], 0.0),
        "keep the last": (kept, GUARDED / PERIOD),
        "on demand": (held(found["guard"], wanted)[0], GUARDED * wanted.mean()),
    }


def measure(name: str, steps: int, show: Callable) -> dict[str, float]:
    """Median and 95th percentile of the errors of every way, and its price."""
    setting = SETTINGS[name]
    risk, params = setting.build(jax.random.key(1))
    found, points = along_training(setting, risk, params, steps)
    table, numbers = Table(name, "gradients a measurement", "median error", "95th percentile"), {}
    for way, (values, price) in ways(found, followed_on_a_part(risk, points)).items():
        errors = np.abs(values / found["exact"] - 1)[SKIPPED:]
        middle, high = np.median(errors), np.percentile(errors, 95)
        table.add_row(way, f"{price:.2f}", f"{middle:.2%}", f"{high:.2%}")
        numbers |= {
            f"{name}, {way}: gradients": price,
            f"{name}, {way}: median error": float(middle),
            f"{name}, {way}: 95th percentile": float(high),
        }
    show(table)
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the first setting only, 200 steps")
    parser.add_argument("--json", type=Path, help="write the numbers, the machine and the versions here")
    options = parser.parse_args()
    numbers = {}
    for name in list(SETTINGS)[: 1 if options.quick else None]:
        steps = 200 if options.quick else min(SETTINGS[name].long, 1000)
        numbers |= measure(name, steps, Console().print)
    write_results(options.json, {}, numbers)


if __name__ == "__main__":
    main()
