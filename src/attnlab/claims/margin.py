"""Claims about the maximal margin that training of attention converges to in direction.

Where descent is to be followed far, it trains the rescaled loss, whose gradient is parallel to the plain one's.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.integrate
import scipy.optimize
from jaxtyping import Array

from attnlab.claims.registry import claim
from attnlab.expectation import Expectation, at_least, at_most, equal
from attnlab.margin import (
    MarginProblem,
    MaxMargin,
    Status,
    attention_matrix,
    attention_problem,
    attention_risk,
    decision_risk,
    decoupled,
    decoupled_matrix,
    equality_basis,
    finite_component,
    graph_problem,
    imbalance,
    max_margin,
    mirror_descent,
    normalize_gradient,
    normalized_descent,
    priority_components,
    project_on_equalities,
    rescaled,
)
from attnlab.objectives import Objective
from attnlab.training import probe, train
from attnlab.types import Params, PRNGKey

ATT_SVM = "Tarzanagh, Li, Thrampoulidis, Oymak, arXiv 2308.16898"
MEMBERS, SEQUENCES, TOKENS, DIM = 12, 4, 5, 10

DESCENT = normalized_descent(0.5)
MATRIX = probe(lambda risk, params: attention_matrix(params))


def ensemble(key: PRNGKey, members: int = MEMBERS) -> Objective:
    """Gaussian tokens, queries and read-outs of several problems, stacked; every label is 1."""
    keys = jax.random.split(key, 3)
    tokens = jax.random.normal(keys[0], (members, SEQUENCES, TOKENS, DIM))
    queries = jax.random.normal(keys[1], (members, SEQUENCES, DIM))
    readout = jax.random.normal(keys[2], (members, DIM))
    build = lambda x, z, v: attention_risk(x, jnp.ones(SEQUENCES), queries=z, readout=v)  # noqa: E731
    return jax.vmap(build)(tokens, queries, readout)


def trajectories(
    key: PRNGKey, risks: Objective, params: Params, optimizer: optax.GradientTransformation, steps: int, every: int
) -> np.ndarray:
    """W of every member, (measurements, members, d, d)."""
    members = len(risks.targets)
    together = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (members, *leaf.shape)), params)
    keys = jax.random.split(key, members)
    trained = train(
        risks, together, optimizer, keys, steps=steps, every=every, own_risks=True, probes={"matrix": MATRIX}
    )
    return np.asarray(trained.records.values["matrix"])


def member(risks: Objective, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, queries and values of the tokens under the read-out."""
    tokens, queries, readout = (np.asarray(risks.inputs[name][i]) for name in ("tokens", "queries", "readout"))
    return tokens, queries, tokens @ readout


def selected(risks: Objective, i: int, matrix: np.ndarray) -> np.ndarray:
    """The token of the highest score in each sequence."""
    tokens, queries, _ = member(risks, i)
    return np.einsum("ntd,de,ne->nt", tokens, matrix, queries).argmax(1)


def solutions(risks: Objective, matrices: np.ndarray, norm: str = "frobenius") -> list[MaxMargin]:
    """The max-margin solution of the tokens that each member selects."""
    problems = (
        attention_problem(*member(risks, i)[:2], selected(risks, i, matrix), norm=norm)
        for i, matrix in enumerate(matrices)
    )
    return [max_margin(problem) for problem in problems]


def cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Of matrices in the last two axes."""
    return np.sum(first * second, (-2, -1)) / np.sqrt(np.sum(first**2, (-2, -1)) * np.sum(second**2, (-2, -1)))


@claim(
    statement=r"W_t / \|W_t\|_F \to W^{\mathrm{mm}} / \|W^{\mathrm{mm}}\|_F \text{ and } 1 - \cos(W_t, W^{\mathrm{mm}}) \propto \|W_t\|^{-2}",
    source=f"{ATT_SVM}; Vasudeva, Deora, Thrampoulidis, arXiv 2402.05738, for the rate",
    tolerance=1e-3,
    because="the exponent is taken over a sixteenfold of the norm, where its correction has faded; median of 12 problems",
    slow=True,
)
def normalized_descent_converges_to_the_frobenius_solution(key: PRNGKey) -> Expectation:
    """Slope of log(1 - cosine) in log norm, towards the solution of whichever tokens descent selects."""
    risks = ensemble(key)
    path = trajectories(key, rescaled_all(risks), {"query_key": jnp.zeros((DIM, DIM))}, DESCENT, 25600, 1600)
    target = np.stack([found.direction for found in solutions(risks, path[-1])])
    angles, norms = 1 - cosine(path[[1, -1]], target), np.linalg.norm(path[[1, -1]], axis=(-2, -1))
    slopes = np.diff(np.log(angles), axis=0) / np.diff(np.log(norms), axis=0)
    return equal("slope of log(1 - cosine) in the log norm, median", np.median(slopes), -2.0)


def rescaled_all(risks: Objective) -> Objective:
    """`rescaled` of every member."""
    return jax.vmap(rescaled)(risks)


@claim(
    statement=r"\text{the tokens that descent selects are locally optimal: } \gamma_{i\alpha_i} > \gamma_{it}"
    r" \text{ for all } t \text{ of margin exactly } 1",
    source=f"{ATT_SVM}, local optimality of tokens",
    because="a share of 12 runs; one may still be unsettled between two nearly equal tokens",
    slow=True,
)
def selected_tokens_are_locally_optimal(key: PRNGKey) -> Expectation:
    """Share of runs whose solution has no support vector with a better value than the selected token."""
    risks = ensemble(key)
    ends = trajectories(key, rescaled_all(risks), {"query_key": jnp.zeros((DIM, DIM))}, DESCENT, 3200, 400)[-1]
    optimal = []
    for i, found in enumerate(solutions(risks, ends)):
        values, choice = member(risks, i)[2], selected(risks, i, ends[i])
        others = np.stack([np.delete(row, chosen) for row, chosen in zip(values, choice, strict=True)])
        best = values[np.arange(SEQUENCES), choice]
        optimal.append(np.all((best[:, None] > others).ravel()[found.support]))
    return at_least("share of locally optimal runs", np.mean(optimal), 0.9)


@claim(
    statement=r"\|W_t\|_F \simeq \|W^{\mathrm{mm}}\|_F \log t \text{ for gradient descent}",
    source="Vasudeva, Deora, Thrampoulidis, arXiv 2402.05738; the exponent of the loss is the smallest margin",
    tolerance=0.1,
    because="corrections are of order 1 / log t; median of 12 problems, by the growth between 4,000 and 16,000 steps",
    slow=True,
)
def norm_of_descent_grows_logarithmically(key: PRNGKey) -> Expectation:
    """Growth of the norm over that of log t, against 1 / margin, each relative."""
    risks = ensemble(key)
    path = trajectories(key, risks, {"query_key": jnp.zeros((DIM, DIM))}, optax.sgd(0.1), 16_000, 4_000)
    margins = np.array([found.margin for found in solutions(risks, path[-1])])
    growth = np.linalg.norm(path[-1], axis=(-2, -1)) - np.linalg.norm(path[1], axis=(-2, -1))
    return equal(
        "growth of the norm over that of log t, times the margin, median",
        np.median(growth / np.log(4.0) * margins),
        1.0,
    )


@claim(
    statement=r"W_t = K_t Q_t^\top:\ \cos(W_t, W^{\mathrm{mm}}_*) \to 1, \text{ the solution of least nuclear norm, and not the Frobenius one}",
    source=f"{ATT_SVM}, for the regularization path; Sheen et al., arXiv 2403.08699, for gradient flow",
    because="after 12,800 steps from small factors: medians over 12 problems",
    slow=True,
)
def factors_converge_to_the_nuclear_solution(key: PRNGKey) -> Expectation:
    """Distance to the nuclear solution relative to the distance to the Frobenius one."""
    risks = ensemble(key)
    start = jax.random.normal(key, (2, DIM, DIM)) / 100
    ends = trajectories(
        key, rescaled_all(risks), {"key": start[0], "query": start[1]}, normalized_descent(0.1), 12_800, 12_800
    )[-1]
    angles = {
        norm: np.median(1 - cosine(ends, np.stack([found.direction for found in solutions(risks, ends, norm)])))
        for norm in ("nuclear", "frobenius")
    }
    share = angles["nuclear"] / angles["frobenius"]
    return at_most("1 - cosine with the nuclear solution, over that with the Frobenius one", share, 0.1)


def normal(key: PRNGKey, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    """Independent Gaussian arrays."""
    return [
        np.asarray(jax.random.normal(k, shape))
        for k, shape in zip(jax.random.split(key, len(shapes)), shapes, strict=True)
    ]


@claim(
    statement=r"\text{either } \langle a_k, W \rangle \ge 1 \text{ for some } W, \text{ or } \sum_k \lambda_k a_k = 0,\ \lambda \ge 0,\ \lambda \ne 0",
    source="Gordan's theorem, 1873, for the attention SVM of arXiv 2308.16898",
    tolerance=0.0,
    because="a verdict by proof each, against linear programming by HiGHS on the written-out rows",
    slow=True,
)
def attention_svm_is_feasible_or_has_gordan_multipliers(key: PRNGKey) -> Expectation:
    """Verdicts on 60 random problems, about half of them feasible."""
    verdicts = {Status.SOLVED: True, Status.INFEASIBLE: False, Status.INACCURATE: None}
    problems = []
    for number in range(60):
        tokens, queries = normal(jax.random.fold_in(key, number), (6, 5, 3), (6, 3))
        problems.append(attention_problem(tokens, queries, np.zeros(6, int)))
    differ = [verdicts[Status(int(max_margin(p).status))] is not possible(p) for p in problems]
    return equal("problems of 60 on which the verdicts differ", np.sum(differ), 0)


def possible(problem: MarginProblem) -> bool:
    """Whether a linear program finds parameters that separate."""
    rows = np.einsum("kd,ke->kde", problem.differences, problem.queries[problem.owner]).reshape(len(problem.owner), -1)
    program = scipy.optimize.linprog(
        np.zeros(rows.shape[1]), A_ub=-rows, b_ub=-problem.bound, bounds=(None, None), method="highs"
    )
    return program.status == 0


@claim(
    statement=r"\frac{d}{dt} (K^\top K - Q^\top Q) = 0 \text{ under gradient flow of any loss of } K Q^\top;"
    r"\text{ a step } \eta \text{ of descent adds } \eta^2 (\dot K^\top \dot K - \dot Q^\top \dot Q)",
    source="Sheen et al., arXiv 2403.08699; the step: derived here",
    tolerance=1e-9,
    because="flow to t = 2 at a relative accuracy of 1e-12 a step: rounding, 1e-11 and less on seeds 0 to 9",
    slow=True,
)
def factors_conserve_their_imbalance(key: PRNGKey) -> list[Expectation]:
    """Drift of K^T K - Q^T Q and of K^T K + Q^T Q along the flow, over the norm of the start; what 50 steps of descent
    add to the first, over what autodiff's gradients say."""
    risk = jax.tree.map(lambda leaf: leaf[0], ensemble(key, 1))
    start, slope = np.asarray(jax.random.normal(key, (2, DIM, 3))), jax.jit(jax.grad(risk))

    def velocity(factors: np.ndarray) -> np.ndarray:
        gradient = slope({"key": jnp.asarray(factors[0]), "query": jnp.asarray(factors[1])})
        return -np.stack([gradient["key"], gradient["query"]])

    flow = scipy.integrate.solve_ivp(
        lambda _, vector: velocity(vector.reshape(start.shape)).ravel(), (0, 2), start.ravel(), "DOP853",
        rtol=1e-12, atol=1e-12,
    )  # fmt: skip
    difference, total = (
        np.linalg.norm(_grams(flow.y[:, -1].reshape(start.shape), sign) - _grams(start, sign)) for sign in (-1, 1)
    )
    size, step, added = np.linalg.norm(_grams(start, 1)), 0.1, np.zeros((3, 3))
    params = {"key": jnp.asarray(start[0]), "query": jnp.asarray(start[1])}
    trained = train(risk, params, optax.sgd(step), key, steps=50, every=50).params
    point = start
    for _ in range(50):
        added += step**2 * _grams(velocity(point), -1)
        point = point + step * velocity(point)
    moved = np.asarray(imbalance(trained)) - _grams(start, -1)
    length = np.linalg.norm(added)
    return [
        equal("drift of K^T K - Q^T Q under the flow", difference / size, 0.0),
        at_least("drift of K^T K + Q^T Q, the control", total / size, 1e-3, because="nothing conserves it"),
        equal("what 50 steps of descent add, over its predicted norm", moved / length, added / length),
    ]


def _grams(factors: np.ndarray, sign: int) -> np.ndarray:
    """K^T K + sign Q^T Q."""
    return factors[0].T @ factors[0] + sign * factors[1].T @ factors[1]


@claim(
    statement=r"\text{mirror descent with } \psi = \tfrac1p \|\cdot\|_p^p:\ "
    r"D_\psi(W^{\mathrm{mm}}_p / \|W^{\mathrm{mm}}_p\|_p,\ W_t / \|W_t\|_p) \to 0, \text{ the solution of least } \ell_p \text{ norm}",
    source="Julistiono et al., arXiv 2410.14581",
    because="medians of 12 problems, after 1,500 and 6,000 steps",
    slow=True,
)
def mirror_descent_converges_to_its_own_norm(key: PRNGKey) -> Expectation:
    """p = 1.75 and 3, against the solutions of p = 1.75, 2 and 3."""
    risks, ratios = ensemble(key), []
    for p, steps in ((1.75, 1500), (3.0, 6000)):
        optimizer = optax.chain(normalize_gradient(), mirror_descent(0.5, p))
        start = {"query_key": jnp.full((DIM, DIM), 1e-3)}
        ends = trajectories(key, rescaled_all(risks), start, optimizer, steps, steps)[-1]
        found = {q: np.median(divergence(lp_directions(risks, ends, q), ends, p)) for q in (1.75, 2.0, 3.0)}
        ratios.append(found.pop(p) / min(found.values()))
    return at_most("divergence to the own solution over that to the nearest other p's", ratios, 0.01)


def divergence(first: np.ndarray, second: np.ndarray, p: float) -> np.ndarray:
    """Bregman divergence of ||.||_p^p / p between matrices scaled to l_p norm 1: 1 - <phi_p(second), first>."""
    first, second = (w / np.sum(np.abs(w) ** p, axis=(-2, -1), keepdims=True) ** (1 / p) for w in (first, second))
    return 1 - np.sum(np.sign(second) * np.abs(second) ** (p - 1) * first, axis=(-2, -1))


def lp_directions(risks: Objective, matrices: np.ndarray, p: float) -> np.ndarray:
    """Directions of the solutions in l_p of what each member selects."""
    problems = (
        attention_problem(*member(risks, i)[:2], selected(risks, i, w), norm=("lp", p)) for i, w in enumerate(matrices)
    )
    return np.stack([max_margin(problem).direction for problem in problems])


def train_parts(
    key: PRNGKey, risk: Objective, inside: np.ndarray | Array, problem: MarginProblem, steps: int
) -> np.ndarray:
    """W after training the finite part by gradient descent and the diverging one by normalised descent."""
    basis = jnp.asarray(equality_basis(problem))
    size = basis.shape[1:]
    labels = {"finite": "finite", "diverging": "diverging"}
    optimizer = optax.partition(
        {"finite": optax.adam(optax.cosine_decay_schedule(0.1, steps)), "diverging": DESCENT}, labels
    )
    split = decoupled(risk, jnp.asarray(inside), basis)
    start = {"finite": jnp.zeros(size), "diverging": jnp.zeros(size)}
    trained = train(split, start, optimizer, key, steps=steps, every=steps)
    return np.asarray(decoupled_matrix(trained.params, basis))


def parts_found(problem: MarginProblem, matrix: np.ndarray, finite: np.ndarray | Array) -> list[Expectation]:
    """Error of the part in the span of the equality rows; and one less the cosine of the rest with the solution."""
    finite = np.asarray(finite)
    missed = np.linalg.norm(project_on_equalities(problem, matrix) - finite)
    angle = 1 - cosine(matrix - finite, np.asarray(max_margin(problem).direction))
    return [at_most("error of the finite part", missed, 1e-6), at_most("1 - cosine of the diverging part", angle, 1e-4)]


class GraphCase(NamedTuple):
    """Sequences that end in one of two tokens, their labels, and embeddings of the tokens."""

    sequences: np.ndarray
    labels: np.ndarray
    embeddings: np.ndarray

    def risk(self) -> Objective:
        """Cross-entropy to the copies of the label in the sequence."""
        copies = self.sequences == self.labels[:, None]
        tokens, last = self.embeddings[self.sequences], self.embeddings[self.sequences[:, -1]]
        return decision_risk(jnp.asarray(tokens), jnp.asarray(last), jnp.asarray(copies / copies.sum(1, keepdims=True)))


def graph_case(key: PRNGKey) -> GraphCase:
    """Four of six tokens in each of 24 sequences; the label is a token of the highest class there, drawn anew each
    time: tokens of one class chase each other. Drawn again where chance left no cycle, and so no finite part."""
    keys = jax.random.split(key, 4)
    vocabulary, count, length, dim = 6, 24, 4, 10
    before = np.asarray(jax.random.randint(keys[0], (count, length - 1), 0, vocabulary))
    sequences = np.concatenate([before, np.asarray(jax.random.randint(keys[1], (count, 1), 0, 2))], axis=1)
    luck = np.asarray(jax.random.uniform(keys[2], (count, vocabulary)))[np.arange(count)[:, None], sequences]
    labels = sequences[np.arange(count), (sequences // 2 + luck).argmax(1)]
    cyclic = any(len(set(held)) < len(held) for held in _held_components(sequences, labels, vocabulary))
    if not cyclic:
        return graph_case(jax.random.fold_in(key, 1))
    return GraphCase(sequences, labels, normal(keys[3], (vocabulary, dim))[0])


def _held_components(sequences: np.ndarray, labels: np.ndarray, vocabulary: int) -> list[list[int]]:
    """Of every last token, the components of the tokens in its graph."""
    return [
        [place for place in row if place >= 0] for row in priority_components(sequences, labels, vocabulary).tolist()
    ]


@claim(
    statement=r"W_t \approx W^{\mathrm{fin}} + \|W_t\| W^{\mathrm{svm}} / \|W^{\mathrm{svm}}\| \text{ on the token-priority graph}",
    source="Li et al., arXiv 2403.08081, by a descent that takes the two parts apart",
    because="limits: what is left of both falls with the steps",
    slow=True,
)
def graph_svm_splits_attention_into_finite_and_diverging(key: PRNGKey) -> list[Expectation]:
    """Error of the finite part, and one less the cosine of the rest, after descent on the two parts apart."""
    case = graph_case(key)
    problem = graph_problem(*case)
    components = priority_components(case.sequences, case.labels, len(case.embeddings))
    last = case.sequences[:, -1]
    inside = components[last[:, None], case.sequences] == components[last, case.labels][:, None]
    matrix = train_parts(key, case.risk(), inside, problem, 3000)
    return parts_found(problem, matrix, finite_component(*case))


@claim(
    statement=r"\|P_{\mathrm{cyc}} W_t - W^{\mathrm{fin}}\| \to \eta / 2 \text{ under normalised descent with steps of length } \eta",
    source="derived here, for the training of Li et al., arXiv 2403.08081: in the end the finite part steps to and fro across W_fin",
    tolerance=0.03,
    because="the diverging part takes a share of each step that fades as the norm grows; measured at norm 4 to 6",
)
def normalised_descent_leaves_a_floor_in_the_finite_part(key: PRNGKey) -> Expectation:
    """Error of the finite part over the step length."""
    case, step = graph_case(key), 0.01
    start = {"query_key": jnp.zeros((10, 10))}
    ends = train(case.risk(), start, normalized_descent(step), key, steps=6000, every=6000).params["query_key"]
    missed = project_on_equalities(graph_problem(*case), np.asarray(ends)) - finite_component(*case)
    return equal("error of the finite part over the step length", np.linalg.norm(missed) / step, 0.5)
