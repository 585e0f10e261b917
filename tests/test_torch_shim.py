"""The optional C++ shim for torch: how it is built and found, and that torch's C++ reaches a Python backend and its works through it.

The backend here is a toy that delegates to Gloo, so that what fails is the shim.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
import threading
import traceback
import warnings
import weakref
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

if importlib.util.find_spec("torch") is None:
    pytest.skip("torch is not installed", allow_module_level=True)

from hfreduce.torch import shim

# The first test of each fixture compiles, or runs all that the ranks do.
pytestmark = pytest.mark.limit(300)
SHARED = True  # the built shim

# --- building and finding ---


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An XDG_CACHE_HOME with the shim built in it."""
    if shim.compiler() is None:
        pytest.skip("no C++ compiler was found")
    folder = tmp_path_factory.mktemp("cache")
    done = python("-m", "hfreduce.torch.shim", "build", cache=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty XDG_CACHE_HOME, nothing loaded and nothing set."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("HFREDUCE_TORCH_SHIM", raising=False)
    monkeypatch.setattr(shim, "_loaded", None)
    monkeypatch.setattr(shim, "_tried", False)
    return tmp_path


def python(*arguments: str, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python process with that cache."""
    env = {k: v for k, v in os.environ.items() if k != "HFREDUCE_TORCH_SHIM"}
    env |= {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(Path(__file__).parent), **environment}
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=280)


def built(cache: Path) -> list[Path]:
    return sorted(cache.rglob("_shim*.so"))


def test_build_puts_one_file_into_the_cache(cache: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    (path,) = built(cache)
    assert path.is_relative_to(cache / "hfreduce" / "torch-shim")
    assert not list(cache.rglob(".build-*"))
    changed = path.stat().st_mtime_ns
    assert shim.build() == path and path.stat().st_mtime_ns == changed


def test_state_says_what_is_there(cache: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import torch

    assert shim.main([]) == 0
    absent = capsys.readouterr().out
    assert "not built" in absent and f"to build it: {shim.COMMAND}" in absent
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    assert shim.main(["state"]) == 0
    there = capsys.readouterr().out
    assert "in use     yes" in there and torch.__version__ in there and str(built(cache)[0]) in there
    monkeypatch.setenv("HFREDUCE_TORCH_SHIM", "0")
    shim.main([])
    assert "no: HFREDUCE_TORCH_SHIM=0" in capsys.readouterr().out


@pytest.mark.parametrize(("setting", "there", "result"), [("", 1, 1), ("1", 1, 1), ("0", 1, 0), ("", 0, 0), ("1", 0, None)])
def test_load_obeys_the_environment(
    cache: Path, home: Path, monkeypatch: pytest.MonkeyPatch, setting: str, there: int, result: int | None
) -> None:
    if there:
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("HFREDUCE_TORCH_SHIM", setting)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if result is None:
            with pytest.raises(ImportError, match=f"HFREDUCE_TORCH_SHIM=1.*{shim.COMMAND}"):
                shim.load()
        else:
            assert (shim.load() is not None) == bool(result)


def test_a_shim_of_another_torch_warns_once(home: Path) -> None:
    other = home / "hfreduce" / "torch-shim" / "torch-1.2.3-cpython-30-x86_64-00" / shim.target().name
    other.parent.mkdir(parents=True)
    other.touch()
    with pytest.warns(UserWarning, match=rf"1\.2\.3.*{shim.COMMAND}") as seen:
        assert shim.load() is None
    assert len(seen) == 1 and seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert shim.load() is None


def test_a_damaged_shim_warns_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shim.target()
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no library")
    with pytest.warns(UserWarning, match=f"cannot be loaded.*{shim.COMMAND} --force"):
        assert shim.load() is None
    monkeypatch.setenv("HFREDUCE_TORCH_SHIM", "1")
    with pytest.raises(ImportError, match="cannot be loaded"):
        shim.load()


def stand_in(folder: Path, script: str) -> str:
    """A compiler, for CXX, that notes each call and then runs a shell script; $out is the file to make."""
    path = folder / "cxx"
    path.write_text(
        f'#!/bin/sh\necho call >>"{folder}/calls"\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done\n{script}\n'
    )
    path.chmod(0o755)
    return str(path)


def test_ranks_that_build_at_once_compile_once(cache: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", stand_in(home, f'sleep 0.5; cp "{built(cache)[0]}" "$out"'))
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(shim.build())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [shim.target()] * 3
    assert (home / "calls").read_text().count("call") == 1
    assert shim.main(["build", "--force"]) == 0
    assert (home / "calls").read_text().count("call") == 2


@pytest.mark.parametrize(
    ("script", "words"),
    [("echo 'error: strange header' >&2; exit 1", "strange header"), ('echo no library >"$out"', "fails its self-test")],
)
def test_a_build_that_fails_says_why_and_leaves_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, script: str, words: str
) -> None:
    monkeypatch.setenv("CXX", stand_in(home, script))
    assert shim.main(["build"]) == 1
    assert words in capsys.readouterr().err
    assert not built(home) and not list(home.rglob(".build-*"))


#: A Python extension that loads and is no shim: it has nothing but a torch version.
_NO_SHIM = """
#include <Python.h>
static struct PyModuleDef def = {PyModuleDef_HEAD_INIT, "_shim", NULL, -1, NULL};
PyMODINIT_FUNC PyInit__shim(void) {
  PyObject *m = PyModule_Create(&def);
  PyModule_AddStringConstant(m, "TORCH", "%s");
  return m;
}
"""


def no_shim(folder: Path, version: str) -> Path:
    """An extension of _NO_SHIM's, compiled."""
    cxx = shim.compiler()
    if cxx is None:
        pytest.skip("no C++ compiler was found")
    source, made = folder / "no_shim.c", folder / "no_shim.so"
    source.write_text(_NO_SHIM % version)
    include = sysconfig.get_path("include")
    subprocess.run([*cxx, "-x", "c++", "-shared", "-fPIC", f"-I{include}", str(source), "-o", str(made)], check=True)
    return made


def test_a_shim_that_fails_its_self_test_is_removed(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import torch

    made = no_shim(home, torch.__version__.split("+")[0])
    monkeypatch.setenv("CXX", stand_in(home, f'cp "{made}" "$out"'))
    path = shim.target()
    path.parent.mkdir(parents=True)
    path.write_bytes(made.read_bytes())  # one that was there before must go, too
    assert shim.main(["build", "--force"]) == 1
    said = capsys.readouterr().err
    assert "self-test" in said and "rank 0" in said and "'Backend'" in said, said
    assert not built(home) and not list(home.rglob(".build-*"))
    shim.main([])
    assert "failed its self-test and was removed" in capsys.readouterr().out
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert shim.load() is None


def test_a_shim_of_another_torch_is_not_taken(home: Path) -> None:
    path = shim.target()
    path.parent.mkdir(parents=True)
    path.write_bytes(no_shim(home, "1.2.3").read_bytes())
    with pytest.warns(UserWarning, match=r"built for torch 1\.2\.3, and torch"):
        assert shim.load() is None
    assert "1.2.3" in shim.state()["reason"]


def test_without_a_compiler_the_build_says_so(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(home))
    assert shim.main(["build"]) == 1
    assert "no C++ compiler" in capsys.readouterr().err


def test_cache_is_where_xdg_says(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shim.cache() == home / "hfreduce" / "torch-shim"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the specification
    monkeypatch.setenv("HOME", str(home))
    assert shim.cache() == home / ".cache" / "hfreduce" / "torch-shim"


# --- the toy ---


class Refused(RuntimeError):
    """What the toy raises."""


def toy_class() -> Any:
    """The toy's class; made late, for it needs the shim of this process's cache."""
    import torch.distributed as dist

    native = shim.load()
    assert native is not None, shim.state()

    class Work:  # none of torch's: the shim has to forward every method
        def __init__(self, gloo: Any, tensors: Any, backend: Any) -> None:
            self.gloo, self.tensors, self.future = gloo, tensors, None
            self.error: BaseException | None = None
            self.sequence = backend.sequence
            self.timeouts: list[Any] = []
            backend.last = weakref.ref(self)

        def wait(self, *timeout: timedelta) -> bool:
            self.timeouts.append(timeout)
            if self.error is None:
                self.gloo.wait()
            return True

        def is_completed(self) -> bool:
            return bool(self.gloo.is_completed())

        def is_success(self) -> bool:
            return self.error is None

        def exception(self) -> Any:
            return self.error

        def result(self) -> Any:
            return self.tensors

        def source_rank(self) -> int:
            return 41

        def get_future(self) -> Any:
            if self.future is None:
                self.future = native.make_future()
                threading.Thread(target=self.complete).start()
            return self.future

        def complete(self) -> None:
            self.gloo.wait()
            native.complete(self.future, self.tensors)

    class All:  # several works as one
        def __init__(self, works: list[Any]) -> None:
            self.works = works

        def wait(self) -> bool:
            return all(work.wait() for work in self.works)

        def is_completed(self) -> bool:
            return all(work.is_completed() for work in self.works)

    def flat(x: Any) -> Any:
        return [t for part in x for t in flat(part)] if isinstance(x, (list, tuple)) else [x]

    class Toy(native.Backend):  # type: ignore[name-defined, misc]
        supports_coalescing = True

        def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
            super().__init__(rank, size)
            self.gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
            self.calls: list[str] = []
            self.sequence = 0
            self.batch: list[Any] | None = None
            self.last: Any = None

        def getBackendName(self) -> str:
            return "toy"

        def abort(self) -> None:
            self.calls.append("abort")

        def shutdown(self) -> None:
            self.calls.append("shutdown")

        def set_timeout(self, timeout: timedelta) -> None:
            self.calls.append(f"set_timeout {timeout.total_seconds():g}")

        def monitored_barrier(self, opts: Any, wait_all_ranks: bool = False) -> None:
            self.calls.append(f"monitored_barrier {wait_all_ranks}")

        def start_coalescing(self) -> None:
            self.batch = []

        def end_coalescing(self) -> Any:
            batch, self.batch = self.batch, None
            assert batch is not None
            self.calls.append(f"coalesced {len(batch)}")
            return Work(All(batch), [], self)

        def _set_sequence_number_for_group(self) -> None:
            self.sequence = 100

        def _get_sequence_number_for_group(self) -> int:
            return self.sequence

        def allgather_into_tensor_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
            self.calls.append("allgather_into_tensor_coalesced")
            works = [self.gloo._allgather_base(out, x, opts) for out, x in zip(outputs, inputs)]
            return Work(All(works), outputs, self)

        def reduce_scatter_tensor_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
            self.calls.append("reduce_scatter_tensor_coalesced")
            works = [self.gloo._reduce_scatter_base(out, x, opts) for out, x in zip(outputs, inputs)]
            return Work(All(works), outputs, self)

    def operation(name: str) -> Any:
        def issue(self: Any, *arguments: Any) -> Any:
            self.calls.append(name)
            if name == "barrier" and self.calls.count("barrier") > 1:
                raise Refused("one barrier is enough")
            self.sequence += 1
            work = Work(getattr(self.gloo, name)(*arguments), flat(arguments[0]) if name != "barrier" else [], self)
            if self.batch is not None:
                self.batch.append(work)
            return work

        return issue

    for name in (
        "broadcast allreduce allreduce_coalesced reduce allgather _allgather_base gather scatter reduce_scatter "
        "_reduce_scatter_base alltoall_base alltoall send recv recv_anysource barrier"
    ).split():
        setattr(Toy, name, operation(name))
    return Toy


def register() -> Any:
    """Register the toy with torch, once a process; its class."""
    import torch.distributed as dist

    if "TOY" not in dist.Backend._plugins:
        dist.Backend.register_backend("toy", toy_class(), devices=["cpu", "cuda"])
    return dist.Backend._plugins["TOY"].creator_fn


@contextlib.contextmanager
def toy_group(rank: int, nranks: int, path: str, backend: str = "toy") -> Iterator[Any]:
    """A default group of the toy; gives its backend."""
    import torch
    import torch.distributed as dist

    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", UserWarning)
    register()
    store = dist.FileStore(path, nranks)
    dist.init_process_group(backend, rank=rank, world_size=nranks, store=store, timeout=timedelta(seconds=20))
    try:
        yield dist.group.WORLD._get_backend(torch.device("cuda" if "," in backend else "cpu"))
    finally:
        dist.destroy_process_group()


def all_functions(rank: int, n: int, folder: str, names: list[str]) -> dict[str, Any]:
    """Call the module's functions in turn, each with a store of its own: {name: (value, traceback)}."""
    said = {}
    for name in names:
        function, _, argument = name.partition(":")
        try:
            arguments = [argument] if argument else []
            said[name] = (globals()[function](rank, n, f"{folder}/{name}", *arguments), "")
        except BaseException:
            said[name] = (None, traceback.format_exc())
    return said


@pytest.fixture(scope="module")
def said(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """said(function): its values by rank. All functions ran in one launch, since to start torch takes seconds."""
    env = {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1", "HFREDUCE_TORCH_SHIM": "1"}
    folder = str(tmp_path_factory.mktemp("stores"))
    by_rank = run_ranks(all_functions, 2, 2, folder, ON_RANKS, comm=False, timeout=280.0, env=env)

    def values(name: str) -> list[Any]:
        for rank, outcome in enumerate(by_rank):
            assert not outcome[name][1], f"rank {rank}: {outcome[name][1]}"
        return [outcome[name][0] for outcome in by_rank]

    return values


# --- operations ---


def every_operation(rank: int, n: int, path: str) -> list[str]:
    import torch
    import torch.distributed as dist

    with toy_group(rank, n, path) as backend:
        mine = torch.full((4,), float(rank + 1))
        total = float(sum(range(1, n + 1)))
        parts = [torch.full((4,), float(r + 1)) for r in range(n)]

        x = mine.clone()
        assert dist.all_reduce(x) is None
        assert (x == total).all()
        y = [mine.clone(), mine.clone()]
        dist.all_reduce_coalesced(y)
        assert (y[1] == total).all()
        x = mine.clone()
        dist.broadcast(x, 1)
        assert (x == 2).all()
        x = mine.clone()
        dist.reduce(x, 0)
        assert rank or (x == total).all()
        out = [torch.zeros(4) for _ in range(n)]
        dist.all_gather(out, mine)
        assert all(map(torch.equal, out, parts))
        flat = torch.zeros(4 * n)
        dist.all_gather_into_tensor(flat, mine)
        assert torch.equal(flat, torch.cat(parts))
        out = [torch.zeros(4) for _ in range(n)]
        dist.gather(mine, out if rank == 0 else None)
        assert rank or all(map(torch.equal, out, parts))
        dist.scatter(x, parts if rank == 0 else None)
        assert (x == rank + 1).all()
        dist.reduce_scatter(x, [mine] * n)
        assert (x == total).all()
        x.zero_()
        dist.reduce_scatter_tensor(x, mine.repeat(n))
        assert (x == total).all()
        out = [torch.zeros(4) for _ in range(n)]
        dist.all_to_all(out, [mine * (p + 1) for p in range(n)])
        assert all(torch.equal(o, part * (rank + 1)) for o, part in zip(out, parts))
        flat = torch.zeros(n)
        dist.all_to_all_single(flat, torch.arange(float(n)) + 10 * rank)
        assert torch.equal(flat, torch.arange(float(n)) * 10 + rank)
        if rank == 0:
            dist.send(mine, 1, tag=3)
            x.zero_()
            assert dist.recv(x) == 41
        else:
            dist.recv(x, 0, tag=3)
            dist.send(mine, 0)
        assert (x == 2 - rank).all()
        dist.barrier()
        dist.group.WORLD.monitored_barrier(timedelta(seconds=3), True)
        with pytest.raises(Refused, match="one barrier"):  # the very class, through C++
            dist.barrier()
        with pytest.raises(RuntimeError, match="Backend toy does not support allgather_coalesced"):
            dist.group.WORLD.allgather_coalesced([[x] for _ in range(n)], [mine])
        dist.group.WORLD.set_timeout(timedelta(seconds=7))
        return list(backend.calls)


def test_every_operation_reaches_python(said: Any) -> None:
    calls = said("every_operation")
    assert calls[1][:16] == (
        "allreduce allreduce_coalesced broadcast reduce allgather _allgather_base gather scatter reduce_scatter "
        "_reduce_scatter_base alltoall alltoall_base recv send barrier"
    ).split() + ["monitored_barrier True"]
    assert "recv_anysource" in calls[0] and calls[0][-1] == "set_timeout 7"


def works_and_futures(rank: int, n: int, path: str) -> None:
    import torch
    import torch.distributed as dist

    native = shim.load()
    with toy_group(rank, n, path) as backend:
        x = torch.ones(3)
        work = dist.all_reduce(x, async_op=True)
        inner = backend.last()
        assert isinstance(work, dist.Work) and inner is not None
        assert work.get_future().wait()[0].data_ptr() == x.data_ptr()
        assert work.wait() is True and work.wait(timedelta(seconds=5)) is True
        assert inner.timeouts == [(), (timedelta(seconds=5),)]
        assert work.is_completed() and work.is_success() and work.exception() is None
        assert work.result()[0] is x
        assert work.source_rank() == 41
        work.synchronize()  # the toy has none: torch's own, which does nothing
        inner.error = Refused("broken")
        assert not work.is_success()
        assert isinstance(work.exception(), Refused)
        seen = weakref.ref(inner)
        del inner, work
        gc.collect()
        assert seen() is None, "a work outlives its owner"

    future = native.make_future()
    chained = future.then(lambda f: f.value()[0] + 1)
    called: list[Any] = []
    future.add_done_callback(lambda f: called.append(threading.current_thread()))
    assert not future.done()
    thread = threading.Thread(target=native.complete, args=(future, [torch.ones(2)]))
    thread.start()
    assert (chained.wait() == 2).all() and future.done()
    thread.join()
    assert called == [thread]
    with pytest.raises(RuntimeError):
        native.complete(future, [])
    typed = torch.jit.CompilationUnit("def wait(f: Future[List[Tensor]]) -> List[Tensor]:\n    return torch.jit.wait(f)\n")
    assert (typed.wait(future)[0] == 1).all(), "C++ does not see a list of tensors"

    future = native.make_future()
    chained = future.then(lambda f: f.value())
    native.fail(future, Refused("no luck"))
    for _ in range(2):  # raising it does not use it up
        with pytest.raises(Refused, match="no luck"):
            future.wait()
    with pytest.raises(RuntimeError, match="no luck"):
        chained.wait()
    with pytest.raises(TypeError):
        native.fail(native.make_future(), "no exception")


def test_works_and_futures(said: Any) -> None:
    said("works_and_futures")


def built_in_hooks(rank: int, n: int, path: str, kind: str) -> None:
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    def model() -> Any:
        torch.manual_seed(3)
        return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))

    data = [torch.randn(5, 8, generator=torch.Generator().manual_seed(r)) for r in range(n)]
    with toy_group(rank, n, path) as backend:
        wrapped = DistributedDataParallel(model(), bucket_cap_mb=0.0001)
        wrapped._register_builtin_comm_hook(getattr(dist.BuiltinCommHookType, kind))
        alone = model()
        for _ in range(3):
            wrapped.zero_grad()
            wrapped(data[rank]).square().mean().backward()
        for part in data:
            (alone(part).square().mean() / n).backward()
        close = {"rtol": 1e-5, "atol": 1e-6} if kind == "ALLREDUCE" else {"rtol": 5e-3, "atol": 1e-3}
        for mine, theirs in zip(wrapped.parameters(), alone.parameters()):
            torch.testing.assert_close(mine.grad, theirs.grad, **close)
        assert backend.calls.count("allreduce") >= 3  # one a step


@pytest.mark.parametrize("kind", ["ALLREDUCE", "FP16_COMPRESS"])
def test_ddp_built_in_hooks(said: Any, kind: str) -> None:
    said(f"built_in_hooks:{kind}")


def a_failing_hook(rank: int, n: int, path: str) -> None:
    import torch
    from torch.nn.parallel import DistributedDataParallel

    native = shim.load()
    with toy_group(rank, n, path) as backend:
        model = DistributedDataParallel(torch.nn.Linear(4, 4))

        def broken(tensors: Any, opts: Any) -> Any:
            class Work:
                def wait(self) -> bool:
                    raise Refused("rank 7 was lost")

                def get_future(self) -> Any:
                    future = native.make_future()
                    threading.Timer(0.05, native.fail, (future, Refused("rank 7 was lost"))).start()
                    return future

            return Work()

        intact = type(backend).allreduce
        type(backend).allreduce = lambda self, tensors, opts=None: broken(tensors, opts)
        try:
            with pytest.raises(RuntimeError, match="rank 7 was lost"):
                model(torch.ones(2, 4)).sum().backward()
        finally:
            type(backend).allreduce = intact


def test_ddp_raises_what_failed(said: Any) -> None:
    said("a_failing_hook")


def mixed(rank: int, n: int, path: str) -> None:
    import torch
    import torch.distributed as dist

    with toy_group(rank, n, path, "cpu:gloo,cuda:toy") as backend:
        assert type(backend).__name__ == "Toy"
        group = dist.group.WORLD
        assert type(group) is dist.ProcessGroup
        assert isinstance(group._get_backend(torch.device("cpu")), dist.ProcessGroupGloo)
        x = torch.ones(2)
        dist.all_reduce(x)
        assert x[0] == n and not backend.calls, "the other device's backend was used"


def test_one_backend_per_device(said: Any) -> None:
    said("mixed")


def coalescing(rank: int, n: int, path: str) -> list[str]:
    import torch
    import torch.distributed as dist

    with toy_group(rank, n, path) as backend:
        x, y = torch.full((3,), float(rank)), torch.zeros(3)
        works = dist.batch_isend_irecv([dist.P2POp(dist.isend, x, 1 - rank), dist.P2POp(dist.irecv, y, 1 - rank)])
        assert len(works) == 1
        works[0].wait()
        assert (y == 1 - rank).all()
        return list(backend.calls)


def test_batch_isend_irecv_coalesces(said: Any) -> None:
    assert said("coalescing") == [["send", "recv", "coalesced 2"]] * 2


def functional(rank: int, n: int, path: str) -> list[str]:
    import torch
    import torch.distributed as dist
    import torch.distributed._functional_collectives as funcol

    with toy_group(rank, n, path) as backend:
        mine, parts = torch.full((2,), float(rank + 1)), torch.tensor([[r + 1.0] * 2 for r in range(n)])
        total = float(sum(range(1, n + 1)))
        group, name = dist.group.WORLD, dist.group.WORLD.group_name
        assert (funcol.all_reduce(mine, "sum", group) == total).all()
        assert torch.equal(funcol.all_gather_tensor(mine, 0, group), parts.flatten())
        assert (funcol.reduce_scatter_tensor(mine.repeat(n), "sum", 0, group) == total).all()
        assert torch.equal(
            funcol.all_to_all_single(torch.arange(float(n)) + 10 * rank, None, None, group)[0], torch.tensor(rank + 0.0)
        )
        assert torch.equal(funcol.broadcast(mine, 1, group), parts[1])
        a, b = funcol.all_gather_into_tensor_coalesced([mine, mine * 2], group)
        assert torch.equal(a * 2, b)
        assert (funcol.reduce_scatter_tensor_coalesced([mine.repeat(n)], "sum", [0], group)[0] == total).all()
        assert (funcol.all_reduce_coalesced([mine], "sum", group)[0] == total).all()
        ops = torch.ops._c10d_functional
        out = torch.zeros(2 * n)
        ops.wait_tensor(ops.all_gather_into_tensor_out(mine, n, name, out=out))
        assert torch.equal(out, parts.flatten())
        x = mine.clone()
        ops.wait_tensor(ops.all_reduce_(x, "sum", name))
        assert (x == total).all()
        return list(backend.calls)


def test_functional_collectives(said: Any) -> None:
    calls = said("functional")[0]
    assert {"allgather_into_tensor_coalesced", "reduce_scatter_tensor_coalesced", "_allgather_base"} <= set(calls)


def sequence(rank: int, n: int, path: str) -> None:
    import torch
    import torch.distributed as dist

    with toy_group(rank, n, path) as backend:
        base = super(type(backend), backend)
        base._set_sequence_number_for_group()  # torch's binding, so by way of C++
        assert backend.sequence == 100
        dist.all_reduce(torch.ones(1))
        assert base._get_sequence_number_for_group() == 101


def test_sequence_numbers(said: Any) -> None:
    said("sequence")


def mismatch(rank: int, n: int, path: str) -> str:
    import torch
    import torch.distributed as dist

    dist.set_debug_level(dist.DebugLevel.DETAIL)  # what TORCH_DISTRIBUTED_DEBUG sets
    try:
        with toy_group(rank, n, path):
            dist.all_reduce(torch.ones(3))  # what agrees passes
            with pytest.raises(RuntimeError) as raised:
                dist.all_reduce(torch.ones(3 + rank))
            return str(raised.value)
    finally:
        dist.set_debug_level(dist.DebugLevel.OFF)


def test_debug_detail_names_ranks_and_shapes(said: Any) -> None:
    for text in said("mismatch"):
        assert "OpType=ALLREDUCE" in text and "TensorShape=[3]" in text and "TensorShape=[4]" in text, text
        assert "Rank 0" in text and "Rank 1" in text, text


# --- the backend "hfreduce" on it ---


@contextlib.contextmanager
def hfreduce_group(rank: int, nranks: int, path: str, backend: str = "hfreduce") -> Iterator[Any]:
    """A default group of the package's backend."""
    import torch.distributed as dist

    import hfreduce.torch  # noqa: F401

    store = dist.FileStore(path, nranks)
    dist.init_process_group(backend, rank=rank, world_size=nranks, store=store, timeout=timedelta(seconds=20))
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def own_backend(rank: int, n: int, path: str) -> None:
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    import hfreduce
    from hfreduce.torch.process_group import ProcessGroupMixin

    with hfreduce_group(rank, n, path) as group:
        backend = group._get_backend(torch.device("cpu"))
        assert type(group) is dist.ProcessGroup and isinstance(backend, ProcessGroupMixin)
        assert dist.get_backend() == backend.name() == "hfreduce"
        assert hfreduce.torch.communicator() is backend.communicator
        x = torch.full((5,), float(rank + 1))
        work = dist.all_reduce(x, async_op=True)
        assert work.get_future().wait()[0].data_ptr() == x.data_ptr() and work.wait()
        assert (x == n * (n + 1) / 2).all()
        total = work.get_future().then(lambda f: float(f.value()[0].sum())).wait()
        assert total == x.sum()

        model = DistributedDataParallel(torch.nn.Linear(3, 2))
        model._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)
        model(torch.full((1, 3), float(rank))).sum().backward()
        assert (model.module.weight.grad == (n - 1) / 2).all()

        half = group.split_group([0, 1] if rank < 2 else [2, 3], timeout=timedelta(seconds=9))
        assert type(half) is dist.ProcessGroup and half.size() == 2
        y = torch.ones(2)
        half.allreduce([y]).wait()
        assert (y == 2).all()
        again = dist.new_group([0, 1])
        dist.all_reduce(y, group=again)
        assert (y == 4).all()

        y = torch.zeros(3)
        (work,) = dist.batch_isend_irecv([dist.P2POp(dist.irecv, y, 1 - rank), dist.P2POp(dist.isend, x[:3], 1 - rank)])
        work.wait()
        assert torch.equal(x[:3], y)
        with pytest.raises(hfreduce.MismatchError, match=r"all_reduce.*float32.*all_reduce.*float"):
            dist.all_reduce(torch.ones(3 + rank))


def own_backend_detail(rank: int, n: int, path: str) -> str:
    import torch
    import torch.distributed as dist

    import hfreduce

    dist.set_debug_level(dist.DebugLevel.DETAIL)
    try:
        with hfreduce_group(rank, n, path) as group:
            assert "Wrapper" in type(group._get_backend(torch.device("cpu"))).__name__
            assert hfreduce.torch.communicator().nranks == n
            with pytest.raises(RuntimeError) as raised:
                dist.all_reduce(torch.ones(3 + rank))
            return str(raised.value)
    finally:
        dist.set_debug_level(dist.DebugLevel.OFF)


def own_backend_beside_gloo(rank: int, n: int, path: str) -> None:
    import torch
    import torch.distributed as dist

    with hfreduce_group(rank, n, path, "cpu:hfreduce,cuda:gloo") as group:
        assert isinstance(group._get_backend(torch.device("cuda")), dist.ProcessGroupGloo)
        assert group._get_backend(torch.device("cpu")).name() == "hfreduce"
        x = torch.ones(2)
        dist.all_reduce(x)
        assert x[0] == n


def test_own_backend(said: Any) -> None:
    said("own_backend")


def test_own_backend_in_debug_mode(said: Any) -> None:
    for text in said("own_backend_detail"):
        assert "TensorShape=[3]" in text and "TensorShape=[4]" in text, text


def test_own_backend_beside_gloo(said: Any) -> None:
    said("own_backend_beside_gloo")


# --- without it ---


def built_in_hook_without_shim(rank: int, n: int, path: str) -> None:
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from hfreduce.torch.work import typed_future

    with hfreduce_group(rank, n, path) as group:
        assert type(group) is not dist.ProcessGroup
        model = DistributedDataParallel(torch.nn.Linear(3, 2))
        model._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)
        for _ in range(3):
            model.zero_grad()
            model(torch.full((1, 3), float(rank))).sum().backward()
        assert (model.module.weight.grad == (n - 1) / 2).all()

    done: Any = torch.futures.Future()
    tensors = [torch.ones(2)]
    typed = typed_future(done, tensors)
    assert not typed.done()
    done.set_result(None)
    assert typed.wait()[0] is tensors[0]

    def broken(_: Any) -> None:
        raise Refused("rank 7 was lost")

    done = torch.futures.Future()
    typed = typed_future(done.then(broken), tensors)
    done.set_result(None)
    with pytest.raises(RuntimeError, match="rank 7 was lost"):
        typed.wait()


def test_ddp_built_in_hook_without_the_shim(tmp_path: Path) -> None:
    env = {"HFREDUCE_TORCH_SHIM": "0", "OMP_NUM_THREADS": "1"}
    run_ranks(built_in_hook_without_shim, 2, 2, str(tmp_path / "store"), comm=False, timeout=100.0, env=env)


# --- life and death ---


def cycles(rank: int, n: int, path: str, name: str) -> None:
    import torch
    import torch.distributed as dist

    warnings.simplefilter("ignore")
    kept = []
    kind = register() if name == "toy" else importlib.import_module("hfreduce.torch.base").group_class()
    for i in range(50):
        store = dist.FileStore(f"{path}-{i}", n)
        dist.init_process_group(name, rank=rank, world_size=n, store=store, timeout=timedelta(seconds=20))
        backend = dist.group.WORLD._get_backend(torch.device("cpu"))
        assert type(backend) is kind
        kept.append(weakref.ref(backend))
        del backend
        if i % 10 == 0:  # with torch loaded, it takes long
            gc.collect()
        assert kept[-1]() is not None, "the group's backend was collected"
        x = torch.ones(2)
        dist.all_reduce(x)
        assert x[0] == n
        dist.destroy_process_group()
    gc.collect()
    assert not any(ref() is not None for ref in kept), "backends are never freed"


@pytest.mark.parametrize("name", ["toy", "hfreduce"])
def test_fifty_groups_come_and_go(said: Any, name: str) -> None:
    said(f"cycles:{name}")


ON_RANKS = (
    "every_operation works_and_futures built_in_hooks:ALLREDUCE built_in_hooks:FP16_COMPRESS a_failing_hook mixed coalescing functional sequence mismatch "
    "own_backend own_backend_detail own_backend_beside_gloo cycles:toy cycles:hfreduce"
).split()


EXIT = """
import sys, threading, torch, torch.distributed as dist
import test_torch_shim as t
native = t.shim.load()
t.warnings.simplefilter("ignore")
t.register()
dist.init_process_group("toy", rank=0, world_size=1, store=dist.HashStore())
work = dist.all_reduce(torch.ones(2), async_op=True)
torch.ops._c10d_functional.all_reduce(torch.ones(2), "sum", dist.group.WORLD.group_name)  # torch's registry holds its work
never, failed, done = native.make_future(), native.make_future(), native.make_future()
held = never.then(lambda f: work)
native.fail(failed, t.Refused("kept"))
native.complete(done, [torch.ones(1)])
work.get_future().then(lambda f: failed)
script = torch.jit.CompilationUnit("def wait(f: Future[List[Tensor]]) -> Future[List[Tensor]]:\\n    return torch.jit.fork(later, f)\\n"
    "def later(f: Future[List[Tensor]]) -> List[Tensor]:\\n    return torch.jit.wait(f)\\n")
in_cpp = [script.wait(failed), script.wait(never)]
sys.kept = [work, never, failed, done, held, in_cpp]
print("ready", flush=True)
"""


@pytest.mark.parametrize("how", ["", "raise SystemExit(0)", "dist.destroy_process_group()", "del sys.kept, held, in_cpp, work"])
def test_exit_with_all_alive(cache: Path, how: str) -> None:
    done = python("-c", EXIT + how, cache=cache, HFREDUCE_TORCH_SHIM="1")
    assert done.returncode == 0 and done.stdout == "ready\n", f"status {done.returncode}\n{done.stdout}{done.stderr}"
    assert "terminate" not in done.stderr and "Fatal" not in done.stderr, done.stderr
