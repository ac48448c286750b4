"""Claims about the best risk of linear attention by depth, and the algorithms that attain it."""

from math import comb

import jax
import jax.numpy as jnp
import numpy as np
import scipy.integrate
import scipy.optimize
from jaxtyping import Array

from attnlab.claims.icl_risk import SAMPLED, STANDARD_ERRORS, means_against
from attnlab.claims.icl_spectrum import wishart_density
from attnlab.claims.registry import claim
from attnlab.expectation import Expectation, equal
from attnlab.icl.constructions import gradient_descent_stack
from attnlab.icl.depth import (
    depth_risk,
    depth_step_sizes,
    gauss_rule,
    looped_risk,
    marchenko_pastur_moments,
    plus_plus_risk,
    wishart_moments,
)
from attnlab.icl.models import stack_predict
from attnlab.icl.tasks import isotropic, sample_prompts
from attnlab.types import PRNGKey


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
