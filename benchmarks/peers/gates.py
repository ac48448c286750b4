"""What an honest curvature tool gets right, measured alike for ours and for each peer on one LayerNorm language model.

`ask(task, **arguments)` answers for a library, with a dict; where a library cannot, the dict has an `error`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial
from peers.cases import ENDS

from attnlab.curvature import batched, eigenpairs, hessian, spectral_density, trace
from attnlab.objectives import objective


def _pair(found):
    return [float(found.value), float(found.standard_error)]


SEEDS, PRODUCTS, STEPS = 60, 48, 32
FACTORS = (1e-6, 1e-8)
# What is measured, and the least and the largest number that pass.
GATES = {
    "asymmetry": ("|<u, Hv> - <v, Hu>| / (|u| |Hv|)", (0, 1e-5)),
    "product": ("error of Hv, relative, against 64-bit jvp(grad)", (0, 1e-5)),
    "batches": ("batches of 32, 32 and 6: change of Hv, relative", (0, 1e-6)),
    "density 1e-06": ("loss x 1e-6: top of a density, relative change", (0, 1e-5)),
    "density 1e-08": ("loss x 1e-8: top of a density, relative change", (0, 1e-5)),
    "eigenvalue 1e-06": ("loss x 1e-6: top eigenvalue at tolerance 1e-3", (0, 1e-3)),
    "eigenvalue 1e-08": ("loss x 1e-8: top eigenvalue at tolerance 1e-3", (0, 1e-3)),
    "imaginary": ("weights of a density: largest imaginary part", (0, 0)),
    "mass": ("weights of a density: distance of the sum from 1", (0, 2e-6)),
    "bias": (f"bias of a trace over {SEEDS} seeds, in standard errors of the mean", (0, 3)),
    "bias, %": ("the same, % of the trace, which is small here", None),
    "coverage": (f"share of {SEEDS} 2-standard-error bars that cover the trace, %", (90, 99)),
}


def scaled(loss, factor, outputs, targets):
    return factor * loss(outputs, targets)


class Ours:
    """attnlab's answers."""

    def __init__(self, risk, params):
        self.risk, self.params = risk, params
        self.rescale(1.0)

    def rescale(self, factor):
        """A loss multiplied by a factor."""
        loss = Partial(scaled, self.risk.loss, jnp.float32(factor))
        self.operator = hessian(objective(self.risk.predict, loss, self.risk.inputs, self.risk.targets), self.params)
        return {}

    def cut(self, ends):
        """Data in batches that end there."""
        data = self.risk.inputs, self.risk.targets
        batches = [tuple(part[a:b] for part in data) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        self.operator = hessian(batched(self.risk.predict, self.risk.loss, batches), self.params)
        return {}

    def products(self, vectors):
        """The Hessian times flat vectors."""
        unravel = ravel_pytree(self.params)[1]
        images = [self.operator.mv(unravel(jnp.asarray(vector, jnp.float32))) for vector in vectors]
        return {"images": [ravel_pytree(image)[0] for image in images]}

    def density(self, probes, steps):
        """The top of a spectral density, and how far its weights are from a probability."""
        found = spectral_density(self.operator, jax.random.key(0), samples=probes, steps=steps)
        mass = np.max(np.abs(np.sum(found.weights, axis=1, dtype=np.float64) - 1))
        return {"top": float(jnp.max(found.nodes)), "mass": mass, "imaginary": np.max(np.abs(np.imag(found.weights)))}

    def top(self, count):
        """The highest eigenvalues."""
        return {"values": eigenpairs(self.operator, jax.random.key(0), count, tolerance=1e-3).values.tolist()}

    def traces(self, seeds, products):
        """Estimates of the trace and their standard errors."""
        keys = map(jax.random.key, range(seeds))
        return {"traces": [_pair(trace(self.operator, key, samples=products)) for key in keys]}


def measure(ask, vectors, images, exact_trace):
    """A number for each of GATES; where there is none, the reason."""
    numbers = {}
    for gates, arguments in ((product_gates, (vectors, images)), (scale_gates, ()), (trace_gates, (exact_trace,))):
        try:
            numbers |= gates(ask, *arguments)
        except LookupError as missing:
            numbers.setdefault("errors", []).append(str(missing))
    return {name: value if isinstance(value, str | list) else float(value) for name, value in numbers.items()}


def answer(ask, task, **arguments):
    found = ask(task, **arguments)
    if "error" in found:
        raise LookupError(f"{task}: {found['error'][:160]}")
    return found


def product_gates(ask, vectors, images):
    u, v = np.asarray(vectors, np.float64)
    whole, parts = (products_in_batches(ask, vectors, ends) for ends in (ENDS[-1:], ENDS))
    norm = np.linalg.norm
    return {
        "asymmetry": abs(u @ whole[1] - v @ whole[0]) / (norm(u) * norm(whole[1])),
        "product": norm(whole - images) / norm(images),
        "batches": norm(parts - whole) / norm(whole),
    }


def products_in_batches(ask, vectors, ends):
    answer(ask, "cut", ends=ends)
    images = answer(ask, "products", vectors=vectors.tolist())["images"]
    answer(ask, "cut", ends=ENDS[-1:])
    return np.asarray(images, np.float64)


def scale_gates(ask):
    """The random numbers are the same at each factor, so that only the factor differs."""
    numbers, tops = {}, {}
    for factor in (*FACTORS, 1.0):
        answer(ask, "rescale", factor=factor)
        density = answer(ask, "density", probes=1, steps=STEPS)
        answer(ask, "rescale", factor=factor)
        pairs = ask("top", count=1)
        tops[factor] = {
            "density": density["top"],
            **({"eigenvalue": max(pairs["values"])} if "values" in pairs else {}),
        }
    for factor in FACTORS:
        for name, top in tops[factor].items():
            numbers[f"{name} {factor:.0e}"] = abs(top / (factor * tops[1.0][name]) - 1)
    return {**numbers, "imaginary": density["imaginary"], "mass": density["mass"]}


def trace_gates(ask, exact):
    traces = answer(ask, "traces", seeds=SEEDS, products=PRODUCTS)["traces"]
    values, errors = zip(*traces, strict=True)
    deviations = np.asarray(values) - exact
    numbers = {
        "bias": np.abs(np.mean(deviations)) * SEEDS**0.5 / np.std(deviations, ddof=1),
        "bias, %": 100 * np.mean(deviations) / exact,
    }
    if errors[0] is None:
        return {**numbers, "coverage": "none reported"}
    return {**numbers, "coverage": 100 * np.mean(np.abs(deviations) <= 2 * np.asarray(errors))}


@jax.jit
def reference(risk, params, vectors):
    """Hessian products and trace by jvp(grad), in the precision of the parameters."""
    flat, unravel = ravel_pytree(params)
    gradient = jax.grad(lambda vector: risk(unravel(vector)))
    product = lambda vector: jax.jvp(gradient, (flat,), (vector,))[1]  # noqa: E731
    entry = lambda i: product(jax.nn.one_hot(i, flat.size, dtype=flat.dtype))[i]  # noqa: E731
    images = jax.vmap(product)(vectors)
    return images, jnp.sum(jax.lax.map(entry, jnp.arange(flat.size), batch_size=16))


def compare(risk, params, peers):
    """Prints ours beside the peers' (pairs of a name and its `ask`), and returns it all."""
    vectors = np.random.default_rng(0).standard_normal((2, ravel_pytree(params)[0].size)).astype(np.float32)
    with jax.enable_x64(True):
        doubled = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        images, exact_trace = (np.asarray(x) for x in reference(risk, doubled, jnp.asarray(vectors, jnp.float64)))
    ours = Ours(risk, params)
    columns = {"attnlab": measure(lambda task, **given: getattr(ours, task)(**given), vectors, images, exact_trace)}
    for name, ask in peers:
        columns[name] = measure(ask, vectors, images, exact_trace)
    print(f"gates, on a LayerNorm language model of {vectors.shape[1]:,} parameters in 32 bits; ! is beyond the bar")
    print(f"  {'':<68}{'bar':>11}", *(f"{name:>19}" for name in columns))
    for gate, (text, bar) in GATES.items():
        label = " to ".join(f"{x:g}" for x in bar or ())
        print(f"  {text:<68}{label:>11}", *(f"{shown(numbers.get(gate), bar):>19}" for numbers in columns.values()))
    if "PyHessian" in columns:
        print(
            "  PyHessian: its bars are of the samples that it returns; torch.eig, which torch lost, is a stand-in, eigh"
        )
    for name, numbers in columns.items():
        for error in numbers.pop("errors", []):
            print(f"  {name}: {error}")
    return columns


def shown(value, bar):
    if value is None or isinstance(value, str):
        return value or "-"
    return f"{value:.3g}" + (" " if bar is None or bar[0] <= value <= bar[1] else "!")
