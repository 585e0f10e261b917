"""all_reduce over pairs of GPUs that NVLink joins, on stand-ins for CUDA's driver and its compiler (tests/c/fake): test doubles, no GPU.

The kernels are the library's own (csrc/device/cuda_reduce.cu), compiled for the host; devices, links and memory of other processes are played.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from programs import BUILD_LIMIT, ROOT, environment, shorten
from stand_ins import RUN_LIMIT, check_program, described, pairs_stand_in, run_program

from hfreduce._ffi import BINARY_DIRECTORY

pytestmark = pytest.mark.limit(RUN_LIMIT + BUILD_LIMIT)
LINKED = "devices=4 nvlink=2"
JITTER = {"FAKE_CUDA": f"{LINKED} delay=200 seed=5"}
SMALL_RING = {"HFREDUCE_CUDA_SEGMENT": "128K", "HFREDUCE_CUDA_SEGMENTS": "2"}

#: Name, variant, program, arguments, environment.
RUNS: list[tuple[str, str, str, str, dict[str, str]]] = [
    ("plain", "plain", "test_cuda_pairs", "", {}),
    ("jitter", "plain", "test_cuda_pairs", "--quick", JITTER),
    ("jitter-small-ring", "plain", "test_cuda_pairs", "--quick crowd", {**JITTER, **SMALL_RING}),
    ("small-ring", "plain", "test_cuda_pairs", "bits 2 4 2,2", SMALL_RING),
    (
        "one-queue",
        "plain",
        "test_cuda_pairs",
        "--quick crowd 2 4",
        {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "HFREDUCE_DEBUG": "NONE"},
    ),
    ("two-ranks-a-device", "plain", "test_cuda_pairs", "--quick bits 4", {"FAKE_CUDA": "devices=2 nvlink=2"}),
    ("in-any-order", "plain", "test_cuda_pairs", "any_order", {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "HFREDUCE_DEBUG": "NONE"}),
    (
        "short-queues",
        "plain",
        "test_cuda_pairs",
        "long_queue 2 4 t2 t4",
        {"FAKE_CUDA": f"{LINKED} depth=24", "HFREDUCE_CUDA_SEGMENT": "128K"},
    ),
    (
        "short-queues-one-caller",
        "plain",
        "test_cuda_pairs",
        "one_caller t2",
        {"FAKE_CUDA": f"{LINKED} depth=24", "HFREDUCE_CUDA_SEGMENT": "128K"},
    ),
    (
        "short-queues-one-caller-of-four",
        "plain",
        "test_cuda_pairs",
        "one_caller t4",
        {"FAKE_CUDA": f"{LINKED} depth=24", "HFREDUCE_CUDA_SEGMENT": "128K"},
    ),
    (
        "short-queues-no-link",
        "plain",
        "test_cuda_pairs",
        "long_queue 2 4",
        {"FAKE_CUDA": "devices=4 depth=24", "HFREDUCE_CUDA_SEGMENT": "128K"},
    ),
    ("launches-block", "plain", "test_cuda_pairs", "long_queue 2 4", {"CUDA_LAUNCH_BLOCKING": "1"}),
    ("reset-same-addresses", "plain", "test_cuda_pairs", "reset", {"FAKE_CUDA": f"{LINKED} reuse=1"}),
    (
        "unprepared",
        "plain",
        "test_cuda_pairs",
        "unprepared 4",
        {"FAKE_CUDA": f"{LINKED} fail=cuMemHostRegister:5:2 fail=cuMemHostRegister:7:2"},
    ),
    ("all-joined", "plain", "test_cuda_pairs", "--quick crowd 4", {"FAKE_CUDA": "devices=4 nvlink=4"}),
    ("collectives", "plain", "test_cuda", "--quick collectives 2 4 2,2 t4", {}),
    ("types", "plain", "test_cuda", "types 2 4 2,2", {}),
    ("streams", "plain", "test_cuda", "--quick streams 2 4 t2", {}),
    ("messages", "plain", "test_cuda", "--quick messages 4", {}),
    ("faults", "plain", "test_cuda_faults", "--quick mismatch 2 4 2,2", {}),
    ("deadline", "plain", "test_cuda_faults", "--quick deadline 2 4 2,2", {}),
    ("aborted", "plain", "test_cuda_faults", "--quick aborted 2 4 2,2 t2", {}),
    ("destroyed", "plain", "test_cuda_faults", "--quick destroyed 2 4", {"HFREDUCE_DEBUG": "NONE"}),
    ("odd", "plain", "test_cuda_pairs", "none 3 2,1", {}),
    ("one-device", "plain", "test_cuda_pairs", "none 2", {"FAKE_CUDA": "devices=1"}),
    ("no-link", "plain", "test_cuda_pairs", "none 2", {"FAKE_CUDA": "devices=4"}),
    ("switched-off", "plain", "test_cuda_pairs", "none 2", {"HFREDUCE_NVLINK": "0"}),
    ("off-by-preset", "plain", "test_cuda_pairs", "none 2", {"HFREDUCE_NVLINK": ""}),
    ("too-small", "plain", "test_cuda_pairs", "none 2", {"HFREDUCE_NVLINK_MIN": "1M"}),
    ("no-memory-operations", "plain", "test_cuda_pairs", "none 2", {"HFREDUCE_CUDA_MEMOPS": "0", "HFREDUCE_DEBUG": "NONE"}),
    ("address", "address", "test_cuda_pairs", "--quick bits 2 4 t4", {}),
    ("address-crowd", "address", "test_cuda_pairs", "--quick crowd 4", {}),
    ("address-family", "address", "test_cuda_pairs", "--quick family", {}),
    ("address-apart", "address", "test_cuda_pairs", "--quick apart 2", {}),
    ("address-aborted", "address", "test_cuda_faults", "--quick aborted 4", {}),
    ("thread", "thread", "test_cuda_pairs", "--quick bits 2 t4", JITTER),
    ("thread-crowd", "thread", "test_cuda_pairs", "--quick crowd 2", {}),
    ("thread-aborted", "thread", "test_cuda_faults", "--quick aborted 2 t2", {}),
]
#: Calls of the driver that fail: when pairs are made, and in the middle of a launch.
WHEN_MADE = [
    "cuIpcGetMemHandle:1:1",
    "cuIpcOpenMemHandle:1:1",
    "cuModuleLoadData:1:2",
    "cuModuleGetFunction:9:1",
    "cuMemAlloc:1:2",
]
IN_A_LAUNCH = [
    "cuLaunchKernel:3:719",
    "cuMemcpyAsync:9:700",
    "cuStreamWaitValue32:9:719",
    "cuStreamWriteValue32:12:719",
    "cuEventRecord:12:700",
]


#: Pairs are off by preset; here small calls go over them, too.
PRESET = {"FAKE_CUDA": LINKED, "HFREDUCE_NVLINK": "1", "HFREDUCE_NVLINK_MIN": "4K"}


def run(program: str, arguments: str, folder: Path, **more: str) -> tuple[int | None, str]:
    """Run the program on the stand-ins; its exit status (None: it did not end) and output."""
    return run_program(pairs_stand_in, "plain", program, arguments, folder, **{**PRESET, **more})


@pytest.mark.parametrize(("variant", "program", "arguments", "more"), [c[1:] for c in RUNS], ids=[c[0] for c in RUNS])
def test_conformance(variant: str, program: str, arguments: str, more: dict[str, str], tmp_path: Path) -> None:
    check_program(pairs_stand_in, variant, program, arguments, tmp_path, **{**PRESET, **more})


@pytest.mark.parametrize("failure", WHEN_MADE)
def test_pairs_that_cannot_be_made_are_done_without(failure: str, tmp_path: Path) -> None:
    code, text = run("test_cuda_pairs", "none 2 4", tmp_path, FAKE_CUDA=f"{LINKED} fail={failure}")
    assert code == 0, shorten(text)
    assert f"GPUs will not reduce over NVLink: {failure.split(':')[0]} failed" in text, shorten(text)


@pytest.mark.parametrize("failure", IN_A_LAUNCH)
def test_a_failing_driver(failure: str, tmp_path: Path) -> None:
    code, text = run("test_cuda_faults", "failing 2 4", tmp_path, FAKE_CUDA=f"{LINKED} fail={failure}")
    assert code == 0, shorten(text)


def test_a_killed_rank_ends_the_waits_of_the_others(tmp_path: Path) -> None:
    code, text = run("test_cuda_faults", "killed 2 4", tmp_path)
    assert code == 1, shorten(text)
    assert text.count("killed, 2: 1 ranks failed") == 1, shorten(text)
    assert text.count("killed, 4: 1 ranks failed") == 1, shorten(text)


def test_a_late_partner_is_named(tmp_path: Path) -> None:
    _, text = run("test_cuda_faults", "deadline 2", tmp_path, HFREDUCE_DEBUG="INFO")
    assert "all_reduce over NVLink pairs" in text, shorten(text)
    assert "rank 0 reduces with rank 1 over NVLink, from 4096 bytes on" in text, shorten(text)


@pytest.mark.parametrize("devices", [2, 4])
def test_one_process_for_all_devices(devices: int) -> None:
    """NCCL's interface, as a program uses it that has all GPUs: ncclCommInitAll, and one thread that calls for all in groups."""
    env = environment(
        LD_LIBRARY_PATH=pairs_stand_in(),
        FAKE_CUDA=f"devices={devices} nvlink=2 delay=100",
        HFREDUCE_NVLINK="1",
        HFREDUCE_DEBUG="INFO",
    )
    command = [
        sys.executable,
        str(ROOT / "tests" / "nccl" / "one_process.py"),
        str(Path(BINARY_DIRECTORY) / "lib" / "libnccl.so.2"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=RUN_LIMIT)
    assert done.returncode == 0, done.stdout + shorten(done.stderr)
    assert f"{devices} devices: right" in done.stdout
    assert (done.stdout + done.stderr).count("over NVLink, from 262144 bytes on") == devices


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, "device cuda 3 NVLink: joined with 2; pairs reduce with kernels that NVRTC 12.0 compiles"),
        ({"FAKE_CUDA": "devices=4 nvlink=4"}, "device cuda 1 NVLink: joined with 0 2 3; pairs"),
        ({"FAKE_CUDA": "devices=3 nvlink=2"}, "device cuda 2 NVLink: not used: NVLink joins it with no other device"),
        (
            {"HFREDUCE_NVLINK": None},
            "device cuda 0 NVLink: not used: off until hardware has run pairs: HFREDUCE_NVLINK=1 switches",
        ),
        ({"HFREDUCE_CUDA_MEMOPS": "0"}, "device cuda 0 NVLink: not used: no stream memory operations"),
    ],
)
def test_what_info_tells(more: dict[str, str | None], expected: str) -> None:
    env = {"FAKE_CUDA": LINKED, "HFREDUCE_NVLINK": "1", **more}
    text = described(LD_LIBRARY_PATH=pairs_stand_in(), **{name: value for name, value in env.items() if value is not None})
    assert expected in text, text


@pytest.mark.parametrize(
    ("wheel", "expected"),
    [
        ("nvidia/cuda_nvrtc/lib/libnvrtc.so.12", "pairs reduce with kernels that NVRTC 12.0 compiles"),
        # its code is for a newer driver than the stand-in, which says that it is of CUDA 12.4
        ("nvidia/cu13/lib/libnvrtc.so.13", "not used: no libnvrtc.so.12 on the loader's path or among the wheels"),
    ],
)
def test_the_compiler_of_a_wheel(tmp_path: Path, wheel: str, expected: str) -> None:
    """pip puts NVRTC beside the package, where the loader does not look."""
    driver, compiler = pairs_stand_in().split(":")
    shutil.copytree(BINARY_DIRECTORY, tmp_path / "hfreduce", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / wheel).parent.mkdir(parents=True)
    shutil.copy(Path(compiler) / "libnvrtc.so.12", tmp_path / wheel)
    env = environment(FAKE_CUDA=LINKED, HFREDUCE_NVLINK="1", LD_LIBRARY_PATH=driver, PYTHONPATH=str(tmp_path))
    script = "from hfreduce.params import describe; import hfreduce; print(hfreduce.__file__, *describe(), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, env=env, timeout=60)
    assert str(tmp_path) in done.stdout, done.stdout + done.stderr  # it is the copy that looks around
    assert expected in done.stdout, done.stdout
