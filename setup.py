"""Build libhfreduce.so and libnccl.so.2 (through csrc/build.py) and the cffi module hfreduce._core linked to it; the rest is in pyproject.toml."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

from cffi import FFI
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
HEADER = ROOT / "csrc" / "include" / "hfreduce.h"
SHORT_WAYS = [ROOT / "csrc" / "python" / name for name in ("ndarray.h", "tensor.h")]
SHIM = ROOT / "csrc" / "torch" / "shim.cpp"


def core_build() -> ModuleType:
    """csrc/build.py: the one list of sources and flags."""
    spec = importlib.util.spec_from_file_location("hfreduce_core_build", ROOT / "csrc" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def declarations(header: Path) -> str:
    """What cffi reads: a header between its two marks."""
    text = header.read_text()
    match = re.search(r"\[cffi begin\].*?\n(.*?)^/\*[^\n]*\[cffi end\]", text, re.DOTALL | re.MULTILINE)
    if not match:
        raise SystemExit(f"{header}: the [cffi begin] and [cffi end] marks are missing")
    return match.group(1)


def need_python_headers() -> None:
    """End with one line where Python.h is missing: the compiler's own message would stand in the middle of a page."""
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists():
        raise SystemExit(
            f"hfreduce needs the headers of this Python, and {header} is not there: install them (Debian, Ubuntu: apt-get install python3-dev; "
            "Fedora, RHEL: dnf install python3-devel)"
        )


class BuildCore(build_ext):
    """Build the C library first, then the module; put both and the header into the package."""

    def run(self) -> None:
        build = core_build()
        cc = build.compiler()
        os.environ["CC"] = cc  # the cffi module, too, which setuptools would compile with what Python itself was built with
        need_python_headers()
        werror = os.environ.get("HFREDUCE_WERROR", "") not in ("", "0")
        out = ROOT / "build" / "core" / (re.sub(r"\W+", "-", cc) + ("-werror" if werror else ""))
        self.library = build.build_library(out, werror=werror, cc=cc)
        self.nccl = build.build_nccl(out, werror=werror, cc=cc)

        generated = Path(self.build_temp) / "_core.c"
        generated.parent.mkdir(parents=True, exist_ok=True)
        ffi = FFI()
        ffi.cdef("".join(declarations(header) for header in (HEADER, *SHORT_WAYS)))
        ffi.cdef('extern "Python" int hfr_python_interrupted(void *);')  # hfreduce/waiting.py
        ffi.set_source("hfreduce._core", "".join(f"#include <{header.name}>\n" for header in SHORT_WAYS))
        ffi.emit_c_code(str(generated))
        (extension,) = self.extensions
        extension.sources = [str(generated)]
        extension.include_dirs = [str(HEADER.parent), str(SHORT_WAYS[0].parent)]
        extension.library_dirs = [str(self.library.parent)]
        extension.extra_compile_args = ["-Werror"] if werror else []
        super().run()
        for source, target in self.companions():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)  # a new inode: a running process keeps the library that it has mapped
            shutil.copy2(source, target)
        # The name that linkers look for (-lnccl). Wheels cannot hold links: there it is a copy, whose name within is libnccl.so.2 as well.
        link = self.folder() / "lib" / "libnccl.so"
        link.unlink(missing_ok=True)
        link.symlink_to(self.nccl.name)

    def folder(self) -> Path:
        """Where the package is put together: its place in the tree, or the build's."""
        return ROOT / "hfreduce" if self.inplace else Path(self.build_lib) / "hfreduce"

    def companions(self) -> list[tuple[Path, Path]]:
        """(from, to) of the files that go beside the module. In place header and shim stay where they are; the package knows."""
        package = self.folder()
        files = [(library, package / "lib" / library.name) for library in (self.library, self.nccl)]
        if not self.inplace:
            files.append((HEADER, package / "include" / "hfreduce.h"))
            files.append((SHIM, package / "torch" / "shim.cpp"))  # compiled by the user, against the torch that he has
        return files

    def get_outputs(self) -> list[str]:
        outputs = super().get_outputs()
        if not self.inplace:
            outputs += [str(target) for _, target in self.companions()] + [str(self.folder() / "lib" / "libnccl.so")]
        return outputs


if __name__ == "__main__":
    if not sys.platform.startswith("linux"):
        raise SystemExit("hfreduce builds on Linux only: it needs memfd, futexes and pidfds")
    setup(
        ext_modules=[Extension("hfreduce._core", sources=[], libraries=["hfreduce"], extra_link_args=["-Wl,-rpath,$ORIGIN/lib"])],
        cmdclass={"build_ext": BuildCore},
    )
