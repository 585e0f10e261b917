"""all_gather and gather with counts: blocks of any sizes against NumPy, lists that differ between ranks, wrong arguments."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import hfreduce
from hfreduce import Communicator, InvalidArgumentError, MismatchError, types

ml_dtypes = pytest.importorskip("ml_dtypes")

LAYOUTS = [(0,), (0, 0), (0, 0, 0), (0, 0, 0, 0, 0), (0, 1), (0, 1, 2), (0, 0, 1), (0, 1, 0, 1, 2)]
SIZES = [[0, 0, 0, 0, 0], [1, 0, 3, 2, 7], [0, 5, 0, 1, 0], [7, 7, 7, 7, 7], [1, 70_001, 13, 0, 4097]]


def block(rank: int, count: int, dtype: Any) -> np.ndarray[Any, Any]:
    return ((np.arange(count) * 3 + rank * 11) % 97).astype(dtype)


def environment(nodes: tuple[int, ...]) -> Any:
    return lambda rank: {"HFREDUCE_HOSTID": f"uneven-{nodes[rank]}", "HFREDUCE_TRANSPORT": "tcp"}


def arrays(me: int, counts: list[int], dtype: Any, in_place: bool) -> tuple[Any, Any]:
    """This rank's block, and room for all: in place the block lies in the room."""
    out, begin = np.zeros(sum(counts), dtype), sum(counts[:me])
    x = out[begin : begin + counts[me]] if in_place else np.zeros(counts[me], dtype)
    x[...] = block(me, counts[me], dtype)
    return x, out


def check_everything(comm: Communicator, dtypes: list[str]) -> None:
    for name in dtypes:
        for sizes in SIZES:
            for async_op in (False, True):
                for in_place in (False, True):
                    check(comm, types.numpy_dtype(types.dtype_code(name)), sizes[: comm.nranks], async_op, in_place)


def check(comm: Communicator, dtype: Any, counts: list[int], async_op: bool, in_place: bool) -> None:
    me, n, what = comm.rank, comm.nranks, (str(dtype), counts, async_op, in_place)
    expected = np.concatenate([block(rank, counts[rank], dtype) for rank in range(n)]).tobytes()
    x, out = arrays(me, counts, dtype, in_place)
    got = comm.all_gather(x, out, counts=counts, async_op=async_op)
    assert (got.wait() if async_op else got) is out
    assert out.tobytes() == expected, what
    for root in range(n):
        x, out = arrays(me, counts, dtype, in_place)
        got = comm.gather(x, out if root == me or in_place else None, root, counts=tuple(counts), async_op=async_op)
        got = got.wait() if async_op else got
        if root == me:
            assert got is out and out.tobytes() == expected, (*what, root)
        else:
            assert got is None


@pytest.mark.limit(90)
@pytest.mark.parametrize("nodes", LAYOUTS, ids=str)
def test_blocks_of_any_size(run_ranks: Any, nodes: tuple[int, ...]) -> None:
    run_ranks(check_everything, len(nodes), ["float32", "int8"], env=environment(nodes), timeout=80.0)


@pytest.mark.limit(90)
def test_every_dtype(run_ranks: Any) -> None:
    run_ranks(check_everything, 2, list(hfreduce.DTYPE_NAMES), timeout=80.0)


def check_groups(comm: Communicator) -> None:
    me, counts = comm.rank, [2, 0, 3]
    expected = [11.0 * rank + i for rank in range(3) for i in range(counts[rank])]
    x = np.array([11.0 * me + i for i in range(counts[me])])
    every, some, sums = np.zeros(5), np.zeros(5), np.ones(3)
    for _ in range(2):
        with comm.group() as group:
            assert comm.all_gather(x, every, counts=counts) is every
            comm.all_reduce(sums)
            assert comm.gather(x, some, 1, counts=counts) is (some if me == 1 else None)
        assert every.tolist() == expected
        assert some.tolist() == (expected if me == 1 else [0.0] * 5)
        assert [None if result is None else id(result) for result in group.results] == [
            id(every),
            id(sums),
            id(some) if me == 1 else None,
        ]
    work = comm.gather(x, some, 2, counts=counts, async_op=True)
    assert work.result is (some if me == 2 else None)
    work.wait()
    assert some.tolist() == (expected if me in (1, 2) else [0.0] * 5)


@pytest.mark.limit(40)
@pytest.mark.parametrize("nodes", [(0, 0, 0), (0, 1, 1)], ids=str)
def test_in_groups(run_ranks: Any, nodes: tuple[int, ...]) -> None:
    run_ranks(check_groups, 3, env=environment(nodes))


def differ(comm: Communicator, call: str, odd: int, entry: int, async_op: bool) -> str:
    """Rank `odd` has another entry in its list than the others; where it is its own, it brings so many elements."""
    counts = [4, 5, 6]
    if comm.rank == odd:
        counts[entry] += 3
    x, out = np.zeros(counts[comm.rank]), np.zeros(sum(counts))
    try:
        got = getattr(comm, call)(x, out, counts=counts, async_op=async_op)
        if async_op:
            got.wait(8.0)
    except hfreduce.HfreduceError as error:
        return f"{type(error).__name__} {error}"
    return "nothing"


@pytest.mark.limit(40)
@pytest.mark.parametrize(
    ("odd", "entry", "async_op"), [(1, 1, False), (1, 2, True), (2, 0, False), (0, 1, True)], ids=["own", "idle", "root", "other"]
)
@pytest.mark.parametrize("call", ["all_gather", "gather"])
@pytest.mark.parametrize("nodes", [(0, 0, 0), (0, 1, 2)], ids=str)
def test_lists_that_differ(run_ranks: Any, nodes: tuple[int, ...], call: str, odd: int, entry: int, async_op: bool) -> None:
    told = run_ranks(differ, 3, call, odd, entry, async_op, env=environment(nodes), comm_timeout=20.0)
    assert all(text.startswith("MismatchError") for text in told), told
    assert all("rank" in text for text in told)


WRONG = [
    ({"counts": [3, 3]}, "counts: has 2 entries, nranks is 1"),
    ({"counts": [-1]}, "counts: .* negative"),
    ({"counts": [2.5]}, "counts: 2.5 is not an integer"),
    ({"counts": 3}, "counts: int is not a sequence"),
    ({"counts": [4]}, "counts: sums to 4, but out has 3 elements"),
    ({"counts": [3], "x": np.zeros(2)}, r"counts\[0\]: sums to 3, but x has 2 elements"),
    ({"counts": [3], "x": np.zeros(3, np.float32)}, "out: dtype float64 differs from x's float32"),
]


@pytest.mark.parametrize("call", ["all_gather", "gather"])
@pytest.mark.parametrize(("given", "message"), WRONG, ids=range(len(WRONG)))
def test_wrong_arguments(call: str, given: dict[str, Any], message: str) -> None:
    with Communicator(0, 1) as comm:
        with pytest.raises(InvalidArgumentError, match=message):
            getattr(comm, call)(given.get("x", np.zeros(3)), np.zeros(3), counts=given["counts"])
        with pytest.raises(InvalidArgumentError, match=r"out: the root needs an array of sum\(counts\) = 3 elements"):
            comm.gather(np.zeros(3), counts=[3])
        assert (
            comm.all_gather(np.ones(3), np.zeros(3), counts=[3]).tolist() == [1.0] * 3
        )  # nothing was sent, nothing is left open


def test_mismatch_of_digests_names_the_ranks() -> None:
    from hfreduce.uneven import _Same

    same = _Same([1, 2, 3], 3, 1, "array")
    same._everyone[:] = same._mine
    assert same.settle() == "array"
    same._everyone[2] += 1
    with pytest.raises(MismatchError, match="counts of rank 2 differ from rank 0's") as caught:
        same.settle()
    assert (caught.value.rank, caught.value.peer) == (1, 0)
