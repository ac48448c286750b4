"""The programs of a run, compiled from shapes alone: what each device would hold, and what a product would cost it."""

import json
import pickle
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Var
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.tree_util import Partial

from attnlab.curvature.density import spectral_density
from attnlab.curvature.operator import Operator
from attnlab.curvature.operators import PARTS
from attnlab.losses import cross_entropy
from attnlab.models.adapters import from_linen
from attnlab.models.transformer import LanguageModel, LanguageModelConfig
from attnlab.objectives import Objective
from attnlab.planning.cost import program_cost
from attnlab.sharding import layout_of, parameter_shardings
from attnlab.types import PyTree

AXIS = "devices"


@dataclass(frozen=True)
class Case:
    """A product with the curvature of a language model, on data spread over devices, and its parameters too if they are
    `sharded`. What the linearisation saves is kept between products, or nothing is (`afresh`)."""

    model: LanguageModelConfig
    sequences: int
    length: int
    product: str
    devices: int
    sharded: bool
    afresh: bool
    probes: int
    steps: int


@dataclass(frozen=True)
class Footprint:
    """Of one device, in bytes and operations.

    Attributes:
        platform: of the devices that the programs were compiled for.
        dimension: the number of parameters, over all devices.
        parameters: bytes of parameters and data.
        saved: what the linearisation keeps between products.
        temporaries: what the density makes and drops, its Lanczos vectors among it.
        building: the most that is held while the operator is built.
        flops: of a product, in matrix products.
        traffic: bytes that a product reads and writes.
        received: bytes that a product has from other devices.
    """

    platform: str
    dimension: int
    parameters: int
    saved: int
    temporaries: int
    building: int
    flops: float
    traffic: float
    received: float

    @property
    def peak(self) -> int:
        """The most that a device holds."""
        return max(self.building, self.parameters + self.saved + self.temporaries)


def footprint(case: Case) -> Footprint:
    """Compile the programs of a case: here if this process has as many devices, else in a process of its own, on
    simulated ones of a CPU. No array is made. Raises `RuntimeError`, with what that process had to say, where it fails.
    """
    if len(jax.devices()) >= case.devices:
        return _compiled(case)
    settings = {name: getattr(jax.config, name) for name in ("jax_enable_x64", "jax_compilation_cache_dir")}
    command = [sys.executable, "-m", "attnlab.planning.programs"]
    ended = subprocess.run(command, input=pickle.dumps((case, settings)), capture_output=True)
    if ended.returncode:
        raise RuntimeError(f"the process that compiles for {case.devices} devices failed: {ended.stderr.decode()}")
    return Footprint(**json.loads(ended.stdout))


def _in_child() -> None:
    case, settings = pickle.loads(sys.stdin.buffer.read())
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", case.devices)
    for name, value in settings.items():
        jax.config.update(name, value)
    print(json.dumps(asdict(_compiled(case))))


def _compiled(case: Case) -> Footprint:
    risk, params = _shapes(case)
    build = jax.jit(lambda risk, params: _operator(case, risk, params)).trace(risk, params)
    built = build.lower().compile()
    operator = _placed(build.out_info, built.output_shardings)
    operator = replace(operator, layout=layout_of(params))  # as a concrete one would have it
    saved = _bytes(_made(build, operator))
    density = jax.jit(partial(spectral_density, samples=case.probes, steps=case.steps))
    compiled = density.lower(operator, jax.random.key(0)).compile()
    text, building, running = compiled.as_text(), built.memory_analysis(), compiled.memory_analysis()
    assert text is not None
    assert building is not None
    assert running is not None
    cost = program_cost(text) * (1 / (case.probes * case.steps))
    held = _bytes((risk, params))
    return Footprint(
        platform=jax.devices()[0].platform,
        dimension=sum(leaf.size for leaf in jax.tree.leaves(params)),
        parameters=held,
        saved=saved,
        temporaries=running.temp_size_in_bytes,
        building=held + saved + building.temp_size_in_bytes,
        flops=cost.flops,
        traffic=cost.traffic,
        received=cost.received,
    )


def _made(build: jax.stages.Traced, operator: Operator) -> list[Any]:
    """The arrays of an operator that its building makes; those that it is given take no more memory."""
    program = build.jaxpr.jaxpr
    given = set(program.invars)
    leaves = zip(program.outvars, jax.tree.leaves(operator), strict=True)
    return [leaf for variable, leaf in leaves if not (isinstance(variable, Var) and variable in given)]


def _operator(case: Case, risk: Objective, params: PyTree) -> Operator:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing is saved is what was asked for
        return PARTS[case.product](risk, params, check=False, budget=0 if case.afresh else None)


def _shapes(case: Case) -> tuple[Objective, PyTree]:
    """The objective and the parameters without their values, but with the place of each."""
    devices = jax.devices()[: case.devices]
    mesh = jax.make_mesh((case.devices,), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)
    module = LanguageModel(case.model)
    init = lambda: module.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]  # noqa: E731
    params = jax.eval_shape(init)
    everywhere = NamedSharding(mesh, PartitionSpec())
    where = parameter_shardings(params, mesh, AXIS) if case.sharded else jax.tree.map(lambda _: everywhere, params)
    by_data = NamedSharding(mesh, PartitionSpec(AXIS))
    tokens = jax.ShapeDtypeStruct((case.sequences, case.length), jnp.int32, sharding=by_data)
    risk = Objective(from_linen(module), Partial(cross_entropy), tokens, tokens)
    return risk, _placed(params, where)


def _placed(shapes: PyTree, where: PyTree) -> PyTree:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, where
    )


def _bytes(shapes: PyTree) -> int:
    """Of the share that one device has."""
    leaves = jax.tree.leaves(shapes)
    return sum(jnp.dtype(leaf.dtype).itemsize * _share(leaf) for leaf in leaves)


def _share(leaf: jax.ShapeDtypeStruct) -> int:
    assert leaf.sharding is not None
    size = 1
    for length in leaf.sharding.shard_shape(leaf.shape):
        size *= length
    return size


if __name__ == "__main__":
    _in_child()
