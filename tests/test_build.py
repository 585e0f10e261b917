"""Building from the sources: which compiler is taken, what a machine without one is told, and what C programs link with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from programs import ROOT, build, compiler

from hfreduce.cli.config import library_directory


def tools(folder: Path, *names: str) -> str:
    """A PATH on which only these programs are; they do nothing."""
    folder.mkdir()
    for name in names:
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    return str(folder)


@pytest.mark.parametrize(
    ("asked", "there", "taken"),
    [
        ("", ("cc", "gcc", "clang"), "cc"),
        ("", ("gcc", "clang"), "gcc"),
        ("", ("clang",), "clang"),
        ("clang -m64", ("gcc", "clang"), "clang -m64"),
        ("none-such -O1", ("gcc",), "gcc"),
    ],
)
def test_the_first_compiler_on_the_path_is_taken(
    asked: str,
    there: tuple[str, ...],
    taken: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", tools(tmp_path / "bin", *there))
    monkeypatch.setenv("CC", asked)
    assert build.compiler() == taken
    assert ("CC=none-such -O1 is not on PATH: gcc is taken" in capsys.readouterr().err) == (asked == "none-such -O1")


def test_without_a_compiler_one_line_says_what_to_install(tmp_path: Path) -> None:
    env = {**os.environ, "PATH": tools(tmp_path / "bin"), "CC": ""}
    command = [sys.executable, str(ROOT / "csrc" / "build.py"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode, done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("hfreduce needs a C compiler, and none of cc, gcc, clang is on PATH: install one (Debian"), line
    assert not list(tmp_path.rglob("*.o"))


def test_programs_link_with_lnccl(tmp_path: Path) -> None:
    """The linker finds libnccl.so, and the program asks for libnccl.so.2 when it runs."""
    lib = library_directory()
    source, program = tmp_path / "version.c", tmp_path / "version"
    source.write_text(
        "int ncclGetVersion(int *version);\n#include <stdio.h>\n"
        'int main(void) { int v = 0; if (ncclGetVersion(&v)) return 1; printf("%d\\n", v); return 0; }\n'
    )
    link = [*compiler(), str(source), "-o", str(program), f"-L{lib}", "-lnccl", f"-Wl,-rpath,{tmp_path}"]
    done = subprocess.run(link, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    for name in ("libnccl.so.2", "libhfreduce.so"):  # and not libnccl.so
        (tmp_path / name).symlink_to(lib / name)
    assert int(subprocess.run([program], capture_output=True, text=True, check=True).stdout) >= 22000
