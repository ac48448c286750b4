"""Closed forms of learning coefficients against each other and against integrals."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

from attnlab.curvature import hessian
from attnlab.degeneracy.exact import deep_linear, normal_crossing, reduced_rank
from attnlab.degeneracy.laplace import laplace
from attnlab.degeneracy.quadrature import crossing_energy, two_layer_energy
from attnlab.objectives import objective
from attnlab.risks.degenerate import crossing_risk, deep_linear_risk, turned


def test_two_layers_are_a_deep_network():
    for inputs, outputs, hidden in itertools.product(range(1, 6), repeat=3):
        for rank in range(min(inputs, outputs, hidden) + 1):
            assert reduced_rank(inputs, outputs, hidden, rank) == pytest.approx(
                deep_linear((inputs, hidden, outputs), rank)
            )


def test_products_of_numbers_are_normal_crossings():
    for depth in range(1, 6):
        assert deep_linear((1,) * (depth + 1), 0) == pytest.approx(normal_crossing((1,) * depth))


def test_a_truth_of_full_rank_and_one_layer_are_regular():
    assert deep_linear((3, 4), 0).value == 6
    assert deep_linear((3, 4), 3).value == 6
    for widths, rank in (((3, 2, 4), 2), ((4, 3, 3, 4), 3)):
        assert deep_linear(widths, rank).value == rank * (widths[0] + widths[-1] - rank) / 2


def test_no_coefficient_exceeds_half_the_entries_of_the_product():
    for widths in itertools.product(range(1, 5), repeat=4):
        for rank in range(min(widths) + 1):
            exact = deep_linear(widths, rank)
            assert 0 < exact.value < widths[0] * widths[-1] / 2 + 1e-12
            assert exact.multiplicity >= 1


SHAPES = [(m, n, h) for m in range(1, 6) for n in range(1, 6) for h in (1, 2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_two_layers_against_the_integral_over_singular_values(shape):
    exact = reduced_rank(*shape, 0)
    assert two_layer_energy(*shape, 1e12) == pytest.approx(exact.at(np.log(1e12)), abs=8e-3)
    if exact.multiplicity > 1:  # or the correction would not be seen
        assert abs(two_layer_energy(*shape, 1e12) - exact.value) > 0.03


def test_quadratures_against_scipy():
    def density(y, x):
        return np.exp(-100 * (x * y) ** 2 - (x**2 + y**2) / 2)

    def energy(y, x):
        return 100 * (x * y) ** 2 * density(y, x)

    top, bottom = (scipy.integrate.dblquad(f, 0, 7, 0, 7, epsabs=1e-7)[0] for f in (energy, density))
    assert crossing_energy((1, 1), 100.0) == pytest.approx(top / bottom, rel=1e-5)
    assert two_layer_energy(1, 1, 1, 100.0) == pytest.approx(top / bottom, rel=1e-5)
    top, bottom = (scipy.integrate.quad(lambda w, p=p: w**p * np.exp(-50 * w**4 - w**2), 0, 9)[0] for p in (4, 0))
    assert crossing_energy((2,), 50.0, 2.0) == pytest.approx(50 * top / bottom, rel=1e-9)


def test_turned_risks_have_the_same_values_and_curvature(key):
    risk, params = deep_linear_risk((3, 2, 2), 1)
    moved_risk, moved = turned(key, risk, params, padding=3)
    assert moved.shape == (13,)
    assert float(moved_risk(moved)) == pytest.approx(0, abs=1e-12)
    spectra = [jnp.linalg.eigvalsh(hessian(r, p).dense()) for r, p in ((risk, params), (moved_risk, moved))]
    np.testing.assert_allclose(jnp.sort(jnp.concatenate([spectra[0], jnp.zeros(3)])), spectra[1], atol=1e-12)


def test_the_quadratic_form_of_a_saddle_and_of_a_minimum():
    risk, origin = crossing_risk((1, 1))
    flat = laplace(risk, origin, 100.0)
    assert (int(flat.rank), float(flat.coefficient)) == (0, 0.0)
    found = laplace(risk, jnp.array([2.0, 0.0]), 100.0, 3.0)  # curvature 2 w_1^2 = 8 in the other coordinate
    assert int(found.rank) == 1
    assert float(found.coefficient) == pytest.approx(0.5 * 800 / 803)
    assert float(found.log_determinant) == pytest.approx(np.log(8.0))
    saddle = objective(lambda w, x: x * (w[0] ** 2 - w[1] ** 2), lambda out, _: out, jnp.float64(1), jnp.zeros(1))
    assert float(laplace(saddle, jnp.zeros(2), 1.0, 3.0).coefficient) == pytest.approx(0.5 * (2 / 5 - 2 / 1))
    assert float(laplace(saddle, jnp.zeros(2), 1.0, 1.0).coefficient) == -np.inf


BAD = {
    "no powers": (lambda: normal_crossing(()), "exponents is empty; expected one or more"),
    "a power of zero": (lambda: normal_crossing((1, 0)), r"exponents\[1\] is 0; expected a positive whole number"),
    "a rank too high": (lambda: reduced_rank(2, 3, 2, 3), "rank is 3; expected 0 <= rank <= 2"),
    "one width": (lambda: deep_linear((3,), 0), r"widths is \(3,\); expected two or more"),
    "a width of zero": (lambda: deep_linear((3, 0), 0), r"widths\[1\] is 0; expected a positive"),
    "too many axes": (lambda: crossing_energy((1, 1, 1, 1), 10.0), r"len\(exponents\) is 4; expected 1 <="),
    "too wide": (lambda: two_layer_energy(3, 3, 3, 10.0), r"min\(hidden, inputs\) is 3; expected 1 <="),
    "a rank that is no width's": (lambda: deep_linear_risk((2, 1), 2), "rank is 2; expected 0 <= rank <= 1"),
    "no localization": (lambda: laplace(jnp.sum, jnp.ones(1), 1.0, 0.0), "localization is 0.0; expected"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(name):
    act, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        act()


def test_the_derivatives_of_powers_at_zero_are_numbers():
    risk, origin = crossing_risk((2, 3))
    assert jnp.isfinite(jax.hessian(risk)(origin)).all()
