"""broadcast, all_gather, gather, scatter and all_to_all of the c10d API: every dtype as it is, uneven parts, layouts and forms."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tensors import ALL, expect, finish, make, scattered

NRANKS = pytest.mark.parametrize("nranks", [1, 2, 3, 4])
LAYOUTS = ("dense", "strided", "transposed")
SHAPES = ((), (0,), (1,), (3, 7), (2, 3, 4), (30_001,))


def everybody() -> tuple[int, int, range]:
    """This rank, the number of ranks, and all of them."""
    return dist.get_rank(), dist.get_world_size(), range(dist.get_world_size())


# --- broadcast ---


def broadcast_from_each_root() -> None:
    rank, _, all_ranks = everybody()
    for root in all_ranks:
        for dtype in ALL:
            wanted = make(7, dtype, root, 1)
            mine = wanted.clone() if rank == root else torch.zeros(7).to(dtype)
            dist.broadcast(mine, root)
            expect(mine, wanted, root, dtype)
        for shape in SHAPES:
            for how in LAYOUTS:
                wanted = make(shape, torch.float32, root)
                mine = scattered(wanted if rank == root else torch.zeros(shape), how)
                finish(dist.broadcast(mine, group_src=root, async_op=True))
                expect(mine, wanted, root, shape, how)


@NRANKS
def test_broadcast(ranks: Any, nranks: int) -> None:
    ranks.run(broadcast_from_each_root, nranks)


# --- all_gather ---


def all_gather_list() -> None:
    rank, nranks, all_ranks = everybody()
    for dtype in ALL:
        outs = [torch.zeros(6).to(dtype) for _ in all_ranks]
        dist.all_gather(outs, make(6, dtype, rank))
        for r in all_ranks:
            expect(outs[r], make(6, dtype, r), dtype, r)
    for shape in SHAPES:
        for how in LAYOUTS:
            outs = [scattered(torch.zeros(shape), how) for _ in all_ranks]
            finish(dist.all_gather(outs, scattered(make(shape, torch.float32, rank), how), async_op=True))
            for r in all_ranks:
                expect(outs[r], make(shape, torch.float32, r), shape, how, r)
    whole = torch.zeros(nranks, 5)
    dist.all_gather(list(whole.unbind()), make(5, torch.float32, rank))
    expect(whole, torch.stack([make(5, torch.float32, r) for r in all_ranks]), "into the parts of one tensor")


@NRANKS
def test_all_gather_of_a_list(ranks: Any, nranks: int) -> None:
    ranks.run(all_gather_list, nranks)


def all_gather_uneven() -> None:
    rank, _, all_ranks = everybody()
    for dtype in (torch.float32, torch.int64, torch.bool, torch.bfloat16):
        for shapes in ([(r + 1, 3) for r in all_ranks], [(5 * (r % 2),) for r in all_ranks], [(9 - 2 * r,) for r in all_ranks]):
            for how in ("dense", "strided"):
                outs = [scattered(torch.zeros(shape).to(dtype), how) for shape in shapes]
                finish(dist.all_gather(outs, scattered(make(shapes[rank], dtype, rank), how), async_op=True))
                for r in all_ranks:
                    expect(outs[r], make(shapes[r], dtype, r), dtype, shapes, how, r)


@NRANKS
def test_all_gather_of_uneven_tensors(ranks: Any, nranks: int) -> None:
    ranks.run(all_gather_uneven, nranks)


def all_gather_into_tensor() -> None:
    rank, nranks, all_ranks = everybody()
    for dtype in ALL:
        out = torch.zeros(nranks * 4, 3).to(dtype)
        dist.all_gather_into_tensor(out, make((4, 3), dtype, rank))
        for r in all_ranks:
            expect(out[4 * r : 4 * r + 4], make((4, 3), dtype, r), dtype, r)
    for shape in SHAPES:
        for how in LAYOUTS:
            out = scattered(torch.zeros(nranks, *shape), how)
            finish(dist.all_gather_into_tensor(out, scattered(make(shape, torch.float32, rank), how), async_op=True))
            expect(out, torch.stack([make(shape, torch.float32, r) for r in all_ranks]), "stacked", shape, how)
    out = torch.zeros(nranks, 6)
    out[rank] = make(6, torch.float32, rank)
    dist.all_gather_into_tensor(out, out[rank])
    expect(out, torch.stack([make(6, torch.float32, r) for r in all_ranks]), "in place")


@NRANKS
def test_all_gather_into_one_tensor(ranks: Any, nranks: int) -> None:
    ranks.run(all_gather_into_tensor, nranks)


def all_gather_coalesced() -> None:
    rank, _, all_ranks = everybody()
    shapes = ((3,), (2, 5), (), (0,), (1000,))
    for async_op in (False, True):
        outs = [[torch.zeros(shape) for shape in shapes] for _ in all_ranks]
        mine = [make(shape, torch.float32, rank, i) for i, shape in enumerate(shapes)]
        finish(dist.all_gather_coalesced(outs, mine, async_op=async_op))
        for r in all_ranks:
            for i, shape in enumerate(shapes):
                expect(outs[r][i], make(shape, torch.float32, r, i), r, i)


@pytest.mark.parametrize("nranks", [1, 3])
def test_all_gather_coalesced(ranks: Any, nranks: int) -> None:
    ranks.run(all_gather_coalesced, nranks)


# --- gather, scatter ---


def gather_to_each_root() -> None:
    rank, _, all_ranks = everybody()
    for root in all_ranks:
        for dtype in ALL:
            outs = [torch.zeros(5).to(dtype) for _ in all_ranks] if rank == root else None
            dist.gather(make(5, dtype, rank), outs, root)
            for r in all_ranks if outs else ():
                expect(outs[r], make(5, dtype, r), root, dtype, r)
        for shape in SHAPES:
            for how in LAYOUTS:
                outs = [scattered(torch.zeros(shape), how) for _ in all_ranks] if rank == root else None
                finish(dist.gather(scattered(make(shape, torch.float32, rank), how), outs, group_dst=root, async_op=True))
                for r in all_ranks if outs else ():
                    expect(outs[r], make(shape, torch.float32, r), root, shape, how, r)


@NRANKS
def test_gather(ranks: Any, nranks: int) -> None:
    ranks.run(gather_to_each_root, nranks)


def scatter_from_each_root() -> None:
    rank, _, all_ranks = everybody()
    for root in all_ranks:
        for dtype in ALL:
            out = torch.zeros(5).to(dtype)
            dist.scatter(out, [make(5, dtype, root, r) for r in all_ranks] if rank == root else None, root)
            expect(out, make(5, dtype, root, rank), root, dtype)
        for shape in SHAPES:
            for how in LAYOUTS:
                out = scattered(torch.zeros(shape), how)
                parts = [scattered(make(shape, torch.float32, root, r), how) for r in all_ranks] if rank == root else None
                finish(dist.scatter(out, parts, group_src=root, async_op=True))
                expect(out, make(shape, torch.float32, root, rank), root, shape, how)


@NRANKS
def test_scatter(ranks: Any, nranks: int) -> None:
    ranks.run(scatter_from_each_root, nranks)


# --- all_to_all ---


def all_to_all_list() -> None:
    """Rank s sends to rank d the tensor make(shape, dtype, s, d)."""
    rank, _, all_ranks = everybody()
    for dtype in ALL:
        outs = [torch.zeros(4).to(dtype) for _ in all_ranks]
        dist.all_to_all(outs, [make(4, dtype, rank, d) for d in all_ranks])
        for s in all_ranks:
            expect(outs[s], make(4, dtype, s, rank), dtype, s)
    for how in LAYOUTS:
        # (rows sent by s, of length that d asks for): from nothing to several
        shapes = {(s, d): (s + 1, 3 * ((s + d) % 3)) for s in all_ranks for d in all_ranks}
        outs = [scattered(torch.zeros(shapes[s, rank]), how) for s in all_ranks]
        parts = [scattered(make(shapes[rank, d], torch.float32, rank, d), how) for d in all_ranks]
        finish(dist.all_to_all(outs, parts, async_op=True))
        for s in all_ranks:
            expect(outs[s], make(shapes[s, rank], torch.float32, s, rank), how, s)


@NRANKS
def test_all_to_all_of_lists(ranks: Any, nranks: int) -> None:
    ranks.run(all_to_all_list, nranks)


def all_to_all_single() -> None:
    rank, nranks, all_ranks = everybody()
    for dtype in ALL:
        out = torch.zeros(nranks * 2, 3).to(dtype)
        dist.all_to_all_single(out, torch.cat([make((2, 3), dtype, rank, d) for d in all_ranks]))
        expect(out, torch.cat([make((2, 3), dtype, s, rank) for s in all_ranks]), dtype)
    for how in LAYOUTS:
        for width in ((), (3,), (2, 5)):
            rows = {(s, d): (2 * s + d) % 4 for s in all_ranks for d in all_ranks}
            sent = torch.cat([make((rows[rank, d], *width), torch.float32, rank, d) for d in all_ranks])
            wanted = torch.cat([make((rows[s, rank], *width), torch.float32, s, rank) for s in all_ranks])
            out = scattered(torch.zeros(wanted.shape), how)
            work = dist.all_to_all_single(
                out,
                scattered(sent, how),
                [rows[s, rank] for s in all_ranks],
                [rows[rank, d] for d in all_ranks],
                async_op=True,
            )
            finish(work)
            expect(out, wanted, how, width)
    sent = torch.cat([make(20_000, torch.float32, rank, d) for d in all_ranks])
    out = torch.empty_like(sent)
    dist.all_to_all_single(out, sent)
    expect(out, torch.cat([make(20_000, torch.float32, s, rank) for s in all_ranks]), "large")


@NRANKS
def test_all_to_all_single(ranks: Any, nranks: int) -> None:
    ranks.run(all_to_all_single, nranks)


# --- the same through the group's methods, and coalesced ---


def group_methods() -> None:
    rank, nranks, all_ranks = everybody()
    group = dist.group.WORLD
    mine = make(4, torch.float32, rank)
    wanted = torch.stack([make(4, torch.float32, r) for r in all_ranks])
    columns = wanted[:, :1].expand(nranks, nranks)  # what all_to_all gives of rows that repeat their first element

    patience = timedelta(seconds=20)
    for arguments in ((), (patience,)):
        tensor = mine.clone()
        group.broadcast(tensor, nranks - 1, *arguments).wait()
        expect(tensor, wanted[-1], "broadcast(t, root, ...)", arguments)
    options = dist.BroadcastOptions()
    options.rootRank = 0
    tensor = mine.clone()
    group.broadcast([tensor], options).wait()
    expect(tensor, wanted[0], "broadcast([t], opts)")

    outs = list(torch.zeros(nranks, 4).unbind())
    group.allgather(outs, mine).wait()
    expect(torch.stack(outs), wanted, "allgather(list, t)")
    outs = list(torch.zeros(nranks, 4).unbind())
    group.allgather(outs, mine, patience).wait()
    expect(torch.stack(outs), wanted, "allgather(list, t, timeout)")
    outs = list(torch.zeros(nranks, 4).unbind())
    group.allgather([outs], [mine]).wait()
    expect(torch.stack(outs), wanted, "allgather([list], [t])")
    out = torch.zeros(nranks, 4)
    group._allgather_base(out, mine).wait()
    expect(out, wanted, "_allgather_base")
    several = [torch.zeros(nranks, 4), torch.zeros(nranks * 4)]
    group.allgather_into_tensor_coalesced(several, [mine, mine.clone()]).wait()
    expect(several[0], wanted, "allgather_into_tensor_coalesced, stacked")
    expect(several[1], wanted.flatten(), "allgather_into_tensor_coalesced, flat")

    outs = [torch.zeros(4) for _ in all_ranks] if rank == 0 else []
    group.gather(outs, mine, 0, patience).wait()
    if rank == 0:
        expect(torch.stack(outs), wanted, "gather(list, t, root, timeout)")
    out = torch.zeros(4)
    group.scatter(out, list(wanted.unbind()) if rank == nranks - 1 else [], nranks - 1, patience).wait()
    expect(out, wanted[rank], "scatter(out, list, root, timeout)")

    sent = mine[:1].repeat(nranks)
    out = torch.zeros(nranks)
    group.alltoall_base(out, sent, [], []).wait()
    expect(out, columns[:, 0].contiguous(), "alltoall_base")
    outs = list(torch.zeros(nranks, 1).unbind())
    group.alltoall(outs, list(sent.split(1))).wait()
    expect(torch.cat(outs), columns[:, 0].contiguous(), "alltoall")
    group.barrier().wait()
    group.barrier(patience).wait()


@NRANKS
def test_gathers_as_methods_of_the_group(ranks: Any, nranks: int) -> None:
    ranks.run(group_methods, nranks)


def coalescing_manager() -> None:
    from torch.distributed.distributed_c10d import _coalescing_manager

    rank, nranks, all_ranks = everybody()
    for async_ops in (False, True):
        outs = [torch.zeros(nranks, 2 + i) for i in range(3)]
        with _coalescing_manager(async_ops=async_ops) as manager:
            for i, out in enumerate(outs):
                dist.all_gather_into_tensor(out, make(2 + i, torch.float32, rank, i))
        if async_ops:
            manager.wait()
        for i, out in enumerate(outs):
            expect(out, torch.stack([make(2 + i, torch.float32, r, i) for r in all_ranks]), i, async_ops)


@pytest.mark.parametrize("nranks", [1, 3])
def test_all_gathers_in_the_coalescing_manager(ranks: Any, nranks: int) -> None:
    ranks.run(coalescing_manager, nranks)
