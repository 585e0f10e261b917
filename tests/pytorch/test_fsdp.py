"""Fully sharded data parallel: FSDP1's strategies, and fully_shard with mixed precision, hybrid sharding, accumulation."""

from __future__ import annotations

import copy
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import MixedPrecision, ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

fsdp2 = pytest.importorskip("torch.distributed.fsdp", reason="torch without fully_shard")
if not hasattr(fsdp2, "fully_shard"):
    pytest.skip("this torch has no torch.distributed.fsdp.fully_shard", allow_module_level=True)

IDENTICAL = ("weights",)


def reference(nranks: int, *rest: Any) -> dict[str, Any]:
    """The same training in one process."""
    return models.alone(nranks)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int, shard: int, clip: float | None = None) -> None:
    optimizer.zero_grad()
    models.loss_of(model, *models.batch(number, shard)).backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()


# --- FSDP1 ---


def fsdp1(nranks: int, strategy: str) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard")) if strategy.startswith("HYBRID") else None
    model = FSDP(
        models.mlp(),
        sharding_strategy=getattr(ShardingStrategy, strategy),
        auto_wrap_policy=ModuleWrapPolicy({nn.Linear}),
        use_orig_params=True,
        device_id=torch.device("cpu"),
        device_mesh=mesh,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    for number in range(4):
        step(model, optimizer, number, dist.get_rank())
    with FSDP.summon_full_params(model):
        return {"weights": {n.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for n, p in model.named_parameters()}}


@pytest.mark.parametrize("strategy", ["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD"])
def test_fsdp1(ranks: Any, strategy: str) -> None:
    nranks = {"FULL_SHARD": 3, "HYBRID_SHARD": 4}.get(strategy, 2)
    ranks.compare(fsdp1, nranks, nranks, strategy, reference=reference, identical=IDENTICAL)


def flat(nranks: int) -> dict[str, Any]:
    model = FSDP(models.mlp(), auto_wrap_policy=ModuleWrapPolicy({nn.Linear}), device_id=torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    with model.no_sync():  # gradients of the whole parameters, then thrown away
        models.loss_of(model, *models.batch(0, dist.get_rank())).backward()
    for number in range(4):
        step(model, optimizer, number, dist.get_rank())
    return {"weights": models.weights(model)}


def test_fsdp1_flat(ranks: Any) -> None:
    ranks.compare(flat, 2, 2, reference=reference, identical=IDENTICAL)


def fsdp1_clipped(reduce_dtype: torch.dtype) -> dict[str, Any]:
    model = FSDP(
        models.mlp(),
        auto_wrap_policy=ModuleWrapPolicy({nn.Linear}),
        use_orig_params=True,
        device_id=torch.device("cpu"),
        mixed_precision=MixedPrecision(reduce_dtype=reduce_dtype),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    norms = []
    for number in range(4):
        optimizer.zero_grad()
        models.loss_of(model, *models.batch(number, dist.get_rank())).backward()
        norms.append(model.clip_grad_norm_(0.1).item())
        optimizer.step()
    return {"weights": models.weights(model), "norms": norms}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fsdp1_clipped(ranks: Any, dtype: torch.dtype) -> None:
    # bfloat16 keeps 8 bits of gradients, which are below 0.1 and move weights by 0.2 of themselves in each of four steps
    tolerance = {"rtol": 1e-2, "atol": 1e-3} if dtype == torch.bfloat16 else {}
    ranks.compare(fsdp1_clipped, 2, dtype, identical=IDENTICAL, **tolerance)


# --- fully_shard ---


def sharded(mesh: Any, **options: Any) -> models.MLP:
    """The MLP with each layer a group of its own."""
    model = models.mlp()
    for layer in (model.first, model.middle, model.last):
        fsdp2.fully_shard(layer, mesh=mesh, **options)
    fsdp2.fully_shard(model, mesh=mesh, **options)
    return model


def full(model: nn.Module) -> dict[str, Any]:
    return {"weights": {name: parameter.detach().full_tensor() for name, parameter in model.named_parameters()}}


def train(model: nn.Module, clip: float | None = None) -> dict[str, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    for number in range(4):
        step(model, optimizer, number, dist.get_rank(), clip)
    return full(model)


def plain(nranks: int, options: dict[str, Any]) -> dict[str, Any]:
    return train(sharded(init_device_mesh("cpu", (nranks,)), **options))


@pytest.mark.parametrize("nranks", [2, 3])
@pytest.mark.parametrize("options", [{}, {"reshard_after_forward": False}], ids=["reshard", "keep"])
def test_fully_shard(ranks: Any, nranks: int, options: dict[str, Any]) -> None:
    ranks.compare(plain, nranks, nranks, options, reference=reference, identical=IDENTICAL)


def hybrid(nranks: int) -> dict[str, Any]:
    return train(sharded(init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))))


def test_hybrid(ranks: Any) -> None:
    ranks.compare(hybrid, 4, 4, reference=reference, identical=IDENTICAL)


def half(nranks: int, reduce_dtype: torch.dtype) -> dict[str, Any]:
    policy = fsdp2.MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype)
    return train(sharded(init_device_mesh("cpu", (nranks,)), mp_policy=policy))


def half_alone(nranks: int, reduce_dtype: torch.dtype) -> dict[str, Any]:
    """Gradients from bfloat16 copies, one for each rank's batch; averaged in float32."""
    model = models.mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    for number in range(4):
        optimizer.zero_grad()
        for rank in range(nranks):
            copied = copy.deepcopy(model).bfloat16()
            x, y = models.batch(number, rank)
            models.loss_of(copied, x.bfloat16(), y).backward()
            for parameter, low in zip(model.parameters(), copied.parameters()):
                part = low.grad.float() / nranks
                parameter.grad = part if parameter.grad is None else parameter.grad + part
        optimizer.step()
    return {"weights": models.weights(model)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mixed_precision(ranks: Any, dtype: torch.dtype) -> None:
    # A weight whose rounding to bfloat16 falls the other way changes outputs by 2**-8 of themselves.
    ranks.compare(half, 2, 2, dtype, reference=half_alone, rtol=1e-2, atol=1e-2, identical=IDENTICAL)


def clipped(nranks: int) -> dict[str, Any]:
    return train(sharded(init_device_mesh("cpu", (nranks,))), clip=0.1)


def clipped_alone(nranks: int) -> dict[str, Any]:
    model = models.mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    for number in range(4):
        optimizer.zero_grad()
        models.loss_of(model, *models.whole_batch(number, nranks)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    return {"weights": models.weights(model)}


def test_clipped(ranks: Any) -> None:
    ranks.compare(clipped, 2, 2, reference=clipped_alone, identical=IDENTICAL)


def accumulated(nranks: int) -> dict[str, Any]:
    model = sharded(init_device_mesh("cpu", (nranks,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for number in range(6):
        last = number % 3 == 2
        model.set_requires_gradient_sync(last)
        models.loss_of(model, *models.batch(number, dist.get_rank())).backward()
        if last:
            optimizer.step()
            optimizer.zero_grad()
    return full(model)


def accumulated_alone(nranks: int) -> dict[str, Any]:
    model = models.mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for number in range(6):
        models.loss_of(model, *models.whole_batch(number, nranks)).backward()
        if number % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
    return {"weights": models.weights(model)}


def test_accumulated(ranks: Any) -> None:
    ranks.compare(accumulated, 2, 2, reference=accumulated_alone, identical=IDENTICAL)


def divided(nranks: int, factor: float) -> dict[str, Any]:
    model = sharded(init_device_mesh("cpu", (nranks,)))
    for module in (model.first, model.middle, model.last, model):
        name = "set_gradient_divide_factor"
        getattr(module, name if hasattr(module, name) else "set_reduce_scatter_divide_factor")(factor)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2 * factor / nranks)  # which undoes the factor
    for number in range(4):
        step(model, optimizer, number, dist.get_rank())
    return full(model)


def divided_alone(nranks: int, factor: float) -> dict[str, Any]:
    return models.alone(nranks, momentum=0.0)


def test_divide_factor(ranks: Any) -> None:
    """fully_shard asks for PREMUL_SUM."""
    if ranks.backend == "gloo":
        pytest.skip("Gloo has no PREMUL_SUM")
    ranks.compare(divided, 2, 2, 5.0, reference=divided_alone, identical=IDENTICAL)


def sharded_compiled(nranks: int) -> dict[str, Any]:
    model = sharded(init_device_mesh("cpu", (nranks,)))
    for layer in (model.first, model.middle, model.last):
        layer.compile(backend="aot_eager")
    return train(model)


def test_compiled_layers(ranks: Any) -> None:
    ranks.compare(sharded_compiled, 2, 2, reference=reference, identical=IDENTICAL)
