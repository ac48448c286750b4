"""Chain of thought by regressions, features before a learner, and a transformer as a learner."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.icl.baselines import baseline, least_squares
from attnlab.icl.composition import chain_of_thought, examples_needed, filtered, with_features
from attnlab.icl.constructions import newton_layers, newton_predict
from attnlab.icl.models import init_transformer, transformer_predict
from attnlab.icl.tasks import Prompt, composition_prompts, isotropic, sample_prompts, sine_features, sine_prompts
from attnlab.models.attention import AttentionConfig
from attnlab.models.transformer import TransformerConfig
from compare import assert_close

DIMENSION, WIDTH, LENGTH, BATCH = 3, 2, 16, 200


@pytest.fixture
def composed(key):
    """Prompts, the steps of their contexts, and how many examples each of them needs."""
    prompts, steps = composition_prompts(key, DIMENSION, WIDTH, LENGTH, BATCH)
    steps = steps[:, :-1]
    return prompts, steps, jax.vmap(lambda s: examples_needed(s, DIMENSION))(steps)


def errors_beyond(composed, offset, learner=least_squares):
    """Squared errors with `offset` examples beyond those needed, of the prompts that are long enough."""
    prompts, steps, needed = composed

    def one(prompt, steps, needed):
        kept = jnp.arange(LENGTH) < needed + offset
        found = chain_of_thought(learner, filtered(prompt, kept), jnp.where(kept[:, None], steps, 0))
        return (found - prompt.target) ** 2

    return np.asarray(jax.jit(jax.vmap(one))(prompts, steps, needed))[np.asarray(needed) <= LENGTH]


def test_exact_with_the_examples_needed_and_not_with_one_fewer(composed):
    assert np.quantile(errors_beyond(composed, 0), 0.95) < 1e-20
    assert np.median(errors_beyond(composed, -1)) > 1e-4


def test_examples_needed_by_counting(composed):
    _, steps, needed = composed
    for found, seen in zip(needed[:20], np.asarray(steps[:20]), strict=True):
        lengths = [n for n in range(1, LENGTH + 1) if all((seen[:n, j] > 0).sum() >= DIMENSION for j in range(WIDTH))]
        assert found == (lengths[0] if lengths else LENGTH + 1)


def test_attention_layers_take_the_place_of_least_squares(composed):
    """Newton's iteration in linear attention, for the steps and for the label; it is stable up to lambda = 20."""

    def attention(prompt):
        return newton_predict(newton_layers(len(prompt.query), 28, 0.005, prompt.query.dtype), prompt)

    prompts, steps, _ = composed
    found, expected = (
        jax.jit(jax.vmap(lambda p, s, learner=learner: chain_of_thought(learner, p, s)))(prompts, steps)
        for learner in (attention, least_squares)
    )
    assert jnp.quantile(jnp.abs(found - expected), 0.9) < 1e-8  # eigenvalues near 0 take some prompts longer


def test_filter_leaves_regression_alone(key):
    prompt = jax.tree.map(lambda x: x[0], sample_prompts(key, isotropic(DIMENSION, 0.3), LENGTH, 1))
    kept = jnp.arange(LENGTH) % 2 == 0
    halved = Prompt(prompt.inputs[::2], prompt.labels[::2], prompt.query, prompt.target)
    for learner in (least_squares, baseline("ridge", penalty=0.3)):
        assert_close(learner(filtered(prompt, kept)), learner(halved), 1e-11)


def test_sine_tasks_are_linear_in_their_features(key):
    """Least squares is exact from two examples on; descent converges to it; in plain inputs it is far off."""
    prompts = sine_prompts(key, 8, 100)

    def risk(model):
        return jnp.mean((jax.vmap(model)(prompts) - prompts.target) ** 2)

    assert risk(with_features(sine_features, least_squares)) < 1e-20
    descents = [
        risk(with_features(sine_features, baseline("gradient_descent", steps=n, step_size=1.0))) for n in (1, 10, 100)
    ]
    assert descents[0] > 10 * descents[1] > 100 * descents[2]
    assert risk(least_squares) > 0.5 * jnp.mean(prompts.target**2)
    assert risk(baseline("nearest_neighbours", neighbours=1)) > 0.1


def test_transformer_ignores_the_order_of_examples_and_reads_their_labels(key):
    attention = AttentionConfig(key_dim=4, value_dim=4, heads=2, output_dim=8)
    config = TransformerConfig(attention, layers=2, mlp_width=16, final_norm=True)
    params = init_transformer(key, config, DIMENSION, 8)
    model = partial(transformer_predict, params, config=config)
    prompt = jax.tree.map(lambda x: x[0], sample_prompts(key, isotropic(DIMENSION), 5, 1))
    swapped = Prompt(prompt.inputs[::-1], prompt.labels[::-1], prompt.query, prompt.target)
    assert_close(model(swapped), model(prompt), 1e-11)
    turned = Prompt(prompt.inputs, -prompt.labels, prompt.query, prompt.target)
    assert abs(model(turned) - model(prompt)) > 1e-3


def test_bad_steps_are_refused(composed):
    prompts, steps, _ = composed
    prompt, seen = jax.tree.map(lambda x: x[0], (prompts, steps))
    with pytest.raises(ValueError, match=r"steps have shape \(15, 2\); expected \(N, width\) with N = 16"):
        chain_of_thought(least_squares, prompt, seen[1:])
    with pytest.raises(ValueError, match=r"steps have shape \(16,\)"):
        chain_of_thought(least_squares, prompt, seen[:, 0])
