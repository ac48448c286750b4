"""Results and runs on disk: provenance, files, checkpoints, and the session that a long computation runs in.

`runs.checkpoint` and `runs.session` import JAX, the rest does not.
"""

from attnlab.runs.files import (
    DamagedFileError,
    check_writable,
    flat,
    load_arrays,
    nested,
    owned_directory,
    parts_record,
    read_archive,
    replace_directory,
    replace_file,
    save_result,
    stored_arrays,
    write_archive,
    write_json,
)
from attnlab.runs.provenance import manifest, source_digests

__all__ = [
    "DamagedFileError",
    "check_writable",
    "flat",
    "load_arrays",
    "manifest",
    "nested",
    "owned_directory",
    "parts_record",
    "read_archive",
    "replace_directory",
    "replace_file",
    "save_result",
    "source_digests",
    "stored_arrays",
    "write_archive",
    "write_json",
]
