"""
Resume, shard, stream
=====================

Long runs that may be killed, data on many devices, data that no memory holds: the same calls, with one more argument.
"""

# %%
import tempfile
from pathlib import Path

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import attnlab as al

model = nn.Dense(8, param_dtype=jnp.float64)
inputs = jax.random.normal(jax.random.key(0), (256, 16))
targets = jax.random.normal(jax.random.key(1), (256, 8))
params = model.init(jax.random.key(2), inputs)["params"]
risk = al.objective(al.from_linen(model), al.square_loss, inputs, targets)

# %%
# Resume
# ------
# A ``Session`` says where a long computation keeps its state, and what it reports to. Killed, it loses the last interval at
# most; started again with the same arguments it goes on, to the same numbers. Spectral densities, eigenpairs and training
# runs take one.
directory = Path(tempfile.mkdtemp()) / "density"
steps = []
session = al.Session(
    directory=directory, report=lambda progress: steps.append(progress)
)
density = al.spectral_density(
    al.hessian(risk, params), jax.random.key(3), samples=4, steps=32, session=session
)
print(sorted(path.name for path in directory.iterdir()))

# %%
# The finished result is there, as plain arrays with a manifest; the same call reads it back in place of computing it:
again = al.spectral_density(
    al.hessian(risk, params), jax.random.key(3), samples=4, steps=32, session=session
)
print(jnp.array_equal(density.nodes, again.nodes))

# %%
# Training is resumed in the same way, and its records can be read while it runs, without the model: ``al.load_records(directory)``
# or at once ``al.plot.training(directory)``.
#
# Shard
# -----
# Spread the data over a mesh, and every operator's products run on all of its devices. ``shard_parameters`` spreads the
# parameters too. (On a CPU, ``JAX_NUM_CPU_DEVICES=8`` makes eight devices of one.)
mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
by_data = NamedSharding(mesh, PartitionSpec("data"))
spread = al.objective(
    al.from_linen(model), al.square_loss, *jax.device_put((inputs, targets), by_data)
)
operator = al.hessian(spread, al.shard_parameters(params, mesh, "data"))
print(operator)
print(al.trace(operator, jax.random.key(4), samples=8))

# %%
# Stream
# ------
# ``batched`` reads the data batch by batch in every product; a loader that can be read again will do. Batches of unequal
# sizes weigh by what counts in them, so that the numbers are those of the whole data:
parts = [
    (np.asarray(inputs[a:b]), np.asarray(targets[a:b]))
    for a, b in ((0, 100), (100, 200), (200, 256))
]
streamed = al.batched(al.from_linen(model), al.square_loss, parts)
difference = al.hessian(streamed, params).dense() - al.hessian(risk, params).dense()
print(streamed, f"differs by {jnp.max(jnp.abs(difference)):.1e}")
