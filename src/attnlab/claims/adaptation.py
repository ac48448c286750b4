"""Claims about adaptation: LoRA and prompts as pullbacks, flat directions by counting gauges, federated drift."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from attnlab.adaptation.federated import (
    averaging_bias,
    central_descent,
    communication_ratio,
    descend,
    drift,
    federated_round,
)
from attnlab.adaptation.lora import Factors, certificate, inertia, initial_hessian, initial_inertia, lora
from attnlab.adaptation.prompts import prompt_tuned
from attnlab.adaptation.pullback import pullback, reparametrise
from attnlab.claims.instances import ROUNDING
from attnlab.claims.registry import claim
from attnlab.curvature import hessian
from attnlab.data.contextual import contextual_mixture, pooling_error
from attnlab.expectation import Expectation, at_least, at_most, equal
from attnlab.losses import square_loss
from attnlab.models.adapters import from_function, from_linen
from attnlab.models.attention import AttentionConfig, SelfAttention
from attnlab.models.heads import softmax_weights
from attnlab.objectives import Objective, objective
from attnlab.types import Params, PRNGKey

HU = "Hu et al., arXiv 2106.09685"


def linear_map(params: Params, inputs: Array) -> Array:
    """inputs @ W, the convex model."""
    return inputs @ params["W"]


def linear_risk(key: PRNGKey, shape: tuple[int, int], change_rank: int) -> tuple[Objective, Params]:
    """A linear map and targets from one that differs by a matrix of rank `change_rank`: so is the gradient's rank."""
    keys = jax.random.split(key, 4)
    inputs, weight = jax.random.normal(keys[0], (4 * shape[0], shape[0])), jax.random.normal(keys[1], shape)
    left, right = (jax.random.normal(k, (n, change_rank)) for k, n in zip(keys[2:], shape, strict=True))
    return objective(from_function(linear_map), square_loss, inputs, inputs @ (weight + left @ right.T)), {"W": weight}


def attention_risk(key: PRNGKey, config: AttentionConfig, count: int = 30) -> tuple[Objective, Params]:
    """One attention layer whose targets are its own outputs: its parameters are a minimiser."""
    module = SelfAttention(config)
    tokens = jax.random.normal(key, (count, 4, 4))
    params = module.init(jax.random.fold_in(key, 1), tokens)["params"]
    return objective(from_linen(module), square_loss, tokens, module.apply({"params": params}, tokens)), params


@claim(
    statement=r"H_\phi = J^\top H_\theta J + \textstyle\sum_i g_i \nabla^2_\phi \theta_i",
    source="derived here: the chain rule to second order",
    tolerance=1e-12,
    because=ROUNDING,
    slow=True,
)
def the_hessian_of_an_adapted_model_is_a_pullback(key: PRNGKey) -> Expectation:
    """LoRA on queries and keys of an attention layer, at random factors, against autodiff of the composed objective."""
    config = AttentionConfig(key_dim=3, value_dim=3)
    risk, params = attention_risk(key, config, count=3)
    change, factors = lora(params, "query", 2, key)
    factors = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(key, leaf.shape), factors)
    composed = reparametrise(risk, change)
    flat, unravel = ravel_pytree(factors)
    expected = jax.jit(jax.hessian(lambda vector: composed(unravel(vector))))(flat)
    return equal("the pullback", pullback(risk, change, factors).total.dense(), expected, unit="relative")


@claim(
    statement=r"\text{at } B = 0: \; H_{BB} = (I \otimes A) H_W (I \otimes A^\top), \; H_{AB} = G \otimes I_r, \; H_{AA} = 0",
    source=f"derived here for {HU}",
    tolerance=1e-12,
    because=ROUNDING,
    slow=True,
)
def lora_starts_with_this_hessian(key: PRNGKey) -> Expectation:
    """The blocks from the Hessian and gradient of the query weights, against the dense pullback.

    The layer is off its minimum, so its gradient is not zero and its Hessian not positive.
    """
    risk, params = attention_risk(key, AttentionConfig(key_dim=3, value_dim=3), count=3)
    params = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(key, leaf.shape), params)
    change, factors = lora(params, "query", 2, key)
    curvature = hessian(risk, params, block="query").dense()
    blocks = initial_hessian(curvature, jax.jit(jax.grad(risk))(params)["query"], factors["query"]["A"])
    return equal("the pullback at B = 0", pullback(risk, change, factors).total.dense(), blocks, unit="relative")


@claim(
    statement=r"\mathrm{LoRA\ at\ } B = 0: \; r\,\mathrm{rank}(G) \text{ negative, } r\,(n - \mathrm{rank}\,G) \text{ zero, } "
    r"r\,m \text{ positive eigenvalues}",
    source=f"derived here by inertia for {HU}: every start with a gradient is a strict saddle",
    tolerance=0.0,
    because="whole numbers; eigenvalues below 1e-10 of the largest count as zero",
    slow=True,
)
def lora_starts_at_a_strict_saddle(key: PRNGKey, size: int = 1) -> Expectation:
    """Signs of the Hessian of a linear model adapted at rank 2, for gradients of rank 0 to 3."""
    shape, rank = (5 * size, 4 * size), 2
    predicted, found = [], []
    for gradient_rank in range(4):
        risk, params = linear_risk(jax.random.fold_in(key, gradient_rank), shape, gradient_rank)
        change, factors = lora(params, "W", rank, key)
        values = np.linalg.eigvalsh(hessian(reparametrise(risk, change), factors).dense())
        found.append(inertia(values))
        predicted.append(initial_inertia(shape, rank, gradient_rank))
    return equal("negative, zero and positive eigenvalues, by the rank of the gradient", found, predicted)


@claim(
    statement=r"\dim\ker H = r^2 \text{ for } W + B A, \quad 2 d_k^2 \text{ for } (Q, K) \text{ and } (V, O) \text{ of a head, "
    r"at a minimiser}",
    source="derived here: parameters minus the rank of the Jacobian, the dimension of the gauge group GL(r)",
    tolerance=0.0,
    because="whole numbers; eigenvalues below 1e-10 of the largest count as zero",
    slow=True,
)
def flat_directions_count_the_gauge_group(key: PRNGKey) -> Expectation:
    """Zero eigenvalues of the exact Hessian at minimisers of a LoRA'd linear map and of a head with projection."""
    rank, width = 2, 2
    risk, params = linear_risk(key, (5, 4), rank)
    change, factors = lora(params, "W", rank, key)
    solution = jnp.linalg.lstsq(risk.inputs, risk.targets)[0] - params["W"]
    u, s, vt = jnp.linalg.svd(solution, full_matrices=False)
    factors = {"W": {"B": u[:, :rank] * s[None, :rank], "A": vt[:rank]}}
    head, point = attention_risk(key, AttentionConfig(key_dim=width, value_dim=width, output_dim=4))
    spectra = [hessian(reparametrise(risk, change), factors).dense(), hessian(head, point).dense()]
    zeros = [inertia(np.linalg.eigvalsh(matrix)).zero for matrix in spectra]
    return equal("zero eigenvalues: of W + B A, of a head", zeros, [rank**2, 2 * width**2])


@claim(
    statement=r"\tfrac{d}{dt}\big(W_Q^\top W_Q - W_K^\top W_K\big) = 0 \text{ under gradient flow; under descent it moves by } "
    r"\eta^2 (\dot W_Q^\top \dot W_Q - \dot W_K^\top \dot W_K) \text{ a step}",
    source="derived here: the conserved charge of the gauge W_Q R, W_K R^{-T}",
    tolerance=1e-12,
    because=ROUNDING + ", relative to the charge",
    slow=True,
)
def gradient_flow_conserves_the_query_key_charge(key: PRNGKey) -> list[Expectation]:
    """The charge's rate of change, and its drift along 50 steps against the sum of the second-order terms."""
    risk, params = attention_risk(key, AttentionConfig(key_dim=3, value_dim=3))
    start = jax.tree.map(lambda leaf: leaf + jax.random.normal(key, leaf.shape), params)
    gradient = jax.jit(jax.grad(risk))
    slopes, rate, point = gradient(start), 0.1, start
    flow = slopes["query"].T @ start["query"] - start["key"].T @ slopes["key"]
    moved = jnp.zeros_like(flow)
    for _ in range(50):
        slopes = gradient(point)
        moved = moved + rate**2 * (slopes["query"].T @ slopes["query"] - slopes["key"].T @ slopes["key"])
        point = jax.tree.map(lambda leaf, slope: leaf - rate * slope, point, slopes)
    size = jnp.max(jnp.abs(charge(start)))
    drifted = (charge(point) - charge(start)) / size
    return [
        equal("rate of change under the flow, over the charge", flow / size, 0.0),
        equal("drift along 50 steps of descent, over the charge", drifted, moved / size),
    ]


@claim(
    statement=r"W_Q^\top W_Q - W_K^\top W_K \text{ moves by } O(\eta) \text{ in a fixed time } T = \eta t \text{ of gradient descent}",
    source="derived here: T / eta steps that move it by eta^2 each",
    tolerance=0.1,
    because="slope over rates 0.003 ... 0.025; the path differs from the flow's by O(eta), some per cents",
)
def the_query_key_charge_drifts_in_proportion_to_the_rate(key: PRNGKey) -> Expectation:
    """Log-log slope of the charge's drift after T = 5 against the rate."""
    risk, params = attention_risk(key, AttentionConfig(key_dim=3, value_dim=3))
    start = jax.tree.map(lambda leaf: leaf + jax.random.normal(key, leaf.shape), params)

    @jax.jit
    def drifted(rate: Array, steps: Array) -> Array:
        def step(_: int, point: Params) -> Params:
            return jax.tree.map(lambda leaf, slope: leaf - rate * slope, point, jax.grad(risk)(point))

        return jnp.linalg.norm(charge(jax.lax.fori_loop(0, steps, step, start)) - charge(start))

    rates = np.array([0.003125, 0.00625, 0.0125, 0.025])
    drifts = [float(drifted(rate, round(5 / rate))) for rate in rates]
    return equal("log-log slope of the drift against the rate", np.polyfit(np.log(rates), np.log(drifts), 1)[0], 1.0)


def charge(params: Params) -> Array:
    """W_Q^T W_Q - W_K^T W_K."""
    return params["query"].T @ params["query"] - params["key"].T @ params["key"]


@claim(
    statement=r"r(r+1)/2 > K N \;\Rightarrow\; \text{descent on LoRA with weight decay } \lambda \text{ ends with } "
    r"\|\nabla_W\|_{op} \le \lambda: \text{ a global minimum}",
    source="Jang, Lee, Ryu, arXiv 2402.11867 (the threshold); the certificate is nuclear-norm duality, derived here",
    because="BFGS ends with gradients of 1e-8; the certificate of a spurious minimum exceeds 1 by per cents",
)
def wide_enough_lora_has_no_spurious_minima(key: PRNGKey, size: int = 1) -> Expectation:
    """Linearised LoRA with K N = 5 square losses, rank 3 (6 > 5), matrices 6 x 6: certificates of random starts."""
    random = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    features, targets = random.standard_normal((5, 6, 6)), random.standard_normal(5)
    rank, penalty = 3, 0.1

    def risk(vector: np.ndarray) -> tuple[float, np.ndarray]:
        left, right = vector.reshape(2, 6, rank)
        residual = np.einsum("nij,ik,jk->n", features, left, right) - targets
        gradient = np.einsum("n,nij->ij", residual, features) / 5
        value = residual @ residual / 10 + penalty / 2 * vector @ vector
        return value, np.stack([gradient @ right, gradient.T @ left]).ravel() + penalty * vector

    found = []
    for _ in range(3 * size):
        end = scipy.optimize.minimize(risk, random.standard_normal(12 * rank), jac=True, tol=1e-9, method="BFGS").x
        left, right = end.reshape(2, 6, rank)
        residual = np.einsum("nij,ik,jk->n", features, left, right) - targets
        found.append(certificate(jnp.asarray(np.einsum("n,nij->ij", residual, features) / 5), penalty))
    return at_most("certificates: ||gradient||_op over the weight decay, by start", found, 1.0, 1e-5)


@claim(
    statement=r"\mathrm{err}_{\mathrm{pooling}}(\Delta) = 0,\ 1 - \tfrac{\zeta}{(1-\zeta)\Delta},\ \tfrac{\zeta}{(1-\zeta)\Delta} "
    r"\text{ with edges } \tfrac{\zeta}{1-\zeta}, \tfrac{2\zeta}{1-\zeta}; \; \mathrm{err}_{\mathrm{prompt}} = 0",
    source="derived here for the contextual data of Oymak, Rawat, Soltanolkotabi, Thrampoulidis, arXiv 2306.03435",
    tolerance=4.5,
    because="in standard errors of an error rate over 20,000 sequences",
    slow=True,
)
def prompt_attention_solves_what_pooling_cannot(key: PRNGKey, size: int = 1) -> Expectation:
    """One gradient step from zero on mean tokens, and softmax over a prompt along q*, in each of the three phases."""
    relevant, count = 0.25, 20_000 * size
    edge = relevant / (1 - relevant)
    predicted, found = [], []
    for spread in (0.8 * edge, 1.5 * edge, 3 * edge):
        tokens, labels = contextual_mixture(key, count, 8, 3, relevant, spread)
        prompt = 50 * jnp.eye(3)[0]
        weights = softmax_weights(tokens @ prompt)
        for features in (jnp.mean(tokens, axis=1), jnp.einsum("nl,nld->nd", weights, tokens)):
            step = jnp.mean(labels[:, None] * features, axis=0)  # of the logistic or square loss, up to a factor
            found.append(jnp.mean(labels * (features @ step) <= 0))
        predicted += [pooling_error(relevant, spread), 0.0]
    return equal(
        "error rates of pooling and of attention, by phase", np.array(found), predicted, standard_error=0.5 / count**0.5
    )


def prompted_attention(prompt: Array, tokens: Array) -> Array:
    """Softmax attention of a prompt over the tokens, read by a head along the class direction w* = e_1, held fixed."""
    return jnp.einsum("nl,nl->n", softmax_weights(tokens @ prompt), tokens[..., 1])


def logistic_loss(outputs: Array, labels: Array) -> Array:
    """Mean of log(1 + exp(-y f)) for labels +-1."""
    return jnp.mean(jax.nn.softplus(-labels * outputs))


@claim(
    statement=r"\text{descent on a prompt } q \text{ alone, from a random start, ends with error } 0 \text{ in all three phases; }"
    r"\; \mathrm{err}(q = 0) = \max\big(0, 1 - \tfrac{\zeta}{(1-\zeta)\Delta}\big)",
    source="derived here for the contextual data of Oymak, Rawat, Soltanolkotabi, Thrampoulidis, arXiv 2306.03435",
    tolerance=4.5,
    because="in standard errors of an error rate over 20,000 sequences that were not trained on",
    slow=True,
)
def a_tuned_prompt_finds_the_relevant_tokens(key: PRNGKey) -> list[Expectation]:
    """300 steps on 400 sequences in each phase: errors of no prompt and of the tuned one, and where that points.

    The gradient is Cov_a(x, w* . x), averaged over both classes Var_a(weight of the signal) q*.
    """
    relevant, count = 0.25, 20_000
    edge = relevant / (1 - relevant)
    predict, predicted, found, leanings = from_function(prompted_attention), [], [], []
    tune = jax.jit(lambda data, start: descend(objective(predict, logistic_loss, *data), start, 2.0, 300))
    for phase, spread in enumerate((0.8 * edge, 1.5 * edge, 3 * edge)):
        keys = jax.random.split(jax.random.fold_in(key, phase), 3)
        start = 0.3 * jax.random.normal(keys[0], (3,))
        tuned = tune(contextual_mixture(keys[1], 400, 8, 3, relevant, spread), start)
        tokens, labels = contextual_mixture(keys[2], count, 8, 3, relevant, spread)
        errors = [jnp.mean(labels * predict(prompt, tokens) <= 0) for prompt in (jnp.zeros(3), tuned)]
        found += errors
        leanings.append(tuned[0] / abs(tuned[1]))
        predicted += [max(0.0, 1 - edge / spread), 0.0]
    return [
        equal(
            "error rates of no prompt and of the tuned one, by phase", found, predicted, standard_error=0.5 / count**0.5
        ),
        at_least("the prompt along q* over that along the class, by phase", leanings, 2.0, because="it turns to q*"),
    ]


@claim(
    statement=r"\text{a prompt of } P \text{ tokens changes the output as } P \text{ further key-value pairs: } "
    r"f = (1 - s) f_{\mathrm{data}} + s f_{\mathrm{prompt}}",
    source="derived here: softmax over a union is the mixture of softmaxes by their share of the mass",
    tolerance=1e-12,
    because=ROUNDING,
    slow=True,
)
def a_prompt_mixes_into_the_attention(key: PRNGKey) -> Expectation:
    """A prompt-tuned attention layer against attention over the data and over the prompt alone, mixed by their masses."""
    config = AttentionConfig(key_dim=3, value_dim=3, scale=1.0)
    risk, params = attention_risk(key, config, count=2)
    prompt = jax.random.normal(key, (2, 4))
    found = prompt_tuned(risk, params).outputs(prompt)
    queries = risk.inputs @ params["query"]
    parts = []
    for tokens in (risk.inputs, jnp.broadcast_to(prompt, (2, 2, 4))):
        scores = jnp.einsum("bik,bjk->bij", queries, tokens @ params["key"])
        output = jnp.einsum("bij,bjv->biv", softmax_weights(scores), tokens @ params["value"])
        parts.append((jax.nn.logsumexp(scores, axis=-1), output))
    share = jax.nn.sigmoid(parts[1][0] - parts[0][0])[..., None]
    return equal(
        "outputs of the prompt-tuned layer", found, (1 - share) * parts[0][1] + share * parts[1][1], unit="relative"
    )


def federated_problem(key: PRNGKey, clients: int = 4) -> tuple[Objective, Params]:
    """One attention layer, its clients with tokens and targets of their own, stacked."""
    module = SelfAttention(AttentionConfig(key_dim=2, value_dim=2))
    tokens, targets = jax.random.normal(key, (clients, 3, 4, 3)), jax.random.normal(key, (clients, 3, 4, 2))
    params = module.init(key, tokens[0])["params"]
    risks = [objective(from_linen(module), square_loss, *pair) for pair in zip(tokens, targets, strict=True)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *risks), params


@claim(
    statement=r"\theta_{\mathrm{FedAvg}} - \theta_{\mathrm{GD}} = \tfrac{\eta^2 E(E-1)}{2}\big[\overline{H g} - \bar H \bar g\big] + O(\eta^3), \; 0 \text{ for } E = 1",
    source="derived here for federated averaging (McMahan et al., arXiv 1602.05629)",
    tolerance=0.05,
    because="exponents over rates 1e-4 ... 1e-3, where the next order is a per cent or less",
    slow=True,
)
def federated_drift_is_second_order_in_the_rate(key: PRNGKey) -> list[Expectation]:
    """Slopes of the drift and of what the formula leaves of it against the rate, after five local steps; none after one."""
    clients, params = federated_problem(key)
    rates = np.geomspace(1e-4, 1e-3, 4)

    @jax.jit
    def parts(rate: Array) -> Array:
        local, central = (step(clients, params, rate, 5) for step in (federated_round, central_descent))
        moved, formula = (ravel_pytree(tree)[0] for tree in (_minus(local, central), drift(clients, params, rate, 5)))
        return jnp.stack([jnp.linalg.norm(moved), jnp.linalg.norm(moved - formula)])

    norms = [parts(jnp.asarray(rate)) for rate in rates]
    slopes = np.polyfit(np.log(rates), np.log(np.array(norms)), 1)[0]
    single = _minus(
        *(jax.jit(step, static_argnums=3)(clients, params, 1.0, 1) for step in (federated_round, central_descent))
    )
    left = jnp.linalg.norm(ravel_pytree(single)[0])
    return [
        equal("exponents of the drift, and of what the formula leaves of it", slopes, [2.0, 3.0]),
        equal("drift of one local step at rate 1", left, 0.0, 5e-12, because="rounding"),
    ]


def _minus(left: Params, right: Params) -> Params:
    return jax.tree.map(jnp.subtract, left, right)


@claim(
    statement=r"\overline{B A} - \bar B \bar A = \overline{(B - \bar B)(A - \bar A)}; \quad "
    r"\text{a } D \times D \text{ matrix costs } D / (2 r) \text{ times its factors}",
    source=f"derived here for federated averaging of the factors of {HU}",
    tolerance=1e-12,
    because=ROUNDING,
    slow=True,
)
def averaged_lora_factors_are_biased_by_their_covariance(key: PRNGKey) -> list[Expectation]:
    """Random factors of five clients, and the numbers sent for a 1024 x 1024 matrix at rank 4 (128 times fewer)."""
    left, right = jax.random.normal(key, (5, 6, 2)), jax.random.normal(jax.random.fold_in(key, 1), (5, 2, 4))
    predicted = (left @ right).mean(0) - left.mean(0) @ right.mean(0)
    found = averaging_bias({"W": {"B": left, "A": right}})["W"]
    shape = {"W": jnp.zeros((1024, 1024))}
    factors: Factors = lora(shape, "W", 4, key)[1]
    ratio = communication_ratio(shape, factors)
    return [
        equal("bias of the averaged factors", found, predicted, unit="relative"),
        equal("numbers of the matrix over those of its factors", ratio, 1024 / 8),
    ]
