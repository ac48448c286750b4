"""Random max-margin problems, and their rows written out: what the solvers never form."""

import jax.numpy as jnp
import numpy as np

from attnlab.margin import attention_problem

SHAPES = [(3, 4, 6), (6, 8, 10), (12, 6, 4), (4, 12, 16)]  # (sequences, tokens, dimension); the third has m > d^2


def ones(*shape, dtype=float):
    """`jnp.ones`, by NumPy: nothing to compile."""
    return jnp.asarray(np.ones(shape, dtype))


def random_tokens(sequences, tokens, dimension, seed):
    """Unit tokens and queries, and the selection that a random W makes: feasible at every size."""
    random = np.random.default_rng(seed)
    x, z = random.normal(size=(sequences, tokens, dimension)), random.normal(size=(sequences, dimension))
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    z /= np.linalg.norm(z, axis=-1, keepdims=True)
    scores = np.einsum("ntd,de,ne->nt", x, random.normal(size=(dimension, dimension)), z)
    return x, z, scores.argmax(1)


def random_problem(sequences, tokens, dimension, seed, norm="frobenius"):
    return attention_problem(*random_tokens(sequences, tokens, dimension, seed), norm=norm)


def unplanned_problem(sequences, tokens, dimension, seed):
    """The selection is random: feasible or not."""
    x, z, _ = random_tokens(sequences, tokens, dimension, seed)
    random = np.random.default_rng(seed + 1000)
    return attention_problem(x, z, random.integers(tokens, size=sequences))


def dense_rows(problem):
    """The matrix whose row k is vec(Delta_k z_{o(k)}^T)."""
    return np.stack(
        [
            np.outer(delta, problem.queries[owner]).ravel()
            for delta, owner in zip(problem.differences, problem.owner, strict=True)
        ]
    )
