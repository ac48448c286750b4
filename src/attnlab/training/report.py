"""What a progress bar shows of a training run."""

from collections.abc import Callable

import jax
import numpy as np
from rich.progress import Progress as ProgressBar

from attnlab.training.loop import Progress
from attnlab.trees import leaf_names


def show_progress(bar: ProgressBar, description: str) -> Callable[[Progress], None]:
    """A `report` for `train` that adds a task to a rich progress bar with a `status` field: steps done, the loss, and
    the newest value of every probe that is a number (of an ensemble, the median over its members)."""
    task = bar.add_task(description, total=None, status="")

    def report(now: Progress) -> None:
        bar.update(task, completed=now.step, total=now.steps, status=_status(now))

    return report


def _status(now: Progress) -> str:
    names, leaves = leaf_names(now.values), jax.tree.leaves(now.values)
    numbers = [f"{name} {np.nanmedian(leaf):.4g}" for name, leaf in zip(names, leaves, strict=True) if leaf.ndim < 2]
    return " ".join([f"loss {now.loss:.4g}", *numbers])
