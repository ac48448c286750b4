"""The one shape of data: inputs and what should be predicted from them."""

from typing import NamedTuple

import jax


class Dataset(NamedTuple):
    """Inputs and targets, one example a row of the first axis: `objective(predict, loss, *dataset)`."""

    inputs: jax.Array
    targets: jax.Array
