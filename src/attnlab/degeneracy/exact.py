"""Learning coefficients that are known exactly, with their multiplicity."""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

from attnlab.checks import check_range, check_whole


class Exact(NamedTuple):
    """The learning coefficient `value` (the real log canonical threshold) and its `multiplicity` m: the free energy is
    value log n - (m - 1) log log n + O(1)."""

    value: float
    multiplicity: int

    def at(self, log_scale: float) -> float:
        """n beta E[L(w) - L(w*)] for n beta of this logarithm, to first order: value - (m - 1) / log(n beta)."""
        return self.value - (self.multiplicity - 1) / log_scale


def normal_crossing(exponents: Sequence[int]) -> Exact:
    """Of K(w) = prod_i w_i^(2 k_i): the least 1 / (2 k_i), and how often it is attained.

    Watanabe, Algebraic Geometry and Statistical Learning Theory (2009), theorem 6.6.

    Example:
        >>> from attnlab.degeneracy.exact import normal_crossing
        >>> normal_crossing((1, 2, 2))
        Exact(value=0.25, multiplicity=2)
    """
    if not exponents:
        raise ValueError("exponents is empty; expected one or more positive whole numbers k_i of w_i^(2 k_i).")
    for place, exponent in enumerate(exponents):
        check_whole(**{f"exponents[{place}]": exponent})
    return Exact(1 / (2 * max(exponents)), list(exponents).count(max(exponents)))


def reduced_rank(inputs: int, outputs: int, hidden: int, rank: int) -> Exact:
    """Of y = B A x with A (hidden, inputs) and B (outputs, hidden), where the truth has this rank.

    Aoyagi, Watanabe (2005), Neural Networks 18, 924-933, main theorem. Raises `ValueError` for a rank above a width.

    Example:
        >>> from attnlab.degeneracy.exact import reduced_rank
        >>> reduced_rank(2, 2, 2, 0)  # a regular model of rank 2 would have 2
        Exact(value=1.5, multiplicity=1)
    """
    M, N, H, r = inputs, outputs, hidden, rank
    _check_widths((M, H, N), r)
    if N + r <= M + H and M + r <= N + H and H + r <= M + N:
        odd = (M + H + N + r) % 2
        value = (-((H + r) ** 2) - M**2 - N**2 + 2 * (H + r) * (M + N) + 2 * M * N + odd) / 8
        return Exact(value, 1 + odd)
    if N + r > M + H:
        return Exact((H * M - H * r + N * r) / 2, 1)
    if M + r > N + H:
        return Exact((H * N - H * r + M * r) / 2, 1)
    return Exact(M * N / 2, 1)


def deep_linear(widths: Sequence[int], rank: int) -> Exact:
    """Of y = W_L ... W_1 x with W_l (widths[l], widths[l - 1]), where the truth has this rank.

    Aoyagi (2024), Neural Networks 172, 106132, theorem 1: over the widths less the rank, M_l, there is one set of l +
    1 of them whose sum is at least l times its largest and below l times every other one. Raises `ValueError` for a
    rank above a width, or fewer than two widths.

    Example:
        >>> from attnlab.degeneracy.exact import deep_linear
        >>> deep_linear((2, 2, 2, 2), 0)
        Exact(value=1.5, multiplicity=3)
    """
    _check_widths(widths, rank)
    surplus = [width - rank for width in widths]
    chosen = _bottleneck(surplus)
    edges, total = len(chosen) - 1, sum(chosen)
    ceiling = -(-total // edges)
    remainder = total - (ceiling - 1) * edges
    pairs = sum(one * other for one, other in combinations(chosen, 2))
    regular = 2 * edges * rank * (widths[0] + widths[-1] - rank)
    singular = remainder * (edges - remainder) + 2 * edges * pairs - (edges - 1) * total**2
    return Exact((regular + singular) / (4 * edges), remainder * (edges - remainder) + 1)


def _bottleneck(surplus: Sequence[int]) -> list[int]:
    """The set of Aoyagi's theorem: the smallest entries, as many as bind one another; of equal entries all or none."""
    ordered = sorted(surplus)
    for size in range(2, len(ordered) + 1):
        chosen, others = ordered[:size], ordered[size:]
        edges = size - 1
        apart = not others or others[0] > chosen[-1]
        if apart and sum(chosen) >= edges * chosen[-1] and (not others or sum(chosen) < edges * others[0]):
            return chosen
    return ordered[:2]  # no more than two bind: one layer alone


def _check_widths(widths: Sequence[int], rank: int) -> None:
    if len(widths) < 2:
        raise ValueError(f"widths is {tuple(widths)}; expected two or more, from the inputs to the outputs.")
    for place, width in enumerate(widths):
        check_whole(**{f"widths[{place}]": width})
    check_range("rank", rank, 0, min(widths), "No product has a rank above its smallest width.")
