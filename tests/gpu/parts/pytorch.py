"""PyTorch: the backend "hfreduce" on CUDA tensors beside one process or Gloo, and unmodified backend="nccl" under `hfreduce exec`.

In a dry run the tensors are the CPU's, and what needs CUDA says so.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ranks
import results
from results import Absent, Wrong

STAND_IN = bool(os.environ.get("FIRST_CONTACT_STAND_IN"))
WHERE = "cpu" if STAND_IN else "cuda:0"
EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
STEPS = 3


def need_cuda() -> None:
    if STAND_IN:
        raise Absent("needs a GPU: PyTorch's runtime does not run on the stand-in")


def start(rank: int, place: str, backend: str) -> Any:
    """The process group of two ranks on one device; torch."""
    import torch
    import torch.distributed as dist

    if backend == "hfreduce":
        import hfreduce.torch  # noqa: F401
    if not STAND_IN:
        torch.cuda.set_device(0)
    dist.init_process_group(backend, init_method=f"file://{place}", rank=rank, world_size=2)
    return torch


def model_of(torch: Any) -> Any:
    """A small transformer, the same on every rank."""
    torch.manual_seed(1)
    layers = [torch.nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True) for _ in range(2)]
    return torch.nn.Sequential(*layers, torch.nn.Linear(64, 8)).to(WHERE)


def batch(torch: Any, step: int) -> tuple[Any, Any]:
    """Both ranks' samples of a step."""
    generator = torch.Generator().manual_seed(100 + step)
    return tuple(torch.randn(4, 10, width, generator=generator).to(WHERE) for width in (64, 8))  # type: ignore[return-value]


def trained(torch: Any, model: Any, mine: slice, behind: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """A few steps of SGD by hand (torch.optim imports a compiler, for seconds); the parameters, as arrays."""
    for step in range(STEPS):
        x, y = (part[mine] for part in batch(torch, step))
        for p in model.parameters():
            p.grad = None
        ((model(x) - y) ** 2).mean().backward()
        behind()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(p.grad, alpha=-0.05)
    whole = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in model.named_parameters()}
    return {name.removeprefix("module."): p.detach().float().cpu().numpy() for name, p in whole.items()}


def half(rank: int) -> slice:
    return slice(2 * rank, 2 * rank + 2)


# ---------------------------------------------------------------- what ranks do


def alone(rank: int, place: str, backend: str) -> dict[str, Any]:
    import torch

    return trained(torch, model_of(torch), slice(0, 4))


def ddp(rank: int, place: str, backend: str) -> dict[str, Any]:
    torch = start(rank, place, backend)
    model = torch.nn.parallel.DistributedDataParallel(model_of(torch), bucket_cap_mb=0.05)
    return trained(torch, model, half(rank))


def reducer(rank: int, place: str, backend: str) -> dict[str, Any]:
    torch = start(rank, place, backend)
    import hfreduce.torch

    model = model_of(torch)
    made = hfreduce.torch.GradientReducer(model.parameters(), bucket_bytes=50_000)
    values = trained(torch, model, half(rank), made.synchronize)
    made.close()
    return values


def fsdp2(rank: int, place: str, backend: str) -> dict[str, Any]:
    torch = start(rank, place, backend)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(WHERE.partition(":")[0], (2,))
    model = model_of(torch)
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    values = trained(torch, model, half(rank))
    return {**values, "peak": torch.cuda.max_memory_allocated() if not STAND_IN else 0}


def work(rank: int, place: str, backend: str) -> list[str]:
    """Asynchronous calls: futures, memory that is freed at once, work on the stream behind wait()."""
    torch, wrong = start(rank, place, backend), []
    import torch.distributed as dist

    x = torch.full((100_000,), rank + 1.0, device=WHERE)
    future = dist.all_reduce(x, async_op=True).get_future()
    got = future.wait()
    wrong += [] if (got[0] == 3).all() else ["the future's value"]
    works = []
    for i in range(20):  # the only reference to each tensor goes away: its memory must not be given to the next
        y = torch.full((300_000,), float(i + rank), device=WHERE)
        works.append((i, y[:10], dist.all_reduce(y, async_op=True)))
        del y
        torch.full((300_000,), -1.0, device=WHERE)
    for i, view, each in works:
        each.wait()
        wrong += [] if (view == 2 * i + 1).all() else [f"call {i} of memory that was let go"]
    return wrong


def none_gradients(rank: int, place: str, backend: str) -> list[str]:
    torch = start(rank, place, backend)
    import hfreduce.torch

    a, b, c = (torch.nn.Parameter(torch.zeros(1000, device=WHERE)) for _ in "abc")
    made = hfreduce.torch.GradientReducer([a, b, c])
    a.grad = torch.full_like(a, rank + 1.0)
    if rank == 0:
        b.grad = torch.full_like(b, 4.0)
    made.synchronize()
    right = [(a.grad == 1.5).all(), b.grad is not None and (b.grad == 2).all(), c.grad is None]
    made.close()
    return [] if all(map(bool, right)) else [f"gradients a, b, c right: {list(map(bool, right))}"]


def large(rank: int, place: str, backend: str) -> list[str]:
    """Tensors that lie in many chunks of an expandable segment."""
    torch, wrong = start(rank, place, backend), []
    import torch.distributed as dist

    for mib in (1, 8) if STAND_IN else (1, 16, 64, 256):
        x = torch.full((mib << 18,), rank + 1.0, device=WHERE)
        dist.all_reduce(x)
        wrong += [] if (x == 3).all() else [f"all_reduce of {mib} MiB"]
    return wrong


def thirty_three_streams(rank: int, place: str, backend: str) -> list[str]:
    """A receive, so many further streams, then the send that the peer needs: PyTorch gives out 32 streams round robin."""
    torch = start(rank, place, backend)
    import torch.distributed as dist

    x, y = torch.zeros(1000, device=WHERE), torch.full((1000,), rank + 1.0, device=WHERE)
    receive = dist.irecv(x, 1 - rank)
    more = [torch.cuda.Stream() for _ in range(40)] if not STAND_IN else []
    for stream in more:
        with torch.cuda.stream(stream):
            torch.zeros(10, device=WHERE)
    dist.isend(y, 1 - rank).wait()
    receive.wait()
    return [] if (x == 2 - rank).all() else ["the message"]


# ---------------------------------------------------------------- cases


def two(function: Any, n: int = 2, backend: str = "hfreduce", env: Any = None, limit: float = 40) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        return ranks.run_ranks(function, n, str(Path(folder) / "store"), backend, comm=False, timeout=limit, env=env)


def right(function: Any, **more: Any) -> None:
    results.same([text for wrong in two(function, **more) for text in wrong], [], "wrong results")


def as_one_process(function: Any, backend: str = "hfreduce") -> tuple[str, float]:
    """Train so and in one process; the parameters have to agree, and those of the ranks with each other in every bit."""
    import numpy as np

    values = two(function, backend=backend)
    peak = max(v.pop("peak", 0) for v in values)
    for name in values[0]:
        results.same(values[1][name].tobytes(), values[0][name].tobytes(), f"{name} of rank 1, beside rank 0's")
    worst = 0.0
    for name, want in reference().items():
        worst = max(worst, float(np.abs(values[0][name] - want).max()))
    if not worst < 2e-3:
        raise Wrong(f"parameters differ from one process' by {worst:g}")
    return f"{STEPS} steps, parameters within {worst:.1e} of one process'", peak


_reference: list[dict[str, Any]] = []


def reference() -> dict[str, Any]:
    if not _reference:
        _reference.append(two(alone, n=1)[0])
    return _reference[0]


def ddp_of_a_small_transformer() -> str:
    return as_one_process(ddp)[0]


def ddp_on_gloo_for_comparison() -> str:
    return as_one_process(ddp, "gloo")[0]


def gradient_reducer() -> str:
    return as_one_process(reducer)[0]


def fsdp2_of_a_small_transformer() -> str:
    figure, peak = as_one_process(fsdp2)
    return figure + (f", peak memory {peak / 1e6:.1f} MB a rank" if peak else "")


def futures_and_memory_that_is_let_go() -> None:
    right(work)


def gradients_that_are_None() -> None:
    right(none_gradients)


def tensors_of_expandable_segments() -> str:
    right(large, env=EXPANDABLE)
    return "1 MiB to 256 MiB" if not STAND_IN else "1 and 8 MiB"


def a_send_behind_33_streams() -> None:
    right(thirty_three_streams)


def backend_nccl_under_hfreduce_exec() -> str:
    """An unmodified program, two ranks on one GPU, which NCCL itself would refuse."""
    need_cuda()
    command = [sys.executable, "-m", "hfreduce", "exec", sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run([*command, "--nproc-per-node", "2", __file__, "nccl"], capture_output=True, text=True, timeout=60)
    print(done.stdout, done.stderr, flush=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "Error" in line] or [f"ended with {done.returncode}"]
        raise Wrong(lines[0])
    results.same(done.stdout.count("right"), 2, "ranks that are right")
    return next(line for line in done.stdout.splitlines() if "right" in line)


def nccl_rank() -> None:
    """A program for NCCL: what torchrun starts for the case above."""
    import torch
    import torch.distributed as dist

    torch.cuda.set_device(0)
    dist.init_process_group("nccl")
    rank = dist.get_rank()
    x = torch.full((1_000_000,), rank + 1.0, device="cuda")
    dist.all_reduce(x)
    wide = torch.zeros(2, 1000, device="cuda")
    dist.all_gather_into_tensor(wide, torch.full((1000,), rank + 5.0, device="cuda"))
    assert (x == 3).all() and (wide[0] == 5).all() and (wide[1] == 6).all()
    print(f"rank {rank} right, NCCL {torch.cuda.nccl.version()}", flush=True)
    dist.destroy_process_group()


def main() -> None:
    if sys.argv[1:] == ["nccl"]:
        nccl_rank()
        return
    if STAND_IN:
        os.environ["OMP_NUM_THREADS"] = "1"
        for module in ("torch", "torch.distributed.fsdp", "torch._dynamo"):
            ranks.preload(module)  # not beside a driver, lest one of them initialises it in the server that forks the ranks
    try:
        import torch
    except ImportError:
        torch = None
    if torch is None or not torch.distributed.is_available():
        why = "no PyTorch with torch.distributed here"
    elif not STAND_IN and not torch.cuda.is_available():
        why = "this PyTorch is built for CPUs, or finds no device"
    else:
        why = ""

    def there() -> str:
        if why:
            raise Absent(why)
        return f"PyTorch {torch.__version__}{', on CPU tensors' if STAND_IN else ''}"  # type: ignore[union-attr]

    cases: list[Any] = [
        ddp_of_a_small_transformer,
        tensors_of_expandable_segments,
        backend_nccl_under_hfreduce_exec,
        futures_and_memory_that_is_let_go,
        gradient_reducer,
        gradients_that_are_None,
        fsdp2_of_a_small_transformer,
        a_send_behind_33_streams,
        ddp_on_gloo_for_comparison,
    ]
    results.run("pytorch", there, *(cases if not why else []))


if __name__ == "__main__":
    main()
