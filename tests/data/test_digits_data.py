"""The digits: shapes and scales, patches against loops, the position codes, seeded subsets, bad input."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.data.digits import POSITION_CODES, digit_images, digits, patches
from compare import assert_close

sklearn_datasets = pytest.importorskip("sklearn.datasets", reason="the digits come with scikit-learn")

SHAPES = {(4, 4): (4, 16), (2, 2): (16, 4), (1, 8): (8, 8), (8, 8): (1, 64), (8, 1): (8, 8), (2, 4): (8, 8)}


@pytest.mark.parametrize(("patch", "shape"), SHAPES.items())
def test_shapes(patch, shape):
    data = digits(jax.random.key(1), 7, patch=patch)
    assert data.inputs.shape == (7, *shape)
    assert data.targets.shape == (7, shape[0], 10)
    assert {leaf.dtype for leaf in data} == {jnp.dtype("float64")}


@pytest.mark.parametrize("patch", SHAPES)
def test_patches_are_the_loop(key, patch):
    images = np.asarray(jax.random.normal(key, (2, 8, 8)))
    (height, width), expected = patch, []
    for image in images:
        corners = [(y, x) for y in range(0, 8, height) for x in range(0, 8, width)]
        expected.append([image[y : y + height, x : x + width].ravel() for y, x in corners])
    assert_close(patches(jnp.asarray(images), patch), np.array(expected), 0)


def test_patches_of_an_image_that_is_not_square():
    images = jnp.arange(24.0).reshape(1, 4, 6)
    assert patches(images, (2, 3))[0, 1].tolist() == [3, 4, 5, 9, 10, 11]


def test_images_and_labels_stay_together():
    """Every image of a subset is in the collection, with its own label."""
    stored = sklearn_datasets.load_digits()
    data = digit_images(jax.random.key(1), 50, targets="labels")
    for image, label in zip(np.asarray(data.inputs), np.asarray(data.targets), strict=True):
        same = np.all(stored.images == 16 * image[..., 0], axis=(1, 2))
        assert label in stored.target[same]


def test_rows_are_the_rows_of_the_image(key):
    images, rows = digit_images(key, 5), digits(key, 5, patch=(1, 8))
    assert_close(rows.inputs, images.inputs[..., 0], 0)


def test_unit_scaling():
    pixels = digit_images(jax.random.key(1), 1797).inputs
    assert float(pixels.min()) == 0
    assert float(pixels.max()) == 1


def test_standard_scaling():
    pixels = digit_images(jax.random.key(1), 1797, scaling="standard").inputs
    assert_close(jnp.mean(pixels), jnp.zeros(()), 1e-13, scale=1)
    assert_close(jnp.var(pixels), jnp.ones(()), 1e-12)


def test_the_whole_collection_is_a_permutation():
    labels = digit_images(jax.random.key(1), 1797, targets="labels").targets
    assert np.array_equal(np.bincount(labels), np.bincount(sklearn_datasets.load_digits().target))


@pytest.mark.parametrize("scaling", ["unit", "standard"])
def test_subsets_of_one_key_are_nested(scaling):
    """A larger count adds images and changes none, so that train and test sets can be cut from one draw."""
    small, large = (digits(jax.random.key(1), count, scaling=scaling) for count in (5, 20))
    assert_close(jax.tree.map(lambda leaf: leaf[:5], large), small, 0)


def test_data_are_a_function_of_the_key():
    first, again, other = (digits(jax.random.key(seed), 20, targets="labels") for seed in (1, 1, 2))
    assert_close(first, again, 0)
    assert not np.array_equal(first.inputs, other.inputs)
    assert_close(jax.jit(lambda key: digits(key, 20, targets="labels"))(jax.random.key(1)), first, 0)


def test_targets():
    options = ({"targets": t, "per_token": p} for t in ("labels", "one_hot") for p in (False, True))
    labels, label_per_token, one_hot, one_hot_per_token = (digits(jax.random.key(1), 6, **o).targets for o in options)
    assert labels.shape == (6,)
    assert labels.dtype == jnp.int32
    assert_close(one_hot, np.eye(10)[np.asarray(labels)], 0)
    for token in range(4):
        assert_close(label_per_token[:, token], labels, 0)
        assert_close(one_hot_per_token[:, token], one_hot, 0)


@pytest.mark.parametrize(("positions", "width"), [("one_hot", 4 + 2), ("sinusoidal", 4)])
def test_position_code_is_appended(positions, width):
    bare = digits(jax.random.key(1), 3, patch=(2, 4)).inputs
    coded = digits(jax.random.key(1), 3, patch=(2, 4), positions=positions).inputs
    assert_close(coded[..., :8], bare, 0)
    assert_close(coded[..., 8:], np.broadcast_to(POSITION_CODES[positions](4, 2), (3, 8, width)), 0)


@pytest.mark.parametrize("name", POSITION_CODES)
def test_codes_of_all_places_differ(name):
    code = POSITION_CODES[name](8, 8)
    distance = np.linalg.norm(code[:, None] - code[None], axis=-1) + 10 * np.eye(64)
    assert distance.min() > 0.1
    # row and column stand apart: places in one row share the row's half of the code
    rows = POSITION_CODES[name](3, 2)
    assert_close(rows[0::2][:, : rows.shape[1] // 2], rows[1::2][:, : rows.shape[1] // 2], 0)


def test_one_hot_code_names_row_and_column():
    assert POSITION_CODES["one_hot"](2, 3)[4].tolist() == [0, 1, 0, 1, 0]


BAD_CALLS = [
    ({"count": 1798}, "count is 1798; expected 1 <= count <= 1797. There are 1797 images"),
    ({"count": 0}, "count is 0"),
    ({"patch": (3, 3)}, r"patch is \(3, 3\), which does not divide the 8 x 8 pixels"),
    ({"patch": (0, 8)}, r"patch\[0\] is 0; expected a positive"),
    ({"scaling": "units"}, "there is no scaling 'units'.*Did you mean 'unit'"),
    ({"targets": "onehot"}, "there is no kind of targets 'onehot'.*Did you mean 'one_hot'"),
    ({"positions": "learned"}, "there is no position code 'learned'; expected one of: one_hot, sinusoidal"),
]


@pytest.mark.parametrize(("options", "message"), BAD_CALLS)
def test_bad_call(options, message):
    with pytest.raises(ValueError, match=message):
        digits(jax.random.key(0), **{"count": 5, **options})


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match="which is not installed; run pip install scikit-learn"):
        digits(jax.random.key(0), 5)
