"""Kronecker approximations of the Gauss-Newton matrix of any model of dense layers, and their errors."""

from attnlab.curvature.kronecker.approximations import APPROXIMATIONS, approximate, kronecker_approximation
from attnlab.curvature.kronecker.errors import OperatorErrors, operator_errors
from attnlab.curvature.kronecker.factors import KroneckerApproximation, KroneckerBlock
from attnlab.curvature.kronecker.preconditioning import preconditioned_solve
from attnlab.curvature.kronecker.pseudo_gradients import PseudoGradients, pseudo_gradients, selection_of

__all__ = [
    "APPROXIMATIONS",
    "KroneckerApproximation",
    "KroneckerBlock",
    "OperatorErrors",
    "PseudoGradients",
    "approximate",
    "kronecker_approximation",
    "operator_errors",
    "preconditioned_solve",
    "pseudo_gradients",
    "selection_of",
]
