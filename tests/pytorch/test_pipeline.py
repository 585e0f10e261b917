"""Pipelines: every schedule's training equals that of the whole model in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

pipelining = pytest.importorskip("torch.distributed.pipelining", reason="this torch has no torch.distributed.pipelining")
# torch 2.4 had the parts, but not yet under these names
schedules = pytest.importorskip("torch.distributed.pipelining.schedules")

WIDTH, BATCH, STEPS = 8, 8, 3


def layer(index: int) -> nn.Module:
    """Stage `index` of the model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(index)
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


def data(step: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, WIDTH, generator=random), torch.randn(BATCH, WIDTH, generator=random)


def state(stages: dict[int, nn.Module]) -> dict[str, Tensor]:
    return {f"{i}.{name}": value.detach().clone() for i in sorted(stages) for name, value in stages[i].state_dict().items()}


def piped(nranks: int, name: str, per_rank: int, microbatches: int) -> dict[str, Any]:
    """Train; every rank returns the weights of all stages, and the last stage's losses."""
    rank, nstages = dist.get_rank(), nranks * per_rank
    v_shaped = name in ("ScheduleZBVZeroBubble", "ScheduleDualPipeV")
    mine = [rank, nstages - 1 - rank] if v_shaped else list(range(rank, nstages, nranks))
    modules = {i: layer(i) for i in mine}
    stages = [pipelining.PipelineStage(modules[i], i, nstages, torch.device("cpu")) for i in mine]
    kind = getattr(schedules, name)
    loss_fn = nn.functional.mse_loss
    schedule = kind(stages if per_rank > 1 else stages[0], microbatches, loss_fn=loss_fn)
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9) for module in modules.values()]
    means = []
    for step in range(STEPS):
        for optimizer in optimizers:
            optimizer.zero_grad()
        x, y = data(step)
        losses: list[Tensor] = []
        has_first, has_last = 0 in mine, nstages - 1 in mine
        schedule.step(*([x] if has_first else []), target=y if has_last else None, losses=losses if has_last else None)
        for optimizer in optimizers:
            optimizer.step()
        means.append(torch.stack(losses).mean().item() if has_last else None)
    gathered: list[Any] = [None] * nranks
    dist.all_gather_object(gathered, (state(modules), means))
    weights = {key: value for part, _ in gathered for key, value in part.items()}
    found = next(losses for _, losses in gathered if None not in losses)
    return {"weights": dict(sorted(weights.items())), "losses": found}


def whole(nranks: int, name: str, per_rank: int, microbatches: int) -> dict[str, Any]:
    modules = {i: layer(i) for i in range(nranks * per_rank)}
    model = nn.Sequential(*modules.values())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = data(step)
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {"weights": dict(sorted(state(modules).items())), "losses": losses}


@pytest.mark.parametrize(
    ("name", "nranks", "per_rank", "microbatches"),
    [
        ("ScheduleGPipe", 2, 1, 4),
        ("ScheduleGPipe", 4, 1, 2),
        ("Schedule1F1B", 2, 1, 4),
        ("Schedule1F1B", 3, 1, 8),
        ("ScheduleInterleaved1F1B", 2, 2, 4),
        ("ScheduleLoopedBFS", 2, 2, 4),
        ("ScheduleInterleavedZeroBubble", 2, 2, 4),
        ("ScheduleZBVZeroBubble", 2, 2, 4),
    ],
)
def test_schedule(ranks: Any, name: str, nranks: int, per_rank: int, microbatches: int) -> None:
    if not hasattr(schedules, name):
        pytest.skip(f"this torch has no {name}")
    ranks.compare(piped, nranks, nranks, name, per_rank, microbatches, reference=whole, identical=("weights", "losses"))
