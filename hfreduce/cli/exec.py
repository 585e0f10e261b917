"""`hfreduce exec`: run a program with hfreduce in the place of NCCL."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Mapping, Sequence

from hfreduce.cli.config import library_directory


def nccl_library() -> str:
    """Path of our libnccl.so.2."""
    return str(library_directory() / "libnccl.so.2")


def preloaded(environment: Mapping[str, str], library: str) -> dict[str, str]:
    """The environment with `library` first in LD_PRELOAD, where the loader prefers it to any other file of its name."""
    others = [entry for entry in environment.get("LD_PRELOAD", "").replace(":", " ").split() if entry != library]
    return {**environment, "LD_PRELOAD": ":".join([library, *others])}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("program", help="program; a name that ends in .py is run by this Python")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="its arguments")


def command_of(program: str, args: Sequence[str]) -> list[str] | None:
    """What to execute, with its path; None: there is no such program."""
    if program.endswith(".py"):
        return [sys.executable, program, *args]
    path = shutil.which(program)
    return None if path is None else [path, *args]


def run(args: argparse.Namespace) -> int:
    """Become the program. Its children inherit the preload, so launchers (torchrun, mpirun, hfreduce run) may come after `exec`."""
    library = nccl_library()
    if not os.path.exists(library):
        print(f"hfreduce exec: {library} is not there: install hfreduce again (pip install .)", file=sys.stderr)
        return 2
    if set(library) & set(" :"):
        print(f"hfreduce exec: LD_PRELOAD cannot name {library}, which has a space or colon in it", file=sys.stderr)
        return 2
    command = command_of(args.program, args.args)
    if command is None:
        print(f"hfreduce exec: {args.program}: not found, or not executable", file=sys.stderr)
        return 127
    sys.stdout.flush()
    os.execve(command[0], command, preloaded(os.environ, library))
    raise AssertionError("execve has returned")
