"""The kinds of attention: one row of a table each, which models, moments and the closed form read."""

from attnlab.checks import unknown_name
from attnlab.models.weightings.base import ScoreDerivatives, Weighting
from attnlab.models.weightings.linear import LINEAR
from attnlab.models.weightings.sigmoid import SIGMOID
from attnlab.models.weightings.softmax import SOFTMAX
from attnlab.models.weightings.softmax_sink import SOFTMAX_SINK

__all__ = ["WEIGHTINGS", "ScoreDerivatives", "Weighting", "weighting"]

WEIGHTINGS: dict[str, Weighting] = {
    "softmax": SOFTMAX,
    "linear": LINEAR,
    "softmax_sink": SOFTMAX_SINK,
    "sigmoid": SIGMOID,
}


def weighting(kind: str) -> Weighting:
    """The row called `kind`; raises `ValueError` for an unknown one.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnlab.models.weightings import weighting
        >>> weighting("softmax_sink").weights(jnp.zeros((1, 3)), None).tolist()  # one of four shares goes nowhere
        [[0.25, 0.25, 0.25]]
    """
    if kind not in WEIGHTINGS:
        raise unknown_name("kind of attention weights", kind, WEIGHTINGS)
    return WEIGHTINGS[kind]
