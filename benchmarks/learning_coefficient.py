"""Chains for learning coefficients: `benchmarks/learning_coefficient.py [--quick] [--json FILE] [--peers PYTHON]`.

A next-token model of 8,192 parameters, logits = W_2 tanh(W_1 e), trained on 1,024 sequences of a Markov chain: four
chains of Langevin steps on batches of 32 sequences, in float32, at one step size. Against the loop that one writes in
JAX (chains under vmap, a scan over steps, gradients of plain batches), and against devinterp in the interpreter PYTHON
(`pip install devinterp torch`), on one thread or on all cores, whichever is faster. Ours has its chains on all cores.
Chain-steps a second are differences of a long and a short run, without compilation; the standard error at equal time
stands beside it. Ratios are peer / ours in time: above 1, we are ahead.
"""

import argparse
import json
import math
import subprocess
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common.results import write_results

from attnlab.analysis import cores, make_cores_devices
from attnlab.data.markov import markov_sequences, random_transitions
from attnlab.degeneracy.diagnostics import error_of_mean
from attnlab.degeneracy.estimate import learning_coefficient
from attnlab.losses import cross_entropy
from attnlab.objectives import Objective, objective
from attnlab.training import train

VOCABULARY, WIDTH, HIDDEN, SEQUENCES, LENGTH = 64, 32, 64, 1024, 16
CHAINS, BATCH, LOCALIZATION = 4, 32, 100.0
SCALE = SEQUENCES / math.log(SEQUENCES)
STEP = 0.02
WORKER = Path(__file__).parent / "peers" / "devinterp_worker.py"


def predict(params, tokens):
    return jnp.tanh(params["embedding"][tokens] @ params["hidden"]) @ params["output"]


def problem(steps: int) -> tuple[Objective, dict, np.ndarray]:
    """The risk, weights after `steps` of Adam, and the tokens."""
    keys = jax.random.split(jax.random.key(0), 5)
    drawn = markov_sequences(keys[0], random_transitions(keys[1], VOCABULARY), SEQUENCES, LENGTH)
    shapes = {"embedding": (VOCABULARY, WIDTH), "hidden": (WIDTH, HIDDEN), "output": (HIDDEN, VOCABULARY)}
    params = {
        name: jax.random.normal(key, shape) / shape[0] ** 0.5
        for key, (name, shape) in zip(keys[2:], shapes.items(), strict=True)
    }
    risk = objective(predict, cross_entropy, *drawn)
    tokens = np.concatenate([drawn.inputs, drawn.targets[:, -1:]], axis=1)
    return risk, train(risk, params, optax.adam(0.01), keys[0], steps=steps, every=steps).params, tokens


@partial(jax.jit, static_argnames="steps")
def plain_chains(risk: Objective, params: dict, key: jax.Array, steps: int) -> jax.Array:
    """The loop that one writes: minibatch losses (chains, steps)."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)

    def chain(key):
        def step(w, key):
            row_key, noise_key = jax.random.split(key)
            rows = jax.random.randint(row_key, (BATCH,), 0, SEQUENCES)
            batch = risk.on(lambda leaf: leaf[rows])
            loss, gradient = jax.value_and_grad(lambda w: batch(unravel(w)))(w)
            drift = SCALE * gradient + LOCALIZATION * (w - flat)
            return w - STEP**2 / 2 * drift + STEP * jax.random.normal(noise_key, w.shape), loss

        return jax.lax.scan(step, flat, jax.random.split(key, steps))[1]

    return jax.vmap(chain)(jax.random.split(key, CHAINS))


def ours(risk: Objective, params: dict, key: jax.Array, steps: int):
    """Ours at the same step: 1.5 times `steps` for each chain."""
    options = {"localization": LOCALIZATION, "sampler": "sgld", "batch": BATCH, "step": STEP, "chains": CHAINS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return learning_coefficient(risk, params, key, steps=steps, **options)


def seconds_of_a_step(run, lengths: tuple[int, int], rounds: int) -> float:
    """Seconds of one step of one chain: the median over rounds of long less short."""
    for length in lengths:
        jax.block_until_ready(run(length))
    found = []
    for _ in range(rounds):
        times = []
        for length in lengths:
            began = time.perf_counter()
            jax.block_until_ready(run(length))
            times.append(time.perf_counter() - began)
        found.append((times[1] - times[0]) / ((lengths[1] - lengths[0]) * CHAINS))
    return float(np.median(found))


def devinterp(python: str, params: dict, tokens: np.ndarray, draws: tuple[int, int]) -> dict | None:
    options = {"step": STEP, "scale": SCALE, "chains": CHAINS, "batch": BATCH, "localization": LOCALIZATION}
    options["draws"] = draws
    answers = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "problem.npz"
        np.savez(file, tokens=tokens, **{name: np.asarray(leaf, np.float32) for name, leaf in params.items()})
        for threads in {1, cores()}:
            command = [python, WORKER, file, json.dumps({**options, "threads": threads})]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"  devinterp skipped: {done.stderr.strip().splitlines()[-1] if done.stderr else 'it ended'}")
                return None
            answers.append(json.loads(done.stdout.splitlines()[-1]))
    return min(answers, key=lambda answer: answer["seconds"][1] - answer["seconds"][0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps and rounds")
    parser.add_argument("--json", type=Path, help="write the ratios here")
    parser.add_argument("--peers", help="an interpreter with devinterp and torch")
    options = parser.parse_args()
    make_cores_devices()
    lengths, rounds, draws = ((64, 256), 3, (50, 150)) if options.quick else ((256, 2048), 5, (100, 500))
    risk, params, tokens = problem(200 if options.quick else 1000)
    key = jax.random.key(1)
    times = {
        "ours": seconds_of_a_step(lambda n: ours(risk, params, key, n).summary.losses, lengths, rounds) / 1.5,
        "plain loop": seconds_of_a_step(lambda n: plain_chains(risk, params, key, n), lengths, rounds),
    }
    found = ours(risk, params, key, lengths[1])
    losses = plain_chains(risk, params, key, lengths[1])[:, lengths[1] // 4 :]
    errors = {"ours": float(found.summary.sampling), "plain loop": SCALE * float(error_of_mean(losses))}
    steps = {"ours": 1.5 * lengths[1], "plain loop": lengths[1]}
    values = {"ours": found.value, "plain loop": SCALE * (float(losses.mean()) - float(risk(params)))}
    ratios = {}
    peer = devinterp(options.peers, params, tokens, draws) if options.peers else None
    if peer:
        times["devinterp"] = (peer["seconds"][1] - peer["seconds"][0]) / ((draws[1] - draws[0]) * CHAINS)
        values["devinterp"] = float(np.mean(peer["values"]))
    results = {"training risk": float(risk(params))}
    for name, seconds in times.items():
        text = f"{name:11} {seconds * 1e6:9.1f} us a chain-step, {1 / seconds:9.0f} a second; lambda {values[name]:.1f}"
        results[f"{name} | chain-steps a second"] = 1 / seconds
        results[f"{name} | value"] = values[name]
        if name in errors:
            # A standard error e from T seconds has e^2 T for its cost, whatever T.
            cost = errors[name] ** 2 * seconds * CHAINS * steps[name]
            results[f"{name} | error^2 x seconds"] = cost
            text += f" ± {errors[name]:.2f}, error^2 x seconds {cost:.3g}"
        print(text)
        if name != "ours":
            ratios[f"Langevin chain-step, batch 32, 8192 parameters | {name}"] = seconds / times["ours"]
            print(f"  {name} / ours: {seconds / times['ours']:.2f}")
    plain, own = (results[f"{name} | error^2 x seconds"] for name in ("plain loop", "ours"))
    ratios["variance of the value at equal time | plain loop"] = plain / own
    print(f"variance of the value at equal time, plain loop / ours: {plain / own:.2f}")
    write_results(options.json, ratios, results)


if __name__ == "__main__":
    main()
