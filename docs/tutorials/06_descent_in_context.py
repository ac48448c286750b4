r"""
Does your model descend in context?
===================================

A linear attention layer, trained on prompts of :math:`(x_i, y_i)` pairs of linear regression, comes to implement one step of
(preconditioned) gradient descent on the prompt. Is your model doing that? A *model* is here any function of one prompt to
its prediction; a number means something beside that of an untrained model, and of the model shown shuffled labels.
"""

# %%
from functools import partial

import jax

jax.config.update("jax_enable_x64", True)

import matplotlib.pyplot as plt
import optax

import attnlab as al
from attnlab.icl.models import init_layer, stack_predict

# %%
# Train one layer on the exact risk
# ---------------------------------
# For Gaussian prompts the risk of one linear attention layer is known in closed form: no prompts are sampled in training.
keys, problem, length = (
    jax.random.split(jax.random.key(0), 4),
    al.isotropic(4, noise_variance=0.1),
    10,
)
start = init_layer(keys[0], 5, 0.3)
risk = al.population_objective(problem, length, "layer")
run = al.train(risk, start, optax.adam(0.02), keys[2], steps=800, every=20)
run

# %%
figure, axes = plt.subplots(figsize=(6, 3))
al.plot.training(run, axes=axes)
axes.set_title("exact risk, with its plateaus")
figure.show()

# %%
# Against four algorithms
# -----------------------
# ``fit_family`` fits the free numbers of an algorithm (its step size, its penalty) on half of the prompts, and scores it on
# the others: the share of the model's predictions that the algorithm does not explain.
model, untrained = (partial(stack_predict, [layer]) for layer in (run.params, start))
prompts = al.sample_prompts(keys[1], problem, length, 512)
for family in ("gradient_descent", "ridge", "newton"):
    print(family, al.fit_family(model, prompts, family, 1, keys[3]))


# %%
# Against nulls
# -------------
def misfit(model):
    """Of the best single gradient step."""
    return al.fit_family(model, prompts, "gradient_descent", 1, keys[3]).held_out_error


nulls = al.against_nulls(misfit, model, untrained, keys[3])
for name, error in nulls._asdict().items():
    print(
        f"{name}: {error.value:.1e} +- {error.standard_error:.1e} of the predictions is not gradient descent"
    )

# %%
# How good is it?
# ---------------
# Beside the trained layer, the best that any single step can do, in closed form, and ridge regression, the best predictor of
# all for these prompts, on samples:
from attnlab.icl.baselines import ridge
from attnlab.icl.optima import optimal_risk
from attnlab.statistics import estimate

many = al.sample_prompts(keys[2], problem, length, 20_000)
bayes = estimate(
    jax.vmap(lambda prompt: (ridge(prompt, penalty=0.1) - prompt.target) ** 2)(many)
)
print(
    f"one step at best: {optimal_risk(problem, length):.5f}, trained: {risk(run.params):.5f}, ridge: {bayes.in_words()}"
)
