"""Claims about degenerate minima: learning coefficients sampled, by quadrature and in closed form."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array

from attnlab.claims.registry import claim
from attnlab.degeneracy.estimate import LearningCoefficient, LearningCoefficientWarning, learning_coefficient
from attnlab.degeneracy.exact import deep_linear, normal_crossing, reduced_rank
from attnlab.degeneracy.laplace import laplace
from attnlab.degeneracy.quadrature import crossing_energy, two_layer_energy
from attnlab.expectation import Expectation, at_least, at_most, equal
from attnlab.losses import square_loss
from attnlab.objectives import Objective, objective
from attnlab.risks.degenerate import crossing_risk, deep_linear_risk, turned
from attnlab.types import PRNGKey

COUNT = 10_000
SCALE = COUNT / np.log(COUNT)
"""n and n beta."""
BARS = "four standard errors, of the chains alone: the reference is that of the same n and gamma"


def _sampled(risk: Objective, params: Array, key: PRNGKey, **options: Any) -> LearningCoefficient:
    """Without warnings: some of the claims are about what they warn of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LearningCoefficientWarning)
        return learning_coefficient(risk, params, key, **options)


def _linear(weights: Array, inputs: Array) -> Array:
    return inputs @ weights


def _regression(key: PRNGKey, count: int, width: int, noise: float) -> tuple[Objective, Array, Array]:
    """Regression on Gaussian inputs: the risk, the weights of least squares, and the true ones."""
    keys = jax.random.split(key, 3)
    inputs, truth = jax.random.normal(keys[0], (count, width)), jax.random.normal(keys[1], (width,))
    targets = inputs @ truth + noise * jax.random.normal(keys[2], (count,))
    return objective(Partial(_linear), square_loss, inputs, targets), jnp.linalg.lstsq(inputs, targets)[0], truth


@claim(
    statement=r"\hat\lambda = \tfrac12 \sum_i \frac{n \beta h_i}{n \beta h_i + \gamma} \to d / 2 \text{ at a regular minimum, with noise and without; "
    r"coordinates of which nothing depends add nothing}",
    source="Lau et al., arXiv 2308.12108; at finite gamma derived here",
    tolerance=4.0,
    because=BARS,
    slow=True,
)
def a_regular_minimum_has_half_its_dimension(key: PRNGKey) -> list[Expectation]:
    """Regression in five dimensions, exact targets and noisy ones, turned among seven more that do nothing."""
    found = []
    for name, noise in (("exact targets", 0.0), ("noisy targets", 1.0)):
        risk, best, _ = _regression(key, 1000, 5, noise)
        risk, best = turned(key, risk, best, padding=7)
        sampled = _sampled(risk, best, key)
        quadratic = laplace(risk, best, 1000 / np.log(1000))
        error = sampled.summary.sampling
        found.append(equal(f"{name}: sampled", sampled.value, quadratic.coefficient, standard_error=error))
        off = abs(2 * sampled.value - 5)
        found.append(at_most(f"{name}: parameters that count, off by", off, 0.0, 0.5, because="gamma, and chance"))
    return found


@claim(
    statement=r"K = \prod_i w_i^{2 k_i}: \quad \lambda = \min_i \tfrac{1}{2 k_i},\quad n\beta\, E[K] = \lambda - \frac{m - 1}{\log n\beta} + O(\log^{-2})",
    source="Watanabe 2009, theorem 6.6; the correction by quadrature here",
    tolerance=0.005,
    because="the next order in 1 / log at n beta = 1e12; without the correction it is off by 0.04 and more",
)
def normal_crossings_show_their_multiplicity(key: PRNGKey) -> list[Expectation]:
    """Quadrature at n beta = 1e12 under a Gaussian of random width, for two coordinates of equal and unequal powers."""
    gamma = float(jnp.exp(jax.random.uniform(key, minval=-1.0, maxval=1.0)))
    cases = [(1,), (2,), (1, 1), (1, 2), (1, 3)]
    energies = np.array([crossing_energy(case, 1e12, gamma) for case in cases])
    laws = [normal_crossing(case).at(np.log(1e12)) for case in cases]
    limits = np.array([normal_crossing(case).value for case in cases])
    return [
        equal("n beta E[K], by powers", energies, laws),
        at_least("two equal powers: off without the correction", limits[2] - energies[2], 0.03),
    ]


@claim(
    statement=r"\lambda \text{ of } W_L \cdots W_1 \text{ by Aoyagi's formula; two layers by that of Aoyagi and Watanabe}",
    source="Aoyagi, Watanabe 2005; Aoyagi 2024, Neural Networks 172, 106132; the quadrature derived here",
    tolerance=0.008,
    because="the next order in 1 / log at n beta = 1e12, where the multiplicity is 2; elsewhere below 1e-4",
)
def matrix_products_have_the_coefficients_of_aoyagi(key: PRNGKey) -> list[Expectation]:
    """Eight pairs of random widths with a hidden one of 1 or 2: both formulas, and the integral over singular values."""
    widths = np.asarray(jax.random.randint(key, (8, 2), 1, 6))
    hidden = np.asarray(jax.random.randint(jax.random.fold_in(key, 1), (8,), 1, 3))
    shapes = [(int(m), int(n), int(h)) for (m, n), h in zip(widths, hidden, strict=True)]
    energies = [two_layer_energy(*shape, 1e12) for shape in shapes]
    laws = [reduced_rank(*shape, 0).at(np.log(1e12)) for shape in shapes]
    deep = [deep_linear((m, h, n), 0).at(np.log(1e12)) for m, n, h in shapes]
    ranks = [(5, 4, 3, r) for r in range(4)]
    formulas = [reduced_rank(m, n, h, r).value - deep_linear((m, h, n), r).value for m, n, h, r in ranks]
    return [
        equal("n beta E[K] against Aoyagi, Watanabe", energies, laws),
        equal("against Aoyagi's of any depth", energies, deep),
        equal("one formula and the other, ranks 0 to 3", formulas, 0.0, 1e-12, because="both are exact"),
    ]


@claim(
    statement=r"\hat\lambda \text{ is right where the Hessian says nothing: it vanishes at the origin of } W_2 W_1 \text{ and of } w_1 w_2^2",
    source="Lau et al., arXiv 2308.12108; the values at finite n by quadrature here",
    tolerance=4.0,
    because=BARS,
    slow=True,
)
def sampling_sees_what_the_hessian_does_not(key: PRNGKey) -> list[Expectation]:
    """HMC on two products of matrices and one of powers, turned and padded, against quadrature at the same n and gamma."""
    cases = {
        "2 x 2 x 2": (deep_linear_risk((2, 2, 2)), two_layer_energy(2, 2, 2, SCALE / 4)),
        "3 x 1 x 2": (deep_linear_risk((3, 1, 2)), two_layer_energy(3, 2, 1, SCALE / 6)),
        "powers 1, 2": (crossing_risk((1, 2)), crossing_energy((1, 2), SCALE)),
    }
    found, curvatures = [], []
    for name, ((risk, params), energy) in cases.items():
        risk, moved = turned(key, risk, params, padding=2)
        sampled = _sampled(risk, moved, key, count=COUNT, steps=4096)
        found.append(equal(name, sampled.value, energy, standard_error=sampled.error))
        curvatures.append(_bent(risk, moved))
    return [*found, equal("largest |eigenvalue| of the Hessian", curvatures, 0.0, 1e-10, because="rounding")]


def _bent(risk: Objective, params: Array) -> float:
    return float(jnp.max(jnp.abs(laplace(risk, params, SCALE).eigenvalues)))


@claim(
    statement=r"\lambda = \tfrac12 \operatorname{rank} H \text{ where the minima are a manifold (Morse-Bott): } W_2 W_1 = T \text{ of full inner rank}",
    source="Laplace's method; Aoyagi, Watanabe 2005",
    because="the rank is counted at 1e-8 of the largest eigenvalue; sampling errs by its bar and by gamma",
    slow=True,
)
def a_manifold_of_minima_has_half_its_codimension(key: PRNGKey) -> list[Expectation]:
    """Products (3, 2, 3) with a truth of rank 2, 1 and 0: of rank 2 the Hessian tells all, of rank 0 nothing."""
    ranks, exact = [], []
    for rank in (2, 1, 0):
        risk, params = deep_linear_risk((3, 2, 3), rank)
        ranks.append(float(laplace(risk, params, SCALE).rank) / 2 if rank else 0.0)
        exact.append(reduced_rank(3, 3, 2, rank).value)
    risk, params = deep_linear_risk((3, 2, 3), 2)
    sampled = learning_coefficient(risk, params, key, count=10**6, localization=0.1)
    error = np.hypot(sampled.error, abs(sampled.drift))
    return [
        equal("half the rank, truth of rank 2", ranks[0], exact[0], 1e-12),
        at_least("lambda less half the rank, truth of rank 1 and 0", np.subtract(exact, ranks)[1:], 0.4),
        equal("sampled, truth of rank 2", sampled.value, exact[0], 4.0, standard_error=error),
    ]


@claim(
    statement=r"\hat\lambda - \lambda = -\tfrac{\beta}{2} \chi^2_d \text{ at the truth in place of the minimiser; }"
    r" \tfrac{n\beta}{2} |\langle \nabla L(w^*), E[w] - w^* \rangle| \text{ is as large}",
    source="derived here",
    because="both are exact for a quadratic risk, and the chains estimate E[w] and the loss",
    slow=True,
)
def the_baseline_shares_its_data_with_the_chain(key: PRNGKey) -> list[Expectation]:
    """Regression in eight dimensions on 400 noisy examples, at the truth and at least squares."""
    risk, best, truth = _regression(key, 400, 8, 1.0)
    gap = 400 / np.log(400) * float(risk(truth) - risk(best))
    at_truth = _sampled(risk, truth, key, steps=8192)
    at_best = _sampled(risk, best, key, steps=8192)
    error = np.hypot(at_truth.summary.sampling, at_best.summary.sampling)
    alone = 400 / np.log(400) * float(jnp.std((risk.outputs(best) - risk.targets) ** 2)) / 400**0.5
    return [
        equal("value lost at the truth", at_best.value - at_truth.value, gap, 4.0, standard_error=error),
        equal("the bound over it", at_truth.summary.baseline / gap, 1.0, 0.25, unit="relative"),
        at_most("the bound at the minimiser", at_best.summary.baseline, 1e-6),
        at_least("error of L(w*) alone over that of pairs", alone / float(at_best.summary.data), 5.0),
    ]


@claim(
    statement=r"E\langle w - w^*, \nabla U \rangle = d + \tfrac{\epsilon^2}{4} E \|\nabla U\|^2 \text{ for unadjusted Langevin steps } \epsilon:"
    r" \text{ taken off, the step's error is none on quadratics}",
    source="derived here, from stationarity of the squared distance",
    because=BARS,
    slow=True,
)
def the_error_of_a_finite_step_is_known(key: PRNGKey) -> list[Expectation]:
    """Langevin chains on w_1^2 + w_2^2 with steps of e^2 h = 1, which raise the loss by 1 / (1 - 1/4)."""
    risk = objective(Partial(_linear), square_loss, jnp.eye(2), jnp.zeros(2))
    scale = COUNT / np.log(COUNT)
    step = float((scale + 1) ** -0.5)
    found = _sampled(risk, jnp.zeros(2), key, count=COUNT, sampler="sgld", step=step, steps=8192)
    raw = found.value + float(found.summary.discretisation)
    expected = scale / (scale + 1)
    error = found.summary.sampling
    return [
        equal("value", found.value, expected, 4.0, standard_error=error),
        equal("before it is taken off", raw, expected / 0.75, 4.0, standard_error=error / 0.75),
    ]
