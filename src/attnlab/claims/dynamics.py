"""Claims about training dynamics: thresholds of stability, the edge, the central flow, and identities of the probes."""

from functools import partial

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from attnlab.claims.registry import claim
from attnlab.curvature import ggn
from attnlab.dynamics.flows import central_flow, gradient_flow, smoothed
from attnlab.dynamics.kernel import empirical_ntk
from attnlab.dynamics.rules import update_rule
from attnlab.dynamics.sharpness import stability, top_eigenvalues
from attnlab.dynamics.tokens import attention_calls, entropy, entropy_bound
from attnlab.expectation import Expectation, at_least, at_most, equal
from attnlab.losses import square_loss
from attnlab.models.adapters import from_linen
from attnlab.models.attention import AttentionConfig, SelfAttention
from attnlab.objectives import Objective, objective
from attnlab.risks.digits import digits_attention, easy_regression
from attnlab.training import probe, train
from attnlab.trees import ravel
from attnlab.types import Params, PRNGKey

EDGE = "Cohen, Kaur, Li, Kolter, Talwalkar, arXiv 2103.00065"


def settled_ratio(risk: Objective, params: Params, name: str, rate: float, steps: int, key: PRNGKey) -> float:
    """Mean of sharpness over threshold in the second half of a run."""
    ratio, _ = _edge_run(risk, params, name, rate, steps, key)
    return float(ratio[len(ratio) // 2 :].mean())


def _edge_run(
    risk: Objective, params: Params, name: str, rate: float, steps: int, key: PRNGKey
) -> tuple[np.ndarray, Params]:
    """Sharpness over threshold every 50 steps of a run, and where it ends."""
    optimizer = update_rule(name, rate)
    probes = {"edge": stability(optimizer)}
    run = train(risk, params, optimizer.transformation, key, steps=steps, every=50, probes=probes)
    return np.asarray(run.records.values["edge"]["ratio"]), run.params


@claim(
    statement=r"\lambda_1(H) \to 2 / \eta \text{ under gradient descent on digits}",
    source=f"{EDGE}, section 3",
    tolerance=0.06,
    because="the sharpness oscillates above the edge; its mean lies 0 to 5 % over it, the more the larger the rate",
    slow=True,
)
def gradient_descent_settles_at_the_edge(key: PRNGKey) -> Expectation:
    """Mean of sharpness over 2 / eta in the second half of 2,500 steps at rate 0.1."""
    return equal(
        "mean of sharpness over 2 / eta",
        settled_ratio(*digits_attention(key, key), "gd", 0.1, 2500, key),
        1.0,
        unit="relative",
    )


@claim(
    statement=r"\lambda_1(H) < 2 / \eta \text{ where the loss is fitted before the edge is reached}",
    source="derived here: the negative control of the edge of stability",
    because="over seeds 0 to 9 the mean ratio was 0.32 to 0.59",
    slow=True,
)
def an_easy_regression_stays_below_the_edge(key: PRNGKey) -> list[Expectation]:
    """The same measurement on a regression with an attention teacher, at the same rate, 0.1; and the last ratio over
    that of the largest eigenvalue of the dense Hessian at the end."""
    risk, params = easy_regression(key)
    records, end = _edge_run(risk, params, "gd", 0.1, 2000, key)
    flat, unravel = jax.flatten_util.ravel_pytree(end)
    dense = jax.jit(jax.hessian(lambda vector: risk(unravel(vector))))(flat)
    relative = records[-1] / (0.1 / 2 * np.linalg.eigvalsh(dense)[-1])
    control = "the tracked sharpness is the largest eigenvalue by autodiff, up to what the tracking leaves"
    return [
        at_most("mean of sharpness over 2 / eta", records[len(records) // 2 :].mean(), 0.95),
        equal("last sharpness over the dense Hessian's", relative, 1.0, 0.01, because=control),
    ]


@claim(
    statement=r"\lambda_1(H) = 2/\eta \text{ along the central flow while its oscillation is active}",
    source="Cohen, Damian, Talwalkar, Kolter, Lee, arXiv 2410.24206, section 3",
    tolerance=1e-4,
    because="the complementarity problem is solved to 1e-9, and each Euler substep is corrected by the next",
    slow=True,
)
def central_flow_holds_the_edge(key: PRNGKey) -> Expectation:
    """A quartic with progressive sharpening, a^2 (1 + b^2) / 2 - slope b, from a random start below the edge 4."""
    slope = 0.05 + 0.1 * jax.random.uniform(key)
    risk = objective(_sharpening_outputs, _total, slope[None], jnp.zeros(1))
    flow = central_flow(risk, jnp.array([0.0, 1.65]), update_rule("gd", 0.5), key, steps=40, count=1, substeps=8)
    settled = flow.params[-1, 1], flow.sharpness[-1, 0], flow.variance[-1, 0]
    # at the edge 1 + b^2 = 4, and b stands still where the oscillation's pull s b equals the slope
    return equal(
        "place, sharpness and variance of the flow at the edge",
        np.array(settled),
        np.array([3**0.5, 4.0, float(slope) / 3**0.5]),
        unit="relative",
    )


def _sharpening_outputs(point: jax.Array, slope: jax.Array) -> jax.Array:
    return jnp.stack([point[0] ** 2 * (1 + point[1] ** 2) / 2, -slope[0] * point[1]])


def _total(outputs: jax.Array, _: jax.Array) -> jax.Array:
    return jnp.sum(outputs)


FLOW_RATE, FLOW_STEPS, FLOW_EVERY = 0.05, 400, 10
DESCENT, ITERATES = optax.sgd(FLOW_RATE), {"point": probe(lambda risk, params: params)}


@claim(
    statement=r"\|w_{\mathrm{GD}} - w_{\mathrm{gradient\ flow}}\| \ge 5\, \|w_{\mathrm{GD}} - w_{\mathrm{central\ flow}}\|"
    r" \text{ beyond the edge},\quad \le 2.5\, \|w_{\mathrm{GD}} - w_{\mathrm{central\ flow}}\| \text{ below it}",
    source="Cohen, Damian, Talwalkar, Kolter, Lee, arXiv 2410.24206, section 3",
    because="bounds: 6.6 to 59 by the start, and from 1.3 on where the comparison begins 300 steps behind the edge; below the edge, the negative control, the two flows are one, and Euler steps of "
    "half of descent's, which the central flow is computed with, leave half the distance: 1.0 to 1.8",
    slow=True,
)
def descent_stays_with_its_central_flow(key: PRNGKey) -> list[Expectation]:
    """Attention on 16 digits at rate 0.05: mean distances of smoothed descent over steps 200 to 400 from a point 500
    steps behind the first that is at the edge, and over steps 50 to 100 of training, where the sharpness is 0.1 to 0.8 of
    the edge."""
    risk, params = digits_attention(key, key, 16)
    followed = train(risk, params, DESCENT, key, steps=2000, every=100, probes={"top": top_eigenvalues()}).records
    at_edge = np.asarray(followed.values["top"]["values"])[:, -1] >= 2 / FLOW_RATE
    start = 100 * int(np.argmax(at_edge)) + 500
    path = smoothed(train(risk, params, DESCENT, key, steps=2904, probes=ITERATES).records.values["point"])
    beyond, below = _flow_distances(risk, path, start, key)[20:], _flow_distances(risk, path, 0, key)[5:11]
    ratios = [means[1] / means[0] for means in (beyond.mean(axis=0), below.mean(axis=0))]
    return [
        at_least("measurements within 2000 steps at which the sharpness is at the edge", at_edge.sum(), 1),
        at_least("distance to gradient flow over that to the central flow: beyond the edge", ratios[0], 5.0),
        at_most("the same below the edge", ratios[1], 2.5),
    ]


def _flow_distances(risk: Objective, path: Params, start: int, key: PRNGKey) -> Float[np.ndarray, "r 2"]:
    """Of a path from `start` on: how far it is from the central flow, and from gradient flow."""
    point = jax.tree.map(lambda w: w[start], path)
    times = FLOW_RATE * jnp.arange(0.0, FLOW_STEPS + 1, FLOW_EVERY)
    options = {"steps": FLOW_STEPS, "every": FLOW_EVERY, "count": 2, "substeps": 2}
    central = central_flow(risk, point, update_rule("gd", FLOW_RATE), key, **options).params
    flows = central, gradient_flow(risk, point, times, tolerance=1e-6)
    compared = jax.tree.map(lambda w: w[start : start + FLOW_STEPS + 1 : FLOW_EVERY], path)
    flat = jax.vmap(ravel)(compared)
    return np.stack([np.linalg.norm(flat - jax.vmap(ravel)(flow), axis=1) for flow in flows], axis=1)


@claim(
    statement=r"H(A_i) \ge \log(1 + (T-1)\beta) + \sigma\sqrt{T(T-1)}\,\beta / (1 + (T-1)\beta),\ "
    r"\beta = e^{-\sigma\sqrt{T/(T-1)}},\ \sigma = \tau \|W_K W_Q^\top\| \|X\|^2",
    source="Zhai et al., arXiv 2303.06296, theorem 3.1",
    because="an inequality: only rounding may go beyond it. The control is a layer that attains the bound: there a bound "
    "any higher or lower fails",
    slow=True,
)
def attention_entropy_is_above_its_spectral_bound(key: PRNGKey) -> list[Expectation]:
    """Every row of every head of a random layer, at several scales of the tokens; and the attaining rows."""
    module = SelfAttention(AttentionConfig(key_dim=3, value_dim=3, heads=2, causal=True))
    bounds, found = [], []
    for scale in (0.1, 1.0, 5.0):
        tokens = scale * jax.random.normal(key, (4, 6, 5))
        params = module.init(key, tokens)["params"]
        (call,) = attention_calls(from_linen(module), params, tokens).values()
        bounds.append(entropy_bound(call))
        found.append(entropy(call.attention))
    basis = jnp.linalg.qr(jax.random.normal(key, (4, 4)))[0]
    lowest, attained = (jnp.stack(part) for part in zip(*(_attaining_row(basis, n) for n in (2, 5)), strict=True))
    bound, entropies = (jnp.concatenate([part.ravel() for part in parts]) for parts in (bounds, found))
    return [
        at_least("entropy of every row", entropies, bound, 1e-12),
        at_most("entropy of the rows that attain the bound", attained, lowest, 1e-12),
    ]


@claim(
    statement=r"\mathrm{Ent}(A_1) = \mathrm{Ent}_{\min}(\sigma \|X\|^2) \text{ for } X = \rho\,(l u^\top + r v^\top),"
    r"\quad W_K W_Q^\top x_1 = \sigma \rho\, u",
    source="derived here: a layer that attains the bound of Zhai et al., arXiv 2303.06296, theorem 3.1",
    tolerance=1e-10,
    because="an equality: rounding",
)
def a_layer_attains_the_spectral_bound_of_its_entropy(key: PRNGKey) -> Expectation:
    """The entropy of the first row, for 2 and 5 tokens in random directions u, v."""
    basis = jnp.linalg.qr(jax.random.normal(key, (4, 4)))[0]
    bounds, found = zip(*(_attaining_row(basis, count) for count in (2, 5)), strict=True)
    return equal("entropy of the first row, of 2 and 5 tokens", jnp.stack(found), jnp.stack(bounds), unit="relative")


@partial(jax.jit, static_argnames="count")
def _attaining_row(basis: Float[Array, "4 4"], count: int) -> tuple[Array, Array]:
    """Bound and entropy of the first row, rho = 1.2. l has the shape of the scores of least entropy, and r is the unit
    vector nearest to e_1 that is orthogonal to l: both singular values of X are rho, and so is |x_1|, l_1^2 + r_1^2 = 1.
    """
    module = SelfAttention(AttentionConfig(key_dim=4, value_dim=1, scale=1.0))
    first, other = ((count - 1) / count) ** 0.5, count**-0.5
    shape = jnp.full(count, -other / (count - 1) ** 0.5).at[0].set(first)
    rest = (jnp.eye(count)[0] - first * shape) / other
    tokens = 1.2 * jnp.stack([shape, rest], axis=1) @ basis[:2]
    # a rotation, sigma = 1, that takes x_1 / rho to u = basis[0]: the scores are rho^2 l
    turn = jnp.eye(4).at[:2, :2].set(jnp.array([[first, other], [-other, first]]))
    params = {"query": basis.T @ turn.T @ basis, "key": jnp.eye(4), "value": jnp.ones((4, 1))}
    (call,) = attention_calls(from_linen(module), params, tokens).values()
    return entropy_bound(call)[0, 0], entropy(call.attention)[0, 0]


@claim(
    statement=r"\lambda_1(\mathrm{GGN}) = \tfrac{2}{m} \lambda_1(J J^\top) \text{ for the square loss over } m \text{ entries}",
    source="Jacot, Gabriel, Hongler, arXiv 1806.07572",
    tolerance=1e-10,
    because="J^T J and J J^T share their nonzero eigenvalues: rounding",
    slow=True,
)
def tangent_kernel_and_gauss_newton_share_their_spectrum(key: PRNGKey) -> Expectation:
    """The five highest eigenvalues of both, on a random layer."""
    module = SelfAttention(AttentionConfig(key_dim=3, value_dim=3))
    tokens, targets = jax.random.normal(key, (4, 6, 5)), jax.random.normal(key, (4, 6, 3))
    risk, params = objective(from_linen(module), square_loss, tokens, targets), module.init(key, tokens)["params"]
    kernel = jnp.linalg.eigvalsh(empirical_ntk(risk, params))[-5:]
    return equal(
        "five highest eigenvalues of the Gauss-Newton matrix",
        jnp.linalg.eigvalsh(ggn(risk, params).dense())[-5:],
        2 / targets.size * kernel,
        unit="relative",
    )
