"""The exact population risk of one linear self-attention layer, in closed form and O(d^3).

One layer predicts f = sum_h x_q^T B_h^T G a_h with G = (1/N) sum z_i z_i^T, z = (x, y) and y = <w, x> + noise. Given
the task w, E G = S_w = Cov(z), and with the fourth cumulants kappa_p C_p C_p C_p C_p of the tokens, C_p column p of
[A; w^T A],

    E G M G = S M S + (1/N) [S M^T S + tr(M S) S + sum_p kappa_p (C_p^T M C_p) C_p C_p^T].                       (1)

With E x_q x_q^T = Lambda and M = B_h Lambda B_k^T the risk of task w, E (f - <w, x_q>)^2, is therefore a sum over pairs
of heads of products of two polynomials of degree at most 2 in w, minus a linear term. `_Quadratic` is such a
polynomial, and `_mean_product` averages a product over the tasks: by Isserlis' theorem for Gaussian tasks, by the plain
mean for a finite set. For one head this is (1 + 1/N) v^T L v + (1/N) tr(L B^T S B)(a^T S a) - 2 v^T L w + w^T L w, v =
B^T S a.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from attnlab.checks import is_concrete, unknown_name
from attnlab.icl.models import effective_weights
from attnlab.icl.tasks import INPUT_LAWS, LinearRegression
from attnlab.objectives import Objective, objective
from attnlab.types import Params, Real, Scalar

Effective = dict[str, Array]


class _Quadratic(NamedTuple):
    """The polynomial constant + linear . w + square (w^T Lambda w), scalar or with one leading axis of values."""

    constant: Float[Array, "*v"]
    linear: Float[Array, "*v d"]
    square: Float[Array, "*v"]


def _evaluate(p: _Quadratic, tasks: Float[Array, "M d"], covariance: Float[Array, "d d"]) -> Float[Array, "M v"]:
    squares = jnp.sum((tasks @ covariance) * tasks, axis=1)
    return p.constant[None, :] + tasks @ p.linear.T + jnp.outer(squares, p.square)


def _mean_product(
    p: _Quadratic, q: _Quadratic, problem: LinearRegression, metric: Float[Array, "v v"] | None = None
) -> Scalar:
    """E over tasks of p^T metric q (of p q, for scalars)."""
    covariance = problem.covariance
    if metric is None:
        p, q = (_Quadratic(r.constant[None], r.linear[None], r.square[None]) for r in (p, q))
        metric = jnp.ones((1, 1), covariance.dtype)
    if problem.tasks is not None:
        left, right = (_evaluate(r, problem.tasks, covariance) for r in (p, q))
        return jnp.mean(jnp.sum((left @ metric) * right, axis=-1))
    product = covariance @ problem.task_moment
    first = jnp.trace(product)  # E w^T L w
    second = first**2 + 2 * jnp.sum(product * product.T)  # E (w^T L w)^2 = t^2 + 2 tr (L Omega)^2
    return (
        p.constant @ metric @ q.constant
        + (p.constant @ metric @ q.square + p.square @ metric @ q.constant) * first
        + jnp.sum((metric @ q.linear) * (p.linear @ problem.task_moment))
        + p.square @ metric @ q.square * second
    )


def _split(effective: Effective) -> tuple[Array, Array, Array, Array]:
    value, query_key = effective["value"], effective["query_key"]
    return value[:, :-1], value[:, -1], query_key[:, :-1], query_key[:, -1]  # alpha, c, U, b


def _response(U: Array, b: Array, alpha: Array, c: Array, covariance: Array, noise: Array) -> _Quadratic:
    """v = B^T S_w a = U^T L u + b (w^T L u + c noise) with u = alpha + c w."""
    L_alpha = covariance @ alpha
    return _Quadratic(U.T @ L_alpha + c * noise * b, c * U.T @ covariance + jnp.outer(b, L_alpha), c * b)


def _value_form(alpha: Array, c: Array, alpha2: Array, c2: Array, covariance: Array, noise: Array) -> _Quadratic:
    """a^T S_w a2 = u^T L u2 + c c2 noise."""
    linear = covariance @ (c * alpha2 + c2 * alpha)
    return _Quadratic(alpha @ covariance @ alpha2 + c * c2 * noise, linear, c * c2)


def _key_form(U: Array, b: Array, U2: Array, b2: Array, covariance: Array, noise: Array) -> _Quadratic:
    """tr(L B^T S_w B2) = tr(L (U + w b^T)^T L (U2 + w b2^T)) + noise b^T L b2."""
    L_b, L_b2 = covariance @ b, covariance @ b2
    constant = jnp.sum((covariance @ U) * (U2 @ covariance)) + noise * (b @ L_b2)
    return _Quadratic(constant, covariance @ (U @ L_b2 + U2 @ L_b), b @ L_b2)


def _quadratic_part(one: tuple, two: tuple, problem: LinearRegression, length: Array) -> Scalar:
    """E f_h f_k for two heads with Gaussian tokens: equation (1) between a_h, B_h and B_k, a_k."""
    (alpha, c, U, b), (alpha2, c2, U2, b2) = one, two
    covariance, noise = problem.covariance, problem.noise_variance
    own, own2, crossed, crossed2 = (
        _response(*pair, covariance, noise)
        for pair in ((U, b, alpha, c), (U2, b2, alpha2, c2), (U, b, alpha2, c2), (U2, b2, alpha, c))
    )
    values = _value_form(alpha, c, alpha2, c2, covariance, noise)
    keys = _key_form(U, b, U2, b2, covariance, noise)
    fluctuation = _mean_product(crossed, crossed2, problem, covariance) + _mean_product(values, keys, problem)
    return _mean_product(own, own2, problem, covariance) + fluctuation / length


def _component_moments(problem: LinearRegression) -> Float[Array, "5 p"]:
    """E (w^T A_p)^j for j = 0..4 and each independent component p of the inputs."""
    if problem.tasks is not None:
        projected = problem.tasks @ problem.mixing
        return jnp.stack([jnp.mean(projected**j, axis=0) for j in range(5)])
    variance = jnp.sum(problem.mixing * (problem.task_moment @ problem.mixing), axis=0)
    zero = jnp.zeros_like(variance)
    return jnp.stack([zero + 1, zero, variance, zero, 3 * variance**2])


def _cumulant_part(one: tuple, two: tuple, problem: LinearRegression, length: Array) -> Scalar:
    """(1/N) sum_p kappa_p E (a_h . C_p)(a_k . C_p)(C_p^T B_h L B_k^T C_p), each factor a polynomial in w^T A_p."""
    (alpha, c, U, b), (alpha2, c2, U2, b2) = one, two
    mixing, covariance = problem.mixing, problem.covariance
    e, e2 = alpha @ mixing, alpha2 @ mixing
    values = (e * e2, c * e2 + c2 * e, jnp.full_like(e, 1) * (c * c2))
    keys_left, keys_right = U.T @ mixing, U2.T @ mixing
    keys = (
        jnp.sum(keys_left * (covariance @ keys_right), axis=0),
        (b @ covariance) @ keys_right + (b2 @ covariance) @ keys_left,
        jnp.full_like(e, 1) * (b @ covariance @ b2),
    )
    moments = _component_moments(problem)
    total = sum(p * q * moments[i + j] for i, p in enumerate(values) for j, q in enumerate(keys))
    return INPUT_LAWS[problem.inputs].excess_kurtosis * jnp.sum(total) / length


def population_risk(effective: Effective, problem: LinearRegression, length: Real) -> Scalar:
    """Exact E (f - <w, x_q>)^2 of one linear layer over prompts of `length` examples, tasks and the query.

    `effective` holds `value` (H, d+1) and `query_key` (H, d+1, d) as in `models.layer_predict`. The gradient is exact
    too, by `jax.grad`. Add the noise variance for a noisy query; halve it to compare with arXiv 2212.07677. Costs
    O(H^2 d^3), and O(H^2 M d^2) more for a set of M tasks. Raises `ValueError` for shapes that do not fit `problem`.
    """
    _check_effective(effective, problem, length)
    return _risk(effective, problem, jnp.asarray(length, problem.mixing.dtype))


@jax.jit
def _risk(effective: Effective, problem: LinearRegression, length: Scalar) -> Scalar:
    heads = _split(effective)
    parts = [_quadratic_part] + ([_cumulant_part] if INPUT_LAWS[problem.inputs].excess_kurtosis else [])

    def pair(one: tuple, two: tuple) -> Scalar:
        return jnp.sum(jnp.stack([part(one, two, problem, length) for part in parts]))

    def overlap(alpha: Array, c: Array, U: Array, b: Array) -> Scalar:
        # E v^T L w, the mean of the prediction times the target
        response = _response(U, b, alpha, c, problem.covariance, problem.noise_variance)
        zero = jnp.zeros_like(alpha)
        task = _Quadratic(zero, jnp.eye(len(zero), dtype=zero.dtype), zero)
        return _mean_product(response, task, problem, problem.covariance)

    square = jax.vmap(lambda one: jax.vmap(lambda two: pair(one, two))(heads))(heads)
    return jnp.sum(square) - 2 * jnp.sum(jax.vmap(overlap)(*heads)) + problem.signal


def _check_effective(effective: Effective, problem: LinearRegression, length: Real) -> None:
    d = problem.dimension
    for name, trailing in (("value", (d + 1,)), ("query_key", (d + 1, d))):
        shape = jnp.shape(effective[name])
        if shape[1:] != trailing or len(shape) != len(trailing) + 1:
            raise ValueError(f"{name} has shape {shape}; for inputs of dimension {d} expected (heads, *{trailing}).")
    if is_concrete(length) and not float(length) >= 1:
        raise ValueError(f"length is {length}; expected a context of at least one example.")


def merged_weights(params: Params) -> Effective:
    """The effective weights themselves: `value` (H, d+1) and `query_key` (H, d+1, d)."""
    return params


def reduced_weights(params: Params) -> Effective:
    """`preconditioner` Gamma (d, d) as one head: value (0, 1), query_key [Gamma; 0]."""
    gamma = params["preconditioner"]
    value = jnp.zeros(gamma.shape[0] + 1, gamma.dtype).at[-1].set(1)
    return {"value": value[None], "query_key": jnp.pad(gamma, ((0, 1), (0, 0)))[None]}


def rank_one_weights(params: Params) -> Effective:
    """Heads with a scalar value and one-dimensional keys and queries: Gamma = sum_h value_h key_h query_h^T.

    `value` (H,), `key` and `query` (H, d): the separate parametrisation whose training is a staircase (arXiv
    2501.16265).
    """
    gamma = jnp.einsum("h,hi,hj->ij", params["value"], params["key"], params["query"])
    return reduced_weights({"preconditioner": gamma})


PARAMETRIZATIONS: dict[str, Callable[..., Effective]] = {
    "merged": merged_weights,
    "layer": effective_weights,
    "reduced": reduced_weights,
    "rank_one": rank_one_weights,
}


def _predict(params: Params, inputs: Array, *, weights: Callable[..., Effective]) -> Effective:
    return weights(params)


def _loss(outputs: Effective, targets: tuple[LinearRegression, Array]) -> Scalar:
    return population_risk(outputs, *targets)


def population_objective(
    problem: LinearRegression, length: Real, parametrization: str = "merged", **options: int
) -> Objective:
    """The exact population risk as an `Objective`, ready for curvature and training.

    `predict` maps parameters to effective weights (`parametrization` is a key of `PARAMETRIZATIONS`; `options` are
    those of that function: `heads` of `layer`), `loss` is `population_risk`, and the data are the law of the prompts.
    The loss is not convex in the effective weights, so its Gauss-Newton part is the curvature of the risk in them
    pulled back, and need not be positive semi-definite.

    Example:
        >>> import attnlab as al
        >>> import jax.numpy as jnp
        >>> exact = al.population_objective(al.isotropic(2), 10, "reduced")
        >>> round(float(exact({"preconditioner": jnp.zeros((2, 2))})), 4)  # predicting nothing: E[y^2] = 2
        2.0
    """
    if parametrization not in PARAMETRIZATIONS:
        raise unknown_name("parametrization", parametrization, PARAMETRIZATIONS)
    weights = Partial(PARAMETRIZATIONS[parametrization], **options)
    size = jnp.asarray(length, problem.mixing.dtype)
    return objective(Partial(_predict, weights=weights), Partial(_loss), size, (problem, size))
