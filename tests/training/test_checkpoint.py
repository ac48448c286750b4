"""What a run leaves on disk: every kind of leaf comes back as it was, and can be read without the model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

from attnlab.losses import square_loss
from attnlab.objectives import objective
from attnlab.runs.checkpoint import fingerprint
from attnlab.runs.session import Session
from attnlab.training import Records, load_records, probe, train


def scaled(scale, params, inputs):
    return scale * params["half"].astype(inputs.dtype) * inputs + params["whole/part"]


def sizes(risk, params):
    return {"half": params["half"].sum(), "both": (params["half"], params["whole/part"])}


class Killed(BaseException):
    """What a kill looks like from inside."""


def test_every_kind_of_leaf_resumes_with_equal_bits(tmp_path):
    """Half precision in the parameters, the optimizer and a probe; a key of another kind; a bound Python number."""
    risk = objective(Partial(scaled, 0.5), square_loss, jnp.arange(3.0), jnp.ones(3))
    params = {"half": jnp.ones(3, jnp.bfloat16), "whole/part": jnp.zeros(3)}
    start = (risk, params, optax.adam(0.1, mu_dtype=jnp.bfloat16), jax.random.key(0, impl="rbg"))
    options = {"steps": 8, "every": 2, "probes": {"size": probe(sizes), "size/loss": probe(lambda r, p: r(p))}}
    whole = train(*start, **options)

    def kill(progress):
        if progress.step == 4:
            raise Killed

    with pytest.raises(Killed):
        train(*start, **options, session=Session(directory=tmp_path, report=kill))
    assert_same(load_records(tmp_path), first(whole.records, 4))
    resumed = train(*start, **options, session=Session(directory=tmp_path))
    for again in (resumed, train(*start, **options, session=Session(directory=tmp_path))):
        assert fingerprint((again.records, again.state)) == fingerprint((whole.records, whole.state))
    assert_same(load_records(tmp_path), whole.records)


def assert_same(found, records):
    """Records read from disk: half precision in single, and tuples as dicts by position."""
    assert found.values.keys() == records.values.keys()
    both = dict(zip("01", records.values["size"]["both"], strict=True))
    values = records.values | {"size": records.values["size"] | {"both": both}}
    for array, leaf in zip(jax.tree.leaves(found), jax.tree.leaves(records._replace(values=values)), strict=True):
        np.testing.assert_array_equal(array, np.asarray(leaf).astype(array.dtype))


def first(records, steps):
    """The records up to a step, measured every other step."""
    return Records(*jax.tree.map(lambda leaf: leaf[: steps // 2], records[:2]), records.losses[:steps])
