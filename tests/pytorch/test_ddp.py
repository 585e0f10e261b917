"""DistributedDataParallel: buckets, graphs, uneven inputs, communication hooks, local SGD, torch.compile, ZeRO."""

from __future__ import annotations

import contextlib
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, post_localSGD_hook, powerSGD_hook
from torch.distributed.algorithms.join import Join
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel as DDP

#: Megabytes that hold one weight matrix of the MLP: several buckets a step.
TINY = 0.0005
IDENTICAL = ("weights",)


def result(model: nn.Module, **more: Any) -> dict[str, Any]:
    """What a test compares."""
    return {"weights": models.weights(model), **more}


def train(model: nn.Module, steps: int = 4, lr: float = 0.2, momentum: float = 0.9) -> dict[str, Any]:
    """Plain SGD on this rank's batches."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = models.loss_of(model, *models.batch(step, dist.get_rank()))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return result(model, losses=losses)


def reference(nranks: int, *rest: Any) -> dict[str, Any]:
    """The same training in one process."""
    return models.alone(nranks)


# --- the reducer ---


def plain(nranks: int, options: dict[str, Any]) -> dict[str, Any]:
    model = DDP(models.mlp(seed=1 + dist.get_rank()), **options)  # rank 0's weights must reach the others
    train(model)
    return result(model)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bucket_cap_mb": TINY},
        {"bucket_cap_mb": TINY, "gradient_as_bucket_view": True},
        {"bucket_cap_mb": TINY, "static_graph": True},
        {"bucket_cap_mb": TINY, "find_unused_parameters": True, "gradient_as_bucket_view": True},
        {"bucket_cap_mb": TINY, "broadcast_buffers": False},
    ],
    ids=lambda options: "-".join(options) or "default",
)
@pytest.mark.parametrize("nranks", [2, 4])
def test_options(ranks: Any, nranks: int, options: dict[str, Any]) -> None:
    if nranks == 4 and len(options) != 2:
        pytest.skip("with 2 ranks is enough")
    ranks.compare(plain, nranks, nranks, options, reference=reference, identical=IDENTICAL)


def test_three_ranks(ranks: Any) -> None:
    ranks.compare(plain, 3, 3, {"bucket_cap_mb": TINY}, reference=reference, identical=IDENTICAL)


def unused(everywhere: bool) -> dict[str, Any]:
    model = DDP(models.mlp(), bucket_cap_mb=TINY, find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    graded = []
    for step in range(5):
        optimizer.zero_grad()
        skip = step % 2 == 1 and (everywhere or dist.get_rank() == 0)
        models.loss_of(model, *models.batch(step, dist.get_rank()), skip=skip).backward()
        graded.append([parameter.grad is not None for parameter in model.parameters()])
        optimizer.step()
    return result(model, graded=graded)


@pytest.mark.parametrize("everywhere", [True, False], ids=["all-ranks", "one-rank"])
def test_unused_parameters(ranks: Any, everywhere: bool) -> None:
    ranks.compare(unused, 2, everywhere, identical=IDENTICAL)


def accumulate(view: bool) -> dict[str, Any]:
    model = DDP(models.mlp(), bucket_cap_mb=TINY, gradient_as_bucket_view=view)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for step in range(6):
        last = step % 3 == 2
        with contextlib.nullcontext() if last else model.no_sync():
            models.loss_of(model, *models.batch(step, dist.get_rank())).backward()
        if last:
            optimizer.step()
            optimizer.zero_grad()
    return result(model)


@pytest.mark.parametrize("view", [False, True], ids=["copies", "bucket-view"])
def test_no_sync(ranks: Any, view: bool) -> None:
    ranks.compare(accumulate, 2, view, identical=IDENTICAL)


class Normed(models.MLP):
    """With buffers (float and int64) that DDP broadcasts before each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(models.IN)

    def forward(self, x: torch.Tensor, skip: bool = False) -> torch.Tensor:
        return super().forward(self.norm(x), skip)


def buffers() -> dict[str, Any]:
    model = DDP(models.seeded(Normed))
    train(model)
    model.eval()
    model.train()
    models.loss_of(model, *models.batch(9, 0))  # a forward pass brings rank 0's buffers, and the same batch the same update
    return result(model)


def test_buffers(ranks: Any) -> None:
    ranks.compare(buffers, 2, identical=IDENTICAL)


def mixed_dtypes() -> dict[str, Any]:
    model = models.mlp()
    model.middle.double()
    model.last.bfloat16()

    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(model.first(x))
            x = torch.relu(model.middle(x.double()))
            return model.last(x.bfloat16()).float()

    wrapped = DDP(Casting(), bucket_cap_mb=TINY)
    train(wrapped)
    return result(model)


def test_buckets_of_several_dtypes(ranks: Any) -> None:
    # One bfloat16 rounding of a gradient is 2**-8 of it, gradients are below 1, and four steps of 0.2 with momentum add up.
    ranks.compare(mixed_dtypes, 2, rtol=1e-2, atol=1e-2, identical=IDENTICAL)


# --- uneven inputs ---


def uneven(throw: bool) -> dict[str, Any]:
    model = DDP(models.mlp(), bucket_cap_mb=TINY)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    done = 0
    with (
        pytest.raises(RuntimeError, match="exhausted") if throw else contextlib.nullcontext(),
        model.join(throw_on_early_termination=throw),
    ):
        for step in range(3 + 2 * dist.get_rank()):
            optimizer.zero_grad()
            models.loss_of(model, *models.batch(step, dist.get_rank())).backward()
            optimizer.step()
            done += 1
    return {"done": done} if throw else result(model, done=done)


@pytest.mark.parametrize("throw", [False, True], ids=["shadow", "throw"])
def test_join(ranks: Any, throw: bool) -> None:
    ranks.compare(uneven, 2, throw, identical=() if throw else IDENTICAL)


def uneven_zero() -> dict[str, Any]:
    model = DDP(models.mlp())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.2)
    with Join([model, optimizer]):
        for step in range(2 + dist.get_rank()):
            optimizer.zero_grad()
            models.loss_of(model, *models.batch(step, dist.get_rank())).backward()
            optimizer.step()
    return result(model)


def test_join_with_zero(ranks: Any) -> None:
    ranks.compare(uneven_zero, 3, identical=IDENTICAL)


# --- communication hooks ---


# DDP compares a hook's annotations with types; these would be strings.
def average_by_hand(group, bucket):  # type: ignore[no-untyped-def]
    """All-reduce, then divide in a callback of a callback."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    doubled = work.get_future().then(lambda future: future.value()[0] * 2)
    return doubled.then(lambda future: future.value() / (2 * dist.get_world_size(group)))


def all_gather_by_hand(group, bucket):  # type: ignore[no-untyped-def]
    """Average gathered gradients: the future of another collective, whose value is not the bucket."""
    parts = [torch.empty_like(bucket.buffer()) for _ in range(dist.get_world_size(group))]
    work = dist.all_gather(parts, bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda future: torch.stack(parts).mean(0))


def bf16(group, bucket):  # type: ignore[no-untyped-def]
    """DDP refuses the hook under its own name where there is no CUDA."""
    return default_hooks.bf16_compress_hook(group, bucket)


HOOKS = {
    "by-hand": average_by_hand,
    "all_gather": all_gather_by_hand,
    "allreduce": default_hooks.allreduce_hook,
    "fp16": default_hooks.fp16_compress_hook,
    "bf16": bf16,
    "fp16-wrapped": default_hooks.fp16_compress_wrapper(default_hooks.allreduce_hook),
}


def hooked(nranks: int, name: str) -> dict[str, Any]:
    model = DDP(models.mlp(), bucket_cap_mb=TINY)
    model.register_comm_hook(None, HOOKS[name])
    train(model)
    return result(model)


def tolerance(name: str) -> dict[str, float]:
    """For gradients below 1 that are rounded to the wire's dtype, through four steps of 0.2 with momentum 0.9."""
    if "fp16" in name.lower():
        return {"rtol": 1e-3, "atol": 2e-3}
    return {"rtol": 1e-2, "atol": 1e-2} if "bf16" in name else {}


@pytest.mark.parametrize("name", HOOKS)
def test_python_hook(ranks: Any, name: str) -> None:
    ranks.compare(hooked, 2, 2, name, reference=reference, identical=IDENTICAL, **tolerance(name))


def built_in(nranks: int, name: str) -> dict[str, Any]:
    model = DDP(models.mlp(), bucket_cap_mb=TINY)
    model._register_builtin_comm_hook(getattr(dist.BuiltinCommHookType, name))
    train(model)
    return result(model)


@pytest.mark.parametrize("name", ["ALLREDUCE", "FP16_COMPRESS"])
def test_built_in_hook(ranks: Any, name: str) -> None:
    ranks.compare(built_in, 2, 2, name, reference=reference, identical=IDENTICAL, **tolerance(name))


def power_sgd(warm_start: bool) -> dict[str, Any]:
    # One bucket: the hook starts collectives in callbacks, and those of several buckets may come in another order on each rank.
    model = DDP(models.mlp())
    state = powerSGD_hook.PowerSGDState(
        None, matrix_approximation_rank=1, start_powerSGD_iter=2, min_compression_rate=0.5, warm_start=warm_start
    )
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    train(model, steps=6, lr=0.05)
    assert state.compression_stats()[0] > 1.0, "nothing was compressed"
    return result(model)


@pytest.mark.parametrize("warm_start", [True, False], ids=["warm", "cold"])
def test_power_sgd(ranks: Any, warm_start: bool) -> None:
    # The orthogonalisation divides by norms and so amplifies rounding.
    ranks.compare(power_sgd, 2, warm_start, rtol=1e-3, atol=1e-4, identical=IDENTICAL)


def optimizer_in_hook() -> dict[str, Any]:
    from torch.distributed.algorithms.ddp_comm_hooks.optimizer_overlap_hooks import _hook_then_optimizer, _OptimizerHookState
    from torch.distributed.optim import as_functional_optim

    model = DDP(models.mlp(), bucket_cap_mb=TINY)
    optimizer = _OptimizerHookState(as_functional_optim(torch.optim.SGD, lr=0.2), list(model.parameters()))
    model.register_comm_hook(None, _hook_then_optimizer(default_hooks.allreduce_hook, optimizer))
    for step in range(4):
        model.zero_grad()
        models.loss_of(model, *models.batch(step, dist.get_rank())).backward()
    return result(model)


def test_optimizer_in_hook(ranks: Any) -> None:
    ranks.compare(optimizer_in_hook, 2, identical=IDENTICAL)


def local_sgd() -> dict[str, Any]:
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

    subgroups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = DDP(models.mlp())
    state = post_localSGD_hook.PostLocalSGDState(
        process_group=None, subgroup=subgroups[dist.get_rank() // 2], start_localSGD_iter=2
    )
    model.register_comm_hook(state, post_localSGD_hook.post_localSGD_hook)
    averager = PeriodicModelAverager(period=2, warmup_steps=2)
    optimizer = PostLocalSGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.2), averager)
    for step in range(7):  # ends on an average
        optimizer.zero_grad()
        models.loss_of(model, *models.batch(step, dist.get_rank())).backward()
        optimizer.step()
    return result(model)


def test_post_local_sgd(ranks: Any) -> None:
    ranks.compare(local_sgd, 4, identical=IDENTICAL)


# --- torch.compile ---


def compiled(nranks: int, backend: str) -> dict[str, Any]:
    inner = models.mlp()
    if backend == "inductor":
        model = DDP(inner)  # each graph costs seconds of compiling: have one
    else:
        dist._DEFAULT_FIRST_BUCKET_BYTES = 256  # so that dynamo cuts the small model's graph at its buckets
        model = DDP(inner, bucket_cap_mb=TINY)
    train(torch.compile(model, backend=backend))
    return result(inner)


@pytest.mark.limit(180)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(ranks: Any, backend: str) -> None:
    ranks.compare(compiled, 2, 2, backend, reference=reference, identical=IDENTICAL, timeout=150.0)


# --- ZeRO ---


def zero(nranks: int, view: bool) -> dict[str, Any]:
    model = DDP(models.mlp(), gradient_as_bucket_view=view)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, parameters_as_bucket_view=view, lr=0.2, momentum=0.9)
    for step in range(4):
        optimizer.zero_grad()
        models.loss_of(model, *models.batch(step, dist.get_rank())).backward()
        optimizer.step()
    optimizer.consolidate_state_dict(to=1)  # objects to rank 1
    if dist.get_rank() == 1:
        assert len(optimizer.state_dict()["state"]) == len(list(model.parameters()))
    return result(model)


@pytest.mark.parametrize("view", [False, True], ids=["copies", "bucket-view"])
def test_zero(ranks: Any, view: bool) -> None:
    ranks.compare(zero, 3, 3, view, reference=reference, identical=IDENTICAL)


def zero_in_hook(nranks: int, interleaved: bool) -> dict[str, Any]:
    from torch.distributed.algorithms.ddp_comm_hooks import ddp_zero_hook

    # Interleaved, the hook starts broadcasts in callbacks: one bucket, for several would race on each rank (as in power_sgd).
    model = DDP(models.mlp(), bucket_cap_mb=25 if interleaved else TINY, static_graph=True)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, overlap_with_ddp=True, lr=0.2, momentum=0.9)
    wrap = ddp_zero_hook.hook_with_zero_step_interleaved if interleaved else ddp_zero_hook.hook_with_zero_step
    model.register_comm_hook(None, wrap(default_hooks.allreduce_hook, model, optimizer, shard_buckets=not interleaved))
    for step in [0, 0, 0, 0, 1, 2, 3]:  # the first three only warm up: buckets are built, then sharded
        model.zero_grad()
        models.loss_of(model, *models.batch(step, dist.get_rank())).backward()
    dist.barrier()
    return result(model)


@pytest.mark.parametrize("interleaved", [False, True], ids=["after", "interleaved"])
def test_zero_overlapped(ranks: Any, interleaved: bool) -> None:
    if ranks.backend == "gloo":
        pytest.skip("torch refuses this on Gloo")
    ranks.compare(zero_in_hook, 2, 2, interleaved, reference=reference, identical=IDENTICAL)
