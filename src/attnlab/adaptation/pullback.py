"""Any objective in other parameters: theta = change(phi), and where its Hessian in phi comes from.

    H_phi = J^T H_theta J + sum_i g_i d2 theta_i / d phi^2,   J = d theta / d phi,   g = d risk / d theta:

the curvature of the risk seen through the change, and the curvature of the change seen through the gradient. The second
term vanishes where the gradient does, and is all there is in directions that J does not see.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from attnlab.curvature import Operator, hessian
from attnlab.objectives import Objective, objective
from attnlab.types import Params, PyTree


def reparametrise(risk: Objective, change: Partial) -> Objective:
    """`risk` as an objective in phi: it predicts with the parameters `change(phi)`."""
    return replace(risk, predict=Partial(_predict_after, change, risk.predict))


def _predict_after(change: Partial, predict: Partial, phi: Params, inputs: PyTree) -> PyTree:
    return predict(change(phi), inputs)


class Pullback(NamedTuple):
    """The two parts of the Hessian in new parameters, each an operator on them."""

    seen: Operator
    connection: Operator

    @property
    def total(self) -> Operator:
        """Their sum, the Hessian itself."""
        return self.seen + self.connection


def pullback(risk: Objective, change: Partial, phi: Params) -> Pullback:
    """J^T H_theta J and sum_i g_i d2 theta_i / d phi^2 at `phi`.

    Their sum is `hessian(reparametrise(risk, change), phi)`; errors as for `hessian`.
    """
    theta, jacobian = jax.linearize(change, phi)
    inner = hessian(risk, theta)
    seen = replace(inner, linear=Partial(_Through(), jacobian, inner.linear), point=phi)
    # with the gradient held fixed, <g, change(phi)> has the second part as its Hessian
    gradient = jax.grad(risk)(theta)
    along = objective(Partial(_change_first, change), _inner_product, gradient, gradient)
    return Pullback(seen, hessian(along, phi, check=False))  # its data are one gradient, not examples


@dataclass(frozen=True)
class _Through:
    def __call__(self, jacobian: Partial, linear: Partial, vector: Params) -> Params:
        return jax.linear_transpose(jacobian, vector)(linear(jacobian(vector)))[0]


def _change_first(change: Partial, phi: Params, _: PyTree) -> Params:
    return change(phi)


def _inner_product(left: PyTree, right: PyTree) -> jax.Array:
    return jax.tree.reduce(jnp.add, jax.tree.map(jnp.vdot, left, right))
