"""The command line: `hfreduce COMMAND ...`, the same as `python -m hfreduce COMMAND ...`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

# Each module has add_arguments(parser) and run(args) -> exit status; only the chosen one is imported.
_COMMANDS = {
    "perf": "measure a collective: nccl-tests' table, checked values",
    "run": "start local ranks of a program, without MPI",
    "exec": "run a program with hfreduce in the place of NCCL",
    "info": "what was built, what this machine has, every parameter",
    "config": "compiler and linker flags for C programs",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the process's exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen = next((a for a in arguments if not a.startswith("-")), None)
    parser = argparse.ArgumentParser(prog="hfreduce", description="Collective communication on the CPU, for training.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, summary in _COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        if name == chosen:
            module = importlib.import_module(f"hfreduce.cli.{name}")
            module.add_arguments(sub)
            sub.set_defaults(run_command=module.run)
    args = parser.parse_args(arguments)
    args.command_line = arguments
    if args.version:
        from hfreduce._version import __version__

        print(f"hfreduce {__version__}")
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    try:
        return int(args.run_command(args))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has left
        sys.stderr.close()
        return 141
