"""
The edge of stability of your optimizer
=======================================

Gradient descent of rate :math:`\\eta` is stable where the sharpness is below :math:`2 / \\eta`; training often drives it
there and holds it there. Every optimizer has such an edge, in its own geometry. Probes measure it while training goes on.
"""

# %%
import jax

jax.config.update("jax_enable_x64", True)

import matplotlib.pyplot as plt
import optax

import attnlab as al
from attnlab.risks.digits import digits_attention

# %%
# A run with a probe
# ------------------
# ``update_rule`` is an optimizer as theory sees it: its optax transformation, and its edge. The probe ``stability`` follows the
# largest eigenvalues from step to step at the price of a few products each time.
keys = jax.random.split(jax.random.key(0), 3)
risk, start = digits_attention(
    keys[0], keys[0], count=64
)  # one layer of attention, rows of pixels as tokens
descent = al.update_rule("gd", 0.2)
probes = {"edge": al.stability(descent)}
run = al.train(
    risk, start, descent.transformation, keys[1], steps=800, every=40, probes=probes
)
run

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3))
al.plot.training(run, axes=axes[0])
al.plot.training(run, "edge/ratio", axes=axes[1])
axes[1].set_title("sharpness over 2 / rate")
figure.show()

# %%
# One page holds all that was measured, with a slider over the steps: `look through this run
# <../_static/explorers/edge_of_stability.html>`__.
al.explore(run, "edge_of_stability.html", title="edge of stability")

# %%
# Which rates meet their edge?
# ----------------------------
# An ensemble over three rates is one call: a key for each member, and a rate for each.
rates = jax.numpy.array([0.05, 0.2, 0.4])
starts = jax.tree.map(lambda leaf: jax.numpy.stack([leaf] * 3), start)
members = jax.random.split(keys[2], 3)
options = {"probes": probes, "hyperparameters": {"learning_rate": rates}}
ensemble = al.train(
    risk, starts, descent.transformation, members, steps=800, every=40, **options
)
for rate, ratios in zip(rates, ensemble.records.values["edge"]["ratio"].T, strict=True):
    print(
        f"rate {rate}: sharpness ends at {ratios[-10:].mean():.2f} of its edge, at most {ratios.max():.2f}"
    )

# %%
# A chain as one trains today
# ---------------------------
# Warm-up, cosine decay, clipping, decoupled weight decay: the rule inside any optax chain is found, and the rate that enters
# the edge is the one of the step taken. The edge of Adam is in its preconditioner's geometry.
schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, 100, 400)
chain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
adam = {"edge": al.stability(al.update_rule("adamw", schedule), optimizer=chain)}
run = al.train(risk, start, chain, keys[1], steps=400, every=40, probes=adam)

figure, axes = plt.subplots(1, 2, figsize=(9, 3))
al.plot.training(run, "edge/ratio", axes=axes[0])
al.plot.training(run, "edge/rate", axes=axes[1])
axes[0].set_title("preconditioned sharpness over its threshold")
axes[1].set_title("the rate of the step")
figure.show()

# %%
# A rule of another norm
# ----------------------
# Sign descent and Muon are steepest in norms of their own. The largest curvature in the unit ball of such a norm is hard to
# compute exactly; what is returned is a bracket, attained from below and certified from above.
operator = al.hessian(risk, run.params)
for norm, rule in (("entry", "sign descent"), ("matrix", "Muon, spectral descent")):
    print(f"{rule}: {al.generalized_sharpness(operator, norm, jax.random.key(3))}")
