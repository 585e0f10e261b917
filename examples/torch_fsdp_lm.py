#!/usr/bin/env python3
"""Train a character-level language model with PyTorch's FSDP2 (fully_shard) on the manual that comes with Python.

    torchrun --nproc-per-node 4 torch_fsdp_lm.py                     # four ranks on this machine
    torchrun --nproc-per-node 4 torch_fsdp_lm.py --backend gloo      # the same on Gloo
    python torch_fsdp_lm.py                                          # one process

Each rank keeps its share of the parameters, gradients and Adam's moments. A block's parameters are gathered before it is
computed, forward and backward; its gradients are summed and scattered right after:

    rank 0 | all_gather block 0 | compute | all_gather block 1 | ...       backward: | compute | reduce_scatter block 1 | ...

The text is what help("topics") shows (pydoc_data.topics, some 450,000 characters); the last tenth is held out.

The share of the step spent waiting is measured on every eighth step: its forward and backward pass are first run on a twin of
the model that is sharded over one rank, this one: the same work with nobody to wait for. What the real ones take longer is
divided by the length of the step. FSDP2 on the CPU waits for each collective before it goes on, so little of it hides.

Gloo can run this where it knows ReduceOp.AVG, with which FSDP2 sums gradients (torch 2.13's does); it cannot where a model calls
set_gradient_divide_factor, which brings ReduceOp.PREMUL_SUM.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the ranks share the cores already; to be set before torch is imported

try:
    import torch
    import torch.distributed as dist
    from torch import Tensor, nn
    from torch.distributed.device_mesh import init_device_mesh
except ImportError as _error:
    sys.exit(f"torch_fsdp_lm: needs PyTorch ({_error}): pip install torch")
try:
    from torch.distributed.fsdp import fully_shard
except ImportError:
    try:
        from torch.distributed._composable.fsdp import fully_shard  # its place before torch 2.6
    except ImportError as _error:
        sys.exit(f"torch_fsdp_lm: this torch ({torch.__version__}) has no FSDP2 ({_error}): pip install 'torch>=2.6'")

import hfreduce.torch  # registers the backend; not needed for that where hfreduce was installed with pip

#: Steps of which one is measured.
SAMPLE = 8


def load(path: str) -> str:
    """The text to learn."""
    if path:
        with open(path) as file:
            return file.read()
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        sys.exit(f"torch_fsdp_lm: this Python lacks its own manual ({error}); name another text: --text FILE")
    return "\n".join(topics[name] for name in sorted(topics))


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each added to its normalised input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_feed = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """x: (samples, characters, width)."""
        parts = self.query_key_value(self.before_attention(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # each (samples, heads, characters, width of a head)
        seen = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.mix(seen.transpose(1, 2).flatten(-2))
        result: Tensor = x + self.feed(self.before_feed(x))
        return result


class LanguageModel(nn.Module):
    """A decoder-only transformer over characters."""

    def __init__(self, characters: int, args: argparse.Namespace) -> None:
        super().__init__()
        torch.manual_seed(args.seed)
        self.character, self.place = nn.Embedding(characters, args.width), nn.Embedding(args.context, args.width)
        self.blocks = nn.ModuleList(Block(args.width, args.heads) for _ in range(args.layers))
        self.before_output, self.output = nn.LayerNorm(args.width), nn.Linear(args.width, characters)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.05)

    def forward(self, text: Tensor, following: Tensor) -> Tensor:
        """Cross entropy in nats, summed, of predicting what follows each character; both are (samples, characters)."""
        x = self.character(text) + self.place(torch.arange(text.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.output(self.before_output(x))
        return nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="sum")


def sharded(model: LanguageModel, mesh: Any) -> LanguageModel:
    """Shard it over the ranks of the mesh, block by block."""
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def windows(text: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """(input, what follows each of its characters), a row for each start."""
    rows = text[starts[:, None] + torch.arange(context + 1)]
    return rows[:, :-1], rows[:, 1:]


def backward(model: nn.Module, samples: tuple[Tensor, Tensor], weight: float) -> float:
    """Make the gradients of weight times the summed loss; return that sum."""
    loss: Tensor = model(*samples)
    (loss * weight).backward()
    return float(loss.detach())


def train(model: nn.Module, twin: nn.Module, text: Tensor, args: argparse.Namespace) -> None:
    """Train on random pieces of the text, the same global batch whatever the number of ranks."""
    rank, nranks = dist.get_rank(), dist.get_world_size()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, betas=(0.9, 0.95))
    random = torch.Generator().manual_seed(args.seed)
    loss = seconds = measured = waiting = 0.0
    since = 0
    for step in range(args.steps):
        starts = torch.randint(len(text) - args.context, (args.batch,), generator=random)
        samples = windows(text, starts[rank::nranks], args.context)
        weight = nranks / (args.batch * args.context)  # FSDP averages over the ranks
        alone = None
        if step % SAMPLE == SAMPLE - 1:
            begin = time.perf_counter()
            backward(twin, samples, weight)
            alone = time.perf_counter() - begin
            twin.zero_grad()
        begin = time.perf_counter()
        loss += backward(model, samples, weight)
        both = time.perf_counter() - begin
        optimizer.step()
        optimizer.zero_grad()
        whole = time.perf_counter() - begin
        seconds, since = seconds + whole, since + 1
        if alone is not None:
            measured, waiting = measured + whole, waiting + both - alone
        if step % args.report == args.report - 1 or step == args.steps - 1:
            share = max(0.0, waiting) / measured if measured else 0.0
            total = torch.tensor([loss, share, seconds], dtype=torch.float64)
            dist.all_reduce(total)
            if rank == 0:
                print(
                    f"step {step + 1:4}  loss {total[0] / (since * args.batch * args.context):.4f}  "
                    f"{since * args.batch * nranks / total[2]:7.1f} samples/s  "
                    f"waiting {100 * total[1] / nranks:4.1f} % of the step",
                    flush=True,
                )
            loss = seconds = measured = waiting = 0.0
            since = 0


def test(model: nn.Module, text: Tensor, args: argparse.Namespace) -> None:
    """Print the loss on text that was not learnt; all ranks take part, as each has but a share of the model."""
    rank, nranks = dist.get_rank(), dist.get_world_size()
    starts = torch.linspace(0, len(text) - args.context - 1, 4 * args.batch).long()[rank::nranks]
    with torch.no_grad():
        loss = model(*windows(text, starts, args.context)).double()
    dist.all_reduce(loss)
    if rank == 0:
        print(f"held-out text: loss {loss / (4 * args.batch * args.context):.4f}", flush=True)


def main() -> int:
    """Train and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--backend", default="hfreduce", help="hfreduce or gloo")
    parser.add_argument("--text", default="", metavar="FILE", help="learn this instead of Python's manual")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--report", type=int, default=20, help="steps between two lines")
    parser.add_argument("--batch", type=int, default=16, help="samples of a global batch, all ranks together")
    parser.add_argument("--context", type=int, default=64, help="characters of a sample")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    text = load(args.text)
    characters = sorted(set(text))
    place = {character: index for index, character in enumerate(characters)}
    indices = torch.tensor([place[character] for character in text])
    cut = len(text) * 9 // 10
    if len(text) - cut <= args.context:
        parser.error(f"--text {args.text}: {len(text)} characters are too few for --context {args.context}")
    hfreduce.torch.init_process_group(args.backend)  # dist.init_process_group; also under mpirun, srun or hfreduce run, or alone
    rank, nranks = dist.get_rank(), dist.get_world_size()
    if args.batch < nranks:
        parser.error(f"--batch {args.batch} is less than a sample for each of {nranks} ranks")
    mesh = init_device_mesh("cpu", (nranks, 1), mesh_dim_names=("all", "self"))
    model = LanguageModel(len(characters), args)
    count = sum(parameter.numel() for parameter in model.parameters())
    if rank == 0:
        print(
            f"{cut} characters to learn, {len(text) - cut} held out; {count / 1e6:.1f} M parameters on {nranks} ranks, "
            f"backend {dist.get_backend()}",
            flush=True,
        )
    model, twin = sharded(model, mesh["all"]), sharded(LanguageModel(len(characters), args), mesh["self"])
    train(model, twin, indices[:cut], args)
    test(model, indices[cut:], args)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
