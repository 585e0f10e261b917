"""The kernels for pairs of GPUs (csrc/device/cuda_reduce.cu): their results, compiled for the host, and that the real NVRTC compiles them.

No GPU is needed for either, and none has run them yet.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from programs import BUILD, BUILD_LIMIT, ROOT, SOURCES, build, building, built, cuda_stand_in, environment
from test_c import OPTIONS, need_sanitizer
from test_cuda_fake import DESCRIBE

RUN_LIMIT = 100
pytestmark = pytest.mark.limit(RUN_LIMIT + BUILD_LIMIT)


def kernels_on_host(variant: str) -> Path:
    """Compile the kernels for the host, plain or under a sanitizer, and return the library's path."""
    cxx = shlex.split(os.environ.get("CXX", "g++"))
    if not shutil.which(cxx[0]):
        pytest.skip(f"no {cxx[0]} on PATH")
    flags = "-std=c++17 -O2 -g -fPIC -ffp-contract=off -Wall -Wextra -Werror -Wno-unknown-pragmas -fvisibility=hidden -shared"
    with building(f"kernels-{variant}") as out:
        command = [*cxx, *flags.split(), *build.SANITIZERS["" if variant == "plain" else variant], "-I", str(ROOT / "csrc")]
        command += ["-o", str(out / "kernels.so"), str(SOURCES / "fake" / "kernels.cpp")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert not done.returncode, done.stderr
    return BUILD / f"kernels-{variant}" / "kernels.so"


@pytest.mark.parametrize("variant", ["plain", "address"])
def test_bits_are_those_of_the_cpu(variant: str, tmp_path: Path) -> None:
    if variant != "plain":
        need_sanitizer(variant, tmp_path)
    command = [str(built("test_cuda_reduce", variant)), str(kernels_on_host(variant))]
    env = environment(**OPTIONS.get(variant, {}))
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=RUN_LIMIT)
    assert done.returncode == 0, done.stdout + done.stderr


def nvrtc() -> Path:
    """Where the real NVRTC lies, or skip."""
    found = next((ROOT / "build" / "cuda").glob("nvidia/cuda_nvrtc/lib/libnvrtc.so.1[23]"), None)
    if not found:
        pytest.skip("no NVRTC: unpack the package nvidia-cuda-nvrtc-cu12 in build/cuda, as .ci/run does")
    return found.parent


def test_nvrtc_compiles_them() -> None:
    env = environment(LD_LIBRARY_PATH=str(nvrtc()))
    done = subprocess.run([str(built("test_cuda_kernels"))], capture_output=True, text=True, env=env, timeout=RUN_LIMIT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_info_tells() -> None:
    paths = {"by NVRTC 1": f"{cuda_stand_in()}:{nvrtc()}", "no compiler for kernels: ": str(cuda_stand_in())}
    for expected, path in paths.items():
        env = environment(LD_LIBRARY_PATH=path)
        done = subprocess.run([sys.executable, "-c", DESCRIBE], capture_output=True, text=True, env=env, timeout=60)
        assert expected in done.stdout, done.stdout + done.stderr
