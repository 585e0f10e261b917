"""The kernels for pairs of GPUs (csrc/device/cuda_reduce.cu): their results, compiled for the host, and that the real NVRTC compiles them.

No GPU is needed for either, and none has run them yet.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from programs import BUILD, BUILD_LIMIT, ROOT, built, cuda_stand_in, environment, kernels_on_host
from test_c import OPTIONS, need_sanitizer
from test_cuda_fake import DESCRIBE

RUN_LIMIT = 100
pytestmark = pytest.mark.limit(RUN_LIMIT + BUILD_LIMIT)


@pytest.mark.parametrize("variant", ["plain", "address"])
def test_bits_are_those_of_the_cpu(variant: str, tmp_path: Path) -> None:
    if variant != "plain":
        need_sanitizer(variant, tmp_path)
    kernels = kernels_on_host(variant, BUILD / f"kernels-{variant}" / "kernels.so")
    command = [str(built("test_cuda_reduce", variant)), str(kernels)]
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
    expected_of = {
        f"{cuda_stand_in()}:{nvrtc()}": "device cuda 2 NVLink: joined with 3; pairs reduce with kernels that NVRTC 1",
        str(cuda_stand_in()): "device cuda 0 NVLink: not used: no libnvrtc.so.13 or .12",
    }
    for path, expected in expected_of.items():
        env = environment(LD_LIBRARY_PATH=path, FAKE_CUDA="devices=4 nvlink=2")
        done = subprocess.run([sys.executable, "-c", DESCRIBE], capture_output=True, text=True, env=env, timeout=60)
        assert expected in done.stdout, done.stdout + done.stderr
