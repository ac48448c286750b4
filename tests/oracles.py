"""Slow naive twins of the fast routines: written from the definition with autodiff, and jitted only to save time."""

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree


@jax.jit
def hessian(risk, params):
    """`jax.hessian` of the risk in the flat parameters."""
    flat, unravel = ravel_pytree(params)
    return jax.hessian(lambda vector: risk(unravel(vector)))(flat)


@jax.jit
def ggn(risk, params):
    """J^T H_L J from the dense Jacobian of the flat outputs and the dense Hessian of the loss in them."""
    flat, unravel = ravel_pytree(params)
    outputs, unravel_outputs = ravel_pytree(risk.outputs(params))
    jacobian = jax.jacrev(lambda vector: ravel_pytree(risk.outputs(unravel(vector)))[0])(flat)
    curvature = jax.hessian(lambda vector: risk.loss(unravel_outputs(vector), risk.targets))(outputs)
    return jnp.einsum("oi,op,pj->ij", jacobian, curvature, jacobian)
