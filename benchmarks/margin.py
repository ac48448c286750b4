"""Max-margin solvers side by side: `python benchmarks/margin.py [--quick] [--json FILE]`.

Against what a user would pick: cvxpy with one constraint at a time (as the papers' code) and vectorised, scikit-learn's
OneClassSVM on the exact kernel, daqp, quadprog and qpax on the constraint matrix written out. From tokens to W, one
thread, CPU time, medians of interleaved runs; each answer is certified by the same weak-duality bound before it is
timed. Peers that are not installed are skipped. Ratios are peer / ours: above 1, we are ahead.
"""

import argparse
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

for threads in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")  # before NumPy: one thread for all

import jax  # noqa: E402
import numpy as np  # noqa: E402
from common.results import write_results  # noqa: E402

from attnlab.margin import (  # noqa: E402
    MarginProblem,
    Status,
    attention_problem,
    frobenius_batch,
    max_margin,
    stack,
    with_norm,
)

PEERS = ("cvxpy", "sklearn", "daqp", "quadprog", "qpax")
DENSE_LIMIT = 1100
"""Largest number of unknowns that a dense quadratic program is asked for: its Hessian has the square of that."""


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def draw(n: int, length: int, d: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit Gaussian tokens and queries; the selection is that of a Gaussian W, so that every size is feasible."""
    random = np.random.default_rng(seed)
    x, z = random.normal(size=(n, length, d)), random.normal(size=(n, d))
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    z /= np.linalg.norm(z, axis=-1, keepdims=True)
    return x, z, np.einsum("ntd,de,ne->nt", x, random.normal(size=(d, d)), z).argmax(1)


def draw_by_value(n: int, length: int, d: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same, but the selected token maximises Y_i v^T x_it (the papers' choice): feasible or not."""
    x, z, _ = draw(n, length, d, seed)
    random = np.random.default_rng(seed + 10**6)
    return x, z, (random.choice([-1, 1], size=(n, 1)) * (x @ random.normal(size=d))).argmax(1)


def differences(x: np.ndarray, selection: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    keep = np.arange(x.shape[1]) != selection[:, None]
    delta = x[np.arange(len(x)), selection][:, None] - x
    return delta[keep], np.repeat(np.arange(len(x)), x.shape[1] - 1)


def written_out(x: np.ndarray, z: np.ndarray, selection: np.ndarray) -> np.ndarray:
    delta, owner = differences(x, selection)
    return (delta[:, :, None] * z[owner][:, None, :]).reshape(len(delta), -1)


def ours(x: np.ndarray, z: np.ndarray, selection: np.ndarray) -> np.ndarray:
    return max_margin(attention_problem(x, z, selection)).direction


def ours_nuclear(x: np.ndarray, z: np.ndarray, selection: np.ndarray) -> np.ndarray:
    return max_margin(attention_problem(x, z, selection, norm="nuclear")).direction


def by_cvxpy(norm: str, one_by_one: bool, **options: object) -> Callable[..., np.ndarray]:
    """With its default solver, or another one in `options`."""

    def solve(x: np.ndarray, z: np.ndarray, selection: np.ndarray) -> np.ndarray:
        import cvxpy

        d = x.shape[-1]
        w = cvxpy.Variable((d, z.shape[-1]))
        if one_by_one:
            constraints = [
                (x[i, selection[i]] - x[i, t]) @ w @ z[i] >= 1
                for i in range(len(x))
                for t in range(x.shape[1])
                if t != selection[i]
            ]
        else:
            delta, owner = differences(x, selection)
            constraints = [cvxpy.sum(cvxpy.multiply(delta @ w, z[owner]), axis=1) >= 1]
        objective = cvxpy.norm(w, "fro") if norm == "frobenius" else cvxpy.norm(w, "nuc")
        cvxpy.Problem(cvxpy.Minimize(objective), constraints).solve(**options)
        return w.value

    return solve


def by_one_class_svm(x: np.ndarray, z: np.ndarray, selection: np.ndarray) -> np.ndarray:
    from sklearn.svm import OneClassSVM

    delta, owner = differences(x, selection)
    kernel = (delta @ delta.T) * (z @ z.T)[np.ix_(owner, owner)]
    machine = OneClassSVM(kernel="precomputed", nu=1.0 / len(delta) * (1 - 1e-9), tol=1e-10, cache_size=2000).fit(
        kernel
    )
    weights = np.zeros(len(delta))
    weights[machine.support_] = machine.dual_coef_[0]
    return (delta * weights[:, None]).T @ z[owner]


def by_daqp(x: np.ndarray, z: np.ndarray, selection: np.ndarray) -> np.ndarray:
    import daqp

    rows = written_out(x, z, selection)
    m, size = rows.shape
    found = daqp.solve(np.eye(size), np.zeros(size), rows, np.full(m, 1e30), np.ones(m), np.zeros(m, np.int32))
    return found[0].reshape(x.shape[-1], -1)


def by_quadprog(x: np.ndarray, z: np.ndarray, selection: np.ndarray) -> np.ndarray:
    import quadprog

    rows = written_out(x, z, selection)
    found = quadprog.solve_qp(np.eye(rows.shape[1]), np.zeros(rows.shape[1]), rows.T.copy(), np.ones(len(rows)))
    return found[0].reshape(x.shape[-1], -1)


def by_qpax(x: np.ndarray, z: np.ndarray, selection: np.ndarray) -> np.ndarray:
    import qpax

    rows = written_out(x, z, selection)
    size = rows.shape[1]
    none = np.zeros((0, size)), np.zeros(0)
    solve = jax.jit(qpax.solve_qp)
    return np.asarray(solve(np.eye(size), np.zeros(size), *none, -rows, -np.ones(len(rows)))[0]).reshape(
        x.shape[-1], -1
    )


def margin_of(problem: MarginProblem, w: np.ndarray) -> float:
    """min <a_k, W> / ||W||: any peer's W is held against our certified upper bound."""
    scores = np.einsum("kd,kd->k", problem.differences, (problem.queries @ w.T)[problem.owner])
    size = np.linalg.norm(w) if problem.norm == "frobenius" else np.linalg.norm(w, "nuc")
    return float(scores.min() / size)


def cpu_seconds(run: Callable[[], object], repeats: int) -> float:
    start = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - start) / repeats


def median_times(runs: dict[str, Callable[[], object]], budget: float) -> dict[str, float]:
    """Median CPU time of each run, warm and interleaved; fast ones are repeated within a round, slow ones run once."""
    first = {name: cpu_seconds(run, 1) for name, run in runs.items()}
    repeats = {name: max(1, int(0.02 / seconds)) for name, seconds in first.items()}
    rounds = max(1, min(9, int(budget / sum(repeats[name] * first[name] for name in runs))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(first[name] if rounds == 1 and repeats[name] == 1 else cpu_seconds(run, repeats[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def frobenius_peers(n: int, length: int, d: int, slow: bool) -> dict[str, Callable[..., np.ndarray]]:
    m, size = n * (length - 1), d * d
    peers: dict[str, Callable[..., np.ndarray]] = {}
    if m <= 2000:
        peers["sklearn OneClassSVM"] = by_one_class_svm
    if size <= DENSE_LIMIT:
        peers |= {"daqp": by_daqp, "quadprog": by_quadprog}
        if m <= 300:
            peers["qpax"] = by_qpax
    if slow and m * size <= 2e6:
        peers["cvxpy vectorised"] = by_cvxpy("frobenius", one_by_one=False)
        peers["cvxpy one by one"] = by_cvxpy("frobenius", one_by_one=True)
    elif slow:
        peers["sklearn OneClassSVM"] = by_one_class_svm
    return {name: run for name, run in peers.items() if installed(name.split()[0])}


def compare(
    label: str,
    data: tuple[np.ndarray, np.ndarray, np.ndarray],
    problem: MarginProblem,
    us: Callable[..., np.ndarray],
    peers: dict[str, Callable[..., np.ndarray]],
    ratios: dict[str, float],
) -> None:
    """Certify our answer, hold the peers' against its bound, then time them."""
    proof = max_margin(problem).certificate
    runs, deficits = {"attnlab": lambda: us(*data)}, {}
    for name, peer in peers.items():
        try:
            deficits[name] = 1 - margin_of(problem, peer(*data)) / proof.bound
        except Exception as error:  # a peer that fails is reported, not timed
            print(f"  {label}: {name} failed ({type(error).__name__}: {str(error).splitlines()[0][:60]})")
            continue
        runs[name] = lambda peer=peer: peer(*data)  # type: ignore[misc]
    times = median_times(runs, budget=1.0)
    print(f"  {label:34} attnlab {times['attnlab'] * 1e3:9.3f} ms, gap {proof.gap:.0e}", end="")
    for name, deficit in deficits.items():
        ratio = times[name] / times["attnlab"]
        ratios[f"{label} | {name}"] = ratio
        print(f" | {name} {ratio:.3g}x, gap {deficit:.0e}", end="")
    print(flush=True)
    ratios[f"{label} | gap"] = float(proof.gap)


def frobenius(quick: bool, ratios: dict[str, float]) -> None:
    print("Frobenius norm (n, T, d)")
    sizes = [(n, length, d) for d in (10, 32, 64, 128) for n in (6, 50, 200) for length in (6, 10, 32)]
    for size in sizes[:6] if quick else sizes:
        data = draw(*size, seed=0)
        slow = size in ((6, 6, 10), (6, 10, 64), (50, 10, 32), (200, 32, 32))
        compare(
            f"frobenius {size}",
            data,
            attention_problem(*data),
            ours,
            frobenius_peers(*size, slow and not quick),
            ratios,
        )


def nuclear(quick: bool, ratios: dict[str, float]) -> None:
    print("Nuclear norm (n, T, d)")
    sizes = [(6, 8, 10), (6, 10, 64), (50, 6, 10), (50, 10, 32), (50, 32, 32)]
    for size in sizes[:1] if quick else sizes:
        data = draw_by_value(*size, seed=0) if size[0] == 6 else draw(*size, seed=0)
        problem = attention_problem(*data, norm="nuclear")
        peers = {}
        if installed("cvxpy") and size in ((6, 8, 10), (6, 10, 64)):
            # The default solver, SCS, stops at a gap near 1e-5; SCS to 1e-9 and Clarabel come close to ours.
            peers["cvxpy one by one"] = by_cvxpy("nuclear", one_by_one=True)
            peers["cvxpy vectorised"] = by_cvxpy("nuclear", one_by_one=False)
            exact = {"solver": "CLARABEL"} if size[2] < 32 else {"solver": "SCS", "eps": 1e-9, "max_iters": 10**5}
            peers["cvxpy one by one, equal accuracy"] = by_cvxpy("nuclear", one_by_one=True, **exact)
        compare(f"nuclear {size}", data, problem, ours_nuclear, peers, ratios)


def batch(quick: bool, ratios: dict[str, float]) -> None:
    """A thousand problems of (6, 8, 10): one vmapped call against a loop of the fastest dense solver."""
    count = 100 if quick else 1000
    data = [draw_by_value(6, 8, 10, seed) for seed in range(count)]
    problems = stack([attention_problem(*one) for one in data])
    found = jax.block_until_ready(frobenius_batch(problems))
    solved = np.count_nonzero((np.asarray(found.status) == Status.SOLVED) & (np.asarray(found.gap) <= 1e-9))
    runs: dict[str, Callable[[], object]] = {"attnlab": lambda: jax.block_until_ready(frobenius_batch(problems))}
    if installed("daqp"):
        runs["daqp in a loop"] = lambda: [by_daqp(*one) for one in data]
    times = median_times(runs, budget=3.0)
    each = times["attnlab"] / count * 1e3
    print(f"Batch of {count} problems (6, 8, 10): {solved} solved to 1e-9, {each:.4f} ms each", end="")
    ratios["batch (6, 8, 10) | ms each"] = each
    if "daqp in a loop" in times:
        ratios["batch (6, 8, 10) | daqp in a loop"] = times["daqp in a loop"] / times["attnlab"]
        print(f" | daqp in a loop {ratios['batch (6, 8, 10) | daqp in a loop']:.3g}x", end="")
    print()


def ranks(quick: bool, ratios: dict[str, float]) -> None:
    """Mean rank of certified nuclear solutions."""
    print("Rank of the nuclear solution (n, T, d)")
    for size in [(5, 5, 20), (10, 5, 10), (10, 5, 20), (15, 5, 15)]:
        found = []
        for seed in range(10 if quick else 50):
            solved = max_margin(with_norm(attention_problem(*draw_by_value(*size, seed)), "nuclear"))
            if solved.status == Status.SOLVED:
                found.append(np.linalg.matrix_rank(solved.direction, tol=1e-5))
        print(f"  {size}: {np.mean(found):.2f} +- {np.std(found) / np.sqrt(len(found)):.2f} of {len(found)} feasible")
        ratios[f"rank {size}"] = float(np.mean(found))


def split(found: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """Ratios to the peers, and everything else that was measured."""
    values = {
        key: value for key, value in found.items() if key.endswith((" gap", " ms each")) or key.startswith("rank")
    }
    return {key: value for key, value in found.items() if key not in values}, values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes only")
    parser.add_argument("--json", type=Path, help="write the ratios here")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    missing = [name for name in PEERS if not installed(name)]
    if missing:
        print(f"not installed, skipped: {', '.join(missing)} (pip install {' '.join(missing)})")
    ratios: dict[str, float] = {}
    for part in (frobenius, nuclear, batch, ranks):
        part(options.quick, ratios)
    write_results(options.json, *split(ratios))


if __name__ == "__main__":
    main()
