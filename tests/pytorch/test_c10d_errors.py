"""Wrong calls: an exception that says what is wrong, on every rank that is concerned, and never a hang."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tensors import COMPLEX, FLOATS, OP, make


def text_of(call: Callable[[], Any]) -> str:
    """The message of the exception that a call raises; a Work that it returns is waited for."""
    try:
        work = call()
        if hasattr(work, "wait"):
            work.wait(timedelta(seconds=20))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no exception"


def has(text: str, *words: str) -> None:
    """Assert that a message has all of the words."""
    missing = [word for word in words if word.lower() not in text.lower()]
    assert not missing and "no exception" not in text, f"no {missing} in {text!r}"


# --- calls that are wrong on the rank that makes them: nothing is sent, and the group goes on ---


def wrong_tensors() -> None:
    rank, nranks = dist.get_rank(), dist.get_world_size()
    on_meta, good = torch.zeros(4, device="meta"), torch.zeros(4)
    if type(dist.group.WORLD) is not dist.ProcessGroup:  # torch's own answers for meta tensors itself, by doing nothing
        has(text_of(lambda: dist.all_reduce(on_meta)), "meta")
        has(text_of(lambda: dist.all_reduce(on_meta, async_op=True)), "meta")
        has(text_of(lambda: dist.broadcast(on_meta, 0)), "meta")
        has(text_of(lambda: dist.all_gather_into_tensor(torch.zeros(4 * nranks), on_meta)), "meta")
        has(text_of(lambda: dist.all_gather([good] * nranks, on_meta)), "meta")
        has(text_of(lambda: dist.send(on_meta, 1 - rank)), "meta")
        has(text_of(lambda: dist.recv(on_meta, 1 - rank)), "meta")
    has(text_of(lambda: dist.all_reduce([1, 2])), "tensor")
    has(text_of(lambda: dist.all_reduce(None)), "tensor")
    has(text_of(lambda: dist.all_gather([good] * nranks, torch.zeros(4, dtype=torch.int32))), "int32")
    has(text_of(lambda: dist.all_gather([good] * (nranks - 1) + [good.double()], good)), "float64")
    has(text_of(lambda: dist.all_gather_into_tensor(torch.zeros(4 * nranks).double(), good)), "float64")
    has(text_of(lambda: dist.reduce_scatter_tensor(good.double(), torch.zeros(4 * nranks))), "float64")
    has(text_of(lambda: dist.reduce_scatter(good, [good] * (nranks - 1) + [good.long()])), "int64")
    has(text_of(lambda: dist.all_to_all_single(good.double(), good)), "float64")
    has(text_of(lambda: dist.all_to_all([good] * nranks, [good] * (nranks - 1) + [good.long()])), "int64")


def wrong_sizes() -> None:
    rank, nranks = dist.get_rank(), dist.get_world_size()
    good = torch.zeros(4)
    has(text_of(lambda: dist.all_gather_into_tensor(torch.zeros(4 * nranks + 1), good)), str(4 * nranks + 1), str(4 * nranks))
    has(text_of(lambda: dist.all_gather([good] * (nranks + 1), good)), str(nranks + 1), str(nranks))
    has(text_of(lambda: dist.all_gather([], good)), "0", str(nranks))
    has(text_of(lambda: dist.all_gather([torch.zeros(9)] * nranks, good)), "9", "4")  # this rank's own place
    has(text_of(lambda: dist.reduce_scatter_tensor(good, torch.zeros(4 * nranks + 3))), str(4 * nranks + 3), str(4 * nranks))
    has(text_of(lambda: dist.reduce_scatter(good, [good] * (nranks + 1))), str(nranks + 1), str(nranks))
    has(text_of(lambda: dist.reduce_scatter(torch.zeros(9), [good] * nranks)), "9", "4")
    has(text_of(lambda: dist.all_to_all_single(torch.zeros(2 * nranks), torch.zeros(2 * nranks + 1))), str(2 * nranks + 1))
    has(text_of(lambda: dist.all_to_all_single(good, torch.zeros(5), [2, 2], [2, 2])), "[2, 2]", "5")
    has(text_of(lambda: dist.all_to_all_single(good, good, [2, 2], [4])), "1", str(nranks))
    has(text_of(lambda: dist.all_to_all_single(good, good, [2, 2], [5, -1])), "-1")
    has(text_of(lambda: dist.all_to_all([good] * nranks, [good] * (nranks + 1))), str(nranks + 1), str(nranks))
    has(text_of(lambda: dist.all_to_all([torch.zeros(7)] * nranks, [good] * nranks)), "7", "4")  # this rank's own part
    if rank == 0:
        has(text_of(lambda: dist.gather(good, [good] * (nranks + 1), 0)), str(nranks + 1), str(nranks))
        has(text_of(lambda: dist.scatter(good, [good] * (nranks + 1), 0)), str(nranks + 1), str(nranks))
        has(text_of(lambda: dist.gather(good, None, 0)), "gather_list")
        has(text_of(lambda: dist.scatter(good, None, 0)), "scatter_list")
    else:
        has(text_of(lambda: dist.gather(good, [good] * nranks, 0)), "gather_list")


def wrong_ranks() -> None:
    rank, nranks = dist.get_rank(), dist.get_world_size()
    good, world = torch.zeros(4), dist.group.WORLD
    for wrong in (nranks, -1, 77):
        has(text_of(lambda: dist.broadcast(good, wrong)), str(wrong))  # noqa: B023
        has(text_of(lambda: dist.reduce(good, wrong)), str(wrong))  # noqa: B023
        has(text_of(lambda: dist.gather(good, None, wrong)), str(wrong))  # noqa: B023
        has(text_of(lambda: dist.scatter(good, None, wrong)), str(wrong))  # noqa: B023
        has(text_of(lambda: dist.send(good, wrong)), str(wrong))  # noqa: B023
        has(text_of(lambda: dist.recv(good, wrong)), str(wrong))  # noqa: B023
        has(text_of(lambda: world.broadcast(good, wrong)), str(wrong))  # noqa: B023
        has(text_of(lambda: world.send([good], wrong, 0)), str(wrong))  # noqa: B023
        has(text_of(lambda: world.recv([good], wrong, 0)), str(wrong))  # noqa: B023
    has(text_of(lambda: dist.send(good, rank)), "same as the rank")
    has(text_of(lambda: world.send([good], (rank + 1) % nranks, -3)), "tag", "-3")


def wrong_ops() -> None:
    nranks = dist.get_world_size()
    for dtype in FLOATS + COMPLEX:
        for op in (OP.BAND, OP.BOR, OP.BXOR):
            has(text_of(lambda: dist.all_reduce(make(4, dtype, 0), op)), "op")  # noqa: B023
            has(text_of(lambda: dist.reduce(make(4, dtype, 0), 0, op)), "op")  # noqa: B023
            out, whole = torch.zeros(4, dtype=dtype), make(4 * nranks, dtype, 0)
            has(text_of(lambda: dist.reduce_scatter_tensor(out, whole, op)), "op")  # noqa: B023
    for dtype in COMPLEX:
        for op in (OP.MIN, OP.MAX):
            has(text_of(lambda: dist.all_reduce(make(4, dtype, 0), op)), "complex")  # noqa: B023
    has(text_of(lambda: dist.all_reduce(make(4, torch.bool, 0), OP.AVG)), "AVG", "bool")
    has(text_of(lambda: dist.all_reduce(torch.sparse_coo_tensor([[0]], [1.0], (2,)), OP.MAX)), "sparse")
    has(text_of(lambda: dist.broadcast(torch.sparse_coo_tensor([[0]], [1.0], (2,)), 0)), "sparse")


def then_all_is_well(function: Callable[[], None]) -> None:
    """Run a function; the group must be as good as before."""
    function()
    tensor = torch.ones(3)
    dist.all_reduce(tensor)
    assert tensor.tolist() == [dist.get_world_size()] * 3


@pytest.mark.parametrize("function", [wrong_tensors, wrong_sizes, wrong_ranks, wrong_ops], ids=lambda f: f.__name__)
def test_wrong_call_says_so_and_the_group_goes_on(ranks: Any, function: Callable[[], None]) -> None:
    ranks.run(then_all_is_well, 2, function)


# --- groups ---


def wrong_groups() -> None:
    rank = dist.get_rank()
    group = dist.new_group([0])
    good = torch.zeros(2)
    has(text_of(lambda: dist.all_reduce(good, group="world")), "group")
    has(text_of(lambda: dist.new_group([0, 99])), "99")
    if rank == 0:
        has(text_of(lambda: dist.broadcast(good, 1, group=group)), "1", "not part of group")
        has(text_of(lambda: dist.send(good, 1, group=group)), "1")


def test_wrong_group(ranks: Any) -> None:
    ranks.run(then_all_is_well, 2, wrong_groups)


def use_after_destroy() -> None:
    rank, nranks = dist.get_rank(), dist.get_world_size()
    name, store = dist.get_backend(), dist.distributed_c10d._get_default_store()
    group, world = dist.new_group(list(range(nranks))), dist.group.WORLD
    dist.all_reduce(torch.ones(2), group=group)
    dist.destroy_process_group(group)
    has(text_of(lambda: dist.all_reduce(torch.ones(2), group=group)), "group")
    for _ in range(2):
        has(text_of(lambda: group.allreduce([torch.ones(2)])), "destroyed")
        has(text_of(lambda: group.barrier()), "destroyed")
        has(text_of(lambda: group.send([torch.ones(2)], (rank + 1) % nranks, 0)), "destroyed")
        group.abort()
        group.shutdown()
    dist.destroy_process_group()
    has(text_of(lambda: dist.all_reduce(torch.ones(2))), "init_process_group")
    has(text_of(lambda: world.allreduce([torch.ones(2)])), "destroyed")
    has(text_of(lambda: world.allreduce([torch.ones(2)]).get_future().wait()), "destroyed")
    dist.init_process_group(name, store=dist.PrefixStore("after", store), rank=rank, world_size=nranks)
    dist.barrier()


@pytest.mark.parametrize("nranks", [1, 2])
def test_use_after_destroy(ranks: Any, nranks: int) -> None:
    ranks.run(use_after_destroy, nranks)


# --- ranks that disagree: both sides are named ---


def disagree(what: str, async_op: bool) -> str:
    """Rank 1 does something else than the others, in a group that is of no use afterwards."""
    rank, nranks = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(list(range(nranks)), timeout=timedelta(seconds=10))
    odd = rank == 1
    tensor = torch.zeros(6 if odd and what == "count" else 4, dtype=torch.int32 if odd and what == "dtype" else torch.float32)
    if what == "operation" and odd:
        text = text_of(lambda: dist.broadcast(tensor, 0, group=group, async_op=async_op))
    elif what == "root":
        text = text_of(lambda: dist.broadcast(tensor, rank, group=group, async_op=async_op))
    elif what == "op" and odd:
        text = text_of(lambda: dist.all_reduce(tensor, OP.MAX, group=group, async_op=async_op))
    elif what == "gather":
        tensor = torch.zeros(6 if odd else 4)
        text = text_of(lambda: dist.all_gather_into_tensor(tensor.new_zeros(tensor.numel() * nranks), tensor, group=group))
    else:
        text = text_of(lambda: dist.all_reduce(tensor, group=group, async_op=async_op))
    dist.barrier()
    return text


@pytest.mark.parametrize("async_op", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("what", ["count", "dtype", "op", "operation", "root", "gather"])
def test_ranks_that_disagree_are_told(ranks: Any, what: str, async_op: bool) -> None:
    texts = ranks.run(disagree, 2, what, async_op)
    for text in texts:
        has(text, "rank 0", "rank 1")
        words = {
            "count": ("4", "6"),
            "dtype": ("int32", "float32"),
            "operation": ("all_reduce", "broadcast"),
            "gather": ("4", "6"),
        }
        has(text, *words.get(what, ()))


def uneven_disagreement() -> str:
    """What one rank sends is not what the other expects."""
    rank, nranks = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(list(range(nranks)), timeout=timedelta(seconds=10))
    splits = [2, 2] if rank == 0 else [3, 2]
    sent = torch.zeros(4)
    text = text_of(lambda: dist.all_to_all_single(torch.zeros(sum(splits)), sent, splits, [2, 2], group=group))
    dist.barrier()
    return text


def test_all_to_all_of_splits_that_disagree(ranks: Any) -> None:
    texts = ranks.run(uneven_disagreement, 2)
    assert any("no exception" not in text for text in texts), texts
    for text in texts:
        assert "no exception" in text or "rank" in text.lower(), texts


def short_receive() -> str:
    rank, nranks = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(list(range(nranks)), timeout=timedelta(seconds=5))
    if rank == 0:
        text = text_of(lambda: dist.send(torch.zeros(8), 1, group=group))
    else:
        text = text_of(lambda: dist.recv(torch.zeros(3), 0, group=group))
    dist.barrier()
    return text


def test_receive_of_another_size(ranks: Any) -> None:
    has(ranks.run(short_receive, 2)[1], "8", "3", "rank 0")
