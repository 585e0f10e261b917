"""The process group on CUDA tensors: results, and the order of streams.

torch's build for CPUs has no such tensors: here they are doubles (pretend_cuda.py) on CUDA's driver, or on its stand-in of
tests/c/fake/cuda where there is none. What a double cannot show, the caching allocator and futures on devices, is not tested here.
"""

from __future__ import annotations

import time
import weakref
from datetime import timedelta
from typing import Any

import pytest
from driver import find_driver

torch = pytest.importorskip("torch")
if not torch.distributed.is_available():
    pytest.skip("this torch was built without torch.distributed", allow_module_level=True)

import torch.distributed as dist  # noqa: E402
from pretend_cuda import POOL, Cuda  # noqa: E402

import hfreduce  # noqa: E402
import hfreduce.torch  # noqa: E402
from hfreduce.torch import GradientReducer, streams  # noqa: E402


@pytest.fixture(scope="module")
def driver() -> str:
    """What to load as CUDA's driver."""
    return find_driver()


def started(path: str) -> Cuda:
    cuda = Cuda(path)
    cuda.install()
    hfreduce.torch.init_process_group(timeout=20.0)
    return cuda


def base(rank: int, count: int) -> Any:
    return torch.arange(count, dtype=torch.float32) % 5 + rank


def collectives(rank: int, path: str, count: int, async_op: bool) -> None:
    cuda, n = started(path), 2
    mine, other = cuda.tensor(base(rank, count)), cuda.tensor(base(rank, count) * 0)
    wide = cuda.tensor(torch.zeros(n * count))
    every = torch.cat([base(r, count) for r in range(n)])
    total = sum(base(r, count) for r in range(n))

    def check(work: Any, x: Any, expected: Any) -> None:
        assert (work is None) != async_op
        if async_op:
            work.wait()
        kept = cuda.tensor(expected * 0)
        cuda.assign(kept, x)  # what comes behind on the stream sees the result,
        cuda.assign(x, cuda.tensor(expected * 0 - 7))  # ... and may overwrite it
        assert (cuda.get(kept) == expected).all()

    x = cuda.tensor(base(0, count) * 0)
    cuda.assign(x, mine)  # what came before on the stream is seen
    check(dist.all_reduce(x, async_op=async_op), x, total)
    cuda.assign(x, mine)
    check(dist.all_reduce(x, dist.ReduceOp.MAX, async_op=async_op), x, base(n - 1, count))
    cuda.assign(x, mine)
    check(dist.all_reduce(x, dist.ReduceOp.AVG, async_op=async_op), x, total / n)
    cuda.assign(x, mine)
    check(dist.broadcast(x, 1, async_op=async_op), x, base(1, count))
    cuda.assign(x, mine)
    check(dist.reduce(x, 0, async_op=async_op), x if rank == 0 else other, total if rank == 0 else total * 0)
    check(dist.all_gather_into_tensor(wide, mine, async_op=async_op), wide, every)
    cuda.assign(wide, cuda.tensor(every))
    check(dist.reduce_scatter_tensor(other, wide, async_op=async_op), other, base(rank, count) * n)
    many, back = cuda.tensor(every + 10 * rank), cuda.tensor(every * 0)
    check(dist.all_to_all_single(back, many, async_op=async_op), back, torch.cat([base(rank, count) + 10 * r for r in range(n)]))
    group = dist.distributed_c10d._get_default_group()
    pair = [cuda.tensor(base(rank, count)), cuda.tensor(base(rank, count) * 2)]
    work = group.allreduce_coalesced(pair)
    work.wait()
    assert (cuda.get(pair[0]) == total).all() and (cuda.get(pair[1]) == 2 * total).all()
    host = base(rank, count)
    dist.all_reduce(host)  # tensors of the CPU beside them
    assert (host == total).all()
    dist.destroy_process_group()


@pytest.mark.parametrize("async_op", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("count", [7, 300_000])
def test_collectives(run_ranks: Any, driver: str, count: int, async_op: bool) -> None:
    run_ranks(collectives, 2, driver, count, async_op, comm=False)


def the_host_goes_on(rank: int, path: str) -> None:
    cuda = started(path)
    x, y = cuda.tensor(base(rank, 50_000)), cuda.tensor(base(rank, 50_000))
    dist.all_reduce(x)
    cuda.current.synchronize()
    word = cuda.gate()
    try:
        began = time.monotonic()
        dist.all_reduce(y)
        work = dist.all_reduce(x, async_op=True)
        work.wait()  # neither waits here, though nothing can run yet
        assert time.monotonic() - began < 5
        time.sleep(0.3)
        assert not work.is_completed()
        with pytest.raises(TimeoutError):
            work.wait(timedelta(milliseconds=50))  # but that one is asked to
    finally:
        word.value = 1
    work.wait(timedelta(seconds=10))
    assert (cuda.get(x) == 2 * (base(0, 50_000) + base(1, 50_000))).all()
    assert work.is_completed() and work.is_success()
    assert (cuda.get(y) == base(0, 50_000) + base(1, 50_000)).all()
    dist.destroy_process_group()


def test_the_host_goes_on(run_ranks: Any, driver: str) -> None:
    run_ranks(the_host_goes_on, 2, driver, comm=False)


def messages(rank: int, path: str) -> None:
    cuda, count, peer = started(path), 200_000, 1 - rank
    send = [cuda.tensor(base(10 * k + rank, count)) for k in range(3)]
    recv = [cuda.tensor(base(0, count) * 0) for _ in range(3)]
    for _ in range(3):
        # all receives first, one by one and not as a group: none may keep a send behind it from leaving
        works = [dist.irecv(recv[k], peer, tag=k) for k in range(2)]
        works += [dist.isend(send[k], peer, tag=k) for k in (1, 0)]
        for work in works:
            work.wait()
        for k in range(2):
            assert (cuda.get(recv[k]) == base(10 * k + peer, count)).all()
        work = dist.irecv(recv[2], tag=9)  # from whoever sends
        dist.send(send[2], peer, tag=9)
        assert work._source_rank() == peer
        assert (cuda.get(recv[2]) == base(20 + peer, count)).all()
    dist.destroy_process_group()


def test_messages(run_ranks: Any, driver: str) -> None:
    run_ranks(messages, 2, driver, comm=False)


def many_messages(rank: int, path: str) -> None:
    cuda, count, n = started(path), 1000, POOL + 8
    x, late = cuda.tensor(base(rank, count)), cuda.tensor(base(0, count) * 0)
    if rank == 1:
        got = [cuda.tensor(base(0, count) * 0) for _ in range(n)]
        for k in range(n):
            dist.recv(got[k], 0, tag=k)
        cuda.finish(15, "what rank 0 sent behind a receive whose message comes only now")
        for each in got:
            assert (cuda.get(each) == base(0, count)).all()
        dist.send(x, 0, tag=n)
        for k in range(n):
            dist.recv(got[k], 0, tag=k)
        cuda.current.synchronize()
    else:
        users = torch.cuda.Stream(x.device)
        works = [dist.irecv(late, 1, tag=n), *(dist.isend(x, 1, tag=k) for k in range(n))]
        used = {work._stream.cuda_stream for work in works}
        assert len(used) == n + 1 and not used & {users.cuda_stream, *cuda.pool}  # torch's own stay the user's
        for work in works:
            work.wait()
        assert (cuda.get(late) == base(1, count)).all()
        del works, work
        cuda.held.clear()
        works = [dist.isend(x, 1, tag=k) for k in range(n)]
        assert {work._stream.cuda_stream for work in works} <= used  # idle ones are used again
        for work in works:
            work.wait()
        cuda.current.synchronize()
    dist.destroy_process_group()


def test_many_messages_behind_a_late_one(run_ranks: Any, driver: str) -> None:
    run_ranks(many_messages, 2, driver, comm=False)


class Future:
    """A double of torch.futures.Future on a device."""

    def __init__(self, devices: Any) -> None:
        self.devices, self.value, self.stream = devices, None, None

    def set_result(self, value: Any) -> None:
        self.value, self.stream = value, torch.cuda.current_stream()


def what_is_held(rank: int, path: str) -> None:
    cuda = started(path)
    x, y = cuda.tensor(base(rank, 100)), cuda.tensor(base(rank, 100))
    dist.all_reduce(x)
    assert not cuda.held  # on the stream of its own memory
    work = dist.all_reduce(x, async_op=True)
    beside = work._stream
    assert beside is not cuda.current
    later = dist.broadcast(y, 0, async_op=True)
    assert later._stream is beside  # collectives share a stream
    later.wait()
    assert not cuda.held  # who waits comes behind it
    unwaited = dist.broadcast(y, 0, async_op=True)
    del unwaited
    assert set(cuda.held) == {(y.address, beside)}  # nobody has waited: the allocator has to know
    cuda.held.clear()
    wide, dropped = cuda.tensor(torch.zeros(200)), cuda.tensor(base(rank, 100))
    reference, word = weakref.ref(dropped), cuda.gate()
    gather = dist.all_gather_into_tensor(wide, dropped, async_op=True)
    del dropped
    assert reference() is not None
    gather.wait()
    gone, held = reference() is None, list(cuda.held)
    word.value = 1
    assert gone and not held  # its memory may be used again by what comes next, though the operation is still to begin
    assert (cuda.get(wide) == torch.cat([base(0, 100), base(1, 100)])).all()
    torch.futures.Future = Future
    future = work.get_future()
    assert work.get_future() is future
    assert (future.devices, future.value, future.stream) == ([x.device], [x], beside)
    work.wait()
    with pytest.raises(hfreduce.InvalidArgumentError, match="they are on cpu and cuda:0, and must be on one device"):
        dist.distributed_c10d._get_default_group().allreduce_coalesced([x, torch.zeros(3)])
    dist.destroy_process_group()


def test_what_is_held(run_ranks: Any, driver: str) -> None:
    run_ranks(what_is_held, 2, driver, comm=False)


def errors(rank: int, path: str) -> None:
    cuda = started(path)
    x = cuda.tensor(base(rank, 100))
    group = dist.distributed_c10d._get_default_group()
    dist.all_reduce(x)
    cuda.current.synchronize()
    if rank == 0:
        work = dist.all_reduce(x, async_op=True)
        work.wait()  # nothing is wrong yet
        group.abort()
        cuda.current.synchronize()  # streams run dry
        with pytest.raises(hfreduce.AbortedError):
            work.wait()
        assert work.is_completed() and not work.is_success()
        assert isinstance(work.exception(), dist.DistBackendError)
    else:
        end = time.monotonic() + 10
        while group.communicator.async_error() is None and time.monotonic() < end:
            time.sleep(0.01)
    with pytest.raises(hfreduce.AbortedError):
        dist.all_reduce(x)
    dist.destroy_process_group()


def test_errors_come_later(run_ranks: Any, driver: str) -> None:
    run_ranks(errors, 2, driver, comm=False)


def gradients(rank: int, path: str) -> None:
    cuda, count = Cuda(path), 30_000  # more than what is packed
    cuda.install()
    with hfreduce.init(20.0) as comm:
        params: list[Any] = [cuda.tensor(torch.zeros(count)).requires_grad_() for _ in range(3)]
        with pytest.raises(hfreduce.InvalidArgumentError, match="params: they are on cpu and cuda:0"):
            GradientReducer([params[0], torch.zeros(3, requires_grad=True)], comm=comm)
        with GradientReducer(params, bucket_bytes=4 * count, comm=comm) as reducer:
            for step in range(3):
                gradients, kept = ([cuda.tensor(torch.zeros(count)) for _ in params] for _ in range(2))
                values = [cuda.tensor(base(rank, count) * (i + step)) for i in range(len(params))]
                word = cuda.gate()
                for param, gradient, value in zip(params, gradients, values):
                    cuda.assign(gradient, value)  # it is not there yet when it is called ready
                    param.grad = gradient
                for param in reversed(params):
                    reducer.ready(param)
                if step == 0:
                    word.value = 1  # then the ranks agree on the order of the buckets, and the host waits
                reducer.synchronize()
                for param, copy in zip(params, kept):
                    cuda.assign(copy, param.grad)
                word.value = 1
                for i, copy in enumerate(kept):
                    assert (cuda.get(copy) == (base(0, count) + 0.5) * (i + step)).all(), (step, i)
                assert {address for address, _ in cuda.held} == {gradient.address for gradient in gradients}
                cuda.held.clear()


def test_gradients(run_ranks: Any, driver: str) -> None:
    run_ranks(gradients, 2, driver, comm=False)


def test_devices_of_an_operation() -> None:
    x = torch.zeros(2)
    assert streams.device_of(([x, (x, [x])], None, 3)) is None
    assert streams.device_of(()) is None
    meta = torch.zeros(2, device="meta")
    with pytest.raises(hfreduce.InvalidArgumentError, match="they are on cpu and meta"):
        streams.device_of([x, meta])
