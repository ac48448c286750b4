"""What every benchmark writes with `--json`: one shape, that a script can read."""

import json
import os
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("attnlab", "jax", "jaxlib", "flax", "optax", "numpy", "scipy")


def write_results(
    path: Path | None,
    ratios: Mapping[str, float],
    values: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
) -> None:
    """Write the command, `ratios` (peer / ours, above 1 we are ahead), other `values`, machine and versions as JSON.

    Nothing where `path` is None. `versions` are those of peers, beside the packages of this environment.
    """
    if path is None:
        return
    content = {
        "command": f"python benchmarks/{Path(sys.argv[0]).name}" + " --quick" * ("--quick" in sys.argv),
        "ratios": dict(ratios),
        "values": dict(values or {}),
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), "device": str(jax.devices()[0])},
        "versions": {"python": platform.python_version(), **_installed(), **(versions or {})},
    }
    path.write_text(json.dumps(content, indent=2) + "\n")


def _installed() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
