"""What the pages take from the lab itself: its claims, its names, its figures.

```{claims} curvature attention     every claim of these strands: statement, source, command
```{front-door} curvature           every name of a topic of the front door, with its docstring
```{package} attnlab.curvature      every public name of a package
```{parameters}                     parameter names and shapes of the models
```{figures}                        the figures of figures/, each with its finding and command
```{benchmarks}                     ratios of benchmarks/results/, with the machine that they were measured on
"""

import json
import re
from html import escape
from pathlib import Path
from typing import Any, ClassVar

import matplotlib.pyplot as plt
from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from attnlab.report.mathematics import mathematics, with_formulas

ROOT = Path(__file__).parents[2]


def reset(gallery: dict[str, Any], script: Path) -> None:
    """Every tutorial starts with matplotlib as it is, in attnlab's style."""
    from attnlab.plotting.style import STYLE

    plt.close("all")
    plt.rcdefaults()
    plt.style.use(STYLE)


def strands() -> dict[str, list[Any]]:
    """The claims by module, whose name is their strand."""
    from attnlab.claims import load_claims

    found: dict[str, list[Any]] = {}
    for claim in load_claims().values():
        found.setdefault(claim.measure.__module__.rpartition(".")[2], []).append(claim)
    return found


class Claims(Directive):
    """A list of claims."""

    optional_arguments = 20

    def run(self) -> list[nodes.Node]:
        """Raises `KeyError` for a strand that does not exist."""
        found = strands()
        claims = [claim for name in self.arguments for claim in found[name]]
        return [nodes.raw("", f'<dl class="claims">{"".join(map(self.entry, claims))}</dl>', format="html")]

    @staticmethod
    def entry(claim: Any) -> str:
        """Statement, source, and the command that checks it."""
        what = escape((claim.measure.__doc__ or "").strip().split("\n\n")[0])
        return (
            f'<dt id="claim-{claim.name}">{claim.name}</dt><dd><p>{mathematics(claim.statement)}</p><p>{what}</p>'
            f"<p><em>{escape(claim.source)}</em><br><code>attnlab verify {claim.name}</code></p></dd>"
        )


class Disagreements(Directive):
    """Claims that contradict a published statement."""

    def run(self) -> list[nodes.Node]:
        """What was published, under which conditions it did not hold, and the command."""
        found = [claim for claims in strands().values() for claim in claims if claim.disagrees_with]
        entries = "".join(
            f'<dt id="disagreement-{claim.name}">{claim.name}</dt>'
            f"<dd><p>{escape(claim.disagrees_with.rstrip('.'))}.</p>"
            f"<p>Measured: {mathematics(claim.statement)}</p><p><code>attnlab verify {claim.name}</code></p></dd>"
            for claim in found
        )
        return [nodes.raw("", f'<dl class="claims">{entries}</dl>', format="html")]


class FrontDoor(SphinxDirective):
    """The names of one topic of the front door."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """Raises `KeyError` for a topic that does not exist."""
        import attnlab as al

        names = [(module, name) for module, names in al.TOPICS[self.arguments[0]].items() for name in names]
        return documented(self, names)


class Package(SphinxDirective):
    """The public names of a package."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Those of its `__all__`, or all that it defines, that the page of the front door has not."""
        import importlib

        import attnlab as al

        package = importlib.import_module(self.arguments[0])
        listed = {name for modules in al.TOPICS.values() for names in modules.values() for name in names}
        own = [name for name, thing in vars(package).items() if getattr(thing, "__module__", "") == package.__name__]
        public = getattr(package, "__all__", [name for name in own if not name.startswith("_")])
        names = [(self.arguments[0], name) for name in public if name not in listed]
        return documented(self, names)


def documented(directive: SphinxDirective, names: list[tuple[str, str]]) -> list[nodes.Node]:
    """The docstrings of names, as autodoc shows them."""
    import importlib
    import inspect

    found: list[str] = []
    for module, name in names:
        thing = getattr(importlib.import_module(module), name)
        kind = "class" if inspect.isclass(thing) else "function" if callable(thing) else "data"
        if not inspect.isclass(thing) and not inspect.isfunction(thing):
            kind = "data"
        if isinstance(thing, dict):  # a table: its docstring would be that of dict
            found += [f".. py:data:: {module}.{name}", "", f"   Rows: {', '.join(f'`{row}`' for row in thing)}.", ""]
            continue
        found += [f".. auto{kind}:: {module}.{name}", *(["   :no-value:"] if kind == "data" else []), ""]
    return directive.parse_text_to_nodes("\n".join(["```{eval-rst}", *found, "```"]))


class Parameters(Directive):
    """Names and shapes of the parameters of the models, made from the models."""

    MODELS: ClassVar = {
        "SelfAttention(AttentionConfig(key_dim=8, value_dim=4, heads=2, output_dim=12))": "attention",
        "Transformer(TransformerConfig(attention, layers=1, mlp_width=24))": "transformer",
        "GPT-2, one layer": "gpt2",
        "GPT-NeoX (Pythia), one layer": "gpt_neox",
        "Llama (SmolLM2), one layer": "llama",
        "BERT (MiniLM), one layer": "bert",
    }

    def run(self) -> list[nodes.Node]:
        """One table a model."""
        found = []
        for title, kind in self.MODELS.items():
            rows = "".join(
                f"<tr><td><code>{escape(name)}</code></td><td>{escape(str(shape))}</td></tr>"
                for name, shape in parameters(kind)
            )
            head = "<thead><tr><th>parameter</th><th>shape</th></tr></thead>"
            table = f"<table><caption>{escape(title)}</caption>{head}<tbody>{rows}</tbody></table>"
            found.append(nodes.raw("", f'<div class="table-wrapper">{table}</div>', format="html"))
        return found


def parameters(kind: str) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a small model's parameters, on tokens of width 12."""
    import jax
    import jax.numpy as jnp

    import attnlab as al
    from attnlab.trees import leaf_names

    attention = al.AttentionConfig(key_dim=8, value_dim=4, heads=2, output_dim=12)
    models = {
        "attention": lambda: al.SelfAttention(attention),
        "transformer": lambda: al.Transformer(al.TransformerConfig(attention, layers=1, mlp_width=24)),
    }
    if kind in models:
        model, inputs = models[kind](), jnp.zeros((1, 5, 12))
    else:
        model, inputs = pretrained(kind)
    shapes = jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]
    return [(name, leaf.shape) for name, leaf in zip(leaf_names(shapes), jax.tree.leaves(shapes), strict=True)]


SETTINGS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "n_embd": 12, "n_layer": 1, "n_head": 2, "n_positions": 16, "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
    },
    "gpt_neox": {
        "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
        "max_position_embeddings": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-5, "rotary_pct": 1.0,
        "rotary_emb_base": 10000, "use_parallel_residual": True, "tie_word_embeddings": False,
    },
    "llama": {
        "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 24, "max_position_embeddings": 16, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        "tie_word_embeddings": True, "hidden_act": "silu",
    },
    "bert": {
        "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
        "max_position_embeddings": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "type_vocab_size": 2,
    },
}  # fmt: skip
"""What the config.json of a small model of each family says, beside `model_type` and `vocab_size`."""


def pretrained(kind: str) -> tuple[Any, Any]:
    """A small model of a pretrained family, and inputs of it."""
    from tempfile import TemporaryDirectory

    import jax.numpy as jnp

    import attnlab as al
    from attnlab.models.pretrained import load_config
    from attnlab.models.text_encoder import TextEncoder, TokenBatch

    with TemporaryDirectory() as folder:
        settings = {"model_type": kind, "vocab_size": 32} | SETTINGS[kind]
        (Path(folder) / "config.json").write_text(json.dumps(settings))
        config = load_config(folder)
    tokens = jnp.zeros((1, 5), int)
    if kind == "bert":
        return TextEncoder(config), TokenBatch(tokens, jnp.ones((1, 5), bool))
    return al.LanguageModel(config), tokens


class Benchmarks(Directive):
    """What benchmarks found, as kept by `--json`."""

    def run(self) -> list[nodes.Node]:
        """A table for each file, under its command, machine and versions."""
        files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
        tables = "".join(self.table(json.loads(file.read_text())) for file in files)
        return [nodes.raw("", tables or "<p>None are kept here.</p>", format="html")]

    @staticmethod
    def table(found: dict[str, Any]) -> str:
        """The ratios, and the other numbers."""
        machine, versions = found["machine"], ", ".join(" ".join(each) for each in found["versions"].items())
        where = f"{machine['platform']}, {machine['cpus']} processors, {machine['device']}; {versions}"
        numbers = {name: value for name, value in found["values"].items() if isinstance(value, int | float)}
        tables = [("what, and against what", "ratio", found["ratios"]), ("what", "value", numbers)]
        shown = "".join(number_table(*each) for each in tables if each[2])
        return f"<h2><code>{escape(found['command'])}</code></h2><p>{escape(where)}</p>{shown}"


def number_table(what: str, number: str, named: dict[str, float]) -> str:
    """A row for each name; where names end in a case, as in "products: 128 tokens", a column for each case."""
    split = [name.rpartition(": ") if ": " in name else (name, "", number) for name in named]
    rows, cases = dict.fromkeys(row for row, _, _ in split), dict.fromkeys(case for _, _, case in split)
    found = {(row, case): value for (row, _, case), value in zip(split, named.values(), strict=True)}
    if len(found) < 0.5 * len(rows) * len(cases):  # the cases differ from row to row
        rows, cases, found = dict.fromkeys(named), {number: None}, {(name, number): named[name] for name in named}
    head = "".join(f"<th>{escape(cell)}</th>" for cell in (what, *cases))
    body = "".join(
        f"<tr><td>{escape(row)}</td>"
        + "".join(f"<td>{found[row, case]:.3g}</td>" if (row, case) in found else "<td></td>" for case in cases)
        + "</tr>"
        for row in rows
    )
    return f'<div class="table-wrapper"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


class Figures(Directive):
    """All figures with what they show."""

    def run(self) -> list[nodes.Node]:
        """A grid of images that link to themselves at full size."""
        return [nodes.raw("", f'<div class="figures">{"".join(map(self.entry, manifests()))}</div>', format="html")]

    @staticmethod
    def entry(found: tuple[str, dict[str, Any], str]) -> str:
        """One figure."""
        name, record, summary = found
        findings = record.get("findings", [])
        passed = sum(bool(finding.get("passed")) for finding in findings)
        more = f' <a href="../_static/figures/{name}-details.png">Details.</a>' if detailed(name) else ""
        verdict = f"{passed} of {len(findings)} findings hold. " if findings else ""
        image = f'<img loading="lazy" alt="{escape(summary)}" src="../_static/figures/{name}.png">'
        message = with_formulas(record["message"]) + "." if record.get("message") else ""
        words = f"<strong>{message}</strong> {escape(summary)} {verdict}{more}<br><code>attnlab run {name}</code>"
        return (
            f'<figure id="{name}"><a href="../_static/figures/{name}.png">{image}</a>'
            f"<figcaption>{words}</figcaption></figure>"
        )


def detailed(name: str) -> bool:
    """Whether a figure has a second one that shows more."""
    return (ROOT / "figures" / f"{name}-details.png").exists()


def manifests() -> list[tuple[str, dict[str, Any], str]]:
    """Name, manifest and first sentence of every committed figure's analysis."""
    import ast

    found = []
    for manifest in sorted((ROOT / "figures").glob("*.json")):
        name = manifest.stem
        script = ROOT / "analyses" / f"{name.replace('-', '_')}.py"
        if script.exists():
            words = ast.get_docstring(ast.parse(script.read_text())) or ""
            found.append((name, json.loads(manifest.read_text()), " ".join(words.split("\n\n")[0].split())))
    return found


def plain_mathematics(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """In docstrings |x|, A^* and w_ are mathematics, and not marks: outside of code they are escaped."""
    example = False
    for number, text in enumerate(lines):
        example = bool(text.strip()) and (example or text.lstrip().startswith(">>>"))
        if not example:
            parts = text.split("`")
            parts[::2] = [re.sub(r"([|*])|(?<=\w)(_)(?!\w)", r"\\\1\2", part) for part in parts[::2]]
            lines[number] = "`".join(parts)


def short_types(app: Sphinx, what: str, name: str, thing: Any, options: Any, signature: str, result: str) -> Any:
    """Types by the names that one writes."""
    return tuple(part and part.replace("jaxlib._jax.Array", "Array") for part in (signature, result))


def copy_figures(app: Sphinx, exception: Exception | None) -> None:
    """The figures lie once in the repository and once in the built site, as do the pages that tutorials wrote."""
    import shutil

    if exception is None and app.builder.format == "html":
        made = {"figures": (ROOT / "figures").glob("*.png"), "explorers": (ROOT / "docs" / "tutorials").glob("*.html")}
        for folder, files in made.items():
            target = Path(app.outdir) / "_static" / folder
            target.mkdir(parents=True, exist_ok=True)
            for file in files:
                shutil.copy(file, target)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directives."""
    app.add_directive("claims", Claims)
    app.add_directive("disagreements", Disagreements)
    app.add_directive("front-door", FrontDoor)
    app.add_directive("package", Package)
    app.add_directive("parameters", Parameters)
    app.add_directive("figures", Figures)
    app.add_directive("benchmarks", Benchmarks)
    app.connect("autodoc-process-docstring", plain_mathematics, priority=100)  # before sections are read
    app.connect("autodoc-process-signature", short_types)
    app.connect("build-finished", copy_figures)
    return {"parallel_read_safe": False, "parallel_write_safe": False}
