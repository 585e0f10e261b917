"""Small messages of device memory through GDRCopy, on stand-ins for its library and CUDA's driver: test doubles, no GPU.

The doubles are strict where hardware only may be: what CPUs write into a mapping reaches device memory with a wait that flushes, and never
without one; a mapping does not reach memory that was allocated after it was made.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from programs import BUILD_LIMIT
from stand_ins import RUN_LIMIT, check_program, cuda_stand_in, described, gdr_stand_in

pytestmark = pytest.mark.limit(RUN_LIMIT + BUILD_LIMIT)
LARGE = {"HFREDUCE_GDR_MAX": "1M"}  # as much as one segment holds
JITTER = {"FAKE_CUDA": "delay=200 seed=5"}

#: Name, variant, program, arguments, environment, what must go through mappings ("r", "rw" or nothing).
CONFORMANCE: list[tuple[str, str, str, str, dict[str, str], str]] = [
    ("freed", "plain", "test_gdrcopy", "freed", {"FAKE_CUDA": "reuse=1"}, "rw"),
    ("many", "plain", "test_gdrcopy", "many", {}, "rw"),
    ("pending", "plain", "test_gdrcopy", "pending", {}, "rw"),
    ("pending-jitter", "plain", "test_gdrcopy", "pending", JITTER, "rw"),
    ("broken-off", "plain", "test_gdrcopy", "broken_off", {}, "rw"),
    ("collectives", "plain", "test_cuda", "--quick collectives 1 2 3 1,1 2,2 t2", LARGE, "rw"),
    ("types", "plain", "test_cuda", "types 2 1,1", LARGE, "rw"),
    ("messages", "plain", "test_cuda", "--quick messages 2 3,1", LARGE, "w"),
    ("mixed", "plain", "test_cuda", "--quick mixed 2 1,1", {}, "rw"),
    ("uneven", "plain", "test_cuda", "--quick uneven 2", LARGE, ""),
    ("graphs", "plain", "test_cuda_graph", "--quick replay 2", LARGE, ""),
    ("no-flush", "plain", "test_cuda", "--quick collectives 2 1,1", {"FAKE_CUDA": "flush=0"}, "r"),
    ("host-functions", "plain", "test_cuda", "--quick collectives 2", {"FAKE_CUDA": "memops=0", "HFREDUCE_DEBUG": "NONE"}, "r"),
    ("pins-run-out", "plain", "test_gdrcopy", "many", {"FAKE_GDR": "count nopin=20"}, "rw"),
    ("chunks", "plain", "test_cuda_chunks", "remapped 2 1,1", {}, ""),
    ("two-streams", "plain", "test_cuda_queues", "held", {}, "rw"),
    ("no-module", "plain", "test_cuda", "--quick collectives 2", {"FAKE_GDR": "count absent"}, ""),
    ("switched-off", "plain", "test_cuda", "--quick collectives 2", {"HFREDUCE_GDR_MAX": "0"}, ""),
    ("address", "address", "test_gdrcopy", "", {"FAKE_CUDA": "reuse=1"}, "rw"),
    ("address-collectives", "address", "test_cuda", "--quick collectives 2 1,1", LARGE, "rw"),
    ("thread", "thread", "test_gdrcopy", "pending t2 2", {}, "rw"),
    ("thread-collectives", "thread", "test_cuda", "--quick collectives t2", LARGE, "rw"),
]


@pytest.mark.parametrize(
    ("variant", "program", "arguments", "more", "ways"), [c[1:] for c in CONFORMANCE], ids=[c[0] for c in CONFORMANCE]
)
def test_conformance(variant: str, program: str, arguments: str, more: dict[str, str], ways: str, tmp_path: Path) -> None:
    text = check_program(gdr_stand_in, variant, program, arguments, tmp_path, **{"FAKE_GDR": "count", **more})
    told = [tuple(map(int, counts)) for counts in re.findall(r"(\d+) mappings, (\d+) alive, (\d+) reads, (\d+) writes", text)]
    reads, writes, alive = (sum(t[2] for t in told), sum(t[3] for t in told), max((t[1] for t in told), default=0))
    assert (reads > 0, writes > 0) == ("r" in ways, "w" in ways), f"{reads} reads and {writes} writes went through mappings"
    assert alive <= 64, "mappings are not given up"


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, "device cuda GDRCopy: version 2.5, for messages of at most 8192 bytes"),
        ({"FAKE_GDR": "absent"}, "device cuda GDRCopy: not used: gdr_open failed: is the kernel module gdrdrv loaded"),
        ({"HFREDUCE_GDR_MAX": "0"}, "device cuda GDRCopy: not used: switched off by HFREDUCE_GDR_MAX=0"),
    ],
)
def test_what_info_tells(more: dict[str, str], expected: str) -> None:
    text = described(LD_LIBRARY_PATH=gdr_stand_in(), **more)
    assert expected in text, text


def test_without_the_library() -> None:
    text = described(LD_LIBRARY_PATH=cuda_stand_in())
    assert "device cuda GDRCopy: not used: not installed" in text, text
