"""The C core's floors: includes run downward only, siblings do not see each other, and nothing of CUDA or verbs shows above its floor."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parent.parent / "csrc"
FLOORS = [
    {"include"},
    {"base"},
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
