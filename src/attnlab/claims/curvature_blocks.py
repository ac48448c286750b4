"""Claims about blocks of the Hessian: which of them are coupled, by how much, and what a step by blocks loses.

Three papers disagree: block-diagonal approximations err at order one (arXiv 2602.00816), steps by layers are nearly as
good as the whole matrix's (2510.09378), blocks decouple as the number of classes grows (2505.02809). Here each holds of
something else: classes of the last layer and units of a single hidden layer decouple, layers do not, and their steps are
good all the same. Shares are of squared Frobenius norms.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from attnlab.claims.instances import ROUNDING
from attnlab.claims.registry import claim
from attnlab.curvature import ggn, hessian
from attnlab.curvature.kronecker import approximate, pseudo_gradients, selection_of
from attnlab.curvature.partitions import (
    Partition,
    off_diagonal_share,
    off_diagonal_share_estimate,
    partition_by,
    partition_by_unit,
    solve_blocks,
)
from attnlab.expectation import Expectation, at_least, at_most, between, equal
from attnlab.losses import cross_entropy, square_loss
from attnlab.models.adapters import from_linen
from attnlab.models.attention import AttentionConfig, SelfAttention
from attnlab.objectives import objective
from attnlab.risks.networks import clusters
from attnlab.types import PRNGKey

CLASSES, STEPWISE, ORDER_ONE = "arXiv 2505.02809", "arXiv 2510.09378", "arXiv 2602.00816"
WIDTH = 8


def linear(weights: Array, inputs: Array) -> Array:
    """A linear classifier, or the last layer of a network."""
    return inputs @ weights


def share_between_classes(key: PRNGKey, classes: int, likely: int) -> float:
    """Of the Hessian of a linear classifier whose first classes, `likely` of them, are all but certain and as likely as
    each other."""
    inputs = jnp.concatenate([jnp.ones((20, 1)), jax.random.normal(key, (20, 4))], axis=1)
    weights = jnp.zeros((5, classes)).at[0, :likely].set(40.0)
    risk = objective(linear, cross_entropy, inputs, jnp.arange(20) % likely)
    return float(off_diagonal_share(hessian(risk, weights).dense(), partition_by_unit(weights)))


@claim(
    statement=r"1 - \sum_c \|H_{cc}\|^2 / \|H\|^2 = 1 / C \text{ for the last layer and } C \text{ classes that are as likely}",
    source=f"{CLASSES}; the constant is derived here",
    slow=True,
)
def classes_of_the_last_layer_decouple_as_one_over_their_number(key: PRNGKey) -> list[Expectation]:
    """Shares between classes of a linear classifier's Hessian, by autodiff: what counts is how many are likely."""
    numbers = (2, 5, 20)
    shares = [share_between_classes(key, classes, classes) for classes in numbers]
    control = share_between_classes(key, 20, 2)
    return [
        equal("shares of 2, 5 and 20 classes", shares, [1 / classes for classes in numbers], 1e-10, because=ROUNDING),
        equal("control: share of 20 classes of which 2 are likely", control, 0.5, 1e-10, because=ROUNDING),
    ]


def first_layer_share(key: PRNGKey, classes: int, depth: int) -> float:
    """Between the units of the first layer's block of the Gauss-Newton matrix, at initialisation."""
    risk, params = clusters(key, classes, count=128, width=WIDTH, hidden=(WIDTH,) * depth)
    block = ggn(risk, params, block="layer_0", check=False)
    return float(off_diagonal_share(block.dense(), partition_by_unit(block.point)))


@claim(
    statement=r"1 - \sum_i \|G_{ii}\|^2 / \|G\|^2 \sim 1 / C \text{ over the units } i \text{ of a single hidden layer; with more layers it stays}",
    source=f"{CLASSES} for one hidden layer; against it for more, derived here",
    slow=True,
    disagrees_with="arXiv 2505.02809 states that Hessians become block-diagonal as the number of classes grows. It holds between "
    "the classes of the last layer (exactly 1 / C where all are as likely) and the units of one hidden layer at "
    "initialisation; with three hidden layers the first layer's share between units, a mean over four draws, stays above .25 "
    "at 512 classes (widths of 8, Gaussian clusters). Their theorem is of one hidden layer: widths that grow with the classes could change our mind",
)
def units_decouple_with_classes_in_a_single_hidden_layer(key: PRNGKey) -> list[Expectation]:
    """One and three hidden layers from 32 to 512 classes, four draws of each. The slopes of the first layer meet the random
    last layer, whose second moment tends to the identity, through the fixed layers between, which keep them apart from it."""
    numbers = (32, 512)
    single, deep = (
        [np.mean([first_layer_share(each, classes, depth) for each in jax.random.split(key, 4)]) for classes in numbers]
        for depth in (1, 3)
    )
    exponent = np.log(single[1] / single[0]) / np.log(numbers[1] / numbers[0])
    because = "-1 in the mean; draws of 8 units scatter"
    return [
        between("one hidden layer: exponent of the share in the classes", exponent, -1.3, -0.7, because=because),
        at_least("three: share of 512 classes", deep[1], 0.25, because="of order one at any number of classes"),
        at_most("one: share of 512 classes", single[1], 0.1, because="the control: of the order of 8 / 512"),
    ]


@claim(
    statement=r"1 - \sum_l \|G_{ll}\|^2 / \|G\|^2 = O(1) \text{ over the layers } l, \text{ however many classes}",
    source=ORDER_ONE,
    slow=True,
)
def layers_stay_coupled_at_any_number_of_classes(key: PRNGKey) -> list[Expectation]:
    """Between the matrices of three hidden layers and of one, of 256 classes, from random vectors."""
    shares = {}
    for depth in (1, 3):
        risk, params = clusters(key, 256, count=128, width=WIDTH, hidden=(WIDTH,) * depth)
        operator = ggn(risk, params, check=False)
        shares[depth] = off_diagonal_share_estimate(operator, partition_by(params, str), key, samples=100)
    low = float(shares[3].value - 3 * shares[3].standard_error)
    high = float(shares[1].value + 3 * shares[1].standard_error)
    because = "three standard errors are taken off"
    return [
        at_least("three hidden layers: share less three standard errors", low, 0.25, because=because),
        at_most("control: one hidden layer, and three standard errors", high, 0.25, because=because),
    ]


def kept(matrix: np.ndarray, partition: Partition, gradient: np.ndarray, damping: float) -> tuple[float, float]:
    """Of the step by blocks: <g, (B + d)^-1 g>, and the decrease of the damped model at the best length; both relative
    to those of the whole matrix."""
    damped = matrix + damping * np.eye(len(matrix))
    whole = gradient @ np.linalg.solve(damped, gradient)
    step = np.asarray(solve_blocks(jnp.asarray(matrix), partition, jnp.asarray(gradient), damping))
    energy = gradient @ step
    return energy / whole, energy**2 / (step @ damped @ step) / whole


@claim(
    statement=r"\langle g, (B + \delta)^{-1} g \rangle \le L \langle g, (G + \delta)^{-1} g \rangle; \text{ steps by } L \text{ layers keep most of the decrease}",
    source=f"{STEPWISE}; the bound is derived here",
    slow=True,
)
def steps_by_layers_are_good_though_layers_are_coupled(key: PRNGKey) -> list[Expectation]:
    """Three hidden layers, the gradient's own step; with blocks of layers, and of units. G is at most L times its block
    diagonal, so that the step by blocks has at most L times the energy, and keeps at least that over L."""
    risk, params = clusters(key, 10, count=64, width=6, hidden=(6, 6, 6))
    matrix = np.asarray(ggn(risk, params, check=False).dense())
    gradient = np.asarray(ravel_pytree(jax.jit(jax.grad(risk))(params))[0])
    damping = 0.01 * float(np.linalg.eigvalsh(matrix)[-1])
    by_layer, by_unit = partition_by(params, str), partition_by_unit(params)
    share = float(off_diagonal_share(jnp.asarray(matrix), by_layer))
    energy, decrease = kept(matrix, by_layer, gradient, damping)
    units = kept(matrix, by_unit, gradient, damping)[1]
    coupled = np.array([[1.0, 0.99], [0.99, 1.0]])
    _, lost = kept(coupled, np.array([0, 1]), np.array([1.0, 0.5]), 1e-6)
    return [
        at_least("share of the matrix between layers", share, 0.25, because="they are coupled"),
        at_least("decrease by layers, of the whole matrix's", decrease, 0.6, because="0.75 to 0.8 in most draws"),
        at_most("decrease by units less that by layers", units - decrease, 0.0, because="0.05 to 0.2 less"),
        at_most("energy by layers over the number of layers", energy / 4, 1.0, because=ROUNDING),
        at_least("decrease by layers less energy over layers", decrease - energy / 4, 0.0, because=ROUNDING),
        at_most(
            "control: decrease by blocks of (1, .99; .99, 1) from (1, .5)", lost, 0.1, because="no law of matrices"
        ),
    ]


def cosine(first: Array, second: Array) -> float:
    """Of two matrices."""
    return float(jnp.vdot(first, second) / jnp.linalg.norm(first) / jnp.linalg.norm(second))


def attention_layer(key: PRNGKey) -> tuple[Array, dict[str, Array]]:
    """A query matrix's exact block of the Gauss-Newton matrix, and its approximations."""
    keys = jax.random.split(key, 3)
    layer = SelfAttention(AttentionConfig(key_dim=3, value_dim=4, output_dim=4))
    tokens, targets = jax.random.normal(keys[0], (4, 6, 5)), jax.random.normal(keys[1], (4, 6, 4))
    params = layer.init(keys[2], tokens)["params"]
    risk = objective(from_linen(layer), square_loss, tokens, targets)
    selection = selection_of(params, "query")
    (pseudo,) = pseudo_gradients(risk, params, selection).values()
    point = selection.take(params)
    names = ("kfac", "ekfac", "kfoc", "shampoo", "shampoo_squared", "soap")
    found = {name: approximate(name, (pseudo,), point).operator.dense() for name in names}
    return ggn(risk, params, block="query", check=False).dense(), found


@claim(
    statement=r"\cos(F, L \otimes R) \ge \cos(F, L^{1/2} \otimes R^{1/2}), \text{ and near that of the nearest product; K-FAC's is below where tokens mix}",
    source="Morwani et al., arXiv 2406.17748; for attention derived here",
    slow=True,
)
def shampoo_without_its_root_is_near_the_nearest_product(key: PRNGKey) -> list[Expectation]:
    """Cosines of Kronecker approximations with the exact block of an attention layer's query matrix."""
    exact, found = attention_layer(key)
    cosines = {name: cosine(exact, matrix) for name, matrix in found.items()}
    gain = cosines["shampoo_squared"] - cosines["shampoo"]
    over = max(cosines[name] for name in ("kfac", "shampoo", "shampoo_squared")) - cosines["kfoc"]
    return [
        at_least("cosine of L (x) R less that of the roots", gain, 0.02, because="0.04 to 0.11 in ten draws"),
        at_least("cosine of L (x) R over the nearest product's", cosines["shampoo_squared"] / cosines["kfoc"], 0.97,
                 because="one step of a power iteration from the identity"),
        at_most("cosines of K-FAC, Shampoo less the nearest product's", over, 0.0, 1e-9, because="it is the best product"),
        at_most("cosine of K-FAC less that of L (x) R", cosines["kfac"] - cosines["shampoo_squared"], 0.0,
                because="an output reads averages of tokens, and K-FAC the tokens"),
    ]  # fmt: skip
