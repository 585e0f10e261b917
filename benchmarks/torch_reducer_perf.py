#!/usr/bin/env python3
"""Compare a step's gradient communication: torch's DistributedDataParallel on Gloo with hfreduce.torch.GradientReducer.

    hfreduce run -n 2 benchmarks/torch_reducer_perf.py

The gradients are of the sizes of ResNet-50's: 161 tensors, 25.6 million float32. The backward pass makes them, last layer first,
by filling memory, and computes nothing else; so the communication can hide behind little, and its time is

    communication time of a step = time of a step - time of the same step of the bare model

of zero_grad and backward (and synchronize), on the slowest rank. All variants make their steps in turn in the same processes,
the bare model before each of them; the order of the variants turns from round to round. The table has medians
over rounds, and in brackets the tenth and ninetieth percentile. README.md beside this file says what the variants are.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from collections.abc import Callable
from time import perf_counter
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the ranks share the cores already; to be set before torch is imported
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import numpy as np
import torch
import torch.distributed as dist
from gradient_sizes import count, resnet50
from torch.nn.parallel import DistributedDataParallel

import hfreduce
from hfreduce.torch import DistributedDataParallel as HfreduceDDP
from hfreduce.torch import GradientReducer


class Fill(torch.autograd.Function):
    """A layer whose backward pass fills its parameter's gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(param)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (param,) = ctx.saved_tensors
        return grad, torch.full_like(param, float(grad))


class Model(torch.nn.Module):
    """A chain of such layers."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.params = torch.nn.ParameterList(torch.zeros(shape) for shape in shapes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for param in self.params:
            x = Fill.apply(x, param)
        return x


class Variant(NamedTuple):
    """A way to sum gradients. step(scale) makes one step, whose gradients are `scale` on this rank."""

    name: str
    step: Callable[[float], None]
    params: list[Any]
    close: Callable[[], object]


def make(name: str, comm: hfreduce.Communicator, shapes: list[tuple[int, ...]], args: argparse.Namespace) -> Variant:
    """One of VARIANTS, or the bare model."""
    model = Model(shapes)
    call: Any = model
    finish: Callable[[], object] = lambda: None  # noqa: E731
    close: Callable[[], object] = lambda: None  # noqa: E731
    if name.startswith("gloo"):
        call = DistributedDataParallel(model, gradient_as_bucket_view=name == "gloo-view")
    elif name == "ddp":
        call = HfreduceDDP(model, comm=comm, **args.options)
        close = call.close
    elif name != "bare":
        compress = {"fp16": "fp16", "bf16": "bf16"}.get(name)
        reducer = GradientReducer(model, comm=comm, compress=compress, **args.options)
        finish, close = reducer.synchronize, reducer.close
    params = list(model.parameters())

    def step(scale: float) -> None:
        for param in params:
            param.grad = None
        x = torch.full((), scale, requires_grad=True)
        (call(x) * scale).backward()
        finish()

    return Variant(name, step, params, close)


VARIANTS = ["gloo", "gloo-view", "reducer", "ddp", "bf16"]


def measure(comm: hfreduce.Communicator, bare: Variant, variants: list[Variant], rounds: int) -> Any:
    """Seconds (variant, round, without and with communication), of the slowest rank."""
    expected = (comm.nranks + 1) / 2
    for variant in variants:
        for _ in range(3):  # buckets are made anew after the first step
            variant.step(comm.rank + 1.0)
        if not all((param.grad == expected).all() for param in variant.params):
            raise SystemExit(f"torch_reducer_perf: {variant.name} gives wrong gradients")
    times = np.empty((len(variants), rounds, 2))
    for turn in range(rounds):
        for place in range(len(variants)):
            index = (turn + place) % len(variants)
            for which, variant in enumerate((bare, variants[index])):
                comm.barrier()
                begin = perf_counter()
                variant.step(1.0)
                times[index, turn, which] = perf_counter() - begin
    comm.all_reduce(times, op="max")
    return times


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--variants", nargs="+", default=VARIANTS[:4], choices=[*VARIANTS, "fp16"])
    parser.add_argument("--bucket", type=float, help="MiB of the reducer's buckets (default: its own)")
    parser.add_argument("--direct", type=int, help="bytes from which gradients are reduced where they lie (default: its own)")
    parser.add_argument("--json", metavar="FILE", help="also write every time measured")
    args = parser.parse_args()
    args.options = {} if args.bucket is None else {"bucket_bytes": int(args.bucket * 2**20)}
    if args.direct is not None:
        import hfreduce.torch.reducer as module

        module.DIRECT_BYTES = args.direct
    shapes = resnet50()
    with hfreduce.init(timeout=120) as comm:
        if any(name.startswith("gloo") for name in args.variants):
            port = np.zeros(1, np.int32)
            if comm.rank == 0:
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", 0))
                    port[0] = probe.getsockname()[1]
            comm.broadcast(port)
            address = f"tcp://127.0.0.1:{port[0]}"
            dist.init_process_group("gloo", init_method=address, rank=comm.rank, world_size=comm.nranks)
        variants = [make(name, comm, shapes, args) for name in args.variants]
        times = 1e3 * measure(comm, make("bare", comm, shapes, args), variants, args.rounds)
        if comm.rank == 0:
            cores = len(os.sched_getaffinity(0))
            print(
                f"# {len(shapes)} gradients, {sum(map(count, shapes)) / 1e6:.1f} million float32; {comm.nranks} ranks on {comm.nodes} nodes, "
                f"{cores} cores; torch {torch.__version__}, hfreduce {hfreduce.__version__}"
            )
            print(f"# times in ms: median (p10 to p90) of {args.rounds} alternating steps")
            print(f"# {'variant':<10}{'step alone':>26}{'with communication':>28}{'communication':>26}{'of gloo':>9}")
            base = None
            for name, (alone, both) in zip(args.variants, times.transpose(0, 2, 1)):
                low, middle, high = np.percentile([alone, both, both - alone], [10, 50, 90], axis=1)
                cells = [f"{m:.1f} ({a:.1f} to {b:.1f})" for a, m, b in zip(low, middle, high)]
                base = middle[2] if base is None and name.startswith("gloo") else base
                ratio = "" if base is None else f"{middle[2] / base:9.2f}"
                print(f"  {name:<10}{cells[0]:>26}{cells[1]:>28}{cells[2]:>26}{ratio}", flush=True)
            if args.json:
                with open(args.json, "w") as file:
                    json.dump({"nranks": comm.nranks, "variants": args.variants, "ms": times.tolist()}, file)
        for variant in variants:
            variant.close()
        comm.barrier()
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
