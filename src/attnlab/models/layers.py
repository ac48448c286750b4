"""What every model here is built of: a linear map, LayerNorm, activations by name, and the checks of their inputs."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from attnlab.checks import unknown_name
from attnlab.models.initializers import Initializer

Activation = Callable[[jax.Array], jax.Array]


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def _gelu_tanh(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


def _identity(x: jax.Array) -> jax.Array:
    return x


ACTIVATIONS: dict[str, Activation] = {
    "relu": jax.nn.relu,  # derivative 0 at 0, second derivative 0 everywhere
    "gelu": _gelu,  # x Phi(x) itself
    "gelu_tanh": _gelu_tanh,  # its tanh approximation, that of GPT-2
    "silu": jax.nn.silu,  # x sigmoid(x)
    "tanh": jnp.tanh,
    "identity": _identity,
}


def activation_by_name(name: str) -> Activation:
    """The activation called `name`, one of the keys of `ACTIVATIONS`; raises `ValueError` for another."""
    if name not in ACTIVATIONS:
        raise unknown_name("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]


def layer_norm(
    x: Float[Array, "*B D"], scale: Float[Array, " D"], bias: Float[Array, " D"], epsilon: float
) -> Float[Array, "*B D"]:
    """scale (x - mean) / sqrt(variance + epsilon) + bias over the last axis (Ba, Kiros, Hinton, arXiv 1607.06450).

    In the dtype of `x`, the variance from centred entries (E[x^2] - E[x]^2 cancels where the mean is large). With
    `epsilon` > 0 it is smooth everywhere, constant tokens included.
    """
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(centred**2, axis=-1, keepdims=True)
    normalized = centred * jax.lax.rsqrt(variance + epsilon)
    return normalized * jnp.broadcast_to(scale, x.shape) + jnp.broadcast_to(bias, x.shape)


class LayerNorm(nn.Module):
    """`layer_norm` with parameters `scale` (ones at initialisation) and `bias` (zeros), both (D,)."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """See the class."""
        scale, bias = (
            self.param(name, init, x.shape[-1:], x.dtype)
            for name, init in (("scale", nn.initializers.ones), ("bias", nn.initializers.zeros))
        )
        return layer_norm(x, scale, bias, self.epsilon)


def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, " D"], epsilon: float) -> Float[Array, "*B D"]:
    """scale x / sqrt(mean of x^2 + epsilon) over the last axis (Zhang, Sennrich, arXiv 1910.07467), in x's dtype."""
    mean_square = jnp.mean(x**2, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean_square + epsilon) * jnp.broadcast_to(scale, x.shape)


class RMSNorm(nn.Module):
    """`rms_norm` with the parameter `scale` (D,), ones at initialisation."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """See the class."""
        return rms_norm(x, self.param("scale", nn.initializers.ones, x.shape[-1:], x.dtype), self.epsilon)


NORMALIZATIONS: dict[str, type[LayerNorm] | type[RMSNorm]] = {"layer_norm": LayerNorm, "rms_norm": RMSNorm}


def linear(
    module: nn.Module, name: str, x: Float[Array, "*B I"], width: int, init: Initializer, bias: bool
) -> Float[Array, "*B O"]:
    """x W (+ b) with W (I x O) the parameter `name` of `module` and b, zero at initialisation, its `{name}_bias`.

    Both are made in the dtype of `x`.
    """
    # As one product of two matrices: with more axes the products of its derivatives, which sum over all but the last
    # axis, are no matrix products to XLA, and a Gauss-Newton product takes 1.4 to 2 times as long on a CPU.
    rows = x.reshape(-1, x.shape[-1])
    projected = rows @ module.param(name, init, (x.shape[-1], width), x.dtype)
    projected = projected + bias_like(module, name, projected) if bias else projected
    return projected.reshape(*x.shape[:-1], width)


def bias_like(module: nn.Module, name: str, x: Float[Array, "*B O"]) -> Float[Array, "*B O"]:
    """The parameter `{name}_bias` of `module` (zero at initialisation), repeated over the leading axes of `x`."""
    bias = module.param(f"{name}_bias", nn.initializers.zeros, x.shape[-1:], x.dtype)
    return jnp.broadcast_to(bias, x.shape)


def check_inputs(inputs: jax.Array, axes: tuple[str, ...]) -> None:
    """Raise unless `inputs` are real floating-point numbers, at least one, that end in the named `axes`.

    Raises `ValueError` for the shape, `TypeError` for the dtype.
    """
    if inputs.ndim < len(axes):
        raise ValueError(f"inputs have shape {inputs.shape}; expected (..., {', '.join(axes)}). Add the missing axes.")
    if inputs.size == 0:
        raise ValueError(f"inputs have shape {inputs.shape}, which holds no element; expected at least one example.")
    if not jnp.issubdtype(inputs.dtype, jnp.floating):
        raise TypeError(
            f"inputs have dtype {inputs.dtype}; expected real floating-point numbers. "
            "Cast them, or embed tokens with a LanguageModel."
        )
