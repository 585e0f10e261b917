"""What is there: driver, devices, copy engines, stream memory operations, NVRTC, GDRCopy, PCIe link, NUMA, our table of the driver's functions."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import results
from libcuda import ATTRIBUTES, Cuda
from results import Absent, Wrong

cuda = Cuda(context=False)
ROOT = Path(__file__).resolve().parents[3]


def driver_and_devices() -> tuple[str, dict[str, Any]]:
    version, count = ctypes.c_int(), ctypes.c_int()
    cuda("cuDriverGetVersion", ctypes.byref(version))
    cuda("cuDeviceGetCount", ctypes.byref(count))
    memory = ctypes.c_size_t()
    cuda("cuDeviceTotalMem_v2", ctypes.byref(memory), 0)
    text = f"{version.value // 1000}.{version.value % 1000 // 10}"
    results.same(count.value > 0, True, "a device is there")
    figure = f"{count.value} x {cuda.name}, driver {text}, {memory.value >> 30} GiB"
    return figure, {"device": cuda.name, "devices": count.value, "driver": text, "memory": memory.value}


def attributes() -> tuple[str, dict[str, Any]]:
    values: dict[str, Any] = {}
    for name, number in ATTRIBUTES.items():
        value = ctypes.c_int()
        values[name] = value.value if not cuda.result("cuDeviceGetAttribute", ctypes.byref(value), number, 0) else "unknown"
    chosen = ("multiprocessors", "copy engines", "stream memory operations", "flush of remote writes", "host register")
    return ", ".join(f"{name} {values[name]}" for name in chosen), values


def every_function_of_our_table() -> str:
    """Look every function up that csrc/device/cuda_lib.h declares, by its symbol."""
    table = re.findall(r'X\(\w+, "(\w+)", "(\w+)"', (ROOT / "csrc" / "device" / "cuda_lib.h").read_text())
    missing = [symbol for _, symbol in table if not cuda.has(symbol)]
    if missing or not table:
        raise Wrong(f"the driver has no {', '.join(missing) or 'table'}")
    return f"{len(table)} of {len(table)} there"


def declarations_against_cuda_h() -> str:
    places = [Path(p) for p in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda") if p]
    nvcc = shutil.which("nvcc")
    if nvcc:
        places.append(Path(nvcc).resolve().parents[1])
    found = [p / "include" / "cuda.h" for p in places]
    for folder in sys.path:
        found += Path(folder or ".").glob("nvidia/*/include/cuda.h")
    header = next((p for p in found if p.exists()), None)
    if not header:
        raise Absent("no cuda.h here: CUDA's toolkit is not installed")
    program = Path(os.environ["FIRST_CONTACT_WORK"]) / "test_cuda_abi"
    source = ROOT / "tests" / "c" / "test_cuda_abi.c"
    command = [
        *os.environ["FIRST_CONTACT_CC"].split(),
        "-std=gnu11",
        "-Werror",
        "-I",
        str(ROOT / "csrc"),
        "-I",
        str(header.parent),
    ]
    for each in ([*command, str(source), "-o", str(program)], [str(program)]):
        done = subprocess.run(each, capture_output=True, text=True)
        if done.returncode:
            raise Wrong((done.stderr or done.stdout).strip()[:400])
    return f"they agree with {header}"


def nvrtc() -> str:
    for name in ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so.11.2", "libnvrtc.so"):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        major, minor = ctypes.c_int(), ctypes.c_int()
        library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        return f"{name} of CUDA {major.value}.{minor.value} on the loader's path"
    wheels = [str(p) for folder in sys.path for p in Path(folder or ".").glob("nvidia/*/lib/libnvrtc.so.*")]
    raise Absent(f"no NVRTC on the loader's path{'; a wheel has ' + wheels[0] if wheels else ''}")


def gdrcopy() -> str:
    try:
        ctypes.CDLL("libgdrapi.so.2")
    except OSError:
        raise Absent("no libgdrapi.so.2") from None
    return f"libgdrapi.so.2, /dev/gdrdrv {'there' if Path('/dev/gdrdrv').exists() else 'not there'}"


def pcie_link_and_numa() -> tuple[str, dict[str, str]]:
    bus, place, domain = (cuda.attribute(number) for number in (33, 34, 50))
    address = f"{domain:04x}:{bus:02x}:{place:02x}.0"
    folder = Path("/sys/bus/pci/devices") / address
    if not folder.exists():
        raise Absent(f"/sys does not show device {address}")
    names = ("current_link_speed", "max_link_speed", "current_link_width", "max_link_width", "numa_node", "local_cpulist")
    values = {name: (folder / name).read_text().strip() for name in names if (folder / name).exists()}
    return f"{address}: " + ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in values.items()), values


def host() -> tuple[str, dict[str, Any]]:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    shm = shutil.disk_usage("/dev/shm").total >> 20 if Path("/dev/shm").exists() else 0
    memory = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    data = {
        "cpu": model.group(1) if model else platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "memory GiB": int(memory.group(1)) >> 20 if memory else 0,
        "/dev/shm MiB": shm,
        "python": platform.python_version(),
    }
    return ", ".join(f"{k} {v}" for k, v in data.items()), data


if __name__ == "__main__":
    results.run(
        "machine",
        driver_and_devices,
        attributes,
        every_function_of_our_table,
        declarations_against_cuda_h,
        nvrtc,
        gdrcopy,
        pcie_link_and_numa,
        host,
    )
