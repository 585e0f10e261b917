"""What torch_matrix runs on each torch version: one part of a fixed set, on one of two ranks, against values computed here.

python torch_matrix_set.py PART BACKEND STORE RANK; exit status 0: right. It uses nothing that torch 2.4 lacks.
"""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

SIZE, STEPS, RATE = 2, 3, 0.1


def same(actual: Any, expected: Any, what: str) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6, msg=lambda text: f"{what}: {text}")


# --- operations ---


def c10d(rank: int) -> None:
    """Collectives of all kinds, messages, futures, objects, a subgroup."""
    mine, both = torch.full((6,), rank + 1.0), [torch.full((6,), 1.0), torch.full((6,), 2.0)]
    for op, value in ((dist.ReduceOp.SUM, 3.0), (dist.ReduceOp.MAX, 2.0), (dist.ReduceOp.PRODUCT, 2.0)):
        x = mine.clone()
        dist.all_reduce(x, op)
        same(x, torch.full((6,), value), f"all_reduce {op}")
    x = mine.clone()
    work = dist.all_reduce(x, async_op=True)
    (y,) = work.get_future().then(lambda done: [done.value()[0] * 2]).wait()
    same(y, torch.full((6,), 6.0), "all_reduce's future")
    x = mine.clone()
    dist.broadcast(x, 1)
    same(x, both[1], "broadcast")
    x = mine.clone()
    dist.reduce(x, 0)
    if rank == 0:
        same(x, torch.full((6,), 3.0), "reduce")
    parts = [torch.zeros(6), torch.zeros(6)]
    dist.all_gather(parts, mine)
    same(parts, both, "all_gather")
    whole = torch.zeros(12)
    dist.all_gather_into_tensor(whole, mine)
    same(whole, torch.cat(both), "all_gather_into_tensor")
    parts = [torch.zeros(6), torch.zeros(6)] if rank == 0 else []
    dist.gather(mine, parts or None)
    if rank == 0:
        same(parts, both, "gather")
    x = torch.zeros(6)
    dist.scatter(x, both if rank == 0 else None)
    same(x, both[rank], "scatter")
    dist.reduce_scatter(x, [mine.clone(), mine * 2])
    same(x, torch.full((6,), 3.0 * (rank + 1)), "reduce_scatter")
    x = torch.zeros(3)
    dist.reduce_scatter_tensor(x, mine.clone())
    same(x, torch.full((3,), 3.0), "reduce_scatter_tensor")
    x = torch.zeros(6)
    dist.all_to_all_single(x, mine)
    same(x, torch.tensor([1.0] * 3 + [2.0] * 3), "all_to_all_single")
    x = torch.zeros(6)
    if rank == 0:
        dist.send(mine, 1)
        dist.recv(x, 1)
    else:
        dist.recv(x, 0)
        dist.send(mine, 0)
    same(x, both[1 - rank], "send and recv")
    found: list[Any] = [None, None]
    dist.all_gather_object(found, {"rank": rank})
    assert found == [{"rank": 0}, {"rank": 1}], found
    group = dist.new_group([0, 1])
    x = mine.clone()
    dist.all_reduce(x, group=group)
    same(x, torch.full((6,), 3.0), "all_reduce in a subgroup")
    dist.barrier()


def functional(rank: int) -> None:
    """Functional collectives, which C++ starts and waits for."""
    import torch.distributed._functional_collectives as fc

    mine, world = torch.full((4,), rank + 1.0), dist.group.WORLD
    same(fc.all_reduce(mine, "sum", world) + 0, torch.full((4,), 3.0), "all_reduce")
    same(fc.all_gather_tensor(mine, 0, world) + 0, torch.tensor([1.0] * 4 + [2.0] * 4), "all_gather_tensor")
    same(fc.reduce_scatter_tensor(mine, "sum", 0, world) + 0, torch.full((2,), 3.0), "reduce_scatter_tensor")
    same(fc.all_to_all_single(mine, None, None, world) + 0, torch.tensor([1.0, 1.0, 2.0, 2.0]), "all_to_all_single")
    same(fc.broadcast(mine, 1, world) + 0, torch.full((4,), 2.0), "broadcast")
    same(fc.all_reduce_coalesced([mine, mine * 2], "sum", world)[1] + 0, torch.full((4,), 6.0), "all_reduce_coalesced")


# --- training ---


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))


def batch(step: int, rank: int) -> torch.Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(10 * step + rank))


def losses(net: Callable[[torch.Tensor], torch.Tensor], rank: int) -> Iterator[torch.Tensor]:
    for step in range(STEPS):
        yield net(batch(step, rank)).square().mean()


def expected() -> dict[str, torch.Tensor]:
    """The weights after the steps, computed in one process."""
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), RATE)
    for step in range(STEPS):
        optimizer.zero_grad()
        sum(net(batch(step, rank)).square().mean() / SIZE for rank in range(SIZE)).backward()  # type: ignore[union-attr]
        optimizer.step()
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def train(net: nn.Module, rank: int, sync: Callable[[], Any] = lambda: None) -> None:
    optimizer = torch.optim.SGD(net.parameters(), RATE)
    for loss in losses(net, rank):
        loss.backward()
        sync()
        optimizer.step()
        optimizer.zero_grad()


def ddp(rank: int) -> None:
    net = nn.parallel.DistributedDataParallel(model(), bucket_cap_mb=0.0002)  # type: ignore[arg-type]
    train(net, rank)
    same(net.module.state_dict(), expected(), "weights")


def fsdp1(rank: int) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    net = FSDP(model(), device_id=torch.device("cpu"))
    train(net, rank)
    with FSDP.summon_full_params(net):
        for (name, value), want in zip(net.named_parameters(), expected().values()):
            same(value.detach().view(want.shape), want, name)


def fsdp2(rank: int) -> None:
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        from torch.distributed._composable.fsdp import fully_shard  # type: ignore[no-redef]
    from torch.distributed.device_mesh import init_device_mesh

    net = model()
    fully_shard(net, mesh=init_device_mesh("cpu", (SIZE,)))
    train(net, rank)
    for name, want in expected().items():
        value: Any = dict(net.named_parameters())[name]
        same(value.full_tensor().detach(), want, name)


def reducer(rank: int) -> None:
    import hfreduce.torch

    net = model()
    sync = hfreduce.torch.GradientReducer(net.parameters())
    train(net, rank, sync.synchronize)
    same(net.state_dict(), expected(), "weights")


PARTS = {part.__name__: part for part in (c10d, functional, ddp, fsdp1, fsdp2, reducer)}


def main() -> None:
    part, backend, path, rank = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
    faulthandler.dump_traceback_later(90, exit=True)
    torch.set_num_threads(1)
    if backend == "hfreduce":
        import hfreduce.torch  # noqa: F401 (torch 2.4 does not find it by itself)
    store = dist.FileStore(path, SIZE)
    dist.init_process_group(backend, store=store, rank=rank, world_size=SIZE, timeout=timedelta(seconds=80))
    PARTS[part](rank)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
