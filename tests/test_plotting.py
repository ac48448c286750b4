"""What the pieces of figures draw: read back from the axes."""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from jax.tree_util import Partial

from attnlab.curvature import spectral_density
from attnlab.curvature.operator import Operator
from attnlab.plotting.curves import geometric_band, points_with_bars, power_guide, range_band
from attnlab.plotting.exponents import forest, slope_triangle
from attnlab.plotting.panels import legend_below, legend_beside, log_ticks, panels
from attnlab.plotting.spectra import draw_counts, shares_beyond


@pytest.fixture
def axes():
    figure, drawn = plt.subplots()
    yield drawn
    plt.close(figure)


PLACES = np.array([1.0, 2.0, 4.0])


def corners(axes):
    """Lowest and highest value of the band at each place."""
    points = axes.collections[0].get_paths()[0].vertices
    return [(np.min(points[points[:, 0] == x, 1]), np.max(points[points[:, 0] == x, 1])) for x in PLACES]


def test_a_geometric_band_is_of_the_logarithms(axes):
    values = np.exp(np.array([[0.0, 1.0, -1.0], [2.0, 3.0, 5.0]]))
    geometric_band(axes, PLACES, values, "C0")
    np.testing.assert_allclose(axes.lines[0].get_ydata(), np.exp([1.0, 2.0, 2.0]))
    np.testing.assert_allclose(corners(axes), np.exp([[0, 2], [1, 3], [-1, 5]]))


def test_a_geometric_band_leaves_out_what_has_no_logarithm(axes):
    geometric_band(axes, PLACES, np.array([[1.0, 0.0, 2.0], [1.0, 1.0, 2.0]]), "C0")
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), [1.0, 4.0])
    geometric_band(axes, PLACES, np.zeros((2, 3)), "C0")
    assert len(axes.lines) == 1


def test_a_range_band_is_the_median_in_the_range(axes):
    range_band(axes, PLACES, np.array([[1.0, 2.0, 9.0], [3.0, 3.0, 3.0], [5.0, 1.0, 4.0]]), "C0")
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [2.0, 3.0, 4.0])
    np.testing.assert_array_equal(corners(axes), [[1, 9], [3, 3], [1, 5]])


def test_guides_have_the_slope_that_they_name(axes):
    power_guide(axes, PLACES, 3.0, -2.0, "x")
    slope_triangle(axes, 1.0, 10.0, 2.0, 3.0)
    guide, triangle = (np.array(line.get_data()) for line in axes.lines)
    np.testing.assert_allclose(guide[1], 3 / PLACES**2)
    assert np.log10(triangle[1, 1] / triangle[1, 0]) == pytest.approx(3.0)
    assert triangle[1, 0] < 2.0
    assert [text.get_text() for text in axes.texts] == ["$x^{-2}$", "3"]


def test_bars_of_two_errors_stay_above_zero(axes):
    points_with_bars(axes, PLACES, np.array([1.0, 1.0, 8.0]), np.array([0.1, 3.0, 1.0]), "o")
    ends = [segment[:, 1] for segment in axes.collections[0].get_segments()]
    np.testing.assert_allclose(ends, [[0.8, 1.2], [0.1, 7.0], [6.0, 10.0]])


def test_a_forest_has_a_row_for_each_difference(axes):
    forest(axes, [0.5, -1.0], [0.2, np.nan], ["first", "second"], [0, 1])
    places = [container.lines[0].get_data() for container in axes.containers]
    np.testing.assert_array_equal(np.ravel(places), [0.5, 0, -1.0, 1])
    assert [text.get_text() for text in axes.texts] == ["first", "second"]


def test_counts_of_eigenvalues_beyond_each_modulus(axes):
    values = jnp.array([-2.0, 0.0, 1.0, 1.0, 4.0])
    density = spectral_density(Operator(Partial(jnp.multiply, values), values), jax.random.key(3), samples=4, steps=4)
    moduli, shares, errors = shares_beyond(density, 1)  # random signs see a diagonal matrix exactly
    assert set(np.round(moduli, 6)) == {1.0, 4.0}
    np.testing.assert_allclose(shares, np.where(np.isclose(moduli, 4.0), 1 / 5, 3 / 5), atol=1e-12)
    np.testing.assert_allclose(errors, 0, atol=1e-12)
    draw_counts(axes, density, 5, "C0", {1: "positive", -1: "negative"}.get)
    assert axes.get_legend_handles_labels()[1] == ["positive", "negative"]
    assert axes.lines[0].get_ydata()[-1] == pytest.approx(3)


def test_a_legend_below_names_each_label_once_and_holds_the_note():
    figure, shown = panels("message", ("one", "two"), note="what bands are")
    for each in shown:
        each.plot(PLACES, PLACES, label="same")
    shown[1].plot(PLACES, PLACES, label="other")
    legend_below(figure, shown)
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["same", "other"]
    assert (legend.get_title().get_text(), figure.get_supxlabel()) == ("what bands are", "")
    plt.close(figure)


def test_ticks_and_a_legend_of_one_panel(axes):
    axes.loglog(PLACES, PLACES, label="a line")
    log_ticks(axes.yaxis, 1, 2, 4)
    legend_beside(axes)
    axes.figure.canvas.draw()
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["1", "2", "4"]
    panel = axes.get_window_extent()
    assert axes.get_legend().get_window_extent().x0 >= panel.x1
