"""tests/tools/mutate: its list is not stale, and it tells what a test notices from what none does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tests" / "tools" / "mutate"

SOURCE = """def double(x):
    if x < 0:
        raise ValueError(x)
    y = x
    return y + x
"""
TESTS = """import time

import toy


def test_double():
    assert toy.double(2) == 4
"""
LIST = """# of a toy

name: minus
file: toy.py
kind: check
old: return y + x
new: return y - x
tests: test_toy.py::test_double

name: no-check
file: toy.py
kind: check
after: def double(x):
old: x < 0
new: False
tests: test_toy.py
survives: no test gives it a negative number

name: y-is-x
file: toy.py
kind: argument
old: return y
  + x
new: return x + x
tests: test_toy.py
equivalent: y is x
"""


def mutate(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *arguments], capture_output=True, text=True, timeout=100)


def test_no_entry_is_stale() -> None:
    """Each place is in the code exactly once. Where one is not, somebody has changed the code: the entry changes with it, or goes."""
    done = mutate("--check")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "toy.py").write_text(SOURCE)
    (tree / "test_toy.py").write_text(TESTS)
    (tree / ".gitignore").write_text("build/\n")
    (tmp_path / "list").write_text(LIST)
    subprocess.run(["git", "init", "-q", str(tree)], check=True)
    return tree


def run(toy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return mutate(str(toy.parent / "list"), "--root", str(toy), "--build", "", "--seconds", "30", *arguments)


def test_a_planted_fault_is_noticed(toy: Path) -> None:
    done = run(toy, "--first")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = {line.split()[1]: line for line in done.stdout.splitlines()[:3]}
    assert lines["minus"].startswith("killed") and "test_toy.py::test_double" in lines["minus"]
    assert lines["no-check"].startswith("survived")
    assert lines["y-is-x"].startswith("equivalent")
    assert "1 of 2 that matter were caught; 1 change nothing" in done.stdout
    assert (toy / "toy.py").read_text() == SOURCE, "the tree itself is never touched"
    assert (toy / "build" / "mutate" / "0" / "toy.py").read_text() == SOURCE, "the copy is restored"


def test_what_goes_otherwise_than_the_list_says(toy: Path) -> None:
    (toy / "test_toy.py").write_text("def test_double():\n    pass\n")
    done = run(toy)
    assert done.returncode == 1, done.stdout
    assert "nothing noticed" in done.stdout
    assert run(toy, "--only", "no-check").returncode == 0


def test_a_fault_that_hangs_is_noticed(toy: Path) -> None:
    (toy / "test_toy.py").write_text("import time, toy\n\ndef test_double():\n    time.sleep(0 if toy.double(2) == 4 else 600)\n")
    done = mutate(str(toy.parent / "list"), "--root", str(toy), "--build", "", "--seconds", "5", "--only", "minus")
    assert done.returncode == 0, done.stdout
    assert "time limit" in done.stdout


def test_stale_entries_are_told(toy: Path) -> None:
    (toy / "toy.py").write_text(SOURCE.replace("y + x", "2 * x"))
    done = run(toy)
    assert done.returncode == 2
    assert "stale      minus: `old` occurs 0 times" in done.stdout
    assert not os.path.exists(toy / "build")


def test_tests_that_fail_with_nothing_planted_are_told(toy: Path) -> None:
    (toy / "test_toy.py").write_text("def test_double():\n    assert False\n")
    done = run(toy, "--first")
    assert done.returncode == 2
    assert "with nothing planted: test_toy.py::test_double" in done.stdout


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("kind: check", "is of no known kind"),
        ("tests: test_toy.py::test_double", "has no tests"),
        ("name: no-check", "there are two of minus"),
        ("file: toy.py\nkind: argument", "expected one of name, file"),
    ],
)
def test_a_list_that_cannot_be_read(toy: Path, wrong: str, message: str) -> None:
    other = {"kind: check": "kind: odd", "name: no-check": "name: minus", "file: toy.py\nkind: argument": "what is this"}
    (toy.parent / "list").write_text(LIST.replace(wrong, other.get(wrong, "# nothing"), 1))
    done = run(toy)
    assert done.returncode != 0
    assert message in done.stderr
