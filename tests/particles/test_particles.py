"""Token flows against loops, SciPy and derivatives; clusters against a search; refusals."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special

from attnlab.particles.clusters import cluster_labels, count_clusters, interaction_energy, metastable_count
from attnlab.particles.flow import attention_of, equiangular_tokens, token_flow, uniform_tokens, velocity
from attnlab.particles.laws import (
    equiangular_cosine,
    equiangular_rate,
    fastest_mode,
    mode_rates,
    self_attention_share,
)
from nightly import nightly

TIMES = jnp.array([0.0, 0.5, 1.5])


def naive_velocity(tokens, beta, value, normalised, causal):
    found = np.zeros_like(tokens)
    for i, x in enumerate(tokens):
        others = range(i + 1) if causal else range(len(tokens))
        masses = np.array([np.exp(beta * tokens[j] @ x) for j in others])
        masses = masses / (masses.sum() if normalised else len(masses))
        pull = sum(mass * value @ tokens[j] for mass, j in zip(masses, others, strict=True))
        found[i] = pull - (pull @ x) * x
    return found


KINDS = list(itertools.product((True, False), repeat=2))


@pytest.mark.parametrize("kind", nightly(KINDS, [(True, True), (False, False)]))
def test_the_velocity_against_a_loop_and_the_flow_against_scipy(key, kind):
    normalised, causal = kind
    tokens, value = uniform_tokens(key, 5, 3), jax.random.normal(key, (3, 3))
    options = {"normalised": normalised, "causal": causal}
    expected = naive_velocity(np.asarray(tokens), 1.7, np.asarray(value), normalised, causal)
    np.testing.assert_allclose(velocity(tokens, 1.7, value, **options), expected, atol=1e-12)

    def slope(_, flat):
        return naive_velocity(flat.reshape(5, 3), 1.7, np.asarray(value), normalised, causal).ravel()

    path = token_flow(tokens, TIMES, 1.7, value, tolerance=1e-11, **options)
    exact = scipy.integrate.solve_ivp(slope, (0, 1.5), np.asarray(tokens).ravel(), t_eval=TIMES, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(path.reshape(3, -1), exact.y.T, atol=1e-6)
    np.testing.assert_allclose(jnp.linalg.norm(path, axis=-1), 1.0, atol=1e-12)


def test_coarse_and_fine_steps_agree_within_the_tolerance(key):
    tokens = uniform_tokens(key, 6, 3)
    coarse, fine = (token_flow(tokens, TIMES, 2.0, tolerance=tolerance) for tolerance in (1e-5, 1e-10))
    assert 1e-10 < float(jnp.max(jnp.abs(coarse - fine))) < 1e-4


def test_attention_has_the_rows_it_should(key):
    tokens = uniform_tokens(key, 6, 3)
    np.testing.assert_allclose(attention_of(tokens, 2.0).sum(axis=1), 1.0)
    causal = attention_of(tokens, 2.0, causal=True)
    np.testing.assert_allclose(causal.sum(axis=1), 1.0)
    assert float(jnp.abs(jnp.triu(causal, 1)).max()) == 0


def test_equal_angles():
    tokens = equiangular_tokens(5, 0.3)
    np.testing.assert_allclose(tokens @ tokens.T, 0.3 + 0.7 * np.eye(5), atol=1e-12)
    cosine, step = 0.3, 1e-5
    for normalised in (True, False):
        moved = equiangular_cosine(cosine, jnp.array([0.0, step]), 5, 2.0, normalised=normalised)[1]
        rate = equiangular_rate(jnp.float64(cosine), 5, 2.0, normalised=normalised)
        assert float(moved - cosine) / step == pytest.approx(float(rate), rel=1e-4)
        speed = velocity(tokens, 2.0, normalised=normalised)
        assert float(2 * speed[0] @ tokens[1]) == pytest.approx(float(rate), rel=1e-12)


def test_a_rate_at_large_beta_does_not_overflow():
    assert float(equiangular_rate(jnp.float64(0.5), 10, 1e5)) == 0.0


@pytest.mark.parametrize("beta", [0.5, 9.0, 80.0])
def test_mode_rates_against_bessel_functions(beta):
    numbers = np.arange(1, 13)
    expected = numbers**2 * scipy.special.ive(numbers, beta) / (beta * scipy.special.ive(0, beta))
    np.testing.assert_allclose(mode_rates(beta, 12), expected, rtol=1e-9, atol=1e-15)
    assert fastest_mode(2.0) < fastest_mode(20.0) < fastest_mode(200.0)


def test_the_share_of_self_attention_is_that_of_the_tokens():
    tokens = equiangular_tokens(20, 0.4)
    share = self_attention_share(20, 1.3, 0.4)
    assert float(attention_of(tokens, 1.3 * np.log(20))[3, 3]) == pytest.approx(share)


def test_the_energy_is_greatest_where_all_agree(key):
    tokens = uniform_tokens(key, 7, 3)
    top = interaction_energy(jnp.broadcast_to(tokens[:1], tokens.shape), 2.0)
    assert float(top) == pytest.approx(np.exp(2.0) / 4)
    assert interaction_energy(tokens, 2.0) < top


def naive_clusters(tokens, close):
    labels, left = [-1] * len(tokens), set(range(len(tokens)))
    while left:
        first = min(left)
        queue = [first]
        while queue:
            i = queue.pop()
            if i in left:
                left.remove(i)
                labels[i] = first
                queue += [j for j in left if tokens[i] @ tokens[j] >= close]
    return labels


def test_clusters_against_a_search(each_key):
    tokens = uniform_tokens(each_key, 40, 2)
    for close in (0.9, 0.99, 0.9999):
        expected = naive_clusters(np.asarray(tokens), close)
        assert cluster_labels(tokens, close).tolist() == expected
        assert int(count_clusters(tokens, close)) == len(set(expected))


def test_a_chain_of_neighbours_is_one_cluster():
    angles = jnp.linspace(0, 3, 64)
    chain = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)
    assert int(count_clusters(chain, 0.998)) == 1


def test_the_stage_that_lasts_longest():
    times = np.array([0.0, 1, 2, 4, 8, 16, 32, 64])
    assert metastable_count(np.array([9, 6, 6, 3, 3, 3, 3, 1]), times) == (3, pytest.approx(16.0))
    with pytest.raises(ValueError, match=r"times end at 64 with 5 clusters.*expected a longer horizon"):
        metastable_count(np.array([9, 9, 9, 9, 9, 9, 9, 5]), times)


TOKENS = uniform_tokens(jax.random.key(0), 4, 3)
REFUSED = {
    "off the sphere": (
        lambda: token_flow(2 * TOKENS, TIMES, 1.0),
        "a row of length off 1 by 1; expected unit",
    ),
    "one token": (lambda: token_flow(TOKENS[:1], TIMES, 1.0), r"tokens has shape \(1, 3\); expected \(n, d\)"),
    "not a number": (lambda: token_flow(TOKENS.at[0].set(jnp.nan), TIMES, 1.0), "tokens has 3 non-finite"),
    "no beta": (lambda: token_flow(TOKENS, TIMES, 0.0), "beta is 0.0; expected"),
    "a negative beta": (lambda: token_flow(TOKENS, TIMES, -1.0), "beta is -1.0; expected"),
    "no horizon": (lambda: token_flow(TOKENS, jnp.zeros(1), 1.0), r"times has shape \(1,\); expected a vector"),
    "a horizon behind": (lambda: token_flow(TOKENS, -TIMES, 1.0), "expected ascending times"),
    "no tolerance": (lambda: token_flow(TOKENS, TIMES, 1.0, tolerance=0.0), "tolerance is 0.0; expected"),
    "a value of another size": (
        lambda: token_flow(TOKENS, TIMES, 1.0, jnp.eye(2)),
        r"value has shape \(2, 2\)",
    ),
    "an impossible angle": (lambda: equiangular_tokens(5, -0.5), "cosine is -0.5; expected -0.25 < cosine < 1"),
    "no beta in the law": (lambda: equiangular_cosine(0.1, TIMES, 3, 0.0), "beta is 0.0; expected"),
    "no beta of modes": (lambda: mode_rates(-2.0, 3), "beta is -2.0; expected"),
    "no modes": (lambda: mode_rates(2.0, 0), "modes is 0; expected a positive"),
    "no cosine": (lambda: count_clusters(TOKENS, 1.5), "close is 1.5; expected"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    act, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        act()
