"""`hfreduce config`: flags for C programs that include <hfreduce.h> and link libhfreduce.so."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from hfreduce._ffi import BINARY_DIRECTORY as _PACKAGE


def include_directory() -> Path:
    """Where hfreduce.h is: inside the package, or csrc/include of the source tree that is installed in place."""
    installed = _PACKAGE / "include"
    return installed if (installed / "hfreduce.h").exists() else _PACKAGE.parent / "csrc" / "include"


def library_directory() -> Path:
    """Where libhfreduce.so is."""
    return _PACKAGE / "lib"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--cflags", action="store_true", help="flags for the compiler")
    parser.add_argument("--libs", action="store_true", help="flags for the linker, with an rpath to this installation")
    parser.add_argument("--nccl", action="store_true", help="path of the libnccl.so.2 that stands in for NCCL's")
    parser.add_argument("--includedir", action="store_true", help="directory of hfreduce.h")
    parser.add_argument("--libdir", action="store_true", help="directory of libhfreduce.so")


def run(args: argparse.Namespace) -> int:
    """Print what was asked for; everything, named, if nothing was."""
    include, library = include_directory(), library_directory()
    values = {
        "cflags": shlex.quote(f"-I{include}"),
        "libs": f"{shlex.quote(f'-L{library}')} -lhfreduce {shlex.quote(f'-Wl,-rpath,{library}')}",
        "nccl": str(library / "libnccl.so.2"),
        "includedir": str(include),
        "libdir": str(library),
    }
    wanted = [name for name in values if getattr(args, name)]
    if wanted:
        print(" ".join(values[name] for name in wanted))
    else:
        for name, value in values.items():
            print(f"{name}: {value}")
    return 0
