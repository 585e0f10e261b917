"""The only import of the binary: `ffi` and `lib` of the cffi module (declarations: csrc/include/hfreduce.h)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def _look_in_the_installed_copy() -> None:
    """Started at the top of a source tree, Python finds the package there, unbuilt: use the binary of an installed copy of the same version."""
    here = Path(__file__).resolve().parent
    package = sys.modules["hfreduce"]
    for entry in sys.path:
        copy = Path(entry or ".").resolve() / "hfreduce"
        version = copy / "_version.py"
        if copy != here and version.is_file() and version.read_bytes() == (here / "_version.py").read_bytes():
            package.__path__.append(str(copy))
            return


if importlib.util.find_spec("hfreduce._core") is None:
    _look_in_the_installed_copy()

try:
    from hfreduce._core import ffi, lib
except ImportError as error:  # not built, or built for another Python
    raise ImportError(
        f"hfreduce's C core cannot be loaded ({error}). Build it with `pip install .` (or `pip install -e .`) in the source tree."
    ) from error

#: Directory of the binary; lib/ and include/ are beside it.
BINARY_DIRECTORY = Path(str(sys.modules["hfreduce._core"].__file__)).resolve().parent

__all__ = ["BINARY_DIRECTORY", "ffi", "lib"]
