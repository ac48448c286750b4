"""Claims about depth, training times and the loss landscape of linear attention that learns in context."""

from dataclasses import replace
from itertools import pairwise
from math import comb

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.integrate
import scipy.optimize
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from attnlab.claims.icl_risk import NEWTON, SAMPLED, STANDARD_ERRORS, error_and_gradient, means_against
from attnlab.claims.icl_spectrum import wishart_density
from attnlab.claims.registry import claim
from attnlab.expectation import Expectation, at_least, at_most, equal
from attnlab.icl.constructions import gradient_descent_stack
from attnlab.icl.curriculum import leading_coordinates, train_in_stages
from attnlab.icl.depth import (
    depth_risk,
    depth_step_sizes,
    gauss_rule,
    looped_risk,
    marchenko_pastur_moments,
    plus_plus_risk,
    wishart_moments,
)
from attnlab.icl.landscape import StationaryPoint, balance, swapped_start
from attnlab.icl.models import init_effective, stack_predict
from attnlab.icl.optima import adapted_risks, optimal_risk
from attnlab.icl.population import population_objective
from attnlab.icl.tasks import LinearRegression, isotropic, linear_regression, sample_prompts
from attnlab.icl.training_time import direction_forces, merged_growth, staircase_times
from attnlab.objectives import Objective
from attnlab.training import train
from attnlab.types import Params, PRNGKey

INTEGRATED = "gradient flow on the exact risk, integrated at a relative accuracy of 1e-10 a step"


@claim(
    statement=r"\min \tfrac1d L = \frac{1}{(H^{-1})_{00}},\quad H_{ij} = \tfrac1d \mathbb{E}\, \mathrm{tr}\, \hat G^{i+j};"
    r" \text{ the steps are one over the roots of the residual}",
    source="orthogonal polynomials of the spectrum; the stack is that of Ahn et al., arXiv 2306.00297, with B = 0; derived here",
    tolerance=STANDARD_ERRORS,
    because=SAMPLED,
    slow=True,
)
def depth_gives_orthogonal_polynomials(key: PRNGKey) -> Expectation:
    """Stacks of one to three layers with these steps on sampled prompts, d = 5, N = 20: 1.154, 0.361, 0.134."""
    moments = wishart_moments(5, 20, 6)
    prompts = sample_prompts(key, isotropic(5), 20, 20_000)

    def errors(layers: int) -> Array:
        steps = jnp.asarray(depth_step_sizes(moments, layers))
        stack = gradient_descent_stack(steps[:, None, None] * jnp.eye(5)[None])
        return (jax.vmap(lambda prompt: stack_predict(stack, prompt))(prompts) - prompts.target) ** 2

    predicted = jnp.array([5 * depth_risk(moments, layers) for layers in (1, 2, 3)])
    found = jnp.stack([errors(layers) for layers in (1, 2, 3)], axis=1)
    return means_against("squared error, mean, of one to three layers", predicted, found)


@claim(
    statement=r"d = N \to \infty: \quad \tfrac1d L = \frac{1}{L + 1} \text{ with steps of their own},\quad"
    r" \binom{2L}{L} 4^{-L} \sim (\pi L)^{-1/2} \text{ for one looped layer}",
    source="moments of the law of Marchenko and Pastur are Catalan numbers; derived here",
    tolerance=1e-10,
    because="exact in rational numbers; the best looped step by a search to 1e-12",
)
def depth_laws_at_equal_dimension_and_length(key: PRNGKey) -> Expectation:
    """Hankel determinants and the looped optimum for 1 to 12 layers; nothing here is random."""
    moments = marchenko_pastur_moments(1, 24)
    depths = range(1, 13)
    predicted = [[1 / (layers + 1), comb(2 * layers, layers) / 4**layers] for layers in depths]
    return equal(
        "risks of own steps and of one looped layer, by depth",
        [[depth_risk(moments, n), looped_risk(moments, n)[0]] for n in depths],
        predicted,
        unit="relative",
    )


@claim(
    statement=r"\text{descent on the step sizes of } L = 1, \ldots, 5 \text{ layers ends at } d / (H^{-1})_{00}",
    source="the stack is that of Ahn et al., arXiv 2306.00297, with B = 0; the value derived here",
    tolerance=1e-8,
    because="quasi-Newton descent on the exact risk from random steps, relative to the risk of each depth; on seeds 0 to 9 "
    "it ends within 2e-9, where its line search no longer sees the difference",
)
def descent_on_step_sizes_ends_at_the_hankel_value(key: PRNGKey) -> Expectation:
    """Five depths by one compiled risk, in which a layer of step size 0 does nothing; d = 5, N = 20."""
    moments = wishart_moments(5, 20, 11)
    rule = gauss_rule(moments, 6)

    @jax.jit
    @jax.value_and_grad
    def total(steps: Array, used: Array) -> Array:
        return 5 * plus_plus_risk(jnp.where(used, steps, 0.0), jnp.zeros(5), rule)

    depths = range(1, 6)
    starts = jax.random.uniform(key, (5, 5), minval=0.2, maxval=1.2)
    ends = [
        scipy.optimize.minimize(total, start, args=(jnp.arange(5) < layers,), jac=True, method="BFGS").fun
        for layers, start in zip(depths, np.asarray(starts), strict=True)
    ]
    predicted = np.array([5 * depth_risk(moments, layers) for layers in depths])
    return equal("end of the descent over the Hankel value, by depth", np.array(ends) / predicted, 1.0)


@claim(
    statement=r"d = N \to \infty: \quad L \propto (\text{layers})^{-1} \text{ with steps of their own},\quad"
    r" (\text{layers})^{-1/2} \text{ for one looped layer}",
    source="limits of the exact laws, derived here",
    tolerance=0.05,
    because="exponents between 16 and 32 layers, absolute: log2(17/33) = -0.957 has not yet come to -1",
)
def depth_exponents_at_equal_dimension_and_length(key: PRNGKey) -> Expectation:
    """Local exponents of both risks from exact moments; nothing here is random."""
    moments = marchenko_pastur_moments(1, 64)
    coarse, fine = (np.array([depth_risk(moments, n), looped_risk(moments, n)[0]]) for n in (16, 32))
    return equal("exponents between 16 and 32 layers: own steps, looped", np.log2(fine / coarse), [-1.0, -0.5])


@claim(
    statement=r"\min L_{\mathrm{GD}++} = 1.153846,\ 0.0575012,\ 9.61311 \times 10^{-4} \text{ for } L = 1, 2, 3 \quad (d = 5,\ N = 20)",
    source="the algorithm of von Oswald et al., arXiv 2212.07677; its population optimum derived here",
    tolerance=2e-6,
    because="to the digits given, 8e-7; quasi-Newton descent from steps a tenth away, over the density of the spectrum by "
    "de Bruijn's integral on 14,000 points. A sample of prompts misses the rare eigenvalues that decide it, and its own "
    "optimum is three tenths too low",
)
def best_gd_plus_plus(key: PRNGKey) -> Expectation:
    """Minimised over step sizes and contractions, from perturbed starts, without our moments, rule or polynomials."""
    points = np.linspace(0.0, 14.0, 14_001)
    density, measured = wishart_density(5, 20, points), []

    def log_risk(vector: np.ndarray) -> float:
        residual, eigenvalues = np.ones_like(points), points
        for step, contraction in zip(*np.split(vector, 2), strict=True):
            residual = residual * (1 - step * eigenvalues)
            eigenvalues = eigenvalues * (1 - contraction * eigenvalues) ** 2
        return float(np.log(scipy.integrate.simpson(residual**2 * density, x=points)))

    for layers, (best, _) in PLUS_PLUS.items():
        start = 1 + 0.1 * np.asarray(jax.random.uniform(jax.random.fold_in(key, layers), (2 * layers,), minval=-1))
        found = scipy.optimize.minimize(lambda share, best=best: log_risk(share * best), start, method="BFGS")
        measured.append(np.exp(found.fun))
    predicted = np.array([risk for _, risk in PLUS_PLUS.values()])
    return equal("least risk over the predicted one, by depth", np.array(measured) / predicted, 1.0)


# Step sizes, then contractions (the last has no effect), and the risk.
PLUS_PLUS = {
    1: ([0.769231, 1.0], 1.153846),
    2: ([0.516763, 3.474664, 0.448787, 1.0], 0.0575012),
    3: ([0.338297, 2.090850, 8.568058, 0.296883, 1.208846, 1.0], 0.000961311),
}


@jax.jit
def sampled_plus_plus_risks(inputs: Array) -> Array:
    """Squared error of the best three layers, averaged over the task and the query, for each context (n, 20, 5)."""
    steps, contractions = jnp.split(jnp.array(PLUS_PLUS[3][0]), 2)
    eigenvalues = jnp.linalg.eigvalsh(jnp.einsum("bni,bnj->bij", inputs, inputs) / 20)
    return jax.vmap(lambda values: plus_plus_risk(steps, contractions, (values, jnp.ones(5))))(eigenvalues)


@claim(
    statement=r"\text{GD++, } L = 3,\ d = 5,\ N = 20: \quad 9.61 \times 10^{-4} \text{ in expectation, but } 9.01 \times 10^{-4}"
    r" \text{ on sampled prompts: eigenvalues above 5, which none of them has, carry } 6\,\%",
    source="derived here, from the nodes of the Gauss rule for the spectrum",
    tolerance=STANDARD_ERRORS,
    because=SAMPLED + "; the share of the nodes above 5 is put aside on both sides",
    slow=True,
)
def best_gd_plus_plus_on_sampled_prompts(key: PRNGKey) -> Expectation:
    """Mean over 50,000 contexts against the part of the exact risk that nodes below 5 carry."""
    steps, contractions = jnp.split(jnp.array(PLUS_PLUS[3][0]), 2)
    nodes, weights = gauss_rule(wishart_moments(5, 20, 27), 14)
    common = 5 * plus_plus_risk(steps, contractions, (nodes, jnp.where(nodes < 5, weights, 0)))
    sampled = sampled_plus_plus_risks(jax.random.normal(key, (50_000, 20, 5)))
    return means_against("squared error of three layers, mean", common, sampled)


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
