#!/usr/bin/env python3
"""Train a small network on scikit-learn's handwritten digits, data-parallel, in plain NumPy.

    python train_digits.py                          # one process
    hfreduce run -n 4 train_digits.py --check       # four ranks on this machine
    mpirun -np 4 python train_digits.py             # the same under MPI; torchrun and srun work too

Every rank has the whole model and takes its share of each global batch. The gradients lie in one flat array, in the order
in which the backward pass makes them; as soon as a bucket of it is full, its average over all ranks is started and runs
while the layers before it are differentiated:

    backward   | layer 3 | layer 2  | layer 1   |
    all_reduce           | bucket 0 | bucket 1  | bucket 2 |
    update                                      | 0 | 1    | 2 |

At the end the weights must have the same bits on all ranks; with --check they must also equal, within rounding, those of one
process that trains on the same global batches.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

for _name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # the ranks share the cores already; to be set before numpy is imported

import numpy as np

import hfreduce

Array = np.ndarray[Any, Any]


class Data(NamedTuple):
    """Images as rows of 64 numbers from 0 to 1, labels as integers from 0 to 9."""

    train: Array
    train_labels: Array
    test: Array
    test_labels: Array


def load() -> Data:
    """The 1,797 digits, shuffled once and alike everywhere: four fifths to train, the rest to test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        sys.exit(f"train_digits: needs scikit-learn, whose digits it learns ({error}): pip install scikit-learn")
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = (digits.data[order] / 16).astype(np.float32)
    labels = digits.target[order]
    cut = len(order) * 4 // 5
    return Data(images[:cut], labels[:cut], images[cut:], labels[cut:])


class Network:
    """Linear layers with ReLU between them.

    Weights, gradients and momentum are one flat array each, last layer first: that is the order in which the backward pass
    makes gradients, so what is ready is always one contiguous piece.
    """

    def __init__(self, widths: list[int], seed: int) -> None:
        rng = np.random.default_rng(seed)
        shapes = list(zip(widths, widths[1:]))
        total = sum((fan_in + 1) * fan_out for fan_in, fan_out in shapes)
        self.flat = np.zeros(total, np.float32)
        self.gradient = hfreduce.zeros(total, np.float32)  # memory that is cheap to communicate from
        self.momentum = np.zeros(total, np.float32)
        self.spans: list[slice] = []
        self.layers: list[tuple[Array, Array, Array, Array]] = []  # weight, bias, and their gradients
        end = total
        for fan_in, fan_out in shapes:
            span = slice(end - (fan_in + 1) * fan_out, end)
            bias = end - fan_out
            views = [
                part
                for flat in (self.flat, self.gradient)
                for part in (flat[span.start : bias].reshape(fan_in, fan_out), flat[bias:end])
            ]
            views[0][:] = rng.normal(0, np.sqrt(2 / fan_in), (fan_in, fan_out))
            self.layers.append((views[0], views[1], views[2], views[3]))
            self.spans.append(span)
            end = span.start

    def forward(self, x: Array) -> list[Array]:
        """The input of every layer, and at the end the output (logits)."""
        values = [x]
        for index, (weight, bias, _, _) in enumerate(self.layers):
            y = values[-1] @ weight + bias
            values.append(y if index == len(self.layers) - 1 else np.maximum(y, 0))
        return values

    def backward(self, values: list[Array], delta: Array, ready: Callable[[slice], None]) -> None:
        """Write the gradients, last layer first; delta is the loss's by the output. ready(span) is told as each is there."""
        for index in reversed(range(len(self.layers))):
            weight, _, weight_gradient, bias_gradient = self.layers[index]
            np.matmul(values[index].T, delta, out=weight_gradient)
            delta.sum(axis=0, out=bias_gradient)
            ready(self.spans[index])
            if index:
                delta = (delta @ weight.T) * (values[index] > 0)

    def update(self, span: slice, rate: float) -> None:
        """One step of gradient descent with momentum on a piece of the weights."""
        momentum = self.momentum[span]
        momentum *= 0.9
        momentum += self.gradient[span]
        self.flat[span] -= rate * momentum


class GradientSync:
    """Average gradients over the ranks, bucket by bucket, while more of them are made."""

    def __init__(self, comm: hfreduce.Communicator, gradient: Array, bucket_bytes: int) -> None:
        self.comm, self.gradient = comm, gradient
        self.bucket = bucket_bytes // gradient.itemsize
        self.start = 0  # of what is ready and not yet started
        self.running: list[tuple[slice, hfreduce.Work]] = []
        self.waited = 0.0  # seconds spent in calls of hfreduce

    def ready(self, span: slice) -> None:
        """These gradients are there; they lie right after those of the call before."""
        if span.stop - self.start >= self.bucket or span.stop == self.gradient.size:
            begin = time.perf_counter()
            piece = slice(self.start, span.stop)
            work = self.comm.all_reduce(self.gradient[piece], op="avg", async_op=True)
            self.running.append((piece, work))
            self.start = span.stop
            self.waited += time.perf_counter() - begin

    def finish(self, update: Callable[[slice], None]) -> None:
        """Wait for the buckets in the order in which they were started; update each while the next ones still run."""
        for piece, work in self.running:
            begin = time.perf_counter()
            work.wait()
            self.waited += time.perf_counter() - begin
            update(piece)
        self.running.clear()
        self.start = 0


def softmax(logits: Array) -> Array:
    """Probabilities, row by row."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    result: Array = powers / powers.sum(axis=1, keepdims=True)
    return result


def train(comm: hfreduce.Communicator | None, data: Data, args: argparse.Namespace) -> Array:
    """Train and return the weights; comm None: this process alone, in silence, on the same global batches."""
    rank, nranks = (comm.rank, comm.nranks) if comm is not None else (0, 1)
    network = Network([data.train.shape[1], *args.hidden, 10], args.seed)
    sync = None
    if comm is not None:
        comm.broadcast(network.flat, root=0)  # all start from rank 0's weights
        sync = GradientSync(comm, network.gradient, args.bucket << 10)
    steps = len(data.train) // args.batch
    for epoch in range(args.epochs):
        order = np.random.default_rng([args.seed, epoch]).permutation(len(data.train))
        loss, begin = 0.0, time.perf_counter()
        waited = sync.waited if sync is not None else 0.0
        for step in range(steps):
            mine = order[step * args.batch : (step + 1) * args.batch][rank::nranks]
            labels = data.train_labels[mine]
            values = network.forward(data.train[mine])
            delta = softmax(values[-1])
            rows = np.arange(len(mine))
            loss -= float(np.log(delta[rows, labels] + 1e-12).sum())
            delta[rows, labels] -= 1
            # The mean over the global batch is the ranks' average of this, also where shares differ by a sample.
            delta *= np.float32(nranks / args.batch)
            if sync is None:
                network.backward(values, delta, lambda span: None)
                network.update(slice(None), args.rate)
            else:
                network.backward(values, delta, sync.ready)
                sync.finish(lambda piece: network.update(piece, args.rate))
        if comm is not None and sync is not None:
            seconds = time.perf_counter() - begin
            right = (network.forward(data.test[rank::nranks])[-1].argmax(axis=1) == data.test_labels[rank::nranks]).sum()
            total = np.array([loss, right, (sync.waited - waited) / seconds])
            comm.all_reduce(total)
            if rank == 0 and (epoch % 5 == 4 or epoch == args.epochs - 1):
                print(
                    f"epoch {epoch + 1:3}  loss {total[0] / (steps * args.batch):.4f}  "
                    f"accuracy {100 * total[1] / len(data.test):5.2f} %  "
                    f"{steps * args.batch / seconds:8.0f} samples/s  waiting {100 * total[2] / nranks:4.1f} % of the step",
                    flush=True,
                )
    return network.flat


def same_bits(comm: hfreduce.Communicator, weights: Array) -> bool:
    """Whether all ranks have the same bits; rank 0 says which digest, or who differs."""
    digest = np.frombuffer(hashlib.sha256(weights.tobytes()).digest(), np.uint8)
    everyone = np.empty((comm.nranks, digest.size), np.uint8)
    comm.all_gather(digest, everyone)
    differ = [rank for rank in range(comm.nranks) if (everyone[rank] != everyone[0]).any()]
    if comm.rank == 0:
        found = f"DIFFERENT on ranks {differ}" if differ else "bit-identical on all ranks"
        print(f"weights {everyone[0].tobytes().hex()[:16]}: {found}", flush=True)
    return not differ


def same_as_alone(data: Data, weights: Array, args: argparse.Namespace) -> bool:
    """Whether one process gets these weights too, within float32 rounding of so many steps."""
    alone = train(None, data, args)
    error = float(np.abs(weights - alone).max() / np.abs(alone).max())
    ok = error <= float(args.tolerance)
    print(
        f"one process: largest difference {error:.1e} of the largest weight, "
        f"{'equal within rounding' if ok else f'MORE than {args.tolerance:g}'}",
        flush=True,
    )
    return ok


def main() -> int:
    """Train, report, check; the exit status is 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=240, help="samples of a global batch, all ranks together")
    parser.add_argument("--hidden", type=int, nargs="*", default=[256, 128], help="widths of the hidden layers")
    parser.add_argument("--rate", type=float, default=0.1, help="learning rate")
    parser.add_argument("--bucket", type=int, default=64, help="KiB of gradients that are synced at once")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--check", action="store_true", help="compare with one process on the same global batches")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of that comparison")
    args = parser.parse_args()
    data = load()
    if not 1 <= args.batch <= len(data.train):
        parser.error(f"--batch {args.batch} is not from 1 to {len(data.train)}")
    with hfreduce.init() as comm:
        if comm.rank == 0:
            print(
                f"{len(data.train)} digits to train, {len(data.test)} to test; {comm.nranks} ranks on {comm.nodes} nodes, "
                f"transports {','.join(comm.transports) or 'none'}",
                flush=True,
            )
        weights = train(comm, data, args)
        ok = same_bits(comm, weights)
        talks = comm.rank == 0
    if args.check and talks:
        ok = same_as_alone(data, weights, args) and ok
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
