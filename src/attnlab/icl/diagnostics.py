"""Is it gradient descent? Measurements on any model that maps one prompt to a prediction, and nulls that can say no.

A *model* is a function `prompt -> prediction` of one prompt (bind parameters with `functools.partial`), differentiable
in the query. Similarity to an algorithm means little by itself: untrained models score comparably on several of these
measures (Shen, Mishra, Khashabi, arXiv 2311.07772). So `with_nulls` repeats a measurement for an untrained model and
for the model shown shuffled labels, and `identification.identify` fits algorithms on some prompts and scores them on
others. Every measurement is a mean over prompts and comes with its standard error.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.checks import check_range, is_concrete, unknown_name
from attnlab.icl.models import prompt_tokens
from attnlab.icl.tasks import Prompt, add_noise, check_prompt, scale_prompts, shuffle_labels
from attnlab.statistics import Estimate, estimate
from attnlab.types import PRNGKey, PyTree, Real

Model = Callable[[Prompt], Array]


def predictions(model: Model, prompts: Prompt) -> Float[Array, " batch"]:
    """The model's predictions for a batch of prompts.

    Raises `ValueError` unless it returns one number for one prompt.
    """
    check_prompt(prompts)
    output = jax.eval_shape(lambda batch: model(jax.tree.map(lambda x: x[0], batch)), prompts)
    shape = getattr(output, "shape", None)
    if shape != ():
        raise ValueError(
            f"the model returns an output of shape {shape} for one prompt; expected one number, shape (). "
            "Index or squeeze it; the batch axis is added here by jax.vmap."
        )
    return jax.vmap(model)(prompts)


def risk(model: Model, prompts: Prompt) -> Estimate:
    """Mean squared error of the prediction of the target."""
    return estimate((predictions(model, prompts) - prompts.target) ** 2)


def _query_gradients(model: Model, prompts: Prompt) -> Float[Array, "batch d"]:
    predictions(model, jax.tree.map(lambda x: x[:1], prompts))  # the check of shapes

    def of_query(query: Array, prompt: Prompt) -> Array:
        return model(Prompt(prompt.inputs, prompt.labels, query, prompt.target))

    return jax.vmap(lambda prompt: jax.grad(of_query)(prompt.query, prompt))(prompts)


def _cosines(a: Float[Array, "batch n"], b: Float[Array, "batch n"]) -> Float[Array, " batch"]:
    norms = jnp.linalg.norm(a, axis=1) * jnp.linalg.norm(b, axis=1)
    return jnp.sum(a * b, axis=1) / jnp.where(norms == 0, 1, norms)


class Alignment(NamedTuple):
    """How close a model is to an algorithm (von Oswald et al., arXiv 2212.07677).

    `prediction_difference` is |f - g|, `sensitivity_cosine` and `sensitivity_difference` compare df/dx_q with dg/dx_q
    by their cosine and the norm of their difference.
    """

    prediction_difference: Estimate
    sensitivity_cosine: Estimate
    sensitivity_difference: Estimate


def alignment(model: Model, algorithm: Model, prompts: Prompt, shown: Prompt | None = None) -> Alignment:
    """Compare predictions and sensitivities of `model` and `algorithm`, prompt by prompt.

    The model sees `shown`, if given, where the algorithm sees `prompts`.
    """
    shown = prompts if shown is None else shown
    found, expected = _query_gradients(model, shown), _query_gradients(algorithm, prompts)
    return Alignment(
        estimate(jnp.abs(predictions(model, shown) - predictions(algorithm, prompts))),
        estimate(_cosines(found, expected)),
        estimate(jnp.linalg.norm(found - expected, axis=1)),
    )


def residual_cosine(model: Model, algorithm: Model, prompts: Prompt, shown: Prompt | None = None) -> Estimate:
    """Cosine between the errors of the two at every position of the context (Fu et al., arXiv 2310.17086).

    The error at position t = 1, ..., N - 1 is that of predicting label t + 1 from the first t examples. The model
    must take contexts of any length; it sees `shown`, if given, where the algorithm sees `prompts`.
    """
    shown = prompts if shown is None else shown
    length = prompts.labels.shape[-1]
    if length < 3:
        raise ValueError(
            f"the prompts have {length} examples; expected at least 3, so that the cosine has 2 positions."
        )

    def errors(function: Model, seen: Prompt) -> Float[Array, "batch P"]:
        columns = [predictions(function, _prefix(seen, t)) - prompts.labels[:, t] for t in range(1, length)]
        return jnp.stack(columns, axis=1)

    return estimate(_cosines(errors(model, shown), errors(algorithm, prompts)))


def _prefix(prompts: Prompt, length: int) -> Prompt:
    """The first `length` examples as the context and the next one as the query."""
    return Prompt(
        prompts.inputs[:, :length], prompts.labels[:, :length], prompts.inputs[:, length], prompts.labels[:, length]
    )


class WithNulls(NamedTuple):
    """The same measurement for the model, for an untrained one, and for the model shown shuffled labels."""

    model: PyTree
    untrained: PyTree
    shuffled: PyTree


def with_nulls(
    measure: Callable[..., PyTree], model: Model, untrained: Model, algorithm: Model, prompts: Prompt, key: PRNGKey
) -> WithNulls:
    """`measure(model, algorithm, prompts, shown)` and its two nulls; `measure` is `alignment` or `residual_cosine`.

    In the second null the labels that the model sees are permuted within each context, while the algorithm sees the
    true ones. A model that implements the algorithm must beat both by more than their errors.
    """
    shuffled = shuffle_labels(key, prompts)
    return WithNulls(
        measure(model, algorithm, prompts),
        measure(untrained, algorithm, prompts),
        measure(model, algorithm, prompts, shuffled),
    )


def shuffled(model: Model, key: PRNGKey) -> Model:
    """The model shown its labels in another order, one permutation for all prompts of a length."""
    return lambda prompt: model(shuffle_labels(key, prompt))


def against_nulls(measure: Callable[[Model], PyTree], model: Model, untrained: Model, key: PRNGKey) -> WithNulls:
    """`measure` of the model and of both nulls, for any probe that looks at one model: risks, an iterated layer,
    interpolated weights, `identification.identify`.

    Example:
        >>> import attnlab as al
        >>> import jax
        >>> import jax.numpy as jnp
        >>> prompts = al.sample_prompts(jax.random.key(0), al.isotropic(2), length=4, batch=8)
        >>> model = lambda prompt: jnp.vdot(prompt.query, prompt.inputs.T @ prompt.labels) / 4
        >>> nothing = lambda prompt: 0 * prompt.query[0]
        >>> size = lambda model: jnp.mean(jax.vmap(model)(prompts) ** 2)
        >>> found = al.against_nulls(size, model, nothing, jax.random.key(1))
        >>> bool(found.model > found.untrained), float(found.untrained)
        (True, 0.0)
    """
    return WithNulls(measure(model), measure(untrained), measure(shuffled(model, key)))


def interpolate(first: PyTree, second: PyTree, fraction: Real) -> PyTree:
    """Weights (1 - fraction) * first + fraction * second: a model halfway between trained and constructed weights."""
    if is_concrete(fraction):
        check_range("fraction", float(fraction), 0.0, 1.0, "It interpolates; it does not extrapolate.")
    return jax.tree.map(lambda a, b: (1 - fraction) * a + fraction * b, first, second)


def scaled_risks(model: Model, prompts: Prompt, scales: Sequence[float], what: str = "inputs") -> Estimate:
    """Risk on prompts whose `what` ("inputs" or "tasks") is scaled by each of `scales`, over the mean squared target.

    Out-of-distribution behaviour: an algorithm that is linear in the labels does not notice the scale of the tasks.
    """
    if what not in ("inputs", "tasks"):
        raise unknown_name("thing to scale", what, ("inputs", "tasks"))
    samples = []
    for scale in scales:
        scaled = scale_prompts(prompts, **{what: scale})
        errors = (predictions(model, scaled) - scaled.target) ** 2
        samples.append(errors / jnp.mean(scaled.target**2))
    return estimate(jnp.stack(samples, axis=1))


def noisy_risks(model: Model, prompts: Prompt, noise_variances: Sequence[float], key: PRNGKey) -> Estimate:
    """Risk on prompts with label noise of each of the variances added, over the mean squared target.

    The same noise, scaled, at every variance, so that their differences are less noisy than they are.
    """
    scale = jnp.mean(prompts.target**2)
    noisy = [add_noise(key, prompts, variance) for variance in noise_variances]
    return estimate(jnp.stack([(predictions(model, p) - p.target) ** 2 / scale for p in noisy], axis=1))


def iterated(layer: Callable[[Float[Array, "T D"]], Float[Array, "T D"]], times: int) -> Model:
    """The model that applies a trained layer `times` times: does it go on improving, as an algorithm's step would?

    `layer` maps tokens to tokens as `models.attention_layer` with bound weights; the prediction is minus the label
    slot.
    """
    if times < 1:
        raise ValueError(f"times is {times}; expected at least one pass.")

    def model(prompt: Prompt) -> Array:
        tokens, _ = jax.lax.scan(lambda z, _: (layer(z), None), prompt_tokens(prompt), length=times)
        return -tokens[-1, -1]

    return model


def copying(layer: Callable[[Float[Array, "T D"]], Float[Array, "T D"]], tokens: Float[Array, "batch N D"]) -> Estimate:
    """How much of each token the layer brings from its left neighbour: the share of the update's squared norm, over all
    prompts, that a linear map of the neighbour explains, less that of the token itself.

    Models on separate tokens x_1, y_1, x_2, ... must first join neighbours (arXiv 2212.07677); a layer
    that copies scores near 1, one that maps each token by itself near -1; untrained attention scores below 0.
    """
    updates = jax.vmap(layer)(tokens) - tokens

    def explained(sources: Array, targets: Array) -> Array:
        flat, wanted = (x.reshape(-1, x.shape[-1]) for x in (sources, targets))
        fit = flat @ jnp.linalg.lstsq(flat, wanted)[0]
        missed = jnp.sum((wanted - fit).reshape(targets.shape) ** 2, axis=(1, 2))
        size = jnp.sum(targets**2, axis=(1, 2))
        ratio = jnp.sum(missed) / jnp.sum(size)
        return 1 - ratio - (missed - ratio * size) / jnp.mean(size)  # its mean's standard error is that of the ratio

    return estimate(explained(tokens[:, :-1], updates[:, 1:]) - explained(tokens[:, 1:], updates[:, 1:]))
