"""Chain of thought: a composite function is learned in context one step at a time, each as a regression of its own.

A prompt of y = <v, relu(W x)> that also shows the steps s = relu(W x) of every example decomposes into regressions: of
s_j on x, over the examples with s_j > 0, where relu is the identity (the filter), and of y on s (Li et al., arXiv
2305.18869). With least squares both are solved exactly as soon as every step has d examples left, and there are enough
for y; any other in-context learner of linear functions, a stack of attention layers say, may take its place.
"""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.icl.diagnostics import Model
from attnlab.icl.tasks import Prompt, check_prompt
from attnlab.types import Scalar


def filtered(prompt: Prompt, kept: Array) -> Prompt:
    """The prompt with the inputs and labels of the examples outside `kept` (N,) set to zero.

    To a regression without an intercept such examples say nothing; means over the context still count them.
    """
    kept = jnp.where(kept, 1, 0).astype(prompt.labels.dtype)
    return replace(prompt, inputs=kept[:, None] * prompt.inputs, labels=kept * prompt.labels)


def chain_of_thought(learner: Model, prompt: Prompt, steps: Float[Array, "N width"]) -> Scalar:
    """Predict the steps of the query, then its label from them, both by `learner`, a model of linear functions.

    `steps` are those of the context, as `tasks.composition_prompts` draws them (leave out its last row, the query's).
    Raises `ValueError` for steps that are not one row an example.
    """
    check_prompt(prompt)
    if steps.ndim != 2 or len(steps) != len(prompt.labels):
        raise ValueError(
            f"steps have shape {steps.shape}; expected (N, width) with N = {len(prompt.labels)}, the length of the "
            "context. Leave out the query's steps, which are what is to be predicted."
        )

    def step(values: Float[Array, " N"]) -> Scalar:
        return jax.nn.relu(learner(filtered(replace(prompt, labels=values), values > 0)))

    return learner(Prompt(steps, prompt.labels, jax.vmap(step, in_axes=1)(steps), prompt.target))


def examples_needed(steps: Float[Array, "N width"], dimension: int) -> Array:
    """The least length of the context from which least squares finds every step: d examples with s_j > 0 for each j.

    N + 1 if N examples are not enough. For at most d steps the regression of the label on them is then determined too:
    any m of its columns meet d >= m rows, so that the rank is full for inputs of a continuous law. If that law is
    symmetric, each step is positive with probability 1/2, and one step alone is found from N examples with probability
    P(Binomial(N, 1/2) >= d).
    """
    counts = jnp.cumsum(steps > 0, axis=0)
    return 1 + jnp.sum(jnp.any(counts < dimension, axis=1))


def with_features(features: Callable[[Float[Array, " d"]], Float[Array, " p"]], learner: Model) -> Model:
    """The learner on prompts whose inputs and query went through `features` first.

    What an MLP before a linear attention layer makes of it: descent, or any other baseline, in feature space (von
    Oswald et al., arXiv 2212.07677). Sine tasks a sin(x + p) are linear in the features (sin x, cos x).
    """

    def model(prompt: Prompt) -> Scalar:
        return learner(replace(prompt, inputs=jax.vmap(features)(prompt.inputs), query=features(prompt.query)))

    return model
