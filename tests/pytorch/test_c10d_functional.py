"""Functional collectives (torch.distributed._functional_collectives) and the differentiable ones (torch.distributed.nn)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from tensors import expect, make

NRANKS = pytest.mark.parametrize("nranks", [1, 2, 3, 4])


def everybody() -> tuple[int, int, list[torch.Tensor]]:
    """This rank, the number of ranks, and a tensor of each."""
    nranks = dist.get_world_size()
    return dist.get_rank(), nranks, [make((2 * nranks, 3), torch.float32, r) for r in range(nranks)]


def functional() -> None:
    import torch.distributed._functional_collectives as fc

    rank, nranks, every = everybody()
    mine, group = every[rank], dist.group.WORLD
    total = torch.stack(every).sum(0)
    expect(fc.all_reduce(mine, "sum", group) + 0, total, "all_reduce sum")
    expect(fc.all_reduce(mine, "max", group) + 0, torch.stack(every).amax(0), "all_reduce max")
    expect(fc.all_reduce(mine, "avg", group) + 0, total / nranks, "all_reduce avg", rounding=True)
    expect(mine, make((2 * nranks, 3), torch.float32, rank), "the input is as it was")
    expect(fc.wait_tensor(fc.all_reduce(mine, "sum", list(range(nranks)))), total, "group as a list of ranks")
    expect(fc.broadcast(mine, nranks - 1, group) + 0, every[-1], "broadcast")
    expect(fc.all_gather_tensor(mine, 0, group) + 0, torch.cat(every), "all_gather_tensor, dim 0")
    expect(fc.all_gather_tensor(mine, 1, group) + 0, torch.cat(every, 1), "all_gather_tensor, dim 1")
    expect(fc.reduce_scatter_tensor(mine, "sum", 0, group) + 0, total[2 * rank : 2 * rank + 2], "reduce_scatter_tensor, dim 0")
    wide = [make((2, 3 * nranks), torch.float32, r) for r in range(nranks)]
    columns = torch.stack(wide).sum(0)[:, 3 * rank : 3 * rank + 3].contiguous()
    expect(fc.reduce_scatter_tensor(wide[rank], "sum", 1, group) + 0, columns, "reduce_scatter_tensor, dim 1")
    swapped = torch.cat([tensor[2 * rank : 2 * rank + 2] for tensor in every])
    expect(fc.all_to_all_single(mine, None, None, group) + 0, swapped, "all_to_all_single")
    rows = [[(s + d) % 3 for d in range(nranks)] for s in range(nranks)]
    parts = [[make((rows[s][d], 2), torch.float32, s, d) for d in range(nranks)] for s in range(nranks)]
    out = fc.all_to_all_single(torch.cat(parts[rank]), [rows[s][rank] for s in range(nranks)], rows[rank], group)
    expect(out + 0, torch.cat([parts[s][rank] for s in range(nranks)]), "all_to_all_single, uneven")
    right = [(r + 1) % nranks for r in range(nranks)]
    flat = fc.permute_tensor(mine.flatten(), right, group) + 0  # torch's arithmetic is right for one dimension
    expect(flat, every[(rank - 1) % nranks].flatten(), "permute_tensor")


@NRANKS
def test_functional_collectives(ranks: Any, nranks: int) -> None:
    ranks.run(functional, nranks)


def functional_coalesced() -> None:
    import torch.distributed._functional_collectives as fc

    rank, _, every = everybody()
    group = dist.group.WORLD
    lists = [[tensor, tensor[:, 0].contiguous()] for tensor in every]
    for i, out in enumerate(fc.all_reduce_coalesced(lists[rank], "sum", group)):
        expect(out + 0, torch.stack([tensors[i] for tensors in lists]).sum(0), "all_reduce_coalesced", i)
    for i, out in enumerate(fc.all_gather_into_tensor_coalesced(lists[rank], group)):
        expect(out + 0, torch.cat([tensors[i] for tensors in lists]), "all_gather_into_tensor_coalesced", i)
    for i, out in enumerate(fc.reduce_scatter_tensor_coalesced(lists[rank], "sum", [0, 0], group)):
        wanted = torch.stack([tensors[i] for tensors in lists]).sum(0)[2 * rank : 2 * rank + 2]
        expect(out + 0, wanted, "reduce_scatter_tensor_coalesced", i)


@pytest.mark.parametrize("nranks", [1, 3])
def test_functional_collectives_coalesced(ranks: Any, nranks: int) -> None:
    ranks.run(functional_coalesced, nranks)


def functional_many_at_once() -> None:
    """Results that are waited for late, in another order, or never."""
    import torch.distributed._functional_collectives as fc

    rank, _, every = everybody()
    outs = [fc.all_reduce(every[rank] * i, "sum", dist.group.WORLD) for i in range(20)]
    fc.all_reduce(every[rank], "sum", dist.group.WORLD)
    for i in reversed(range(20)):
        expect(outs[i] + 0, torch.stack(every).sum(0) * i, i)


@pytest.mark.parametrize("nranks", [2, 3])
def test_functional_collectives_under_way_at_once(ranks: Any, nranks: int) -> None:
    ranks.run(functional_many_at_once, nranks)


def functional_autograd() -> None:
    import torch.distributed._functional_collectives as fc

    rank, nranks, every = everybody()
    group = dist.group.WORLD
    weight = torch.arange(1.0, 1 + 2 * nranks * 3).reshape(2 * nranks, 3)

    mine = every[rank].clone().requires_grad_()
    (fc.all_to_all_single_autograd(mine, None, None, group) * weight).sum().backward()
    wanted = torch.cat([weight[2 * rank : 2 * rank + 2] for _ in range(nranks)])
    expect(mine.grad, wanted, "all_to_all_single_autograd")

    mine = every[rank].clone().requires_grad_()
    (fc.all_gather_tensor_autograd(mine, 0, group) * (rank + 1)).sum().backward()
    expect(mine.grad, torch.full_like(mine, sum(range(1, nranks + 1))), "all_gather_tensor_autograd")

    mine = every[rank].clone().requires_grad_()
    (fc.reduce_scatter_tensor_autograd(mine, "sum", 0, group) * (rank + 1)).sum().backward()
    expect(mine.grad, torch.arange(1.0, nranks + 1).repeat_interleave(2)[:, None].expand(-1, 3), "reduce_scatter_tensor_autograd")


@NRANKS
def test_functional_collectives_with_autograd(ranks: Any, nranks: int) -> None:
    ranks.run(functional_autograd, nranks)


def differentiable() -> None:
    import torch.distributed.nn.functional as dnn

    rank, nranks, every = everybody()
    ones = float(sum(range(1, nranks + 1)))

    def gradient_of(function: Any) -> torch.Tensor:
        mine = every[rank].clone().requires_grad_()
        out = function(mine)
        loss = sum(o.sum() for o in out) if isinstance(out, (tuple, list)) else out.sum()
        (loss * (rank + 1)).backward()
        assert mine.grad is not None
        return mine.grad

    expect(gradient_of(dnn.all_reduce), torch.full((2 * nranks, 3), ones), "all_reduce")
    expect(gradient_of(dnn.all_gather), torch.full((2 * nranks, 3), ones), "all_gather")
    wanted = torch.full((2 * nranks, 3), ones if rank == 0 else 0.0)
    expect(gradient_of(lambda mine: dnn.broadcast(mine, 0)), wanted, "broadcast")
    wanted = torch.arange(1.0, nranks + 1).repeat_interleave(2)[:, None].expand(-1, 3)
    swap = lambda mine: dnn.all_to_all([torch.empty(2, 3) for _ in range(nranks)], list(mine.split(2)))  # noqa: E731
    expect(gradient_of(swap), wanted, "all_to_all")
    single = lambda mine: dnn.all_to_all_single(torch.empty_like(mine), mine)  # noqa: E731
    expect(gradient_of(single), wanted, "all_to_all_single")


@pytest.mark.parametrize("nranks", [1, 3])
def test_differentiable_collectives(ranks: Any, nranks: int) -> None:
    ranks.run(differentiable, nranks)
