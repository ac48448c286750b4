"""The table of attention layers on which the closed form is held against autodiff."""

import jax
import jax.numpy as jnp

from attnlab.attention import attention_hessian
from attnlab.losses import LOSSES
from attnlab.models.adapters import from_linen
from attnlab.models.attention import AttentionConfig, SelfAttention
from attnlab.models.positions import Rotary
from attnlab.objectives import objective

LENGTH, WIDTH = 5, 4


def layer_config(**options):
    return AttentionConfig(**{"key_dim": 3, "value_dim": 2, **options})


# name: (config, loss, leading shape of the inputs, mask: None, "shared" or "per_sequence")
CASES = {
    "one_head": (layer_config(), "square", (), None),
    "batch": (layer_config(), "square", (3,), None),
    "two_batch_axes": (layer_config(), "cross_entropy", (2, 2), None),
    "cross_entropy": (layer_config(value_dim=5), "cross_entropy", (2,), None),
    "wide_key": (layer_config(key_dim=6), "square", (2,), None),
    "temperature": (layer_config(scale=1.7), "cross_entropy", (2,), None),
    "no_scale_projection": (layer_config(scale=1.0, output_dim=3), "square", (2,), None),
    "causal": (layer_config(causal=True), "square", (2,), None),
    "mask": (layer_config(heads=2), "square", (2,), "shared"),
    "mask_per_sequence": (layer_config(causal=True), "cross_entropy", (2,), "per_sequence"),
    "merged": (layer_config(merged=True), "square", (2,), None),
    "merged_heads": (layer_config(merged=True, heads=2, output_dim=3), "cross_entropy", (2,), "shared"),
    "heads": (layer_config(heads=2), "cross_entropy", (2,), None),
    "heads_projection": (layer_config(heads=3, output_dim=4), "square", (2,), None),
    "heads_projection_labels": (layer_config(heads=2, output_dim=3, causal=True), "cross_entropy", (2,), None),
    "linear": (layer_config(weights="linear"), "square", (2,), None),
    "linear_causal": (layer_config(weights="linear", causal=True), "cross_entropy", (2,), None),
    "linear_merged": (layer_config(weights="linear", merged=True), "square", (2,), "per_sequence"),
    "sink_causal": (layer_config(weights="softmax_sink", causal=True), "square", (2,), None),
    "sink_merged": (layer_config(weights="softmax_sink", merged=True, heads=2), "square", (2,), "shared"),
    "sigmoid": (layer_config(weights="sigmoid", heads=2, output_dim=3), "cross_entropy", (2,), None),
    "sigmoid_mask": (layer_config(weights="sigmoid"), "square", (2,), "per_sequence"),
    "linear_heads_projection": (layer_config(weights="linear", heads=2, output_dim=3), "square", (2,), None),
    "shared_heads": (layer_config(heads=4, key_value_heads=2, output_dim=3), "square", (2,), None),
    "one_key_for_all": (layer_config(heads=2, key_value_heads=1), "cross_entropy", (2,), "shared"),
    "turned": (layer_config(key_dim=4, rotary=Rotary(base=20.0)), "square", (2,), None),
    "turned_shared": (
        layer_config(
            key_dim=4, heads=4, key_value_heads=2, output_dim=3, causal=True, rotary=Rotary(pairs="neighbours")
        ),
        "cross_entropy",
        (2,),
        None,
    ),
    "turned_sink": (
        layer_config(key_dim=4, weights="softmax_sink", rotary=Rotary(base=20.0, share=0.5)),
        "square",
        (2,),
        "per_sequence",
    ),
    "turned_linear": (
        layer_config(key_dim=2, weights="linear", causal=True, heads=2, rotary=Rotary(base=20.0)),
        "square",
        (2,),
        None,
    ),
    "turned_sigmoid": (layer_config(key_dim=2, weights="sigmoid", rotary=Rotary()), "cross_entropy", (2,), None),
}


def closed_form_of(config, loss, params, inputs, targets, mask=None, **options):
    """The closed form of the layer by itself."""
    return attention_hessian(risk_of(config, loss, inputs, targets, mask, **options), params)


def output_features(config):
    return config.output_dim or config.heads * config.value_dim


def random_mask(key, config, batch, kind):
    """Every query sees itself and about half of the others."""
    if kind is None:
        return None
    shape = (LENGTH, LENGTH) if kind == "shared" else (*batch, 1, LENGTH, LENGTH)
    return jax.random.bernoulli(key, 0.5, shape) | jnp.broadcast_to(jnp.eye(LENGTH, dtype=bool), shape)


def problem(name, key, dtype=jnp.float64, offset=0.0):
    """Config, loss, parameters, inputs, targets and mask of a case."""
    config, loss, batch, mask_kind = CASES[name]
    keys = jax.random.split(key, 4)
    inputs = jax.random.normal(keys[0], (*batch, LENGTH, WIDTH), jnp.float64)
    inputs = inputs + offset / WIDTH**0.5
    params = SelfAttention(config).init(keys[1], inputs)["params"]
    if loss == "square":
        targets = jax.random.normal(keys[2], (*batch, LENGTH, output_features(config)), jnp.float64).astype(dtype)
    else:
        targets = jax.random.randint(keys[2], (*batch, LENGTH), 0, output_features(config))
    params, inputs = jax.tree.map(lambda x: x.astype(dtype), (params, inputs))
    return config, loss, params, inputs, targets, random_mask(keys[3], config, batch, mask_kind)


def risk_of(config, loss, inputs, targets, mask=None, **options):
    """The empirical risk by way of the Flax module: all that the oracles see."""
    masks = {} if mask is None else {"mask": mask}
    return objective(from_linen(SelfAttention(config), **masks), LOSSES[loss], inputs, targets, **options)
