"""The optional C++ shim: through it torch's C++ can use a process group written in Python in full. `python -m hfreduce.torch.shim`.

Built for one torch and one Python, into a cache; without it the process group works, with the gaps that its documentation lists.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

#: The command that builds it, for messages.
COMMAND = "python -m hfreduce.torch.shim build"
NAME = "hfreduce.torch._shim"
_FILE = "_shim" + str(sysconfig.get_config_var("EXT_SUFFIX") or ".so")

_loaded: ModuleType | None = None
_tried = False


def source() -> Path | None:
    """The C++ source: beside this file in an installed package, else in the source tree. None if it is in neither."""
    here = Path(__file__).resolve().parent
    for path in (here / "shim.cpp", here.parent.parent / "csrc" / "torch" / "shim.cpp"):
        if path.is_file():
            return path
    return None


def cache() -> Path:
    """The directory of built shims: XDG_CACHE_HOME/hfreduce/torch-shim, by default under ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "hfreduce" / "torch-shim"


def _key(torch: Any, text: bytes) -> str:
    """What a built shim is good for: this torch, this Python, this source."""
    python = f"{sys.implementation.cache_tag}{getattr(sys, 'abiflags', '')}-{os.uname().machine}"
    return f"torch-{torch.__version__}-{python}-{hashlib.sha256(text).hexdigest()[:12]}"


def target() -> Path:
    """Where the shim for the installed torch is, or would be. Raises ImportError without torch, FileNotFoundError without the source."""
    import torch

    path = source()
    if path is None:
        raise FileNotFoundError("shim.cpp, the shim's source, is not in this installation of hfreduce")
    return cache() / _key(torch, path.read_bytes()) / _FILE


def others() -> list[str]:
    """The torch versions for which a shim was built in the cache."""
    return sorted(
        {match[1] for path in cache().glob(f"torch-*/{_FILE}") if (match := re.match(r"torch-(.+?)-", path.parent.name))}
    )


def _setting() -> str:
    value = os.environ.get("HFREDUCE_TORCH_SHIM", "")
    if value not in ("", "0", "1"):
        warnings.warn(f"HFREDUCE_TORCH_SHIM={value}: expected 0 (never use the shim), 1 (insist on it) or nothing", stacklevel=3)
        return ""
    return value


def compiler() -> list[str] | None:
    """The C++ compiler's command: CXX, else the first of c++, g++, clang++. None if there is none."""
    for command in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    return None


def _command(torch: Any, cxx: Sequence[str], text: Path, out: Path) -> list[str]:
    from torch.utils import cpp_extension

    # The language of torch's own headers, which it gives to extensions that it builds.
    standards = re.findall(r"-std=c\+\+(\d\d)\b", Path(cpp_extension.__file__).read_text(encoding="utf-8"))
    # pybind11 exchanges types only between modules that agree on these, where they are not found by itself.
    pybind = [
        f'-DPYBIND11_{name}="{value}"'
        for name in ("COMPILER_TYPE", "STDLIB", "BUILD_ABI")
        if (value := getattr(torch._C, f"_PYBIND11_{name}", None)) is not None
    ]
    folders = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    return [
        *cxx,
        f"-std=c++{max(standards, default='17')}",
        *"-O2 -g0 -fPIC -shared -fvisibility=hidden -w".split(),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
        *pybind,
        *(word for folder in folders for word in ("-isystem", folder)),
        str(text),
        "-o",
        str(out),
        *(f"-L{folder}" for folder in cpp_extension.library_paths()),
        *"-lc10 -ltorch_cpu -ltorch -ltorch_python".split(),
    ]


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process at a time build, where the file system has locks; others then find the shim built."""
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass
        yield


# What two ranks do with a new shim: arguments are the shim, a FileStore's path and the rank.
_SELF_TEST = """
import datetime, sys
import torch, torch.distributed as dist
from hfreduce.torch import shim
shim.use(sys.argv[1])
import hfreduce.torch
limit = datetime.timedelta(seconds=100)
dist.init_process_group("hfreduce", store=dist.FileStore(sys.argv[2], 2), rank=int(sys.argv[3]), world_size=2, timeout=limit)
mine = torch.full((5,), float(sys.argv[3]) + 1)
dist.all_reduce(mine)
assert mine.tolist() == [3.0] * 5, f"all_reduce gave {mine.tolist()} instead of 3 everywhere"
work = dist.all_reduce(mine, async_op=True)
value = work.get_future().wait()
assert mine.tolist() == [6.0] * 5, f"all_reduce gave {mine.tolist()} instead of 6 everywhere"
dist.barrier()
dist.destroy_process_group()
"""
_SELF_TEST_LIMIT = 150.0


def _self_test(made: Path) -> str:
    """Try a shim with two ranks, each a process of its own, so that one that crashes or hangs does no harm. "" or what went wrong."""
    folder = str(made.parent)
    parent = str(Path(__file__).resolve().parent.parent.parent)  # of the package hfreduce
    path = os.pathsep.join(filter(None, [parent, os.environ.get("PYTHONPATH", "")]))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HFREDUCE_TORCH_SHIM": "1", "HFREDUCE_ADDR": ""}
    outputs = [open(f"{folder}/output-{rank}", "w+") for rank in range(2)]  # noqa: SIM115 (a pipe that nobody reads could fill up)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _SELF_TEST, str(made), f"{folder}/store", str(rank)],
            env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )
        for rank, output in enumerate(outputs)
    ]  # fmt: skip
    end = time.monotonic() + _SELF_TEST_LIMIT
    said = []
    for rank, process in enumerate(ranks):
        try:
            code: int | str = process.wait(max(0.0, end - time.monotonic()))
            how = f"ended with status {code}"
        except subprocess.TimeoutExpired:
            how = f"had not ended after {_SELF_TEST_LIMIT:g} s"
            code = how
        if code:
            end = min(end, time.monotonic() + 5.0)  # the other rank then need not be waited for
            outputs[rank].seek(0)
            said.append(f"rank {rank} {how}: {outputs[rank].read()[-2000:].strip()}")
    for process, output in zip(ranks, outputs):
        if process.poll() is None:
            process.kill()
            process.wait()
        output.close()
    return "\n".join(said)


def _why_not(path: Path) -> Path:
    """The file beside a shim's place that says why there is none: its self-test failed."""
    return path.with_name("failed")


def build(*, force: bool = False) -> Path:
    """Compile the shim for the installed torch, unless it is there; return its path. Takes about half a minute.

    Two ranks try it before it is put in place; a shim that fails, and one that was there before, are removed. Raises ImportError
    without torch, FileNotFoundError without source or compiler, RuntimeError with the words of the compiler, the loader or the
    ranks if it fails. Several processes may call it at once.
    """
    import torch

    path, text = target(), source()
    assert text is not None
    cxx = compiler()
    if cxx is None:
        raise FileNotFoundError("no C++ compiler was found (CXX, c++, g++, clang++)")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _alone(path.parent):
        if path.exists() and not force:
            return path
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
            made = Path(folder) / _FILE
            command = _command(torch, cxx, text, made)
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"the shim did not compile:\n{shlex.join(command)}\n{done.stdout}{done.stderr}")
            wrong = _self_test(made)
            if wrong:
                path.unlink(missing_ok=True)
                _why_not(path).write_text(wrong)
                raise RuntimeError(f"the shim was built, fails its self-test and is not used:\n{wrong}")
            _why_not(path).unlink(missing_ok=True)
            os.replace(made, path)  # at once whole: a rank that loads meanwhile sees the old one or the new one
    return path


def load() -> Any:
    """Import the shim if it was built for this torch and this Python; None otherwise, with a warning if it should have worked.

    HFREDUCE_TORCH_SHIM=0: None. =1: ImportError instead of None. Does not build.
    """
    global _loaded, _tried
    setting = _setting()
    if setting == "0":
        return None
    if not _tried:
        _tried, reason = True, ""
        try:
            path = target()
            if path.exists():
                _loaded = _import(path)
            elif others():
                reason = f"hfreduce's torch shim was built for torch {', '.join(others())}, and not for the installed one"
        except (ImportError, OSError) as error:
            reason = f"hfreduce's torch shim cannot be loaded ({error})"
        if reason and setting != "1":
            warnings.warn(f"{reason}; going on without it. To build it again: {COMMAND} --force", stacklevel=2)
    if _loaded is None and setting == "1":
        raise ImportError(f"HFREDUCE_TORCH_SHIM=1, and hfreduce's torch shim is not there: {state()['reason']}")
    return _loaded


def use(path: str) -> None:
    """Have this process use the shim in a file. For the self-test; ImportError if it is not for this torch."""
    global _loaded, _tried
    _loaded, _tried = _import(Path(path)), True


def _import(path: Path) -> ModuleType:
    import torch

    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not re.match(re.escape(module.TORCH) + r"(\D|$)", torch.__version__):
        raise ImportError(f"{path} was built for torch {module.TORCH}, and torch {torch.__version__} is installed")
    return module


def state() -> dict[str, Any]:
    """What is known of the shim: built, path, torch, compiler, others (torch versions in the cache), reason (why it is not in use, or "")."""
    result: dict[str, Any] = {
        "built": False,
        "path": None,
        "torch": None,
        "compiler": compiler(),
        "others": others(),
        "reason": "",
    }
    try:
        import torch

        result["torch"] = str(torch.__version__)
        result["path"] = target()
        result["built"] = result["path"].exists()
    except (ImportError, OSError) as error:
        result["reason"] = str(error)
        return result
    if not result["built"]:
        how = COMMAND if result["compiler"] else f"install a C++ compiler, then {COMMAND}"
        result["reason"] = f"it was not built for torch {result['torch']}; to build it: {how}"
        if _why_not(result["path"]).exists():
            wrong = _why_not(result["path"]).read_text().strip().splitlines()
            result["reason"] = (
                f"it was built for torch {result['torch']}, failed its self-test and was removed: {wrong[-1] if wrong else ''}"
            )
    elif _setting() == "0":
        result["reason"] = "HFREDUCE_TORCH_SHIM=0"
    else:
        try:
            _loaded or _import(result["path"])
        except (ImportError, OSError) as error:
            result["reason"] = f"it cannot be loaded ({error}); to build it again: {COMMAND} --force"
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the shim, or say what is known of it; the command line. Returns the exit status."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m hfreduce.torch.shim", description="The optional C++ shim for torch.")
    commands = parser.add_subparsers(dest="command")
    maker = commands.add_parser("build", help="compile it for the installed torch (about half a minute)")
    maker.add_argument("--force", action="store_true", help="also if it is there")
    commands.add_parser("state", help="say whether it is built, for what and where (the default)")
    chosen = parser.parse_args(arguments)
    if chosen.command == "build":
        try:
            print(build(force=chosen.force))
        except (ImportError, OSError, RuntimeError) as error:
            print(f"hfreduce: {error}", file=sys.stderr)
            return 1
        return 0
    found = state()
    print(f"torch      {found['torch'] or 'not installed'}")
    print(f"compiler   {shlex.join(found['compiler'] or []) or 'none'}")
    where = f", {found['path']}" if found["path"] else ""
    print(f"shim       {'built' if found['built'] else 'not built'}{where}")
    if found["others"]:
        print(f"in cache   for torch {', '.join(found['others'])}")
    print(f"in use     {'yes' if not found['reason'] else 'no: ' + found['reason']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
