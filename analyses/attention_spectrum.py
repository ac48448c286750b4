"""The Hessian of an attention layer on handwritten digits, at initialisation and after training.

Shows the block grid, the spectra of H and of its outer-product and functional parts H_o and H_f (exact against
stochastic Lanczos quadrature), the spectra and norms of the value, query and key blocks, and what the blocks are made
of: data, weights and attention moments.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from rich.progress import Progress
from rich.table import Table

from attnlab.analysis import Analysis, AnalysisConfig, Arrays
from attnlab.expectation import Expectation, at_least, at_most

STAGES = ("initial", "trained")
PARTS = {"hessian": "H", "ggn": "H_o", "functional": "H_f"}
BLOCKS = {"key": "K", "query": "Q", "value": "V"}
RELATIVE_RANGE = 1e3  # the asinh axis of the spectra is linear below a thousandth of the largest eigenvalue of H


@dataclass(frozen=True)
class Config(AnalysisConfig):
    """Options of the analysis."""

    SMOKE: ClassVar = {"images": 8, "steps": 20, "key_dim": 2, "samples": 3, "lanczos_steps": 10}

    images: int = 128
    """How many of the 1,797 images."""
    patch: int = 2
    """Side of the square patches of pixels that are the tokens: 1, 2, 4 or 8."""
    key_dim: int = 8
    """Width of queries and keys."""
    weights: Literal["softmax", "linear"] = "softmax"
    """Softmax attention, or linear attention."""
    loss: Literal["square", "cross_entropy"] = "square"
    """Square loss to one-hot targets, or cross-entropy; each token predicts the image's class."""
    steps: int = 600
    """Training steps; a multiple of 20."""
    learning_rate: float = 0.02
    """Of Adam."""
    samples: int = 20
    """Random samples of the Lanczos density."""
    lanczos_steps: int = 120
    """Lanczos steps a sample."""


def compute(config: Config, progress: Progress) -> Arrays:
    """Train, then take the curvature at both ends."""
    import jax
    import optax

    from attnlab.training import Session, show_progress, train

    keys = jax.random.split(jax.random.key(config.seed), 4)
    layer, risk, params = problem(config, keys[0], keys[1])
    options = {"steps": config.steps, "every": 20, "session": Session(report=show_progress(progress, "training"))}
    trained = train(risk, params, optax.adam(config.learning_rate), keys[2], **options)
    arrays: Arrays = {"losses": trained.records.losses}
    task = progress.add_task("curvature", total=len(STAGES) * len(PARTS), status="")
    for stage, point in zip(STAGES, (params, trained.params), strict=True):
        measured = curvature(config, risk, point, keys[3], lambda: progress.advance(task))
        arrays[stage] = measured | decomposition(config, layer, risk, point, measured["matrix"])
    return arrays


def problem(config: Config, data_key, init_key):
    """The layer's config, the objective on the digits, and the initial parameters."""
    from attnlab.data.digits import digits
    from attnlab.losses import loss_by_name
    from attnlab.models.adapters import from_linen
    from attnlab.models.attention import AttentionConfig, SelfAttention
    from attnlab.objectives import objective

    targets = "one_hot" if config.loss == "square" else "labels"
    data = digits(
        data_key,
        config.images,
        patch=(config.patch, config.patch),
        positions="one_hot",
        targets=targets,
        per_token=True,
    )
    layer = AttentionConfig(key_dim=config.key_dim, value_dim=10, weights=config.weights)
    module = SelfAttention(layer)
    params = module.init(init_key, data.inputs)["params"]
    return layer, objective(from_linen(module), loss_by_name(config.loss), data.inputs, data.targets), params


def curvature(config: Config, risk, params, key, advance):
    """Matrices, eigenvalues and Lanczos densities of H, H_o and H_f, and norms and spectra of their diagonal blocks."""
    import jax.numpy as jnp

    from attnlab.curvature.operators import PARTS as OPERATORS
    from attnlab.curvature.spectrum import spectral_density
    from attnlab.trees import block_slices

    measured: Arrays = {name: {} for name in ("matrix", "eigenvalues", "norm", "block eigenvalues", "density")}
    measured |= {"accuracy": accuracy(risk, params), "loss": risk(params)}
    for part in PARTS:
        operator = OPERATORS[part](risk, params)
        matrix = operator.dense()
        eigenvalues = jnp.linalg.eigvalsh(matrix)
        blocks = {block: matrix[rows, rows] for block, rows in block_slices(params).items()}
        measured["matrix"][part], measured["eigenvalues"][part] = matrix, eigenvalues
        measured["norm"][part] = {block: jnp.linalg.norm(values) for block, values in blocks.items()}
        measured["block eigenvalues"][part] = {block: jnp.linalg.eigvalsh(values) for block, values in blocks.items()}
        steps = min(config.lanczos_steps, operator.dimension)
        density = spectral_density(operator, key, samples=config.samples, steps=steps)
        scale = jnp.max(jnp.abs(measured["eigenvalues"]["hessian"])) / RELATIVE_RANGE
        measured["density"][part] = smoothed(density, eigenvalues, scale)
        measured |= {"grid": GRID, "scale": scale}
        advance()
    return measured


GRID = np.linspace(-8.0, 8.0, 400)


def smoothed(density, eigenvalues, scale):
    """Density in u = asinh(lambda / s) on `GRID`, smoothed by a Gaussian of width 0.15: the estimate, its error, the
    exact one.

    With s = max |eigenvalue of H| / RELATIVE_RANGE it is linear around zero and logarithmic in the tails.
    """
    import jax.numpy as jnp

    grid, width = jnp.asarray(GRID, scale.dtype), 0.15

    def kernel(values):
        distance = (grid[:, None] - jnp.arcsinh(values / scale)[None, :]) / width
        return jnp.exp(-0.5 * distance**2) / (width * (2 * jnp.pi) ** 0.5)

    found = density.integral(kernel)
    mean, error = found.value, found.standard_error
    exact = jnp.mean(kernel(eigenvalues), axis=1)
    return jnp.stack([mean, error, exact])


def decomposition(config: Config, layer, risk, params, matrices):
    """Size of every factor of the closed form (root mean square over tokens), and its error against autodiff."""
    import jax.numpy as jnp

    from attnlab.attention import attention_hessian, describe

    exact = attention_hessian(risk, params)
    factors = {factor.symbol: factor for term in describe(exact) for factor in term.factors}
    token_count = risk.inputs.shape[0] * risk.inputs.shape[1]
    sizes: Arrays = {}
    for symbol, factor in factors.items():
        # One matrix or vector a token, but one for all of a weight, or of the square loss's scalar curvature.
        count = 1 if factor.role == "weight" or factor.array.ndim == 0 else token_count
        sizes.setdefault(factor.role, {})[symbol] = jnp.sqrt(jnp.sum(factor.array**2) / count)
    errors = {
        part: jnp.linalg.norm(exact.dense(part) - matrices[part]) / jnp.linalg.norm(matrices["hessian"])
        for part in PARTS
    }
    return {"factor": sizes, "closed form error": errors}


def accuracy(risk, params):
    """Share of images whose class the mean over the tokens predicts."""
    import jax.numpy as jnp

    labels = risk.targets[:, 0] if risk.targets.ndim == 2 else jnp.argmax(risk.targets[:, 0], axis=-1)
    return jnp.mean(jnp.argmax(jnp.mean(risk.outputs(params), axis=1), axis=-1) == labels)


def plot(arrays: Arrays, config: Config):
    """What training does to the curvature: spectra of H and of its parts before and after, and the norms of blocks."""
    from attnlab.plotting.panels import panels

    shares = [100 * negative_share(arrays[stage]["eigenvalues"]["hessian"]) for stage in STAGES]
    message = f"Training removes the negative curvature: {shares[0]:.2g} % to {shares[1]:.2g} % of $\\sum|\\lambda|$"
    whens = ("at initialisation", f"after {config.steps} steps")
    titles = [f"{when}: {share:.2g} % negative" for when, share in zip(whens, shares, strict=True)]
    figure, (before, after, norms, blocks) = panels(
        message, (*titles, "norms of the diagonal blocks", "entries of the trained H")
    )
    for axes, stage in zip((before, after), STAGES, strict=True):
        plot_spectra(axes, arrays[stage])
    before.legend(loc="upper left")
    plot_norms(norms, arrays)
    plot_grid(figure, blocks, arrays["trained"], top_decade(arrays))
    return figure


def negative_share(eigenvalues) -> float:
    """Share of the negative eigenvalues in the sum of the magnitudes of all."""
    return float(np.sum(np.maximum(-eigenvalues, 0)) / np.sum(np.abs(eigenvalues)))


def plot_spectra(axes, now: Arrays) -> None:
    """The densities of H, as an area, and of H_o and H_f, as lines, by Lanczos."""
    from attnlab.plotting.style import PARTS as LOOKS

    for part, label in PARTS.items():
        mean, error, _ = now["density"][part]
        color = LOOKS[part][0]
        if part == "hessian":
            axes.fill_between(now["grid"], mean, 1e-9, color="0.75", linewidth=0, label=f"${label}$")
        else:
            band = np.maximum(mean - 2 * error, 1e-9), mean + 2 * error
            axes.fill_between(now["grid"], *band, color=color, alpha=0.35, linewidth=0)
            axes.plot(
                now["grid"], mean, color=color, linestyle={"ggn": "-", "functional": "--"}[part], label=f"${label}$"
            )
    ticks = np.array([-1, -0.01, 0, 0.01, 1])
    axes.set(yscale="log", ylim=(1e-3, 9), xlim=(now["grid"][0], now["grid"][-1]))
    axes.set_xticks(np.arcsinh(ticks * RELATIVE_RANGE), [f"{tick:g}" for tick in ticks])
    axes.set(
        xlabel="eigenvalue / largest of $H$ (asinh axis);\nbands: two standard errors over samples", ylabel="density"
    )


def details(arrays: Arrays, config: Config):
    """The blocks of the Hessian before and after training, their spectra, and what they are made of."""
    from attnlab.plotting.panels import panels

    worst = max(max(arrays[stage]["closed form error"].values()) for stage in STAGES)
    whens = ("at initialisation", f"after {config.steps} steps")
    titles = [
        "entries of $H$, at initialisation",
        "what its blocks are made of",
        *(f"their spectra, {when}" for when in whens),
    ]
    figure, shown = panels(f"The closed form agrees with autodiff to {float(worst):.0e}", titles, height=3)
    plot_grid(figure, shown[0], arrays["initial"], top_decade(arrays))
    plot_factors(shown[1], arrays)
    for panel, stage in zip(shown[2:], STAGES, strict=True):
        plot_block_spectra(panel, arrays[stage])
    return figure


def top_decade(arrays: Arrays) -> float:
    return float(np.log10(max(np.abs(arrays[stage]["matrix"]["hessian"]).max() for stage in STAGES)))


def plot_grid(figure, axes, now: Arrays, top: float) -> None:
    from attnlab.plotting.matrices import block_grid

    sizes = {block: len(now["block eigenvalues"]["hessian"][block]) for block in BLOCKS}
    image = block_grid(axes, now["matrix"]["hessian"], sizes, (top - 6, top), BLOCKS)
    figure.colorbar(image, ax=axes, label=r"$\log_{10}|\mathrm{entry}|$", shrink=0.85, extend="min")


def plot_block_spectra(axes, now: Arrays) -> None:
    from attnlab.plotting.matrices import signed_spectrum
    from attnlab.plotting.style import BLOCKS as LOOKS

    top = 0.0
    for block, label in reversed(BLOCKS.items()):
        eigenvalues = now["block eigenvalues"]["hessian"][block]
        top = max(top, np.abs(eigenvalues).max())
        signed_spectrum(axes, eigenvalues, LOOKS[block][0], f"{label} block")
    axes.plot([], [], "v", color="gray", markerfacecolor="none", label="negative")
    axes.set(ylim=(1e-7 * top, 3 * top), xlabel="rank", ylabel="|eigenvalue|")
    axes.legend(loc="upper right")


def plot_norms(axes, arrays: Arrays) -> None:
    from attnlab.plotting.matrices import before_and_after
    from attnlab.plotting.style import PARTS as LOOKS

    for number, (part, label) in enumerate(PARTS.items()):
        before, after = (np.array([arrays[stage]["norm"][part][block] for block in BLOCKS]) for stage in STAGES)
        names = [f"{name}{name}" for name in BLOCKS.values()]
        before_and_after(axes, names, before, after, LOOKS[part][0], f"${label}$", 0.22 * (1 - number))
    axes.set_xlabel("Frobenius norm: initial (open) to trained (filled);\n$H_f$ of VV is zero")
    axes.legend(loc="upper left", bbox_to_anchor=(0, 0.9))


def plot_factors(axes, arrays: Arrays) -> None:
    from attnlab.plotting.matrices import before_and_after

    names = [(role, symbol) for role, sizes in arrays["initial"]["factor"].items() for symbol in sizes]
    kinds = [("data", "data"), ("weight", "weights"), ("moment", "attention moments"), ("loss", "loss")]
    ordered = [(name, color) for color, (word, _) in enumerate(kinds) for name in names if kind_of(name[0]) == word]
    before, after = (
        np.array([arrays[stage]["factor"][role][symbol] for (role, symbol), _ in ordered]) for stage in STAGES
    )
    for color, (_, label) in enumerate(kinds):
        mine = np.array([place == color for _, place in ordered])
        values = (np.where(mine, value, 0.0) for value in (before, after))
        before_and_after(axes, [SYMBOLS[symbol] for (_, symbol), _ in ordered], *values, f"C{color}", label, 0.0)
    axes.invert_yaxis()
    axes.set_xlabel("norm, root mean square over tokens\n(open: initial, filled: trained)")
    axes.legend(loc="lower right", fontsize=7.5)


def kind_of(role: str) -> str:
    """Data, weight, moment or loss: the kind of a factor by its role (queries count as data)."""
    return next(word for word in ("moment", "data", "weight", "loss") if word in role)


SYMBOLS = {
    "x_i": "token $x_i$",
    "q_i": "query $q_i$",
    "m_i": "mean $m_i$",
    "Σ_i": r"covariance $\Sigma_i$",
    "κ̂_i": r"third moment $\hat\kappa_i$",
    "W_K": "$W_K$",
    "W_V": "$W_V$",
    "W_O": "$W_O$",
    "γ_i": r"gradient $\gamma_i$",
    "g_i": "gradient $g_i$",
    "Λ_i": r"curvature $\Lambda_i$",
}


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """The closed form against autodiff, Lanczos densities against exact ones, and the value block of H_f."""
    rounding = 1e-10 if config.dtype == "float64" else 1e-3
    errors = [list(arrays[stage]["closed form error"].values()) for stage in STAGES]
    shares = [[covered(arrays[stage], part) for part in PARTS] for stage in STAGES]
    values = [arrays[stage]["norm"]["functional"]["value"] / arrays[stage]["norm"]["ggn"]["value"] for stage in STAGES]
    source = "Ormaniec, Dangel, Singh, arXiv 2410.10986, theorems 3.1 and 3.2"
    return [
        at_most("relative error of the closed forms, both stages", errors, rounding, because="rounding", source=source),
        at_most("||H_f|| / ||H_o|| of the value block", values, rounding, because="rounding", source=source),
        at_least(
            "share of the density within 3 standard errors of the exact one",
            shares,
            0.8,
            because="standard errors from few samples, and grid points that are not independent",
            source="stochastic Lanczos quadrature",
        ),
    ]


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """Norms, extreme eigenvalues and checks at both stages."""
    norms = Table(
        "quantity", "at initialisation", f"after {config.steps} steps", title="Hessian of the attention layer"
    )

    def row(name: str, pick) -> None:
        norms.add_row(name, *(f"{pick(arrays[stage]):.4g}" for stage in STAGES))

    row("loss", lambda now: now["loss"])
    row("accuracy on these images", lambda now: now["accuracy"])
    for part, label in PARTS.items():
        row(f"largest eigenvalue of {label}", lambda now, part=part: np.max(now["eigenvalues"][part]))
        row(f"smallest eigenvalue of {label}", lambda now, part=part: np.min(now["eigenvalues"][part]))
    for block, label in BLOCKS.items():
        for part, name in PARTS.items():
            row(f"norm of the {label}{label} block of {name}", lambda now, p=part, b=block: now["norm"][p][b])
    checks = Table("check", "at initialisation", f"after {config.steps} steps", title="Agreement")
    for part, name in PARTS.items():
        errors = (f"{float(arrays[stage]['closed form error'][part]):.1e}" for stage in STAGES)
        checks.add_row(f"closed form of {name} against autodiff, relative error", *errors)
        shares = (f"{covered(arrays[stage], part):.0%}" for stage in STAGES)
        checks.add_row(f"Lanczos density of {name} within 3 standard errors", *shares)
    return [norms, checks]


def covered(now: Arrays, part: str) -> float:
    """Share of the grid where the Lanczos density is within three of its standard errors of the exact one."""
    mean, error, exact = now["density"][part]
    shown = exact > 1e-3
    return float(np.mean(np.abs(mean - exact)[shown] <= 3 * error[shown] + 1e-3))


ANALYSIS = Analysis("attention-spectrum", Config, compute, plot, tables, findings, __doc__, details=details)

if __name__ == "__main__":
    ANALYSIS.main()
