"""The kernels for pairs of GPUs (csrc/device/cuda_reduce.cu): their results, compiled for the host, and that the real NVRTC compiles them.

No GPU is needed for either, and none has run them yet.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from programs import BUILD, BUILD_LIMIT, ROOT, SANITIZER_ENV, built, environment, need_sanitizer
from stand_ins import RUN_LIMIT, cuda_stand_in, described, kernels_on_host

pytestmark = pytest.mark.limit(RUN_LIMIT + BUILD_LIMIT)


@pytest.mark.parametrize("variant", ["plain", "address"])
def test_bits_are_those_of_the_cpu(variant: str, tmp_path: Path) -> None:
    if variant != "plain":
        need_sanitizer(variant, tmp_path)
    kernels = kernels_on_host(variant, BUILD / f"kernels-{variant}" / "kernels.so")
    command = [str(built("test_cuda_reduce", variant)), str(kernels)]
    env = environment(**SANITIZER_ENV[variant])
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
        cuda_stand_in(): "device cuda 0 NVLink: not used: no libnvrtc.so.12 on the loader's path or among the wheels",
    }
    for path, expected in expected_of.items():
        text = described(LD_LIBRARY_PATH=path, FAKE_CUDA="devices=4 nvlink=2", HFREDUCE_NVLINK="1")
        assert expected in text, text
