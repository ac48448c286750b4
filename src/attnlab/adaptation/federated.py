"""Federated averaging: clients descend on their own data, a server averages; how far that is from descent on all."""

import jax
import jax.numpy as jnp

from attnlab.adaptation.lora import Factors
from attnlab.checks import check_positive
from attnlab.objectives import Objective
from attnlab.trees import dimension
from attnlab.types import Params, Real


def descend(risk: Objective, params: Params, rate: Real, steps: int) -> Params:
    """`steps` steps of gradient descent."""

    def step(params: Params, _: None) -> tuple[Params, None]:
        return jax.tree.map(lambda leaf, slope: leaf - rate * slope, params, jax.grad(risk)(params)), None

    return jax.lax.scan(step, params, length=steps)[0]


def mean_over_clients(tree: Params) -> Params:
    """The mean over the first axis of every leaf."""
    return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), tree)


def federated_round(clients: Objective, params: Params, rate: Real, local_steps: int) -> Params:
    """One round of federated averaging (McMahan et al., arXiv 1602.05629) with equal weights.

    `clients` is an objective whose leaves have a first axis of clients (`jax.tree.map(stack, *risks)`).
    """
    check_positive(local_steps=local_steps)
    return mean_over_clients(jax.vmap(lambda risk: descend(risk, params, rate, local_steps))(clients))


def central_descent(clients: Objective, params: Params, rate: Real, steps: int) -> Params:
    """Gradient descent on the clients' mean risk."""
    check_positive(steps=steps)

    def step(params: Params, _: None) -> tuple[Params, None]:
        slopes = mean_over_clients(jax.vmap(lambda risk: jax.grad(risk)(params))(clients))
        return jax.tree.map(lambda leaf, slope: leaf - rate * slope, params, slopes), None

    return jax.lax.scan(step, params, length=steps)[0]


def drift(clients: Objective, params: Params, rate: Real, local_steps: int) -> Params:
    """Leading order of `federated_round` - `central_descent` over as many steps.

    rate^2 E (E - 1) / 2 [mean_m(H_m g_m) - mean(H) mean(g)] + O(rate^3), derived here: E steps of descent move by
    -rate E g + rate^2 E (E - 1) / 2 H g. Zero for one local step, or where all clients have the same data.
    """

    def gradient_and_product(risk: Objective, direction: Params | None) -> tuple[Params, Params]:
        gradient = jax.grad(risk)(params)
        vector = gradient if direction is None else direction
        return gradient, jax.jvp(jax.grad(risk), (params,), (vector,))[1]

    gradients, own = jax.vmap(lambda risk: gradient_and_product(risk, None))(clients)
    mean_gradient = mean_over_clients(gradients)
    common = mean_over_clients(jax.vmap(lambda risk: gradient_and_product(risk, mean_gradient)[1])(clients))
    factor = rate**2 * local_steps * (local_steps - 1) / 2
    return jax.tree.map(lambda mean, shared: factor * (mean - shared), mean_over_clients(own), common)


def averaging_bias(factors: Factors) -> dict[str, jax.Array]:
    """mean_m(B_m A_m) - mean(B) mean(A) of LoRA factors with a first axis of clients, exactly.

    Equal to the clients' mean of (B_m - mean B)(A_m - mean A): what averaging the factors loses against averaging the
    updates (derived here).
    """
    return {
        name: jnp.mean((pair["B"] - pair["B"].mean(0)[None]) @ (pair["A"] - pair["A"].mean(0)[None]), axis=0)
        for name, pair in factors.items()
    }


def communication_ratio(params: Params, factors: Factors) -> float:
    """Numbers in the adapted matrices over numbers in their factors: m n / (r (m + n)) a matrix."""
    full = sum(pair["B"].shape[-2] * pair["A"].shape[-1] for pair in factors.values())
    return full / dimension(factors)
