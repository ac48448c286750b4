"""The one comparator of the tests."""

import jax
import numpy as np

TOLERANCE = {np.dtype("float64"): 1e-10, np.dtype("float32"): 1e-4}


def relative_error(found, expected):
    """||found - expected|| / ||expected|| over all leaves (absolute where the expected norm is below 1e-300)."""
    found, expected = (
        np.concatenate([np.ravel(np.asarray(leaf)) for leaf in jax.tree.leaves(tree)]) for tree in (found, expected)
    )
    assert found.shape == expected.shape, f"{found.shape} against {expected.shape}"
    return float(np.linalg.norm(found - expected) / max(float(np.linalg.norm(expected)), 1e-300))


def assert_close(found, expected, tolerance=None, scale=None):
    """Assert that the relative error (with `scale`, the error over it) is at most `tolerance` (1e-10 in float64)."""
    first = np.asarray(jax.tree.leaves(found)[0])
    tolerance = TOLERANCE[first.dtype] if tolerance is None else tolerance
    if scale is None:
        error = relative_error(found, expected)
    else:
        difference = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), found, expected)
        error = float(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(difference))) / scale)
    assert np.isfinite(error), f"relative error is {error}"
    assert error <= tolerance, f"relative error {error:.3g} is above {tolerance:.3g}"
