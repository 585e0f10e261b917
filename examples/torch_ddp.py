#!/usr/bin/env python3
"""Train a small network on scikit-learn's handwritten digits with PyTorch's DistributedDataParallel.

    torchrun --nproc-per-node 4 torch_ddp.py --check            # four ranks on this machine
    torchrun --nproc-per-node 4 torch_ddp.py --backend gloo     # the same on Gloo
    python torch_ddp.py                                         # one process

What differs from a script for Gloo is one word: dist.init_process_group("hfreduce").

At the end the parameters must have the same bits on all ranks; with --check they must also equal, within rounding, those of
one process that trains on the same global batches.

The share of the step spent waiting is measured on every fourth step: its forward and backward pass are run once more before,
under no_sync(), where DDP communicates nothing. What the real ones take longer is communication that did not hide behind
computing; it is divided by the length of the step. The passes that only measure count for nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the ranks share the cores already; to be set before torch is imported

try:
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
except ImportError as _error:
    sys.exit(f"torch_ddp: needs PyTorch ({_error}): pip install torch")

import hfreduce.torch  # registers the backend; not needed for that where hfreduce was installed with pip

#: Steps of which one is measured.
SAMPLE = 4


class Data(NamedTuple):
    """Images as rows of 64 numbers from 0 to 1, labels from 0 to 9."""

    train: torch.Tensor
    train_labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor


def load() -> Data:
    """The 1,797 digits, shuffled once and alike everywhere: four fifths to train, the rest to test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        sys.exit(f"torch_ddp: needs scikit-learn, whose digits it learns ({error}): pip install scikit-learn")
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(digits.data).float()[order] / 16
    labels = torch.from_numpy(digits.target)[order]
    cut = len(order) * 4 // 5
    return Data(images[:cut], labels[:cut], images[cut:], labels[cut:])


def network(args: argparse.Namespace) -> torch.nn.Sequential:
    """Linear layers with ReLU between them, the same for the same seed."""
    torch.manual_seed(args.seed)
    widths = [64, *args.hidden, 10]
    layers: list[torch.nn.Module] = []
    for fan_in, fan_out in zip(widths, widths[1:]):
        layers += [torch.nn.Linear(fan_in, fan_out), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


class Clock:
    """Seconds spent in steps, and of those waiting for communication, since the last `take`."""

    def __init__(self) -> None:
        self.steps = self.measured = self.waiting = 0.0

    def take(self) -> tuple[float, float]:
        """(seconds in steps, share of the measured steps spent waiting); starts anew."""
        found = self.steps, max(0.0, self.waiting) / self.measured if self.measured else 0.0
        self.steps = self.measured = self.waiting = 0.0
        return found


def backward(model: Any, images: torch.Tensor, labels: torch.Tensor, weight: float) -> float:
    """Make the gradients of weight times the summed loss; return that sum."""
    loss = torch.nn.functional.cross_entropy(model(images), labels, reduction="sum")
    (loss * weight).backward()
    return float(loss.detach())


def train(model: Any, data: Data, args: argparse.Namespace, rank: int, nranks: int, report: bool) -> None:
    """Train the model on this rank's share of every global batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=args.rate, momentum=0.9)
    steps = len(data.train) // args.batch
    clock = Clock()
    for epoch in range(args.epochs):
        order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(1000 * args.seed + epoch))
        loss = 0.0
        for step in range(steps):
            mine = order[step * args.batch : (step + 1) * args.batch][rank::nranks]
            images, labels = data.train[mine], data.train_labels[mine]
            # The mean over the global batch is the ranks' average of this, also where shares differ by a sample.
            weight = nranks / args.batch
            alone = None
            if isinstance(model, DistributedDataParallel) and step % SAMPLE == 0:
                begin = time.perf_counter()
                with model.no_sync():
                    backward(model, images, labels, weight)
                alone = time.perf_counter() - begin
                optimizer.zero_grad()
            begin = time.perf_counter()
            loss += backward(model, images, labels, weight)
            both = time.perf_counter() - begin
            optimizer.step()
            optimizer.zero_grad()
            whole = time.perf_counter() - begin
            clock.steps += whole
            if alone is not None:
                clock.measured += whole
                clock.waiting += both - alone
        if report and (epoch % 5 == 4 or epoch == args.epochs - 1):
            tell(model, data, args, epoch, steps, loss, clock)


def tell(model: Any, data: Data, args: argparse.Namespace, epoch: int, steps: int, loss: float, clock: Clock) -> None:
    """Print how the training stands; the ranks share the work of testing."""
    rank, nranks = dist.get_rank(), dist.get_world_size()
    with torch.no_grad():
        right = (model.module(data.test[rank::nranks]).argmax(dim=1) == data.test_labels[rank::nranks]).sum()
    seconds, waiting = clock.take()
    total = torch.tensor([loss, float(right), waiting, seconds], dtype=torch.float64)
    dist.all_reduce(total)
    if rank == 0:
        done = (epoch % 5 + 1) * steps * args.batch  # since the last report
        print(
            f"epoch {epoch + 1:3}  loss {total[0] / (steps * args.batch):.4f}  "
            f"accuracy {100 * total[1] / len(data.test):5.2f} %  {done * nranks / total[3]:8.0f} samples/s  "
            f"waiting {100 * total[2] / nranks:4.1f} % of the step",
            flush=True,
        )


def parameters(model: torch.nn.Module) -> torch.Tensor:
    """All of them as one vector."""
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


def same_bits(model: torch.nn.Module) -> bool:
    """Whether all ranks have the same bits; rank 0 says which digest, or who differs."""
    digest = torch.tensor(list(hashlib.sha256(parameters(model).numpy().tobytes()).digest()), dtype=torch.uint8)
    everyone = [torch.empty_like(digest) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, digest)
    differ = [rank for rank, other in enumerate(everyone) if not torch.equal(other, everyone[0])]
    if dist.get_rank() == 0:
        found = f"DIFFERENT on ranks {differ}" if differ else "bit-identical on all ranks"
        print(f"parameters {bytes(everyone[0].tolist()).hex()[:16]}: {found}", flush=True)
    return not differ


def same_as_alone(model: torch.nn.Module, data: Data, args: argparse.Namespace) -> bool:
    """Whether one process gets these parameters too, within float32 rounding of so many steps."""
    alone = network(args)
    train(alone, data, args, 0, 1, report=False)
    expected = parameters(alone)
    error = float((parameters(model) - expected).abs().max() / expected.abs().max())
    ok = error <= float(args.tolerance)
    print(
        f"one process: largest difference {error:.1e} of the largest parameter, "
        f"{'equal within rounding' if ok else f'MORE than {args.tolerance:g}'}",
        flush=True,
    )
    return ok


def main() -> int:
    """Train, report, check; the exit status is 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--backend", default="hfreduce", help="hfreduce or gloo")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=240, help="samples of a global batch, all ranks together")
    parser.add_argument("--hidden", type=int, nargs="*", default=[256, 128], help="widths of the hidden layers")
    parser.add_argument("--rate", type=float, default=0.1, help="learning rate")
    parser.add_argument("--bucket", type=float, default=0.0625, help="MiB of gradients that DDP sums at once")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--check", action="store_true", help="compare with one process on the same global batches")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of that comparison")
    args = parser.parse_args()
    data = load()
    if not 1 <= args.batch <= len(data.train):
        parser.error(f"--batch {args.batch} is not from 1 to {len(data.train)}")
    hfreduce.torch.init_process_group(args.backend)  # dist.init_process_group; also under mpirun, srun or hfreduce run, or alone
    rank, nranks = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        print(
            f"{len(data.train)} digits to train, {len(data.test)} to test; {nranks} ranks, backend {dist.get_backend()}",
            flush=True,
        )
    model = DistributedDataParallel(network(args), bucket_cap_mb=args.bucket)
    train(model, data, args, rank, nranks, report=True)
    ok = same_bits(model.module)
    dist.destroy_process_group()
    if args.check and rank == 0:
        ok = same_as_alone(model.module, data, args) and ok
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
