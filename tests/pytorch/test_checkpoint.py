"""Distributed checkpoints: a run that stops and goes on from one equals the run that did not, also with other ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

dcp = pytest.importorskip("torch.distributed.checkpoint", reason="this torch has no torch.distributed.checkpoint")
fsdp = pytest.importorskip("torch.distributed.fsdp")
if not hasattr(fsdp, "fully_shard") or not hasattr(dcp, "async_save"):
    pytest.skip("this torch lacks fully_shard or async_save", allow_module_level=True)

BATCHES = 4  # shards of the data: the whole batch is the same however many ranks share it


def build(nranks: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A sharded MLP and Adam, whose state is sharded with it."""
    model = models.mlp()
    mesh = init_device_mesh("cpu", (nranks,))
    for layer in (model.first, model.middle, model.last):
        fsdp.fully_shard(layer, mesh=mesh)
    fsdp.fully_shard(model, mesh=mesh)
    return model, torch.optim.Adam(model.parameters(), lr=0.05)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    share = BATCHES // dist.get_world_size()
    for step in steps:
        optimizer.zero_grad()
        mine = [models.batch(step, dist.get_rank() * share + i) for i in range(share)]
        models.loss_of(model, torch.cat([x for x, _ in mine]), torch.cat([y for _, y in mine])).backward()
        optimizer.step()


def states(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state, "step": torch.tensor(step)}


def full(model: nn.Module) -> dict[str, Any]:
    return {"weights": {name: parameter.detach().full_tensor() for name, parameter in model.named_parameters()}}


def alone(*rest: Any) -> dict[str, Any]:
    """Six steps without a stop."""
    model = models.mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for step in range(6):
        optimizer.zero_grad()
        models.loss_of(model, *models.whole_batch(step, BATCHES)).backward()
        optimizer.step()
    return {"weights": models.weights(model)}


def save(nranks: int, folder: str, how: str) -> dict[str, Any]:
    """Train three steps, save, and train on: what is saved must be the state at the save."""
    model, optimizer = build(nranks)
    train(model, optimizer, range(3))
    state = states(model, optimizer, 3)
    if how == "save":
        dcp.save(state, checkpoint_id=folder)
        train(model, optimizer, range(3, 6))
    else:
        # A group of its own: its collectives, from another thread, run while training's do.
        writing = dcp.async_save(state, checkpoint_id=folder, process_group=dist.new_group())
        train(model, optimizer, range(3, 6))
        writing.result()
    return full(model)


def load(nranks: int, folder: str, how: str) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import set_state_dict

    model, optimizer = build(nranks)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    state = states(model, optimizer, 0)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    train(model, optimizer, range(int(state["step"]), 6))
    return full(model)


@pytest.mark.parametrize("how", ["save", "async_save"])
def test_resume(ranks: Any, tmp_path: Path, how: str) -> None:
    folder = str(tmp_path / "checkpoint")
    # Adam divides by the root of squared gradients, and so amplifies rounding where they are small.
    tolerance = {"rtol": 1e-4, "atol": 1e-4}
    ranks.compare(save, 4, 4, folder, how, reference=alone, identical=("weights",), **tolerance)
    ranks.compare(load, 4, 4, folder, how, reference=alone, identical=("weights",), **tolerance)
    ranks.compare(load, 2, 2, folder, how, reference=alone, identical=("weights",), **tolerance)  # resharded


def save_replicated(nranks: int, folder: str) -> dict[str, Any]:
    """DDP's state is the same on all ranks: each saves a part; rank 0's step counter is broadcast on loading."""
    model = nn.parallel.DistributedDataParallel(models.mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    for step in range(4):
        optimizer.zero_grad()
        models.loss_of(model, *models.batch(step, dist.get_rank())).backward()
        optimizer.step()
    dcp.save({"model": model.module.state_dict()}, checkpoint_id=folder)
    fresh = models.mlp(seed=5)
    state = {"model": fresh.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    fresh.load_state_dict(state["model"])
    return {"weights": models.weights(fresh)}


def replicated_alone(nranks: int, folder: str) -> dict[str, Any]:
    return models.alone(nranks)


def test_replicated(ranks: Any, tmp_path: Path) -> None:
    ranks.compare(save_replicated, 2, 2, str(tmp_path / "checkpoint"), reference=replicated_alone, identical=("weights",))


def full_state(nranks: int) -> dict[str, Any]:
    """Gather a sharded model to one full state dict, change it on rank 0, and broadcast it into a sharded model."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

    model, _ = build(nranks)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    assert bool(state) == (dist.get_rank() == 0)
    state = {name: value * 2 for name, value in state.items()}
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    return full(model)


def doubled(nranks: int) -> dict[str, Any]:
    return {"weights": {name: value * 2 for name, value in models.weights(models.mlp()).items()}}


def test_full_state(ranks: Any) -> None:
    ranks.compare(full_state, 3, 3, reference=doubled, rtol=0.0, atol=0.0, identical=("weights",))
