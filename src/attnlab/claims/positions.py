"""Claims about what attention is given: its masks, positions, scores and tokens."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.special
import scipy.stats
from jaxtyping import Array

from attnlab.claims.instances import ROUNDING
from attnlab.claims.registry import claim
from attnlab.data.digits import patches
from attnlab.data.signals import frames, spectrogram
from attnlab.expectation import Expectation, at_least, at_most, equal
from attnlab.models import heads
from attnlab.models.attention import AttentionConfig, SelfAttention
from attnlab.models.positions import rotate, rotate_2d, sinusoidal, sinusoidal_shift
from attnlab.types import PRNGKey

VASWANI = "Vaswani et al., arXiv 1706.03762"


@claim(
    statement=r"f(P X) = P f(X); \text{ not so with positions}",
    source="derived here: a layer sees its tokens as a set",
    tolerance=1e-12,
    because=ROUNDING,
    slow=True,
)
def attention_is_equivariant_under_permutations(key: PRNGKey) -> list[Expectation]:
    """Outputs on permuted tokens, against permuted outputs; with sinusoidal positions the two differ by more than 1 %."""
    module = SelfAttention(AttentionConfig(key_dim=3, value_dim=3))
    tokens, order = jax.random.normal(key, (7, 6)), np.roll(np.arange(7), 1)
    params = module.init(key, tokens)["params"]

    def error(code: Array) -> float:
        plain, permuted = (jnp.asarray(module.apply({"params": params}, x + code)) for x in (tokens, tokens[order]))
        return float(jnp.linalg.norm(permuted - plain[order]) / jnp.linalg.norm(plain))

    positions = sinusoidal(jnp.arange(7.0), 6)
    return [
        equal("relative difference of the outputs", error(jnp.zeros_like(positions)), 0.0),
        at_least("the same with positions", error(positions), 0.01, because="the negative control"),
    ]


@claim(
    statement=r"PE(t + k) = R_k PE(t); \quad \langle PE(s), PE(t) \rangle \text{ is Toeplitz and symmetric}",
    source=f"{VASWANI}, section 3.5 (the linear map); the rotation and the Gram matrix: derived here",
    tolerance=1e-12,
    because=ROUNDING,
)
def sinusoidal_codes_are_shifted_by_rotations(key: PRNGKey) -> Expectation:
    """Codes of 9 positions from a random start, shifted by 3.5, and their Gram matrix against its first row."""
    positions = jnp.arange(9.0) + 100 * jax.random.uniform(key)
    codes = sinusoidal(positions, 16)
    shifted = codes @ sinusoidal_shift(3.5, 16).T
    gram = codes @ codes.T
    toeplitz = gram[0][np.abs(np.arange(9)[:, None] - np.arange(9)[None])]
    predicted = [sinusoidal(positions + 3.5, 16).ravel(), toeplitz.ravel()]
    return equal(
        "codes shifted by 3.5, and the Gram matrix",
        jnp.concatenate([shifted.ravel(), gram.ravel()]),
        jnp.concatenate(predicted),
        unit="relative",
    )


@claim(
    statement=r"\cos(PE(t), PE(t+1)) = \frac{\mathrm{Ci}(1) - \mathrm{Ci}(10^{-4})}{\ln 10^4} + \frac{\cos 1 - 1}{D} + O(D^{-2}) \approx 0.97",
    source="derived here: the mean of cos(w_i) over geometric frequencies. Neighbouring codes are far from orthogonal",
    tolerance=1e-4,
    because="the Euler-Maclaurin remainder is of order 1e-5 at D = 512",
)
def neighbouring_sinusoidal_codes_are_nearly_parallel(key: PRNGKey) -> Expectation:
    """Cosine of the codes of two neighbouring positions at width 512 from a random start."""
    first, second = sinusoidal(100 * jax.random.uniform(key) + jnp.arange(2.0), 512)
    integral = (scipy.special.sici(1.0)[1] - scipy.special.sici(1e-4)[1]) / np.log(1e4)
    return equal(
        "cosine of two neighbouring codes",
        first @ second / (jnp.linalg.norm(first) * jnp.linalg.norm(second)),
        integral + (np.cos(1) - 1) / 512,
        unit="relative",
    )


@claim(
    statement=r"\langle R_s q, R_t k \rangle \text{ is a Toeplitz matrix in } (s, t) \text{, and not a symmetric one; }"
    r"\text{ in 2-D it depends on both offsets alone}",
    source="Su et al., arXiv 2104.09864; asymmetry and two dimensions: derived here",
    tolerance=1e-12,
    because=ROUNDING,
    slow=True,
)
def rotary_scores_depend_on_offsets_alone(key: PRNGKey) -> list[Expectation]:
    """One query and one key in all pairs of 7 positions, and of the 9 places of a 3 x 3 grid shifted by (4, 9)."""
    query, other = jax.random.normal(key, (2, 8))
    places = jnp.arange(7.0)
    matrix = _every(rotate, query, places) @ _every(rotate, other, places).T
    codes = sinusoidal(places, 8)
    additive = (query[None] + codes) @ (other[None] + codes).T
    grid = jnp.meshgrid(jnp.arange(3.0), jnp.arange(3.0))
    planes = [
        _every(rotate_2d, query, *(x.ravel() + shift for x, shift in zip(grid, shifts, strict=True)))
        @ _every(rotate_2d, other, *(x.ravel() + shift for x, shift in zip(grid, shifts, strict=True))).T
        for shifts in ((0.0, 0.0), (4.0, 9.0))
    ]
    differ = [_relative(matrix, matrix.T), _relative(additive, _toeplitz(additive))]
    what = "departure from a symmetric matrix; of additive positions from a Toeplitz one"
    return [
        equal("scores of all pairs of positions", matrix, _toeplitz(matrix), unit="relative"),
        equal("scores on the shifted grid", planes[1], planes[0], unit="relative"),
        at_least(what, jnp.stack(differ), 0.01, because="the negative controls"),
    ]


def _every(turn: Callable[..., Array], vector: Array, *places: Array) -> Array:
    """The vector turned to each of the places."""
    return turn(jnp.broadcast_to(vector, (len(places[0]), vector.size)), *places)


def _toeplitz(matrix: Array) -> Array:
    """The Toeplitz matrix with the first row and first column of another."""
    return jax.scipy.linalg.toeplitz(matrix[:, 0], matrix[0])


def _relative(left: Array, right: Array) -> Array:
    return jnp.linalg.norm(left - right) / jnp.linalg.norm(right)


@claim(
    statement=r"D\,\mathbb{E}\cos^2 = 1, \quad \max_{i<j}|\cos| \text{ of } n \text{ random vectors has distribution } "
    r"I_{t^2}(\tfrac12, \tfrac{D-1}{2})^{n(n-1)/2}",
    source="derived here: cos^2 of independent directions is Beta(1/2, (D - 1)/2); pairs are nearly independent",
    tolerance=4.0,
    because="in standard errors over 20 draws",
    slow=True,
)
def random_directions_are_nearly_orthogonal(key: PRNGKey) -> Expectation:
    """Mean squared cosine and maximal |cosine| of 300 random vectors in 64 dimensions, 20 draws."""
    count, dim, draws = 300, 64, 20
    vectors = np.array(jax.random.normal(key, (draws, count, dim)))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    cosines = np.abs(np.einsum("rid,rjd->rij", vectors, vectors)[:, *np.triu_indices(count, 1)])
    grid = np.linspace(0, 1, 20_001)
    law = scipy.stats.beta.cdf(grid**2, 0.5, (dim - 1) / 2) ** (count * (count - 1) // 2)
    mean = np.trapezoid(1 - law, grid)
    deviation = np.sqrt(np.trapezoid(2 * grid * (1 - law), grid) - mean**2)
    squares = dim * (cosines**2).mean(axis=1)
    scale = np.array([squares.std(ddof=1), deviation]) / draws**0.5
    return equal(
        "D times the mean squared cosine; mean of the largest |cosine|",
        [squares.mean(), cosines.max(axis=1).mean()],
        [1.0, mean],
        standard_error=scale,
    )


@claim(
    statement=r"\mathrm{softmax}_j\big(w^\top (q_i + k_j)\big) \text{ does not depend on } q_i; \text{ with } \tanh \text{ it does}",
    source="derived here for the additive score of Bahdanau, Cho, Bengio, arXiv 1409.0473",
    tolerance=1e-12,
    because=ROUNDING,
)
def additive_attention_without_tanh_ignores_its_query(key: PRNGKey) -> list[Expectation]:
    """Spread over queries of the weights, without and with the activation."""
    queries, keys = jax.random.normal(key, (2, 7, 5))
    weight = jax.random.normal(jax.random.fold_in(key, 1), (5,))

    def spread(activation: Callable[[Array], Array]) -> Array:
        weights = heads.softmax_weights(heads.additive_scores(queries, keys, weight, activation))
        return jnp.max(jnp.abs(weights - weights[:1]))

    return [
        equal("spread of the weights over queries", spread(lambda x: x), 0.0),
        at_least("the same with tanh", spread(jnp.tanh), 0.01, because="the negative control"),
    ]


@claim(
    statement=r"\mathrm{Var}(q \cdot k) = d, \text{ while additive scores with } w \sim N(0, I/d) \text{ keep a variance below } 1",
    source=f"{VASWANI}, section 3.2.1 (the variance d); the additive score: derived here",
    tolerance=4.0,
    because="in standard errors of the variance over 20,000 draws; |tanh| < 1 bounds that of additive scores",
    slow=True,
)
def dot_products_grow_with_dimension_additive_scores_do_not(key: PRNGKey) -> list[Expectation]:
    """Variance over d of dot products, and that of additive scores, at d = 16 and 256."""
    found, bounded, errors = [], [], []
    for dim in (16, 256):
        left, right, weight = jax.random.normal(jax.random.fold_in(key, dim), (3, 20_000, dim))
        products = np.asarray(jnp.sum(left * right, axis=-1)) / dim**0.5
        additive = jnp.sum(weight * jnp.tanh(left + right), axis=-1) / dim**0.5
        found.append(products.var())
        bounded.append(jnp.var(additive))
        errors.append(np.std(products**2) / len(products) ** 0.5)
    return [
        equal("variance of dot products over d", found, 1.0, standard_error=errors),
        at_most("variance of additive scores", bounded, 1.0),
    ]


@claim(
    statement=r"\text{a patch embedding is a convolution whose stride is its kernel's side}",
    source="derived here",
    tolerance=1e-12,
    because=ROUNDING,
)
def patch_embedding_is_a_strided_convolution(key: PRNGKey) -> Expectation:
    """Patches of random images times a matrix, against XLA's convolution."""
    images, weight = jax.random.normal(key, (2, 8, 12)), jax.random.normal(key, (16, 5))
    embedded = patches(images, (4, 4)) @ weight
    kernel = weight.reshape(4, 4, 1, 5)
    layout = ("NHWC", "HWIO", "NHWC")
    found = jax.lax.conv_general_dilated(images[..., None], kernel, (4, 4), "VALID", dimension_numbers=layout)
    return equal("outputs of the convolution", found.reshape(embedded.shape), embedded, unit="relative")


@claim(
    statement=r"\text{spectrogram tokens hardly change with the phase of a tone; frames change by their own norm}",
    source="derived here: a phase turns the transform; a Hann window leaks as the cube of the frequency distance",
    because="1 % and 50 % stand for hardly and much",
)
def spectrograms_ignore_phase(key: PRNGKey) -> list[Expectation]:
    """A tone at a random frequency away from 0 and Nyquist, before and after a quarter turn of its phase."""
    frequency = 0.1 + 0.3 * jax.random.uniform(key)
    time = jnp.arange(1024.0)
    tones = jnp.sin(2 * jnp.pi * frequency * time), jnp.cos(2 * jnp.pi * frequency * time)

    def change(tokens: Callable[..., Array]) -> float:
        first, second = (tokens(tone, 128, 64) for tone in tones)
        return float(jnp.linalg.norm(first - second) / jnp.linalg.norm(first))

    return [
        at_most("relative change of the spectrogram", change(spectrogram), 0.01),
        at_least("relative change of the frames", change(frames), 0.5),
    ]
