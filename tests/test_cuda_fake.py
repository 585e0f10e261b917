"""Calls on device memory and in the order of streams, on a stand-in for CUDA's driver (tests/c/fake/cuda): a test double, no GPU.

The same programs run on a real driver by themselves (tests/test_c.py), where there is one. Beside conformance: slow and jittery copies,
a driver without stream memory operations, one hardware queue for all streams, a driver that fails, and ranks that are killed.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from programs import BUILD_LIMIT, ROOT, SOURCES, built, compiler, environment, need_compiler, shorten
from stand_ins import RUN_LIMIT, check_program, cuda_stand_in, described, run_program

pytestmark = pytest.mark.limit(RUN_LIMIT + BUILD_LIMIT)
JITTER = {"FAKE_CUDA": "delay=200 seed=7"}
HOST_FUNCTIONS = {"FAKE_CUDA": "memops=0", "HFREDUCE_DEBUG": "NONE"}
ONE_QUEUE = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "HFREDUCE_DEBUG": "NONE"}
BLOCKS = {"FAKE_CUDA": "block=1 devices=1"}
SMALL_RING = {"HFREDUCE_CUDA_SEGMENT": "128K", "HFREDUCE_CUDA_SEGMENTS": "2"}

#: Name, variant, program, arguments, environment.
CONFORMANCE: list[tuple[str, str, str, str, dict[str, str]]] = [
    ("plain", "plain", "test_cuda", "", {}),
    ("graphs", "plain", "test_cuda_graph", "", {}),
    ("unretained", "plain", "test_cuda_graph", "unretained 2", {"FAKE_CUDA": "fail=cuGraphRetainUserObject:0:2"}),
    ("faults", "plain", "test_cuda_faults", "", {}),
    ("lending", "plain", "test_cuda_lend", "", {}),
    ("jitter", "plain", "test_cuda", "--quick collectives 1 2 3 1,1 2,2 t4", JITTER),
    ("jitter-messages", "plain", "test_cuda", "--quick messages 2 3,1 t4", JITTER),
    ("jitter-one-by-one", "plain", "test_cuda", "--quick one_by_one", JITTER),
    ("address-one-by-one", "address", "test_cuda", "--quick one_by_one", JITTER),
    ("jitter-backlog", "plain", "test_cuda", "backlog", {**JITTER, **SMALL_RING}),
    ("jitter-streams", "plain", "test_cuda", "--quick streams", JITTER),
    ("jitter-graphs", "plain", "test_cuda_graph", "--quick", JITTER),
    ("jitter-lending", "plain", "test_cuda_lend", "--quick", JITTER),
    ("unpinned", "plain", "test_cuda_lend", "unpinned 2 3", {"FAKE_CUDA": "fail=cuMemHostRegister:1:2"}),
    ("small-ring", "plain", "test_cuda", "collectives 1 2 1,1 3,1", SMALL_RING),
    ("small-ring-messages", "plain", "test_cuda", "messages 2 3,1", SMALL_RING),
    ("small-ring-graphs", "plain", "test_cuda_graph", "--quick replay", SMALL_RING),
    ("host-functions", "plain", "test_cuda", "--quick collectives 1 2 3 1,1 2,2", HOST_FUNCTIONS),
    ("host-functions-messages", "plain", "test_cuda", "--quick messages 1 2 3,1", HOST_FUNCTIONS),
    ("host-functions-streams", "plain", "test_cuda", "--quick streams 2 3,1", HOST_FUNCTIONS),
    ("host-functions-several", "plain", "test_cuda", "--quick several", {**HOST_FUNCTIONS, **SMALL_RING}),
    ("host-functions-one-caller", "plain", "test_cuda", "--quick one_caller", {**HOST_FUNCTIONS, **SMALL_RING}),
    (
        "host-functions-jitter",
        "plain",
        "test_cuda",
        "--quick several",
        {**HOST_FUNCTIONS, "FAKE_CUDA": "memops=0 delay=200 seed=3"},
    ),
    ("host-functions-address", "address", "test_cuda", "--quick several", HOST_FUNCTIONS),
    ("host-functions-thread", "thread", "test_cuda", "--quick several", HOST_FUNCTIONS),
    ("host-functions-graphs", "plain", "test_cuda_graph", "--quick replay 2 1,1", HOST_FUNCTIONS),
    ("host-functions-lending", "plain", "test_cuda_lend", "--quick lent 2 3 2,2", HOST_FUNCTIONS),
    ("host-functions-late", "plain", "test_cuda_lend", "--quick late 2 3 2,2", HOST_FUNCTIONS),
    ("host-functions-abort", "plain", "test_cuda_faults", "--quick aborted 2 1,1", HOST_FUNCTIONS),
    ("one-queue", "plain", "test_cuda", "--quick collectives 1 2 3 1,1 2,2", ONE_QUEUE),
    ("one-queue-messages", "plain", "test_cuda", "--quick messages 1 2 3,1", ONE_QUEUE),
    ("one-queue-streams", "plain", "test_cuda", "--quick streams 2 3,1", ONE_QUEUE),
    ("one-queue-lending", "plain", "test_cuda_lend", "--quick late 2 3", ONE_QUEUE),
    ("one-queue-graphs", "plain", "test_cuda_graph", "--quick replay 2 1,1", ONE_QUEUE),
    ("chunks", "plain", "test_cuda_chunks", "", {}),
    ("chunks-address", "address", "test_cuda_chunks", "--quick", {}),
    ("blocked", "plain", "test_cuda_blocked", "", BLOCKS),
    ("blocked-jitter", "plain", "test_cuda_blocked", "", {"FAKE_CUDA": "block=1 devices=1 delay=200 seed=9"}),
    ("blocked-address", "address", "test_cuda_blocked", "", BLOCKS),
    ("blocked-thread", "thread", "test_cuda_blocked", "late t2", BLOCKS),
    ("slow-naps", "plain", "test_cuda", "naps", {"FAKE_CUDA": "delay=2000 seed=3"}),
    ("few-queues", "plain", "test_cuda_queues", "many", {"FAKE_CUDA": "queues=1"}),
    ("few-queues-conformance", "plain", "test_cuda", "--quick collectives 2 1,1", {"FAKE_CUDA": "queues=1"}),
    ("one-queue-alone", "plain", "test_cuda_queues", "one", ONE_QUEUE),
    ("one-device", "plain", "test_cuda", "--quick collectives 2 3 1,1 t2 t4", {"FAKE_CUDA": "devices=1"}),
    ("one-device-threads", "plain", "test_cuda", "--quick streams 2 t2", {"FAKE_CUDA": "devices=1"}),
    ("stale-streams-crash", "plain", "test_cuda_faults", "--quick pointers", {"FAKE_CUDA": "stale=crash"}),
    ("one-device-faults", "plain", "test_cuda_faults", "--quick pointers", {"FAKE_CUDA": "devices=1"}),
    ("address", "address", "test_cuda", "--quick collectives 2 1,1", {}),
    ("address-messages", "address", "test_cuda", "--quick messages 2 3,1", {}),
    ("address-uneven", "address", "test_cuda", "--quick uneven 3,1", {}),
    ("address-mixed", "address", "test_cuda", "--quick mixed 2 1,1", {}),
    ("address-kinds", "address", "test_cuda", "--quick kinds 2", {}),
    ("address-graphs", "address", "test_cuda_graph", "--quick", {}),
    ("address-lending", "address", "test_cuda_lend", "--quick", {}),
    ("address-faults", "address", "test_cuda_faults", "--quick", {}),
    ("thread", "thread", "test_cuda", "--quick collectives 1 2 3,1 t2", {}),
    ("thread-messages", "thread", "test_cuda", "--quick messages 2 t4", {}),
    ("thread-one-by-one", "thread", "test_cuda", "--quick one_by_one 2", JITTER),
    ("thread-streams", "thread", "test_cuda", "--quick streams 2", {}),
    ("thread-types", "thread", "test_cuda", "--quick late_factor 2", {}),
    ("thread-lending", "thread", "test_cuda_lend", "--quick late 2 t3", {}),
    ("thread-lent-by-turns", "thread", "test_cuda_lend", "--quick by_turns 2 t2", {}),
    ("thread-graphs", "thread", "test_cuda_graph", "--quick threads", {}),
    ("thread-teardown", "thread", "test_cuda_graph", "--quick teardown 2", {}),
    ("thread-broken", "thread", "test_cuda_graph", "--quick broken 2", {}),
    ("thread-deadline", "thread", "test_cuda_faults", "--quick deadline 2", {}),
    ("thread-aborted", "thread", "test_cuda_faults", "--quick aborted 2 t2", {}),
]
#: Calls of the driver that fail in the middle of something: name, which one, CUresult.
FAILURES = [
    "cuStreamCreateWithPriority:3:2 fail=cuStreamCreateWithPriority:6:2",  # when the communicator is made, and at its first call
    "cuMemHostRegister:0:2",
    "cuEventRecord:3:700",
    "cuStreamWaitEvent:4:1",
    "cuMemcpyAsync:3:700",
    "cuMemcpyAsync:30:700",
    "cuStreamWriteValue32:7:719",
    "cuStreamWaitValue32:9:719",
]


@pytest.mark.parametrize(
    ("variant", "program", "arguments", "more"), [c[1:] for c in CONFORMANCE], ids=[c[0] for c in CONFORMANCE]
)
def test_conformance(variant: str, program: str, arguments: str, more: dict[str, str], tmp_path: Path) -> None:
    check_program(cuda_stand_in, variant, program, arguments, tmp_path, **more)


@pytest.mark.parametrize("variant", ["plain", "address"])
def test_a_killed_rank_ends_the_waits_of_the_others(variant: str, tmp_path: Path) -> None:
    code, text = run_program(cuda_stand_in, variant, "test_cuda_faults", "killed 3 1,1", tmp_path)
    assert code == 1, shorten(text)
    assert "nodes 3: rank 2 ended with signal 9" in text
    assert "nodes 1,1: rank 1 ended with signal 9" in text
    assert text.count("killed, 3: 1 ranks failed") == 1, shorten(text)
    assert text.count("killed, 1,1: 1 ranks failed") == 1, shorten(text)


def test_as_many_waits_as_queues_are_warned_of(tmp_path: Path) -> None:
    few = {"CUDA_DEVICE_MAX_CONNECTIONS": "4", "HFREDUCE_DEBUG": "WARN"}
    text = check_program(cuda_stand_in, "plain", "test_cuda_queues", "many", tmp_path, **few)
    assert text.count("the device has 4 hardware queues") == 2, shorten(text)  # once a process
    assert "CUDA_DEVICE_MAX_CONNECTIONS=32" in text


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failing_driver(failure: str, tmp_path: Path) -> None:
    code, text = run_program(cuda_stand_in, "plain", "test_cuda_faults", "failing 2 1,1", tmp_path, FAKE_CUDA=f"fail={failure}")
    assert code == 0, shorten(text)


@pytest.mark.parametrize(
    ("result", "advice"), [(2, "or raise ulimit -l"), (800, "as it does in confidential mode"), (801, "confidential mode")]
)
def test_memory_that_cannot_be_pinned(result: int, advice: str, tmp_path: Path) -> None:
    fault = f"fail=cuMemHostRegister:0:{result}"
    code, text = run_program(cuda_stand_in, "plain", "test_cuda_faults", "elsewhere 1", tmp_path, FAKE_CUDA=fault)
    assert code == 1 and "cannot pin" in text, shorten(text)
    assert advice in text and ("ulimit" in text) == (result == 2), shorten(text)


def test_host_calls_make_no_context(tmp_path: Path) -> None:
    """Ranks on host memory work beside a driver that nobody initialised, and one that does not initialise at all."""
    target = built("test_collectives")
    env = environment(LD_LIBRARY_PATH=cuda_stand_in(), FAKE_CUDA="fail=cuInit:0:100 fail=cuDevicePrimaryCtxRetain:0:100")
    done = subprocess.run([str(target), "--quick", "2", "1,1"], capture_output=True, text=True, env=env, timeout=RUN_LIMIT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_declarations_against_nvidias_header(tmp_path: Path) -> None:
    need_compiler()
    found = next((ROOT / "build" / "cuda").glob("nvidia/*/include/cuda.h"), None)
    if not found:
        pytest.skip("no cuda.h: unpack the package nvidia-cuda-runtime-cu12 in build/cuda, as .ci/run does")
    command = [
        *compiler(),
        "-std=gnu11",
        "-Werror",
        "-I",
        str(ROOT / "csrc"),
        "-I",
        str(found.parent),
    ]
    done = subprocess.run(
        [*command, str(SOURCES / "test_cuda_abi.c"), "-o", str(tmp_path / "abi")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "our declarations agree" in subprocess.run([str(tmp_path / "abi")], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (
            {},
            [
                "device cuda: driver 12.4, 2 devices",
                "device cuda 1: stand-in 1 (test double), no GPU, PCI fffe:11:00.0",
                "operations yes",
                "device memory on one node: comes out in up to 4 segments of 2097152 bytes a rank, in the arena",
            ],
        ),
        ({"FAKE_CUDA": "memops=0"}, ["driver 11.4", "stream memory operations no: host functions instead"]),
        ({"HFREDUCE_CUDA_MEMOPS": "0"}, ["stream memory operations switched off: host functions instead"]),
        ({"HFREDUCE_CUDA": "0"}, ["device cuda: none: switched off by HFREDUCE_CUDA=0"]),
        ({"FAKE_CUDA": "devices=0"}, ["device cuda: none: CUDA_ERROR_NO_DEVICE"]),
        ({"CUDA_DEVICE_MAX_CONNECTIONS": "1"}, ["device cuda warning: CUDA_DEVICE_MAX_CONNECTIONS=1"]),
    ],
)
def test_what_info_tells(more: dict[str, str], expected: list[str]) -> None:
    text = described(LD_LIBRARY_PATH=cuda_stand_in(), **more)
    for words in expected:
        assert words in text, text
