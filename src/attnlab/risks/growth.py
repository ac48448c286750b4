"""How the blocks of the Hessian grow with the scale sigma of the tokens: predicted exponents, and fitted ones.

Ormaniec, Dangel, Singh, arXiv 2410.10986, section 4. A pair of letters names a block: V values, Q queries, K keys,
O the output projection.
"""

from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy.stats import t as student

Exponents = dict[str, dict[str, int | None]]

# Exponents as sigma -> 0. The projection W_O enters like the values, but with a functional block g_i m_i^T of its own;
# None is a block that is zero.
SOFTMAX_EXPONENTS: Exponents = {
    "ggn": {"VV": 2, "OO": 2, "OV": 2, "QQ": 6, "KK": 6, "KQ": 6, "QV": 4, "KV": 4, "OQ": 4, "KO": 4},
    "functional": {"VV": None, "OO": None, "OV": 1, "QQ": 5, "KK": 5, "KQ": 3, "QV": 3, "KV": 3, "OQ": 3, "KO": 3},
}
LINEAR_EXPONENTS: Exponents = {
    "ggn": dict.fromkeys(("VV", "QQ", "KK", "KQ", "QV", "KV"), 6),
    "functional": {"VV": None, "QQ": None, "KK": None, "KQ": 3, "QV": 3, "KV": 3},
}


def predicted_exponent(table: Exponents, part: str, pair: str) -> int | None:
    """The exponent of one block of a single layer: of `hessian` the smaller of its parts'; None where it is zero."""
    if part != "hessian":
        return table[part][pair]
    orders = [order for kind in table if (order := table[kind][pair]) is not None]
    return min(orders, default=None)


def network_exponent(
    weights: Literal["softmax", "linear", "none"],
    norm: Literal["pre"] | None,
    depth: int,
    place: str,
    part: str,
    pair: str,
) -> float | None:
    """The exponent of a block of the `first` or `last` of `depth` attention layers, in the scale of the embeddings;
    without attention (`none`) of a linear MLP.

    None where the block is zero or no exponent is known. Pre-LN makes a layer's inputs, and at small sigma all behind
    it, independent of sigma. The last of D layers of linear attention sees tokens of order sigma^(3^(D-1)). In first
    layers H_o has the order of a layer by itself.
    """
    if weights == "none":
        return 2.0
    if norm == "pre":
        return 0.0
    if weights == "linear" and depth > 1:
        return 2.0 * 3**depth if part == "ggn" else None
    if place == "first" and depth > 1 and part != "ggn":
        return None
    return predicted_exponent(SOFTMAX_EXPONENTS if weights == "softmax" else LINEAR_EXPONENTS, part, pair)


def fitted_exponent(
    norms: Float[np.ndarray, "seeds points"], scales: Float[np.ndarray, "points"], low: float, high: float
) -> tuple[float, float]:
    """Mean over the seeds of the slope of log norm against log sigma on [low, high], and its 95 % half-width.

    The half-width (Student's t) is NaN for one seed; both are NaN where fewer than two scales with norms above zero
    lie in the range.
    """
    slack = 1e-3
    inside = (scales >= low * (1 - slack)) & (scales <= high * (1 + slack)) & np.all(norms > 0, axis=0)
    if inside.sum() < 2:
        return np.nan, np.nan
    slopes = np.polyfit(np.log(scales[inside]), np.log(norms[:, inside]).T, 1)[0]
    return float(np.mean(slopes)), half_width(slopes)


def half_width(sample: Float[np.ndarray, "seeds"]) -> float:
    """Half the 95 % confidence interval of the mean (Student's t); NaN for a sample of one."""
    count = len(sample)
    return float(student.ppf(0.975, count - 1) * np.std(sample, ddof=1) / count**0.5) if count > 1 else np.nan


def geometric_mean(values: Float[np.ndarray, "n"]) -> float:
    """Over what is known; NaN where nothing is."""
    return float(np.exp(np.nanmean(np.log(values)))) if np.isfinite(values).any() else np.nan


def crossing_summary(values: Float[np.ndarray, "seeds"]) -> str:
    """Geometric mean and 95 % interval over the seeds that cross; how many do, where fewer than two."""
    logs = np.log(values[np.isfinite(values)])
    if len(logs) < 2:
        return f"{len(logs)} of {len(values)} seeds cross"
    middle, width = np.exp(np.mean(logs)), half_width(logs)
    return f"{middle:.3g} ({middle * np.exp(-width):.3g} to {middle * np.exp(width):.3g})"


def crossings(
    first: Float[np.ndarray, "seeds points"],
    second: Float[np.ndarray, "seeds points"],
    scales: Float[np.ndarray, "points"],
) -> Float[np.ndarray, "seeds"]:
    """Scale at which every seed's first norm overtakes its second for the first time; NaN where it never does.

    Linear in the logarithms between the two scales on either side.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.log(first / second)
    return np.array([_crossing(ratio, np.log(scales)) for ratio in ratios])


def _crossing(ratio: np.ndarray, scales: np.ndarray) -> float:
    above = np.flatnonzero((ratio[:-1] < 0) & (ratio[1:] >= 0))
    if len(above) == 0:
        return np.nan
    i = above[0]
    share = -ratio[i] / (ratio[i + 1] - ratio[i])
    return float(np.exp(scales[i] + share * (scales[i + 1] - scales[i])))
