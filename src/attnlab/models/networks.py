"""Networks without attention, to compare with: a multilayer perceptron and a small convolutional network."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from attnlab.checks import check_positive
from attnlab.models.initializers import initializer
from attnlab.models.layers import activation_by_name, bias_like, check_inputs, linear


@dataclass(frozen=True)
class MLPConfig:
    """Every choice of an MLP; hashable, so that it can be static under `jit`.

    Attributes:
        widths: width after each linear map, the last that of the outputs; their number is the depth.
        activation: between the linear maps, a key of `layers.ACTIVATIONS`; `identity` is the deep linear network.
        bias: add biases, zero at initialisation.
        init: name of the initialisation scheme of the matrices.
        gain: scale of that scheme.
    """

    widths: tuple[int, ...]
    activation: str = "relu"
    bias: bool = False
    init: str = "lecun_normal"
    gain: float = 1.0

    def __post_init__(self) -> None:
        _check_widths("widths", self.widths)
        activation_by_name(self.activation)
        initializer(self.init, self.gain)


class MLP(nn.Module):
    """Linear maps with an activation between them, none after the last: (..., D) to (..., widths[-1]).

    Parameters: `layer_0` (D x widths[0]), `layer_1`, ... and, with biases, `layer_0_bias`, ...
    """

    config: MLPConfig

    @nn.compact
    def __call__(self, inputs: Float[Array, "*B D"]) -> Float[Array, "*B O"]:
        """See the class."""
        check_inputs(inputs, ("features",))
        config, hidden = self.config, inputs
        init, activation = initializer(config.init, config.gain), activation_by_name(config.activation)
        for index, width in enumerate(config.widths):
            hidden = activation(hidden) if index else hidden
            hidden = linear(self, f"layer_{index}", hidden, width, init, config.bias)
        return hidden


@dataclass(frozen=True)
class ConvNetConfig:
    """Every choice of a `ConvNet`; hashable, so that it can be static under `jit`.

    Attributes:
        channels: channels after each convolution.
        outputs: width of the outputs.
        kernel: side of the square convolution kernels.
        activation: after each convolution, a key of `layers.ACTIVATIONS`.
        bias: add biases, zero at initialisation.
        init: name of the initialisation scheme of kernels and read-out; fan-in counts kernel^2 x channels in.
        gain: scale of that scheme.
    """

    channels: tuple[int, ...]
    outputs: int
    kernel: int = 3
    activation: str = "relu"
    bias: bool = False
    init: str = "lecun_normal"
    gain: float = 1.0

    def __post_init__(self) -> None:
        _check_widths("channels", self.channels)
        check_positive(outputs=self.outputs, kernel=self.kernel)
        activation_by_name(self.activation)
        initializer(self.init, self.gain)


class ConvNet(nn.Module):
    """Convolutions (stride 1, zero padding) each followed by the activation, a mean over the image, a linear read-out.

    Images (..., height, width, channels) to (..., outputs). Parameters: `conv_0` (kernel x kernel x channels x
    channels[0]), `conv_1`, ..., `output` (channels[-1] x outputs) and, with biases, `conv_0_bias`, ..., `output_bias`.
    """

    config: ConvNetConfig

    @nn.compact
    def __call__(self, inputs: Float[Array, "*B H W C"]) -> Float[Array, "*B O"]:
        """See the class."""
        check_inputs(inputs, ("height", "width", "channels"))
        config, hidden = self.config, inputs.reshape(-1, *inputs.shape[-3:])
        activation = activation_by_name(config.activation)
        for index, channels in enumerate(config.channels):
            hidden = activation(self._convolve(f"conv_{index}", hidden, channels))
        pooled = jnp.mean(hidden, axis=(-3, -2)).reshape(*inputs.shape[:-3], -1)
        return linear(self, "output", pooled, config.outputs, initializer(config.init, config.gain), config.bias)

    def _convolve(self, name: str, images: Float[Array, "N H W C"], channels: int) -> Float[Array, "N H W K"]:
        config = self.config
        shape = (config.kernel, config.kernel, images.shape[-1], channels)
        kernel = self.param(name, initializer(config.init, config.gain), shape, images.dtype)
        axes = ("NHWC", "HWIO", "NHWC")
        convolved = jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=axes)
        return convolved + bias_like(self, name, convolved) if config.bias else convolved


def _check_widths(name: str, widths: tuple[int, ...]) -> None:
    if not isinstance(widths, tuple) or not widths:
        raise ValueError(f"{name} is {widths!r}; expected a tuple of at least one width, such as (64, 10).")
    for index, width in enumerate(widths):
        check_positive(**{f"{name}[{index}]": width})
