"""Results show themselves in a line, in a notebook as a table or a picture, and in `al.plot` as axes."""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from flax import linen as nn
from matplotlib.figure import Figure

import attnlab as al
from attnlab.display import brief, html_table, line
from attnlab.margin import attention_risk, normalized_descent
from attnlab.statistics import Estimate


@pytest.fixture(scope="module")
def results():
    layer = al.SelfAttention(al.AttentionConfig(key_dim=3, value_dim=2))
    tokens, targets = jax.random.normal(jax.random.key(0), (4, 5, 6)), jnp.zeros((4, 5, 2))
    params = layer.init(jax.random.key(1), tokens)["params"]
    risk = al.objective(al.from_linen(layer), al.square_loss, tokens, targets)
    operator = al.hessian(risk, params)
    descent = al.update_rule("gd", 0.1)
    options = {"steps": 20, "every": 10, "probes": {"edge": al.stability(descent)}}
    return {
        "objective": risk,
        "operator": operator,
        "attention": al.attention_hessian(risk, params),
        "density": al.spectral_density(operator, jax.random.key(2), samples=4, steps=8),
        "pairs": al.eigenpairs(operator, jax.random.key(3), 3),
        "run": al.train(risk, params, descent.transformation, jax.random.key(4), **options),
    }


@pytest.fixture(scope="module")
def margin():
    tokens = jnp.array([[[2.0, 0.0], [0.0, 0.0], [1.0, 1.5]]])
    problem = al.attention_problem(tokens, jnp.array([[1.0, 0.0]]), np.array([0]))
    risk = attention_risk(tokens, jnp.ones(1), readout=jnp.array([1.0, 0.0]))
    solved = al.max_margin(problem)
    direction = solved.direction[:, 0]
    probes = {"margin": al.margin_probe({"svm": direction})}
    start = {"prompt": jnp.array([0.5, 1.0])}
    run = al.train(risk, start, normalized_descent(1.0), jax.random.key(0), steps=8, every=2, probes=probes)
    radii = jnp.array([1.0, 4.0, 16.0])
    return solved, run, al.regularization_path(risk, jnp.array([0]), start, radii), direction


@pytest.fixture
def axes():
    figure = Figure()
    return figure.subplots()


def test_lines_are_short_and_say_the_numbers(results, margin):
    solved, trained, path, _ = margin
    for result in (*results.values(), solved, trained, path, trained.state, results["attention"].block("value", "key")):
        assert len(repr(result)) < 320, repr(result)
        assert "\n" not in repr(result)
    assert repr(results["operator"]).startswith("Operator(dimension=48, dtype=float64, blocks=[key, query, value]")
    assert "samples=4, steps=8" in repr(results["density"])
    assert "steps=20" in repr(results["run"])
    assert repr(solved).startswith("MaxMargin(margin=1.664, gap=")
    assert "status=SOLVED, support=2 of 2 rows" in repr(solved)
    assert "loss=square," in repr(results["objective"])
    assert repr(Estimate(jnp.array(2.5), jnp.array(0.125), 9)) == "Estimate(2.5 ± 0.125, samples=9)"


def test_many_numbers_are_counted_and_traced_ones_named():
    assert brief(np.zeros((2, 1000))) == "float64[2, 1000]"
    assert brief(np.arange(3)) == "[0, 1, 2]"
    assert line("Thing", values=[{"a": np.zeros(5)}] * 7) == "Thing(values=<7 leaves, 35 numbers>)"
    seen = []
    jax.jit(lambda x: seen.append(repr(Estimate(x, x, 3))) or x)(jnp.ones(()))
    assert seen == ["Estimate(float64[] ± float64[], samples=3)"]


def test_every_result_can_be_shown_while_it_is_traced(results):
    for name in ("operator", "attention", "density", "pairs", "objective"):
        seen = []
        jax.jit(lambda thing, seen=seen: seen.append(repr(thing)) or jnp.zeros(()))(results[name])
        assert seen[0].startswith(type(results[name]).__name__)


def test_an_operator_of_many_leaves_names_the_first():
    params = {f"layer_{i}": jnp.ones(2) for i in range(9)}
    risk = al.objective(lambda params, x: sum(params.values()) * x, al.square_loss, jnp.ones(2), jnp.zeros(2))
    assert "layer_5, 3 more" in repr(al.hessian(risk, params))


def test_tables_hold_the_norms_and_are_escaped(results):
    table = results["attention"]._repr_html_()
    norm = float(results["attention"].norms()["functional"]["query", "key"])
    assert f"<td>{brief(norm)}</td>" in table
    assert html_table(("<a>", "b"), [("x & y", 1.5)]) == (
        "<table><thead><tr><th>&lt;a&gt;</th><th>b</th></tr></thead>"
        "<tbody><tr><th>x &amp; y</th><td>1.5</td></tr></tbody></table>"
    )
    assert results["pairs"]._repr_html_().count("<tr>") == 4
    assert "data:image/png;base64," in results["density"]._repr_html_()


def test_density_draws_the_estimate(results, axes):
    assert al.plot.density(results["density"], axes=axes, width=0.01) is axes
    grid, drawn = axes.lines[0].get_data()
    expected = results["density"].density(jnp.asarray(grid), 0.01).value
    shown = drawn > drawn.max() * 1e-5
    np.testing.assert_allclose(drawn[shown], np.asarray(expected)[shown], rtol=1e-12)


def test_spectrum_draws_every_eigenvalue_and_its_sign(axes):
    values = np.array([-0.5, 2.0, 1e-3])
    al.plot.spectrum(values, axes=axes)
    drawn = {(float(x), float(y)) for one in axes.lines for x, y in zip(*one.get_data(), strict=True)}
    assert drawn == {(1, 2.0), (2, 0.5), (3, 1e-3)}


def test_blocks_draw_the_matrix(results, axes):
    for result in (results["operator"], results["attention"]):
        figure = Figure()
        image = al.plot.blocks(result, axes=figure.subplots()).images[0].get_array()
        matrix = np.abs(np.asarray(results["operator"].dense()))
        large = matrix > matrix.max() * 1e-5
        np.testing.assert_allclose(np.asarray(image)[large], np.log10(matrix[large]), atol=1e-6)


def test_block_norms_draw_each_pair_and_leave_zeros_out(results, axes):
    al.plot.block_norms(results["attention"], axes=axes)
    drawn = {one.get_label(): one.get_xdata() for one in axes.lines}
    assert len(drawn["$H_f$"]) == 5  # not of value with value, where the layer is linear
    norms = results["attention"].norms()["ggn"]
    expected = sorted(float(norms[pair]) for pair in results["attention"].ggn)
    np.testing.assert_allclose(sorted(drawn["$H_o$"]), expected)


def test_training_draws_losses_and_probes_by_path(results, axes):
    al.plot.training(results["run"], axes=axes)
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), results["run"].records.losses)
    ratio = al.plot.training(results["run"].records, "edge/ratio", axes=Figure().subplots())
    np.testing.assert_array_equal(ratio.lines[0].get_ydata(), results["run"].records.values["edge"]["ratio"])
    assert ratio.lines[1].get_ydata() == [1, 1]
    with pytest.raises(ValueError, match="edge/rat"):
        al.plot.training(results["run"], "edge/rat")


def test_margin_paths_of_runs_and_of_regularisation(margin, axes):
    _, run, path, direction = margin
    al.plot.margin_path(run, axes=axes)
    expected = 1 - np.asarray(run.records.values["margin"]["correlation/svm"])
    np.testing.assert_allclose(axes.lines[0].get_ydata(), np.maximum(expected, np.finfo(float).eps))
    drawn = al.plot.margin_path(path, direction, axes=Figure().subplots()).lines[0].get_ydata()
    assert drawn[-1] < drawn[0]
    with pytest.raises(ValueError, match="direction is None; expected the max-margin direction"):
        al.plot.margin_path(path)


def test_other_results_are_an_error_that_says_what_makes_the_right_one(results):
    with pytest.raises(TypeError, match="result is a Eigenpairs; expected a SpectralDensity"):
        al.plot.density(results["pairs"])
    with pytest.raises(ValueError, match=r"values has shape \(2, 2\); expected \(n,\)"):
        al.plot.spectrum(np.eye(2))
    with pytest.raises(ValueError, match=r"the run has no margin_probe"):
        al.plot.margin_path(results["run"])


def test_axes_are_made_where_none_are_given(results):
    made = al.plot.density(results["density"])
    assert made.get_xlabel() == "eigenvalue"
    plt.close(made.figure)


def test_dense_models_show_too():
    model = nn.Dense(3, param_dtype=float)
    params = model.init(jax.random.key(0), jnp.ones((2, 4)))
    risk = al.objective(al.from_linen(model), al.cross_entropy, jnp.ones((2, 4)), jnp.array([0, 1]))
    assert "blocks=[bias, kernel]" in repr(al.hessian(risk, params["params"]))


def test_what_holds_placeholders_shows_itself_too(results, margin):
    """As trees of shapes do, and those that JAX prints when two trees do not match."""
    held = [results[name] for name in ("operator", "attention", "density", "pairs", "objective")]
    held += [results["run"].records, margin[0], Estimate(jnp.ones(()), jnp.ones(()), 3)]
    for thing in held:
        for leaf in (None, "placeholder", jax.ShapeDtypeStruct((2, 3), jnp.float64)):
            shown = repr(jax.tree.map(lambda _, leaf=leaf: leaf, thing))
            assert shown.startswith(type(thing).__name__)
            assert len(shown) < 400
