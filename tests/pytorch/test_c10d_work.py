"""Work: waiting, futures and their callbacks, timeouts, errors; what the operations leave alone while they run."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tensors import expect, hear, tell

NRANKS = pytest.mark.parametrize("nranks", [1, 2, 4])


def start(value: float, count: int = 1000, **kwargs: Any) -> tuple[torch.Tensor, Any]:
    """An all_reduce under way on a tensor of `value`."""
    tensor = torch.full((count,), value)
    return tensor, dist.all_reduce(tensor, async_op=True, **kwargs)


def life_of_a_work() -> None:
    rank, nranks = dist.get_rank(), dist.get_world_size()
    if rank == nranks - 1:
        for r in range(nranks - 1):
            hear(f"{r} has asked")
    tensor, work = start(1.0)
    if rank != nranks - 1:
        assert not work.is_completed(), "completed before the last rank came"
        tell(f"{rank} has asked")
    assert work.wait() is not False
    assert work.is_completed() and work.is_success()
    assert work.exception() is None
    expect(work.result()[0], tensor, "result()")
    expect(tensor, torch.full((1000,), float(nranks)))
    assert work.wait() is not False  # again
    work.synchronize()
    _, work = start(1.0)
    end = time.monotonic() + 20
    while not work.is_completed():  # completes with nobody waiting
        assert time.monotonic() < end, "never completed"
        time.sleep(0.001)


@NRANKS
def test_wait_and_is_completed(ranks: Any, nranks: int) -> None:
    ranks.run(life_of_a_work, nranks)


def futures() -> None:
    nranks = dist.get_world_size()
    for wait_first in (False, True):
        tensor, work = start(2.0)
        if wait_first:
            work.wait()
        future = work.get_future()
        called = threading.Event()
        future.add_done_callback(lambda f: called.set())  # noqa: B023
        chained = future.then(lambda f: f.value()[0] / nranks).then(lambda f: f.value() + 1)
        expect(future.wait()[0], torch.full((1000,), 2.0 * nranks), "future")
        assert future.done() and future.value()[0].data_ptr() == tensor.data_ptr()
        expect(chained.wait(), torch.full((1000,), 3.0), "chained")
        assert called.wait(10), "the callback was not called"
        assert work.is_completed() and work.is_success()
        assert work.get_future().done()
    both = torch.futures.collect_all([start(1.0)[1].get_future() for _ in range(5)])
    assert len(both.wait()) == 5


@NRANKS
def test_futures_and_callbacks(ranks: Any, nranks: int) -> None:
    ranks.run(futures, nranks)


def futures_of_every_operation() -> None:
    """A future's value is the list of what the operation writes, or a list of lists."""
    rank, nranks = dist.get_rank(), dist.get_world_size()
    mine = torch.full((2,), float(rank))
    parts = [torch.zeros(2) for _ in range(nranks)]
    whole, part, sent = torch.zeros(nranks, 2), torch.zeros(2), torch.ones(nranks, 2)
    works = {
        "broadcast": dist.broadcast(mine.clone(), 0, async_op=True),
        "all_gather": dist.all_gather(parts, mine, async_op=True),
        "all_gather_into_tensor": dist.all_gather_into_tensor(whole, mine, async_op=True),
        "reduce_scatter_tensor": dist.reduce_scatter_tensor(part, sent, async_op=True),
        "all_to_all_single": dist.all_to_all_single(torch.zeros(nranks, 2), sent, async_op=True),
        "reduce": dist.reduce(mine.clone(), 0, async_op=True),
        "barrier": dist.barrier(async_op=True),
    }
    for name, work in works.items():
        value = work.get_future().wait()
        assert name == "barrier" or isinstance(value, list), f"{name}: {value!r}"
        assert work.is_completed(), name
    expect(whole, torch.arange(float(nranks)).repeat_interleave(2).reshape(nranks, 2), "all_gather_into_tensor")
    expect(torch.stack(parts), whole, "all_gather")
    expect(part, torch.full((2,), float(nranks)), "reduce_scatter_tensor")


@pytest.mark.parametrize("nranks", [1, 3])
def test_futures_of_every_operation(ranks: Any, nranks: int) -> None:
    ranks.run(futures_of_every_operation, nranks)


def callback_starts_another() -> None:
    """What PowerSGD does: a callback that starts a collective, and one that waits for it."""
    nranks = dist.get_world_size()
    results = []
    for _ in range(10):
        _, work = start(1.0)

        def second(future: Any) -> Any:
            tensor = future.value()[0].clone()
            return dist.all_reduce(tensor, async_op=True).get_future().wait()[0]

        results.append(work.get_future().then(second))
        results[-1].wait()
    for result in results:
        expect(result.value(), torch.full((1000,), float(nranks**2)))


@pytest.mark.parametrize("nranks", [2, 3])
def test_callback_starts_and_waits_for_another(ranks: Any, nranks: int) -> None:
    ranks.run(callback_starts_another, nranks)


def slow_callback() -> None:
    nranks = dist.get_world_size()
    for slow in range(nranks):
        release = threading.Event()
        if dist.get_rank() == slow:
            _, first = start(1.0)
            stuck = first.get_future().then(lambda f: release.wait(30))  # noqa: B023
            tell(f"{slow} is set")
        else:
            hear(f"{slow} is set")  # until then the operation cannot end, and call back at once
            start(1.0)[1].wait()
        for _ in range(3):
            tensor, work = start(3.0)
            work.get_future().then(lambda f: f.value()).wait()
            expect(tensor, torch.full((1000,), 3.0 * nranks))
            dist.all_reduce(torch.ones(5))
        if dist.get_rank() == slow:
            assert not stuck.done(), "the others waited for the callback"
            release.set()
            stuck.wait()
        dist.barrier()


def test_slow_callback_delays_nobody_else(ranks: Any) -> None:
    ranks.run(slow_callback, 2)


def raising_callback() -> None:
    _, work = start(1.0)

    def fail(future: Any) -> None:
        raise ValueError("from the callback")

    with pytest.raises(Exception, match="from the callback"):
        work.get_future().then(fail).wait()
    work.wait()
    dist.all_reduce(torch.ones(1))


def test_callback_that_raises(ranks: Any) -> None:
    ranks.run(raising_callback, 2)


def wait_with_timeout() -> None:
    rank, nranks = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        hear("1 is through")
    tensor, work = start(1.0)
    if rank == 1:
        with pytest.raises(RuntimeError, match=r"0\.2|200|timed? ?out|not ended"):
            work.wait(timedelta(seconds=0.2))
        assert not work.is_completed()
        tell("1 is through")
    work.wait(timedelta(seconds=30))  # it went on
    expect(tensor, torch.full((1000,), float(nranks)))


@pytest.mark.parametrize("nranks", [2, 3])
def test_wait_with_a_timeout_leaves_the_operation_alone(ranks: Any, nranks: int) -> None:
    ranks.run(wait_with_timeout, nranks)


def group_timeout(async_op: bool) -> tuple[float, str]:
    rank, nranks = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(list(range(nranks)), timeout=timedelta(seconds=1))
    took, text = 0.0, ""
    if rank != 0:
        begun = time.monotonic()
        try:
            work = dist.all_reduce(torch.ones(4), group=group, async_op=async_op)
            if async_op:
                work.wait()
        except RuntimeError as error:
            took, text = time.monotonic() - begun, str(error)
            if async_op:
                assert not work.is_success() and work.exception() is not None
    dist.barrier()  # of the other group, which is as good as before
    return took, text


@pytest.mark.parametrize("async_op", [False, True], ids=["sync", "async"])
def test_timeout_of_a_group_names_the_missing_rank(ranks: Any, async_op: bool) -> None:
    for took, text in ranks.run(group_timeout, 3, async_op)[1:]:
        assert 0.5 < took < 30, took  # the group's deadline, not the default group's
        assert "rank 0" in text, text


def set_timeout() -> str:
    rank, nranks = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(list(range(nranks)), timeout=timedelta(seconds=300))
    group.set_timeout(timedelta(seconds=1))
    text = ""
    if rank == 1:
        try:
            dist.all_reduce(torch.ones(4), group=group)
        except RuntimeError as error:
            text = str(error)
    dist.barrier()
    return text


def test_timeout_set_later(ranks: Any) -> None:
    text = ranks.run(set_timeout, 2)[1]
    assert "rank 0" in text and "1 s" in text, text


def future_of_a_failed_operation() -> tuple[bool, str]:
    rank, nranks = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(list(range(nranks)), timeout=timedelta(seconds=1))
    called, text = threading.Event(), ""
    if rank == 1:
        work = dist.all_reduce(torch.ones(4), group=group, async_op=True)
        future = work.get_future()
        future.add_done_callback(lambda f: called.set())
        try:
            future.wait()
        except RuntimeError as error:
            text = str(error)
        called.wait(5)
    dist.barrier()
    return called.is_set(), text


def test_future_of_a_failed_operation_has_its_error(ranks: Any) -> None:
    called, text = ranks.run(future_of_a_failed_operation, 2)[1]
    assert called and "all_reduce" in text, text


def abort_ends_waits() -> str:
    rank, nranks = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(list(range(nranks)), timeout=timedelta(seconds=300))
    text = ""
    if rank == 0:
        time.sleep(0.5)  # let the others wait
        group.abort()
        group.abort()  # again is no fault
    else:
        try:
            dist.all_reduce(torch.ones(4), group=group)
        except RuntimeError as error:
            text = str(error)
    dist.barrier()
    return text


@pytest.mark.parametrize("nranks", [2, 3])
def test_abort_ends_every_wait(ranks: Any, nranks: int) -> None:
    for text in ranks.run(abort_ends_waits, nranks)[1:]:
        assert "abort" in text.lower() and "rank 0" in text, text


def abort_and_start_again() -> None:
    from torch.distributed.distributed_c10d import _abort_process_group

    rank, nranks = dist.get_rank(), dist.get_world_size()
    name, store = dist.get_backend(), dist.distributed_c10d._get_default_store()
    if rank != 0:
        dist.all_reduce(torch.ones(4), async_op=True)
        tell(f"{rank} waits")
    for r in range(1, nranks):
        hear(f"{r} waits")
    _abort_process_group()
    assert not dist.is_initialized()
    dist.init_process_group(name, store=dist.PrefixStore("after", store), rank=rank, world_size=nranks)
    tensor = torch.ones(3)
    dist.all_reduce(tensor)
    expect(tensor, torch.full((3,), float(nranks)))


def test_abort_process_group_and_start_again(ranks: Any) -> None:
    ranks.run(abort_and_start_again, 3)


def dropped_tensors() -> None:
    """The operation keeps its tensors, also when nobody else does."""
    nranks = dist.get_world_size()
    works = []
    for i in range(50):
        tensor = torch.full((10_000,), float(i))
        works.append(dist.all_reduce(tensor, async_op=True))
        del tensor
        torch.full((10_000,), -1.0)  # takes memory that was given back too early
    for i, work in enumerate(works):
        work.wait()
        expect(work.result()[0], torch.full((10_000,), float(i * nranks)), i)
    for _ in range(20):
        dist.all_reduce(torch.ones(1000), async_op=True)  # the work is dropped too
    dist.barrier()


def test_tensors_and_works_may_be_dropped(ranks: Any) -> None:
    ranks.run(dropped_tensors, 3)


def many_at_once(kind: str) -> None:
    rank, nranks = dist.get_rank(), dist.get_world_size()
    tensors = [torch.full((1 + 37 * (i % 11),), float(i)) for i in range(300)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    order = range(300) if rank % 2 else reversed(range(300))
    for i in order:
        works[i].wait() if kind == "wait" else works[i].get_future().wait()
    for i, tensor in enumerate(tensors):
        expect(tensor, torch.full((1 + 37 * (i % 11),), float(i * nranks)), i)


@pytest.mark.parametrize("kind", ["wait", "future"])
def test_many_operations_under_way(ranks: Any, kind: str) -> None:
    ranks.run(many_at_once, 3, kind)


def wait_from_threads() -> None:
    """Works of one group are waited for in other threads than that which issued them."""
    nranks, failed = dist.get_world_size(), []
    pairs = [start(float(i)) for i in range(20)]

    def wait(i: int) -> None:
        try:
            pairs[i][1].wait()
            expect(pairs[i][0], torch.full((1000,), float(i * nranks)), i)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=wait, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed


def test_wait_from_other_threads(ranks: Any) -> None:
    ranks.run(wait_from_threads, 2)
