r"""
Attention becomes an SVM
========================

Train attention by gradient descent to pick one token of each sequence, and its weights :math:`W = K Q^\top` grow without
bound while their *direction* converges: to the solution of a support vector machine that separates the chosen token from the
rest (Tarzanagh, Li, Thrampoulidis, Oymak, arXiv 2308.16898). We solve that machine, with a proof, and watch.
"""

# %%
import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import attnlab as al
from attnlab.margin import attention_risk, normalized_descent

# %%
# The machine
# -----------
# Four sequences of six tokens in eight dimensions; in each, the token that the read-out likes best is to be chosen.
keys = jax.random.split(jax.random.key(0), 3)
tokens = jax.random.normal(keys[0], (4, 6, 8))
queries = jax.random.normal(keys[1], (4, 8))
readout = jnp.eye(8)[0]
selection = jnp.argmax(tokens @ readout, axis=-1)

problem = al.attention_problem(tokens, queries, selection)
solved = al.max_margin(problem)
solved

# %%
# ``gap`` bounds the distance from the best margin: weak duality between a direction and multipliers proves it, whichever
# solver found them. The factors :math:`K` and :math:`Q`, trained in place of :math:`W`, have the *nuclear* norm:
nuclear = al.max_margin(
    al.attention_problem(tokens, queries, selection, norm="nuclear")
)
rank = int(np.linalg.matrix_rank(nuclear.direction, tol=1e-6))
print(
    f"nuclear norm: {nuclear}, of rank {rank}; Frobenius: of rank {np.linalg.matrix_rank(solved.direction, tol=1e-6)}"
)

# %%
# Descent goes there
# ------------------
# Normalised gradient descent on the loss of attention itself; the probe compares its direction with both machines.
risk = attention_risk(tokens, jnp.ones(4), readout=readout, queries=queries)
probes = {
    "margin": al.margin_probe(
        {"Frobenius": solved.direction, "nuclear": nuclear.direction}, selection
    )
}
start = {"query_key": jnp.zeros((8, 8))}
run = al.train(
    risk, start, normalized_descent(0.2), keys[2], steps=4000, every=50, probes=probes
)
print(
    {name: float(values[-1]) for name, values in run.records.values["margin"].items()}
)

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
al.plot.margin_path(run, axes=axes[0])
axes[0].set_title("$W$ turns to the Frobenius machine")
al.plot.training(run, "margin/probability", axes=axes[1])
axes[1].set_title("attention to the chosen tokens")
figure.show()

# %%
# `Look through this run <../_static/explorers/margin_path.html>`__, step by step.
al.explore(run, "margin_path.html", title="margin path")

# %%
# The regularisation path
# -----------------------
# Beside descent: the best weights of each norm. It has the same limit, without any optimizer.
path = al.regularization_path(
    risk,
    selection,
    {"query_key": run.params["query_key"] / 10},
    jnp.geomspace(1.0, 300.0, 12),
)
figure, axes = plt.subplots(figsize=(5, 3.2))
al.plot.margin_path(path, solved.direction, axes=axes)
axes.set_title("the best weights of each norm have the same limit")
figure.show()

# %%
# When no direction exists
# ------------------------
# A token between two others cannot win against both. The answer is then a certificate of that, Gordan's alternative:
line = jnp.array([[[-1.0, 0.0], [0.0, 0.0], [1.0, 0.0]]])
impossible = al.max_margin(al.attention_problem(line, jnp.ones((1, 2)), jnp.array([1])))
impossible
