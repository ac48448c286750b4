"""Compiled programs kept between processes, in the user's cache folder."""

import os
from pathlib import Path

LIMIT_BYTES = 2**30
"""Of the folder: programs beyond it go, the oldest first. The test suite leaves some 150 MB."""


def keep_compiled_programs(limit: int = LIMIT_BYTES) -> None:
    """Keep compiled programs in the user's cache folder (`$XDG_CACHE_HOME/attnlab/compiled`), of at most `limit` bytes.

    For commands and tests, which own their process; a library call never does this. A folder that is named already, in
    the variable `JAX_COMPILATION_CACHE_DIR`, stays the user's, and is never cleared.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attnlab" / "compiled"
        drop_oldest(folder, limit)
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def drop_oldest(folder: Path, limit: int) -> None:
    """Delete the files of `folder` that were written first until at most `limit` bytes are left.

    Another process may do the same at the same time: what is gone is no error.
    """
    found = []
    for path in folder.glob("*"):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        found.append((status.st_mtime, status.st_size, path))
    kept = 0
    for _, size, path in sorted(found, reverse=True):
        kept += size
        if kept > limit:
            path.unlink(missing_ok=True)
