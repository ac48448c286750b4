"""Curvature and training of a small language model whose parameters are spread over the devices of this program.

Prints the numbers as JSON, from process 0: with `--simulate N` of N simulated devices of one process, or with
`--process I --of N --port P` of one of N processes. Without arguments: one device. `--all` adds what compiles for long.
"""

import argparse
import json
import re
from functools import partial

parser = argparse.ArgumentParser()
parser.add_argument("--simulate", type=int, default=1)
parser.add_argument("--process", type=int, default=0)
parser.add_argument("--of", type=int, default=1)
parser.add_argument("--port", type=int)
parser.add_argument("--all", action="store_true")


def main() -> None:
    arguments = parser.parse_args()

    import jax

    from attnlab.compiled import keep_compiled_programs

    keep_compiled_programs()
    jax.config.update("jax_num_cpu_devices", arguments.simulate)
    jax.config.update("jax_enable_x64", True)
    if arguments.of > 1:
        jax.distributed.initialize(f"127.0.0.1:{arguments.port}", arguments.of, arguments.process)
    numbers = measure(jax.device_count(), arguments.all)
    if jax.process_index() == 0:
        print(json.dumps(numbers))


def predict(params, inputs):
    import jax.numpy as jnp

    return jnp.tanh(inputs @ params["first"] + params["bias"][None]) @ params["second"] * params["scale"][None]


def problem(devices: int):
    """An objective with its data and parameters over the devices; one leaf that they divide along each axis, one that
    they do not divide, and one number."""
    import jax
    import numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    from attnlab.losses import square_loss
    from attnlab.objectives import batched, objective
    from attnlab.sharding import shard_parameters

    mesh = jax.make_mesh((devices,), ("devices",), axis_types=(AxisType.Auto,))
    random = np.random.default_rng(0)
    shapes = {"first": (5, 72), "bias": (72,), "second": (72, 3), "scale": (3,)}
    values = {name: random.standard_normal(shape) for name, shape in shapes.items()}
    params = shard_parameters(values, mesh, "devices")
    inputs, targets = random.standard_normal((16, 5)), random.standard_normal((16, 3))
    by_data = NamedSharding(mesh, PartitionSpec("devices"))
    put = partial(jax.make_array_from_callback, sharding=by_data)
    spread = [put(array.shape, data_callback=lambda index, array=array: array[index]) for array in (inputs, targets)]
    parts = batched(predict, square_loss, [(inputs[:8], targets[:8]), (inputs[8:], targets[8:])])
    return objective(predict, square_loss, *spread), parts, params


def check_shares(devices: int, operator, params, image) -> None:
    """Every device holds its share: of the parameters, of a product, of a Lanczos vector; and flat vectors keep all."""
    import jax
    import numpy as np

    width = 72 // devices
    shares = (("first", (5, width)), ("bias", (width,)), ("second", (width, 3)))
    for tree in (params, image):
        for name, shape in shares:
            assert {shard.data.shape for shard in tree[name].addressable_shards} == {shape}, name
    ravel = jax.jit(lambda operator, tree: operator.ravel(tree)).lower(operator, params).compile()
    assert "all-gather" not in ravel.as_text()
    flat = ravel(operator, params)
    assert flat.size == operator.flat_size
    assert {shard.data.shape for shard in flat.addressable_shards} == {(flat.size // devices,)}
    back = jax.jit(lambda operator, flat: operator.unravel(flat))(operator, flat)
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim)
        assert all(
            np.array_equal(a.data, b.data)
            for a, b in zip(one.addressable_shards, other.addressable_shards, strict=True)
        )


def measure(devices: int, everything: bool) -> dict:
    import jax
    import optax

    from attnlab.curvature import eigenpairs, ggn, hessian, solve, spectral_density, trace
    from attnlab.runs.session import Session
    from attnlab.training import probe, train

    risk, parts, params = problem(devices)
    operator, key = hessian(risk, params, check=False), jax.random.key(1)
    image = operator.mv(params)
    if devices > 1:
        check_shares(devices, operator, params, image)
    density = spectral_density(operator, key, samples=2, steps=5)
    found = {"image": image, "nodes": density.nodes, "weights": density.weights}
    found["trace"] = trace(ggn(risk, params, check=False), key, samples=3).value
    if everything:
        spoken: list = []
        session = Session(report=spoken.append)
        found["in chunks"] = spectral_density(operator, key, samples=2, steps=18, session=session).nodes[:, -1]
        matrices = hessian(risk, params, block=re.compile("first|second"))  # beyond a dense matrix, and all divides
        assert devices == 1 or (matrices.layout is not None and not matrices.layout.filled)
        found["eigenvalues"] = eigenpairs(matrices, key, 2).values
        found["solution"] = solve(ggn(risk, params), params, damping=0.1, tolerance=1e-9).vector
        streamed = parts if jax.process_count() == 1 else risk  # batches are read by one process
        found["streamed"] = trace(hessian(streamed, params), key, samples=3).value
        sizes = probe(lambda risk, params: trace(hessian(risk, params, check=False), key, samples=2).value)
        run = train(risk, params, optax.sgd(0.1), key, steps=4, every=2, probes={"trace": sizes})
        found |= {"trained": run.params, "losses": run.records.losses, "traces": run.records.values["trace"]}
    flat = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(found)}
    return {name: whole(leaf).tolist() for name, leaf in flat.items()}


def whole(leaf):
    """All values of an array that may be spread over processes."""
    import jax
    import numpy as np
    from jax.experimental.multihost_utils import process_allgather

    spread = isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated)
    return np.asarray(process_allgather(leaf, tiled=True) if spread else leaf)


if __name__ == "__main__":
    main()
