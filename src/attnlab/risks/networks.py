"""Small networks of dense layers under cross-entropy: digits by a perceptron and by attention, clusters, text."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from attnlab.checks import check_positive
from attnlab.data.digits import digits
from attnlab.data.text import next_words
from attnlab.losses import cross_entropy
from attnlab.models.adapters import from_linen
from attnlab.models.attention import AttentionConfig
from attnlab.models.networks import MLP, MLPConfig
from attnlab.models.transformer import LanguageModel, LanguageModelConfig, TransformerConfig
from attnlab.objectives import Objective, as_partial, objective
from attnlab.risks.digits import digits_attention
from attnlab.types import Params, PRNGKey


def digits_perceptron(key: PRNGKey, count: int = 128, hidden: tuple[int, ...] = (20, 20)) -> tuple[Objective, Params]:
    """Handwritten digits, 64 pixels each, by tanh layers of the `hidden` widths to 10 classes."""
    data_key, key = jax.random.split(key)
    data = digits(data_key, count, patch=(8, 8), targets="labels", per_token=False)
    return _perceptron(key, data.inputs[:, 0], data.targets, (*hidden, 10))


def digits_attention_classes(key: PRNGKey, count: int = 128) -> tuple[Objective, Params]:
    """Handwritten digits by the network of `digits_attention`, with the cross-entropy of their classes."""
    data_key, key = jax.random.split(key)
    risk, params = digits_attention(data_key, key, count)
    return replace(risk, loss=as_partial(cross_entropy), targets=jnp.argmax(risk.targets, axis=-1)), params


def clusters(
    key: PRNGKey,
    classes: int,
    *,
    count: int = 256,
    width: int = 16,
    hidden: tuple[int, ...] = (16,),
    spread: float = 0.5,
) -> tuple[Objective, Params]:
    """Gaussian clusters, one a class, by tanh layers: examples are unit Gaussian centres plus `spread` times noise.

    The labels go round the classes, so that all are met as often where `classes` divides `count`. Raises `ValueError`
    for numbers that are not positive.
    """
    check_positive(classes=classes, count=count, width=width)
    centre_key, noise_key, key = jax.random.split(key, 3)
    labels = jnp.arange(count) % classes
    centres = jax.random.normal(centre_key, (classes, width))
    inputs = centres[labels] + spread * jax.random.normal(noise_key, (count, width))
    return _perceptron(key, inputs, labels, (*hidden, classes))


def text_model(
    key: PRNGKey, *, sequences: int = 32, length: int = 8, vocabulary: int = 32, width: int = 32, layers: int = 2
) -> tuple[Objective, Params]:
    """The next word of English text by a small pre-norm transformer of two heads; rarer words count as one."""
    half = width // 2
    attention = AttentionConfig(half, half, heads=2, causal=True, output_dim=width)
    blocks = TransformerConfig(attention, layers, 2 * width, final_norm=True)
    model = LanguageModel(LanguageModelConfig(blocks, vocabulary, length, width))
    inputs, targets = (jnp.minimum(tokens, vocabulary - 1) for tokens in next_words(sequences, length)[0])
    return objective(from_linen(model), cross_entropy, inputs, targets), model.init(key, inputs[:1])["params"]


def _perceptron(
    key: PRNGKey, inputs: jax.Array, labels: jax.Array, widths: tuple[int, ...]
) -> tuple[Objective, Params]:
    model = MLP(MLPConfig(widths, "tanh"))
    return objective(from_linen(model), cross_entropy, inputs, labels), model.init(key, inputs[:1])["params"]
