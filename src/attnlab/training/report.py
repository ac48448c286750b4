"""What a progress bar shows of a training run."""

from collections.abc import Callable

from rich.progress import Progress as ProgressBar

from attnlab.training.loop import TrainingProgress
from attnlab.training.probe import summary


def show_progress(bar: ProgressBar, description: str) -> Callable[[TrainingProgress], None]:
    """A `report` for `train` that adds a task to a rich progress bar with a `status` field: steps done, the loss, and
    the newest numbers of every probe (`summary`: of eigenvalues the highest, of an ensemble medians)."""
    task = bar.add_task(description, total=None, status="")

    def report(now: TrainingProgress) -> None:
        # In a notebook a bar that stops is not drawn again: its end is drawn here.
        bar.update(task, completed=now.step, total=now.steps, status=_status(now), refresh=now.step == now.steps)

    return report


def _status(now: TrainingProgress) -> str:
    return f"loss {now.loss:.4g} {summary(now.values, now.members)}".rstrip()
