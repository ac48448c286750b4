"""Claims about what stays put as a layer widens, in standard and in maximal-update parametrisation: first steps, sharpness,
the best learning rate."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from attnlab.claims.registry import claim
from attnlab.dynamics.kernel import empirical_ntk
from attnlab.expectation import Expectation, at_most, between, equal
from attnlab.losses import cross_entropy
from attnlab.memory.scaling import PowerLaw, fit_power_law
from attnlab.models.adapters import from_linen
from attnlab.models.attention import AttentionConfig, SelfAttention
from attnlab.objectives import objective
from attnlab.statistics import Estimate, estimate
from attnlab.types import Params, PRNGKey, Scalar

TENSOR_PROGRAMS = "Yang, Hu et al., arXiv 2203.03466"
VOCABULARY, LENGTH = 8, 4
GROUPS = ("embedding", "query", "value", "readout")
"""What is moved by itself; keys do as queries do."""


class Parametrization(NamedTuple):
    """Powers of the width: of the readout's standard deviation, of the factor of the scores, and of the rates, of Adam and
    of gradient descent, for embedding, matrices of the layer, and readout."""

    readout: float
    score: float
    adam: tuple[float, float, float]
    descent: tuple[float, float, float]


STANDARD = Parametrization(-0.5, -0.5, (0.0, 0.0, 0.0), (0.0, 0.0, 0.0))
MAXIMAL = Parametrization(-1.0, -1.0, (0.0, -1.0, -1.0), (1.0, 0.0, -1.0))


def initial(key: PRNGKey, width: int, chosen: Parametrization, dtype: str = "float64") -> Params:
    """Embeddings of variance 1, matrices of variance 1 / width, and a readout as chosen."""
    embedding, readout, *keys = jax.random.split(key, 5)
    names = ("query", "key", "value")
    layer = {n: width**-0.5 * jax.random.normal(k, (width, width), dtype) for n, k in zip(names, keys, strict=True)}
    return {
        "embedding": jax.random.normal(embedding, (VOCABULARY, width), dtype),
        "attention": layer,
        "readout": width**chosen.readout * jax.random.normal(readout, (width, VOCABULARY), dtype),
    }


def logits(params: Params, tokens: Int[Array, "B L"], score: Scalar) -> Float[Array, "B V"]:
    """Of the last token, after one attention layer with a residual; `score` is the factor of the scores."""
    embedded = params["embedding"][tokens]
    width = embedded.shape[-1]
    layer = from_linen(SelfAttention(AttentionConfig(key_dim=width, value_dim=width, scale=1.0)))
    scaled = {**params["attention"], "query": score * params["attention"]["query"]}
    return (embedded + layer(scaled, embedded))[:, -1] @ params["readout"]


def factors(params: Params, powers: tuple[float, float, float]) -> Params:
    """width^power for every matrix: embedding, those of the layer, readout."""
    width, dtype = params["readout"].shape[0], params["readout"].dtype
    embedding, layer, readout = (jnp.asarray(float(width) ** power, dtype) for power in powers)
    return {"embedding": embedding, "attention": dict.fromkeys(params["attention"], layer), "readout": readout}


def _score(params: Params, chosen: Parametrization) -> Scalar:
    width, dtype = params["readout"].shape[0], params["readout"].dtype
    return jnp.asarray(float(width) ** chosen.score, dtype)


def _exponent(widths: tuple[int, ...], estimates: list[Estimate], what: str, wanted: float) -> Expectation:
    law = _law(widths, estimates)
    return equal(what, law.exponent, wanted, standard_error=law.error)


def _law(widths: tuple[int, ...], estimates: list[Estimate]) -> PowerLaw:
    values = np.array([np.asarray(found) for found in estimates])
    return fit_power_law(widths, values[:, 0], values[:, 1])


@partial(jax.jit, static_argnames=("width", "chosen", "count"))
def _first_steps(key: PRNGKey, width: int, chosen: Parametrization, count: int) -> dict[str, Float[Array, " count"]]:
    """How fast the label's logit moves along the sign of the gradient on one example of different tokens, which is Adam's
    first step, for each group by itself at its own rate."""
    tokens, label = jnp.arange(LENGTH)[None], 0

    def one(key: PRNGKey) -> dict[str, Array]:
        params = initial(key, width, chosen)

        def predict(weights: Params) -> Array:
            return logits(weights, tokens, _score(params, chosen))

        gradient = jax.grad(lambda weights: cross_entropy(predict(weights), jnp.array([label])))(params)
        step = jax.tree.map(lambda g, rate: -rate * jnp.sign(g), gradient, factors(params, chosen.adam))
        return {name: jax.jvp(predict, (params,), (_alone(step, name),))[1][0, label] for name in GROUPS}

    return jax.lax.map(one, jax.random.split(key, count))


def _alone(step: Params, name: str) -> Params:
    """A step of one group, of which the path has `name`, and zero elsewhere."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if any(entry.key == name for entry in path) else jnp.zeros_like(leaf), step
    )


def _limits() -> dict[str, float]:
    """Of the same in maximal-update parametrisation, per rate: scores vanish, so that attention is uniform and the class
    probabilities are; then sums over the width of |Gaussian| entries."""
    folded, aligned = (2 / np.pi) ** 0.5, (1 - 1 / VOCABULARY) ** 0.5
    return {
        "embedding": folded * aligned * ((1 + LENGTH**-2.0) ** 0.5 + (LENGTH - 1) / LENGTH),
        "value": folded**2 * aligned * LENGTH**-0.5,
        "readout": folded * (1 + 1 / LENGTH) ** 0.5,
    }


STEP_WIDTHS = (32, 128, 512)


@claim(
    statement=r"\text{Adam's first step moves a logit as } m^{1/2}, m^{3/2}, m^{3/2}, m \text{ by embedding, query, value, readout in standard "
    r"parametrisation; as } m^0, m^{-1/2}, m^0, m^0 \text{ in maximal-update parametrisation, with limits } \sqrt{\tfrac2\pi (1 - \tfrac1V)}\,"
    r"(\sqrt{1 + L^{-2}} + 1 - \tfrac1L),\ \tfrac2\pi \sqrt{(1 - \tfrac1V) / L},\ \sqrt{\tfrac2\pi (1 + \tfrac1L)}",
    source=f"maximal updates: {TENSOR_PROGRAMS}; exponents and limits for this layer derived here, E|z| = (2 / pi)^(1/2)",
    tolerance=4.5,
    because="in standard errors over 96 draws a width; what is left of order 1 / m is a smaller part",
    slow=True,
)
def first_steps_grow_with_width_but_in_maximal_updates(key: PRNGKey) -> list[Expectation]:
    """One example of four different tokens of a vocabulary of eight, widths 32 to 512. That queries do not matter yet is
    the readout's doing, which knows nothing of the values at the start."""
    parts = []
    wanted = {
        "standard": (STANDARD, (0.5, 1.5, 1.5, 1.0)),
        "maximal": (MAXIMAL, (0.0, -0.5, 0.0, 0.0)),
    }
    for place, (name, (chosen, exponents)) in enumerate(wanted.items()):
        keys = jax.random.split(jax.random.fold_in(key, place), len(STEP_WIDTHS))
        found = [_first_steps(k, width, chosen, 96) for k, width in zip(keys, STEP_WIDTHS, strict=True)]
        for group, exponent in zip(GROUPS, exponents, strict=True):
            rows = [estimate(run[group]) for run in found]
            parts.append(_exponent(STEP_WIDTHS, rows, f"exponent by {group}, {name}", exponent))
    for group, limit in _limits().items():
        last = estimate(found[-1][group])
        parts.append(equal(f"rate by {group}, maximal, width 512", last.value, limit, standard_error=last.error))
    return parts


@partial(jax.jit, static_argnames=("width", "chosen", "count"))
def _sharpness(key: PRNGKey, width: int, chosen: Parametrization, count: int) -> dict[str, Float[Array, "count 2"]]:
    """Trace and largest eigenvalue of the Gauss-Newton matrix of the cross-entropy in weights divided by the roots of their
    rates, so that descent in them has one rate, and of the embedding's block, from the kernels of the logits; on four
    random sequences."""

    def one(key: PRNGKey) -> dict[str, Array]:
        key, token_key = jax.random.split(key)
        params = initial(key, width, chosen)
        tokens = jax.random.randint(token_key, (LENGTH, LENGTH), 0, VOCABULARY)
        roots = jax.tree.map(jnp.sqrt, factors(params, chosen.descent))
        scaled = jax.tree.map(lambda w, root: w / root, params, roots)
        at = tokens, roots, _score(params, chosen)
        whole = objective(_scaled_logits, cross_entropy, at, tokens[:, 0])
        own = objective(_from_embedding, cross_entropy, (scaled, at), tokens[:, 0])
        root = _curvature_root(whole.outputs(scaled))
        kernels = {"all weights": empirical_ntk(whole, scaled), "embedding": empirical_ntk(own, scaled["embedding"])}
        spectra = {name: jnp.linalg.eigvalsh(root @ kernel @ root) for name, kernel in kernels.items()}
        return {name: jnp.stack([jnp.sum(values), values[-1]]) for name, values in spectra.items()}

    return jax.lax.map(one, jax.random.split(key, count))


def _scaled_logits(scaled: Params, at: tuple[Array, Params, Scalar]) -> Float[Array, "B V"]:
    tokens, roots, score = at
    return logits(jax.tree.map(lambda w, root: w * root, scaled, roots), tokens, score)


def _from_embedding(embedding: Array, at: tuple[Params, tuple[Array, Params, Scalar]]) -> Float[Array, "B V"]:
    return _scaled_logits({**at[0], "embedding": embedding}, at[1])


def _curvature_root(outputs: Float[Array, "B V"]) -> Float[Array, "B*V B*V"]:
    """The root of the mean cross-entropy's Hessian in the logits."""
    mean = jax.hessian(lambda flat: jnp.mean(jax.nn.logsumexp(flat.reshape(outputs.shape), axis=1)))(outputs.ravel())
    values, vectors = jnp.linalg.eigh(mean)
    return (vectors * jnp.sqrt(jnp.maximum(values, 0.0))[None]) @ vectors.T


SHARP_WIDTHS = (64, 128, 256)


@claim(
    statement=r"\mathrm{tr}\, R^{1/2} G R^{1/2} \text{ and } \lambda_1 \propto m \text{ in standard parametrisation, and } \propto m^0 \text{ in the embedding "
    r"alone; } \propto m^0 \text{ in maximal-update parametrisation with rates } R = (m, 1, 1/m), \text{ and so in the embedding alone}",
    source=f"that sharpness does not depend on the width under maximal updates: Noci et al., arXiv 2402.17457; rates: {TENSOR_PROGRAMS}; exponents "
    "of this layer at the start derived here, from squared gradients of a logit",
    tolerance=4.5,
    because="in standard errors over 24 draws a width; what is left of order 1 / m is a smaller part",
    slow=True,
)
def sharpness_at_the_start_stays_put_in_maximal_updates(key: PRNGKey) -> list[Expectation]:
    """Gauss-Newton matrices of the cross-entropy of four sequences, widths 64 to 256."""
    parts = []
    for name, chosen, wanted in (("standard", STANDARD, (1.0, 0.0)), ("maximal", MAXIMAL, (0.0, 0.0))):
        found = [_sharpness(jax.random.fold_in(key, width), width, chosen, 24) for width in SHARP_WIDTHS]
        for what, exponent in zip(("all weights", "embedding"), wanted, strict=True):
            traces, edges = ([estimate(values[what][:, place]) for values in found] for place in (0, 1))
            parts.append(_exponent(SHARP_WIDTHS, traces, f"exponent of the trace in {what}, {name}", exponent))
            parts.append(
                equal(
                    f"exponent of the largest eigenvalue in {what}, {name}",
                    _law(SHARP_WIDTHS, edges).exponent,
                    exponent,
                    0.35,
                    because="readouts of V classes spread by (1 + (V / m)^(1/2))^2, which alone is -.2 at these widths",
                )
            )
    return parts


VARIANTS = {
    "standard": STANDARD,
    "standard, embedding faster": STANDARD._replace(adam=(1.0, 0.0, 0.0)),
    "maximal": MAXIMAL,
    "maximal, embedding slower": MAXIMAL._replace(adam=(-1.0, -1.0, -1.0)),
}
CENTRES = {
    "standard": (-1.0, -1.15),
    "standard, embedding faster": (-2.5, -1.15),
    "maximal": (-1.5, 0.0),
    "maximal, embedding slower": (0.5, 0.0),
}
"""Where the grid of rates stands: log2 of its middle is a + b log2(width), to the next whole number."""
TRAIN_WIDTHS, TRAIN_STEPS, SEQUENCES = (32, 96, 256), 30, 64
ADAM = optax.scale_by_adam()


@jax.jit
def _end_losses(
    params: Params, scales: Params, score: Scalar, rates: Float[Array, " R"], data: tuple[Array, Array]
) -> Float[Array, " R"]:
    """The loss after some steps of Adam on all sequences, a rate each."""
    tokens, labels = data

    def loss(weights: Params) -> Scalar:
        return cross_entropy(logits(weights, tokens, score), labels)

    def run(rate: Scalar) -> Scalar:
        def step(state: tuple[Params, optax.OptState], _: None) -> tuple[tuple[Params, optax.OptState], None]:
            weights, moments = state
            with jax.numpy_dtype_promotion("standard"):
                moves, moments = ADAM.update(jax.grad(loss)(weights), moments)
            return (jax.tree.map(lambda w, m, s: w - rate * s * m, weights, moves, scales), moments), None

        return loss(jax.lax.scan(step, (params, ADAM.init(params)), length=TRAIN_STEPS)[0][0])

    return jax.lax.map(run, rates)


class _Best(NamedTuple):
    """log2 of the best rate, by a parabola through the least loss of the grid and its neighbours, and that loss."""

    rate: float
    loss: float


def _best(key: PRNGKey, name: str, width: int, data: tuple[Array, Array]) -> _Best:
    """Of geometric means of the losses from two starts, on a grid of powers of two; not a number at its ends."""
    offset, slope = CENTRES[name]
    powers = round(offset + slope * np.log2(width)) + np.arange(-4, 5)
    rates, found = jnp.asarray(2.0**powers, "float32"), []
    for draw in range(2):
        params = initial(jax.random.fold_in(key, draw), width, VARIANTS[name], "float32")
        scales, score = factors(params, VARIANTS[name].adam), _score(params, VARIANTS[name])
        found.append(np.log(_end_losses(params, scales, score, rates, data)))
    losses = np.mean(found, axis=0)
    least = int(np.nanargmin(losses))
    if least in (0, len(powers) - 1):
        return _Best(np.nan, np.nan)
    curve = np.polyfit(powers[least - 1 : least + 2], losses[least - 1 : least + 2], 2)
    return _Best(-curve[1] / (2 * curve[0]), float(np.exp(losses[least])))


@claim(
    statement=r"\text{Adam's best rate } \propto m^0 \text{ in maximal-update parametrisation, and about } m^{-1.3} \text{ in standard "
    r"parametrisation, also with the embedding's rate times } m, \text{ which closes a part of the gap in loss}",
    source=f"transfer of the best rate: {TENSOR_PROGRAMS}; the part of the embedding: Kalra, Barkeshli, arXiv 2605.21486; measured here",
    because="a grid of powers of two, a parabola between; bounds set beyond the range of seeds 0 to 9: -.25 to .14, -1.46 to -1.07, .15 to .76, "
    "-.29 to -.08",
    disagrees_with="Kalra, Barkeshli, arXiv 2605.21486: nearly all that maximal updates have before standard parametrisation under AdamW comes from "
    "the embedding's rate, m times greater (their abstract; language models). Here one layer without normalisation and decay learns 64 random "
    "labels in 30 steps of Adam: the greater rate closes .15 to .76 of the gap in log loss at width 256 and leaves the best rate falling with the "
    "width, and maximal updates without it lose nothing. Normalisation, which takes the scale of the embedding out, decay and long training may make "
    "the difference: a layer of this size with these, in which the embedding's rate decides, would change our mind.",
    slow=True,
)
def best_rates_stay_put_in_maximal_updates_without_the_embeddings_part(key: PRNGKey) -> list[Expectation]:
    """Sequences of four of eight tokens, widths 32, 96 and 256, nine rates, two starts."""
    token_key, label_key, key = jax.random.split(key, 3)
    tokens = jax.random.randint(token_key, (SEQUENCES, LENGTH), 0, VOCABULARY)
    data = tokens, jax.random.randint(label_key, (SEQUENCES,), 0, VOCABULARY)
    best = {
        name: [_best(jax.random.fold_in(key, width), name, width, data) for width in TRAIN_WIDTHS] for name in VARIANTS
    }
    rates = {name: np.array([found.rate for found in row]) for name, row in best.items()}
    powers = {name: np.polyfit(np.log2(TRAIN_WIDTHS), row, 1)[0] for name, row in rates.items()}
    standard, faster, maximal, slower = (np.log(row[-1].loss) for row in best.values())
    return [
        equal("exponent of the best rate, maximal", powers["maximal"], 0.0, 0.4),
        equal("the same with the embedding's rate over m", powers["maximal, embedding slower"], 0.0, 0.4),
        between("exponent of the best rate, standard", powers["standard"], -1.75, -0.85),
        between("the same with the embedding's rate times m", powers["standard, embedding faster"], -1.75, -0.85),
        between(
            "part of the gap in log loss that the embedding's rate closes",
            (standard - faster) / (standard - maximal),
            0.0,
            0.9,
        ),
        at_most("log loss of maximal updates with a slow embedding, less theirs", slower - maximal, 0.0, 0.1),
    ]
