"""Attention as a support vector machine: max-margin problems, certified solvers, and what is built of them."""

from attnlab.margin.certificates import Certificate, MaxMargin, PrimalDual, Status, certify
from attnlab.margin.compound import JointMargin, joint_max_margin, log_odds, next_token_problem
from attnlab.margin.equalities import equality_basis, equality_solution, project_on_equalities
from attnlab.margin.graph import finite_component, graph_problem, priority_components
from attnlab.margin.optimizers import mirror_descent, normalize_gradient, normalized_descent
from attnlab.margin.path import RegularizationPath, regularization_path
from attnlab.margin.probes import correlation, imbalance, margin_probe
from attnlab.margin.problems import (
    MarginProblem,
    attention_problem,
    margin_problem,
    stack,
    vector_problem,
    with_norm,
)
from attnlab.margin.solve import max_margin
from attnlab.margin.solvers import METHODS, SOLVERS
from attnlab.margin.solvers.traced import frobenius_batch, frobenius_traced
from attnlab.margin.training import (
    attention_logits,
    attention_matrix,
    attention_risk,
    decision_risk,
    decoupled,
    decoupled_matrix,
    rescaled,
    selected_probability,
)

__all__ = [
    "METHODS",
    "SOLVERS",
    "Certificate",
    "JointMargin",
    "MarginProblem",
    "MaxMargin",
    "PrimalDual",
    "RegularizationPath",
    "Status",
    "attention_logits",
    "attention_matrix",
    "attention_problem",
    "attention_risk",
    "certify",
    "correlation",
    "decision_risk",
    "decoupled",
    "decoupled_matrix",
    "equality_basis",
    "equality_solution",
    "finite_component",
    "frobenius_batch",
    "frobenius_traced",
    "graph_problem",
    "imbalance",
    "joint_max_margin",
    "log_odds",
    "margin_probe",
    "margin_problem",
    "max_margin",
    "mirror_descent",
    "next_token_problem",
    "normalize_gradient",
    "normalized_descent",
    "priority_components",
    "project_on_equalities",
    "regularization_path",
    "rescaled",
    "selected_probability",
    "stack",
    "vector_problem",
    "with_norm",
]
