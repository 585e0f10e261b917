"""The kernels of csrc/device/cuda_reduce.cu against csrc/simd, bit by bit: compiled by nvcc for the real device, in a dry run for the host."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import results
from results import Absent, Wrong

WORK, ROOT = Path(os.environ["FIRST_CONTACT_WORK"]), Path(__file__).resolve().parents[3]
STAND_IN = bool(os.environ.get("FIRST_CONTACT_STAND_IN"))
LIBRARY = WORK / "device_kernels.so"


def run(command: list[str], limit: float) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    print(done.stdout[-4000:], done.stderr[-4000:], flush=True)
    if done.returncode == 77:
        raise Absent(done.stdout.strip()[:200])
    if done.returncode:
        raise Wrong(
            f"{Path(command[0]).name} ended with {done.returncode}: {(done.stderr or done.stdout).strip().splitlines()[0]}"
        )
    return done.stdout.strip()


def compile_them() -> str:
    """Into a library with the interface that the host's test has."""
    here = ["-I", str(ROOT / "csrc"), "-o", str(LIBRARY)]
    if STAND_IN:
        cxx = shutil.which("g++") or shutil.which("clang++")
        if not cxx:
            raise Absent("no C++ compiler here")
        flags = "-std=c++17 -O1 -fPIC -ffp-contract=off -Wno-unknown-pragmas -fvisibility=hidden -shared".split()
        run([cxx, *flags, *here, str(ROOT / "tests" / "c" / "fake" / "kernels.cpp")], 60)
        return "for the host: a dry run"
    nvcc = shutil.which("nvcc") or next((str(p) for p in [Path("/usr/local/cuda/bin/nvcc")] if p.exists()), None)
    if not nvcc:
        raise Absent("no nvcc here: CUDA's toolkit is not installed")
    flags = "-std=c++17 -O2 -arch=native --fmad=false -shared -Xcompiler -fPIC".split()
    visible = "--device-entity-has-hidden-visibility=false"  # CUDA 13 hides the kernels' names else; older ones have no such flag
    if "device-entity-has-hidden-visibility" in subprocess.run([nvcc, "--help"], capture_output=True, text=True).stdout:
        flags.append(visible)
    run([nvcc, *flags, *here, str(ROOT / "tests" / "gpu" / "device_kernels.cu"), "-ldl"], 50)
    return "for the device, by nvcc"


def against_simd() -> str:
    """tests/c/test_cuda_reduce.c: every datatype, operation, alignment and length, in place and not."""
    if not LIBRARY.exists():
        raise Absent("the kernels were not compiled")
    programs = json.loads((WORK / "programs.json").read_text())
    return run([programs["test_cuda_reduce"], str(LIBRARY)], 50) or "every datatype and operation, bit for bit"


def compiled_by_nvrtc() -> str:
    """The way that the library takes: NVRTC, for a few architectures."""
    if STAND_IN:
        raise Absent("needs NVRTC: the stand-in compiles nothing")
    programs = json.loads((WORK / "programs.json").read_text())
    return run([programs["test_cuda_kernels"]], 40).replace("\n", "; ")


if __name__ == "__main__":
    LIBRARY.unlink(missing_ok=True)
    results.run("kernels", compile_them, against_simd, compiled_by_nvrtc)
