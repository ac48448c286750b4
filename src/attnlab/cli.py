"""The command `attnlab`. JAX is imported only once there is something to compute."""

import argparse
import ast
import importlib.util
import sys
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

from rich.console import Console
from rich.table import Table


def analyses_folder() -> Path:
    """Where the analysis scripts are: inside an installed package, or beside src/ in a checkout."""
    package = Path(__file__).parent
    return next(folder for folder in (package / "_analyses", package.parents[1] / "analyses") if folder.is_dir())


def analysis_scripts() -> dict[str, Path]:
    """Script of every analysis by name (`attention-spectrum` is attention_spectrum.py)."""
    scripts = sorted(analyses_folder().glob("*.py"))
    return {path.stem.replace("_", "-"): path for path in scripts if not path.stem.startswith("_")}


def first_sentence(script: Path) -> str:
    """What a script's docstring says first, read without running it."""
    docstring = ast.get_docstring(ast.parse(script.read_text())) or ""
    return docstring.split("\n\n")[0].replace("\n", " ")


def load_script(path: Path) -> ModuleType:
    """The script as a module."""
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[path.stem] = module
    specification.loader.exec_module(module)
    return module


def run(name: str, arguments: Sequence[str]) -> None:
    """Run the analysis called `name` with its own flags. Raises `ValueError` for an unknown one."""
    scripts = analysis_scripts()
    if name not in scripts:
        from attnlab.checks import unknown_name

        raise unknown_name("analysis", name, scripts)
    load_script(scripts[name]).ANALYSIS.main(arguments)


def list_analyses(console: Console) -> None:
    """Print every analysis with its first sentence."""
    table = Table("analysis", "what it shows")
    for name, script in analysis_scripts().items():
        table.add_row(name, first_sentence(script))
    console.print(table)


def load_all_claims(files: Sequence[Path]) -> list[str]:
    """Configure JAX and load the package's claims and those of `files`; returns the names of the latter's."""
    from attnlab.analysis import configure_jax
    from attnlab.claims import load_claims

    configure_jax("float64")
    known = set(load_claims())
    for path in files:
        before = len(load_claims())
        try:
            load_script(path)
        except OSError:
            raise
        except Exception as error:
            raise ValueError(f"{path} cannot be loaded: {type(error).__name__}: {error}. Mend it first.") from error
        if len(load_claims()) == before:
            raise ValueError(
                f"{path} holds no claim; expected at least one function under @claim(...) of attnlab.claims."
            )
    return [name for name in load_claims() if name not in known]


def report(given: argparse.Namespace, console: Console) -> None:
    """Write the report from the verdicts and figures that are there; verify all claims first where no file of verdicts
    is named and none is there. Raises `OSError` or `ValueError` for one that cannot be read."""
    from attnlab.report import read_verdicts, write_report
    from attnlab.runs import check_writable

    check_writable(given.output)
    path = given.verdicts or VERDICTS
    if given.verdicts is None and not path.exists():
        say(console, f"no verdicts in {path}: verifying every claim first")
        verify(parser().parse_args(["verify", "--json", str(path)]), console)
    earlier = None if given.compare is None else read_verdicts(given.compare)
    left_out = write_report(given.output, read_verdicts(path), given.figures, analysis_scripts(), earlier)
    say(console, f"wrote {given.output}", *(f"left out: {reason}" for reason in left_out))


def figures(given: argparse.Namespace, console: Console) -> bool:
    """Make the figures again whose code has changed, and the gallery of them, or list them; whether none failed.

    Raises `OSError` or `ValueError` for a folder that cannot be written to, an unknown name or a broken manifest.
    """
    from attnlab.report.gallery import gallery
    from attnlab.report.remake import jobs, jobs_table, remake
    from attnlab.runs import check_writable, replace_file

    scripts = {name: script for name, script in analysis_scripts().items() if name not in GALLERIES}
    found = jobs(given.folder, scripts, given.names)
    if given.all:
        found = [job._replace(reason=job.reason or "asked for") for job in found]
    if given.list:
        console.print(jobs_table(found))
        return True
    check_writable(given.folder / "figure")
    failed = remake(found, given.folder, partial(say, console))
    with replace_file(given.folder / "README.md") as page:
        page.write_text(
            gallery(given.folder, {name: first_sentence(path) for name, path in analysis_scripts().items()})
        )
    if failed:
        say(console, f"failed: {', '.join(failed)}")
    return not failed


GALLERIES = ("dynamics-gallery",)
"""Analyses that run others, whose figures need not be made twice."""


def explore(given: argparse.Namespace, console: Console) -> None:
    """Write the page of a run. Raises `OSError` or `ValueError` for a directory that holds none."""
    from attnlab.explorer import explore as write_page
    from attnlab.runs import check_writable

    check_writable(given.output)
    say(console, f"wrote {write_page(given.run, given.output)}")


def say(console: Console, *lines: str) -> None:
    """Print lines as they are."""
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


VERDICTS = Path("results/verdicts.json")


def verify(given: argparse.Namespace, console: Console) -> bool:
    """Check the named claims (all of them by default) on every seed, with a live table; whether all passed.

    A word that ends in .py is a file of further claims, which are checked as well. Raises `ValueError` for an unknown
    name.
    """
    from attnlab.claims import REGISTRY, claim_by_name
    from attnlab.runs import check_writable
    from attnlab.runs.session import Session
    from attnlab.verification import STRICT_SIZE, Check, Files, default_workers, verify_all

    for path in filter(None, (given.json, given.junit)):
        check_writable(path)
    files = [Path(word) for word in given.claims if word.endswith(".py")]
    own = load_all_claims(files)
    names = [word for word in given.claims if not word.endswith(".py")] + own or list(REGISTRY)
    for name in names:
        claim_by_name(name)
    check = Check(names, given.seeds, STRICT_SIZE if given.strict else 1, files)
    kept = Files(check, given.json, given.junit)
    prepare = partial(load_all_claims, files)
    try:
        workers, session = given.workers or default_workers(), Session(given.directory)
        verdicts = verify_all(check, console, workers, prepare, kept.write, session)
    except KeyboardInterrupt:
        written = given.json or given.junit
        where = f" {kept.count} verdicts are in {written}." if kept.count and written else ""
        again = f" The same command goes on from {given.directory}." if given.directory else ""
        say(console, f"stopped.{where}{again}")
        raise SystemExit(130) from None
    kept.check_written()
    return all(verdict.passed or verdict.skipped for verdict in verdicts)


def list_claims(console: Console) -> None:
    """Print every claim with its source."""
    from attnlab.claims import REGISTRY

    load_all_claims([])
    table = Table("claim", "source")
    for name, claim in REGISTRY.items():
        table.add_row(name, claim.source)
    console.print(table)


def plan(given: argparse.Namespace, console: Console) -> None:
    """Print what each device would hold and do, for every number of devices, and what to change where it does not fit.

    Raises `ValueError` for what cannot be planned.
    """
    from attnlab.analysis import configure_jax

    configure_jax(given.dtype)
    from attnlab.planning import Rates, plans_table, unfitting_table
    from attnlab.planning import plan as plan_case

    sequences, _, length = given.tokens.partition("x")
    if not (sequences.isdecimal() and length.isdecimal()):
        raise ValueError(f"tokens is '{given.tokens}'; expected sequences x length, such as 2x256.")
    options = {name: getattr(given, name) for name in ("dtype", "product", "afresh", "probes", "steps")}
    options |= {"sequences": int(sequences), "length": int(length), "sharded": not given.whole}
    options |= {"memory": None if given.memory is None else given.memory * 2**30}
    rates = Rates(*given.rates)
    plans = [plan_case(given.model, devices=count, **options) for count in given.devices]
    console.print(plans_table(plans, rates))
    for each in plans:
        if not each.fits:
            console.print(unfitting_table(each))
    say(console, PLAN_NOTE.format(platform=plans[0].found.platform))


PLAN_NOTE = (
    "Of each device, for programs compiled for {platform}: temporaries are what that needs. The process itself takes "
    "about half a GiB more. Times are the least that the rates allow."
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="attnlab", description="A theory lab for attention, in JAX.")
    top.add_argument("--version", action="version", version=f"attnlab {version('attnlab')}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run_parser = commands.add_parser("run", help="run an analysis: attnlab run NAME [flags], or NAME --help")
    names = sorted(analysis_scripts())
    run_parser.add_argument("name", metavar="NAME", help=f"one of: {', '.join(names)}")
    run_parser.add_argument("flags", nargs=argparse.REMAINDER, help="the analysis's own flags")
    commands.add_parser("list", help="list the analyses")
    verify_parser = commands.add_parser("verify", help="check claims of the literature on random instances")
    verify_parser.add_argument(
        "claims", nargs="*", help="names of claims, or files with claims of your own (all claims)"
    )
    verify_parser.add_argument("--list", action="store_true", help="list the claims, and check none")
    verify_parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="seeds of the random instances (1)")
    verify_parser.add_argument("--strict", action="store_true", help="larger instances, where a claim has them")
    verify_parser.add_argument("--workers", type=int, help="processes at a time (one a processor)")
    verify_parser.add_argument("--directory", type=Path, metavar="DIR", help="save there, and go on if stopped before")
    verify_parser.add_argument("--json", type=Path, metavar="FILE", help="write the verdicts as JSON")
    verify_parser.add_argument("--junit", type=Path, metavar="FILE", help="write the verdicts as JUnit XML")
    report_parser = commands.add_parser("report", help="write claims and figures to one HTML file")
    report_parser.add_argument(
        "--verdicts",
        type=Path,
        metavar="FILE",
        help=f"of attnlab verify --json FILE ({VERDICTS}, which is made first if it is not there)",
    )
    report_parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="earlier verdicts, to say what changed since"
    )
    report_parser.add_argument("--figures", type=Path, default=Path("figures"), help="folder (%(default)s)")
    report_parser.add_argument("--output", type=Path, default=Path("report.html"), help="file (%(default)s)")
    figures_parser = commands.add_parser("figures", help="make the figures again whose code has changed")
    figures_parser.add_argument("names", nargs="*", metavar="NAME", help="of analyses (all)")
    figures_parser.add_argument("--folder", type=Path, default=Path("figures"), help="folder (%(default)s)")
    figures_parser.add_argument("--all", action="store_true", help="also those that are up to date")
    figures_parser.add_argument("--list", action="store_true", help="say what there is to do and how long it will take")
    explore_parser = commands.add_parser("explore", help="write one page with a slider over the steps of a run")
    explore_parser.add_argument("run", type=Path, metavar="RUN", help="directory of a training run or a saved analysis")
    explore_parser.add_argument("--output", type=Path, default=Path("run.html"), help="file (%(default)s)")
    _add_plan(commands.add_parser("plan", help="say what the curvature of a language model would take, from shapes"))
    return top


def _add_plan(plan_parser: argparse.ArgumentParser) -> None:
    add = plan_parser.add_argument
    add("model", metavar="MODEL", help="a folder with config.json (weights are not needed), or a GGUF file")
    add("--tokens", default="1x128", metavar="BxL", help="sequences x length of the data (%(default)s)")
    add("--dtype", default="float32", help="of the parameters (%(default)s)")
    add("--product", default="hessian", help="hessian, ggn or functional (%(default)s)")
    add("--devices", nargs="+", type=int, default=[1], metavar="N", help="one row of the table each (1)")
    add("--whole", action="store_true", help="every device holds all parameters, instead of its share")
    add("--afresh", action="store_true", help="keep nothing between two products")
    add("--probes", type=int, default=10, help="samples of the density (%(default)s)")
    add("--steps", type=int, default=64, help="Lanczos steps of each (%(default)s)")
    add("--memory", type=float, metavar="GIB", help="of one device: says what to change where it does not suffice")
    add(
        "--rates",
        nargs=3,
        type=float,
        default=(1e14, 1e12, 1e11),
        metavar=("FLOPS", "MEMORY", "LINK"),
        help="of one device, a second: operations, bytes of its memory, bytes from others (1e14 1e12 1e11)",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Ends with status 2 for an unknown command or name, 1 for a run or a claim that failed, 130 where it
    is interrupted."""
    given = parser().parse_args(arguments)
    console = Console(markup=False)
    try:
        passed = _obey(given, console)
    except (ValueError, OSError) as error:
        parser().error(str(error))
    except KeyboardInterrupt:
        say(console, "stopped.")
        raise SystemExit(130) from None
    if not passed:
        raise SystemExit(1)


def _obey(given: argparse.Namespace, console: Console) -> bool:
    """Do what is asked; whether all that was checked passed."""
    if given.command == "list":
        list_analyses(console)
    elif given.command == "run":
        run(given.name, given.flags)
    elif given.command == "report":
        report(given, console)
    elif given.command == "figures":
        return figures(given, console)
    elif given.command == "explore":
        explore(given, console)
    elif given.command == "plan":
        plan(given, console)
    elif given.list:
        list_claims(console)
    else:
        return verify(given, console)
    return True
