"""Gradient descent on attention becomes a support vector machine: its path, its direction and its curvature.

A problem in two dimensions with its separating lines and the path of the prompt; the cosine of W, and of K Q^T, with
the solutions of least Frobenius and nuclear norm, over many random problems; and the Hessian along one of the ways.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from rich.progress import Progress
from rich.table import Table

from attnlab.analysis import Analysis, AnalysisConfig, Arrays
from attnlab.expectation import Expectation, at_least, at_most

NORMS = {"frobenius": "Frobenius", "nuclear": "nuclear"}
RUNS = {"weights": "$W$", "factors": "$KQ^\\top$"}
PARTS = ("hessian", "ggn", "functional")


@dataclass(frozen=True)
class Config(AnalysisConfig):
    """Options of the analysis."""

    SMOKE: ClassVar = {"problems": 3, "steps": 60, "every": 20}

    problems: int = 100
    """Random problems of the convergence curves."""
    sequences: int = 6
    """Sequences n of a problem."""
    tokens: int = 8
    """Tokens T of a sequence."""
    dim: int = 10
    """Token dimension d."""
    steps: int = 2000
    """Steps of normalised gradient descent; a multiple of `every`."""
    every: int = 25
    """Steps between measurements."""
    step_size: float = 0.1
    """Length of a step."""


def compute(config: Config, progress: Progress) -> Arrays:
    """The path in two dimensions, the curves of the ensembles, the curvature of one problem."""
    import jax

    keys = jax.random.split(jax.random.key(config.seed), 3)
    task = progress.add_task("plane, convergence, curvature", total=3, status="")
    arrays: Arrays = {}
    for key, part in zip(keys, (plane, convergence, curvature), strict=True):
        arrays[part.__name__] = part(config, key)
        progress.advance(task)
    return arrays


def plane(config: Config, key):
    """Three sequences of four tokens in the plane, and the prompt p of descent on the loss of one read-out."""
    import jax
    import jax.numpy as jnp

    from attnlab.margin import Status, attention_risk, max_margin, normalized_descent, rescaled, vector_problem
    from attnlab.training import probe, train

    readout = jnp.array([0.8, 0.6])
    for number in range(1000):  # until the best tokens can win
        tokens = jax.random.normal(jax.random.fold_in(key, number), (3, 4, 2))
        selection = jnp.argmax(tokens @ readout, axis=-1)
        solution = max_margin(vector_problem(tokens, selection))
        off_readout = abs(solution.direction @ np.array([-0.6, 0.8]))
        if (
            solution.status == Status.SOLVED
            and solution.margin > 0.3
            and off_readout > 0.4
            and solution.support.sum() == 2
        ):
            break
    risk = rescaled(attention_risk(tokens, jnp.ones(3), readout=readout))
    watch = {"prompt": probe(lambda risk, params: params["prompt"])}
    starts = 2.0 * jnp.array([[0.0, 0.0], [-1.0, 1.0], [0.6, -1.2], [-1.5, -0.5]])
    trained = train(
        risk,
        {"prompt": starts},
        normalized_descent(config.step_size / 2),
        jax.random.split(key, len(starts)),
        steps=config.steps,
        every=5,
        probes=watch,
    )
    return {
        "tokens": tokens,
        "selection": selection,
        "readout": readout,
        "direction": solution.direction,
        "solution": solution.solution,
        "support": solution.support,
        "path": trained.records.values["prompt"],
    }


def draw(config: Config, key, problems: int):
    """Stacked objectives of Gaussian problems with random labels, and the best token of each sequence."""
    import jax
    import jax.numpy as jnp

    from attnlab.margin import attention_risk

    keys = jax.random.split(key, 4)
    tokens = jax.random.normal(keys[0], (problems, config.sequences, config.tokens, config.dim))
    queries = jax.random.normal(keys[1], (problems, config.sequences, config.dim))
    readout = jax.random.normal(keys[2], (problems, config.dim))
    labels = jax.random.rademacher(keys[3], (problems, config.sequences), dtype=readout.dtype)
    build = lambda x, y, z, v: attention_risk(x, y, queries=z, readout=v)  # noqa: E731
    values = labels[..., None] * jnp.einsum("mntd,md->mnt", tokens, readout)
    return jax.vmap(build)(tokens, labels, queries, readout), np.asarray(jnp.argmax(values, axis=-1))


def starts(config: Config, key, problems: int):
    """W = 0, and small Gaussian factors K, Q."""
    import jax
    import jax.numpy as jnp

    factors = jax.random.normal(key, (2, problems, config.dim, config.dim)) / 100
    return {"weights": {"query_key": jnp.zeros_like(factors[0])}, "factors": {"key": factors[0], "query": factors[1]}}


def convergence(config: Config, key):
    """Cosine of every run with the solutions of the tokens it selects in the end, and whether these are the best."""
    import jax

    from attnlab.margin import attention_matrix, attention_problem, max_margin, normalized_descent, rescaled
    from attnlab.training import probe, train

    risks, best = draw(config, key, config.problems)
    tokens, queries = (np.asarray(risks.inputs[name]) for name in ("tokens", "queries"))
    measured, optimizer = {}, normalized_descent(config.step_size)
    for run, params in starts(config, jax.random.fold_in(key, 1), config.problems).items():
        trained = train(
            jax.vmap(rescaled)(risks),
            params,
            optimizer,
            jax.random.split(key, config.problems),
            steps=config.steps,
            every=config.every,
            own_risks=True,
            probes={"matrix": probe(lambda risk, params: attention_matrix(params))},
        )
        matrices = np.asarray(trained.records.values["matrix"])
        chosen = np.einsum("mntd,mde,mne->mnt", tokens, matrices[-1], queries).argmax(-1)
        measured["steps"] = trained.records.steps
        measured[run] = {"global": (chosen == best).all(-1), "norm": np.linalg.norm(matrices, axis=(-2, -1))}
        for norm in NORMS:
            problems = (attention_problem(x, z, c, norm=norm) for x, z, c in zip(tokens, queries, chosen, strict=True))
            directions = np.stack([max_margin(problem).direction for problem in problems])
            lengths = np.linalg.norm(directions, axis=(-2, -1)) * np.maximum(measured[run]["norm"], 1e-300)
            measured[run][norm] = np.sum(matrices * directions, (-2, -1)) / lengths
    return measured


def curvature(config: Config, key):
    """Extreme eigenvalues of H, norms of H, H_o and H_f in W, and attention, along gradient descent on one problem.

    Its steps are a tenth of `step_size` times the gradient, so that the first ones show too.
    """
    import jax
    import jax.numpy as jnp
    import optax

    from attnlab.curvature import ggn, hessian
    from attnlab.margin import selected_probability
    from attnlab.training import probe, train

    risks, best = draw(config, key, 1)
    risk = jax.tree.map(lambda leaf: leaf[0], risks)

    def measure(risk, params):
        whole, outer = hessian(risk, params).dense(), ggn(risk, params).dense()
        eigenvalues = jnp.linalg.eigvalsh(whole)
        return {
            "largest": eigenvalues[-1],
            "smallest": eigenvalues[0],
            "hessian": jnp.linalg.norm(whole),
            "ggn": jnp.linalg.norm(outer),
            "functional": jnp.linalg.norm(whole - outer),
            "probability": jnp.mean(selected_probability(params, risk.inputs, jnp.asarray(best[0]))),
            "norm": jnp.linalg.norm(params["query_key"]),
        }

    params = {"query_key": jnp.zeros((config.dim, config.dim))}
    trained = train(
        risk,
        params,
        optax.sgd(config.step_size / 10),
        key,
        steps=config.steps,
        every=config.every,
        probes={"curvature": probe(measure)},
    )
    return {"steps": trained.records.steps, **trained.records.values["curvature"]}


def plot(arrays: Arrays, config: Config):
    """The plane; the cosines; the curvature."""
    from attnlab.plotting.panels import panels

    ends = angles(arrays)
    verdict = "nearer to" if ends["factors"]["nuclear"] < ends["factors"]["frobenius"] else "not nearer to"
    figure, axes = panels(
        f"After {config.steps} steps $W$ is the SVM solution of least Frobenius norm within "
        f"{ends['weights']['frobenius']:.0e} (1 - cosine),\n$KQ^\\top$ is {verdict} that of least nuclear norm: "
        f"{ends['factors']['nuclear']:.2g} against {ends['factors']['frobenius']:.2g} (medians)",
        [
            "one problem in the plane",
            "path of the prompt $p$ there",
            f"direction, {config.problems} problems",
            "curvature in $W$, one problem",
        ],
        note="(a): filled: selected tokens; lines: where their margin is 1; $p^{mm}$: direction of the largest margin; "
        "$v$: read-out.\n(b): four starts (dots). (c): medians and middle half of the problems (one seed). "
        "(d): plain gradient descent;\n$H = H_o + H_f$: Hessian, its outer-product and its functional part",
        height=3.1,
    )
    plot_tokens(axes[0], arrays["plane"])
    plot_path(axes[1], arrays["plane"])
    plot_convergence(axes[2], arrays["convergence"])
    plot_curvature(axes[3], arrays["curvature"])
    return figure


def angles(arrays: Arrays) -> dict[str, dict[str, float]]:
    """Medians of one less the cosine at the end, by run and norm of the solution."""
    now = arrays["convergence"]
    return {run: {norm: float(np.median(1 - now[run][norm][-1])) for norm in NORMS} for run in RUNS}


def plot_tokens(axes, now: Arrays) -> None:
    """Tokens by sequence, the selected ones filled, and through each selected token the line where its margin is 1."""
    direction, solution = now["direction"], now["solution"]
    along = np.array([-direction[1], direction[0]])
    markers, lines = "os^", ("--", "-.", ":")
    limit = 1.15 * np.abs(now["tokens"]).max()
    for color, (tokens, chosen) in enumerate(zip(now["tokens"], now["selection"], strict=True)):
        others = np.delete(tokens, chosen, axis=0)
        axes.plot(*others.T, markers[color], color=f"C{color}", fillstyle="none", label=f"sequence {color + 1}")
        axes.plot(*tokens[chosen], markers[color], color=f"C{color}", markersize=9)
        edge = tokens[chosen] - direction / np.linalg.norm(solution)
        line = edge[:, None] + along[:, None] * np.array([-20, 20])
        axes.plot(*line, lines[color], color=f"C{color}", linewidth=1)
    for vector, color, name in ((direction, "black", "$p^{mm}$"), (now["readout"], "0.4", "$v$")):
        axes.annotate("", 0.8 * vector, (0, 0), arrowprops={"arrowstyle": "->", "color": color})
        axes.annotate(name, 0.95 * vector, color=color, ha="center", va="center")
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xlabel="$x_1$", ylabel="$x_2$")
    axes.legend(loc="lower left", handletextpad=0.2)


def plot_path(axes, now: Arrays) -> None:
    """The prompt from several starts, and the ray of the solution."""
    path, direction = now["path"], now["direction"]
    reach = 0.45 * np.linalg.norm(path[-1], axis=-1).max()
    for member in range(path.shape[1]):
        shown = path[np.linalg.norm(path[:, member], axis=-1) < reach, member]
        label = "descent, by start" if member == 0 else None
        axes.plot(*shown.T, ("-", "--", "-.", ":")[member], color=f"C{member}", label=label)
        axes.plot(*path[0, member], "o", color=f"C{member}")
    axes.plot(*np.outer(direction, [0, reach]), ":", color="black", label="law: $p^{mm}$")
    scaled = now["readout"] / np.linalg.norm(now["readout"])
    axes.plot(*np.outer(scaled, [0, reach / 2]), "-", color="0.6", linewidth=1, label="read-out $v$")
    axes.set(xlabel="$p_1$", ylabel="$p_2$")
    axes.set_aspect("equal", adjustable="datalim")
    axes.legend(loc="upper left")


def plot_convergence(axes, now: Arrays) -> None:
    """One less the cosine: median over the problems, and the band of the middle half."""
    steps = now["steps"][1:]
    for color, (run, label) in enumerate(RUNS.items()):
        for norm, style in zip(NORMS, ("-", "--"), strict=True):
            quartiles = np.quantile(1 - now[run][norm][1:], (0.25, 0.5, 0.75), axis=1)
            axes.loglog(steps, quartiles[1], style, color=f"C{color}", label=f"{label}, {NORMS[norm]} solution")
            axes.fill_between(steps, quartiles[0], quartiles[2], color=f"C{color}", alpha=0.2, linewidth=0)
    own = np.median(1 - now["weights"]["frobenius"][-1])
    axes.loglog(steps, own * (steps[-1] / steps) ** 2, ":", color="black", label="law: $t^{-2}$")
    axes.set(xlabel="step of normalised descent $t$", ylabel="1 - cosine with the solution")
    low, high = axes.get_ylim()
    axes.set_ylim(low / 30, high)  # room for the legend
    axes.legend(loc="lower left")


def plot_curvature(axes, now: Arrays) -> None:
    """Norms of H and its parts and its negative eigenvalue against the size of W."""
    from attnlab.plotting.style import PARTS as LOOKS

    norm = now["norm"]
    for part, line in zip(PARTS, ("-", "--", "-."), strict=True):
        color, _, label = LOOKS[part]
        axes.semilogy(norm, now[part], line, color=color, label=f"norm of {label}")
    negative = np.where(now["smallest"] < -1e-12 * now["largest"], -now["smallest"], np.nan)
    axes.semilogy(norm, negative, ":", color="C3", label="|least eigenvalue| of $H$\nwhile it is negative")
    away = {"linestyle": (0, (4, 1, 1, 1, 1, 1)), "color": "C2", "label": "attention off the best tokens"}
    axes.semilogy(norm, 1 - now["probability"], **away)
    axes.set(xlabel=r"$\|W\|_F$ along gradient descent", ylabel="size")
    low, high = axes.get_ylim()
    axes.set_ylim(low / 30, high)  # room for the legend
    axes.legend(loc="lower left")


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """W turns to the Frobenius solution, its factors to the nuclear one; and the curvature vanishes on the way."""
    source, limit = (
        "Tarzanagh, Li, Thrampoulidis, Oymak, arXiv 2308.16898",
        "a limit: what is left falls with the steps",
    )
    weights, factors = (angles(arrays)[run] for run in RUNS)
    other = weights["nuclear"] / weights["frobenius"]
    own = factors["nuclear"] / factors["frobenius"]
    now = arrays["curvature"]
    path = arrays["plane"]["path"][-1]
    prompt = np.min(path @ arrays["plane"]["direction"] / np.linalg.norm(path, axis=-1))
    return [
        at_least("plane: least cosine of the prompt with its solution", prompt, 0.99, because=limit, source=source),
        at_most(
            "W: 1 - cosine with the Frobenius solution, median",
            weights["frobenius"],
            1e-3,
            because=limit,
            source=source,
        ),
        at_least("W: the nuclear solution over that", other, 5.0, because=limit, source="control"),
        at_most(
            "K Q^T: 1 - cosine with the nuclear solution over that with the Frobenius one",
            own,
            0.2,
            because=limit,
            source=source,
        ),
        at_most(
            "norm of H at the end over the largest",
            now["hessian"][-1] / now["hessian"].max(),
            0.5,
            because=limit,
            source="derived here",
        ),
    ]


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """Cosines at the end, shares of global solutions, curvature at the end."""
    table = Table(
        "run", "global solutions", "cosine with Frobenius", "cosine with nuclear", title="medians over problems"
    )
    for run in RUNS:
        share = arrays["convergence"][run]["global"]
        cosines = (f"{np.median(arrays['convergence'][run][norm][-1]):.5f}" for norm in NORMS)
        error = np.sqrt(share.mean() * (1 - share.mean()) / len(share))
        table.add_row({"weights": "W", "factors": "K Q^T"}[run], f"{share.mean():.2f} +- {error:.2f}", *cosines)
    curve = Table("quantity", "at the start", "at the end", title="curvature in W along gradient descent")
    for name in ("largest", "smallest", *PARTS, "norm", "probability"):
        values = arrays["curvature"][name]
        curve.add_row(name, f"{values[0]:.3g}", f"{values[-1]:.3g}")
    return [table, curve]


ANALYSIS = Analysis("margin-path", Config, compute, plot, tables, findings, __doc__, slow=True)

if __name__ == "__main__":
    ANALYSIS.main()
