"""The C core's floors: includes and calls run downward only, siblings do not see each other, and nothing of CUDA or verbs shows above its floor."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
FLOORS = [
    {"include"},
    {"base"},
    {"call"},
    {"topo", "simd", "device"},
    {"node"},
    {"transport"},
    {"engine"},
    {"coll"},
    {"comm"},
    {"api"},
    {"nccl"},
]
FLOOR = {name: level for level, names in enumerate(FLOORS) for name in names}
SOURCES = sorted(p for p in CSRC.rglob("*") if p.suffix in {".c", ".h", ".inc", ".cu"})


def room(path: Path) -> str:
    """The directory of the core that a file belongs to; files at the top are the public calls."""
    parts = path.relative_to(CSRC).parts
    return parts[0] if len(parts) > 1 else "api"


def test_there_are_sources() -> None:
    assert len(SOURCES) > 30


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: str(p.relative_to(CSRC)))
def test_includes_run_downward(source: Path) -> None:
    for included in re.findall(r'^\s*#\s*include "([^"]+)"', source.read_text(), re.MULTILINE):
        target = next((p for p in ((source.parent / included).resolve(), (CSRC / included).resolve()) if p.exists()), None)
        assert target is not None, f"{included} does not exist"
        here, there = room(source), room(target)
        assert here == there or FLOOR[there] < FLOOR[here], f"{here} must not include {there} ({included})"


@pytest.mark.parametrize("source", [p for p in SOURCES if room(p) == "nccl"], ids=lambda p: str(p.relative_to(CSRC)))
def test_nccl_is_built_on_the_public_header_alone(source: Path) -> None:
    """libnccl.so.2 is a library of its own: it can reach nothing else of hfreduce."""
    included = re.findall(r'^\s*#\s*include "([^"]+)"', source.read_text(), re.MULTILINE)
    assert {name for name in included if "/" in name} <= {"../include/hfreduce.h"}


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: str(p.relative_to(CSRC)))
def test_hardware_stays_on_its_floor(source: Path) -> None:
    text = source.read_text()
    if room(source) != "device":
        assert not re.search(r"#\s*include\s*<(cuda|nccl)", text)
    if not (room(source) == "transport" and source.stem.startswith("verbs")):
        assert not re.search(r"#\s*include\s*<infiniband/", text)


# ---------------------------------------------------------------- calls

#: (file, symbol): uses of a symbol that a room of the same or a higher floor defines. This list may only get shorter.
UPWARD: set[tuple[str, str]] = set()
#: (file, symbol): public calls that files of the core use although another file defines them: whatever is below the public calls must not
#: go through their checks. This list may only get shorter.
PUBLIC: set[tuple[str, str]] = set()


def core_build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("core_build", CSRC / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def built_objects() -> dict[Path, Path]:
    """Source -> object, of the last build of the package; what is missing or old is compiled."""
    build = core_build()
    name = re.sub(r"\W+", "-", build.compiler())  # as setup.py names the folder
    folders = [ROOT / "build" / "core" / (name + suffix) for suffix in ("", "-werror")]
    last = max(folders, key=lambda f: (f / "libhfreduce.so").stat().st_mtime if (f / "libhfreduce.so").exists() else 0.0)
    files = build.sources() + sorted(CSRC.glob("nccl/*.c"))
    return dict(zip(files, build.compile_objects(last / "obj", files)))


def symbols(objects: list[Path]) -> dict[Path, tuple[set[str], set[str]]]:
    """What each object defines for others and what it uses of others."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is not on PATH (Debian, Ubuntu: apt-get install binutils): calls between rooms were not checked")
    out = subprocess.run(
        [nm, "-A", "-P", "-g", *map(str, objects)], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    found: dict[Path, tuple[set[str], set[str]]] = {o: (set(), set()) for o in objects}
    for line in out.splitlines():
        path, name, kind = line.split()[:3]
        found[Path(path.rstrip(":"))][kind in "Uwv"].add(name)
    return found


def calls(objects: dict[Path, Path]) -> list[tuple[Path, Path, str]]:
    """(user, definer, symbol) for every symbol that one file of the core uses and another defines."""
    table = symbols(list(objects.values()))
    definer = {name: source for source, o in objects.items() for name in table[o][0]}
    return [(s, definer[n], n) for s, o in objects.items() for n in sorted(table[o][1]) if n in definer]


def upward(edges: list[tuple[Path, Path, str]]) -> set[tuple[str, str]]:
    wrong = [
        (user, name) for user, source, name in edges if room(user) != room(source) and FLOOR[room(source)] >= FLOOR[room(user)]
    ]
    return {(user.relative_to(CSRC).as_posix(), name) for user, name in wrong}


@pytest.fixture(scope="module")
def objects() -> dict[Path, Path]:
    return built_objects()


def test_calls_run_downward(objects: dict[Path, Path]) -> None:
    edges = calls(objects)
    assert len(edges) > 500, "nm told of too few calls to have read the objects"
    assert upward(edges) == UPWARD


def test_the_core_does_not_call_the_public_calls_of_other_files(objects: dict[Path, Path]) -> None:
    inside = [(u, n) for u, _, n in calls(objects) if re.match("hfreduce[A-Z]", n) and room(u) not in {"api", "nccl"}]
    assert {(user.relative_to(CSRC).as_posix(), name) for user, name in inside} == PUBLIC


def test_libnccl_calls_nothing_but_the_public_calls(objects: dict[Path, Path]) -> None:
    assert [(u.name, n) for u, d, n in calls(objects) if room(u) == "nccl" != room(d) and not n.startswith("hfreduce")] == []


def test_a_planted_upward_call_is_noticed(objects: dict[Path, Path], tmp_path: Path) -> None:
    """A file of base/ that issues a collective, and one of simd/ that asks its sibling for the size of a cache."""
    planted = {}
    for where, call in (("base", "hfr_issue"), ("simd", "hfr_cache_bytes")):
        source, target = tmp_path / f"{where}.c", tmp_path / f"{where}.o"
        source.write_text(f"int {call}(void);\nint hfr_planted_in_{where}(void) {{ return {call}(); }}\n")
        subprocess.run([*shlex.split(core_build().compiler()), "-c", str(source), "-o", str(target)], check=True, timeout=60)
        planted[CSRC / where / "planted.c"] = target
    found = upward(calls({**objects, **planted}))
    assert found - UPWARD == {("base/planted.c", "hfr_issue"), ("simd/planted.c", "hfr_cache_bytes")}
