"""What spreads over the devices of one machine by itself; prints its numbers as JSON, from N devices of this CPU.

With `--all` the chains of a learning coefficient and a log-determinant too, which compile for long.
"""

import json
import sys
import tempfile


def main(devices: int, everything: bool) -> None:
    import jax

    from attnlab.compiled import keep_compiled_programs

    keep_compiled_programs()
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_enable_x64", True)
    print(json.dumps(measure(everything)))


def measure(everything: bool) -> dict:
    import jax

    from attnlab.curvature import hessian, trace
    from attnlab.local_devices import local_sharding

    risk, params = problem()
    operator, key = hessian(risk, params), jax.random.key(1)
    spread = {count: local_sharding(operator, count) for count in (6, 3, 5, 1)}
    bound = hessian(risk, jax.device_put(params, jax.devices()[-1]))
    places = (bound.dense(), trace(bound, key, samples=6).value)
    numbers, told = densities(operator, key)
    numbers |= slow_ones(risk, params, key) if everything else {}
    numbers |= estimates(operator, key) | {"dense": operator.dense().tolist(), "bound": bound.dense().tolist()}
    return {
        "devices": {count: 1 if found is None else found.num_devices for count, found in spread.items()},
        "within jit": float(jax.jit(lambda operator: trace(operator, key, samples=6).value)(operator)),
        "where it was": [str(next(iter(leaf.devices()))) for leaf in places],
        "samples before NaN": before_nan(operator, params, key),
        "products told": told,
        "numbers": numbers,
    }


def problem():
    """A network at parameters that fit its data."""
    import jax
    import jax.numpy as jnp
    from flax import linen as nn

    from attnlab.losses import square_loss
    from attnlab.models.adapters import from_linen
    from attnlab.objectives import objective

    model = nn.Sequential([nn.Dense(4, param_dtype=float), jnp.tanh, nn.Dense(2, param_dtype=float)])
    inputs = jax.random.normal(jax.random.key(2), (8, 3))
    params = model.init(jax.random.key(0), inputs)["params"]
    return objective(from_linen(model), square_loss, inputs, model.apply({"params": params}, inputs)), params


def densities(operator, key) -> tuple[dict, list]:
    """Nodes of a density in one program, of groups, saved, and read from the folder; the products last told."""
    from attnlab.curvature import spectral_density
    from attnlab.runs.session import Session

    reports: list = []
    with tempfile.TemporaryDirectory() as folder:
        session = Session(directory=folder, report=reports.append)
        long, again = (spectral_density(operator, key, samples=6, steps=18, session=session) for _ in range(2))
    found = {
        "density": spectral_density(operator, key, samples=6, steps=8),
        "together": spectral_density(operator, key, samples=12, steps=8, session=Session(together=2)),
        "long": long,
        "again": again,
    }
    return {name: density.nodes.tolist() for name, density in found.items()}, [reports[-1].products, reports[-1].total]


def estimates(operator, key) -> dict:
    """Traces of numbers of samples that devices divide or do not, and a diagonal."""
    from jax.flatten_util import ravel_pytree

    from attnlab.curvature import diagonal, trace

    found = {f"trace of {samples}": trace(operator, key, samples=samples) for samples in (4, 5, 6)}
    entries = diagonal(operator, key, samples=6)
    return {
        **{name: [float(number.value), float(number.standard_error)] for name, number in found.items()},
        "diagonal": [ravel_pytree(part)[0].tolist() for part in (entries.value, entries.standard_error)],
    }


def slow_ones(risk, params, key) -> dict:
    import warnings

    from attnlab.curvature import ggn, log_determinant
    from attnlab.degeneracy.estimate import learning_coefficient

    determinant = log_determinant(ggn(risk, params), key, damping=0.1, samples=6, steps=8)
    with warnings.catch_warnings(action="ignore"):  # so short a run is not to be trusted
        chains = learning_coefficient(risk, params, key, steps=400, chains=6, localization=1.0)
    return {
        "log-determinant": [float(determinant.value), float(determinant.standard_error)],
        "chains": [chains.value, float(chains.summary.sampling), float(chains.rhat)],
    }


def before_nan(operator, params, key) -> list:
    """What an estimate keeps of six samples, of which the fourth has a product that is not finite."""
    import jax
    import jax.numpy as jnp
    from jax.flatten_util import ravel_pytree
    from jax.tree_util import Partial

    from attnlab.curvature import NonFiniteProductError, Operator, trace

    fourth = operator.sample(jax.random.rademacher, jax.random.split(key, 6)[3])

    def poisoned(bad, vector):
        here = jnp.all(ravel_pytree(vector)[0] == bad)
        return jax.tree.map(lambda leaf: jnp.where(here, jnp.nan, leaf), vector)

    try:
        trace(Operator(Partial(poisoned, fourth), params), key, samples=6)
    except NonFiniteProductError as error:
        return [error.partial.samples, float(error.partial.value)]
    raise AssertionError("a product with NaN went through")


if __name__ == "__main__":
    main(int(sys.argv[1]), "--all" in sys.argv)
