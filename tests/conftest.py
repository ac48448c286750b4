"""Strict numerics for every test: 64 bits, no silent promotion of dtypes or ranks, a compile cache."""

import os
import tempfile
from pathlib import Path

# Test programs run once: compiling them quickly beats running them quickly. Set before JAX reads it.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(Path(tempfile.gettempdir()) / "attnlab-test-compile-cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(params=[1, 2, 3], ids=lambda seed: f"seed{seed}")
def key(request):
    """A random key for each of the seeds 1, 2, 3."""
    return jax.random.key(request.param)
