"""The only import of the binary: `ffi` and `lib` of the cffi module (declarations: csrc/include/hfreduce.h)."""

from __future__ import annotations

try:
    from hfreduce._core import ffi, lib
except ImportError as error:  # not built, or built for another Python
    raise ImportError(
        f"hfreduce's C core cannot be loaded ({error}). Build it with `pip install .` (or `pip install -e .`) in the source "
        "tree, and do not run Python from the top of a source tree that was not built in place."
    ) from error

__all__ = ["ffi", "lib"]
