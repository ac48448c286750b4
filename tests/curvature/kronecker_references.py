"""Makes kronecker_references.json: K-FAC and EKFAC of another implementation on small networks.

    python tests/curvature/kronecker_references.py

It needs an environment of its own, with torch and curvlinops-for-pytorch.
"""

import itertools
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np

WIDTHS = (6, 5, 4, 3)
CASES = {
    "labels": ("cross_entropy", (8,), "expand"),
    "targets": ("square", (8,), "expand"),
    "tokens": ("square", (4, 5), "expand"),
    "pooled": ("cross_entropy", (4, 5), "reduce"),
}
"""Name: loss, leading axes of the inputs, form of K-FAC for several positions; `pooled` averages the outputs."""


def filled(shape, phase):
    """An array by a formula."""
    return np.sin(1.7 * np.arange(1, np.prod(shape) + 1) + phase).reshape(shape)


def data(name):
    """Inputs and targets."""
    loss, leading, _ = CASES[name]
    inputs = filled((*leading, WIDTHS[0]), 0.3)
    if loss == "square":
        return inputs, filled((*leading, WIDTHS[-1]), 0.9)
    return inputs, np.arange(leading[0]) % WIDTHS[-1]


def weights(phase):
    """Kernels (in, out) and biases in the order of their layers, by the names of ours."""
    found = {}
    for index, shape in enumerate(itertools.pairwise(WIDTHS)):
        found[f"layer_{index}"] = filled(shape, phase + index) / shape[0] ** 0.5
        found[f"layer_{index}_bias"] = filled(shape[1:], phase - index) / 2
    return found


def network(name):
    """In torch: tanh between linear maps, and the mean over tokens for `pooled`."""
    import torch

    layers = []
    for index, shape in enumerate(itertools.pairwise(WIDTHS)):
        layers += [torch.nn.Tanh()] * (index > 0) + [torch.nn.Linear(*shape)]

    class Mean(torch.nn.Module):
        def forward(self, tokens):
            return tokens.mean(1)

    model = torch.nn.Sequential(*layers, *[Mean()] * (name == "pooled")).double()
    ours = list(weights(0.1).values())
    for parameter, value in zip(model.parameters(), ours, strict=True):
        parameter.data = torch.tensor(value.T)
    return model


def images(name):
    """The products of K-FAC, and for one position EKFAC, with one vector, weight by weight in our axes."""
    import curvlinops
    import torch

    loss, leading, form = CASES[name]
    inputs, targets = (torch.tensor(array) for array in data(name))
    loss = torch.nn.MSELoss() if loss == "square" else torch.nn.CrossEntropyLoss()
    model = network(name)
    vector = [torch.tensor(value.T) for value in weights(2.0).values()]
    found = {}
    for kind in ("KFAC", "EKFAC")[: 3 - len(leading)]:
        operator = getattr(curvlinops, f"{kind}LinearOperator")(
            model,
            loss,
            list(model.parameters()),
            [(inputs, targets)],
            fisher_type="type-2",
            kfac_approx=form,
            separate_weight_and_bias=True,
        )
        image = [leaf.detach().numpy().T.tolist() for leaf in operator @ vector]
        found[kind.lower()] = dict(zip(weights(0.0), image, strict=True))
    return found


if __name__ == "__main__":
    versions = {name: version(name) for name in ("torch", "curvlinops-for-pytorch")}
    record = {"versions": versions, "images": {name: images(name) for name in CASES}}
    Path(__file__).with_suffix(".json").write_text(json.dumps(record) + "\n")
