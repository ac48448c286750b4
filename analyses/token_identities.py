"""Attention maps and tokens against exact statements: entropy and its bound, rank collapse, tangent kernel and Hessian.

Left: mean entropy of a random layer's attention above the lower bound from its spectral norms, and scores that attain
the bound. Middle: how far the tokens of a sequence are from agreeing, layer by layer, without skip connections and with
residual branches scaled by one over the root of the depth. Right: along training, the top of the empirical tangent
kernel against that of the generalised Gauss-Newton matrix.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from rich.progress import Progress
from rich.table import Table

from attnlab.analysis import Analysis, AnalysisConfig, Arrays, log_mean
from attnlab.expectation import Expectation, at_least, at_most

STACKS = {"no skip connection": (False, False), "skip, branches over sqrt(depth)": (True, True), "skip": (True, False)}
"""Name of the stack: whether it has skip connections, whether its branches are scaled down."""


@dataclass(frozen=True)
class Config(AnalysisConfig):
    """Options of the analysis."""

    SMOKE: ClassVar = {"depth": 4, "starts": 2, "steps": 20, "every": 10, "images": 4}

    depth: int = 24
    """Attention layers of a stack."""
    width: int = 32
    """Width of its tokens."""
    length: int = 16
    """Tokens in a sequence."""
    starts: int = 5
    """Random stacks and inputs."""
    steps: int = 400
    """Training steps along which kernel and Gauss-Newton matrix are compared."""
    every: int = 50
    """Steps between two comparisons."""
    images: int = 16
    """Digits to train on."""


def compute(config: Config, progress: Progress) -> Arrays:
    """All three parts in turn."""
    import jax

    parts = (entropies, collapse, kernels)
    task = progress.add_task("identities", total=len(parts), status="")
    arrays: Arrays = {}
    for part in parts:
        arrays[part.__name__] = part(config, jax.random.key(config.seed))
        progress.advance(task)
    return arrays


def entropies(config: Config, key):
    """Mean and least entropy over the bound, by scale of the tokens, and the bound's extremal scores."""
    import jax
    import jax.numpy as jnp

    from attnlab.dynamics.tokens import attention_calls, entropy, entropy_bound, least_entropy
    from attnlab.models.adapters import from_linen
    from attnlab.models.attention import AttentionConfig, SelfAttention

    module = SelfAttention(AttentionConfig(config.width, config.width))
    tokens = jax.random.normal(key, (8, config.length, config.width))
    params = module.init(key, tokens)["params"]

    @jax.jit
    def measure(scale):
        (call,) = attention_calls(from_linen(module), params, scale * tokens).values()
        found, bound = entropy(call.attention), entropy_bound(call)
        return jnp.mean(found), jnp.mean(bound), jnp.min(found - bound)

    scales = jnp.geomspace(0.02, 2.0, 13)
    found, bound, slack = jax.lax.map(measure, scales)
    # one score up, all others down, of Euclidean norm s: the bound is their entropy
    sizes, count = jnp.linspace(0.1, 8.0, 20), config.length
    extremal = jnp.full(count, -1 / (count * (count - 1)) ** 0.5).at[0].set(((count - 1) / count) ** 0.5)
    attained = jax.vmap(lambda size: entropy(jax.nn.softmax(size * extremal)))(sizes)
    return {
        "scales": scales,
        "mean": found,
        "bound": bound,
        "slack": slack,
        "extremal": jnp.abs(attained / least_entropy(sizes, float(count)) - 1),
    }


def collapse(config: Config, key):
    """The rank residual of the tokens after every layer, (starts, depth + 1) by stack."""
    import jax
    import jax.numpy as jnp

    from attnlab.dynamics.tokens import rank_residual, representations
    from attnlab.models.adapters import from_linen
    from attnlab.models.attention import AttentionConfig
    from attnlab.models.transformer import Transformer, TransformerConfig

    def residuals(key, skip, scaled):
        attention = AttentionConfig(config.width, config.width, output_dim=config.width)
        stack = Transformer(TransformerConfig(attention, config.depth, norm=None, residual=skip))
        tokens = jax.random.normal(key, (4, config.length, config.width))
        params = stack.init(key, tokens)["params"]
        factor = config.depth**-0.5 if scaled else 1.0
        for layer in params.values():
            layer["attention"]["output"] = factor * layer["attention"]["output"]
        found = representations(from_linen(stack), params, tokens)
        layers = [found[f"layer_{index}"] for index in range(config.depth)]
        return jnp.stack([rank_residual(tokens), *(rank_residual(layer) for layer in layers)])

    keys = jax.random.split(key, config.starts)
    measure = jax.jit(lambda key, skip, scaled: residuals(key, skip, scaled), static_argnums=(1, 2))
    return {name: jnp.stack([measure(key, *stack) for key in keys]) for name, stack in STACKS.items()}


def kernels(config: Config, key):
    """Largest eigenvalues of kernel and Gauss-Newton matrix along gradient descent on digits."""
    import jax.numpy as jnp
    import optax

    from attnlab.curvature import ggn
    from attnlab.dynamics.kernel import empirical_ntk
    from attnlab.krylov.tracking import cold_top_pairs
    from attnlab.risks.digits import digits_attention
    from attnlab.training import probe, train

    risk, params = digits_attention(key, key, config.images)
    # the loss is half the squared distance, mean over images: the Hessian in the outputs is 1 / images

    def measure(risk, params):
        kernel = jnp.linalg.eigvalsh(empirical_ntk(risk, params))[-1] / config.images
        matrix = ggn(risk, params)
        top = cold_top_pairs(matrix.flat_mv, matrix.dimension, 1, key, kernel.dtype)
        return {"kernel": kernel, "gauss_newton": top.values[-1]}

    options = {"steps": config.steps, "every": config.every, "probes": {"top": probe(measure)}}
    records = train(risk, params, optax.sgd(0.1), key, **options).records
    found = records.values["top"]
    return {"steps": records.steps, "ntk": found["kernel"], "ggn": found["gauss_newton"]}


def plot(arrays: Arrays, config: Config):
    """One panel a part."""
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8))
    scales = arrays["entropies"]["scales"]
    left.semilogx(scales, arrays["entropies"]["mean"], "o-", label="entropy, mean of the rows")
    left.semilogx(scales, arrays["entropies"]["bound"], "s--", label="lower bound, mean")
    left.axhline(np.log(config.length), color="0.4", ls=":", label="uniform attention")
    left.set(xlabel="scale of the tokens", ylabel="entropy [nats]", title="entropy above its spectral bound")
    for name in STACKS:
        values = arrays["collapse"][name]
        mean, factor = log_mean(np.maximum(values, 1e-17))
        depth = np.arange(len(mean))
        middle.semilogy(depth, mean, ".-", label=name)
        middle.fill_between(depth, mean / factor, mean * factor, alpha=0.2)
    middle.set(xlabel="layer", ylabel=r"$\|X - 1\bar{x}^\top\| / \|X\|$")
    middle.set_title(f"disagreement of the tokens: geometric mean of {config.starts}, band: standard error", fontsize=9)
    right.plot(arrays["kernels"]["steps"], arrays["kernels"]["ntk"], label=r"$\lambda_1$(tangent kernel) / images")
    right.plot(arrays["kernels"]["steps"], arrays["kernels"]["ggn"], "--", label=r"$\lambda_1$(Gauss-Newton)")
    right.set(xlabel="step of gradient descent", ylabel="largest eigenvalue", title="two matrices, one spectrum")
    for axes in (left, middle, right):
        axes.legend(fontsize="small")
    return figure


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """The identities to rounding, and how fast the tokens of a stack agree."""
    bound, rank = "Zhai et al., arXiv 2303.06296", "Dong et al., arXiv 2103.03404"
    difference = float(np.max(np.abs(arrays["kernels"]["ntk"] / arrays["kernels"]["ggn"] - 1)))
    means = {name: arrays["collapse"][name].mean(axis=0) for name in STACKS}
    bare, scaled, _ = means.values()
    bounds, rounding = arrays["entropies"], "rounding"
    return [
        at_least(
            "least entropy over its bound [nats]", bounds["slack"].min(), 0.0, 1e-12, because=rounding, source=bound
        ),
        at_most("extremal scores off the bound", bounds["extremal"].max(), 1e-10, because=rounding, source=bound),
        at_least("rank residual of the inputs", bare[0], 0.9, source=rank),
        at_most("rank residual after 4 layers without skip", bare[4], 0.01, source=rank),
        at_least(
            f"rank residual after {config.depth} layers, branches over sqrt(depth)",
            scaled[-1],
            0.8,
            source="Noci et al., arXiv 2206.03126: negative control",
        ),
        at_most(
            "tangent kernel off Gauss-Newton, at any step",
            difference,
            1e-5,
            because="the tolerance of the tracking",
            source="Jacot et al., arXiv 1806.07572",
        ),
    ]


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """Rank residuals by depth."""
    table = Table("stack", *(f"after {depth}" for depth in (0, 1, 2, 4, config.depth)))
    for name in STACKS:
        mean = arrays["collapse"][name].mean(axis=0)
        table.add_row(name, *(f"{mean[depth]:.3g}" for depth in (0, 1, 2, 4, config.depth)))
    return [table]


ANALYSIS = Analysis("token-identities", Config, compute, plot, tables, findings, __doc__, slow=True)

if __name__ == "__main__":
    ANALYSIS.main()
