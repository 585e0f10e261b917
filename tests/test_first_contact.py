"""The first contact with a GPU (tests/gpu), as a dry run on the stand-in for the driver: a test double, no GPU.

Every part's harness runs; what the stand-in cannot do says so. Planted breaks are told by the part's name, and bad input by one line.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from programs import BUILD_LIMIT, ROOT, environment, need_compiler

#: Seconds that one run of the command may take here; building comes on top.
LIMIT = 200
pytestmark = pytest.mark.limit(LIMIT)
COMMAND = ROOT / "tests" / "gpu" / "first_contact.py"
INSTALLED_PARTS = ["info", "ctests", "collectives", "speed", "overlap", "pytorch", "arraylibs", "replay", "kernels", "sanitizer"]
DRIVER_PARTS = ["machine", "registered", "pointers", "blocking", "aliasing", "costs", "copies"]


def contact(out: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the command, with the stand-in, unless LD_LIBRARY_PATH names another driver."""
    need_compiler()
    command = [sys.executable, str(COMMAND), "--out", str(out), *arguments]
    werror = {"HFREDUCE_WERROR": os.environ["HFREDUCE_WERROR"]} if "HFREDUCE_WERROR" in os.environ else {}
    env = environment(**{**werror, **more})
    env.pop("FAKE_CUDA", None)
    return subprocess.run(command, capture_output=True, text=True, env=env | more, timeout=LIMIT + BUILD_LIMIT)


def results_of(out: Path) -> dict[str, dict[str, Any]]:
    """The parts of report.json, by name."""
    report = json.loads((out / "report.json").read_text())
    assert report["stand_in"] is True
    return {part["part"]: part for part in report["parts"]}


@pytest.mark.limit(LIMIT + BUILD_LIMIT)
def test_every_part(tmp_path: Path) -> None:
    """The whole dry run: the package is installed into a private place, and every part's harness runs."""
    out, work, more = tmp_path / "out", tmp_path / "work", {}
    built = max((ROOT / "build" / "core").glob("*/obj"), key=lambda p: p.stat().st_mtime, default=None)
    if built:  # what is built already need not be built again: times are kept
        shutil.copytree(built, work / "source" / built.relative_to(ROOT))
        more = {"HFREDUCE_WERROR": str(int(built.parent.name.endswith("-werror")))}
    done = contact(out, "--stand-in", "--work", str(work), "--minutes", "9", **more)
    assert done.returncode == 0, done.stdout + done.stderr + (out / "log.txt").read_text()[-8000:]
    found = results_of(out)
    assert list(found) == [*DRIVER_PARTS, "install", *INSTALLED_PARTS]
    skipped = {"arraylibs", "sanitizer"}
    assert {name for name, part in found.items() if part["result"] == "skipped"} == skipped
    assert all(part["result"] == "ok" for name, part in found.items() if name not in skipped)
    assert found["sanitizer"]["error"] == "needs a GPU: the stand-in has no device code"
    cases = {case["case"]: case for part in found.values() for case in part["cases"]}
    for name in ("a planted error is found", "a killed rank is reported", "a killed rank", "two threads", "many segments"):
        assert cases[name]["result"] in ("ok", "skipped"), cases[name]
    files = [p for p in out.rglob("*") if p.is_file()]
    assert len(files) <= 8 and all(p.stat().st_size < 16 << 20 for p in files)
    assert not list((ROOT / "tests" / "gpu").rglob("*.so"))


def test_the_driver_alone(tmp_path: Path) -> None:
    """The questions by ctypes, before anything is installed."""
    out = tmp_path / "out"
    done = contact(out, "--stand-in", "--only", *DRIVER_PARTS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name: part["result"] for name, part in results_of(out).items()} == dict.fromkeys(DRIVER_PARTS, "ok")
    assert sorted(p.name for p in out.iterdir()) == ["log.txt", "report.json", "report.md"]
    text = (out / "report.md").read_text()
    assert "STAND-IN: a test double of the driver, no GPU" in text
    assert text.count("[stand-in]") == len(DRIVER_PARTS)
    assert "needs a GPU: the stand-in has no cuMemAllocAsync" in text


@pytest.mark.parametrize(
    ("how", "result", "error"),
    [
        ("hang", "hung", "killed after 3 s in: a planted break"),
        ("crash", "crashed", "SIGSEGV in: a planted break"),
        ("wrong", "failed", "values after copies: copies there and back: byte 0 of 262144 is 0x5b, not 0x5a"),
    ],
)
def test_a_planted_break_costs_its_part_alone(how: str, result: str, error: str, tmp_path: Path) -> None:
    parts = ["machine", "copies", "costs"]
    done = contact(
        tmp_path,
        *["--stand-in", "--only", *parts],
        *(["--part-limit", "3"] if how == "hang" else []),
        FIRST_CONTACT_BREAK=f"copies:{how}",
    )
    assert done.returncode == 1, done.stdout + done.stderr
    found = results_of(tmp_path)
    assert list(found) == ["machine", "costs", "copies"]
    assert (found["copies"]["result"], found["copies"]["error"]) == (result, error)
    assert found["machine"]["result"] == found["costs"]["result"] == "ok"
    row = next(line for line in done.stdout.splitlines() if line.startswith("copies  "))
    assert result in row and error[:60] in row


# ---------------------------------------------------------------- bad input


def refused(out: Path, words: str, *arguments: str, **more: Any) -> None:
    """The command ends with status 2 and one line that says so, and leaves nothing."""
    before = out.exists()
    done = contact(out, *arguments, **more)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("first_contact: ") and words in line, line
    assert not done.stdout
    assert out.exists() == before


def test_an_unknown_part(tmp_path: Path) -> None:
    refused(tmp_path / "out", "no part is called teapot: the parts are machine, registered", "--stand-in", "--only", "teapot")


def test_no_driver(tmp_path: Path) -> None:
    if "libcuda.so.1" in subprocess.run(["ldconfig", "-p"], capture_output=True, text=True).stdout:
        pytest.skip("there is a driver here")
    refused(tmp_path / "out", "no CUDA driver: libcuda.so.1: cannot open", "--only", "machine")


def test_a_driver_without_devices(tmp_path: Path) -> None:
    refused(tmp_path / "out", "no CUDA device: CUDA_ERROR_NO_DEVICE", "--stand-in", FAKE_CUDA="devices=0")


def test_an_old_driver(tmp_path: Path) -> None:
    refused(tmp_path / "out", "the CUDA driver is 11.4, older than 11.7", "--stand-in", FAKE_CUDA="memops=0")


def test_no_compiler(tmp_path: Path) -> None:
    empty = tmp_path / "bin"
    empty.mkdir()
    refused(
        tmp_path / "out",
        "hfreduce needs a C compiler, and none of cc, gcc, clang is on PATH",
        "--stand-in",
        PATH=str(empty),
        CC="",
    )


def test_no_such_folder_of_wheels(tmp_path: Path) -> None:
    refused(tmp_path / "out", "there is no such folder", "--stand-in", "--wheels", str(tmp_path / "none"))


def test_a_missing_wheel(tmp_path: Path) -> None:
    """A Python that has pip but not what the build needs: the site packages are hidden from it, but for pip."""
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True, timeout=60)
    env = environment()
    env.pop("PYTHONPATH", None)
    command = [str(bare / "bin" / "python"), str(COMMAND), "--out", str(tmp_path / "out"), "--stand-in"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=LIMIT)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert "this Python has no setuptools, no cffi, no pycparser, no numpy of the version needed: bring the wheels" in line
    assert not (tmp_path / "out").exists()


def test_a_wheel_that_is_none(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    refused(tmp_path / "out", "there is no wheel in it", "--stand-in", "--wheels", str(wheels))
    (wheels / "cffi-2.0-cp39-cp39-win32.whl").write_text("")
    refused(tmp_path / "out", "pip does not take the wheels of", "--stand-in", "--wheels", str(wheels))


def test_a_full_disk(tmp_path: Path) -> None:
    """The report does not fit: nothing of it is left, and a report that was there stays whole."""
    if not shutil.which("mount") or os.geteuid():
        pytest.skip("needs root, for a small tmpfs")
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(small)]).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        (small / "filler").write_bytes(bytes(16384 - 8192))
        refused(small / "out", "No space left on device", "--stand-in", "--only", "machine", "costs")
        assert not list(small.rglob("*.new"))
    finally:
        subprocess.run(["umount", str(small)], check=True)


FULL = """
import resource, sys
from pathlib import Path
from report import Report
report = Report(Path(sys.argv[1]), {"stand_in": True})
report.write()
before = (report.folder / "report.json").read_text()
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
try:
    report.add({"part": "x", "result": "ok", "seconds": 1.0, "figure": "", "error": "", "cases": [], "output": "x" * 10000})
except OSError as error:
    print(error.strerror)
assert (report.folder / "report.json").read_text() == before
"""


def test_a_disk_that_fills_meanwhile(tmp_path: Path) -> None:
    """The report of the parts before stays whole."""
    env = environment(PYTHONPATH=str(COMMAND.parent))
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, env=env, timeout=60)
    assert (done.returncode, done.stdout) == (0, "File too large\n"), done.stdout + done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.txt", "report.json", "report.md"]
