r"""
Write a claim
=============

A claim is a sourced statement with a random instance, a prediction and a measurement: what a paper says, made runnable. The
lab carries more than a hundred and seventy (:doc:`/findings/claims`), and checks yours by the same command.
"""

# %%
# The statement
# -------------
# *The softmax Jacobian* :math:`\mathrm{diag}(p) - p p^\top` *has* :math:`\ell_2` *norm at most 1/2.* We measure the largest norm
# over random scores, and hold it against the bound; an equality attained at :math:`p = (1/2, 1/2)` is the control that the bound
# could fail.
import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp

import attnlab as al


def jacobian_norm(scores):
    """The spectral norm of the derivative of softmax, by autodiff: no formula of ours."""
    return jnp.linalg.norm(jax.jacfwd(jax.nn.softmax)(scores), ord=2)


@al.claim(
    statement=r"\|\mathrm{diag}(p) - p p^T\|_2 \le 1/2",
    source="Gao, Pavel, arXiv 1704.00805, proposition 4",
    tolerance=1e-12,
    because="rounding alone",
)
def softmax_is_half_lipschitz(key):
    """The largest norm over a thousand random scores, and the norm where the bound is attained."""
    scores = 3 * jax.random.normal(key, (1000, 8))
    return [
        al.at_most(
            "largest norm of the Jacobian",
            jnp.max(jax.vmap(jacobian_norm)(scores)),
            0.5,
        ),
        al.equal("norm at p = (1/2, 1/2)", jacobian_norm(jnp.zeros(2)), 0.5),
    ]


# %%
# Check it
# --------
# On one instance, and on others:
verdict = softmax_is_half_lipschitz.verify(seed=0)
verdict

# %%
print([softmax_is_half_lipschitz.verify(seed=seed).passed for seed in range(5)])

# %%
# A claim that is wrong says by how much:


@al.claim(
    statement=r"\|\mathrm{diag}(p) - p p^T\|_2 \le 1/4",
    source="a misreading: 1/4 is the largest entry",
    tolerance=1e-12,
)
def softmax_is_quarter_lipschitz(key):
    """The same measurement, against half of the bound."""
    scores = 3 * jax.random.normal(key, (1000, 8))
    return al.at_most(
        "largest norm of the Jacobian", jnp.max(jax.vmap(jacobian_norm)(scores)), 0.25
    )


softmax_is_quarter_lipschitz.verify(seed=0)

# %%
# From the command line
# ---------------------
# In a file ``my_claims.py``::
#
#     attnlab verify my_claims.py --seeds 0 1 2 --json verdicts.json
#
# prints a table, writes the verdicts for programs, and exits with 0 only if all passed. ``attnlab report`` puts them on a page.
