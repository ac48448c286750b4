"""
Curvature of your network
=========================

A small classifier of handwritten digits: the spectrum of its Hessian, what of it is Gauss-Newton, and how sure we are.
Nothing here knows what the network is made of; any function of parameters and inputs will do.
"""

# %%
# Results are exact to rounding in 64 bits, so we switch them on first: the library never does it by itself.
import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from flax import linen as nn
from sklearn.datasets import load_digits

import attnlab as al

# %%
# A model, data, a loss
# ---------------------
# An *objective* joins the three. ``al.from_linen`` turns a Flax module into the function ``predict(params, inputs)`` that it
# wants; ``al.from_nnx`` and ``al.from_equinox`` do so for other libraries.


class Classifier(nn.Module):
    """One hidden layer."""

    @nn.compact
    def __call__(self, images):
        """Scores of the ten classes."""
        hidden = nn.tanh(nn.Dense(16, param_dtype=jnp.float64, name="hidden")(images))
        return nn.Dense(10, param_dtype=jnp.float64, name="out")(hidden)


digits = load_digits()
images, labels = jnp.asarray(digits.data[:256]) / 16, jnp.asarray(digits.target[:256])
model = Classifier()
start = model.init(jax.random.key(0), images)["params"]
risk = al.objective(al.from_linen(model), al.cross_entropy, images, labels)
risk

# %%
# A short run of Adam, 40 steps of the whole batch:
trained = al.train(risk, start, optax.adam(0.01), jax.random.key(1), steps=40, every=40)
trained

# %%
# The Hessian, without forming it
# -------------------------------
# An *operator* multiplies vectors. What the lab computes of it (eigenpairs, densities, traces, norms, solutions of linear
# systems) comes from products alone.
hessian = al.hessian(risk, trained.params)
hessian

# %%
# Its density of eigenvalues by stochastic Lanczos quadrature, beside that of the generalised Gauss-Newton matrix. The band
# is two standard errors over the random samples.
ggn = al.ggn(risk, trained.params)
densities = {
    "Hessian": al.spectral_density(hessian, jax.random.key(2), samples=8, steps=60),
    "Gauss-Newton": al.spectral_density(ggn, jax.random.key(2), samples=8, steps=60),
}
figure, axes = plt.subplots(figsize=(6, 3))
for name, density in densities.items():
    al.plot.density(density, axes=axes, label=name)
axes.legend()
axes.set_title("The outliers are Gauss-Newton, the negative curvature is not")
figure.show()

# %%
# A density answers questions with an error bar. How much of the curvature is negative, and what is the mean eigenvalue?
for name, density in densities.items():
    print(
        f"{name}: mean {density.moment(1).in_words()}, negative share {density.negative_share().in_words()}"
    )

# %%
# The outliers themselves
# -----------------------
# ``eigenpairs`` certifies what it returns: residuals bound the distance to an eigenvalue, and ``missed`` the probability that
# a larger one was not found.
top = al.eigenpairs(hessian, jax.random.key(3), count=9)
top

# %%
# How many outliers are there? Large classifiers at the end of training are said to have one per class but one (Papyan, arXiv
# 1901.08244). On a network as small as this all eigenvalues can be had: behind the ninth of ten classes no gap is to be seen,
# and the widest below the fifth lies behind the eighth. A picture of a density alone would not have told.
everything = jnp.sort(jnp.linalg.eigvalsh(hessian.dense()))[::-1]
print(
    "each over the next, from the fifth:",
    (everything[4:12] / everything[5:13]).round(2),
)

# %%
figure, axes = plt.subplots(figsize=(6, 3))
al.plot.spectrum(everything[:200], axes=axes)
axes.axvline(9.5, color="black", linestyle=":", linewidth=1)
axes.set_title("The two hundred largest; the line is behind the ninth of ten classes")
figure.show()

# %%
# Blocks, traces and norms
# ------------------------
# ``block=`` restricts an operator to some of the parameters. Estimates come with a standard error over samples; on a matrix
# as small as this one we can compare them with the truth.
for block in ("hidden", "out"):
    part = al.hessian(risk, trained.params, block=block)
    exact = float(jnp.trace(part.dense()))
    found = al.trace(part, jax.random.key(4), samples=100)
    low, high = found.interval()
    print(
        f"tr H[{block}, {block}] = {exact:.4f}; estimated {found.in_words()}, 95 %: {low:.3f} to {high:.3f}"
    )
