"""The RDMA ports that this machine has, as records: through pyverbs (rdma-core's Python binding) when it is installed, else from sysfs.

What of them is used, and why not the others, the C core decides and says (`hfreduce info`, lines "rdma ..."); this is what there is.
"""

from __future__ import annotations

import importlib
import ipaddress
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

#: Where the kernel lists its RDMA devices.
SYSFS = Path("/sys/class/infiniband")

# ibv_port_state, ibv_gid_type_sysfs, link layers, as enum ibv_... numbers them
_STATES = {0: "no state", 1: "down", 2: "initializing", 3: "armed", 4: "active", 5: "active, deferred"}
_GID_TYPES = {0: "InfiniBand", 1: "RoCE v1", 2: "RoCE v2"}
_LAYERS = {1: "InfiniBand", 2: "Ethernet"}


@dataclass(frozen=True)
class Gid:
    """One entry of a port's table of global identifiers: an address by which peers name the port."""

    index: int
    #: IPv4 or IPv6 text.
    address: str
    #: "RoCE v2", "RoCE v1", "InfiniBand"; "" if not known.
    type: str
    #: The network interface that gave it; "" for none.
    interface: str


@dataclass(frozen=True)
class Port:
    """One port of an RDMA device."""

    device: str
    #: From 1.
    number: int
    #: "active", "down", ...
    state: str
    #: "InfiniBand", "Ethernet"; "" if not known.
    link_layer: str
    #: Gb/s; None if not known.
    speed: float | None
    #: Bytes of a packet's payload in force; None if not known.
    mtu: int | None
    #: InfiniBand's local identifier; 0 elsewhere.
    lid: int
    gids: tuple[Gid, ...]
    pkeys: tuple[int, ...]
    #: The NUMA node that the device is attached to; None if the kernel knows none.
    numa_node: int | None


class Ports(NamedTuple):
    """What was found, by device and port; who told ("pyverbs", "sysfs"); and what went wrong on the way, or ""."""

    ports: tuple[Port, ...]
    source: str
    trouble: str


def find() -> Ports:
    """Find the ports. Raises nothing: a machine without RDMA has no ports, and a pyverbs that does not work is passed over."""
    if not _names(SYSFS):
        return Ports((), "sysfs", "")
    trouble = ""
    try:
        device = importlib.import_module("pyverbs.device")
        found = tuple(_from_pyverbs(device))
        if found:
            return Ports(found, "pyverbs", "")
        trouble = "pyverbs knows none of the devices (is their provider installed?)"
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "pyverbs":
            trouble = f"pyverbs: {error}"
    except Exception as error:  # another Python's binary, a library that is too old, a device that is just going
        trouble = f"pyverbs: {type(error).__name__}: {error}"
    return Ports(tuple(from_sysfs(SYSFS)), "sysfs", " ".join(trouble.split()))


# --- sysfs ---


def _names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return []


def _numbers(folder: Path) -> list[int]:
    return sorted(int(name) for name in _names(folder) if name.isdecimal())


def _attribute(path: Path) -> str:
    """A one-line attribute; "" where it cannot be read (an empty entry of a table refuses)."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _integer(value: str, base: int = 10) -> int | None:
    try:
        return int(value, base)
    except ValueError:
        return None


def from_sysfs(root: Path) -> Iterator[Port]:
    """The ports as the kernel lists them under `root`. It tells all but the MTU."""
    for device in _names(root):
        for number in _numbers(root / device / "ports"):
            folder = root / device / "ports" / str(number)
            yield Port(
                device=device,
                number=number,
                state=_STATES.get(_integer(_attribute(folder / "state").partition(":")[0]) or 0, "unknown"),
                link_layer=_attribute(folder / "link_layer"),
                speed=_speed(folder),
                mtu=None,
                lid=_integer(_attribute(folder / "lid"), 16) or 0,
                gids=tuple(_gids(folder)),
                pkeys=tuple(_pkeys(folder)),
                numa_node=_numa_node(root / device),
            )


def _speed(port: Path) -> float | None:
    """Of "100 Gb/sec (4X EDR)"."""
    try:
        return float(_attribute(port / "rate").split()[0])
    except (IndexError, ValueError):
        return None


def _pkeys(port: Path) -> Iterator[int]:
    for index in _numbers(port / "pkeys"):
        pkey = _integer(_attribute(port / "pkeys" / str(index)), 16)
        if pkey:
            yield pkey


def _numa_node(device: Path) -> int | None:
    node = _integer(_attribute(device / "device" / "numa_node"))
    return node if node is not None and node >= 0 else None


def _gids(port: Path) -> Iterator[Gid]:
    for index in _numbers(port / "gids"):
        address = _address(_attribute(port / "gids" / str(index)))
        if address:
            kind = _attribute(port / "gid_attrs" / "types" / str(index)).replace("IB/RoCE v1", "RoCE v1")
            if _attribute(port / "link_layer") == "InfiniBand":
                kind = "InfiniBand"
            yield Gid(index, address, kind, _attribute(port / "gid_attrs" / "ndevs" / str(index)))


def _address(gid: str) -> str:
    """A GID as an address, IPv4 where it maps one; "" for none."""
    try:
        address = ipaddress.IPv6Address(gid)
    except ValueError:
        return ""
    return str(address.ipv4_mapped or address) if int(address) else ""


# --- pyverbs ---


def _from_pyverbs(module: Any) -> Iterator[Port]:
    for listed in module.get_device_list():
        name = listed.name.decode() if isinstance(listed.name, bytes) else str(listed.name)
        context = module.Context(name=name)
        try:
            table = list(context.query_gid_table(1600))  # what fits: the kernel takes 64 KiB, 40 bytes each
            for number in range(1, context.query_device().phys_port_cnt + 1):
                attributes = context.query_port(number)
                folder = SYSFS / name / "ports" / str(number)
                yield Port(
                    device=name,
                    number=number,
                    state=_STATES.get(attributes.state, "unknown"),
                    link_layer=_LAYERS.get(attributes.link_layer, ""),
                    speed=_speed(folder),
                    mtu=128 << attributes.active_mtu if attributes.active_mtu else None,
                    lid=attributes.lid,
                    gids=tuple(_entry(entry) for entry in table if entry.port_num == number and _address(entry.gid_str())),
                    pkeys=tuple(_pkeys(folder)),
                    numa_node=_numa_node(SYSFS / name),
                )
        finally:
            context.close()


def _entry(entry: Any) -> Gid:
    try:
        interface = socket.if_indextoname(entry.ndev_ifindex) if entry.ndev_ifindex else ""
    except OSError:
        interface = ""
    return Gid(entry.gid_index, _address(entry.gid_str()), _GID_TYPES.get(entry.gid_type, ""), interface)
