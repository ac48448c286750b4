"""The spectrum of a context, which claims about depth hold the moments of `attnlab.icl.depth` against."""

import numpy as np
import scipy.integrate


def wishart_density(dimension: int, length: int, points: np.ndarray) -> np.ndarray:
    """Expected number of eigenvalues of X^T X / N per unit length, for an odd dimension, by de Bruijn's integral: the
    normalisation of prod_(i<j) |x_i - x_j| prod_i w(x_i), w = x^((N-d-1)/2) e^(-N x/2), is a Pfaffian, and the density
    its logarithm's derivative in w."""
    weight = points ** ((length - dimension - 1) / 2) * np.exp(-length * points / 2)
    powers = points[:, None] ** np.arange(dimension) * weight[:, None] / weight.max()
    below = scipy.integrate.cumulative_simpson(powers, x=points, axis=0, initial=0.0)
    total, signed = below[-1], below[-1] - 2 * below
    products = powers[:, :, None] * signed[:, None, :]
    pfaffian = np.zeros((dimension + 1, dimension + 1))
    pfaffian[:-1, :-1] = scipy.integrate.simpson(products, x=points, axis=0)
    pfaffian[:-1, -1], pfaffian[-1, :-1] = total, -total
    inverse = np.linalg.inv((pfaffian - pfaffian.T) / 2)
    # d log Pf(A) = tr(A^-1 dA) / 2, and dA is antisymmetric as A is
    return np.einsum("ij,xji->x", inverse[:-1, :-1], products) + powers @ inverse[-1, :-1]
