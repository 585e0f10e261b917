#!/usr/bin/env python3
"""Train a small network on scikit-learn's handwritten digits in a PyTorch loop of one's own, with GradientReducer.

    torchrun --nproc-per-node 4 torch_reducer.py --check      # four ranks on this machine
    hfreduce run -n 4 torch_reducer.py --compress bf16        # without torch.distributed; gradients travel as 16 bits
    python torch_reducer.py                                   # one process

There is no process group and no wrapped module: the loop says when gradients are to be there.

    backward     | layer 3 | layer 2 | layer 1 |
    all_reduce             |  bucket 0  |  bucket 1  |
    synchronize                                | waits |
    step                                               |

--accumulate N makes each rank's share of a global batch in N passes, of which only the last communicates.

At the end the parameters must have the same bits on all ranks; with --check they must also equal, within rounding, those of
one process that trains on the same global batches.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the ranks share the cores already; to be set before torch is imported

import numpy as np

try:
    import torch
except ImportError as _error:
    sys.exit(f"torch_reducer: needs PyTorch ({_error}): pip install torch")

import hfreduce
from hfreduce.torch import GradientReducer


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
        sys.exit(f"torch_reducer: needs scikit-learn, whose digits it learns ({error}): pip install scikit-learn")
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


class Trainer:
    """A model, its optimizer, and how its gradients meet those of the other ranks (comm None: there are none)."""

    def __init__(self, comm: hfreduce.Communicator | None, args: argparse.Namespace) -> None:
        self.args = args
        self.rank, self.nranks = (comm.rank, comm.nranks) if comm is not None else (0, 1)
        self.model = network(args)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=args.rate, momentum=0.9)
        self.reducer = None
        if comm is not None:
            for param in self.model.parameters():
                comm.broadcast(param.data, root=0)  # all start from rank 0's parameters
            self.reducer = GradientReducer(
                self.model.named_parameters(),
                bucket_bytes=args.bucket << 10,
                comm=comm,
                compress=args.compress,
                error_feedback=args.compress is not None,
            )

    def backward(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Add to the gradients; return the summed loss."""
        loss = torch.nn.functional.cross_entropy(self.model(images), labels, reduction="sum")
        # The mean over the global batch is the ranks' average of this, also where shares differ by a sample.
        (loss * (self.nranks / self.args.batch)).backward()
        return float(loss.detach())

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Train on this rank's share of a global batch; return its summed loss."""
        self.optimizer.zero_grad()
        *first, last = zip(images.chunk(self.args.accumulate), labels.chunk(self.args.accumulate))
        loss = 0.0
        if self.reducer is None:
            loss = sum(self.backward(*part) for part in [*first, last])
        else:
            with self.reducer.no_sync():
                loss = sum(self.backward(*part) for part in first)
            loss += self.backward(*last)  # buckets start in here, as their gradients become ready
            self.reducer.synchronize()
        self.optimizer.step()
        return loss

    def close(self) -> None:
        """Let go of the other ranks."""
        if self.reducer is not None:
            self.reducer.close()


def train(comm: hfreduce.Communicator | None, data: Data, args: argparse.Namespace) -> torch.nn.Module:
    """Train and return the model; comm None: this process alone, in silence, on the same global batches."""
    trainer = Trainer(comm, args)
    rank, nranks, reducer = trainer.rank, trainer.nranks, trainer.reducer
    steps = len(data.train) // args.batch
    for epoch in range(args.epochs):
        order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(1000 * args.seed + epoch))
        loss, begin = 0.0, time.perf_counter()
        waited = reducer.wait_seconds if reducer is not None else 0.0
        for step in range(steps):
            mine = order[step * args.batch : (step + 1) * args.batch][rank::nranks]
            loss += trainer.step(data.train[mine], data.train_labels[mine])
        if comm is None or reducer is None or not (epoch % 5 == 4 or epoch == args.epochs - 1):
            continue
        seconds = time.perf_counter() - begin
        with torch.no_grad():
            right = (trainer.model(data.test[rank::nranks]).argmax(dim=1) == data.test_labels[rank::nranks]).sum()
        total = np.array([loss, float(right), (reducer.wait_seconds - waited) / seconds])
        comm.all_reduce(total)
        if rank == 0:
            print(
                f"epoch {epoch + 1:3}  loss {total[0] / (steps * args.batch):.4f}  "
                f"accuracy {100 * total[1] / len(data.test):5.2f} %  {steps * args.batch / seconds:8.0f} samples/s  "
                f"waiting {100 * total[2] / nranks:4.1f} % of the step",
                flush=True,
            )
    trainer.close()
    return trainer.model


def parameters(model: torch.nn.Module) -> Any:
    """All of them as one vector."""
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().numpy()


def same_bits(comm: hfreduce.Communicator, model: torch.nn.Module) -> bool:
    """Whether all ranks have the same bits; rank 0 says which digest, or who differs."""
    digest = np.frombuffer(hashlib.sha256(parameters(model).tobytes()).digest(), np.uint8)
    everyone = np.empty((comm.nranks, digest.size), np.uint8)
    comm.all_gather(digest, everyone)
    differ = [rank for rank in range(comm.nranks) if (everyone[rank] != everyone[0]).any()]
    if comm.rank == 0:
        found = f"DIFFERENT on ranks {differ}" if differ else "bit-identical on all ranks"
        print(f"parameters {everyone[0].tobytes().hex()[:16]}: {found}", flush=True)
    return not differ


def same_as_alone(model: torch.nn.Module, data: Data, args: argparse.Namespace) -> bool:
    """Whether one process gets these parameters too, within rounding (of 16 bits, with --compress) of so many steps."""
    expected = parameters(train(None, data, args))
    tolerance = args.tolerance if args.compress is None else max(args.tolerance, 0.1)
    error = float(np.abs(parameters(model) - expected).max() / np.abs(expected).max())
    ok = error <= tolerance
    print(
        f"one process: largest difference {error:.1e} of the largest parameter, "
        f"{'equal within rounding' if ok else f'MORE than {tolerance:g}'}",
        flush=True,
    )
    return ok


def main() -> int:
    """Train, report, check; the exit status is 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=240, help="samples of a global batch, all ranks together")
    parser.add_argument("--accumulate", type=int, default=1, help="passes in which a rank makes its share of a batch")
    parser.add_argument("--hidden", type=int, nargs="*", default=[256, 128], help="widths of the hidden layers")
    parser.add_argument("--rate", type=float, default=0.1, help="learning rate")
    parser.add_argument("--bucket", type=int, default=64, help="KiB of gradients that are reduced at once")
    parser.add_argument("--compress", choices=["fp16", "bf16"], help="what gradients travel as, with error feedback")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--check", action="store_true", help="compare with one process on the same global batches")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of that comparison")
    args = parser.parse_args()
    data = load()
    if not 1 <= args.batch <= len(data.train) or args.accumulate < 1 or args.bucket < 1:
        parser.error(f"--batch is from 1 to {len(data.train)}, --accumulate and --bucket are 1 or more")
    with hfreduce.init() as comm:
        if comm.rank == 0:
            print(
                f"{len(data.train)} digits to train, {len(data.test)} to test; {comm.nranks} ranks on {comm.nodes} nodes, "
                f"transports {','.join(comm.transports) or 'none'}",
                flush=True,
            )
        model = train(comm, data, args)
        ok = same_bits(comm, model)
        talks = comm.rank == 0
    if args.check and talks:
        ok = same_as_alone(model, data, args) and ok
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
