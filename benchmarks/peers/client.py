"""Peer libraries in processes of their own, asked line by line; see `curvature_worker.py` for the other end."""

import json
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from peers.cases import HEADS, MODELS, flatten

from attnlab.trees import leaf_names

WORKER = Path(__file__).parent / "curvature_worker.py"
LIBRARIES = ("PyHessian", "curvlinops", "hessian-eigenthings", "matfree")


class Peer:
    """A library in a process of its own, that answers one request at a time."""

    def __init__(self, library, case, python, weights):
        environment = {**os.environ, "ATTNLAB_BENCHMARKS": str(Path(__file__).resolve().parents[1])}
        self.library = library
        self.process = subprocess.Popen(
            [python, WORKER, library, case, weights],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def start(self):
        """Whether the library is there."""
        return self._answer() is not None

    def ask(self, task, **arguments):
        """The answer to one request, with its cost, or with an `error`."""
        self.process.stdin.write(json.dumps({"task": task, **arguments}) + "\n")
        self.process.stdin.flush()
        return self._answer() or {"error": "the process ended"}

    def _answer(self):
        line = self.process.stdout.readline()
        return json.loads(line) if line else None

    def stop(self):
        """End the process."""
        self.process.stdin.close()
        self.process.wait(timeout=60)


def peers_of(case, python):
    """The peers that can be had, started one by one; says which cannot."""
    risk, params = MODELS[case]()
    arrays = {**flatten(params), "inputs": np.asarray(risk.inputs), "targets": np.asarray(risk.targets)}
    layers = sum(name.endswith("attention/query") for name in leaf_names(params))
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.npz"
        np.savez(weights, heads=HEADS[case], layers=layers, **arrays)
        for library in LIBRARIES:
            peer = Peer(library, case, python, weights)
            if peer.start():
                yield peer
            else:
                print(f"  {library} skipped: it does not start in {Path(python).name} (see --help)")
            peer.stop()


def peer_versions(python):
    packages = ("torch", "curvlinops-for-pytorch", "pyhessian", "hessian-eigenthings", "matfree")
    program = (
        "import importlib.metadata as m, json\n"
        f"known = {{d.metadata['Name'].lower(): d.version for d in m.distributions()}}\n"
        f"print(json.dumps({{n: known[n] for n in {packages!r} if n in known}}))"
    )
    return json.loads(subprocess.run([python, "-c", program], capture_output=True, text=True, check=True).stdout)
