"""The multilayer perceptron and the convolutional network against loops in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive_models import convnet as naive_convnet
from naive_models import mlp as naive_mlp

from attnlab.models.adapters import from_linen
from attnlab.models.networks import MLP, ConvNet, ConvNetConfig, MLPConfig
from attnlab.trees import leaf_names
from cases import generator, generic_params
from compare import assert_close

NETWORKS = {
    "mlp": (MLP(MLPConfig((4, 3))), (3, 5), naive_mlp),
    "mlp_biases": (MLP(MLPConfig((4, 6, 2), "gelu", bias=True)), (3, 5), naive_mlp),
    "one_layer": (MLP(MLPConfig((2,), "tanh")), (3, 5), naive_mlp),
    "deep_linear": (MLP(MLPConfig((5,) * 4, "identity")), (3, 5), naive_mlp),
    "convnet": (ConvNet(ConvNetConfig((2, 3), outputs=4)), (3, 5, 6, 2), naive_convnet),
    "convnet_biases": (ConvNet(ConvNetConfig((2,), 3, 5, "tanh", bias=True)), (3, 4, 4, 1), naive_convnet),
    "even_kernel": (ConvNet(ConvNetConfig((2,), 3, 2, "gelu")), (3, 4, 4, 1), naive_convnet),
}
NAMES = {
    "mlp": ("layer_0", "layer_1"),
    "one_layer": ("layer_0",),
    "mlp_biases": ("layer_0", "layer_0_bias", "layer_1", "layer_1_bias", "layer_2", "layer_2_bias"),
    "convnet": ("conv_0", "conv_1", "output"),
    "convnet_biases": ("conv_0", "conv_0_bias", "output", "output_bias"),
}


def network(name, key, dtype=jnp.float64):
    module, shape, naive = NETWORKS[name]
    random = generator(key)
    inputs = jnp.asarray(random.standard_normal(shape), dtype)
    return module, generic_params(module, inputs, random), inputs, naive


@pytest.mark.parametrize("name", NETWORKS)
def test_network_is_the_loop(key, name):
    module, params, inputs, naive = network(name, key)
    numbers = jax.tree.map(np.asarray, params)
    expected = np.stack([naive(numbers, example, module.config) for example in np.asarray(inputs)])
    assert_close(module.apply({"params": params}, inputs), expected, 1e-13)


def test_deep_linear_network_is_one_product(key):
    module, params, inputs, _ = network("deep_linear", key)
    product = jnp.linalg.multi_dot([params[f"layer_{index}"] for index in range(4)])
    assert_close(module.apply({"params": params}, inputs), inputs @ product, 1e-13)


@pytest.mark.parametrize("name", ["mlp_biases", "convnet_biases"])
def test_leading_axes_jit_and_vmap_change_nothing(name):
    module, params, inputs, _ = network(name, jax.random.key(1))
    predict = from_linen(module)
    outputs = jax.jit(predict)(params, inputs)
    assert_close(predict(params, inputs), outputs, 1e-13)
    assert_close(jax.vmap(predict, (None, 0))(params, inputs), outputs, 1e-13)
    assert_close(predict(params, inputs[:, None]), outputs[:, None], 1e-13)
    assert_close(predict(params, inputs[0]), outputs[0], 1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_parameter_names(name):
    assert leaf_names(network(name, jax.random.key(1))[1]) == NAMES[name]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", ["mlp_biases", "convnet_biases"])
def test_dtype_is_that_of_the_inputs(name, dtype):
    module, params, inputs, _ = network(name, jax.random.key(1), dtype)
    arrays = (params, module.apply({"params": params}, inputs))
    assert {leaf.dtype for leaf in jax.tree.leaves(arrays)} == {jnp.dtype(dtype)}


BAD_NETWORKS = [
    (lambda: MLPConfig(()), r"widths is \(\); expected a tuple of at least one width"),
    (lambda: MLPConfig((3, 0)), r"widths\[1\] is 0; expected a positive whole number"),
    (lambda: MLPConfig((3,), activation="sine"), "no activation 'sine'"),
    (lambda: ConvNetConfig((), 2), r"channels is \(\)"),
    (lambda: ConvNetConfig((2,), 0), "outputs is 0"),
    (lambda: ConvNetConfig((2,), 2, kernel=0), "kernel is 0"),
    (lambda: MLP(MLPConfig((3,))).init(jax.random.key(0), jnp.ones((0, 3))), r"shape \(0, 3\), which holds no element"),
    (lambda: ConvNet(ConvNetConfig((2,), 2)).init(jax.random.key(0), jnp.ones((8, 8))), "height, width, channels"),
]


@pytest.mark.parametrize(("make", "message"), BAD_NETWORKS)
def test_bad_network(make, message):
    with pytest.raises(ValueError, match=message):
        make()
