"""What spreads over the devices of one machine by itself; prints its numbers as JSON, from N devices of this CPU."""

import json
import sys
import tempfile


def main(devices: int) -> None:
    import jax

    from attnlab.compiled import keep_compiled_programs

    keep_compiled_programs()
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_enable_x64", True)
    print(json.dumps(measure()))


def measure() -> dict:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import linen as nn
    from jax.flatten_util import ravel_pytree
    from jax.tree_util import Partial

    from attnlab.curvature import (
        NonFiniteProductError,
        Operator,
        diagonal,
        ggn,
        hessian,
        log_determinant,
        spectral_density,
        trace,
    )
    from attnlab.degeneracy.estimate import learning_coefficient
    from attnlab.local_devices import local_sharding
    from attnlab.losses import square_loss
    from attnlab.models.adapters import from_linen
    from attnlab.objectives import objective
    from attnlab.runs.session import Session

    random = np.random.default_rng(0)
    model = nn.Sequential([nn.Dense(4, param_dtype=float), jnp.tanh, nn.Dense(2, param_dtype=float)])
    inputs, targets = (jnp.asarray(random.standard_normal((8, size))) for size in (3, 2))
    params = model.init(jax.random.key(0), inputs)["params"]
    risk, key = objective(from_linen(model), square_loss, inputs, targets), jax.random.key(1)
    operator = hessian(risk, params)
    reports: list = []
    with tempfile.TemporaryDirectory() as folder:
        session = Session(directory=folder, report=reports.append)
        long = spectral_density(operator, key, samples=6, steps=18, session=session)
        again = spectral_density(operator, key, samples=6, steps=18, session=session)  # read from the folder
    estimates = {
        "trace of six": trace(operator, key, samples=6),
        "trace of four": trace(operator, key, samples=4),
        "trace of five": trace(operator, key, samples=5),
        "log-determinant": log_determinant(ggn(risk, params), key, damping=0.1, samples=6, steps=8),
    }
    flat = diagonal(operator, key, samples=6)
    # A product that is not finite from the fourth sample on, whichever device it falls to.
    draws = [operator.sample(jax.random.rademacher, one) for one in jax.random.split(key, 6)]
    fourth = jnp.asarray(draws[3])
    poisoned = lambda bad, vector: jax.tree.map(  # noqa: E731
        lambda leaf: jnp.where(jnp.all(ravel_pytree(vector)[0] == bad), jnp.nan, leaf), vector
    )
    try:
        trace(Operator(Partial(poisoned, fourth), params), key, samples=6)
        raise AssertionError("a product with NaN went through")
    except NonFiniteProductError as error:
        partial = error.partial
    bound = hessian(risk, jax.device_put(params, jax.devices()[-1]))
    fitted = objective(from_linen(model), square_loss, inputs, model.apply({"params": params}, inputs))
    chains = learning_coefficient(fitted, params, key, steps=400, chains=6, localization=1.0)
    spread = {count: local_sharding(operator, count) for count in (6, 3, 5, 1)}
    return {
        "devices": {count: 1 if found is None else found.num_devices for count, found in spread.items()},
        "within jit": float(jax.jit(lambda operator: trace(operator, key, samples=6).value)(operator)),
        "where it was": [
            str(next(iter(leaf.devices()))) for leaf in (bound.dense(), trace(bound, key, samples=6).value)
        ],
        "samples before NaN": [partial.samples, float(partial.value)],
        "products told": [reports[-1].products, reports[-1].total],
        "numbers": {
            "density": spectral_density(operator, key, samples=6, steps=8).nodes.tolist(),
            "together": spectral_density(
                operator, key, samples=12, steps=8, session=Session(together=2)
            ).nodes.tolist(),
            "long": long.nodes.tolist(),
            "again": again.nodes.tolist(),
            "dense": operator.dense().tolist(),
            "bound": bound.dense().tolist(),
            "diagonal": ravel_pytree(flat.value)[0].tolist() + ravel_pytree(flat.standard_error)[0].tolist(),
            "chains": [float(chains.value), float(chains.summary.sampling), float(chains.rhat)],
            **{name: [float(found.value), float(found.standard_error)] for name, found in estimates.items()},
        },
    }


if __name__ == "__main__":
    main(int(sys.argv[1]))
