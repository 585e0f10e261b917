"""The verbs transport with no RDMA: the C suite, faults of devices and hostile peers, over a fake libibverbs (tests/c/fake).

Every run proves that messages went through the fake, and the fake that no process left a queue pair, a completion queue, a
memory region or a channel behind.
"""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest
from programs import (
    BUILD,
    BUILD_LIMIT,
    PATIENCE,
    SANITIZER_ENV,
    SOURCES,
    building,
    built,
    compiler,
    environment,
    need_compiler,
    need_sanitizer,
    run_to_end,
    shorten,
)

#: Seconds that a program may run. Building comes on top.
RUN_LIMIT = 120
pytestmark = pytest.mark.limit(RUN_LIMIT + BUILD_LIMIT)
SHARED = True  # the fake, which is linked anew

#: Variant, program, arguments. Ranks are processes that have no threads when they fork.
CONFORMANCE = [
    ("plain", "test_verbs", "--quick"),
    ("plain", "test_collectives", "--quick 1,1 1,1,1 2,2 3,1,2 1,1,1,1,1 0.1.0.2.1 2,2,2,2"),
    ("plain", "test_dtypes", "2,1"),
    ("plain", "test_p2p", "--quick"),
    ("plain", "test_async", ""),
    ("address", "test_verbs", "--quick"),
    ("address", "test_collectives", "--quick 1,1 2,1,2"),
    ("address", "test_p2p", "--quick"),
    ("thread", "test_p2p", "--quick"),
]


@pytest.fixture(scope="session")
def libibverbs() -> Path:
    """Build the fake and return the directory in which it lies as libibverbs.so.1."""
    need_compiler()
    sources = sorted((SOURCES / "fake").glob("*.c"))
    flags = "-std=gnu11 -O2 -g -fPIC -D_GNU_SOURCE -Wall -Wextra -Werror -shared -Wl,-soname,libibverbs.so.1".split()
    with building("fake") as out:
        command = [*compiler(), *flags, f"-Wl,--version-script={SOURCES / 'fake' / 'verbs.map'}"]
        command += ["-I", str(SOURCES.parents[1] / "csrc"), "-o", str(out / "libibverbs.so.1"), *map(str, sources), "-lpthread"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert not done.returncode, done.stderr
    return BUILD / "fake"


@pytest.fixture
def devices(tmp_path: Path) -> Path:
    """A directory as /sys/class/infiniband, with the devices fake0 and fake1."""
    root = tmp_path / "infiniband"
    for device in ("fake0", "fake1"):
        port = root / device / "ports" / "1"
        (port / "gid_attrs" / "types").mkdir(parents=True)
        (root / device / "device").mkdir()
        (root / device / "device" / "numa_node").write_text("-1\n")
        (port / "state").write_text("4: ACTIVE\n")
        (port / "rate").write_text("100 Gb/sec (4X EDR)\n")
        for index, kind in enumerate(("IB/RoCE v1", "RoCE v2")):
            (port / "gid_attrs" / "types" / str(index)).write_text(f"{kind}\n")
    return root


def delivered(devices: Path) -> int:
    """How many messages the fake has carried: the second word of what its processes share."""
    magic, writes = struct.unpack("<QQ", (devices / ".fabric").open("rb").read(16))
    assert magic == 0x31656B6166736276
    return int(writes)


def run(variant: str, program: str, arguments: str, libibverbs: Path, devices: Path, least: int = 100, **more: str) -> str:
    """Build the program, run it over the fake, and return its output; fail unless it ended well and used RDMA."""
    if variant != "plain":
        need_sanitizer(variant, devices.parent)
    target = built(program, variant)
    env = environment(**SANITIZER_ENV[variant], HFREDUCE_TEST_SYSFS=str(devices), LD_LIBRARY_PATH=str(libibverbs), **more)
    code, text = run_to_end([str(target), *arguments.split()], devices.parent, RUN_LIMIT, env)
    if "process_vm_writev is not permitted here" in text:
        pytest.skip("process_vm_writev, which the fake writes with, is not permitted here")
    how = f"still ran at its limit of {RUN_LIMIT} s (times {PATIENCE:g})" if code is None else f"ended with {code}"
    assert code == 0, f"{program} ({variant}) {how}\n{shorten(text)}"
    assert delivered(devices) >= least, f"{program} did not use the fake\n{shorten(text)}"
    return text


@pytest.mark.parametrize(("variant", "program", "arguments"), CONFORMANCE, ids=[f"{v}-{p}" for v, p, _ in CONFORMANCE])
def test_conformance(variant: str, program: str, arguments: str, libibverbs: Path, devices: Path) -> None:
    run(variant, program, arguments, libibverbs, devices, HFREDUCE_TRANSPORT="verbs")


@pytest.mark.parametrize("variant", ["plain", "thread"])
def test_registration_cache(variant: str, libibverbs: Path, devices: Path) -> None:
    run(variant, "test_verbs_memory", "", libibverbs, devices, least=0)


@pytest.mark.parametrize(("variant", "arguments"), [("plain", ""), ("address", "--quick")], ids=["plain", "address"])
def test_faults(variant: str, arguments: str, libibverbs: Path, devices: Path) -> None:
    run(variant, "verbs_faults", arguments, libibverbs, devices)


def test_hostile_peers(libibverbs: Path, devices: Path) -> None:
    run("address", "test_verbs_peer", "", libibverbs, devices, least=15)
