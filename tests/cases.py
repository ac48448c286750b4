"""Small objectives, model x loss, that every operator and claim is tested on: `CASES["softmax/square"](key)`.

Each case is a function of a key that returns an `Objective` and a point of its parameters, all in float64, away from
special points: no bias is zero and no LayerNorm scale one. All models are smooth, so that every derivative exists.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from attnlab.losses import loss_by_name
from attnlab.models.adapters import from_linen
from attnlab.models.attention import AttentionConfig, SelfAttention
from attnlab.models.networks import MLP, ConvNet, ConvNetConfig, MLPConfig
from attnlab.models.transformer import LanguageModel, LanguageModelConfig, Transformer, TransformerConfig
from attnlab.objectives import objective

BATCH, LENGTH, DIM = 2, 3, 3
VOCABULARY = 5


def attention(**options):
    return SelfAttention(AttentionConfig(key_dim=2, value_dim=2, **options))


def transformer(layers=1, **options):
    attention_config = AttentionConfig(key_dim=2, value_dim=2, output_dim=DIM)
    options = {"mlp_width": 4, "activation": "gelu", "bias": True, **options}
    return Transformer(TransformerConfig(attention_config, layers, **options))


def language_model():
    attention_config = AttentionConfig(key_dim=2, value_dim=2, causal=True, output_dim=2)
    blocks = TransformerConfig(attention_config, mlp_width=3, activation="tanh", norm=None, bias=True)
    return LanguageModel(LanguageModelConfig(blocks, VOCABULARY, length=4, width=2, dtype="float64"))


def tokens(random):
    return jnp.asarray(random.standard_normal((BATCH, LENGTH, DIM)))


def symbols(random):
    return jnp.asarray(random.integers(VOCABULARY, size=(BATCH, 4)))


def images(random):
    return jnp.asarray(random.standard_normal((BATCH, 4, 4, 1)))


MODELS: dict[str, tuple[nn.Module, object]] = {
    "softmax": (attention(), tokens),
    "linear": (attention(weights="linear"), tokens),
    "temperature": (attention(scale=2.0), tokens),
    "merged": (attention(merged=True), tokens),
    "causal": (attention(causal=True), tokens),
    "multi_head": (attention(heads=2, output_dim=2), tokens),
    "biases": (attention(heads=2, output_dim=2, bias=True), tokens),
    "block_pre": (transformer(norm="pre", final_norm=True), tokens),
    "block_post": (transformer(norm="post", activation="tanh"), tokens),
    "block_no_norm": (transformer(norm=None), tokens),
    "two_layers": (transformer(layers=2, norm="pre"), tokens),
    "language_model": (language_model(), symbols),
    "mlp": (MLP(MLPConfig((4, 3, 2), "tanh", bias=True)), tokens),
    "deep_linear": (MLP(MLPConfig((3, 3, 2), "identity")), tokens),
    "convnet": (ConvNet(ConvNetConfig((2, 2), outputs=2, activation="gelu", bias=True)), images),
}


def generator(key):
    """NumPy's generator seeded by a key of JAX: it draws small arrays without compiling anything."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def generic_params(module, inputs, random, std=0.6):
    """A point with every entry N(0, std^2), biases and LayerNorm scales included, in the module's shapes and dtypes."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), inputs)["params"]
    return jax.tree.map(lambda leaf: jnp.asarray(std * random.standard_normal(leaf.shape), leaf.dtype), shapes)


def build(model, loss, key):
    """The objective and the parameters of one case."""
    random, (module, draw) = generator(key), MODELS[model]
    inputs, predict = draw(random), from_linen(module)
    params = generic_params(module, inputs, random)
    shape = jax.eval_shape(predict, params, inputs).shape
    drawn = random.standard_normal(shape) if loss == "square" else random.integers(shape[-1], size=shape[:-1])
    return objective(predict, loss_by_name(loss), inputs, jnp.asarray(drawn)), params


CASES = {f"{model}/{loss}": partial(build, model, loss) for model in MODELS for loss in ("square", "cross_entropy")}
