"""Works for torch up to 2.6, whose C++ takes a work from a Python process group and forgets the Python half of it.

There the C++ half outlives the Python object that the group's method returned; its `wait` then finds no Python method and waits
for ever for a completion that nobody signals. So a work that Python is about to free while C++ still owns it is kept until C++
has dropped it, too. The place where C++ counts its owners is fixed in those versions, and is tried before it is relied on.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

# A pybind11 object holds the address of the C++ object, which holds the count of its owners after the pointer to its methods.
_VALUE = object.__basicsize__
_OWNERS = ctypes.sizeof(ctypes.c_void_p)

# So many kept works are looked through whenever one more comes.
_FEW = 16
_kept: dict[int, Any] = {}
_sweep_at = 0
_counts = False


class _Probe(dist.Work):  # type: ignore[misc, unused-ignore]
    """A work of Python's."""


@functools.cache
def forgets_python_half() -> bool:
    """Whether this torch's C++ loses the Python half of a work that a Python process group returned to it."""
    made: list[Any] = []

    class Group(dist.ProcessGroup):  # type: ignore[misc, unused-ignore]
        def allreduce(self, tensors: Any, opts: Any = None) -> Any:
            work = _Probe()
            made.append(weakref.ref(work))
            return work

    held = dist.ProcessGroup.allreduce(Group(0, 1), [torch.zeros(1)], dist.AllreduceOptions())  # through C++ and back
    return held is not None and made[0]() is None


def _owners(work: Any) -> int:
    """How many owners C++ counts of a work, the Python object among them."""
    value: Any = ctypes.c_void_p.from_address(id(work) + _VALUE).value
    return ctypes.c_uint32.from_address(value + _OWNERS).value


def _can_count() -> bool:
    """Whether `_owners` tells the truth here: one more owner must show, and go."""
    work = _Probe()
    try:
        before = _owners(work)
        boxed = work.boxed()  # a second owner
        during = _owners(work)
        del boxed
    except (AttributeError, TypeError):
        return False
    return (before, during, _owners(work)) == (1, 2, 1)


def _keep(work: Any) -> None:
    """`__del__` of works: live on while C++ owns it. Python runs it once for an object, so nothing ends in here twice."""
    global _sweep_at
    if _counts and _owners(work) == 1:
        return
    _kept[id(work)] = work
    if _counts and len(_kept) > _sweep_at:
        for key, one in list(_kept.items()):
            if _owners(one) == 1:
                _kept.pop(key, None)
        _sweep_at = 2 * len(_kept) if len(_kept) > _FEW else 0  # of many, a sweep costs no more than keeping them did


@functools.cache
def keep_works(classes: Iterable[type]) -> None:
    """See to it that works of these classes live as long as C++ owns them, where torch does not. Again is no fault.

    Where the owners cannot be counted, works that C++ took are kept for good: memory is lost, but nobody waits for ever.
    """
    global _counts
    if forgets_python_half():
        _counts = _can_count()
        for cls in classes:
            cls.__del__ = _keep  # type: ignore[attr-defined]
