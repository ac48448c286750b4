"""Which patches of handwritten digits trained attention selects, and whether its direction is the SVM of these patches.

Two classes of digits; an image is the sequence of its patches, each its pixels and its place, of unit norm; the query
is the whole image. A read-out v is fitted to the mean of the tokens and kept; then W learns by normalised descent.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from rich.progress import Progress
from rich.table import Table

from attnlab.analysis import Analysis, AnalysisConfig, Arrays
from attnlab.expectation import Expectation, at_least, at_most

DIRECTIONS = {
    "selected": "patches it selects",
    "best": "patches best for the read-out $v$",
    "random": "randomly chosen patches",
}


@dataclass(frozen=True)
class Config(AnalysisConfig):
    """Options of the analysis."""

    SMOKE: ClassVar = {"images": 4, "steps": 100, "every": 50, "seeds": 2}

    classes: tuple[int, int] = (3, 8)
    """The two digits to tell apart; the first has the label -1."""
    images: int = 30
    """Images of each class."""
    seeds: int = 5
    """Draws of the images, from `seed` on."""
    patch: int = 2
    """Side of a patch, in pixels; divides 8."""
    steps: int = 20000
    """Steps of normalised gradient descent; a multiple of `every`."""
    every: int = 50
    """Steps between measurements."""
    step_size: float = 0.5
    """Length of a step."""


def compute(config: Config, progress: Progress) -> Arrays:
    """What `descent` finds, for every seed."""
    import jax

    runs = [descent(config, config.seed + number, progress) for number in range(config.seeds)]
    return jax.tree.map(lambda *found: np.stack(found), *runs)


def descent(config: Config, seed: int, progress: Progress) -> Arrays:
    """Path of W, the patches selected in the end, and cosines with the maximal margins of three selections."""
    import jax
    import jax.numpy as jnp

    from attnlab.margin import attention_matrix, attention_risk, normalized_descent, rescaled, selected_probability
    from attnlab.training import Session, probe, show_progress, train

    images, labels = draw(config, seed)
    tokens, queries = sequences(images, config.patch)
    readout = fitted_readout(tokens, labels)
    risk = attention_risk(
        jnp.asarray(tokens), jnp.asarray(labels), queries=jnp.asarray(queries), readout=jnp.asarray(readout)
    )
    key = jax.random.key(seed)
    trained = train(
        rescaled(risk),
        {"query_key": jnp.zeros((tokens.shape[-1], queries.shape[-1]))},
        normalized_descent(config.step_size),
        key,
        steps=config.steps,
        every=config.every,
        probes={"matrix": probe(lambda risk, params: attention_matrix(params))},
        session=Session(report=show_progress(progress, "descent")),
    )
    path = np.asarray(trained.records.values["matrix"])
    scores = np.einsum("ntd,rde,ne->rnt", tokens, path, queries)
    values = labels[:, None] * (tokens @ readout)
    choices = {
        "selected": scores[-1].argmax(1),
        "best": values.argmax(1),
        "random": np.asarray(jax.random.randint(key, len(labels), 0, tokens.shape[1])),
    }
    found = {name: margins(tokens, queries, choice) for name, choice in choices.items()}
    attended = jax.vmap(lambda w: selected_probability({"query_key": w}, risk.inputs, jnp.asarray(choices["selected"])))
    arrays = {
        "images": images,
        "labels": labels,
        "steps": trained.records.steps,
        "norms": np.linalg.norm(path, axis=(-2, -1)),
        "probability": np.asarray(attended(trained.records.values["matrix"])),
        "smallest margin": smallest_margin(scores, choices["selected"])
        / np.linalg.norm(path, axis=(-2, -1)).clip(1e-300),
        "rank": ranks(values, choices["selected"]),
        "exceptions": exceptions(values, choices["selected"], found["selected"].support),
    }
    lengths = np.linalg.norm(path, axis=(-2, -1)).clip(1e-300)
    for name, solution in found.items():
        arrays[name] = {
            "choice": choices[name],
            "cosine": np.sum(path * solution.direction, (-2, -1)) / lengths,
            "margin": solution.margin,
            "gap": solution.gap,
            "support": np.count_nonzero(solution.support),
        }
    return arrays


def draw(config: Config, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images of the two classes, drawn by the seed, and their labels -1 and 1."""
    import jax

    from attnlab.data.digits import IMAGES, digit_images

    pixels, digits = (np.asarray(part) for part in digit_images(jax.random.key(seed), IMAGES, targets="labels"))
    for digit in config.classes:
        if np.count_nonzero(digits == digit) < config.images:
            raise ValueError(f"classes hold {digit}, of which there are fewer than images = {config.images} digits.")
    rows = np.concatenate([np.flatnonzero(digits == digit)[: config.images] for digit in config.classes])
    return pixels[rows, ..., 0].astype(float), np.repeat([-1.0, 1.0], config.images)


def sequences(images: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (n, T, pixels + rows + columns), a patch and one-hot codes of its row and column; queries (n, 64).

    Both of unit norm. Places differ, so no two tokens of an image are equal, blank patches included.
    """
    from attnlab.data.digits import POSITION_CODES, SIDE, patches

    pixels = np.asarray(patches(images, (side, side)), float)
    code = np.asarray(POSITION_CODES["one_hot"](SIDE // side, SIDE // side), float)
    tokens = np.concatenate([pixels, np.broadcast_to(code, (len(images), *code.shape))], axis=-1)
    queries = images.reshape(len(images), -1)
    return tuple(array / np.linalg.norm(array, axis=-1, keepdims=True) for array in (tokens, queries))


def fitted_readout(tokens: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The ridge regression of the labels on the mean token: what the head can do before its attention learns."""
    means = tokens.mean(1)
    return np.linalg.solve(means.T @ means + 1e-3 * np.eye(means.shape[1]), means.T @ labels)


def margins(tokens: np.ndarray, queries: np.ndarray, choice: np.ndarray):
    from attnlab.margin import attention_problem, max_margin

    return max_margin(attention_problem(tokens, queries, choice))


def smallest_margin(scores: np.ndarray, choice: np.ndarray) -> np.ndarray:
    """By how much the selected tokens win at least, at every measurement."""
    others = np.arange(scores.shape[-1]) != choice[:, None]
    lead = scores[:, np.arange(len(choice)), choice][..., None] - scores
    return np.where(others, lead, np.inf).min((1, 2))


def ranks(values: np.ndarray, choice: np.ndarray) -> np.ndarray:
    """Rank of the selected token among its image's tokens by value to the loss, 0 for the best."""
    return np.sum(values > values[np.arange(len(choice)), choice][:, None], axis=1)


def exceptions(values: np.ndarray, choice: np.ndarray, support: np.ndarray) -> np.ndarray:
    """Support vectors of each image of a better value than the token selected: none where it is locally optimal."""
    n, length = values.shape
    others = np.arange(length) != choice[:, None]
    better = (values > values[np.arange(n), choice][:, None])[others].reshape(n, length - 1)
    return np.sum(better & support.reshape(n, length - 1), axis=1)


def plot(arrays: Arrays, config: Config):
    """Which places are selected, the direction, attention and margin."""
    from attnlab.plotting.panels import panels

    ends = {name: np.median(1 - arrays[name]["cosine"][:, -1]) for name in DIRECTIONS}
    same = np.count_nonzero(np.all(arrays["rank"] == 0, axis=1))
    figure, axes = panels(
        f"Attention trained on digits turns to the SVM of the patches it selects, 1 - cosine {ends['selected']:.0e};\n"
        f"from that of the best patches it stays {ends['best']:.2g} away; "
        f"in {same} of {config.seeds} draws it selects these (medians)",
        [
            f"digit {config.classes[0]}: the places selected",
            f"digit {config.classes[1]}: the places selected",
            "direction of the trained $W$",
            "attention and margin on the way",
        ],
        note=f"{config.seeds} draws of {config.images} images of each digit, patches of side {config.patch}. "
        "(a), (b): all draws, over the mean image, grey.\n(c), (d): lines: medians, bands: range over the draws;\n"
        "margin: least lead of a selected patch, for $W$ of norm 1",
        height=2.9,
    )
    for panel, label in zip(axes, (-1, 1), strict=False):
        ours = arrays["labels"] == label
        plot_places(panel, arrays["images"][ours].mean(axis=0), arrays["selected"]["choice"][ours], config)
    plot_direction(axes[2], arrays)
    plot_margin(axes[3], arrays)
    return figure


def details(arrays: Arrays, config: Config):
    """Images with their selected patches, one row for each digit."""
    import matplotlib.pyplot as plt

    from attnlab.plotting.panels import WIDTH, name_panels, say

    shown, choice = min(8, config.images), arrays["selected"]["choice"][0]
    figure, grid = plt.subplots(2, shown, figsize=(WIDTH, 2.9), squeeze=False)
    for row, label in zip(grid, (-1, 1), strict=True):
        for axes, i in zip(row, np.flatnonzero(arrays["labels"][0] == label)[:shown], strict=True):
            plot_image(axes, arrays["images"][0, i], choice[i], config)
    name_panels(grid[:, 0], [f"digit {digit}" for digit in config.classes])
    grid[-1, 0].set_xlabel("8 × 8 pixels", fontsize=8)
    agree = np.mean(arrays["rank"] == 0)
    say(
        figure,
        f"The selected patch is the best one for the read-out in {100 * agree:.0f} % of the images",
        f"framed: the patch that trained attention selects; the first {shown} images of a digit in the first draw",
    )
    return figure


def frame_of(place: int, config: Config):
    """A frame around the patch of that number."""
    from matplotlib.patches import Rectangle

    row, column = divmod(int(place), 8 // config.patch)
    corner = column * config.patch - 0.5, row * config.patch - 0.5
    return Rectangle(corner, config.patch, config.patch, fill=False, edgecolor="C1", linewidth=2)


def plot_image(axes, image: np.ndarray, choice: int, config: Config) -> None:
    """An image, its selected patch framed."""
    axes.imshow(image, cmap="gray_r", vmin=0, vmax=1)
    axes.add_patch(frame_of(choice, config))
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def plot_places(axes, mean: np.ndarray, choices: np.ndarray, config: Config) -> None:
    """The mean image of a class, and in a frame the share of its images in which a place is selected."""
    side = 8 // config.patch
    axes.imshow(mean, cmap="gray_r", vmin=0, vmax=2)  # pale: the numbers are to be read
    shares = np.bincount(choices, minlength=side * side) / len(choices)
    for place in np.flatnonzero(shares):
        row, column = divmod(int(place), side)
        axes.add_patch(frame_of(place, config))
        middle = ((column + 0.5) * config.patch - 0.5, (row + 0.5) * config.patch - 0.5)
        box = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
        axes.text(*middle, f"{100 * shares[place]:.0f} %", ha="center", va="center", fontsize=8, bbox=box)
    axes.set(xlabel="column of pixels", ylabel="row of pixels", xticks=(0, 7), yticks=(0, 7))
    axes.spines[:].set_visible(True)


def plot_direction(axes, arrays: Arrays) -> None:
    """One less the cosine of W with each selection's solution, along descent."""
    from attnlab.plotting.curves import range_band

    steps = arrays["steps"][0, 1:]
    for color, (name, label) in enumerate(DIRECTIONS.items()):
        angles = (1 - arrays[name]["cosine"][:, 1:]).T
        range_band(axes, steps, angles, f"C{color}", label, ("-", "--", "-.")[color])
    late = steps[steps > steps[-1] / 50]
    last = np.median(1 - arrays["selected"]["cosine"][:, -1])
    axes.loglog(late, last * (late[-1] / late) ** 2, ":", color="black", label="law: $t^{-2}$")
    axes.set(xlabel="step of normalised descent $t$", ylabel="1 - cosine of $W$ with the solution")
    low, high = axes.get_ylim()
    axes.set_ylim(low / 30, high)  # room for the legend
    axes.legend(loc="lower left", title="solution for", title_fontsize=8, alignment="left")


ROUNDING = 1e-14  # beneath it, 1 - probability is none of attention's


def plot_margin(axes, arrays: Arrays) -> None:
    """Attention off the selected patches, and the margin on the way as a share of the maximal one."""
    from attnlab.plotting.curves import range_band

    steps, missing = arrays["steps"][0, 1:], 1 - arrays["probability"][:, 1:]
    short = 1 - arrays["smallest margin"][:, 1:] / arrays["selected"]["margin"][:, None]
    for style, color, label, values in (
        ("-", "C0", "attention off its patch, median image", np.median(missing, axis=2)),
        ("--", "C1", "attention off its patch, worst image", missing.max(axis=2)),
        ("-.", "C2", "1 - margin / maximal margin", np.minimum(short, 1.0)),
    ):
        range_band(axes, steps, np.maximum(values, ROUNDING).T, color, label, style)
    axes.axhspan(ROUNDING / 10, 2 * ROUNDING, color="0.9", linewidth=0, label="rounding", zorder=0)
    axes.set(xscale="log", yscale="log", xlabel="step of normalised descent $t$", ylabel="share")
    axes.set_ylim(bottom=1e-24)  # room for the legend under the curves
    axes.legend(loc="lower left")


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """W comes to the solution of the patches it selects, not to those of others, and attends to them alone."""
    source, limit = (
        "Tarzanagh, Li, Thrampoulidis, Oymak, arXiv 2308.16898",
        "a limit: what is left falls with the steps",
    )
    angles = {name: 1 - arrays[name]["cosine"][:, -1] for name in DIRECTIONS}
    median = np.median(1 - arrays["probability"][:, -1], axis=1)
    # where the best patch of every image is selected, the solution for the best ones is that for the selected ones
    differ = np.any(arrays["rank"] > 0, axis=1)
    others = np.concatenate([(angles["best"] / angles["selected"])[differ], angles["random"] / angles["selected"]])
    better = np.count_nonzero(arrays["exceptions"], axis=1)
    return [
        at_most(
            "certified gap of the solution, by draw",
            arrays["selected"]["gap"],
            1e-6,
            because="of the solver",
            source=source,
        ),
        at_most(
            "1 - cosine with the solution of the selected patches, by draw",
            angles["selected"],
            1e-2,
            because=limit,
            source=source,
        ),
        at_least(
            "the same over it: best patches, where others are selected; random ones", others, 2.0, source="control"
        ),
        at_most("attention off the selected patch, median image", median, 0.01, because=limit, source=source),
        at_most("images with a better support vector", better, 0.2 * config.images, because=limit, source=source),
    ]


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """The three selections, medians over the draws; what is selected."""
    table = Table("solution of the", "cosine with the trained W", "margin", "support vectors", "certified gap")
    for name, label in DIRECTIONS.items():
        margin, support, gap = (np.median(arrays[name][what]) for what in ("margin", "support", "gap"))
        cosine = np.median(arrays[name]["cosine"][:, -1])
        table.add_row(label.replace("$", ""), f"{cosine:.6f}", f"{margin:.4g}", f"{support:g}", f"{gap:.0e}")
    patches = Table(
        "images", "best patch selected", "least attention to the selected", "images with a better support vector"
    )
    agree = np.mean(arrays["rank"] == 0)
    error = np.sqrt(agree * (1 - agree) / arrays["rank"].size)
    least, exceptions = arrays["probability"][:, -1].min(), np.count_nonzero(arrays["exceptions"])
    patches.add_row(str(arrays["labels"].size), f"{agree:.2f} +- {error:.2f}", f"{least:.4f}", str(exceptions))
    return [table, patches]


ANALYSIS = Analysis("margin-digits", Config, compute, plot, tables, findings, __doc__, slow=True, details=details)

if __name__ == "__main__":
    ANALYSIS.main()
