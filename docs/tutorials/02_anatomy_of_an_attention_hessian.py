r"""
The anatomy of an attention Hessian
===================================

The Hessian of a self-attention layer has a closed form: every block is a sum of Kronecker products of *data*, *weights* and
*moments of the attention distribution* (Ormaniec, Dangel, Singh, arXiv 2410.10986; the derivation is on the page
:doc:`/theory/attention`). Nothing of the size of a block is formed, and nothing is sampled.
"""

# %%
import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import attnlab as al

# %%
# One layer
# ---------
# Four sequences of twelve tokens, one head. The layer's parameters are ``query``, ``key`` and ``value``.
layer = al.SelfAttention(al.AttentionConfig(key_dim=6, value_dim=4))
tokens, targets = (
    jax.random.normal(jax.random.key(0), (4, 12, 8)),
    jnp.zeros((4, 12, 4)),
)
params = layer.init(jax.random.key(1), tokens)["params"]
risk = al.objective(al.from_linen(layer), al.square_loss, tokens, targets)
exact = al.attention_hessian(risk, params)
exact

# %%
# It is the Hessian: autodiff agrees to rounding.
dense = al.hessian(risk, params).dense()
print(
    f"largest difference from autodiff: {jnp.max(jnp.abs(exact.dense() - dense)):.1e}"
)

# %%
# Three matrices in one
# ---------------------
# :math:`H = H_o + H_f`: the generalised Gauss-Newton (*outer product*) part, and the *functional* part that the curvature of
# the layer itself brings. They are called ``ggn`` and ``functional`` everywhere.
figure, axes = plt.subplots(1, 3, figsize=(9, 3))
for one, part in zip(axes, ("hessian", "ggn", "functional"), strict=True):
    al.plot.blocks(exact, part, axes=one)
    one.set_title(part)
figure.show()

# %%
# The value block of the functional part is exactly zero: the layer is linear in its values. The larger the tokens, the more
# the blocks differ, each at a power of its own.
figure, axes = plt.subplots(figsize=(6, 3))
al.plot.block_norms(exact, axes=axes)
axes.set_title("Between query and key, curvature is partly functional")
figure.show()

# %%
# What a block is made of
# -----------------------
# Every term of every block, with its formula, and which of its factors is data, a weight or an attention moment:
for term in al.describe(exact):
    print(term)

# %%
# How far from a Kronecker product?
# ---------------------------------
# K-FAC approximates each block by a single product :math:`A \otimes B`. The best that any such form can do is known exactly:
for name in exact.names:
    print(
        f"{name}: {float(al.nearest_kronecker(exact.block(name, name)).relative_error):.2f} of its norm is missed"
    )

# %%
# How the blocks grow with the tokens
# -----------------------------------
# Scale the tokens by :math:`s`: the Gauss-Newton block of the values grows as :math:`s^2`, the query block as :math:`s^6`, as
# long as attention stays soft. One closed form a point, no sampling.
scales = np.array([0.05, 0.1, 0.2, 0.4])
norms = {name: [] for name in ("value", "query")}
for scale in scales:
    scaled = al.objective(al.from_linen(layer), al.square_loss, scale * tokens, targets)
    found = al.attention_hessian(scaled, params).norms()["ggn"]
    for name in norms:
        norms[name].append(float(found[name, name]))
slopes = {
    name: np.polyfit(np.log(scales[:2]), np.log(values[:2]), 1)[0]
    for name, values in norms.items()
}
print({name: round(float(slope), 2) for name, slope in slopes.items()})

figure, axes = plt.subplots(figsize=(6, 3))
for name, values in norms.items():
    axes.loglog(scales, values, "o-", label=f"{name}: slope {slopes[name]:.2f}")
axes.set(
    xlabel="scale of the tokens",
    ylabel="$||H_o||$ of the block",
    title="Blocks grow at powers of their own",
)
axes.legend()
figure.show()

# %%
# Inside a network
# ----------------
# The same closed form gives the blocks of a layer within a network, from what stands behind it:
attention = al.AttentionConfig(key_dim=4, value_dim=4, output_dim=8)
network = al.Transformer(al.TransformerConfig(attention, layers=2, mlp_width=16))
weights = network.init(jax.random.key(2), tokens)["params"]
whole = al.objective(al.from_linen(network), al.square_loss, tokens, tokens)
inside = jax.jit(al.attention_hessian, static_argnames="layer")(
    whole, weights, layer="layer_1/attention"
)
inside

# %%
# Along training
# --------------
# Any of it is a probe of the training loop: here the norms of both parts, block by block, the spectrum, and where the first
# sequence attends. The run becomes one page with a slider over its steps: `look through it
# <../_static/explorers/curvature_along_training.html>`__.


def anatomy(risk, params):
    found = al.attention_hessian(risk, params)
    norms = found.norms()
    return {
        "functional over outer": {
            name: norms["functional"][name, name] / norms["ggn"][name, name]
            for name in ("query", "key")
        },
        "eigenvalues": jnp.linalg.eigvalsh(found.dense()),
        "attention": found.moments.weights,
    }


run = al.train(
    risk,
    params,
    optax.adam(0.02),
    jax.random.key(3),
    steps=300,
    every=10,
    probes={"layer": al.probe(anatomy)},
)
al.explore(run, "curvature_along_training.html", title="curvature along training")
figure, axes = plt.subplots(figsize=(5, 3))
for name in ("query", "key"):
    al.plot.training(run, f"layer/functional over outer/{name}", axes=axes, label=name)
axes.set_title("functional over outer part")
axes.legend()
figure.show()
