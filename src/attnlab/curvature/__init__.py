"""Curvature of any objective, without forming the matrix: it knows no model."""

from attnlab.curvature.blocks import block_densities, per_block
from attnlab.curvature.density import SpectralDensity, spectral_density
from attnlab.curvature.estimators import (
    condition_number,
    diagonal,
    frobenius_norm,
    log_determinant,
    squared_frobenius_norm,
    trace,
)
from attnlab.curvature.full_check import check_curvature
from attnlab.curvature.guards import NonFiniteProductError
from attnlab.curvature.linear_systems import solve
from attnlab.curvature.operator import Operator, matrix_operator
from attnlab.curvature.operators import empirical_fisher, fisher, functional, ggn, hessian, restrict
from attnlab.curvature.self_checks import CurvatureWarning, VerificationError
from attnlab.curvature.spectrum import Eigenpairs, eigenpairs, residuals
from attnlab.curvature.transforms import CrossBlock, cross, precondition
from attnlab.curvature.xtrace import xtrace
from attnlab.objectives import BatchedObjective, batched
from attnlab.runs.progress import Progress, print_progress
from attnlab.runs.session import Session
from attnlab.statistics import Estimate

__all__ = [
    "BatchedObjective",
    "CrossBlock",
    "CurvatureWarning",
    "Eigenpairs",
    "Estimate",
    "NonFiniteProductError",
    "Operator",
    "Progress",
    "Session",
    "SpectralDensity",
    "VerificationError",
    "batched",
    "block_densities",
    "check_curvature",
    "condition_number",
    "cross",
    "diagonal",
    "eigenpairs",
    "empirical_fisher",
    "fisher",
    "frobenius_norm",
    "functional",
    "ggn",
    "hessian",
    "log_determinant",
    "matrix_operator",
    "per_block",
    "precondition",
    "print_progress",
    "residuals",
    "restrict",
    "solve",
    "spectral_density",
    "squared_frobenius_norm",
    "trace",
    "xtrace",
]
