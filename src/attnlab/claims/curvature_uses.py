"""Claims about what curvature is used for: influence of training examples, Laplace's method.

Leaving out is done by fitting again, evidence by conditioning Gaussians and by quadrature: independent of what is tested.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.integrate
import scipy.stats
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from attnlab.claims.instances import ROUNDING
from attnlab.claims.registry import claim
from attnlab.curvature import ggn, hessian
from attnlab.curvature.influence import influence
from attnlab.curvature.kronecker import kronecker_approximation
from attnlab.curvature.laplace import laplace_evidence, laplace_variance
from attnlab.expectation import Expectation, at_least, at_most, equal
from attnlab.losses import cross_entropy, square_loss
from attnlab.objectives import Objective, objective
from attnlab.risks.networks import clusters
from attnlab.training import train
from attnlab.types import Params, PRNGKey

RIDGE = 0.05
EXAMPLES = 48
LITTLE = 0.001
"""Of an example's weight, for the derivative."""


def fitted(risk: Objective, start: Params, weights: Float[Array, " N"], steps: int) -> Params:
    """The minimum of the weighted risk plus the ridge near `start`, by Newton's method, downhill in every direction."""
    flat, unravel = ravel_pytree(start)

    def regularised(flat: Array) -> Array:
        weighted = objective(risk.predict, cross_entropy, risk.inputs, risk.targets, weights=weights)
        return weighted(unravel(flat)) + RIDGE * jnp.vdot(flat, flat) / 2

    def newton(flat: Array, _: None) -> tuple[Array, None]:
        values, basis = jnp.linalg.eigh(jax.hessian(regularised)(flat))
        slopes = basis.T @ jax.grad(regularised)(flat)
        return flat - basis @ (slopes / jnp.maximum(jnp.abs(values), RIDGE / 2)), None

    return unravel(jax.lax.scan(newton, flat, None, length=steps)[0])


def left_out(key: PRNGKey, hidden: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Predicted changes of a test loss; those by fitting again without each example, and with a little less of it, as a
    rate; and how far EKFAC changes the predictions."""
    risk, start = clusters(key, 3, count=2 * EXAMPLES, width=3, hidden=hidden, spread=1.5)
    test, risk = risk.on(lambda leaf: leaf[EXAMPLES:]), risk.on(lambda leaf: leaf[:EXAMPLES])
    ridge = optax.chain(optax.add_decayed_weights(RIDGE), optax.adam(0.02))
    near = train(risk, start, ridge, key, steps=2000, every=2000).params
    refit = jax.jit(lambda weights, near: fitted(risk, near, weights, 60))
    params = refit(jnp.ones(EXAMPLES), near)
    weights = 1 - jnp.concatenate([jnp.eye(EXAMPLES), LITTLE * jnp.eye(EXAMPLES)])
    after = jax.jit(lambda weights: jax.lax.map(lambda each: test(fitted(risk, params, each, 60)), weights))(weights)
    out, down = np.asarray(after - test(params)).reshape(2, EXAMPLES)
    operator, approximation = ggn(risk, params), kronecker_approximation("ekfac", risk, params)
    exact = influence(risk, params, test, hessian(risk, params), damping=RIDGE, tolerance=1e-8)
    plain = influence(risk, params, test, operator, damping=RIDGE, tolerance=1e-8)
    near_one = influence(risk, params, test, operator, damping=RIDGE, preconditioner=approximation, tolerance=1e-8)
    gap = jnp.max(jnp.abs(plain.changes - near_one.changes)) / jnp.max(jnp.abs(plain.changes))
    return np.asarray(exact.changes), out, down / LITTLE, float(gap)


@claim(
    statement=r"L_{test}(w_{-i}) - L_{test}(w) \approx \frac{s_i}{1 - s_i} \nabla L_{test}^T (H + \lambda)^{-1} (\nabla l_i - \nabla L)",
    source="Koh, Liang, arXiv 1703.04730, section 2",
    slow=True,
)
def influence_predicts_leaving_out(key: PRNGKey) -> list[Expectation]:
    """Influence on a test loss against every example left out and the others fitted again: logistic, and two layers.

    In ranks and medians: of two layers, a few examples in some draws send the fit to another minimum when they go, which
    no derivative sees; the linear correlation then falls to anything.
    """
    found = []
    for name, hidden in {"logistic": (), "two layers": (4,)}.items():
        predicted, refitted, rate, gap = left_out(key, hidden)
        correlation = scipy.stats.spearmanr(predicted, refitted).statistic
        slope = (1 - 1 / EXAMPLES) * predicted  # per weight, where the mean still has all of the others
        derivative = np.median(np.abs(slope - rate)) / np.median(np.abs(rate))
        shuffled = scipy.stats.spearmanr(np.roll(predicted, 5), refitted).statistic
        small = "a thousandth of the weight is lost, near minima that may be flat"
        first_order = "one of 48 examples is not infinitely little"
        found += [
            at_least(f"{name}: rank correlation with refitting", correlation, 0.8, because=first_order),
            at_most(f"{name}: median error where an example loses a thousandth", derivative, 0, 0.02, because=small),
            at_most(f"{name}, control: the same of other examples", abs(shuffled), 0.6, because="48 unrelated pairs"),
            at_most(
                f"{name}: relative change of predictions by EKFAC as a preconditioner",
                gap,
                0,
                1e-5,
                because="to the tolerance of both systems",
            ),
        ]
    return found


def gaussian(key: PRNGKey, count: int, width: int) -> tuple[Float[Array, "n d"], Float[Array, " n"]]:
    """Unit Gaussian inputs, and targets of a random line with noise."""
    keys = jax.random.split(key, 3)
    inputs = jax.random.normal(keys[0], (count, width))
    return inputs, inputs @ jax.random.normal(keys[1], (width,)) + jax.random.normal(keys[2], (count,))


def line(params: Params, inputs: Array) -> Array:
    """A linear model."""
    return inputs @ params


def log_odds(params: Params, inputs: Array) -> Array:
    """Two classes by one logit."""
    return jnp.stack([inputs @ params, jnp.zeros(inputs.shape[0])], axis=-1)


def error_for_classes(key: PRNGKey, count: int) -> float:
    """Laplace's log evidence of two classes in one weight, less that by quadrature."""
    inputs, _ = gaussian(key, count, 1)
    labels = jax.random.bernoulli(jax.random.fold_in(key, 1), jax.nn.sigmoid(-inputs[:, 0])).astype(int)
    risk = objective(log_odds, cross_entropy, inputs, labels)
    log_joint = jax.jit(lambda w: -count * risk(w[None]) - w**2 / 2 - jnp.log(2 * jnp.pi) / 2)
    mode = jnp.zeros(())
    for _ in range(30):
        mode = mode - jax.grad(log_joint)(mode) / jax.hessian(log_joint)(mode)
    top = float(log_joint(mode))
    area, _ = scipy.integrate.quad(lambda w: float(jnp.exp(log_joint(jnp.asarray(w)) - top)), -12, 12, points=[mode])
    return float(laplace_evidence(risk, mode[None], prior_precision=1.0).value) - top - float(np.log(area))


@claim(
    statement=r"\log N(y; 0, \sigma^2 I + X X^T / \alpha) = \text{Laplace's evidence of a linear model}",
    source="MacKay 1992; Immer et al., arXiv 2104.04975, section 2",
    slow=True,
)
def laplace_is_exact_for_linear_gaussian_models(key: PRNGKey) -> list[Expectation]:
    """Evidence and predictive variance against Gaussian conditioning; and against quadrature where it is not exact."""
    alpha, variance, (inputs, targets) = 0.5, 0.3, gaussian(key, 12, 4)
    elsewhere, _ = gaussian(jax.random.fold_in(key, 7), 5, 4)
    covariance = np.linalg.inv(np.asarray(inputs.T @ inputs) / variance + alpha * np.eye(4))
    mode = jnp.asarray(covariance @ np.asarray(inputs.T @ targets) / variance)
    risk = objective(line, square_loss, inputs, targets)
    options = {"prior_precision": alpha, "noise_variance": variance}
    evidence = laplace_evidence(risk, mode, **options).value  # type: ignore[arg-type]
    marginal = variance * np.eye(12) + np.asarray(inputs @ inputs.T) / alpha
    exact = scipy.stats.multivariate_normal(cov=marginal).logpdf(np.asarray(targets))
    wrong = [
        float(laplace_evidence(risk, mode, prior_precision=alpha * factor, noise_variance=variance).value)
        for factor in (0.25, 2.0)
    ]
    spread = laplace_variance(risk, mode, elsewhere, **options).value
    wanted = np.einsum("ni,ij,nj->n", elsewhere, covariance, elsewhere)
    errors = [
        np.mean([abs(error_for_classes(each, count)) for each in jax.random.split(key, draws)])
        for count, draws in ((8, 8), (1024, 1))
    ]
    return [
        equal("log evidence", evidence, exact, 1e-9, because=ROUNDING),
        equal("variance of predictions", spread, wanted, 1e-9, unit="relative", because=ROUNDING),
        at_least("control: log evidence of another prior, off by", max(abs(each - exact) for each in wrong), 1e-2,
                 because="factors of a quarter and of two, of which one may leave it as it is"),
        at_most("two classes, 1,024 examples: log evidence less quadrature's", errors[1], 0.01,
                because="of order 1 / examples", source="derived here"),
        at_most("two classes: that error over the mean of 8 draws of 8 examples", errors[1] / errors[0], 0.3,
                because="of order 1 / examples", source="derived here"),
    ]  # fmt: skip
