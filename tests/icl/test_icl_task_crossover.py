"""The crossover from discrete Bayes to ridge, at micro size: trained transformers of the analysis itself."""

import sys
from pathlib import Path

import numpy as np
import pytest
from rich.progress import Progress

ANALYSES = Path(__file__).parents[2] / "analyses"


@pytest.mark.slow
def test_few_tasks_make_discrete_bayes_and_many_make_ridge(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ANALYSES), *sys.path])
    from icl_task_crossover import Config, compute, series

    config = Config(tasks=(2, 64), seeds=1, steps=1500, prompts=1000)
    with Progress(disable=True) as progress:
        arrays = compute(config, progress)
    (bayes, ridge, apart), errors = zip(
        *(series(arrays["fresh"]["distance"][pair]) for pair in ("model_bayes", "model_ridge", "bayes_ridge")),
        strict=True,
    )
    noise = 3 * np.hypot(errors[0], errors[1])
    assert bayes[0] + noise[0] < ridge[0]  # two tasks: nearer the posterior mean
    assert ridge[1] + noise[1] < bayes[1]  # sixty-four: nearer ridge
    assert apart[0] > 10 * apart[1]  # the two algorithms themselves approach each other
    for null in ("untrained", "shuffled"):
        assert np.all(series(arrays["fresh"]["risk"][null])[0] > 0.5)
