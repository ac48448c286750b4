"""Claims about the edge of each optimizer, exact on a quadratic, and about RMSProp's flow along it."""

from functools import partial
from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from jaxtyping import Array, Float

from attnlab.claims.registry import claim
from attnlab.curvature.operator import Operator
from attnlab.dynamics.flows import central_flow, smoothed
from attnlab.dynamics.preconditioners import whitened
from attnlab.dynamics.rules import UpdateRule, preconditioner_after_step, update_rule
from attnlab.expectation import Expectation, at_least, at_most, equal
from attnlab.objectives import Objective
from attnlab.risks.digits import digits_attention
from attnlab.trees import ravel
from attnlab.types import Params, PRNGKey

OPTIMIZERS: dict[str, dict[str, float]] = {
    "gd": {},
    "heavy_ball": {"momentum": 0.7},
    "nesterov": {"momentum": 0.8},
    "rmsprop": {"b2": 0.9},
    "adam": {"b1": 0.6},
    "adamw": {"b1": 0.6, "weight_decay": 0.3},
    "adafactor": {"min_dim_size_to_factor": 2},
    "shampoo": {"b1": 0.6},
    "soap": {"b1": 0.6},
}
FACTORS = (0.999, 1.0, 1.001)
STABLE_BEYOND = {"heavy_ball", "adam", "adamw", "shampoo", "soap"}
"""Rules that are stable 5 % above 2 / eta."""


@claim(
    statement=r"\rho\!\left(\frac{\partial (w_{t+1}, m_{t+1})}{\partial (w_t, m_t)}\right) < 1 \iff"
    r" \lambda_1(P^{-1/2} H P^{-1/2}) < \begin{cases} 2/\eta & \text{GD, RMSProp, Adafactor} \\"
    r" (2 + 2\beta)/\eta & \text{heavy ball} \\ (2 + 2\beta)/((1 + 2\beta)\eta) & \text{Nesterov} \\"
    r" (2 + 2\beta_1)/((1 - \beta_1)\eta) & \text{Adam, Shampoo, SOAP} \\"
    r" (2 - \eta\lambda)(1 + \beta_1)/((1 - \beta_1)\eta) & \text{AdamW} \end{cases}",
    source="Cohen, Kaur, Li, Kolter, Talwalkar, arXiv 2103.00065, appendix B; Cohen et al., arXiv 2207.14484; AdamW, "
    "Adafactor, Shampoo and SOAP derived here",
    tolerance=1e-8,
    because="at the threshold the lowest eigenvalue of a step is -1 up to rounding; 0.1 % below and above it the sign of "
    "rho - 1 decides, and so it does 5 % above 2 / eta, the negative control, where some rules are stable and some not",
    slow=True,
)
def each_optimizer_loses_stability_at_its_own_threshold(key: PRNGKey) -> list[Expectation]:
    """The step of the optimizer itself, differentiated at the minimum of a random quadratic of a matrix (2, 2), with a
    random second moment: its derivative in the gradient vanishes there, so that P is held."""
    measured = {n: _around_the_threshold(update_rule(n, 0.05, **OPTIMIZERS[n]), key) for n in OPTIMIZERS}
    below, edge, above, _ = np.array(list(measured.values())).T
    unstable, stable = ([m[3] for n, m in measured.items() if (n in STABLE_BEYOND) is kind] for kind in (False, True))
    return [
        equal("lowest eigenvalue of a step at the threshold, by rule", edge, -1.0),
        at_most("rho - 1 below the threshold, by rule", below, 0.0),
        at_least("rho - 1 above the threshold, by rule", above, 0.0),
        at_least("rho - 1 above 2 / eta: GD, Nesterov, RMSProp, Adafactor", unstable, 0.0),
        at_most("rho - 1 above 2 / eta: heavy ball, Adam, AdamW, Shampoo, SOAP", stable, 0.0),
    ]


def _around_the_threshold(rule: UpdateRule, key: PRNGKey) -> list[float]:
    """rho - 1 below the threshold, the lowest eigenvalue at it, rho - 1 above it, and rho - 1 above 2 / eta."""
    keys, minimum = jax.random.split(key, 2), jnp.zeros((2, 2))
    root = jax.random.normal(keys[0], (4, 4))
    state = rule.transformation.init(minimum)
    with jax.numpy_dtype_promotion("standard"):
        for gradient in jax.random.normal(keys[1], (2, 2, 2)):
            _, state = rule.transformation.update(gradient, state, minimum)
    preconditioner, threshold = preconditioner_after_step(rule, minimum, state, minimum)
    curvature = Operator(Partial(_product, root @ root.T), minimum)
    highest = jnp.linalg.eigvalsh(whitened(curvature, preconditioner).dense())[-1]
    name = next((name for name in ("trace", "mu") if optax.tree.get_all_with_path(state, name)), None)

    @jax.jit
    @partial(jax.jacfwd, argnums=0)
    def step(point: Float[Array, "2 2 2"], value: Array) -> Float[Array, "2 2 2"]:
        """(w, first moment) after a step where the highest preconditioned curvature is `value`."""
        before = state if name is None else optax.tree.set(state, **{name: point[1]})
        gradient = _product(value / highest * root @ root.T, point[0])
        with jax.numpy_dtype_promotion("standard"):
            updates, after = rule.transformation.update(gradient, before, point[0])
        return jnp.stack([point[0] + updates, minimum if name is None else optax.tree.get(after, name)])

    edges = [factor * threshold for factor in FACTORS] + [1.05 * 2 / 0.05]
    spectra = [np.linalg.eigvals(step(jnp.zeros((2, 2, 2)), jnp.asarray(edge)).reshape(8, 8)) for edge in edges]
    growths = [float(np.abs(spectrum).max() - 1) for spectrum in spectra]
    return [growths[0], float(spectra[1].real.min()), *growths[2:]]


def _product(matrix: Float[Array, "4 4"], point: Float[Array, "2 2"]) -> Float[Array, "2 2"]:
    return (matrix @ point.ravel()).reshape(point.shape)


RATE, B2, STEPS = 3e-3, 0.95, 40
RULE = update_rule("rmsprop", RATE, b2=B2)
RMSPROP = RULE.transformation


@claim(
    statement=r"\|w_{\mathrm{stable}} - \bar w_t\| \ge 3\, \|w_{\mathrm{central}} - \bar w_t\| \text{ for RMSProp at its edge}",
    source="Cohen, Damian, Talwalkar, Kolter, Lee, arXiv 2410.24206",
    because="bounds: some 3.5 to 10 at the edge; with a second moment a hundred times larger, the negative control, "
    "training stays below it, and both flows are one",
    slow=True,
)
def rmsprop_follows_its_central_flow_not_the_stable_one(key: PRNGKey) -> list[Expectation]:
    """40 steps on 16 digits from step 150, against the flow that lets sharpness rise: that without oscillation."""
    risk, params = digits_attention(key, key, 16)
    zero = jax.tree.map(jnp.zeros_like, params)
    point, moment = jax.tree.map(itemgetter(-1), _rmsprop(risk, params, zero))
    above = _distance_ratio(risk, point, moment, key)
    below = _distance_ratio(risk, point, jax.tree.map(lambda nu: 100 * nu, moment), key)
    return [
        at_least("distance to the stable flow over that to the central flow: at the edge", above, 3.0),
        at_most("the same below the edge", below, 1.01),
    ]


@jax.jit
def _rmsprop(risk: Objective, params: Params, moment: Params) -> tuple[Params, Params]:
    """150 steps of RMSProp from a second moment: each iterate, and the second moment that its step divides by."""
    with jax.numpy_dtype_promotion("standard"):
        start = params, optax.tree.set(RMSPROP.init(params), nu=moment)

    def step(carry: tuple, _: None) -> tuple[tuple, tuple]:
        params, state = carry
        with jax.numpy_dtype_promotion("standard"):
            updates, after = RMSPROP.update(jax.grad(risk)(params), state, params)
        return (optax.apply_updates(params, updates), after), (params, optax.tree.get(after, "nu"))

    return jax.lax.scan(step, start, length=151)[1]


def _distance_ratio(risk: Objective, params: Params, moment: Params, key: PRNGKey) -> float:
    """Of RMSProp's mean iterate from the stable flow, over that from the central flow, at the end."""
    path = _rmsprop(risk, params, moment)
    smooth = smoothed(path)
    start, end = (jax.tree.map(itemgetter(step), smooth) for step in (0, STEPS))
    central = central_flow(risk, start[0], RULE, key, steps=STEPS, every=STEPS, second_moment=start[1], substeps=2)
    ends = jax.tree.map(itemgetter(-1), central.params), _stable_flow(risk, *start)
    distances = [jnp.linalg.norm(ravel(point) - ravel(end[0])) for point in ends]
    return float(distances[1] / distances[0])


@jax.jit
def _stable_flow(risk: Objective, params: Params, moment: Params) -> Params:
    """The central flow of RMSProp without its oscillation, in the same Euler steps of half a step of RMSProp."""
    forget = float(np.exp(-0.5 * (1 - B2) / B2))

    def step(carry: tuple[Params, Params], _: None) -> tuple[tuple[Params, Params], None]:
        params, moment = carry
        gradient = jax.grad(risk)(params)
        moved = jax.tree.map(lambda w, g, nu: w - RATE / 2 * g / (jnp.sqrt(nu) + 1e-8), params, gradient, moment)
        return (moved, jax.tree.map(lambda nu, g: g**2 + forget * (nu - g**2), moment, gradient)), None

    return jax.lax.scan(step, (params, moment), length=2 * STEPS)[0][0]
