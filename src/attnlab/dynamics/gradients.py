"""Probes of gradients: norms by block, the noise scale, sharpness along minibatch gradients."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array

from attnlab.checks import check_positive
from attnlab.curvature.operators import hessian
from attnlab.objectives import Objective
from attnlab.training.probe import Probe, TrainingState, probe
from attnlab.trees import leaf_names, ravel
from attnlab.types import Params, PRNGKey


def _gradient_norms(risk: Objective, params: Params) -> dict[str, Array]:
    gradient = jax.grad(risk)(params)
    norms = [jnp.linalg.norm(leaf.ravel()) for leaf in jax.tree.leaves(gradient)]
    return dict(zip(leaf_names(params), norms, strict=True))


def gradient_norms() -> Probe:
    """Probe: the Euclidean norm of the gradient in each leaf of the parameters, by name."""
    return probe(_gradient_norms)


def _noise(risk: Objective, params: Params) -> dict[str, Array]:
    count = jax.tree.leaves(risk.inputs)[0].shape[0]

    def squared(i: Array) -> Array:
        """The share of an example in the risk times the squared length of its gradient; 0 where nothing counts."""
        example = risk.on(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, i, 1))
        gradient = ravel(jax.grad(example)(params))
        share = (example.total() / risk.total()).astype(gradient.dtype)
        return jnp.where(share > 0, share * (gradient @ gradient), 0)

    mean = ravel(jax.grad(risk)(params))
    trace = jnp.sum(jax.lax.map(squared, jnp.arange(count))) - mean @ mean
    return {"trace": trace, "noise_scale": trace / (mean @ mean)}


def gradient_noise() -> Probe:
    """Probe: `trace` of the covariance of the examples' gradients, and the `noise_scale` trace / ||gradient||^2, the
    batch size at which noise and signal are equal (McCandlish et al., arXiv 1812.06162, equation 2.9).

    Exact over the objective's own examples (rows of inputs and targets), taken as the population, each with its share
    in the risk where there are weights or ignored labels. The loss must be a mean over examples.
    """
    return probe(_noise)


@dataclass(frozen=True)
class _BatchSharpness:
    resample: Callable[[PRNGKey, Objective], Objective]
    batches: int

    def __call__(
        self, risk: Objective, state: TrainingState, memory: tuple, key: PRNGKey
    ) -> tuple[dict[str, Array], tuple]:
        def one(key: PRNGKey) -> Array:
            batch = self.resample(key, risk)
            gradient = ravel(jax.grad(batch)(state.params))
            return gradient @ hessian(batch, state.params).flat_mv(gradient) / (gradient @ gradient)

        draws = jax.lax.map(one, jax.random.split(key, self.batches))
        error = jnp.std(draws, ddof=1) / self.batches**0.5
        return {"mean": jnp.mean(draws), "error": error}, memory


def batch_sharpness(resample: Callable[[PRNGKey, Objective], Objective], batches: int = 32) -> Probe:
    """Probe: E_B[g_B^T H_B g_B / ||g_B||^2] over minibatches drawn by `resample` (`mean`), with its standard `error`.

    The quantity that settles at 2 / learning rate under stochastic gradient descent (Andreyev & Beneventano, arXiv
    2412.20553). Raises `ValueError` for fewer than two batches, which bound no error.
    """
    check_positive(batches=batches)
    if batches < 2:
        raise ValueError(f"batches is {batches}; expected at least 2, for an error estimate.")
    return Probe(_BatchSharpness(resample, batches))
