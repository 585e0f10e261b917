"""What is built for a first contact: the stand-in for the driver, the package in a private target, the C programs of tests/c."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
#: What of the checkout is copied, and built in the copy: the checkout may be read-only, and stays as it was.
COPIED = ["csrc", "hfreduce", "tests/c", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"]
#: The oldest version of each package that building or running needs, and the Python module by which it is found.
NEEDED = {
    "setuptools": ((77,), "setuptools"),
    "cffi": ((1, 15), "cffi"),
    "pycparser": ((2,), "pycparser"),
    "numpy": ((1, 22), "numpy"),
}
PROGRAMS = [
    "test_cuda",
    "test_cuda_graph",
    "test_cuda_faults",
    "test_cuda_pairs",
    "test_cuda_lend",
    "test_cuda_chunks",
    "test_cuda_blocked",
    "test_cuda_queues",
    "test_cuda_reduce",
    "test_cuda_kernels",
]


class Refused(Exception):
    """What was asked for cannot be done: one line says why."""


def core(root: Path = ROOT) -> ModuleType:
    """csrc/build.py: the one list of sources and flags."""
    spec = importlib.util.spec_from_file_location("hfreduce_csrc_build", root / "csrc" / "build.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiler() -> str:
    """The C compiler's command. Refused where there is none."""
    try:
        cc: str = core().compiler()
    except SystemExit as missing:
        raise Refused(str(missing).splitlines()[0]) from None
    if not shutil.which(shlex.split(cc)[0]):
        raise Refused(f"no C compiler: CC={cc} is not on PATH")
    return cc


def _compile(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Refused(f"{shlex.join(command[:1])} failed: {first_line(done.stderr)}")


def first_line(text: str) -> str:
    """The first line with an error in it, else the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.search("error|Error|ERROR|No space", line)]
    return (errors or lines[-1:] or ["it said nothing"])[0][:300]


def stand_in(cc: str, folder: Path) -> str:
    """Build the stand-ins for the driver and NVRTC (tests/c/fake), which are test doubles; the loader's path to them."""
    fake = ROOT / "tests" / "c" / "fake"
    folder.mkdir(parents=True, exist_ok=True)
    flags = "-std=gnu11 -O2 -fPIC -D_GNU_SOURCE -fvisibility=hidden -shared".split()
    for name, sources in {
        "libcuda.so.1": sorted((fake / "cuda").glob("*.c")),
        "libnvrtc.so.12": [fake / "nvrtc.c"],
    }.items():
        command = [*shlex.split(cc), *flags, f"-Wl,-soname,{name}", "-I", str(ROOT / "csrc"), "-o", str(folder / name)]
        _compile([*command, *map(str, sources), "-lpthread", "-ldl"])
    return str(folder)


# ---------------------------------------------------------------- wheels


def missing_packages(wheels: Path | None) -> list[str]:
    """Of what is needed, the packages that this Python does not have, or only too old, and that no wheel brings."""
    brought = {re.sub("[-_.]+", "-", p.name.split("-")[0]).lower() for p in wheels.glob("*.whl")} if wheels else set()
    return [name for name, (oldest, _) in NEEDED.items() if name not in brought and not _has(name, oldest)]


def _has(name: str, oldest: tuple[int, ...]) -> bool:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(int(x) for x in re.findall(r"\d+", version)[: len(oldest)]) >= oldest


def pip(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run pip with neither network nor configuration."""
    command = [sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def install_wheels(wheels: Path, target: Path, environment: dict[str, str]) -> None:
    """Put the wheels that were brought along into the private target. Refused if pip does not take one."""
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        raise Refused(f"--wheels {wheels}: there is no wheel in it")
    done = pip(
        "install", "-q", "--no-index", "--no-deps", "--no-compile", "--target", str(target), *files, environment=environment
    )
    if done.returncode:
        raise Refused(f"pip does not take the wheels of {wheels}: {first_line(done.stderr)}")


# ---------------------------------------------------------------- the package and the C programs


def copy_checkout(source: Path) -> None:
    """Copy what is built, with its times, so that what an earlier run built in the same place is not built again."""
    for name in COPIED:
        to = source / name
        if to.is_dir():
            shutil.rmtree(to)
        to.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to, ignore=shutil.ignore_patterns("*.so", "*.so.2", "*.o", "__pycache__", "_core.c"))
        else:
            shutil.copy2(ROOT / name, to)


def install(source: Path, target: Path) -> str:
    """pip-install the copy into the target: no index, no build isolation. Its environment is the caller's; what pip says on failure."""
    command = ["install", "-q", "--no-index", "--no-deps", "--no-build-isolation", "--no-compile", "--target", str(target)]
    done = pip(*command, "--upgrade", str(source), environment=dict(os.environ))
    return "" if not done.returncode else done.stdout + done.stderr


def programs(source: Path, cc: str) -> dict[str, Path]:
    """Build the C programs from the objects that the package was built from; where each lies."""
    werror = os.environ.get("HFREDUCE_WERROR", "") not in ("", "0")
    out = source / "build" / "core" / (re.sub(r"\W+", "-", cc) + ("-werror" if werror else ""))
    module = core(source)
    return {name: module.build_program(out, source / "tests" / "c" / f"{name}.c", werror=werror, cc=cc) for name in PROGRAMS}


def main() -> None:
    """Part "install": copy, install, build the C programs; each a case of the report."""
    import results

    work, cc = Path(os.environ["FIRST_CONTACT_WORK"]), os.environ["FIRST_CONTACT_CC"]
    source, target = work / "source", work / "target"

    def package() -> str:
        start = time.monotonic()
        copy_checkout(source)
        text = install(source, target)
        if text:
            print(text, flush=True)
            raise results.Wrong(f"pip install: {first_line(text)}")
        return f"installed in {time.monotonic() - start:.0f} s"

    def c_programs() -> str:
        try:
            built = programs(source, cc)
            (work / "programs.json").write_text(json.dumps({name: str(path) for name, path in built.items()}))
            return f"{len(built)} programs"
        except SystemExit as failure:
            print(failure, flush=True)
            raise results.Wrong(first_line(str(failure))) from None

    results.run("install", package, c_programs)


if __name__ == "__main__":
    main()
