"""Training deep linear attention on prompts that are drawn afresh at every step."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.checks import check_positive
from attnlab.icl.models import stack_predict
from attnlab.icl.tasks import Prompt, isotropic, sample_prompts
from attnlab.losses import square_loss
from attnlab.models.adapters import from_function
from attnlab.objectives import Objective, objective
from attnlab.types import Params, PRNGKey


def merged_stack_predict(params: dict[str, Float[Array, "L D D"]], prompts: Prompt) -> Float[Array, " batch"]:
    """Predictions of a stack of linear layers that each hold two matrices: `query_key` Q_l and `value` P_l.

    Layer l adds (1/N) (Z Q_l Z_c^T) Z_c P_l to the tokens Z (N + 1, D), with Z_c the N of the context (Ahn et al.,
    arXiv 2310.01082, section 2, rows for their columns).
    """
    identity = jnp.eye(params["value"].shape[-1], dtype=params["value"].dtype)
    layers = [
        {"query": query_key, "key": identity, "value": value, "output": identity}
        for query_key, value in zip(params["query_key"], params["value"], strict=True)
    ]
    return jax.vmap(lambda prompt: stack_predict(layers, prompt))(prompts)


@dataclass(frozen=True)
class FreshPrompts:
    """A `resample` for `train`: `batch` new prompts of `length` examples at each step, x and w ~ N(0, I)."""

    dimension: int
    length: int
    batch: int

    def __call__(self, key: PRNGKey, risk: Objective) -> Objective:
        """The risk on new prompts."""
        prompts = sample_prompts(key, isotropic(self.dimension), self.length, self.batch)
        return replace(risk, inputs=prompts, targets=prompts.target)


def stack_training(
    key: PRNGKey, *, layers: int, dimension: int, length: int, prompts: int, scale: float = 0.1
) -> tuple[Objective, Params]:
    """The square loss of a stack of `merged_stack_predict` on fixed prompts, and weights N(0, scale^2).

    Train with `resample=FreshPrompts(dimension, length, batch)` for the setting of Ahn et al.; the fixed prompts are
    what the probes see. Raises `ValueError` for sizes that are not positive.
    """
    check_positive(layers=layers, dimension=dimension, length=length, prompts=prompts)
    prompt_key, query_key, value_key = jax.random.split(key, 3)
    data = sample_prompts(prompt_key, isotropic(dimension), length, prompts)
    shape = (layers, dimension + 1, dimension + 1)
    params = {
        "query_key": scale * jax.random.normal(query_key, shape),
        "value": scale * jax.random.normal(value_key, shape),
    }
    return objective(from_function(merged_stack_predict), square_loss, data, data.target), params
