"""NCCL's C interface (csrc/nccl): names and layouts beside NVIDIA's own, and programs that use it, as ranks on host memory.

The programs in tests/nccl are compiled against NVIDIA's header where `tests/tools/nccl-fetch` has brought it, else against ours.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from programs import BUILD_LIMIT, ROOT, build, building, compiler, environment, need_compiler, need_sanitizer, shorten

PROGRAMS = ROOT / "tests" / "nccl"
NVIDIA = ROOT / "build" / "nccl" / "nvidia" / "nccl"
HEADERS = ["-I", str(PROGRAMS / "stub"), "-I", str(NVIDIA / "include" if NVIDIA.exists() else PROGRAMS / "own")]
VERSION = 23203
#: Seconds that the ranks of a program may run.
RUN_LIMIT = 60
OPTIONS = {
    "address": {"ASAN_OPTIONS": "detect_leaks=1:strict_string_checks=1", "UBSAN_OPTIONS": "print_stacktrace=1"},
    "thread": {"TSAN_OPTIONS": "second_deadlock_stack=1:history_size=4"},
}


def need_nvidia() -> Path:
    """Skip unless NVIDIA's header and library are there to be compared with; the directory of both."""
    if not NVIDIA.exists():
        pytest.skip(f"no {NVIDIA.relative_to(ROOT)}: tests/tools/nccl-fetch brings NVIDIA's header and library")
    return NVIDIA


def library(variant: str = "plain") -> Path:
    """Build libnccl.so.2 and return its path."""
    need_compiler()
    with building(variant) as out:
        path: Path = build.build_nccl(out, sanitize="" if variant == "plain" else variant)
    return path


def program(name: str, variant: str = "plain") -> Path:
    """Build tests/nccl/<name>.c, linked with libnccl.so.2, and return its path."""
    ours = library(variant)
    sanitize = "" if variant == "plain" else variant
    with building(variant) as out:
        source = PROGRAMS / f"{name}.c"
        objects = build.compile_objects(out / "obj", [source], sanitize=sanitize, werror=True, extra=HEADERS)
        command = [*compiler(), *build.SANITIZERS[sanitize]]
        target: Path = build.link(out / f"nccl_{name}", [*objects, ours], command, [f"-Wl,-rpath,{out}", *build.LIBS])
    return target


def run(nranks: int, command: list[str], variant: str = "plain", expect: int = 0, **env: str) -> str:
    """Run a program as ranks, or alone for 0 ranks, and return what it wrote."""
    launch = [sys.executable, "-m", "hfreduce", "run", "-n", str(nranks), "--timeout", str(RUN_LIMIT)] if nranks else []
    done = subprocess.run(
        [*launch, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=RUN_LIMIT + 20,
        env={k: v for k, v in environment().items() if not k.startswith("NCCL_")} | OPTIONS.get(variant, {}) | env,
    )
    if done.returncode != expect:
        pytest.fail(
            f"{shlex.join(command)} on {nranks} ranks ended with {done.returncode}\n{shorten(done.stdout)}", pytrace=False
        )
    return done.stdout


# --- beside NVIDIA's own ---


def exports(path: Path) -> dict[str, str]:
    """Type ("W": weak, "T": strong) of every symbol that a library exports, by name."""
    if shutil.which("nm") is None:
        pytest.skip("no nm on PATH")
    listed = subprocess.run(["nm", "-D", "--defined-only", str(path)], capture_output=True, text=True, check=True).stdout
    return {name: kind for _, kind, name in (line.split() for line in listed.splitlines())}


def declared() -> set[str]:
    """The public calls, as csrc/nccl/calls.h has them."""
    return set(re.findall(r"^HFR_NCCL_CALL\([^,]+, (nccl\w+),", (ROOT / "csrc/nccl/calls.h").read_text(), re.MULTILINE))


@pytest.mark.limit(BUILD_LIMIT)
def test_exports_are_the_public_calls_and_nothing_else() -> None:
    names = declared()
    assert len(names) == 96
    assert exports(library()) == dict.fromkeys(names, "W") | {f"p{n}": "T" for n in names}


@pytest.mark.limit(BUILD_LIMIT)
def test_exports_are_nvidias() -> None:
    theirs = exports(need_nvidia() / "lib" / "libnccl.so.2")
    theirs = {n: kind for n, kind in theirs.items() if re.match("p?nccl", n) and not n.endswith("Internal")}
    assert exports(library()) == theirs


@pytest.mark.limit(BUILD_LIMIT)
def test_library_is_named_and_finds_its_neighbour() -> None:
    if shutil.which("readelf") is None:
        pytest.skip("no readelf on PATH")
    listed = subprocess.run(["readelf", "-dV", str(library())], capture_output=True, text=True, check=True).stdout
    assert re.search(r"\(SONAME\).*\[libnccl\.so\.2\]", listed)
    assert re.search(r"\(RUNPATH\).*\[\$ORIGIN\]", listed)
    assert "(VERDEF)" not in listed  # no symbol versions of our own
    needed = set(re.findall(r"\(NEEDED\).*\[([^]]+)\]", listed))
    assert "libhfreduce.so" in needed
    assert not any("cuda" in n for n in needed)


def test_declarations_are_nvidias() -> None:
    need_compiler()
    need_nvidia()
    command = [
        *compiler(),
        "-std=gnu11",
        *HEADERS,
        "-fsyntax-only",
        str(PROGRAMS / "declarations.c"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr


def test_layouts_are_nvidias(tmp_path: Path) -> None:
    need_compiler()
    need_nvidia()
    outputs = []
    for name, flags in (("theirs", HEADERS), ("ours", ["-DOWN"])):
        target = tmp_path / name
        command = [*compiler(), "-std=gnu11", *flags, "-o", str(target), str(PROGRAMS / "layout.c")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert not done.returncode, done.stderr
        outputs.append(subprocess.run([str(target)], capture_output=True, text=True, check=True).stdout.splitlines())
    assert len(outputs[0]) > 140
    assert outputs[0] == outputs[1]


#: What libtorch_cuda of torch 2.15 imports. It is loaded with RTLD_NOW: one that is missing breaks `import torch`.
TORCH = """
    AllGather AllReduce AlltoAll Bcast Broadcast Gather Reduce ReduceScatter Send Recv PutSignal Signal WaitSignal CommAbort CommCount
    CommRegister CommDeregister CommDestroy CommFinalize CommGetAsyncError CommGetUniqueId CommGrow CommInitAll CommInitRank
    CommInitRankConfig CommInitRankScalable CommMemStats CommResume CommRevoke CommShrink CommSplit CommSuspend CommUserRank
    CommWindowRegister CommWindowDeregister DevCommCreate DevCommDestroy GetErrorString GetLastError GetLsaMultimemDevicePointer
    GetPeerDevicePointer GetUniqueId GetVersion GroupStart GroupEnd GroupSimulateEnd MemAlloc MemFree RedOpCreatePreMulSum RedOpDestroy
    WinGetUserPtr"""


@pytest.mark.limit(BUILD_LIMIT)
def test_exports_have_what_torch_imports() -> None:
    assert {f"nccl{name}" for name in TORCH.split()} <= exports(library()).keys()


# --- programs ---

CASES = [
    *[("plain", "collectives", n, mode) for n in (1, 2, 3, 4) for mode in ("blocking", "nonblocking")],
    *[("plain", "life", n, mode) for n in (2, 3, 4) for mode in ("blocking", "nonblocking")],
    *[("plain", "groups", 0, mode) for mode in ("blocking", "nonblocking")],
    *[("plain", "faults", 3, mode) for mode in ("kill", "kill-first", "abort", "flight", "leave")],
    ("plain", "arguments", 0, ""),
    ("address", "arguments", 0, ""),
    ("address", "collectives", 2, "blocking"),
    *[("address", "groups", 0, mode) for mode in ("blocking", "nonblocking")],
    ("address", "life", 3, "nonblocking"),
    ("address", "faults", 3, "kill"),
    ("thread", "collectives", 2, "nonblocking"),
    *[("thread", "groups", 0, mode) for mode in ("blocking", "nonblocking")],
    *[("thread", "faults", 3, mode) for mode in ("abort", "flight", "kill-first")],
]
#: What tests/nccl/arguments.c expects to find.
PARAMETERS = {"HFREDUCE_CHUNK": "64K", "HFREDUCE_SLOTS": "4", "NCCL_SOCKET_IFNAME": "lo0", "HFREDUCE_TIMEOUT": "12.5"}


@pytest.mark.limit(RUN_LIMIT + BUILD_LIMIT)
@pytest.mark.parametrize(("variant", "name", "nranks", "mode"), CASES, ids=lambda value: str(value))
def test_program(variant: str, name: str, nranks: int, mode: str, tmp_path: Path) -> None:
    if variant != "plain":
        need_sanitizer(variant, tmp_path)
    env = PARAMETERS if name == "arguments" else {}
    output = run(nranks, [str(program(name, variant)), mode], variant, **env)
    assert len(re.findall(r"^[1-9]\d* checks passed, 0 failed$", output, re.MULTILINE)) == max(nranks, 1), output


# --- in the place of NCCL ---

HFREDUCE = [sys.executable, "-m", "hfreduce"]


def test_exec_runs_a_python_program() -> None:
    """As vLLM binds it: by name, from whatever `libnccl.so.2` the process has."""
    output = run(0, [*HFREDUCE, "exec", *HFREDUCE, "run", "-n", "2", "--timeout", "30", str(PROGRAMS / "pynccl.py")])
    assert sorted(output.splitlines()) == [f"rank {r} of 2, version {VERSION}, sum 3" for r in range(2)]


@pytest.mark.skipif(importlib.util.find_spec("cupy_backends") is None, reason="CuPy is not installed")
@pytest.mark.parametrize("nranks", [2, 3])
@pytest.mark.limit(RUN_LIMIT + BUILD_LIMIT)
def test_exec_runs_cupys_own_module(nranks: int) -> None:
    command = [*HFREDUCE, "exec", *HFREDUCE, "run", "-n", str(nranks), "--timeout", "30", str(PROGRAMS / "cupys.py")]
    assert sorted(run(0, command).splitlines()) == [f"rank {r} of {nranks}, version {VERSION}" for r in range(nranks)]


@pytest.mark.limit(RUN_LIMIT + BUILD_LIMIT)
def test_exec_runs_a_program_that_was_linked_with_nccl(tmp_path: Path) -> None:
    """Linked with a libnccl.so.2 that is nowhere on its path: what is preloaded has the name that it asks for."""
    ours = library()
    target = tmp_path / "linked"
    command = [
        *compiler(),
        "-std=gnu11",
        *HEADERS,
        "-o",
        str(target),
        str(PROGRAMS / "collectives.c"),
    ]
    done = subprocess.run(
        [*command, "-Wl,--allow-shlib-undefined", str(ours), *build.LIBS], capture_output=True, text=True
    )  # no rpath
    assert not done.returncode, done.stderr
    alone = subprocess.run([str(target)], capture_output=True, text=True, env=environment(LD_LIBRARY_PATH=""))
    assert alone.returncode, "it must not find a library by itself"
    output = run(2, [*HFREDUCE, "exec", str(target)])
    assert len(re.findall(r"^\d+ checks passed, 0 failed$", output, re.MULTILINE)) == 2


def test_exec_keeps_other_preloads_and_refuses_what_is_not_there(tmp_path: Path) -> None:
    from hfreduce.cli.exec import nccl_library, preloaded

    ours = nccl_library()
    assert preloaded({}, ours)["LD_PRELOAD"] == ours
    assert preloaded({"LD_PRELOAD": "/a.so /b.so"}, ours)["LD_PRELOAD"] == f"{ours}:/a.so:/b.so"
    assert preloaded({"LD_PRELOAD": f"/a.so:{ours}"}, ours)["LD_PRELOAD"] == f"{ours}:/a.so"
    assert "not found" in run(0, [*HFREDUCE, "exec", str(tmp_path / "nothing")], expect=127)
    assert run(0, [*HFREDUCE, "exec", "sh", "-c", "exit 5"], expect=5) == ""


def test_config_and_info_name_the_library() -> None:
    path = run(0, [*HFREDUCE, "config", "--nccl"]).strip()
    assert Path(path).exists()
    assert run(0, [*HFREDUCE, "info"]).count(f"2.32.3 in {path}") == 1


#: Rank 0 of 2 joins alone, and gives up at once where the call does not wait for the other.
ALONE = """
import ctypes, sys
class Id(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_byte * 128)]
nccl, unique_id, comm = ctypes.CDLL(sys.argv[1]), Id(), ctypes.c_void_p()
nccl.ncclCommInitRank.argtypes = [ctypes.c_void_p, ctypes.c_int, Id, ctypes.c_int]
nccl.ncclCommAbort.argtypes = [ctypes.c_void_p]
assert nccl.ncclGetUniqueId(ctypes.byref(unique_id)) == 0
print(nccl.ncclCommInitRank(ctypes.byref(comm), 2, unique_id, 0), nccl.ncclCommAbort(comm) if comm else None)
"""


def test_the_environment_makes_communicators_non_blocking() -> None:
    from hfreduce.cli.exec import nccl_library

    command = [sys.executable, "-c", ALONE, nccl_library()]
    in_progress, timed_out = 7, re.compile(r"[1-9]\d* None|[1-9]\d* 0")
    assert run(0, command, NCCL_COMM_BLOCKING="0").split() == [str(in_progress), "0"]
    last = run(0, command, NCCL_COMM_BLOCKING="1", HFREDUCE_JOIN_TIMEOUT="1").splitlines()[-1]
    assert timed_out.fullmatch(last) and not last.startswith(str(in_progress)), last


#: Makes a communicator twice in a process that has another NCCL beside ours.
BESIDE = """
import ctypes, sys
class Id(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_byte * 128)]
ours, other = ctypes.CDLL(sys.argv[1]), ctypes.CDLL(sys.argv[2])
for _ in range(2):
    unique_id, comm = Id(), ctypes.c_void_p()
    assert ours.ncclGetUniqueId(ctypes.byref(unique_id)) == 0
    ours.ncclCommInitRank.argtypes = [ctypes.c_void_p, ctypes.c_int, Id, ctypes.c_int]
    assert ours.ncclCommInitRank(ctypes.byref(comm), 1, unique_id, 0) == 0
    assert ours.ncclCommDestroy(comm) == 0
"""


@pytest.mark.parametrize("whose", ["a stand-in's", "nvidia's"])
def test_another_nccl_is_named_once(tmp_path: Path, whose: str) -> None:
    if whose == "nvidia's":
        other, version = need_nvidia() / "lib" / "libnccl.so.2", "2.32.3"
    else:
        need_compiler()
        source, other, version = tmp_path / "other.c", tmp_path / "libother.so", "2.21.5"
        source.write_text("int ncclGetVersion(int *version) { return *version = 22105, 0; }\n")
        subprocess.run([*compiler(), "-shared", "-fPIC", "-o", str(other), str(source)], check=True, timeout=60)
    ours = run(0, [*HFREDUCE, "config", "--nccl"]).strip()
    output = run(0, [sys.executable, "-c", BESIDE, ours, str(other)])
    assert output.count("another NCCL is in this process") == 1
    assert f"{other} (version {version})" in output
    assert run(0, [sys.executable, "-c", BESIDE, ours, ours]) == ""  # ours twice is no other


def test_variables_without_a_meaning_are_named(tmp_path: Path) -> None:
    ours = run(0, [*HFREDUCE, "config", "--nccl"]).strip()
    command = [sys.executable, "-c", BESIDE, ours, ours]
    output = run(0, command, NCCL_DEBUG="INFO", NCCL_ALGO="Ring", NCCL_NTHREADS="64", NCCL_SOCKET_FAMILY="AF_INET")
    (line,) = (line for line in output.splitlines() if "without a meaning" in line)
    assert "NCCL_ALGO" in line and "NCCL_NTHREADS" in line and "NCCL_SOCKET" not in line and "NCCL_DEBUG" not in line
    log = tmp_path / "log"
    assert run(0, command, NCCL_DEBUG="INFO", NCCL_DEBUG_FILE=str(log)) == ""
    assert "communicator" in log.read_text()
    assert "in the place of NCCL 2.32.3" in run(0, command, NCCL_DEBUG="VERSION")
