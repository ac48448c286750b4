"""Claims about training times and the loss landscape of linear attention that learns in context."""

from dataclasses import replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.integrate
import scipy.optimize
from jax.flatten_util import ravel_pytree

from attnlab.claims.icl_risk import NEWTON, SAMPLED, STANDARD_ERRORS, error_and_gradient, means_against
from attnlab.claims.registry import claim
from attnlab.expectation import Expectation, at_least, at_most, equal
from attnlab.icl.curriculum import leading_coordinates, train_in_stages
from attnlab.icl.landscape import StationaryPoint, balance, swapped_start
from attnlab.icl.models import init_effective
from attnlab.icl.optima import adapted_risks, optimal_risk
from attnlab.icl.population import population_objective
from attnlab.icl.tasks import LinearRegression, isotropic, linear_regression, sample_prompts
from attnlab.icl.training_time import direction_forces, merged_growth, staircase_times
from attnlab.objectives import Objective
from attnlab.training import train
from attnlab.types import Params, PRNGKey

INTEGRATED = "gradient flow on the exact risk, integrated at a relative accuracy of 1e-10 a step"


SLOPE = jax.jit(jax.grad(lambda params, risk: -risk(params)))


def gradient_flow(risk: Objective, start: Params, times: np.ndarray, method: str = "DOP853") -> Params:
    """The parameters at ascending times from 0, with a leading axis."""
    flat, unravel = ravel_pytree(start)

    def slope(_: float, vector: np.ndarray) -> np.ndarray:
        return np.asarray(ravel_pytree(SLOPE(unravel(jnp.asarray(vector)), risk))[0])

    span = (0.0, float(times[-1]))
    path = scipy.integrate.solve_ivp(slope, span, np.asarray(flat), method, t_eval=times, rtol=1e-10, atol=1e-12)
    return jax.vmap(unravel)(jnp.asarray(path.y.T))


@claim(
    statement=r"\dot g = 4 \sqrt d\, g \left(1 - \frac{g}{g^\star}\right),\quad g^\star = \frac{N}{N + d + 1 + \sigma^2}",
    source="Zhang, Singh, Latham, Saxe, arXiv 2501.16265, here at finite N",
    tolerance=1e-7,
    because=INTEGRATED,
    slow=True,
)
def merged_weights_grow_along_a_logistic_curve(key: PRNGKey) -> Expectation:
    """The whole layer with one query-key matrix from a balanced start of random size, isotropic d = 3."""
    d, length, noise = 3, 8, 0.2
    size = float(jax.random.uniform(key, minval=0.05, maxval=0.2))
    start = {
        "value": jnp.zeros((1, d + 1)).at[0, -1].set(size),
        "query_key": jnp.zeros((1, d + 1, d)).at[0, :d].set(size / d**0.5 * jnp.eye(d)),
    }
    times = np.linspace(0.0, 1.5, 16)
    path = gradient_flow(population_objective(isotropic(d, noise), length), start, times)
    growth = path["value"][:, 0, -1] * path["query_key"][:, 0, 0, 0]
    return equal(
        "the growth g along the flow",
        growth,
        merged_growth(jnp.asarray(times), size**2 / d**0.5, d, length, noise),
        unit="relative",
    )


SPECTRUM = jnp.array([4.0, 2.0, 1.0, 0.5])


@claim(
    statement=r"\dot z = 2 z^2 (A_m - C_m z^3) \text{ along eigenvector } m: \quad t = \frac{J(s) - 1/s}{2 A_m (A_m / C_m)^{1/3}}\Big|_{s(0)}^{s(t)}",
    source="Zhang, Singh, Latham, Saxe, arXiv 2501.16265, here in closed form",
    tolerance=1e-6,
    because=INTEGRATED + "; times relative to the longest",
    slow=True,
)
def separate_keys_and_queries_learn_in_a_staircase(key: PRNGKey) -> Expectation:
    """When each of four aligned heads reaches its levels, for a start of random size; N = 31."""
    problem, size = linear_regression(jnp.diag(SPECTRUM)), float(jax.random.uniform(key, minval=0.2, maxval=0.3))
    gain, curvature = direction_forces(problem, 31)
    start = {"value": size * jnp.ones(4), "key": size * jnp.eye(4), "query": size * jnp.eye(4)}
    times = np.linspace(0.0, 12.0, 121)
    levels = gradient_flow(population_objective(problem, 31, "rank_one"), start, times)["value"] ** 3
    predicted, measured = [], []
    for m, limit in enumerate(gain / curvature):
        rising = np.flatnonzero((levels[:, m] > 1.01 * size**3) & (levels[:, m] < 0.99 * limit))
        predicted.append(times[rising])
        measured.append(staircase_times(levels[rising, m], size**3, gain[m], curvature[m]))
    return equal(
        "times at which the heads reach their levels",
        np.concatenate(measured),
        np.concatenate(predicted),
        unit="relative",
    )


@claim(
    statement=r"L(t) \text{ rests at } \min_{\mathrm{rank}\, \Gamma \le m} L(\Gamma),\ m = 0, 1, \ldots:"
    r" \quad 7.5 \to 3.84 \to 2.11 \to 1.32 \to 0.99 \quad (\lambda = (4, 2, 1, \tfrac12),\ N = 31)",
    source="Zhang, Singh, Latham, Saxe, arXiv 2501.16265",
    tolerance=0.05,
    because="plateaus of a small but finite start, relative to the plateau: where the risk changes least between two steps",
    slow=True,
)
def the_staircase_rests_at_the_best_low_ranks(key: PRNGKey) -> Expectation:
    """Gradient flow from a small random start of four heads; the slowest points of log risk, one between two steps."""
    problem = linear_regression(jnp.diag(SPECTRUM))
    plateaus = np.asarray(adapted_risks(problem, 31))
    shapes = {"value": (4,), "key": (4, 4), "query": (4, 4)}
    keys = jax.random.split(key, 3)
    start = {name: 0.02 * jax.random.normal(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}
    risk = population_objective(problem, 31, "rank_one")
    times = np.geomspace(1e-2, 1e4, 1000)
    risks = np.asarray(jax.vmap(risk)(gradient_flow(risk, start, times, "LSODA")))
    speed = -np.diff(np.log(risks)) / np.diff(np.log(times))
    middles = np.sqrt(risks[1:] * risks[:-1])
    bounds = np.sqrt(plateaus[1:] * plateaus[:-1])
    between = [(middles < low) & (middles > high) for low, high in pairwise(bounds)]
    slowest = [middles[inside][np.argmin(speed[inside])] for inside in between]
    measured = [risks[0], *slowest, risks[-1]]
    return equal("risks of the plateaus over the predicted ones", np.array(measured) / plateaus, 1.0)


ADAM = optax.adam(optax.cosine_decay_schedule(0.03, 2000))
ANISOTROPIC = jnp.array([2.0, 1.0, 0.5, 0.25, 0.1])


STAGE = optax.adam(optax.cosine_decay_schedule(0.05, 400))


@claim(
    statement=r"\text{a curriculum over the first } k = 1, \ldots, d \text{ coordinates ends each stage at } L^\star(\Lambda_{1..k}), "
    r"\text{ the last one at } L^\star(\Lambda)",
    source="the curriculum is that of Garg et al., arXiv 2208.01066; the risks derived here",
    tolerance=1e-6,
    because="400 steps of Adam a stage on the exact risk, down to a rate of zero",
    slow=True,
)
def a_curriculum_climbs_through_the_optimal_risks(key: PRNGKey) -> Expectation:
    """Exact risks at the ends of the stages, the preconditioner from a small random start; three random variances."""
    variances = jax.random.uniform(key, (3,), minval=0.5, maxval=2.0)
    problem = linear_regression(jnp.diag(variances), noise_variance=0.1)
    stages = [leading_coordinates(problem, k) for k in (1, 2, 3)]
    start = {"preconditioner": 0.1 * jax.random.normal(key, (3, 3))}
    risks = [population_objective(stage, 8, "reduced") for stage in stages]
    runs = train_in_stages(risks, start, STAGE, key, steps=400, every=400)
    measured = [float(run.records.losses[-1]) for run in runs]
    return equal(
        "risks at the ends of the stages",
        measured,
        [float(optimal_risk(stage, 8)) for stage in stages],
        unit="relative",
    )


def rotated_problem(key: PRNGKey) -> LinearRegression:
    """The anisotropic problem of the bad minimum in a random orthonormal basis: d = 5, noise variance 0.1."""
    basis, _ = jnp.linalg.qr(jax.random.normal(key, (5, 5)))
    covariance = (basis * ANISOTROPIC[None, :]) @ basis.T
    return linear_regression((covariance + covariance.T) / 2, noise_variance=0.1)


def bad_minimum(problem: LinearRegression, length: int) -> StationaryPoint:
    """The stationary point that Newton's method reaches from the swapped start."""
    return NEWTON(population_objective(problem, length), balance(swapped_start(problem, length)))


@claim(
    statement=r"\lambda = (2, 1, .5, .25, .1),\ \sigma^2 = .1,\ N = 20: \quad \nabla L = 0,\ L = 1.9360 \text{ against }"
    r" L^\star = 0.7924,\ \nabla^2 L \succ 0 \text{ but for the scale}",
    source="derived here",
    tolerance=1e-5,
    because="risks to the digits given",
    slow=True,
)
def anisotropy_makes_a_strict_bad_minimum(key: PRNGKey) -> list[Expectation]:
    """Risk at the swapped stationary point and at the optimum, in a random basis; strictness by its exact Hessian."""
    problem = rotated_problem(key)
    point = bad_minimum(problem, 20)
    risks = [point.risk, optimal_risk(problem, 20)]
    what = "risk at the swapped stationary point, and the least one"
    return [equal(what, risks, [1.935972, 0.792426]), *strict_minimum(point, symmetries=1)]


def strict_minimum(point: StationaryPoint, symmetries: int) -> list[Expectation]:
    """That a point is stationary, and its Hessian positive but for one flat eigenvalue a symmetry."""
    relative = point.hessian_eigenvalues / point.hessian_eigenvalues[-1]
    flat = jnp.sum(jnp.abs(relative) <= 1e-9)
    return [
        at_most("norm of the gradient", point.gradient_norm, 1e-12, because="rounding"),
        equal("Hessian eigenvalues within 1e-9 of zero", flat, symmetries, 0.0, because="a count"),
        at_least("lowest other eigenvalue over the highest", relative[symmetries], 1e-9, because="beyond rounding"),
    ]


@claim(
    statement=r"\mathbb{E} (\hat y - y)^2 = 1.9360,\ \mathbb{E} \nabla (\hat y - y)^2 = 0 \text{ at the bad minimum, on sampled prompts}",
    source="derived here",
    tolerance=STANDARD_ERRORS,
    because=SAMPLED,
    slow=True,
)
def the_bad_minimum_shows_on_sampled_prompts(key: PRNGKey) -> Expectation:
    """Squared errors and their gradient over prompts that know nothing of the closed form of the risk."""
    problem_key, sample_key = jax.random.split(key)
    problem = rotated_problem(problem_key)
    params = bad_minimum(problem, 20).params
    prompts = sample_prompts(sample_key, problem, 20, 20_000)

    samples = error_and_gradient(params, prompts)
    predicted = jnp.zeros(samples.shape[1]).at[0].set(1.935972)
    return means_against("squared error and its gradient, mean", predicted, samples)


@claim(
    statement=r"\text{Adam from } \mathcal{N}(0, 0.1^2) \text{ weights ends at the optimum or at the bad minimum, and at each of them at times}",
    source="derived here",
    because="a count: of 32 starts, all end within 0.01 of either risk, and at least one at each",
    slow=True,
)
def random_starts_find_the_bad_minimum(key: PRNGKey) -> list[Expectation]:
    """32 random starts of the whole layer on the exact risk: how many end at either, at the bad one, at the optimum."""
    finals = ends_of_random_starts(linear_regression(jnp.diag(ANISOTROPIC), noise_variance=0.1), key)
    bad, best = (np.sum(np.abs(finals - risk) < 1e-2) for risk in (1.935972, 0.792426))
    return [
        at_least("starts of 32 that end at either risk", bad + best, 32),
        at_least("starts that end at the bad one, at the optimum", [bad, best], 1),
    ]


def ends_of_random_starts(problem: LinearRegression, key: PRNGKey) -> np.ndarray:
    """Risks of 32 layers at N = 20 from N(0, 0.1^2) weights, after 2,000 steps of Adam on the exact risk."""
    keys = jax.random.split(key, 32)
    starts = jax.vmap(lambda key: init_effective(key, problem.dimension, 0.1))(keys)
    trained = train(population_objective(problem, 20), starts, ADAM, keys, steps=2000, every=2000)
    return np.asarray(trained.records.losses[-1])


@claim(
    statement=r"\text{no bad end where the tasks' covariance is } \Omega = \Lambda^{-1},\ \lambda = (2, 1, .5, .25, .1)",
    source="derived here",
    because="a count: all of 32 random starts end within 1 per cent of the least risk",
    slow=True,
)
def whitened_tasks_avoid_the_bad_minimum(key: PRNGKey) -> Expectation:
    """The same training as under tasks N(0, I), where it often ends badly."""
    covariance = jnp.diag(ANISOTROPIC)
    problem = linear_regression(covariance, jnp.linalg.inv(covariance), noise_variance=0.1)
    good = ends_of_random_starts(problem, key) < 1.01 * float(optimal_risk(problem, 20))
    return at_least("starts of 32 that end at the least risk", np.sum(good), 32)


@claim(
    statement=r"\Lambda = \Omega = I,\ \sigma = 0: \text{ strict bad minima for } (d, N) = (2, 4), (3, 25), (4, 60)",
    source="derived here",
    because="as many Hessian eigenvalues vanish as there are symmetries (d: the scale, and the swapped direction on a "
    "sphere), all others are positive, and the risk is well above the least",
    slow=True,
)
def long_contexts_make_bad_minima_without_anisotropy(key: PRNGKey) -> list[Expectation]:
    """The swapped stationary point under isotropic inputs; the exact Hessian decides. Nothing here is random."""
    parts = []
    for d, length in ((2, 4), (3, 25), (4, 60)):
        problem = isotropic(d)
        point = bad_minimum(problem, length)
        excess = at_least("risk over the least one", point.risk / optimal_risk(problem, length), 1.05)
        parts += [
            replace(part, what=f"d = {d}: {part.what}") for part in (excess, *strict_minimum(point, symmetries=d))
        ]
    return parts
