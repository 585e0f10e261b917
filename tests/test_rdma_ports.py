"""hfreduce.rdma and `hfreduce info`: what is said of RDMA ports, from a made-up sysfs and pyverbs, and from the real ones where they are."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from hfreduce import rdma
from hfreduce.cli import main

MAPPED = "0000:0000:0000:0000:0000:ffff:0a4d:0001"
LOCAL = "fe80:0000:0000:0000:6c51:45ff:fece:485c"


def write(root: Path, values: dict[str, str]) -> None:
    for name, value in values.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value + "\n")


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two devices: RoCE with two ports, and InfiniBand."""
    roce = {
        "state": "4: ACTIVE",
        "link_layer": "Ethernet",
        "rate": "100 Gb/sec (4X EDR)",
        "lid": "0x0",
        "pkeys/0": "0xffff",
        "gids/0": LOCAL,
        "gids/1": LOCAL,
        "gids/2": "0000:0000:0000:0000:0000:0000:0000:0000",
        "gids/10": MAPPED,
        "gid_attrs/types/0": "IB/RoCE v1",
        "gid_attrs/types/1": "RoCE v2",
        "gid_attrs/types/10": "RoCE v2",
        "gid_attrs/ndevs/10": "eth0.7",
    }
    write(tmp_path / "mlx5_0" / "ports" / "1", roce)
    write(tmp_path / "mlx5_0" / "ports" / "2", {"state": "1: DOWN", "link_layer": "Ethernet", "rate": "", "gids/0": "nonsense"})
    write(tmp_path / "mlx5_0", {"device/numa_node": "1"})
    infiniband = {"state": "5: ACTIVE_DEFER", "link_layer": "InfiniBand", "rate": "2.5 Gb/sec (1X SDR)", "lid": "0x1f"}
    write(tmp_path / "ib0" / "ports" / "1", {**infiniband, "pkeys/0": "0x7fff", "pkeys/1": "0x0000", "gids/0": LOCAL})
    write(tmp_path / "ib0", {"device/numa_node": "-1"})
    monkeypatch.setattr(rdma, "SYSFS", tmp_path)
    return tmp_path


def pyverbs(monkeypatch: pytest.MonkeyPatch, **members: Any) -> None:
    """Install a module pyverbs.device with these members."""
    module = types.ModuleType("pyverbs.device")
    module.__dict__.update(members)
    monkeypatch.setitem(sys.modules, "pyverbs", types.ModuleType("pyverbs"))
    monkeypatch.setitem(sys.modules, "pyverbs.device", module)


def no_pyverbs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyverbs", types.ModuleType("pyverbs"))
    monkeypatch.delitem(sys.modules, "pyverbs.device", raising=False)


def test_sysfs_says_all_but_the_mtu(sysfs: Path) -> None:
    ib, first, second = rdma.from_sysfs(sysfs)
    assert (ib.device, ib.number, ib.state, ib.link_layer) == ("ib0", 1, "active, deferred", "InfiniBand")
    assert (ib.speed, ib.mtu, ib.lid, ib.pkeys, ib.numa_node) == (2.5, None, 0x1F, (0x7FFF,), None)
    assert ib.gids == (rdma.Gid(0, "fe80::6c51:45ff:fece:485c", "InfiniBand", ""),)
    assert (first.device, first.number, first.state, first.speed, first.numa_node) == ("mlx5_0", 1, "active", 100, 1)
    assert first.gids == (
        rdma.Gid(0, "fe80::6c51:45ff:fece:485c", "RoCE v1", ""),
        rdma.Gid(1, "fe80::6c51:45ff:fece:485c", "RoCE v2", ""),
        rdma.Gid(10, "10.77.0.1", "RoCE v2", "eth0.7"),
    )
    assert (second.number, second.state, second.speed, second.gids, second.pkeys) == (2, "down", None, (), ())


def test_no_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for nothing in (tmp_path, tmp_path / "absent"):
        monkeypatch.setattr(rdma, "SYSFS", nothing)
        assert rdma.find() == ((), "sysfs", "")


class Context:
    """A device as pyverbs opens it."""

    closed = 0

    def __init__(self, name: str) -> None:
        assert name == "mlx5_0"

    def query_device(self) -> Any:
        return types.SimpleNamespace(phys_port_cnt=2)

    def query_port(self, number: int) -> Any:
        return types.SimpleNamespace(state=4 if number == 1 else 1, link_layer=2, lid=0, active_mtu=5 if number == 1 else 0)

    def query_gid_table(self, most: int) -> Any:
        entry = {"port_num": 1, "gid_type": 2, "ndev_ifindex": 0}
        return [
            types.SimpleNamespace(gid_index=0, gid_str=lambda: "0000:" * 7 + "0000", **entry),
            types.SimpleNamespace(gid_index=3, gid_str=lambda: MAPPED, **{**entry, "ndev_ifindex": 1 << 30}),
        ]

    def close(self) -> None:
        Context.closed += 1


def test_pyverbs_is_preferred(sysfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyverbs(monkeypatch, get_device_list=lambda: [types.SimpleNamespace(name=b"mlx5_0")], Context=Context)
    (first, second), source, trouble = rdma.find()
    assert (source, trouble, Context.closed) == ("pyverbs", "", 1)
    assert (first.state, first.link_layer, first.mtu, first.speed, first.numa_node) == ("active", "Ethernet", 4096, 100, 1)
    assert (first.gids, first.pkeys) == ((rdma.Gid(3, "10.77.0.1", "RoCE v2", ""),), (0xFFFF,))
    assert (second.number, second.state, second.mtu, second.gids) == (2, "down", None, ())


def fails(error: Exception) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        raise error

    return call


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"get_device_list": fails(RuntimeError("PyverbsRDMAError\nfailed"))}, "pyverbs: RuntimeError: PyverbsRDMAError failed"),
        ({"get_device_list": list}, "pyverbs knows none of the devices"),
        (
            {"get_device_list": lambda: [types.SimpleNamespace(name=b"mlx5_0")], "Context": fails(OSError("gone"))},
            "OSError: gone",
        ),
        ({}, "pyverbs: AttributeError"),
    ],
)
def test_a_pyverbs_that_does_not_work(
    sysfs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], members: dict[str, Any], said: str
) -> None:
    pyverbs(monkeypatch, **members)
    found = rdma.find()
    assert found.source == "sysfs" and said in found.trouble and len(found.ports) == 3
    assert main(["info"]) == 0
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("text", ["raise SystemError('binary of another Python')", "1 / 0", "import absent_library"])
def test_a_pyverbs_that_cannot_be_imported(sysfs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    write(tmp_path / "path", {"pyverbs/__init__.py": "", "pyverbs/device.py": text})
    for name in ("pyverbs", "pyverbs.device"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path / "path"))
    found = rdma.find()
    for name in ("pyverbs", "pyverbs.device"):
        sys.modules.pop(name, None)
    assert found.source == "sysfs" and found.trouble.startswith("pyverbs: ")


def test_info_lists_ports(sysfs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    no_pyverbs(monkeypatch)
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "RDMA ports (as sysfs lists them):" in text
    assert "  mlx5_0 port 1: active, Ethernet, 100 Gb/s, NUMA node 1, pkeys 0xffff\n" in text
    assert "    GID 10  10.77.0.1 (RoCE v2 on eth0.7)\n" in text
    assert "  ib0 port 1: active, deferred, InfiniBand, 2.5 Gb/s, LID 31, NUMA node unknown, pkeys 0x7fff\n" in text
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["rdma"]
    assert (found["source"], found["trouble"], len(found["ports"])) == ("sysfs", "", 3)
    assert found["ports"][1]["gids"][2] == {"index": 10, "address": "10.77.0.1", "type": "RoCE v2", "interface": "eth0.7"}


@pytest.mark.limit(60)
def test_this_machine() -> None:
    """What is here is read by both ways alike, and `hfreduce info` has a line a port."""
    done = subprocess.run([sys.executable, "-m", "hfreduce", "info", "--json"], capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    ports = list(rdma.from_sysfs(rdma.SYSFS))
    assert [(p["device"], p["number"]) for p in told["rdma"]["ports"]] == [(p.device, p.number) for p in ports]
    for port, other in zip(ports, rdma.find().ports):
        assert (port.state, port.link_layer, port.speed, port.lid) == (other.state, other.link_layer, other.speed, other.lid)
        assert (port.gids, port.pkeys, port.numa_node) == (other.gids, other.pkeys, other.numa_node)
        assert any(key == f"rdma {port.device} port {port.number}" for key in told["core"])
    if not ports:
        assert told["rdma"]["trouble"] == ""
