"""Strict numerics for every test: 64 bits, no silent promotion of dtypes or ranks."""

import os
from pathlib import Path

# Test programs run once: compiling them quickly beats running them quickly. Set before JAX reads it.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

# One device: what spreads over many is tested in processes of its own.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "1")

import jax
import pytest

from attnlab.compiled import keep_compiled_programs

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
keep_compiled_programs()


MAPS = Path("/proc/self/maps")
FEW_MAPS = 20_000
"""Below Linux's usual limit of 65,530 by more than any test adds."""


@pytest.fixture(autouse=True, scope="module")
def release_compiled_programs():
    """Thousands of compiled programs in one process exhaust its memory maps: drop those of a finished module."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def release_compiled_programs_within_a_long_module(request):
    """The same between the slow tests of a module, which compile most, once their programs are many."""
    yield
    if request.node.get_closest_marker("slow") and MAPS.exists() and MAPS.read_bytes().count(b"\n") > FEW_MAPS:
        jax.clear_caches()


LONGEST = ("test_full_size.py", "test_claims.py")
"""Files that take a quarter of the nightly run each."""


def pytest_collection_modifyitems(items):
    """Those come first, so that no process works on one of them when the others have ended."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


SEEDS = (1, 2, 3)


def seed_name(seed):
    return f"seed{seed}"


@pytest.fixture(
    params=[seed if seed == 1 else pytest.param(seed, marks=pytest.mark.slow) for seed in SEEDS], ids=seed_name
)
def key(request):
    """A random key for exact identities: a wrong one fails on any seed, so that seeds 2 and 3 run nightly."""
    return jax.random.key(request.param)


@pytest.fixture(params=SEEDS, ids=seed_name)
def each_key(request):
    """A random key for each of the seeds 1, 2, 3: for what is random, and held against its own error."""
    return jax.random.key(request.param)
