"""send and recv of the c10d API: tags, any source, isend and irecv in any order, batches, objects."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tensors import ALL, expect, make, scattered

LARGE = 3_000_000  # bytes of a message that no buffer on the way holds


def send_recv_each_pair() -> None:
    rank, nranks = dist.get_rank(), dist.get_world_size()
    for src, dst in itertools.permutations(range(nranks), 2):
        for dtype in ALL:
            if rank == src:
                dist.send(make(9, dtype, src, dst), dst)
            elif rank == dst:
                mine = torch.zeros(9).to(dtype)
                assert dist.recv(mine, src) == src
                expect(mine, make(9, dtype, src, dst), src, dst, dtype)
        for shape in ((), (0,), (4, 5), (LARGE // 4,)):
            for how in ("dense", "strided", "transposed"):
                if rank == src:
                    dist.send(scattered(make(shape, torch.float32, src), how), group_dst=dst)
                elif rank == dst:
                    mine = scattered(torch.zeros(shape), how)
                    assert dist.recv(mine, group_src=src) == src
                    expect(mine, make(shape, torch.float32, src), src, dst, shape, how)


@pytest.mark.parametrize("nranks", [2, 3])
def test_send_and_recv(ranks: Any, nranks: int) -> None:
    ranks.run(send_recv_each_pair, nranks)


def recv_any_source(tag: int) -> None:
    rank, nranks = dist.get_rank(), dist.get_world_size()
    for root in range(nranks):
        if rank != root:
            dist.send(make(5, torch.float32, rank, root), root, tag=tag)
            continue
        seen = []
        for _ in range(nranks - 1):
            mine = torch.zeros(5)
            src = dist.recv(mine, tag=tag)
            expect(mine, make(5, torch.float32, src, root), src)
            seen.append(src)
        assert sorted(seen) == [r for r in range(nranks) if r != root], seen


@pytest.mark.parametrize("nranks", [2, 4])
@pytest.mark.parametrize("tag", [0, 7])
def test_recv_from_any_source(ranks: Any, nranks: int, tag: int) -> None:
    ranks.run(recv_any_source, nranks, tag)


def irecv_any_source() -> None:
    """Several posted at once, before anything is sent; the source is known afterwards."""
    rank, nranks = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    if rank == 0:
        buffers = [torch.zeros(3) for _ in range(nranks - 1)]
        works = [group.recv_anysource([buffer], 5) for buffer in buffers]
        dist.barrier()
        sources = []
        for work, buffer in zip(works, buffers):
            work.wait()
            source = work._source_rank()
            expect(buffer, make(3, torch.float32, source), source)
            sources.append(source)
        assert sorted(sources) == list(range(1, nranks))
    else:
        dist.barrier()
        dist.send(make(3, torch.float32, rank), 0, tag=5)


def test_irecv_from_any_source_says_which(ranks: Any) -> None:
    ranks.run(irecv_any_source, 4)


def tags_in_any_order() -> None:
    """Messages of one tag arrive in the order of sending; those of different tags are received in any."""
    rank = dist.get_rank()
    tags = [3, 0, 3, 11, 0]
    tensors = [make(50 + i, torch.float32, i) for i in range(len(tags))]
    if rank == 0:
        works = [dist.isend(tensor, 1, tag=tag) for tensor, tag in zip(tensors, tags)]
        for work in works:
            work.wait()
    else:
        for i in (3, 1, 0, 4, 2):
            mine = torch.zeros(50 + i)
            dist.recv(mine, 0, tag=tags[i])
            expect(mine, tensors[i], "message", i, "of tag", tags[i])


def test_tags_match_in_any_order(ranks: Any) -> None:
    ranks.run(tags_in_any_order, 2)


def both_send_first(count: int) -> None:
    """Neither direction waits for the other, whatever is issued first."""
    rank, nranks = dist.get_rank(), dist.get_world_size()
    peers = [r for r in range(nranks) if r != rank]
    mine = {p: torch.zeros(count) for p in peers}
    for order in ("send first", "recv first", "by rank"):
        sends = [lambda p=p: dist.isend(make(count, torch.float32, rank, p), p) for p in peers]
        recvs = [lambda p=p: dist.irecv(mine[p], p) for p in reversed(peers)]
        calls = recvs + sends if order == "recv first" or (order == "by rank" and rank % 2) else sends + recvs
        for work in [call() for call in calls][::-1]:  # the last is waited for first
            work.wait()
        for p in peers:
            expect(mine[p], make(count, torch.float32, p, rank), order, p)
            mine[p].zero_()


@pytest.mark.parametrize("nranks", [2, 4])
@pytest.mark.parametrize("count", [4, LARGE // 4], ids=["small", "large"])
def test_isend_and_irecv_in_any_order(ranks: Any, nranks: int, count: int) -> None:
    ranks.run(both_send_first, nranks, count)


def many_in_flight() -> None:
    rank, nranks = dist.get_rank(), dist.get_world_size()
    right, left, rounds = (rank + 1) % nranks, (rank - 1) % nranks, 200
    received = [torch.zeros(16) for _ in range(rounds)]
    works = []
    for i in range(rounds):
        works.append(dist.isend(make(16, torch.float32, rank, i), right))
        works.append(dist.irecv(received[i], left))
    for work in works:
        work.wait()
    for i in range(rounds):
        expect(received[i], make(16, torch.float32, left, i), i)


def test_many_messages_in_flight(ranks: Any) -> None:
    ranks.run(many_in_flight, 3)


def batches() -> None:
    rank, nranks = dist.get_rank(), dist.get_world_size()
    right, left = (rank + 1) % nranks, (rank - 1) % nranks
    for count in (5, LARGE // 4):
        mine = torch.zeros(count)
        ops = [
            dist.P2POp(dist.isend, make(count, torch.float32, rank), right),
            dist.P2POp(dist.irecv, mine, left),
        ]
        for work in dist.batch_isend_irecv(ops if rank % 2 else ops[::-1]):
            work.wait()
        expect(mine, make(count, torch.float32, left), "ring", count)
    # several of different sizes and dtypes to and from each peer, the receives in front
    peers = [r for r in range(nranks) if r != rank]
    dtypes = (torch.float32, torch.int64, torch.bool)
    outs = {(p, d): torch.zeros(p + 3).to(dtype) for p in peers for d, dtype in enumerate(dtypes)}
    ops = [dist.P2POp(dist.irecv, out, p) for (p, _), out in outs.items()]
    ops += [dist.P2POp(dist.isend, make(rank + 3, dtype, rank, d), p) for p in peers for d, dtype in enumerate(dtypes)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    for (p, d), out in outs.items():
        expect(out, make(p + 3, dtypes[d], p, d), "from", p, dtypes[d])


@pytest.mark.parametrize("nranks", [2, 3])
def test_batch_isend_irecv(ranks: Any, nranks: int) -> None:
    ranks.run(batches, nranks)


def batch_in_subgroup() -> None:
    """Peers of a P2POp are global ranks, or group_peer."""
    rank = dist.get_rank()
    group = dist.new_group([1, 2])
    if rank in (1, 2):
        other, mine = 3 - rank, torch.zeros(4)
        ops = [
            dist.P2POp(dist.isend, make(4, torch.float32, rank), other, group),
            dist.P2POp(dist.irecv, mine, group=group, group_peer=other - 1),
        ]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        expect(mine, make(4, torch.float32, other))
        if rank == 1:
            dist.send(make(4, torch.float32, 8), 2, group=group)
        else:
            assert dist.recv(mine, group=group) == 1  # any source: the global rank
            expect(mine, make(4, torch.float32, 8))
    dist.barrier()


def test_point_to_point_in_a_subgroup(ranks: Any) -> None:
    ranks.run(batch_in_subgroup, 3)


def between_collectives() -> None:
    """Messages and collectives of one group do not disturb each other."""
    rank, nranks = dist.get_rank(), dist.get_world_size()
    early = torch.zeros(4)
    recv = dist.irecv(early, 0, tag=9) if rank == nranks - 1 else None
    for i in range(3):
        tensor = torch.full((6,), float(rank + i))
        dist.all_reduce(tensor)
        expect(tensor, torch.full((6,), float(sum(range(nranks)) + i * nranks)), i)
    if rank == 0:
        dist.send(make(4, torch.float32, 0), nranks - 1, tag=9)
    if recv is not None:
        recv.wait()
        expect(early, make(4, torch.float32, 0))


@pytest.mark.parametrize("nranks", [2, 3])
def test_receive_posted_before_collectives(ranks: Any, nranks: int) -> None:
    ranks.run(between_collectives, nranks)


def objects() -> None:
    rank = dist.get_rank()
    wanted = [{"a": [1, 2]}, "text", None, torch.arange(5)]
    for src, dst in ((0, 1), (1, 0)):
        if rank == src:
            dist.send_object_list(wanted, dst)
        else:
            got: list[Any] = [None] * 4
            assert dist.recv_object_list(got, src) == src
            assert got[:3] == wanted[:3] and torch.equal(got[3], wanted[3])


def test_send_and_recv_of_objects(ranks: Any) -> None:
    ranks.run(objects, 2)
