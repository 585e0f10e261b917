"""Compile the C core: the one list of sources and flags, used by setup.py, by the tests and by hand (python csrc/build.py --help)."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CFLAGS = "-std=gnu11 -O3 -g -fPIC -ffp-contract=off -fvisibility=hidden -D_GNU_SOURCE -Wall -Wextra".split()
LDFLAGS = "-shared -Wl,-z,defs".split()
# Beside libhfreduce.so. Its calls of its own functions stay its own when another NCCL comes first in the process.
NCCL_LDFLAGS = "-Wl,-Bsymbolic-functions -Wl,-rpath,$ORIGIN".split()
LIBS = "-lpthread -ldl -lm".split()
SANITIZERS = {
    "": [],
    "address": "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1".split(),
    "thread": "-fsanitize=thread -fno-omit-frame-pointer -O1".split(),
}


def compiler() -> str:
    """The C compiler to use: $CC, else the first of cc, gcc and clang that is on PATH. SystemExit says what to install when none is."""
    asked = os.environ.get("CC", "").strip()
    for cc in (asked, "cc", "gcc", "clang"):
        if cc and shutil.which(shlex.split(cc)[0]):
            if asked and cc != asked:
                sys.stderr.write(f"CC={asked} is not on PATH: {cc} is taken in its place\n")
            return cc
    tried = ", ".join([*([f"CC={asked}"] if asked else []), "cc", "gcc", "clang"])
    raise SystemExit(
        f"hfreduce needs a C compiler, and none of {tried} is on PATH: install one (Debian, Ubuntu: apt-get install gcc libc6-dev; "
        "Fedora, RHEL: dnf install gcc), or set CC to its path"
    )


def sources() -> list[Path]:
    """Every C file of the core, in a stable order."""
    return sorted(p for p in HERE.glob("*/*.c") if p.parent.name != "nccl") + sorted(HERE.glob("*.c"))


def hashed() -> list[Path]:
    """Everything that the library is made of."""
    return sorted(p for p in HERE.rglob("*") if p.suffix in (".c", ".h", ".inc", ".cu"))


def source_hash() -> str:
    """Eight hex digits that tell builds apart: ranks compare them when they join."""
    total = hashlib.sha256()
    for path in hashed():
        total.update(f"{path.relative_to(HERE).as_posix()} {path.stat().st_size}\n".encode() + path.read_bytes())
    return total.hexdigest()[:8]


def flags_for(source: Path, machine: str) -> list[str]:
    """Flags that one file needs beside the common ones: SIMD instances are named simd/*_<level>.c, the kernels' text is included."""
    if source.name == "version.c":
        return [f"-DHFR_BUILD=0x{source_hash()}u"]
    if source.stem == "cuda_kernels":  # it holds the text of kernels, which the assembler reads
        return [f"-Wa,-I,{HERE / 'device'}"]
    if machine not in ("x86_64", "AMD64"):
        return []
    if source.stem.endswith("_avx2"):
        return "-mavx2 -mf16c -mfma".split()
    if source.stem.endswith("_avx512"):
        return "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mf16c -mfma -mprefer-vector-width=512".split()
    return []


def compile_objects(
    out: Path,
    files: list[Path],
    *,
    sanitize: str = "",
    werror: bool = False,
    cc: str | None = None,
    extra: list[str] | None = None,
) -> list[Path]:
    """Compile what is older than its sources, any header or kernel; return the objects. Raises SystemExit with the compiler's output on failure."""
    cc = cc or compiler()
    out.mkdir(parents=True, exist_ok=True)
    newest_header = max((p.stat().st_mtime for p in (*HERE.rglob("*.[hi]*"), *HERE.rglob("*.cu"))), default=0.0)
    newest_header = max(newest_header, Path(__file__).stat().st_mtime)
    machine = os.uname().machine
    jobs, objects = [], []
    for source in files:
        relative = source.relative_to(HERE) if source.is_relative_to(HERE) else Path(source.name)
        obj = out / ("_".join(relative.with_suffix(".o").parts))
        objects.append(obj)
        newest = max((p.stat().st_mtime for p in hashed()), default=0.0) if source.name == "version.c" else source.stat().st_mtime
        if obj.exists() and obj.stat().st_mtime > max(newest, newest_header):
            continue
        command = shlex.split(cc) + CFLAGS + flags_for(source, machine) + SANITIZERS[sanitize] + (["-Werror"] if werror else [])
        jobs.append(command + ["-I", str(HERE)] + (extra or []) + ["-c", str(source), "-o", str(obj)])
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for command, done in zip(jobs, pool.map(lambda c: subprocess.run(c, capture_output=True, text=True), jobs)):
            if done.returncode:
                raise SystemExit(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
            if done.stderr:
                sys.stderr.write(done.stderr)
    return objects


def link(target: Path, objects: list[Path], command: list[str], flags: list[str]) -> Path:
    """Link the target if an object is newer than it. A process that runs or loads it meanwhile finds the old one or the new one, whole."""
    if target.exists() and all(o.stat().st_mtime < target.stat().st_mtime for o in objects):
        return target
    new = target.with_name(f".{target.name}.{os.getpid()}")
    done = subprocess.run([*command, "-o", str(new), *map(str, objects), *flags], capture_output=True, text=True)
    if done.returncode:
        new.unlink(missing_ok=True)
        raise SystemExit(f"linking {target} failed\n{done.stdout}{done.stderr}")
    new.replace(target)
    return target


def link_shared(target: Path, objects: list[Path], flags: list[str], *, sanitize: str, cc: str | None) -> Path:
    """Link a shared library, named as its file, if an object is newer than it."""
    command = shlex.split(cc or compiler()) + LDFLAGS + SANITIZERS[sanitize] + [f"-Wl,-soname,{target.name}"]
    if sanitize:  # the runtime is not linked into shared objects: the program brings it
        command.remove("-Wl,-z,defs")
    return link(target, objects, command, flags + LIBS)


def build_library(out: Path, *, sanitize: str = "", werror: bool = False, cc: str | None = None) -> Path:
    """Build libhfreduce.so in `out` and return its path."""
    objects = compile_objects(out / "obj", sources(), sanitize=sanitize, werror=werror, cc=cc)
    return link_shared(out / "libhfreduce.so", objects, [], sanitize=sanitize, cc=cc)


def build_nccl(out: Path, *, sanitize: str = "", werror: bool = False, cc: str | None = None) -> Path:
    """Build libnccl.so.2 in `out`, beside the libhfreduce.so that it needs, and return its path."""
    core = build_library(out, sanitize=sanitize, werror=werror, cc=cc)
    objects = compile_objects(out / "obj", sorted(HERE.glob("nccl/*.c")), sanitize=sanitize, werror=werror, cc=cc)
    return link_shared(out / "libnccl.so.2", objects, [*NCCL_LDFLAGS, str(core)], sanitize=sanitize, cc=cc)


def build_program(out: Path, source: Path, *, sanitize: str = "", werror: bool = False, cc: str | None = None) -> Path:
    """Build one C test or tool, linked with the core's objects (private functions included), and return its path.

    A file x.c beside it whose header x.h it includes is compiled in too.
    """
    objects = compile_objects(out / "obj", sources(), sanitize=sanitize, werror=werror, cc=cc)
    beside = [source.parent / f"{name}.c" for name in re.findall(r'#include "(\w+)\.h"', source.read_text())]
    files = [source] + [helper for helper in beside if helper.exists()]
    includes = ["-I", str(source.parent), "-I", str(HERE / "include")]
    mine = compile_objects(out / "obj", files, sanitize=sanitize, werror=werror, cc=cc, extra=includes)
    return link(out / source.stem, mine + objects, shlex.split(cc or compiler()) + SANITIZERS[sanitize], LIBS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE.parent / "build" / "c", help="where objects and results go")
    parser.add_argument("--sanitize", choices=sorted(SANITIZERS), default="", help="build under a sanitizer")
    parser.add_argument("--werror", action="store_true", help="warnings are errors")
    parser.add_argument("--cc", help="compiler (default: $CC, else cc, gcc or clang)")
    parser.add_argument("programs", nargs="*", type=Path, help="C tests to build beside the library")
    args = parser.parse_args()
    out = args.out / (args.sanitize or "plain")
    print(build_library(out, sanitize=args.sanitize, werror=args.werror, cc=args.cc))
    print(build_nccl(out, sanitize=args.sanitize, werror=args.werror, cc=args.cc))
    for source in args.programs:
        print(build_program(out, source.resolve(), sanitize=args.sanitize, werror=args.werror, cc=args.cc))


if __name__ == "__main__":
    main()
