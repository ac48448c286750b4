"""One peer library, behind a line of JSON in and a line of JSON out: `curvature.py` starts one such process a peer.

    python curvature_worker.py LIBRARY CASE WEIGHTS.npz

The torch models repeat the equations of `attnlab.models` on the same weights; matfree runs attnlab's own model in JAX.
A request names a method of the peer and its arguments; the answer has the method's numbers and what it cost.
"""

import json
import os
import sys
import time
from pathlib import Path


def summary(nodes, weights):
    """First moment and largest node of Gauss rules, which must agree between libraries, and whether the weights are a
    probability."""
    moments = [sum(n * w for n, w in zip(a, b, strict=True)) for a, b in zip(nodes, weights, strict=True)]
    return {
        "moment": sum(moments) / len(moments),
        "top": max(max(a) for a in nodes),
        "mass": max(abs(sum(row) - 1) for row in weights),
        "imaginary": max(abs(complex(weight).imag) for row in weights for weight in row),
    }


class TorchPeer:
    """The torch model, its loss and its data, which `rescale` and `cut` change: a library adds its methods."""

    def __init__(self, case, arrays):
        from torch_model import torch_model  # beside this script

        self.model, self.plain_loss, inputs, targets = torch_model(case, arrays)
        self.loss = self.plain_loss
        self.examples, self.flat_targets = (inputs, targets), case != "attention"
        self.cut([len(inputs)])

    def cut(self, ends):
        """Data in batches that end there."""
        starts = [0, *ends[:-1]]
        parts = [[part[a:b] for part in self.examples] for a, b in zip(starts, ends, strict=True)]
        self.batches = [(x, y.flatten().long() if self.flat_targets else y) for x, y in parts]
        return {}

    def rescale(self, factor):
        """A loss multiplied by a factor; random numbers start again."""
        import torch

        plain = self.plain_loss

        class Scaled(type(plain)):
            def forward(self, outputs, targets):
                return factor * plain(outputs, targets)

        self.loss = Scaled()
        torch.manual_seed(0)
        return {}

    def products(self, vectors):
        """The Hessian times flat vectors."""
        import torch

        return {"images": [self.product(torch.tensor(vector)).tolist() for vector in vectors]}

    def traces(self, seeds, products):
        """Estimates of the trace, and their standard errors where there are any."""
        import torch

        found = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            found.append(self.trace(seed, products))
        return {"traces": found}


class PyHessian(TorchPeer):
    """PyHessian: a kept graph of the gradient; power iteration for eigenvalues."""

    def __init__(self, case, arrays):
        import torch

        def eig(matrix, eigenvectors):  # torch.eig was removed from torch; PyHessian calls it on symmetric matrices
            values, vectors = torch.linalg.eigh(matrix)
            return torch.stack([values, torch.zeros_like(values)], 1), vectors

        torch.eig = eig
        super().__init__(case, arrays)

    def hessian(self):
        """The Hessian."""
        from pyhessian import hessian

        self.model.zero_grad()
        if len(self.batches) > 1:
            return hessian(self.model, self.loss, dataloader=self.batches, cuda=False)
        return hessian(self.model, self.loss, data=self.batches[0], cuda=False)

    def product(self, vector):
        """The Hessian times one vector."""
        import torch
        from pyhessian.utils import hessian_vector_product

        hessian = self.hessian()
        pieces = torch.split(vector, [parameter.numel() for parameter in hessian.params])
        vector = [piece.view_as(parameter) for piece, parameter in zip(pieces, hessian.params, strict=True)]
        if len(self.batches) > 1:
            image = hessian.dataloader_hv_product(vector)[1]
        else:
            image = hessian_vector_product(hessian.gradsH, hessian.params, vector)
        return torch.cat([part.flatten() for part in image])

    def trace(self, seed, products):
        """The mean of its samples; the standard error is ours, of the samples that it returns."""
        import numpy as np

        samples = self.hessian().trace(maxIter=products)
        return float(np.mean(samples)), float(np.std(samples, ddof=1) / len(samples) ** 0.5)

    def density(self, probes, steps):
        """A spectral density."""
        nodes, weights = self.hessian().density(iter=steps, n_v=probes)
        return summary([[float(x) for x in row] for row in nodes], [[float(x) for x in row] for row in weights])

    def top(self, count):
        """The highest eigenvalues."""
        import torch

        hessian = self.hessian()
        values, vectors = hessian.eigenvalues(maxIter=100, tol=1e-3, top_n=count)
        from pyhessian.utils import hessian_vector_product

        residuals = []
        for value, vector in zip(values, vectors, strict=True):
            image = hessian_vector_product(hessian.gradsH, hessian.params, vector)
            squares = sum(torch.sum((a - value * b) ** 2) for a, b in zip(image, vector, strict=True))
            residuals.append(float(squares) ** 0.5)
        return {"values": sorted(values), "residual": max(residuals) / max(abs(v) for v in values)}


class Curvlinops(TorchPeer):
    """curvlinops: a linear operator; ARPACK for eigenvalues."""

    def operator(self):
        """The Hessian."""
        from curvlinops import HessianLinearOperator

        parameters = list(self.model.parameters())
        return HessianLinearOperator(self.model, self.loss, parameters, self.batches, check_deterministic=False)

    def product(self, vector):
        """The Hessian times one vector."""
        return self.operator() @ vector

    def trace(self, seed, products):
        """Hutchinson's estimate; it has no error."""
        from curvlinops import hutchinson_trace

        return float(hutchinson_trace(self.operator(), products)), None

    def density(self, probes, steps):
        """A spectral density."""
        from curvlinops.papyan2020traces.spectrum import fast_lanczos

        operator, nodes, weights = self.operator(), [], []
        for _ in range(probes):
            values, vectors = fast_lanczos(operator, steps)
            nodes.append(values.tolist())
            weights.append((vectors[0, :] ** 2).tolist())
        return summary(nodes, weights)

    def top(self, count):
        """The highest eigenvalues."""
        import numpy as np
        import torch
        from scipy.sparse.linalg import eigsh

        operator = self.operator().to_scipy()
        products = [0]
        plain = operator.matvec

        def matvec(vector):
            products[0] += 1
            return plain(vector)

        operator.matvec = matvec
        start = torch.randn(operator.shape[0]).numpy()
        values, vectors = eigsh(operator, k=count, which="LA", tol=1e-3, v0=start)
        residual = max(np.linalg.norm(plain(vectors[:, i]) - values[i] * vectors[:, i]) for i in range(count))
        return {
            "values": values.tolist(),
            "residual": float(residual / abs(values).max()),
            "products": products[0],
        }


class Eigenthings(TorchPeer):
    """hessian-eigenthings: double backward; Lanczos with a fixed number of steps."""

    def operator(self):
        """The Hessian."""
        from hessian_eigenthings.operators.hessian import HessianOperator

        return HessianOperator(self.model, self.batches, lambda model, batch: self.loss(model(batch[0]), batch[1]))

    def product(self, vector):
        """The Hessian times one vector."""
        return self.operator().matvec(vector)

    def trace(self, seed, products):
        """Hutch++, its default, and its error."""
        from hessian_eigenthings.algorithms.trace import trace

        found = trace(self.operator(), num_matvecs=products, seed=seed)
        return float(found.estimate), float(found.stderr)

    def density(self, probes, steps):
        """A spectral density."""
        from hessian_eigenthings.algorithms.spectral_density import spectral_density

        found = spectral_density(self.operator(), num_runs=probes, lanczos_steps=steps, num_grid_points=1024, seed=0)
        return summary(found.raw_eigenvalues.tolist(), found.raw_weights.tolist())

    def top(self, count):
        """The highest eigenvalues."""
        import numpy as np
        from hessian_eigenthings.algorithms.lanczos import lanczos

        operator = self.operator()
        found = lanczos(operator, k=count, max_iter=100, which="LA", seed=0, reorthogonalize=True)
        values, vectors = found.eigenvalues, found.eigenvectors
        vectors = vectors if vectors.shape[0] == count else vectors.T
        residual = max(float((operator.matvec(v) - x * v).norm()) for x, v in zip(values, vectors, strict=True))
        return {"values": sorted(values.tolist()), "residual": residual / float(np.max(np.abs(values.numpy())))}


class Matfree:
    """matfree's tridiagonalisation (its default, full reorthogonalisation) of jvp(grad), in one jitted computation."""

    def __init__(self, case, arrays):
        import jax
        import jax.numpy as jnp
        from matfree import decomp, stochtrace

        sys.path.insert(0, os.environ["ATTNLAB_BENCHMARKS"])
        from jax.flatten_util import ravel_pytree
        from peers.cases import MODELS, unflatten

        risk, _ = MODELS[case]()
        flat, unravel = ravel_pytree(unflatten(arrays))

        def product(risk, flat):
            gradient = jax.grad(lambda vector: risk(unravel(vector)))
            return lambda v: jax.jvp(gradient, (flat,), (v,))[1]

        def run(risk, flat, probes, steps):
            matvec = product(risk, flat)
            estimate = decomp.tridiag_sym(steps, reortho="full")

            def one(key):
                start = jax.random.rademacher(key, flat.shape, flat.dtype)
                values, vectors = jnp.linalg.eigh(estimate(matvec, start).J_small)
                return values, vectors[0] ** 2

            return jax.lax.map(one, jax.random.split(jax.random.key(0), probes))

        def trace(risk, flat, key, products):
            sampler = stochtrace.sampler_signs(flat, num=products)
            estimate = stochtrace.estimator_monte_carlo_mean_and_sem(stochtrace.monte_carlo_trace(), sampler)
            return estimate(product(risk, flat), key)

        self.run, self.trace = jax.jit(run, static_argnums=(2, 3)), jax.jit(trace, static_argnums=3)
        self.plain, self.risk, self.flat = risk, risk, flat

    def rescale(self, factor):
        """A loss multiplied by a factor."""
        from dataclasses import replace

        from jax.tree_util import Partial
        from peers.gates import scaled

        self.risk = replace(self.plain, loss=Partial(scaled, self.plain.loss, factor))
        return {}

    def traces(self, seeds, products):
        """Estimates of the trace and their standard errors."""
        import jax

        keys = [jax.random.key(seed) for seed in range(seeds)]
        return {"traces": [[float(x) for x in self.trace(self.risk, self.flat, key, products)] for key in keys]}

    def density(self, probes, steps):
        """A spectral density."""
        nodes, weights = self.run(self.risk, self.flat, probes, steps)
        return summary(nodes.tolist(), weights.tolist())


LIBRARIES = {
    "PyHessian": (PyHessian, "pyhessian"),
    "curvlinops": (Curvlinops, "curvlinops"),
    "hessian-eigenthings": (Eigenthings, "hessian_eigenthings"),
    "matfree": (Matfree, "matfree"),
}


def memory_from_here():
    """Megabytes in use; from now on the kernel keeps a new peak. NaN where it does not tell (not Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return float("nan")
    return status_megabytes("VmRSS")


def peak_megabytes():
    return status_megabytes("VmHWM")


def status_megabytes(field):
    """A field of the process's status in MiB, NaN where there is none."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(field)), float("nan"))


def main():
    import numpy as np

    library, case, path = sys.argv[1:]
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print progress
    build, _ = LIBRARIES[library]
    peer = build(case, dict(np.load(path)))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        before = memory_from_here()
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            task = request.pop("task")
            answer = getattr(peer, task)(**request) if hasattr(peer, task) else {"error": "it has nothing of the kind"}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answer |= {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        answer["megabytes"] = peak_megabytes() - before
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
