"""Curvature of one model on the devices of this program; prints the numbers as JSON, from process 0.

Run with `--simulate N` for N simulated devices of one process, or `--process I --of N --port P` for one of N processes.
Without arguments: one device. `--spread N` takes N of the devices for samples, the rest for data.
"""

import argparse
import json
import os


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--simulate", type=int, default=1)
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--of", type=int, default=1)
    parser.add_argument("--port", type=int)
    parser.add_argument("--spread", type=int, default=1)
    arguments = parser.parse_args()
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={arguments.simulate}"

    import jax

    jax.config.update("jax_enable_x64", True)
    if arguments.of > 1:
        jax.distributed.initialize(f"127.0.0.1:{arguments.port}", arguments.of, arguments.process)
    numbers = curvature(jax.device_count(), arguments.spread)
    if jax.process_index() == 0:
        print(json.dumps(numbers))


def put(array, sharding):
    import jax

    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def curvature(devices: int, spread: int) -> dict:
    import jax
    import numpy as np
    from jax.flatten_util import ravel_pytree
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    from attnlab.curvature import (
        condition_number,
        diagonal,
        eigenpairs,
        empirical_fisher,
        functional,
        ggn,
        hessian,
        log_determinant,
        solve,
        spectral_density,
        squared_frobenius_norm,
        trace,
    )
    from attnlab.losses import square_loss
    from attnlab.models.adapters import from_linen
    from attnlab.models.attention import AttentionConfig, SelfAttention
    from attnlab.objectives import objective
    from attnlab.runs.session import Session

    mesh = jax.make_mesh((devices // spread, spread), ("data", "samples"), axis_types=(AxisType.Auto,) * 2)
    by_data, by_samples = (NamedSharding(mesh, PartitionSpec(axis)) for axis in ("data", "samples"))
    random = np.random.default_rng(0)
    inputs, targets = (put(random.standard_normal((8, 6, 16)), by_data) for _ in range(2))
    module = SelfAttention(AttentionConfig(key_dim=15, value_dim=16))
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 6, 16)))["params"]
    everywhere = NamedSharding(mesh, PartitionSpec())
    params = jax.tree.map(lambda leaf: put(0.6 * random.standard_normal(leaf.shape), everywhere), shapes)
    risk = objective(from_linen(module), square_loss, inputs, targets)
    operator, key = hessian(risk, params), jax.random.key(1)
    assert inputs.sharding.num_devices == devices
    density = spectral_density(operator, key, samples=4, steps=10, session=Session(together=4, sharding=by_samples))
    seen: list = []
    long = spectral_density(
        operator, key, samples=2, steps=18, session=Session(together=2, sharding=by_samples, report=seen.append)
    )
    fisher, part = empirical_fisher(risk, params), functional(risk, params)
    found = {
        "nodes": density.nodes,
        "weights": density.weights,
        "long": long.nodes,
        "eigenvalues": eigenpairs(operator, key, 2).values,
        "trace": trace(ggn(risk, params), key, samples=4).value,
        "diagonal": ravel_pytree(diagonal(fisher, key, samples=4).value)[0],
        "norm": squared_frobenius_norm(part, key, samples=4).value,
        "product": ravel_pytree(part.mv(params))[0],
        "log-determinant": log_determinant(fisher, key, damping=0.1, samples=2, steps=8).value,
        "condition": condition_number(fisher, key, damping=0.1).value,
        "solution": ravel_pytree(solve(fisher, params, damping=0.1, tolerance=1e-9).vector)[0],
    }
    return {name: np.asarray(array).tolist() for name, array in found.items()}


if __name__ == "__main__":
    main()
