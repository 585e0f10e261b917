#!/usr/bin/env python3
"""Compare the backend hfreduce with Gloo under PyTorch: all_reduce, a call's overhead, a step of DDP and of FSDP2.

    torchrun --standalone --nproc-per-node 2 benchmarks/torch_perf.py

Both backends are groups of the same processes and take turns, in an order that changes from round to round, so that whatever
else the machine does meets them alike. Prints a table in Markdown; README.md beside this file says what its rows mean.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a core a rank; to be set before torch is imported
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import numpy as np
from gradient_sizes import Shape, resnet50
from measuring import human, processor

try:
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
except ImportError as _error:
    sys.exit(f"torch_perf: needs PyTorch ({_error}): pip install torch")

import hfreduce.torch

Array = np.ndarray[Any, Any]
PARTS = ["all_reduce", "overhead", "ddp", "fsdp"]


class Row(NamedTuple):
    """A line of the table: seconds a round of Gloo (or None) and of hfreduce, and the ratio or limit that is aimed at."""

    what: str
    peer: Array | None
    ours: Array
    target: float | None  # of ours / peer; in microseconds where there is no peer


def slowest(times: Array) -> Array:
    """The same times, each of the rank that took longest."""
    tensor = torch.from_numpy(np.ascontiguousarray(times))
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.numpy()


def alternate(steps: list[Callable[[], float]], rounds: int, warm: int = 2) -> Array:
    """Call each step once a round, beginning with another one each time; what they return, as an array (step, round)."""
    times = np.empty((len(steps), rounds))
    for turn in range(-warm, rounds):
        for place in range(len(steps)):
            index = (turn + place) % len(steps)
            seconds = steps[index]()
            if turn >= 0:
                times[index, turn] = seconds
    return times


def batch(call: Callable[[], object], count: int, group: Any) -> Callable[[], float]:
    """A step: seconds of one of `count` calls in a row."""

    def step() -> float:
        dist.barrier(group)
        call()  # the caches hold what the others have touched
        dist.barrier(group)
        begin = perf_counter()
        for _ in range(count):
            call()
        return (perf_counter() - begin) / count

    return step


# --- single calls ---


def all_reduce(groups: dict[str, Any], rounds: int) -> Iterator[Row]:
    """all_reduce of float32, sum, in place, waited for."""
    for size, target in [(8, 0.1), (64 << 10, 0.2), (1 << 20, 0.2), (64 << 20, 0.3)]:
        count = max(1, min(200, (4 << 20) // size))
        steps = []
        for group in groups.values():
            x = torch.full((size // 4,), dist.get_rank() + 1.0)
            dist.all_reduce(x, group=group)
            if not (x == sum(range(1, dist.get_world_size() + 1))).all():
                raise SystemExit(f"torch_perf: wrong sum of {size} bytes on {dist.get_backend(group)}")
            x.zero_()  # stays so: in-place sums of anything else would grow without end
            steps.append(batch(lambda x=x, group=group: dist.all_reduce(x, group=group), count, group))  # type: ignore[misc]
        peer, ours = slowest(alternate(steps, rounds))
        yield Row(f"all_reduce {human(size)}", peer, ours, target)


def overhead(groups: dict[str, Any], rounds: int) -> Iterator[Row]:
    """What a call of torch costs more than the same call of hfreduce.Communicator on a NumPy array, at 8 bytes."""
    alone = [dist.new_group([rank], backend="hfreduce") for rank in range(dist.get_world_size())][dist.get_rank()]
    for who, group in [("2 ranks", groups["hfreduce"]), ("1 rank", alone)]:
        comm = hfreduce.torch.communicator(group)
        x, y = torch.zeros(2), np.zeros(2, np.float32)
        calls: list[Callable[[], object]] = [
            lambda x=x, group=group: dist.all_reduce(x, group=group),  # type: ignore[misc]
            lambda y=y, comm=comm: comm.all_reduce(y),  # type: ignore[misc]
            lambda x=x, group=group: dist.all_reduce(x, group=group, async_op=True).wait(),  # type: ignore[misc]
            lambda y=y, comm=comm: comm.all_reduce(y, async_op=True).wait(),  # type: ignore[misc]
        ]
        times = alternate([batch(call, 500, group) for call in calls], 2 * rounds)
        who = who.replace("2", str(comm.nranks)) if comm.nranks > 1 else who
        yield Row(f"overhead, sync, {who}", None, times[0] - times[1], 6.0)
        yield Row(f"overhead, async, {who}", None, times[2] - times[3], 12.0)


# --- a step of DDP ---


class _Touch(torch.autograd.Function):
    """Passes x on; the gradient of the parameter is a constant, at the cost of nothing."""

    @staticmethod
    def forward(ctx: Any, x: Any, parameter: Any, gradient: Any) -> Any:
        ctx.gradient = gradient
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad, ctx.gradient, None


class Gradients(torch.nn.Module):
    """A model that has parameters of these shapes and computes nothing: gradients come one by one, last first."""

    def __init__(self, shapes: list[Shape]) -> None:
        super().__init__()
        self.tensors = torch.nn.ParameterList(torch.zeros(shape) for shape in shapes)
        zeros = torch.zeros(max(tensor.numel() for tensor in self.tensors))
        self.gradients = [zeros[: tensor.numel()].view(tensor.shape) for tensor in self.tensors]

    def forward(self, x: Any) -> Any:
        for tensor, gradient in zip(self.tensors, self.gradients):
            x = _Touch.apply(x, tensor, gradient)
        return x


def ddp_step(model: Any, group: Any, sync: bool) -> Callable[[], float]:
    """A step: forward and backward, with or without communication. Gradients stay allocated, and zero."""

    def step() -> float:
        model.zero_grad(set_to_none=False)
        dist.barrier(group)
        begin = perf_counter()
        with nullcontext() if sync else model.no_sync():
            model(torch.zeros(1, requires_grad=True)).backward()
        return perf_counter() - begin

    return step


def ddp(groups: dict[str, Any], rounds: int) -> Iterator[Row]:
    """DistributedDataParallel: what communication adds to a step, and a step of ten tiny buckets."""
    cases: list[tuple[str, list[Shape], dict[str, Any], int]] = [
        ("DDP, ResNet-50", resnet50(), {}, rounds),
        ("DDP, ResNet-50, bucket views", resnet50(), {"gradient_as_bucket_view": True}, rounds),
        ("DDP, ten buckets of 4 KiB", [(1024,)] * 10, {"bucket_cap_mb": 4 / 1024}, 4 * rounds),
    ]
    alone = [dist.new_group([rank], backend="gloo") for rank in range(dist.get_world_size())][dist.get_rank()]
    for name, shapes, options, times in cases:
        steps = []
        for group in [*groups.values(), alone]:
            model = DistributedDataParallel(Gradients(shapes), process_group=group, **options)
            steps += [ddp_step(model, group, sync) for sync in ((False, True) if group is alone else (True,))]
        peer, ours, unsynced, nobody = slowest(alternate(steps, times, warm=3))
        tiny = len(shapes) == 10
        yield Row(f"{name}: step", peer, ours, 1.0 if tiny else None)
        yield Row(f"{name}: more than under no_sync", peer - np.median(unsynced), ours - np.median(unsynced), None)
        yield Row(f"{name}: communication", peer - np.median(nobody), ours - np.median(nobody), None if tiny else 0.35)


# --- a step of FSDP2 ---


def fsdp(groups: dict[str, Any], rounds: int) -> Iterator[Row]:
    """fully_shard on a transformer of 3.2 M parameters: what communication adds to a step."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
    from torch.distributed.device_mesh import DeviceMesh
    from torch_fsdp_lm import LanguageModel, sharded

    # few characters a step: computing is only noise here
    shape = argparse.Namespace(seed=1, width=256, heads=4, layers=4, context=8)
    text = torch.zeros(1, shape.context, dtype=torch.int64)
    alone = [dist.new_group([rank], backend="gloo") for rank in range(dist.get_world_size())][dist.get_rank()]
    steps = []
    for group in [*groups.values(), alone]:
        model = sharded(LanguageModel(100, shape), DeviceMesh.from_group(group, "cpu"))

        def step(model: Any = model, group: Any = group) -> float:
            model.zero_grad()
            dist.barrier(group)
            begin = perf_counter()
            model(text, text).backward()
            return perf_counter() - begin

        steps.append(step)
    peer, ours, nobody = slowest(alternate(steps, 2 * rounds, warm=3))
    yield Row("FSDP2, 3.2 M parameters: step", peer, ours, None)
    yield Row("FSDP2, 3.2 M parameters: communication", peer - np.median(nobody), ours - np.median(nobody), 0.5)


# --- the table ---


def spread(times: Array) -> str:
    """Median and, in brackets, the tenth and ninetieth percentile, in microseconds or milliseconds."""
    low, middle, high = np.percentile(times, [10, 50, 90]) * 1e6
    if abs(middle) < 1000:
        return f"{middle:.1f} ({low:.1f} to {high:.1f}) us"
    return f"{middle / 1e3:.2f} ({low / 1e3:.2f} to {high / 1e3:.2f}) ms"


def line(row: Row) -> str:
    """A row in Markdown."""
    ours = float(np.median(row.ours))
    if row.peer is None:
        value, aim = "", f"{row.target:g} us"
        met = ours * 1e6 <= (row.target or 0)
    else:
        ratio = ours / float(np.median(row.peer))
        value, aim = f"{ratio:.3f}", "" if row.target is None else f"{row.target:g}"
        met = row.target is None or ratio <= row.target
    verdict = "" if row.target is None else "yes" if met else "NO"
    return f"| {row.what} | {'' if row.peer is None else spread(row.peer)} | {spread(row.ours)} | {value} | {aim} | {verdict} |"


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="of each comparison")
    parser.add_argument("--only", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--json", metavar="FILE", help="also write every time measured")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun: torchrun --standalone --nproc-per-node 2 benchmarks/torch_perf.py")
    dist.init_process_group("gloo")
    groups = {"gloo": dist.group.WORLD, "hfreduce": dist.new_group(backend="hfreduce")}
    talks = dist.get_rank() == 0
    if talks:
        cores = len(os.sched_getaffinity(0))
        print(
            f"{dist.get_world_size()} ranks, {cores} cores, {processor()}, torch {torch.__version__}; load {os.getloadavg()[0]:.1f}"
        )
        print(f"median (p10 to p90) of {args.rounds} or more alternating rounds\n")
        print("| | Gloo | hfreduce | ratio | at most | met |\n|---|---|---|---|---|---|", flush=True)
    parts = {"all_reduce": all_reduce, "overhead": overhead, "ddp": ddp, "fsdp": fsdp}
    rows = []
    for name in args.only:
        for row in parts[name](groups, args.rounds):
            rows.append(row)
            if talks:
                print(line(row), flush=True)
    if talks:
        print(f"\nload at the end {os.getloadavg()[0]:.1f}", flush=True)
        if args.json:
            found = [row._replace(ours=row.ours.tolist(), peer=None if row.peer is None else row.peer.tolist()) for row in rows]
            with open(args.json, "w") as file:
                json.dump([row._asdict() for row in found], file, indent=1)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
