"""Claims about mechanisms of attention that compete through a softmax gate: what a gate answers to, and who wins."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
from jaxtyping import Array, Float

from attnlab.claims.instances import ROUNDING
from attnlab.claims.registry import claim
from attnlab.expectation import Expectation, at_least, at_most, equal
from attnlab.memory.scaling import fit_power_law
from attnlab.models.adapters import from_function
from attnlab.models.heads import attend, attention_scores, linear_weights, softmax_weights
from attnlab.objectives import objective
from attnlab.training import probe, train
from attnlab.types import PRNGKey, Scalar

JACOBS = "Jacobs, Jordan, Nowlan, Hinton 1991 (adaptive mixtures of local experts)"


def mechanisms(tokens: Float[Array, "B L D"], params: Float[Array, "3 D D"]) -> Float[Array, "M B D"]:
    """What the last token reads: by softmax attention, by linear attention, by the mean of all tokens."""
    query, key, value = params
    asked = tokens[:, -1:] @ query
    scores = attention_scores(asked, tokens @ key, 1.0)
    even = jnp.full_like(scores, 1 / tokens.shape[1])
    weights = (softmax_weights(scores), linear_weights(scores) / tokens.shape[1], even)
    return jnp.stack([attend(each, tokens @ value)[:, 0] for each in weights])


def mixture(logits: Float[Array, "*B M"], outputs: Float[Array, "M B D"]) -> Float[Array, "B D"]:
    """f = sum_m g_m A_m, g = softmax(logits), a gate for each example or one for all."""
    gates = jnp.broadcast_to(jax.nn.softmax(logits), (outputs.shape[1], len(outputs)))
    return jnp.einsum("bm,mbd->bd", gates, outputs)


def expert_likelihood(logits: Float[Array, "*B M"], outputs: Array, targets: Float[Array, "B D"]) -> Float[Array, " B"]:
    """-log sum_m g_m exp(-|y - A_m|^2 / 2): the loss of a mixture of experts with unit noise."""
    gates = jax.nn.log_softmax(logits)
    return -jax.nn.logsumexp(gates - jnp.sum((targets[None] - outputs) ** 2, axis=-1).T / 2, axis=-1)


def posterior(logits: Float[Array, "*B M"], outputs: Array, targets: Array) -> Float[Array, "B M"]:
    """r_m = g_m p_m / sum: which mechanism is responsible for a target, by Bayes' rule with unit noise."""
    likelihoods = jnp.exp(-jnp.sum((targets[None] - outputs) ** 2, axis=-1) / 2).T
    joint = jax.nn.softmax(logits) * likelihoods
    return joint / jnp.sum(joint, axis=-1, keepdims=True)


def _instance(key: PRNGKey, count: int, scale: float = 0.6) -> tuple[Array, Array, PRNGKey]:
    """Tokens (count, 6, 4), outputs of the three mechanisms with random weights, and a key."""
    token_key, param_key, key = jax.random.split(key, 3)
    tokens = jax.random.normal(token_key, (count, 6, 4))
    return tokens, mechanisms(tokens, scale * jax.random.normal(param_key, (3, 4, 4))), key


@claim(
    statement=r"f = \textstyle\sum_m g_m A_m,\ g = \mathrm{softmax}(l): \ \frac{\partial L}{\partial l_m} = g_m \langle \nabla_f L, A_m - f \rangle;"
    r"\quad L = -\log \textstyle\sum_m g_m p_m: \ \frac{\partial L}{\partial l} = g - r,\ \nabla^2_l L = \mathrm{Cov}_g - \mathrm{Cov}_r",
    source="derived here; prior less posterior: " + JACOBS,
    tolerance=1e-12,
    because=ROUNDING,
    slow=True,
)
def gates_answer_to_what_a_mechanism_adds(key: PRNGKey) -> list[Expectation]:
    """Softmax attention, linear attention and the mean on eight sequences, random gates for each, by autodiff: a loss that
    is not square, and the likelihood with its Hessian. Gates of their own (sigmoids), which do not compete, answer to A_m
    itself."""
    _, outputs, key = _instance(key, 8)
    logit_key, target_key = jax.random.split(key)
    logits, targets = jax.random.normal(logit_key, (8, 3)), jax.random.normal(target_key, (8, 4))

    def loss(f: Array) -> Scalar:
        return jnp.sum(jnp.log(jnp.cosh(f - targets)))

    def identity(gates: Array) -> Array:
        f = jnp.einsum("bm,mbd->bd", gates, outputs)
        return gates * jnp.einsum("bd,mbd->bm", jax.grad(loss)(f), outputs - f[None])

    found = jax.grad(lambda l: loss(mixture(l, outputs)))(logits)
    gates, shares = jax.nn.softmax(logits), posterior(logits, outputs, targets)
    total = lambda l: jnp.sum(expert_likelihood(l, outputs, targets))  # noqa: E731
    curvature = jnp.einsum("bmbn->bmn", jax.hessian(total)(logits))
    free = jax.nn.sigmoid(logits)
    apart = jax.grad(lambda l: loss(jnp.einsum("bm,mbd->bd", jax.nn.sigmoid(l), outputs)))(logits) - identity(free)
    return [
        equal("gradient of the mixture's loss in the logits", found, identity(gates), unit="relative"),
        equal("gradient of the likelihood", jax.grad(total)(logits), gates - shares, unit="relative"),
        equal("its Hessian", curvature, _covariance(gates) - _covariance(shares), unit="relative"),
        at_least("the identity for sigmoid gates, off by", jnp.max(jnp.abs(apart)), 0.05, because="the control"),
    ]


def _covariance(shares: Float[Array, "B M"]) -> Float[Array, "B M M"]:
    return jax.vmap(jnp.diag)(shares) - shares[:, :, None] * shares[:, None]


def _square(outputs: Float[Array, "B D"], targets: Float[Array, "B D"]) -> Scalar:
    return jnp.mean(jnp.sum((outputs - targets) ** 2, axis=-1)) / 2


def _mean_likelihood(terms: tuple[Array, Array], targets: Array) -> Scalar:
    logits, outputs = terms
    return jnp.mean(expert_likelihood(jnp.broadcast_to(logits, (len(targets), len(logits))), outputs, targets))


def _pair(logits: Array, outputs: Array) -> tuple[Array, Array]:
    return logits, outputs


@probe
def _loser(risk: object, logits: Float[Array, " M"]) -> Scalar:
    """The share of the second mechanism."""
    return jax.nn.softmax(logits)[1]


def lost_time(share: Float[np.ndarray, "*B"]) -> Float[np.ndarray, "*B"]:
    """The time, times 2 c, that gradient flow takes for the loser's share to fall from 1/2: of de/dt = -2 c e^3 (1 - e)^2."""
    integral = lambda e: 1 / (2 * e**2) + 2 / e - 3 * np.log(e / (1 - e)) - 1 / (1 - e)  # noqa: E731
    return integral(np.asarray(share)) - integral(np.asarray(0.5))


DESCENT = {"mixture": optax.sgd(0.1), "likelihood": optax.sgd(1.0)}


@claim(
    statement=r"\text{where } A_1 = y \text{ the rival's share falls as } (4 c t)^{-1/2} \text{ under the loss of the mixture, } c = \mathrm{E}|A_2 - y|^2,"
    r" \text{ and as } (2 (1 - \bar\rho) t)^{-1} \text{ under the likelihood, } \bar\rho = \mathrm{E}\, p_2 / p_1",
    source="derived here: the flow of two logits; that the one loss makes experts cooperate, the other compete: "
    + JACOBS,
    because="descent is the flow to O(step); the next order of the second is log(t) / t, two per cent of the share",
    slow=True,
)
def the_right_mechanism_wins_slowly_and_under_the_likelihood_faster(key: PRNGKey) -> list[Expectation]:
    """Softmax attention, which is right, against the mean of the tokens on 64 sequences: shares along 20,000 steps, the
    whole path of the mixture against its integral. Where both are right, nobody wins."""
    _, outputs, _ = _instance(key, 64)
    rivals, targets = outputs[jnp.array([0, 2])], outputs[0]
    squares = jnp.sum((rivals[1] - targets) ** 2, axis=-1)
    cost, ratio = float(jnp.mean(squares)), float(jnp.mean(jnp.exp(-squares / 2)))
    shares = {}
    for name, predict, loss in (("mixture", mixture, _square), ("likelihood", _pair, _mean_likelihood)):
        risk = objective(from_function(predict), loss, rivals, targets)
        run = train(risk, jnp.zeros(2), DESCENT[name], key, steps=20_000, every=1000, probes={"share": _loser})
        shares[name] = np.asarray(run.records.values["share"])[1:]
    times = np.arange(1000, 20_001, 1000)
    path = lost_time(shares["mixture"]) / (2 * cost * 0.1 * times)
    slopes = [fit_power_law(times[-8:], shares[name][-8:], shares[name][-8:]).exponent for name in shares]
    end = 2 * (1 - ratio) * times[-1] * shares["likelihood"][-1]
    risk = objective(from_function(mixture), _square, rivals[jnp.array([0, 0])], targets)
    tied = train(risk, jnp.zeros(2), DESCENT["mixture"], key, steps=1000, every=1000, probes={"share": _loser})
    return [
        equal("time that the mixture's shares take, over the integral", path, 1.0, 0.02),
        equal(
            "exponents over the last eight times",
            slopes,
            [-0.5, -1.0],
            0.1,
            because="corrections of log(t) / t and t^{-1/2}",
        ),
        equal("end of the likelihood's share, over its law", end, 1.0, 0.05),
        equal("share where both are right", tied.records.values["share"][-1], 0.5, 1e-12, because="the control: a tie"),
    ]


@claim(
    statement=r"\text{one gate for all: } \min_g \tfrac12 g^\top C g,\ C_{mn} = \mathrm{E} \langle A_m - y, A_n - y \rangle: \text{ both of two are used iff }"
    r" C_{12} < \min(C_{11}, C_{22}), \text{ with } \frac{g_1}{g_2} = \frac{C_{22} - C_{12}}{C_{11} - C_{12}}",
    source="derived here; inverse variances where the errors do not correlate: Bates, Granger 1969",
    tolerance=1e-6,
    because="descent that has converged; the loser's share as in the slow law of a winner, below a few per cent",
    slow=True,
)
def mechanisms_share_where_their_errors_do_and_else_one_takes_all(key: PRNGKey) -> list[Expectation]:
    """What softmax attention reads, seen by three mechanisms with errors of their own, of which all are used, and by two of
    them; and one whose error is that of another doubled, which loses although the other is wrong too."""
    _, outputs, key = _instance(key, 128)
    errors = jnp.array([0.4, 0.6, 0.8])[:, None, None] * jax.random.normal(key, outputs.shape)
    targets = outputs[0]
    shared = targets[None] + errors  # three that are wrong on their own
    wrong = jnp.stack([targets + errors[0], targets + 2 * errors[0]])
    gram = np.asarray(jnp.einsum("mbd,nbd->mn", errors, errors) / len(targets))
    found = []
    for each in (shared, shared[:2], wrong):
        risk = objective(from_function(mixture), _square, each, targets)
        end = train(risk, jnp.zeros(len(each)), optax.sgd(1.0), key, steps=4000, every=4000).params
        found.append(np.asarray(jax.nn.softmax(end)))
    three = scipy.optimize.minimize(
        lambda g: g @ gram @ g / 2,
        np.full(3, 1 / 3),
        jac=lambda g: gram @ g,
        bounds=[(0, 1)] * 3,
        constraints={"type": "eq", "fun": lambda g: g.sum() - 1, "jac": lambda g: np.ones(3)},
        options={"ftol": 1e-15, "maxiter": 200},
        method="SLSQP",
    ).x
    ratio = (gram[1, 1] - gram[0, 1]) / (gram[0, 0] - gram[0, 1])
    return [
        equal("shares of three", found[0], three),
        equal("ratio of two", found[1][0] / found[1][1], ratio, unit="relative"),
        at_least("the least share of three", min(found[0]), 0.05, 0.0, because="all are used"),
        at_most(
            "share of the mechanism whose error is doubled",
            found[2][1],
            0.02,
            0.0,
            because="the control: C_12 = 2 C_11 > C_11",
        ),
    ]
