"""Exponents, fits and crossings of growing norms; the networks of the growth experiment against dense autodiff."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from attnlab.curvature import hessian
from attnlab.losses import square_loss
from attnlab.models.adapters import at_positions, from_linen
from attnlab.models.networks import MLP, MLPConfig
from attnlab.objectives import objective
from attnlab.risks.addition_networks import (
    AdditionNetwork,
    first_layer_squares,
    last_layer_norms,
    linear_mlp_norms,
    precision_error,
    with_embedding_scale,
)
from attnlab.risks.growth import (
    LINEAR_EXPONENTS,
    SOFTMAX_EXPONENTS,
    crossings,
    fitted_exponent,
    half_width,
    network_exponent,
    predicted_exponent,
)
from compare import assert_close

SCALES = np.geomspace(1e-2, 1, 9)
TINY = {"width": 4, "digits": 1, "sequences": 3, "dtype": "float64"}


def test_a_power_law_is_fitted_exactly_and_its_spread_is_the_sample_s():
    norms = np.stack([c * SCALES**p for c, p in ((1.0, 2.0), (3.0, 2.2), (0.1, 2.4))])
    slope, width = fitted_exponent(norms, SCALES, 1e-2, 1e-1)
    np.testing.assert_allclose(slope, 2.2, rtol=1e-12)
    # t(0.975, 2) = 4.302653, standard deviation 0.2
    np.testing.assert_allclose(width, 4.302652729911275 * 0.2 / 3**0.5, rtol=1e-9)


def test_the_fit_sees_the_range_alone():
    norms = np.where(SCALES < 0.11, SCALES**3, 1.0)[None]
    slope, width = fitted_exponent(norms, SCALES, 1e-2, 1e-1)
    np.testing.assert_allclose(slope, 3, rtol=1e-12)
    assert np.isnan(width)
    assert np.isnan(fitted_exponent(0 * norms, SCALES, 1e-2, 1e-1)[0])
    assert np.isnan(half_width(np.array([1.0])))


def test_exponents_of_networks():
    assert network_exponent("softmax", None, 1, "last", "hessian", "QQ") == 5
    assert network_exponent("softmax", None, 4, "last", "functional", "KQ") == 3
    assert network_exponent("softmax", None, 4, "first", "functional", "KQ") is None
    assert network_exponent("softmax", "pre", 4, "first", "hessian", "QQ") == 0
    assert [network_exponent("linear", None, depth, "last", "ggn", "QQ") for depth in (1, 2, 3)] == [6, 18, 54]


def test_crossings_of_two_powers():
    first, second = 5 * SCALES**3, SCALES**2  # equal at 1/5
    found = crossings(np.stack([first, second, first]), np.stack([second, first, 1e3 * second]), SCALES)
    np.testing.assert_allclose(found[0], 0.2, rtol=1e-12)
    assert np.isnan(found[1:]).all()  # overtaken the other way, and never


@pytest.mark.parametrize(
    ("table", "pair", "full"), [(SOFTMAX_EXPONENTS, "QQ", 5), (SOFTMAX_EXPONENTS, "VV", 2), (LINEAR_EXPONENTS, "KQ", 3)]
)
def test_the_exponent_of_the_whole_is_the_smaller(table, pair, full):
    assert predicted_exponent(table, "hessian", pair) == full


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "norm"), [("linear", None), ("softmax", "pre")])
def test_norms_of_both_layers_are_those_of_the_dense_hessian(weights, norm):
    key = jax.random.key(1)
    network = AdditionNetwork(weights, norm, 2, **TINY)
    params, (tokens, targets) = network.draw(key)
    params = with_embedding_scale(params, 0.7)
    predict = at_positions(from_linen(network.module), network.positions)
    risk = objective(predict, network.loss, tokens, targets)
    exact = last_layer_norms(network, params, (tokens, targets))
    for letter, name in (("V", "value"), ("Q", "query")):
        dense = hessian(risk, params, block=f"layer_1/attention/{name}", check=False).dense()
        assert_close(exact["hessian"][letter * 2], np.linalg.norm(dense))
        first = np.linalg.norm(hessian(risk, params, block=f"layer_0/attention/{name}", check=False).dense()) ** 2
        estimate = first_layer_squares(network, params, (tokens, targets), key, samples=64)["hessian"][letter * 2]
        assert abs(estimate.value - first) <= 4 * estimate.standard_error
        assert estimate.standard_error < first


def test_norms_of_a_linear_mlp_are_those_of_autodiff():
    key = jax.random.key(1)
    network = AdditionNetwork("linear", None, 1, **TINY)
    params, (tokens, targets) = network.draw(key)
    embedded = params["token_embedding"][tokens] + params["position_embedding"][None, : tokens.shape[1]]
    mlp = MLP(MLPConfig((4, 4, 12), activation="identity", init="normal", gain=0.8 / 2))
    inputs = embedded[:, np.asarray(network.positions)].reshape(-1, 4)
    weights = mlp.init(key, inputs)["params"]
    risk = objective(from_linen(mlp), square_loss, inputs, targets.reshape(-1, 12))
    found = linear_mlp_norms(network, 3, key)
    for place, layer in (("first", "layer_0"), ("last", "layer_2")):
        matrix, unravel = ravel_pytree(weights[layer])
        dense = jax.jit(jax.hessian(lambda w, layer=layer, unravel=unravel: risk({**weights, layer: unravel(w)})))(
            matrix
        )
        assert_close(found[place], np.linalg.norm(dense))


@pytest.mark.slow
def test_lower_precision_errs_by_its_rounding():
    network = AdditionNetwork("softmax", None, 1, **TINY)
    assert precision_error(network, jax.random.key(1), 0.5) == 0  # float64 against itself
    assert 1e-8 < precision_error(replace(network, dtype="float32"), jax.random.key(1), 0.5) < 1e-4


def test_a_scale_leaves_the_precision_alone():
    params, _ = replace(AdditionNetwork("softmax", None, 1, **TINY), dtype="float32").draw(jax.random.key(1))
    scaled = with_embedding_scale(params, np.float64(0.5))
    assert {leaf.dtype for leaf in jax.tree.leaves(scaled)} == {np.dtype("float32")}
