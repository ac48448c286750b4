"""The semidefinite complementarity problem of the central flow, solved inside a jitted program.

Find X with X >= 0, A + B[X] >= 0 and <X, A + B[X]> = 0, for symmetric k x k matrices and a positive semidefinite B: the
optimality conditions of  min over X >= 0 of  <X, B[X]> / 2 + <A, X>.

Matrices are vectors of length m = k (k + 1) / 2 here, in the orthonormal basis of symmetric matrices (`basis`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

ITERATIONS = 3000


def basis(count: int) -> np.ndarray:
    """Orthonormal basis of the symmetric k x k matrices, (m, k, k): e_i e_i^T and (e_i e_j^T + e_j e_i^T) / sqrt 2."""
    matrices = []
    for i in range(count):
        for j in range(i, count):
            matrix = np.zeros((count, count))
            matrix[i, j] = matrix[j, i] = 1.0 if i == j else 0.5**0.5
            matrices.append(matrix)
    return np.stack(matrices)


class Complementary(NamedTuple):
    """A solution X, and `residual`: ||X - proj(X - A - B[X])|| after scaling, zero at an exact one."""

    matrix: Float[Array, "k k"]
    residual: Float[Array, ""]


def solve_complementarity(
    offset: Float[Array, " m"], operator: Float[Array, "m m"], *, tolerance: float = 1e-9
) -> Complementary:
    """X of the problem above, A = `offset` and B = `operator` in the basis of `basis`.

    Alternating directions (Boyd et al. 2011, section 5): a linear solve and a projection on the cone in turn, with the
    penalty at the geometric mean of the extreme eigenvalues of B. Stops at a scaled residual of `tolerance`, or after
    3,000 rounds: look at `residual`. Pure; for jitted code.
    """
    count = round((2 * offset.size + 0.25) ** 0.5 - 0.5)
    matrices = jnp.asarray(basis(count), offset.dtype)
    # in units where B has norm 1, and A too: X scales with ||A|| / ||B||
    strengths, directions = jnp.linalg.eigh(operator)
    strength = jnp.maximum(strengths[-1], jnp.finfo(offset.dtype).tiny)
    size = jnp.maximum(jnp.linalg.norm(offset), jnp.finfo(offset.dtype).tiny)
    strengths, shift = jnp.maximum(strengths / strength, 0), directions.T @ (offset / size)
    penalty = jnp.sqrt(jnp.maximum(strengths[0], 1e-6))

    def project(vector: Float[Array, " m"]) -> Float[Array, " m"]:
        values, vectors = jnp.linalg.eigh(jnp.einsum("a,aij->ij", vector, matrices))
        positive = (vectors * jnp.maximum(values, 0)[None, :]) @ vectors.T
        return jnp.einsum("ij,aij->a", positive, matrices)

    def residual(vector: Float[Array, " m"]) -> Float[Array, ""]:
        slope = directions @ (strengths * (directions.T @ vector) + shift)
        return jnp.linalg.norm(vector - project(vector - slope))

    def round_(state: tuple) -> tuple:
        iteration, cone, dual, _ = state
        free = directions @ ((penalty * (directions.T @ (cone - dual)) - shift) / (strengths + penalty))
        cone = project(free + dual)
        return iteration + 1, cone, dual + free - cone, residual(cone)

    zero = jnp.zeros_like(offset)
    _, vector, _, error = jax.lax.while_loop(
        lambda state: (state[3] > tolerance) & (state[0] < ITERATIONS), round_, (0, zero, zero, residual(zero))
    )
    return Complementary(jnp.einsum("a,aij->ij", vector * size / strength, matrices), error)
