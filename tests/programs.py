"""The C programs of tests/c, built for the tests in build/c/<variant>, so that only what changed is built again."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
from ranks import PATIENCE

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "tests" / "c"
BUILD = ROOT / "build" / "c"
#: Seconds that building may take.
BUILD_LIMIT = 400
#: What sanitized programs are told, by variant.
SANITIZER_ENV = {
    "plain": {},
    "address": {
        "ASAN_OPTIONS": "detect_leaks=1:strict_string_checks=1:detect_stack_use_after_return=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    },
    "thread": {"TSAN_OPTIONS": "second_deadlock_stack=1:history_size=4"},
}


def _load_build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hfreduce_csrc_build", ROOT / "csrc" / "build.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


build = _load_build()


@contextmanager
def building(variant: str) -> Iterator[Path]:
    """Give the variant's build directory to one process at a time, and turn the compiler's complaints into a failure."""
    out = BUILD / variant
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield out
        except SystemExit as failure:
            pytest.fail(str(failure), pytrace=False)


def compiler() -> list[str]:
    """The command that C programs are built with; skip where this machine has none."""
    try:
        return shlex.split(build.compiler())
    except SystemExit as missing:
        pytest.skip(str(missing))


def need_compiler(cc: str = "") -> None:
    """Skip unless there is such a compiler; the one that programs are built with if none is named."""
    if not cc:
        compiler()
    elif not shutil.which(cc):
        pytest.skip(f"no {cc} on PATH")


def need_sanitizer(variant: str, tmp_path: Path) -> None:
    """Skip unless programs under the sanitizer can be linked and run here."""
    source = tmp_path / "probe.c"
    source.write_text("int main(void) { return 0; }\n")
    command = [*compiler(), *build.SANITIZERS[variant], "-o", str(tmp_path / "probe"), str(source)]
    for step in (command, [str(tmp_path / "probe")]):
        done = subprocess.run(step, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"the {variant} sanitizer does not work here: {done.stderr.strip()[-300:]}")


def built(program: str, variant: str = "plain") -> Path:
    """Build tests/c/<program>.c, plain or under a sanitizer, and return the program's path."""
    with building(variant) as out:
        path: Path = build.build_program(out, SOURCES / f"{program}.c", sanitize="" if variant == "plain" else variant)
    return path


def run_to_end(command: list[str], folder: Path, limit: float, env: dict[str, str]) -> tuple[int | None, str]:
    """Run a program in `folder`, and end it and its ranks after `limit` seconds, times PATIENCE; its exit status (None: it still ran), its output.

    Output goes to a file: ranks that outlive the program cannot hold a pipe open.
    """
    with (folder / "output").open("w+", errors="replace") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env, cwd=folder, start_new_session=True)
        try:
            code: int | None = process.wait(limit * PATIENCE)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:  # also when pytest gives up
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return code, output.read()


def environment(**more: str) -> dict[str, str]:
    """This process' environment without the caller's own parameters, with a deadline before a test's limit, and more."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HFREDUCE_")}
    return kept | {"HFREDUCE_TIMEOUT": "30"} | more


def shorten(text: str, most: int = 12000) -> str:
    """Keep the beginning, where the first error stands, and the end."""
    return text if len(text) <= most else f"{text[: most * 2 // 3]}\n[...]\n{text[-most // 3 :]}"
