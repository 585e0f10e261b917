"""Other torch versions: the range that is refused or warned of, attributes that torch asks for, works that only C++ owns."""

from __future__ import annotations

import gc
import subprocess
import sys
import warnings
import weakref
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hfreduce.torch import keeping, versions

# --- the range ---


def importing(version: str) -> subprocess.CompletedProcess[str]:
    """Import hfreduce.torch and use it, in a process whose torch says that it is of some version."""
    program = f"""
import os, warnings
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
import torch, torch.distributed as dist
torch.__version__ = {version!r}
warnings.simplefilter("always")
import hfreduce.torch
for i in range(2):
    dist.init_process_group("hfreduce", store=dist.HashStore(), rank=0, world_size=1)
    dist.destroy_process_group()
    hfreduce.torch.GradientReducer
print("used")
"""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)


@pytest.mark.limit(150)
def test_an_older_torch_is_refused_at_import() -> None:
    done = importing("2.3.1+cu121")
    assert done.returncode != 0 and "used" not in done.stdout
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError") and "2.3.1+cu121" in last and "torch 2.4 to 2." in last, done.stderr


@pytest.mark.limit(150)
def test_a_newer_torch_is_warned_of_once() -> None:
    done = importing("2.99.0a0+git123")
    assert done.returncode == 0 and "used" in done.stdout, done.stderr
    assert done.stderr.count("2.99.0a0+git123 is newer") == 1, done.stderr


@pytest.mark.parametrize("version", ["2.4.0", "2.13.0+cpu", "{}.{}.9".format(*versions.NEWEST), "strange"])
def test_versions_of_the_range_pass(version: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.refuse_too_old(version)
        versions.warn_if_newer(version)


# --- what torch asks for ---


def attributes() -> list[str]:
    """Names of attributes of the group and its backend that cannot be had because Python and C++ ask each other for ever."""
    group: Any = dist.group.WORLD
    endless = []
    for what in (group, group._get_backend(torch.device("cpu"))):
        for name in dir(what):
            try:
                value = getattr(what, name)
                if name.startswith("supports_") and callable(value):
                    value(torch.device("cpu"))
            except RecursionError:
                endless.append(f"{type(what).__name__}.{name}")
            except Exception:  # not there, and says so
                pass
    return endless


@pytest.mark.parametrize("nranks", [1, 2])
def test_every_attribute_answers(ranks: Any, nranks: int) -> None:
    assert ranks.run(attributes, nranks) == [[]] * nranks


# --- works that C++ owns ---


def through_cpp() -> tuple[list[float], int]:
    """Operations as C++ starts them; it has the only reference to the works."""
    group: Any = dist.group.WORLD
    tensors = [torch.full((4,), float(dist.get_rank() + 1)) for _ in range(50)]
    started = [dist.ProcessGroup.allreduce(group, [tensor], dist.AllreduceOptions()) for tensor in tensors]
    gc.collect()
    for work in started:
        work.wait()
    del work, started
    dist.ProcessGroup.allreduce(group, [torch.zeros(1)], dist.AllreduceOptions()).wait()
    return [tensor[0].item() for tensor in tensors], len(keeping._kept)


def test_what_cpp_waits_for_ends(ranks: Any) -> None:
    for values, kept in ranks.run(through_cpp, 2):
        assert values == [3.0] * 50
        assert kept <= 1, "works were kept that nobody owns"


def error_through_cpp() -> str:
    group: Any = dist.new_group([0, 1], timeout=timedelta(seconds=1))
    if dist.get_rank() == 1:
        return "waited for"
    work = dist.ProcessGroup.allreduce(group, [torch.ones(4)], dist.AllreduceOptions())
    try:
        work.wait()
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_an_error_reaches_who_waits_in_cpp(ranks: Any) -> None:
    said = ranks.run(error_through_cpp, 2)
    assert "rank 1" in said[0], said


def owned_by_cpp(counts: bool) -> list[int]:
    """Make torch forget the Python halves of works, hand works to C++ and drop them; how many were kept at each step."""

    class Work(dist.Work):  # type: ignore[misc, unused-ignore]
        pass

    keeping._kept.clear()
    keeping._counts = counts and keeping._can_count()
    Work.__del__ = keeping._keep  # type: ignore[attr-defined]
    said = []
    Work()
    said.append(len(keeping._kept))
    boxed = [Work().boxed() for _ in range(3)]
    said.append(len(keeping._kept))
    assert all(type(work) is Work for work in keeping._kept.values())
    gone = weakref.ref(next(iter(keeping._kept.values())))
    del boxed
    gc.collect()
    last = Work().boxed()
    said.append(len(keeping._kept))
    assert not counts or gone() is None
    del last
    return said


@pytest.mark.parametrize(("counts", "said"), [(True, [0, 3, 1]), (False, [1, 4, 5])])
def test_works_are_kept_as_long_as_cpp_owns_them(ranks: Any, counts: bool, said: list[int]) -> None:
    assert ranks.run(owned_by_cpp, 1, counts, backend="") == [said]
    ranks.kill()  # what it planted stays in that process
