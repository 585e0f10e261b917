"""The C programs of tests/c, built for the tests in build/c/<variant>, so that only what changed is built again."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "tests" / "c"
BUILD = ROOT / "build" / "c"
#: Seconds that building may take.
BUILD_LIMIT = 400


def _load_build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hfreduce_csrc_build", ROOT / "csrc" / "build.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


build = _load_build()


@contextmanager
def building(variant: str) -> Iterator[Path]:
    """Give the variant's build directory to one process at a time, and turn the compiler's complaints into a failure."""
    out = BUILD / variant
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield out
        except SystemExit as failure:
            pytest.fail(str(failure), pytrace=False)


def need_compiler(cc: str = "") -> None:
    """Skip unless there is such a compiler; the one that programs are built with if none is named."""
    cc = cc or shlex.split(os.environ.get("CC", "gcc"))[0]
    if not shutil.which(cc):
        pytest.skip(f"no {cc} on PATH")


def need_sanitizer(variant: str, tmp_path: Path) -> None:
    """Skip unless programs under the sanitizer can be linked and run here."""
    source = tmp_path / "probe.c"
    source.write_text("int main(void) { return 0; }\n")
    command = [*shlex.split(os.environ.get("CC", "gcc")), *build.SANITIZERS[variant], "-o", str(tmp_path / "probe"), str(source)]
    for step in (command, [str(tmp_path / "probe")]):
        done = subprocess.run(step, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"the {variant} sanitizer does not work here: {done.stderr.strip()[-300:]}")


def built(program: str, variant: str = "plain") -> Path:
    """Build tests/c/<program>.c, plain or under a sanitizer, and return the program's path."""
    with building(variant) as out:
        path: Path = build.build_program(out, SOURCES / f"{program}.c", sanitize="" if variant == "plain" else variant)
    return path


def cuda_stand_in(variant: str = "plain") -> Path:
    """Build the stand-in for CUDA's driver, plain or under a sanitizer, and return the directory in which it lies as libcuda.so.1."""
    need_compiler()
    double = SOURCES / "fake" / "cuda"
    return _library(f"cuda-{variant}", "libcuda.so.1", sorted(double.glob("*.c")), [*double.glob("*.h")], variant)


def pairs_stand_in(variant: str = "plain") -> str:
    """Build what pairs of devices need beside the driver: our kernels for the host, and a double of NVRTC; return the loader's path to all."""
    need_compiler()
    driver = cuda_stand_in(variant)
    compiler = _library(f"nvrtc-{variant}", "libnvrtc.so.12", [SOURCES / "fake" / "nvrtc.c"], [], variant)
    kernels_on_host(variant, driver / "kernels.so")
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


def gdr_stand_in(variant: str = "plain") -> Path:
    """Build the stand-in for GDRCopy's library, which works on that of CUDA's driver, and return the directory in which it lies."""
    need_compiler()
    return _library(f"gdr-{variant}", "libgdrapi.so.2", [SOURCES / "fake" / "gdrapi.c"], [], variant)


def _library(folder: str, name: str, sources: list[Path], headers: list[Path], variant: str) -> Path:
    """Build a shared library of our own in build/c/<folder>, if it is older than its sources, and return that directory."""
    flags = f"-std=gnu11 -O2 -g -fPIC -D_GNU_SOURCE -Wall -Wextra -Werror -fvisibility=hidden -shared -Wl,-soname,{name}".split()
    with building(folder) as out:
        target = out / name
        newest = max(p.stat().st_mtime for p in (*sources, *headers, *(ROOT / "csrc" / "device").glob("*.h")))
        if not target.exists() or target.stat().st_mtime < newest:
            command = [
                *shlex.split(os.environ.get("CC", "gcc")),
                *flags,
                *build.SANITIZERS["" if variant == "plain" else variant],
            ]
            command += ["-I", str(ROOT / "csrc"), "-o", str(target), *map(str, sources), "-lpthread", "-ldl"]
            done = subprocess.run(command, capture_output=True, text=True)
            assert not done.returncode, done.stderr
    return BUILD / folder


def run_to_end(command: list[str], folder: Path, limit: float, env: dict[str, str]) -> tuple[int | None, str]:
    """Run a program in `folder`, and end it and its ranks after `limit` seconds; its exit status (None: it still ran), its output.

    Output goes to a file: ranks that outlive the program cannot hold a pipe open.
    """
    with (folder / "output").open("w+", errors="replace") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env, cwd=folder, start_new_session=True)
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:  # also when pytest gives up
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return code, output.read()


def environment(**more: str) -> dict[str, str]:
    """This process' environment without the caller's own parameters, and more."""
    return {name: value for name, value in os.environ.items() if not name.startswith("HFREDUCE_")} | more


def shorten(text: str, most: int = 12000) -> str:
    """Keep the beginning, where the first error stands, and the end."""
    return text if len(text) <= most else f"{text[: most * 2 // 3]}\n[...]\n{text[-most // 3 :]}"
