"""compute-sanitizer, memcheck and racecheck, over a C test of device memory and over the kernels; and a planted error that it has to find."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import results
from results import Absent, Wrong

WORK = Path(os.environ["FIRST_CONTACT_WORK"])
STAND_IN = bool(os.environ.get("FIRST_CONTACT_STAND_IN"))
PLANTED = """
__global__ void outside(int *x) { x[threadIdx.x + 1000000] = 1; }
int main() { int *x; if (cudaMalloc(&x, 4)) return 3; outside<<<1, 1>>>(x); return cudaDeviceSynchronize() ? 4 : 0; }
"""


def checked(tool: str, *command: str) -> tuple[int, str]:
    """Run a program under the tool; how many errors it found, and what it printed. Absent where it cannot run here."""
    if STAND_IN:
        raise Absent("needs a GPU: the stand-in has no device code")
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        raise Absent("no compute-sanitizer here: CUDA's toolkit is not installed")
    words = [sanitizer, "--tool", tool, "--target-processes", "all", "--report-api-errors", "no", *command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=40)
    text = done.stdout + done.stderr
    print(text[-6000:], flush=True)
    if "not supported" in text:
        raise Absent(next(line for line in text.splitlines() if "not supported" in line).strip("= "))
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
    if not found:
        raise Wrong(f"{tool} gave no summary: {(text.strip().splitlines() or ['it said nothing'])[-1]}")
    return sum(map(int, found)), text


def clean(tool: str, *command: str) -> str:
    errors, _ = checked(tool, *command)
    results.same(errors, 0, f"errors of {tool}")
    return f"{tool}: no errors"


def program(name: str) -> str:
    path: str = json.loads((WORK / "programs.json").read_text())[name]
    return path


def a_planted_error_is_found() -> str:
    if STAND_IN:
        raise Absent("needs a GPU: the stand-in has no device code")
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).exists():
        raise Absent("no nvcc here")
    source = WORK / "planted.cu"
    source.write_text(PLANTED)
    subprocess.run([nvcc, "-arch=native", "-o", str(WORK / "planted"), str(source)], check=True, timeout=40)
    errors, _ = checked("memcheck", str(WORK / "planted"))
    results.same(errors > 0, True, "that memcheck finds a write outside")
    return f"memcheck found {errors}"


def memcheck_of_test_cuda() -> str:
    return clean("memcheck", program("test_cuda"), "--quick", "collectives", "2")


def of_the_kernels(tool: str) -> str:
    if not (WORK / "device_kernels.so").exists():
        raise Absent("the kernels are not compiled: run part kernels too")
    return clean(tool, program("test_cuda_reduce"), str(WORK / "device_kernels.so"))


def memcheck_of_the_kernels() -> str:
    return of_the_kernels("memcheck")


def racecheck_of_the_kernels() -> str:
    return of_the_kernels("racecheck")


if __name__ == "__main__":
    results.run("sanitizer", a_planted_error_is_found, memcheck_of_test_cuda, memcheck_of_the_kernels, racecheck_of_the_kernels)
