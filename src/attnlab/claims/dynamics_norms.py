"""Claims about the edge of rules whose step is the steepest in a norm, exact on quadratics."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from attnlab.claims.registry import claim
from attnlab.dynamics.norms import LargestBlock, LargestEntry, Norm
from attnlab.dynamics.rules import Shampoo, SignDescent, edge_of_step
from attnlab.expectation import Expectation, at_least, at_most, equal
from attnlab.types import Params, PRNGKey

SIZE, RATE, MOMENTA = 8, 0.05, (0.0, 0.5, 0.9)


def _quadratic(key: PRNGKey) -> Float[Array, "n n"]:
    root = jax.random.normal(key, (SIZE, SIZE))
    return root @ root.T + jnp.eye(SIZE)


def _best_signs(matrix: Array) -> tuple[Array, float]:
    """The corner of the cube with the largest <d, H d>, and that: all of them are looked at."""
    corners = np.array(list(itertools.product((1.0, -1.0), repeat=SIZE)))
    values = np.einsum("ci,ij,cj->c", corners, np.asarray(matrix), corners)
    return jnp.asarray(corners[values.argmax()]), float(values.max())


@claim(
    statement=r"w_{t+1} = w_t - \eta \|g_t\|_* d(g_t) \text{ converges from every start} \iff \eta \max_{\|d\| \le 1} d^\top H d < 2",
    source="arXiv 2603.05002 for networks; on quadratics derived here",
    because="at 2 % below the edge 4,000 steps suffice for every start; on the ray of the maximiser a step multiplies by "
    "1 - eta S, which is -1.04 there; the plain eigenvalue, the negative control, is far below 2 / eta at one edge and above it "
    "at the other",
    slow=True,
)
def each_norm_has_its_own_edge(key: PRNGKey) -> list[Expectation]:
    """Sign descent whose step has the length of the gradient's sum, and descent on the steepest of two blocks, on a
    random quadratic whose sharpness in the norm is found among all corners and by the blocks' eigenvalues."""
    matrix = _quadratic(key)
    signs, sharpest = _best_signs(matrix)
    half = SIZE // 2
    values, vectors = np.linalg.eigh(np.stack([matrix[:half, :half], matrix[half:, half:]]))
    block = int(values[:, -1].argmax())
    alone = np.zeros((2, half))
    alone[block] = vectors[block, :, -1]
    cases: list[tuple[Norm, Array, float]] = [
        (LargestEntry(), signs, sharpest),
        (LargestBlock(), jnp.asarray(alone.ravel()), float(values[block, -1])),
    ]
    below, factors, plain = [], [], []
    for norm, direction, sharpness in cases:
        start = jax.random.normal(key, (SIZE,))
        below.append(_shrinks(norm, matrix, 0.98 * 2 / sharpness, start))
        factors.append(
            float(_step(norm, matrix, 1.02 * 2 / sharpness, direction) @ direction / (direction @ direction))
        )
        plain.append(float(1.02 * 2 / sharpness * np.linalg.eigvalsh(matrix)[-1] / 2))
    return [
        at_most("length left below the edge: entries, blocks", below, 1e-3),
        equal("factor of a step on the ray, 2 % above the edge: entries, blocks", factors, -1.04, 1e-10),
        at_most("eta lambda_1 / 2 at the edge of the entries", plain[0], 0.99),
        at_least("the same at that of the blocks", plain[1], 1.0),
    ]


def _as_blocks(norm: Norm, w: Array) -> Params:
    return list(jnp.split(w, 2)) if isinstance(norm, LargestBlock) else [w]


def _step(norm: Norm, matrix: Array, rate: float, w: Array) -> Array:
    return w - rate * jnp.concatenate(norm.descent(_as_blocks(norm, matrix @ w)))


def _shrinks(norm: Norm, matrix: Array, rate: float, start: Array) -> float:
    walk = jax.jit(lambda w: jax.lax.fori_loop(0, 4000, lambda _, w: _step(norm, matrix, rate, w), w))
    return float(jnp.linalg.norm(walk(start)) / jnp.linalg.norm(start))


@claim(
    statement=r"\text{sign descent with momentum } \beta \text{ swaps } \pm\tfrac{\eta}{2} d \text{ exactly where}"
    r" \max_{\|d\|_\infty \le 1} d^\top H d = \frac{2 + 2\beta}{(1 - \beta)\, \eta_{\mathrm{eff}}},\quad"
    r" \eta_{\mathrm{eff}} = \eta / \|m\|_1",
    source="derived here",
    tolerance=1e-8,
    because="an identity in float64; without the factor of the momentum, the negative control, it is off by that factor",
)
def signs_with_momentum_oscillate_at_their_edge(key: PRNGKey) -> list[Expectation]:
    """At the corner of the largest curvature, momentum 0, 0.5 and 0.9: optax's own step, twice."""
    matrix = _quadratic(key)
    direction, sharpness = _best_signs(matrix)
    returns, ratios, plain = [], [], []
    for momentum in MOMENTA:
        rule = SignDescent(RATE, momentum)
        w = RATE / 2 * direction
        moment = -(1 - momentum) / (1 + momentum) * (matrix @ w)
        state = optax.tree.set(rule.transformation.init(w), ema=moment)
        edge = edge_of_step(rule, rule.transformation, matrix @ w, state, w)
        with jax.numpy_dtype_promotion("standard"):
            updates, _ = rule.transformation.update(matrix @ w, state, w)
        returns.append(float(jnp.linalg.norm(2 * w + updates) / jnp.linalg.norm(w)))
        ratios.append(float(sharpness / edge.threshold))
        plain.append(float(sharpness * edge.rate / 2))
    law = [(1 + momentum) / (1 - momentum) for momentum in MOMENTA]
    return [
        equal("||w' + w|| over ||w||, by momentum", returns, 0.0),
        equal("sharpness over threshold, by momentum", ratios, 1.0),
        equal("sharpness over 2 / effective rate, by momentum", plain, law),
    ]


ROWS, COLUMNS, DRAWS = 4, 5, 8


@claim(
    statement=r"\sqrt{\operatorname{tr} L}\; L^{-1/2} G_T R^{-1/2} = U\, \mathrm{Adafactor}(U^\top G_1 V, \dots, U^\top G_T V)\, V^\top,"
    r" \qquad L = \tfrac1T \sum_t G_t G_t^\top = U \Lambda U^\top,\; R = \tfrac1T \sum_t G_t^\top G_t = V M V^\top",
    source="Vyas et al., arXiv 2409.11321, claim 1",
    tolerance=1e-7,
    because="exact but for the counting of optax, whose decay is of single precision; Adam's mean squares in the same basis, "
    "those of SOAP and the negative control, are no product and differ by 20 to 35 %",
)
def shampoo_is_adafactor_in_its_own_basis(key: PRNGKey) -> list[Expectation]:
    """The last step for a sequence of random gradients, once by powers of matrices, once by optax's Adafactor of the
    rotated gradients with the weight 1 - 1/t on the past, a plain average."""
    scales = jnp.linspace(0.5, 2.0, ROWS)
    draws = jax.random.normal(key, (DRAWS, ROWS, COLUMNS))
    gradients = np.asarray(jnp.einsum("i,tij->tij", scales, draws))
    left, right = np.einsum("tij,tkj->ik", gradients, gradients), np.einsum("tij,tik->jk", gradients, gradients)
    (low, u), (high, v) = np.linalg.eigh(left / DRAWS), np.linalg.eigh(right / DRAWS)
    roots = (u / np.sqrt(low)) @ u.T, (v / np.sqrt(high)) @ v.T
    expected = np.sqrt(low.sum()) * roots[0] @ gradients[-1] @ roots[1]
    turned = np.einsum("ki,tkl,lj->tij", u, gradients, v)
    rule = optax.scale_by_factored_rms(decay_rate=1.0, min_dim_size_to_factor=1)
    point = jnp.zeros((ROWS, COLUMNS))
    state = rule.init(point)
    with jax.numpy_dtype_promotion("standard"):
        for gradient in turned:
            update, state = rule.update(jnp.asarray(gradient), state, point)
    entries = turned[-1] / np.sqrt(np.mean(turned**2, axis=0))
    size = np.linalg.norm(expected)
    return [
        equal("||difference|| / ||step||", np.linalg.norm(u @ np.asarray(update) @ v.T - expected) / size, 0.0, 1e-7),
        at_least("the same for Adam's mean squares", np.linalg.norm(u @ entries @ v.T - expected) / size, 0.1),
    ]


@claim(
    statement=r"(G G^\top)^{-1/4}\, G\, (G^\top G)^{-1/4} = U V^\top, \qquad G = U \Sigma V^\top",
    source="Bernstein, Newhouse, arXiv 2409.20325, section 2; Carlson et al. 2015",
    tolerance=1e-8,
    because="exact up to rounding beside the 1e-12 that is added to vanishing eigenvalues; with the memory of one step more, "
    "the negative control, one is 20 to 70 % away from 1",
)
def shampoo_without_memory_is_spectral_descent(key: PRNGKey) -> list[Expectation]:
    """The first step of Shampoo without averages on a random rectangular gradient, against its singular vectors."""
    first, second = jax.random.normal(key, (2, ROWS, COLUMNS))
    left, _, right = np.linalg.svd(np.asarray(first), full_matrices=False)
    steps = []
    for rule, gradients in ((Shampoo(1.0, b1=0.0, b2=0.0), [first]), (Shampoo(1.0, b1=0.0, b2=0.5), [second, first])):
        state = rule.transformation.init(first)
        with jax.numpy_dtype_promotion("standard"):
            for gradient in gradients:
                update, state = rule.transformation.update(gradient, state, first)
        steps.append(-np.asarray(update))
    values = np.linalg.svd(steps[1], compute_uv=False)
    return [
        equal("largest entry of the difference", np.abs(steps[0] - left @ right).max(), 0.0, 1e-8),
        at_least("with memory: the farthest singular value from 1", np.abs(values - 1).max(), 0.1),
    ]
