"""Curvature of any objective, without forming the matrix: it knows no model."""

from attnlab.curvature.operators import Operator, functional, ggn, hessian, restrict
from attnlab.curvature.spectrum import Eigenpairs, SpectralDensity, eigenpairs, spectral_density

__all__ = [
    "Eigenpairs",
    "Operator",
    "SpectralDensity",
    "eigenpairs",
    "functional",
    "ggn",
    "hessian",
    "restrict",
    "spectral_density",
]
