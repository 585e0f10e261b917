"""The stand-ins for GPUs' libraries (tests/c/fake): test doubles, no GPU. Building them, and running programs on them."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from programs import (
    BUILD,
    PATIENCE,
    ROOT,
    SANITIZER_ENV,
    SOURCES,
    build,
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
RUN_LIMIT = 100


def cuda_stand_in(variant: str = "plain") -> str:
    """Build the stand-in for CUDA's driver, plain or under a sanitizer, and return the loader's path to it."""
    need_compiler()
    double = SOURCES / "fake" / "cuda"
    return _library(f"cuda-{variant}", "libcuda.so.1", sorted(double.glob("*.c")), [*double.glob("*.h")], variant)


def pairs_stand_in(variant: str = "plain") -> str:
    """Build what pairs of devices need beside the driver: our kernels for the host, and a double of NVRTC; return the loader's path to all."""
    need_compiler()
    driver = cuda_stand_in(variant)
    compiler = _library(f"nvrtc-{variant}", "libnvrtc.so.12", [SOURCES / "fake" / "nvrtc.c"], [], variant)
    kernels_on_host(variant, Path(driver) / "kernels.so")
    return f"{driver}:{compiler}"


def kernels_on_host(variant: str, target: Path) -> Path:
    """Compile the kernels for the host, plain or under a sanitizer, unless that is done, and return the library's path."""
    cxx = shlex.split(os.environ.get("CXX", "g++"))
    if not shutil.which(cxx[0]):
        pytest.skip(f"no {cxx[0]} on PATH")
    sources = [SOURCES / "fake" / "kernels.cpp", ROOT / "csrc" / "device" / "cuda_reduce.cu"]
    with building(target.parent.name):
        if not target.exists() or target.stat().st_mtime < max(p.stat().st_mtime for p in sources):
            flags = (
                "-std=c++17 -O2 -g -fPIC -ffp-contract=off -Wall -Wextra -Werror -Wno-unknown-pragmas -fvisibility=hidden -shared"
            )
            command = [*cxx, *flags.split(), *build.SANITIZERS["" if variant == "plain" else variant], "-I", str(ROOT / "csrc")]
            done = subprocess.run([*command, "-o", str(target), str(sources[0])], capture_output=True, text=True)
            assert not done.returncode, done.stderr
    return target


def gdr_stand_in(variant: str = "plain") -> str:
    """Build the stand-in for GDRCopy's library and that for CUDA's driver, on which it works; return the loader's path to both."""
    driver = cuda_stand_in(variant)
    return f"{driver}:{_library(f'gdr-{variant}', 'libgdrapi.so.2', [SOURCES / 'fake' / 'gdrapi.c'], [], variant)}"


def _library(folder: str, name: str, sources: list[Path], headers: list[Path], variant: str) -> str:
    """Build a shared library of our own in build/c/<folder>, if it is older than its sources, and return that directory."""
    flags = f"-std=gnu11 -O2 -g -fPIC -D_GNU_SOURCE -Wall -Wextra -Werror -fvisibility=hidden -shared -Wl,-soname,{name}".split()
    with building(folder) as out:
        target = out / name
        newest = max(p.stat().st_mtime for p in (*sources, *headers, *(ROOT / "csrc" / "device").glob("*.h")))
        if not target.exists() or target.stat().st_mtime < newest:
            command = [
                *compiler(),
                *flags,
                *build.SANITIZERS["" if variant == "plain" else variant],
            ]
            command += ["-I", str(ROOT / "csrc"), "-o", str(target), *map(str, sources), "-lpthread", "-ldl"]
            done = subprocess.run(command, capture_output=True, text=True)
            assert not done.returncode, done.stderr
    return str(BUILD / folder)


def run_program(
    library_path: Callable[[str], str], variant: str, program: str, arguments: str, folder: Path, **more: str
) -> tuple[int | None, str]:
    """Build the program, run it on what library_path(variant) builds; its exit status (None: it did not end) and output."""
    if variant != "plain":
        need_sanitizer(variant, folder)
    leaks = folder / "leaks"  # the stand-ins keep streams, nodes, functions and mappings for ever
    leaks.write_text("leak:libcuda.so.1\nleak:libgdrapi.so.2\n")
    env = {"LSAN_OPTIONS": f"suppressions={leaks}:print_suppressions=0", **SANITIZER_ENV[variant], **more}
    command = [str(built(program, variant)), *arguments.split()]
    return run_to_end(command, folder, RUN_LIMIT, environment(LD_LIBRARY_PATH=library_path(variant), **env))


def check_program(
    library_path: Callable[[str], str], variant: str, program: str, arguments: str, folder: Path, **more: str
) -> str:
    """Do that, and see to it that the program passed and met a stand-in; its output."""
    code, text = run_program(library_path, variant, program, arguments, folder, **more)
    how = f"still ran at its limit of {RUN_LIMIT} s (times {PATIENCE:g})" if code is None else f"ended with {code}"
    assert code == 0, f"{program} {arguments} ({variant}) {how}\n{shorten(text)}"
    assert "stand-in driver (test double, no GPU)" in text, f"{program} did not run on the stand-in\n{shorten(text)}"
    return text


def described(**env: str) -> str:
    """What `hfreduce info` prints in this environment."""
    script = "from hfreduce.params import describe; print('\\n'.join(f'{k}: {v}' for k, v in describe()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment(**env), timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout
