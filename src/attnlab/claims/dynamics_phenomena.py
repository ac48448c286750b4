"""Claims about phenomena of training, on instances of seconds: the adaptive edge, warm-up, blocks, Adam's advantage,
rank collapse; each with its negative control. The analyses show the same at full size."""

from functools import partial
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.special
from jaxtyping import Array

from attnlab.claims.registry import claim
from attnlab.curvature import eigenpairs, hessian
from attnlab.dynamics.heterogeneity import jensen_shannon, log_wasserstein
from attnlab.dynamics.rods import Rod, rod_velocity
from attnlab.dynamics.rules import Adam, update_rule
from attnlab.dynamics.sharpness import stability, top_eigenvalues
from attnlab.dynamics.tokens import rank_residual
from attnlab.expectation import Expectation, at_least, at_most, between, equal
from attnlab.icl.training import FreshPrompts, stack_training
from attnlab.models.adapters import from_linen
from attnlab.models.attention import AttentionConfig
from attnlab.models.transformer import Transformer, TransformerConfig
from attnlab.objectives import Objective, objective
from attnlab.risks.addition import addition_attention
from attnlab.risks.digits import digits_attention, digits_transformer
from attnlab.training import DivergenceError, train
from attnlab.types import Params, PRNGKey

# Built once: the training loop is compiled afresh for every new optimizer.
RATE = 5e-3
ADAM = update_rule("adam", RATE, b2=0.95)
ADAM_PROBES = {"adam": stability(ADAM), "plain": top_eigenvalues()}


@claim(
    statement=r"\lambda_1(P^{-1/2} H P^{-1/2}) \to \frac{2 + 2\beta_1}{(1 - \beta_1)\eta} \text{ under Adam},"
    r"\text{ while } \tfrac{\eta}{2}\lambda_1(H) \ll 1",
    source="Cohen et al., arXiv 2207.14484, section 3",
    tolerance=0.08,
    because="means over 200 steps: 0.96 to 0.98 on seeds 0 to 3; the plain sharpness, the negative control, at 0.06 to 0.26 of "
    "the edge of gradient descent at this rate",
    slow=True,
)
def adam_settles_at_its_own_edge(key: PRNGKey) -> list[Expectation]:
    """Means over the second half of 400 steps on 16 digits, over the edge of Adam and over that of gradient descent."""
    risk, params = digits_attention(key, key, 16)
    run = train(risk, params, ADAM.transformation, key, steps=400, every=10, probes=ADAM_PROBES)
    values = run.records.values
    own = np.asarray(values["adam"]["ratio"])[20:].mean()
    plain = np.asarray(values["plain"]["values"])[20:, -1].mean() * RATE / 2
    return [
        equal("sharpness over the edge of Adam", own, 1.0),
        at_most("plain sharpness over the edge of gradient descent", plain, 0.5),
    ]


@claim(
    statement=r"\dot D = -2D - \tfrac{1}{2}(G(c + D) - G(c - D)) \text{ grows} \iff \lambda_1(P^{-1/2} H P^{-1/2}) >"
    r" \frac{2 + 2\beta_1}{(1 - \beta_1)\eta}",
    source="Regis, Chewi, arXiv 2605.06821; this form of the rod flow of Adam derived here",
    tolerance=1e-8,
    because="the highest growth rate of a short rod at the edge is zero up to rounding; 5 % below and above it, the "
    "negative controls, its sign decides",
)
def rods_of_adam_grow_beyond_its_edge_only(key: PRNGKey) -> list[Expectation]:
    """Growth rates of a rod on a random quadratic in three dimensions, with a random second moment, at the edge and 5 %
    on either side: zero at the edge, and its sign on the sides."""
    rate, keys = 0.05, jax.random.split(key, 2)
    rule = Adam(rate, 0.6, 0.98)
    root = jax.random.normal(keys[0], (3, 3))
    nu, steps = 0.5 + jax.random.uniform(keys[1], (3,)), jnp.array(9.0)
    diagonal = (1 - rule.b1**9) * (jnp.sqrt(nu / (1 - rule.b2**9)) + rule.eps)
    scaled = root @ root.T / jnp.sqrt(jnp.outer(diagonal, diagonal))
    edge = (2 + 2 * rule.b1) / ((1 - rule.b1) * rate)

    @jax.jit
    def jacobian(excess: Array) -> Array:
        matrix = excess * edge / jnp.linalg.eigvalsh(scaled)[-1] * root @ root.T
        risk = objective(_quadratic_outputs, _half_total, matrix, jnp.zeros(1))

        def growth(half: Array) -> Array:
            rod = Rod(jnp.zeros((2, 3)), half.reshape(2, 3), nu, steps)
            return rod_velocity(risk, jnp.zeros(3), rod, rule).half.ravel()

        return jax.jacfwd(growth)(jnp.zeros(6))

    rates = [np.linalg.eigvals(jacobian(jnp.array(excess))).real.max() for excess in (0.95, 1.0, 1.05)]
    return [
        equal("growth rate at the edge", rates[1], 0.0),
        at_most("growth rate 5 % below", rates[0], 0.0),
        at_least("growth rate 5 % above", rates[2], 0.0),
    ]


def _quadratic_outputs(point: Array, matrix: Array) -> Array:
    return jnp.stack([point @ matrix @ point])


def _half_total(outputs: Array, _: Array) -> Array:
    return jnp.sum(outputs) / 2


# A factor that is warmed up, times a rate in the optimizer's state.
DESCENT = optax.inject_hyperparams(optax.sgd)(learning_rate=1.0)
SHARPNESS = {"plain": ADAM_PROBES["plain"]}
WARMED = optax.chain(optax.scale_by_schedule(lambda count: jnp.minimum((count + 1) / 80, 1)), DESCENT)


@claim(
    statement=r"\eta = 12 \cdot 2/\lambda_1(H_0): \text{ gradient descent overflows at once, and trains behind a warm-up}",
    source="Gilmer et al., arXiv 2110.04369; Kalra, Barkeshli, arXiv 2406.09405",
    because="counts, and whether the loss fell; the last run, at half the edge and without a warm-up, is the negative control",
    slow=True,
)
def warmup_survives_a_sharp_start(key: PRNGKey) -> list[Expectation]:
    """Two pre-norm blocks on 16 digits, 100 steps: at once, behind 80 steps of warm-up, and at half the edge."""
    risk, params = digits_transformer(key, key, 16)
    edge = 2 / eigenpairs(hessian(risk, params), key, count=1).values[-1]
    runs = [
        losses_of(risk, params, optimizer, excess * edge, key)
        for optimizer, excess in ((DESCENT, 12), (WARMED, 12), (DESCENT, 0.5))
    ]
    broken = [np.sum(~np.isfinite(losses)) for losses in runs]
    return [
        at_least("steps with a loss that is not finite: at once", broken[0], 1),
        equal("the same: behind a warm-up, at half the edge", broken[1:], 0, 0.0),
        at_most("last loss over the first: behind a warm-up, at half the edge", [x[-1] / x[0] for x in runs[1:]], 1.0),
    ]


@claim(
    statement=r"\tfrac{\eta}{2} \lambda_1(H): 12 \to [1,\, 1.25] \text{ behind a warm-up}",
    source="Gilmer et al., arXiv 2110.04369; Kalra, Barkeshli, arXiv 2406.09405",
    tolerance=0.12,
    because="the sharpness swings about the edge and above it: means over the last 200 steps of 1.06 to 1.18 by the start; "
    "it starts, the negative control, at twelve times the edge",
    slow=True,
)
def warmup_ends_at_the_edge(key: PRNGKey) -> list[Expectation]:
    """The same blocks over 400 steps, the first 80 of them of warm-up: before, and a mean over the last 200."""
    risk, params = digits_transformer(key, key, 16)
    rate = 12 * 2 / eigenpairs(hessian(risk, params), key, count=1).values[-1]
    options: dict[str, Any] = {"steps": 400, "every": 20, "hyperparameters": {"learning_rate": rate}}
    run = train(risk, params, WARMED, key, probes=SHARPNESS, **options)
    ratios = np.asarray(run.records.values["plain"]["values"])[:, -1] * rate / 2
    return [
        between("sharpness over the edge: mean over the last 200 steps", ratios[10:].mean(), 1.0, 1.25),
        equal("the same at the start", ratios[0], 12.0, unit="relative"),
    ]


def losses_of(
    risk: Objective, params: Params, optimizer: optax.GradientTransformation, rate: Array, key: PRNGKey
) -> np.ndarray:
    """Losses of 100 steps, also of a run that diverges."""
    options: dict[str, Any] = {"steps": 100, "every": 100, "hyperparameters": {"learning_rate": rate}}
    try:
        return np.asarray(train(risk, params, optimizer, key, **options).records.losses)
    except DivergenceError as error:
        return np.asarray(error.records.losses)


@claim(
    statement=r"\frac{\|H_{VV}\|}{\|H_{QQ}\|}\Big|_{\text{softmax},\, \sigma = 0.2} \ge 10\,"
    r" \frac{\|H_{VV}\|}{\|H_{QQ}\|}\Big|_{\text{linear, pre-LN, or } \sigma = 1} \text{ at initialisation}",
    source="Ormaniec, Dangel, Singh, arXiv 2410.10986, figure 1",
    because="softmax stands at 20 to 140, by the start; linear attention, a LayerNorm before softmax and embeddings of "
    "standard deviation 1, the negative controls, at 0.4 to 1.2",
    slow=True,
)
def softmax_blocks_are_heterogeneous(key: PRNGKey) -> Expectation:
    """One causal layer on the addition of two numbers of two digits."""
    controls = np.array([_value_over_query(key, *control) for control in ALIKE])
    ratios = _value_over_query(key, "softmax", 0.2) / controls
    return at_least("||H_VV|| / ||H_QQ|| over that of linear, pre-LN, sigma = 1", ratios, 10.0)


ALIKE = (("linear", 0.2), ("pre-LN", 0.2), ("softmax", 1.0))


@claim(
    statement=r"\frac{\|H_{VV}\|}{\|H_{QQ}\|} \approx 1 \text{ at initialisation for linear attention, pre-LN, or } \sigma = 1",
    source="Ormaniec, Dangel, Singh, arXiv 2410.10986, figure 1",
    tolerance=0.5,
    because="a factor of 3 in the geometric mean of four starts; softmax at sigma = 0.2, the negative control, is a factor "
    "of 20 and more away, as `softmax-blocks-are-heterogeneous` has it",
    slow=True,
)
def blocks_are_alike_without_small_softmax_scores(key: PRNGKey) -> Expectation:
    """log10 of the ratio, on the same problem."""
    ratios = [[_value_over_query(start, *control) for control in ALIKE] for start in jax.random.split(key, 4)]
    return equal("log10 of ||H_VV|| / ||H_QQ||: linear, pre-LN, sigma = 1", np.log10(ratios).mean(axis=0), 0.0)


def _value_over_query(key: PRNGKey, kind: str, scale: float) -> float:
    """Norm of the value block over that of the query block, with embeddings of standard deviation `scale`."""
    risk, params = addition_attention(key, kind, 16, digits=2)
    tables = ("token_embedding", "position_embedding")
    params = {name: scale * leaf if name in tables else leaf for name, leaf in params.items()}
    value, query = (hessian(risk, params, block=f"attention/{name}").dense() for name in ("value", "query"))
    return float(jnp.linalg.norm(value) / jnp.linalg.norm(query))


@claim(
    statement=r"W_1(\log_{10}|c \lambda|, \log_{10}|\lambda|) = |\log_{10} c|",
    source="derived here: a shift moves every quantile alike",
    tolerance=1e-10,
    because="an identity of sorted numbers: rounding is all that is left",
    slow=True,
)
def wasserstein_of_logarithms_sees_scale(key: PRNGKey) -> Expectation:
    """A spectrum over six decades against its multiples by 0.01 to 100."""
    spectrum = 10.0 ** (-6 * jax.random.uniform(key, (256,)))
    factors = 10.0 ** jnp.arange(-2.0, 2.5)
    found = jnp.stack([log_wasserstein(factor * spectrum, spectrum) for factor in factors])
    return equal("distances of a spectrum from its multiples", found, jnp.abs(jnp.log10(factors)), unit="relative")


@claim(
    statement=r"\mathrm{JS}_{64}(c \lambda, \lambda) = \tfrac12 \left[(1 - \epsilon) \log_2 \tfrac{1 - \epsilon}{1 - \epsilon/2}"
    r" - \log_2 (1 - \tfrac\epsilon2) + \epsilon\right] \text{ for all } c \ge 64 \text{ and any } \lambda > 0:"
    r"\ \text{ of } c \text{ and } \lambda \text{ it knows } \epsilon, \text{ the share of } c\lambda \text{ beyond the first bin}",
    source="derived here, for the statistic of Zhang et al., arXiv 2402.16788: the other spectrum fits into one bin",
    tolerance=1e-12,
    because="an identity of shares, to rounding. Spectra over six decades, whose share is some 0.3, give 0.2 bits of 1 for "
    "any c; uniform ones, the control, some 0.9",
)
def jensen_shannon_on_linear_bins_sees_one_share(key: PRNGKey) -> Expectation:
    """Spectra uniform in the logarithm over one and six decades, and uniform ones, times 1/1000, 1/64, 64, 100, 1000."""
    chance = np.asarray(jax.random.uniform(key, (256,)))
    spectra = 10.0 ** (-6 * chance), 10.0**-chance, chance
    factors = (1e-3, 1 / 64, 64.0, 100.0, 1e3)
    found = [
        [jensen_shannon(c * jnp.asarray(spectrum), jnp.asarray(spectrum)) for c in factors] for spectrum in spectra
    ]
    return equal(
        "divergences in bits, by spectrum and factor",
        np.array(found),
        [[_one_bin(spectrum, max(c, 1 / c)) for c in factors] for spectrum in spectra],
        unit="relative",
    )


def _one_bin(spectrum: np.ndarray, factor: float) -> float:
    """The divergence, from the share of the wider spectrum beyond the first of 64 bins that both have in common."""
    low, high = spectrum.min(), factor * spectrum.max()
    share = np.mean(factor * spectrum >= low + (high - low) / 64)
    kept, middle = 1 - share, 1 - share / 2
    return float(scipy.special.xlogy(kept, kept / middle) / np.log(2) - np.log2(middle) + share) / 2


@claim(
    statement=r"\overline{W_1}(\log_{10}|\lambda|)\big|_{\text{softmax}} \ge 1.5\,"
    r" \overline{W_1}(\log_{10}|\lambda|)\big|_{\text{pre-LN}},\quad"
    r" \overline{\mathrm{JS}}_{64}(\lambda) \le 0.12 \text{ bits in both}",
    source="measured here; the second, the negative control, is the statistic of Zhang et al., arXiv 2402.16788",
    because="the ratio of distances stands at 2 to 4, the divergences, of at most 1 bit, at 0.04 to 0.1, and higher for "
    "pre-LN, whose blocks are the more alike",
    slow=True,
    disagrees_with="Zhang et al., arXiv 2402.16788, tell blocks apart by the Jensen-Shannon divergence of their spectra. On "
    "bins of equal width it sees little but the share of large eigenvalues, and stays below .12 bits between blocks whose "
    "spectra differ by factors (one layer on five-digit addition, embeddings of .2). Their networks are larger: a divergence "
    "there that exceeds what scale alone explains would change our mind",
)
def wasserstein_of_logarithms_tells_kinds_of_attention_apart(key: PRNGKey) -> list[Expectation]:
    """Means over the pairs of the four blocks of a layer on additions of five digits, embeddings of std 0.2."""
    distances, divergences = [], []
    for kind in ("softmax", "pre-LN"):
        risk, params = addition_attention(key, kind, 16)
        for name in ("token_embedding", "position_embedding"):
            params[name] = 0.2 * params[name]
        pairs = list(combinations(_block_spectra(risk, params), 2))
        distances.append(np.mean([log_wasserstein(*pair) for pair in pairs]))
        divergences.append(np.mean([jensen_shannon(*pair) for pair in pairs]))
    return [
        at_least("Wasserstein distance of logarithms, softmax over pre-LN", distances[0] / distances[1], 1.5),
        at_most("Jensen-Shannon divergence in bits: softmax, pre-LN", divergences, 0.12),
    ]


@jax.jit
def _block_spectra(risk: Objective, params: Params) -> list[Array]:
    names = ("key", "output", "query", "value")
    return [jnp.linalg.eigvalsh(hessian(risk, params, block=f"attention/{name}").dense()) for name in names]


SGD_AND_ADAM = tuple(
    optax.chain(optax.clip_by_global_norm(1.0), rule) for rule in (optax.sgd(0.02, momentum=0.9), optax.adam(0.02))
)


@claim(
    statement=r"\exp \overline{\log (L_{\mathrm{SGD}} / L_{\mathrm{Adam}})} \ge 1.15 \text{ over starts of deep linear attention},\quad"
    r" \le 1.1 \text{ with one layer, after 250 steps}",
    source="Ahn et al., arXiv 2310.01082, section 3",
    because="single starts scatter from 0.3 to 6, so that it is their geometric mean that says something: 1.3 to 1.65; one "
    "layer is the negative control",
    slow=True,
)
def adam_gains_with_depth_on_linear_attention(key: PRNGKey) -> list[Expectation]:
    """Three layers and one, d = 3, N = 10, 32 starts, either optimizer at rate 0.02 with clipping; medians of the losses
    of the last 50 batches."""
    keys = jax.random.split(key, 32)

    def ratio(layers: int) -> float:
        start = partial(stack_training, layers=layers, dimension=3, length=10, prompts=8)
        (risk, _), params = start(key), jax.vmap(lambda key: start(key)[1])(keys)
        options: dict[str, Any] = {"steps": 250, "every": 250, "resample": FreshPrompts(3, 10, 64)}
        losses = [train(risk, params, rule, keys, **options).records.losses for rule in SGD_AND_ADAM]
        medians = [np.median(np.asarray(part)[:, -50:], axis=1) for part in losses]
        return float(np.exp(np.mean(np.log(medians[0] / medians[1]))))

    return [
        at_least("loss of SGD over Adam's, geometric mean: three layers", ratio(3), 1.15),
        at_most("the same of one layer", ratio(1), 1.1),
    ]


@claim(
    statement=r"\pi_k\, t\, \ell_k \to \frac{C - 1}{C} \text{ under gradient flow},\quad"
    r" \ell_k \text{ independent of } \pi_k \text{ under Adam}",
    source="Kunstner et al., arXiv 2402.19449, section 3; the constant derived here",
    tolerance=0.1,
    because="the next order is log(pi_k t) / (pi_k t), a few percent for the rarest class; Adam, whose steps do not see "
    "the scale of a gradient, is the negative control: there the largest loss over the smallest is 1",
    slow=True,
)
def gradient_descent_neglects_rare_classes(key: PRNGKey) -> list[Expectation]:
    """Softmax regression, C = 6 classes with an input each, frequencies by Zipf's law in random order."""
    classes = 6
    frequencies = jax.random.permutation(key, 1 / jnp.arange(1, classes + 1))
    frequencies = frequencies / frequencies.sum()
    risk = objective(_logits, _weighted_cross_entropy, jnp.eye(classes), frequencies)
    start = jnp.zeros((classes, classes))
    # of class k with margin m, by symmetry: dm/dt = pi_k C / (C - 1) (1 - p), and l = 1 - p = (C - 1) exp(-m) once it
    # is small, so that dl/dt = -pi_k C / (C - 1) l^2
    slow = train(risk, start, ZIPF_DESCENT, key, steps=4000, every=4000).params
    fast = class_losses(train(risk, start, ZIPF_ADAM, key, steps=200, every=200).params)
    scaled = frequencies * 4000 * class_losses(slow)
    return [
        equal("pi_k t l_k C / (C - 1), by class", scaled * classes / (classes - 1), 1.0),
        equal("largest over smallest class loss under Adam", fast.max() / fast.min(), 1.0),
    ]


ZIPF_DESCENT, ZIPF_ADAM = optax.sgd(1.0), optax.adam(0.03, eps=1e-12)


def _logits(weights: Array, inputs: Array) -> Array:
    return inputs @ weights


def _weighted_cross_entropy(logits: Array, frequencies: Array) -> Array:
    return -jnp.sum(frequencies * jnp.diagonal(jax.nn.log_softmax(logits)))


def class_losses(weights: Array) -> Array:
    """The loss of each class."""
    return -jnp.diagonal(jax.nn.log_softmax(weights))


@claim(
    statement=r"\|X_0 - 1\bar x^\top\| / \|X_0\| \ge 0.9,\quad \|X_4 - 1\bar x^\top\| / \|X_4\| \le 0.01 \text{ without skip connections},"
    r"\quad \|X_{12} - 1\bar x^\top\| / \|X_{12}\| \ge 0.7 \text{ with branches over } \sqrt{12}",
    source="Dong, Cordonnier, Loukas, arXiv 2103.03404; Noci et al., arXiv 2206.03126",
    because="bounds; branches over the root of the depth, the negative control, keep 0.77 to 0.91",
    slow=True,
)
def attention_alone_collapses_the_rank(key: PRNGKey) -> list[Expectation]:
    """Random softmax attention layers of width 16 on 8 tokens."""
    return [
        at_least("rank residual of the inputs", rank_residual(_tokens(key)), 0.9),
        at_most("the same after 4 layers without skip connections", _rank_residual(key, 4, False), 0.01),
        at_least("the same after 12 layers, branches over sqrt(12)", _rank_residual(key, 12, True), 0.7),
    ]


def _tokens(key: PRNGKey) -> Array:
    return jax.random.normal(key, (4, 8, 16))


@partial(jax.jit, static_argnames=("depth", "skip"))
def _rank_residual(key: PRNGKey, depth: int, skip: bool) -> Array:
    attention = AttentionConfig(16, 16, output_dim=16)
    stack = Transformer(TransformerConfig(attention, depth, norm=None, residual=skip))
    tokens = _tokens(key)
    params = stack.init(key, tokens)["params"]
    if skip:
        for layer in params.values():
            layer["attention"]["output"] = layer["attention"]["output"] / depth**0.5
    return rank_residual(from_linen(stack)(params, tokens))
