"""One conformance suite over every transport, layout and algorithm, against numpy in float64 (long double for float64).

What is asserted of a result, beside that nothing around the buffers and no input was touched:
- Data that is only moved, integers (wrapping), max and min: exactly the reference.
- float32, float64: |error| <= n u sum|x|, with u = eps / 2 and n ranks: that of any order of additions (product: n u |result|).
- fp16, bf16, fp8: n eps32 sum|x| for the accumulation in float32, and half a unit in the last place for each rounding: one on one
  node, else one a node and one for the result. A premultiplied sum rounds each input once more, an average once more.
- All ranks get the same bits, and so does a second run in new processes.

Staging slots are made small (HFREDUCE_CHUNK) so that a few kilobytes cross many chunk boundaries; one layout keeps the preset.
By default every layout runs a different share of all cases; HFREDUCE_TEST_SWEEP=1 runs them all everywhere.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
import socket
import time
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

ml_dtypes = pytest.importorskip("ml_dtypes")

Array = Any
SWEEP = os.environ.get("HFREDUCE_TEST_SWEEP", "") not in ("", "0")
CHUNK = 4096
GUARD = 64
DTYPES = [
    np.dtype(t)
    for t in (
        "i1",
        "u1",
        "i4",
        "u4",
        "i8",
        "u8",
        "f2",
        "f4",
        "f8",
        ml_dtypes.bfloat16,
        ml_dtypes.float8_e4m3fn,
        ml_dtypes.float8_e5m2,
    )
]
OPS = ("sum", "prod", "max", "min", "avg", "premul")
REDUCING = ("all_reduce", "reduce", "reduce_scatter")
MOVING = ("broadcast", "all_gather", "all_to_all", "all_to_all_v", "gather", "scatter", "ring", "barrier")


@dataclass(frozen=True)
class Layout:
    """Where the ranks are, and the parameters of the library."""

    name: str
    nodes: tuple[int, ...]  # node of each rank
    env: dict[str, str] = field(default_factory=dict)
    threads: bool = False
    chunk: int = CHUNK
    share: float = 0.2  # of the cases, that run by default
    ipv6: bool = False


def _layouts() -> list[Layout]:
    one = [Layout(f"node-{n}", (0,) * n) for n in (1, 2, 3, 4, 5)] + [Layout("node-8", (0,) * 8, share=0.06)]
    tcp = [Layout(f"tcp-{n}", tuple(range(n)), share=s) for n, s in ((2, 0.2), (3, 0.2), (4, 0.1), (5, 0.06), (8, 0.03))]
    mixed = [
        Layout("two-a-node-4", (0, 0, 1, 1), share=0.1),
        Layout("two-a-node-8", (0, 0, 1, 1, 2, 2, 3, 3), share=0.03),
        Layout("uneven-1-2", (0, 1, 1)),
        Layout("uneven-3-1", (0, 0, 0, 1)),
        Layout("uneven-1-2-2", (0, 1, 1, 2, 2), share=0.1),
        Layout("interleaved-4", (0, 1, 0, 1)),
        Layout("interleaved-5", (0, 1, 2, 1, 0), share=0.1),
        Layout("streams-3", (0, 1, 0, 1), {"HFREDUCE_TCP_STREAMS": "3"}),
        Layout("ipv6", (0, 1, 1), ipv6=True, share=0.1),
        Layout("preset-chunk", (0, 0, 1), chunk=131072, share=0.05),
        Layout("preset-chunk-node", (0, 0, 0), chunk=131072, share=0.05),
        Layout("slots-2", (0, 0, 1, 1), {"HFREDUCE_SLOTS": "2"}, share=0.1),
        Layout("no-spin", (0, 0, 1), {"HFREDUCE_SPIN": "0"}, share=0.1),
        Layout("spin", (0, 0, 1), {"HFREDUCE_SPIN": "-1"}, share=0.03),
    ]
    for algo, nodes in itertools.product(("tree", "direct", "ring"), ((0, 1, 2), (0, 1, 2, 3, 4), (0, 0, 1, 1, 2), (0, 0, 0, 1))):
        mixed.append(Layout(f"{algo}-" + "".join(map(str, nodes)), nodes, {"HFREDUCE_ALGO": algo}, share=0.08))
    threads = [Layout(f"threads-{n}", (0,) * n, threads=True, share=0.1) for n in (2, 4, 5)]
    return one + tcp + mixed + threads


LAYOUTS = _layouts()


@dataclass(frozen=True)
class Case:
    """One call."""

    coll: str
    dtype: int  # index in DTYPES
    op: str
    count: int
    in_place: bool
    shift: int  # bytes off alignment
    root: int

    def __str__(self) -> str:
        place = "in place" if self.in_place else "out of place"
        return f"{self.coll} {DTYPES[self.dtype]} {self.op} count {self.count} {place} shift {self.shift} root {self.root}"


def _counts(size: int, chunk: int, small: bool) -> list[int]:
    """Counts of elements around what the library may treat apart."""
    elems = chunk // size
    if small:
        return [1, 13, elems + 1, 2 * elems - 1, 9 * elems + 5]
    return [0, 1, 2, 31, 64 // size, elems // 2 + 1, elems - 1, elems, elems + 1, 3 * elems + 7, 9 * elems - 1]


def cases(layout: Layout) -> list[Case]:
    """The layout's cases, in an order and a choice that depend on its name alone."""
    dice = random.Random(zlib.crc32(layout.name.encode()))
    nranks, chosen = len(layout.nodes), []
    for code, dtype in enumerate(DTYPES):
        for coll in REDUCING:
            for op in OPS:
                for count in _counts(dtype.itemsize, layout.chunk, coll != "all_reduce"):
                    chosen.append((coll, code, op, count))
        for coll in MOVING:
            for count in _counts(dtype.itemsize, layout.chunk, True) if coll != "barrier" else [0]:
                chosen.append((coll, code, "", count))
    if not SWEEP:
        must = [c for c in chosen if c[0] == "all_reduce" and c[1] == 7 and c[2] == "sum"]  # float32 sum: every count
        chosen = must + dice.sample(chosen, int(layout.share * len(chosen)))
    dice.shuffle(chosen)
    return [Case(*c, dice.random() < 0.5, dice.choice((0, 0, 0, 1, 2, 4, 7)), dice.randrange(nranks)) for c in chosen]


# --- inputs ---


class Pools:
    """Values of each dtype from which inputs are cut: every rank can make any rank's input."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.made: dict[tuple[int, bool], Array] = {}

    def get(self, code: int, product: bool) -> Array:
        key = (code, product)
        if key not in self.made:
            dtype, size = DTYPES[code], self.most + 4096
            dice = np.random.default_rng(code)
            if dtype.kind in "iu":
                self.made[key] = np.frombuffer(dice.bytes(size * dtype.itemsize), dtype)
            elif product:  # neither overflows nor gets subnormal with eight factors
                self.made[key] = (dice.uniform(0.75, 1.5, size) * dice.choice([-1.0, 1.0], size)).astype(dtype)
            else:  # eight of them times 2.25 stay below e4m3's 448
                self.made[key] = np.clip(dice.normal(size=size) * 3, -15, 15).astype(dtype)
        return self.made[key]

    def input(self, case: Case, number: int, rank: int, count: int) -> Array:
        start = (number * 131 + rank * 977) % 4096
        return self.get(case.dtype, case.op == "prod")[start : start + count]


def _factor(rank: int, dtype: Any) -> float:
    return rank + 2 if dtype.kind in "iu" else 0.5 + 0.25 * rank  # exact in every dtype


class Placed:
    """An array at some misalignment, with guard bytes on both sides."""

    def __init__(self, count: int, dtype: Any, shift: int) -> None:
        raw = np.full(2 * GUARD + count * dtype.itemsize + 64, 0xA5, np.uint8)
        start = -raw.ctypes.data % 64 + GUARD // 2 + shift
        self.raw, self.start, self.end = raw, start, start + count * dtype.itemsize
        self.array: Array = np.ndarray((count,), dtype, raw.data, start)
        self.array[:] = np.frombuffer(b"\x5a" * (count * dtype.itemsize), dtype)

    def check(self) -> None:
        assert (self.raw[: self.start] == 0xA5).all(), "bytes before the buffer were written"
        assert (self.raw[self.end :] == 0xA5).all(), "bytes behind the buffer were written"


# --- the reference ---


def _wide(dtype: Any) -> Any:
    return np.longdouble if dtype == np.float64 else np.float64


def _integer_reference(inputs: list[Array], op: str) -> Array:
    dtype, n = inputs[0].dtype, len(inputs)
    stack = np.stack(inputs)
    if op == "premul":
        stack = stack * np.array([_factor(r, dtype) for r in range(n)], dtype)[:, None]
    if op in ("max", "min"):
        return (np.max if op == "max" else np.min)(stack, axis=0)
    if op == "prod":
        return np.multiply.reduce(stack, axis=0, dtype=dtype)
    total = np.add.reduce(stack, axis=0, dtype=dtype)
    if op != "avg":
        return total
    quotient = total // dtype.type(n)  # floors; ours truncates
    return quotient + ((total < 0) & (total % dtype.type(n) != 0)).astype(dtype)


def _check_reduced(got: Array, inputs: list[Array], op: str, nodes: int) -> None:
    dtype, n = inputs[0].dtype, len(inputs)
    if dtype.kind in "iu":
        np.testing.assert_array_equal(got, _integer_reference(inputs, op))
        return
    wide = _wide(dtype)
    x = np.stack(inputs).astype(wide)
    value = got.astype(wide)
    if op in ("max", "min"):
        np.testing.assert_array_equal(value, (np.max if op == "max" else np.min)(x, axis=0))
        return
    if op == "premul":
        x = x * np.array([_factor(r, dtype) for r in range(n)], wide)[:, None]
    exact = np.prod(x, axis=0) if op == "prod" else np.sum(x, axis=0)
    size = np.abs(exact) if op == "prod" else np.sum(np.abs(x), axis=0)
    if op == "avg":
        exact, size = exact / n, size / n
    info = ml_dtypes.finfo(dtype)
    unit, least = float(info.eps) / 2, float(info.smallest_subnormal)
    extra = 1 if op in ("avg", "premul") else 0
    if dtype.itemsize >= 4:
        bound = (n + extra) * unit * size
    else:
        roundings = (0 if nodes == 1 else nodes) + extra
        if n == 1 and op != "premul":
            roundings = 0
        bound = (n + 1) * 2.0**-23 * size + unit * np.abs(exact) * 1.01 + roundings * unit * size + (roundings + 1) * least / 2
    error = np.abs(value - exact)
    wrong = np.flatnonzero(~(error <= bound))
    assert not wrong.size, (
        f"{wrong.size} of {got.size} wrong, first at {wrong[0]}: got {value[wrong[0]]}, exact {exact[wrong[0]]}, "
        f"off by {error[wrong[0]]}, allowed {bound[wrong[0]]}, inputs {[i[wrong[0]] for i in inputs]}"
    )


def _same_bits(got: Array, expected: Array) -> None:
    a, b = np.ascontiguousarray(got).view(np.uint8), np.ascontiguousarray(expected).view(np.uint8)
    if a.tobytes() != b.tobytes():
        wrong = np.flatnonzero(a != b)
        raise AssertionError(f"{wrong.size} of {a.size} bytes wrong, first at byte {wrong[0]}, last at {wrong[-1]}")


# --- one call of each collective. Each returns what was written on this rank, or None, having checked it. ---


class Runner:
    """The cases of a layout on one rank."""

    def __init__(self, comm: Any, layout: Layout) -> None:
        self.comm, self.rank, self.nranks = comm, comm.rank, comm.nranks
        self.pools = Pools((9 * layout.chunk + 64) * comm.nranks)
        self.nodes = comm.nodes
        self.number = 0
        self.ops: dict[Any, Any] = {}

    def op(self, case: Case) -> Any:
        if case.op != "premul":
            return case.op
        dtype = DTYPES[case.dtype]
        if dtype not in self.ops:
            self.ops[dtype] = self.comm.pre_mul_sum(_factor(self.rank, dtype), dtype)
        return self.ops[dtype]

    def input(self, case: Case, rank: int, count: int) -> Array:
        return self.pools.input(case, self.number, rank, count)

    def buffers(self, case: Case, source: Array, count: int, part: int | None = None) -> tuple[Array, Placed]:
        """The input and the place for `count` results. In place: the input lies in the results, as their `part` (None: all)."""
        dtype = DTYPES[case.dtype]
        if not case.in_place:
            x = Placed(source.size, dtype, (case.shift * 3) % 8)
            x.array[:] = source
            return x.array, Placed(count, dtype, case.shift)
        out = Placed(count, dtype, case.shift)
        mine = out.array if part is None else out.array[part * source.size : (part + 1) * source.size]
        mine[:] = source
        return mine, out

    def all_reduce(self, case: Case) -> Array:
        inputs = [self.input(case, r, case.count) for r in range(self.nranks)]
        x, out = self.buffers(case, inputs[self.rank], case.count)
        if case.in_place:
            assert self.comm.all_reduce(x, op=self.op(case)) is x
        else:
            assert self.comm.all_reduce(x, out.array, self.op(case)) is out.array
            _same_bits(x, inputs[self.rank])
        out.check()
        if self.number % self.nranks == self.rank or not self.number % 16:  # bits are the same on all ranks, so one can look
            _check_reduced(out.array, inputs, case.op, self.nodes)
        return out.array

    def reduce(self, case: Case) -> Array | None:
        inputs = [self.input(case, r, case.count) for r in range(self.nranks)]
        x, out = self.buffers(case, inputs[self.rank], case.count)
        self.comm.reduce(x, None if case.in_place else out.array, self.op(case), case.root)
        out.check()
        if self.rank != case.root or not case.in_place:
            _same_bits(x, inputs[self.rank])
        if self.rank != case.root:
            return None
        _check_reduced(out.array, inputs, case.op, self.nodes)
        return out.array

    def reduce_scatter(self, case: Case) -> None:
        total, mine = case.count * self.nranks, slice(self.rank * case.count, (self.rank + 1) * case.count)
        source = self.input(case, self.rank, total)
        x = Placed(total, DTYPES[case.dtype], case.shift)
        x.array[:] = source
        out = Placed(case.count, DTYPES[case.dtype], (case.shift * 3) % 8)
        target = x.array[mine] if case.in_place else out.array
        self.comm.reduce_scatter(x.array, target, self.op(case))
        out.check()
        x.check()
        _check_reduced(target, [self.input(case, r, total)[mine] for r in range(self.nranks)], case.op, self.nodes)
        if not case.in_place:
            _same_bits(x.array, source)

    def broadcast(self, case: Case) -> Array:
        source = self.input(case, case.root, case.count)
        mine = source if self.rank == case.root else self.input(case, self.nranks + 1, case.count)
        x, out = self.buffers(case, mine, case.count)
        self.comm.broadcast(x, case.root, out=None if case.in_place else out.array)
        out.check()
        _same_bits(out.array, source)
        if not case.in_place:
            _same_bits(x, mine)
        return out.array

    def all_gather(self, case: Case) -> Array:
        x, out = self.buffers(case, self.input(case, self.rank, case.count), case.count * self.nranks, self.rank)
        self.comm.all_gather(x, out.array)
        out.check()
        _same_bits(out.array, np.concatenate([self.input(case, r, case.count) for r in range(self.nranks)]))
        return out.array

    def all_to_all(self, case: Case) -> None:
        total = case.count * self.nranks
        x, out = self.buffers(case, self.input(case, self.rank, total), total)
        self.comm.all_to_all(x, out.array)
        out.check()
        mine = slice(self.rank * case.count, (self.rank + 1) * case.count)
        _same_bits(out.array, np.concatenate([self.input(case, r, total)[mine] for r in range(self.nranks)]))

    def all_to_all_v(self, case: Case) -> None:
        def count(source: int, target: int) -> int:
            return 0 if (source + 2 * target) % 5 == 4 else case.count * ((source * 3 + target) % 4) // 3

        def sent(source: int) -> Array:
            return self.input(case, source, sum(count(source, t) for t in range(self.nranks)))

        sends = [count(self.rank, t) for t in range(self.nranks)]
        recvs = [count(s, self.rank) for s in range(self.nranks)]
        x = Placed(sum(sends), DTYPES[case.dtype], (case.shift * 3) % 8)
        x.array[:] = sent(self.rank)
        out = Placed(sum(recvs), DTYPES[case.dtype], case.shift)
        self.comm.all_to_all(x.array, out.array, sends, recvs)
        out.check()
        parts = []
        for s in range(self.nranks):
            start = sum(count(s, t) for t in range(self.rank))
            parts.append(sent(s)[start : start + recvs[s]])
        _same_bits(out.array, np.concatenate(parts))

    def gather(self, case: Case) -> None:
        root = self.rank == case.root
        mine = self.input(case, self.rank, case.count)
        if root:
            x, out = self.buffers(case, mine, case.count * self.nranks, self.rank)
        else:
            x, out = self.buffers(case, mine, case.count)
        self.comm.gather(x, out.array if root else None, case.root)
        out.check()
        if root:
            _same_bits(out.array, np.concatenate([self.input(case, r, case.count) for r in range(self.nranks)]))
        else:
            _same_bits(x, mine)

    def scatter(self, case: Case) -> None:
        source = self.input(case, case.root, case.count * self.nranks)
        out = Placed(case.count, DTYPES[case.dtype], case.shift)
        x = Placed(source.size, DTYPES[case.dtype], (case.shift * 3) % 8)
        mine = slice(self.rank * case.count, (self.rank + 1) * case.count)
        target = out.array
        if self.rank == case.root:
            x.array[:] = source
            if case.in_place:
                target = x.array[mine]
        self.comm.scatter(x.array if self.rank == case.root else None, target, case.root)
        out.check()
        x.check()
        _same_bits(target, source[mine])

    def ring(self, case: Case) -> None:
        """Each sends to the next and receives from the one before, both also to a second neighbour, in a group."""
        out = [Placed(case.count, DTYPES[case.dtype], case.shift) for _ in range(2)]
        x = Placed(case.count, DTYPES[case.dtype], (case.shift * 3) % 8)
        x.array[:] = self.input(case, self.rank, case.count)
        steps = [1, 2] if self.nranks > 2 else [1, 0]
        with self.comm.group():
            for step, target in zip(steps, out):
                self.comm.send(x.array, (self.rank + step) % self.nranks)
                self.comm.recv(target.array, (self.rank - step) % self.nranks)
        for step, target in zip(steps, out):
            target.check()
            _same_bits(target.array, self.input(case, (self.rank - step) % self.nranks, case.count))

    def barrier(self, case: Case) -> None:
        self.comm.barrier()

    def run(self, number: int, case: Case) -> int:
        """Checksum of what must be the same on all ranks; 0 when nothing is."""
        self.number = number
        shared = getattr(self, case.coll)(case)
        same = case.coll in ("all_reduce", "broadcast", "all_gather")
        return zlib.crc32(shared.tobytes()) if same else 0


def run_layout(comm: Any, layout: Layout) -> tuple[list[int], bytes]:
    """All cases of the layout; the checksums by case, and those of all ranks as all_gather brings them."""
    runner, checksums = Runner(comm, layout), []
    assert comm.nodes == len(set(layout.nodes))
    assert comm.local_nranks == layout.nodes.count(layout.nodes[comm.rank])
    for number, case in enumerate(cases(layout)):
        try:
            checksums.append(runner.run(number, case))
        except Exception as error:
            raise AssertionError(f"case {number}: {case}: {type(error).__name__}: {error}") from error
    mine = np.array(checksums, np.uint64)
    everyone = np.zeros(mine.size * comm.nranks, np.uint64)
    comm.all_gather(mine, everyone)
    comm.barrier()
    return checksums, everyone.tobytes()


class Environment:
    """The variables of each rank of a layout."""

    def __init__(self, layout: Layout, address: str | None = None) -> None:
        self.layout, self.address = layout, address

    def __call__(self, rank: int) -> dict[str, str]:
        layout = self.layout
        own = {"HFREDUCE_ADDR": self.address} if self.address else {}
        # Ranks that play different nodes do not know that they share the cores: do not spin where there are too few.
        spin = {"HFREDUCE_SPIN": "16"} if len(layout.nodes) > (os.cpu_count() or 1) else {}
        place = {"HFREDUCE_HOSTID": f"node{layout.nodes[rank]}", "HFREDUCE_CHUNK": str(layout.chunk)}
        slots = {"HFREDUCE_SLOTS": "4"} if layout.chunk == CHUNK else {}  # so that they go round often
        return {**place, **slots, **spin, **layout.env, **own}


def _free_ipv6() -> str | None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
            return f"[::1]:{probe.getsockname()[1]}"
    except OSError:
        return None


def _run(run_ranks: Any, layout: Layout) -> list[int]:
    address = _free_ipv6() if layout.ipv6 else None
    if layout.ipv6 and address is None:
        pytest.skip("this machine has no IPv6 loopback address")
    results = run_ranks(
        run_layout, len(layout.nodes), layout, env=Environment(layout, address), threads=layout.threads,
        timeout=1200 if SWEEP else 60, comm_timeout=30,
    )  # fmt: skip
    first = results[0]
    for rank, (checksums, everyone) in enumerate(results):
        wrong = [str(c) for c, a, b in zip(cases(layout), checksums, first[0]) if a != b]
        assert not wrong, f"rank {rank} got other bits than rank 0: {wrong[:5]}"
        assert everyone == b"".join(np.array(c, np.uint64).tobytes() for c, _ in results)
    checksums_: list[int] = first[0]
    return checksums_


@pytest.mark.limit(1500 if SWEEP else 90)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layout(run_ranks: Any, layout: Layout) -> None:
    _run(run_ranks, layout)


@pytest.mark.parametrize("name", ["node-3", "tcp-5", "two-a-node-4", "uneven-3-1", "tree-00112", "direct-01234"])
@pytest.mark.limit(3000 if SWEEP else 150)
def test_second_run_gives_the_same_bits(run_ranks: Any, name: str) -> None:
    [layout] = [layout for layout in LAYOUTS if layout.name == name]
    assert _run(run_ranks, layout) == _run(run_ranks, layout)


def test_every_combination_is_covered() -> None:
    """By default each layout runs a share; together they must run every collective x dtype x op."""
    ran = {(case.coll, case.dtype, case.op) for layout in LAYOUTS for case in cases(layout)}
    for coll, code in itertools.product(REDUCING, range(12)):
        assert all((coll, code, op) in ran for op in OPS)
    assert all((coll, code, "") in ran for coll in MOVING for code in range(12))
    assert len({len(layout.nodes) for layout in LAYOUTS}) >= 6


# --- hostile values ---

FLOATS = [code for code, dtype in enumerate(DTYPES) if dtype.kind not in "iu"]


def _hostile(dtype: Any) -> Array:
    """Values that are special in dtype; infinities where it has them."""
    info = ml_dtypes.finfo(dtype)
    tiny, least, most = float(info.smallest_normal), float(info.smallest_subnormal), float(info.max)
    values = [0.0, -0.0, 1.0, -1.0, most, -most, tiny, -tiny, least, -least, 3 * least, tiny - least, np.nan]
    if dtype != np.dtype(ml_dtypes.float8_e4m3fn):
        values += [np.inf, -np.inf]
    return np.array(values, np.float64).astype(dtype)


def _fold(x: Array, op: str) -> Array:
    with np.errstate(all="ignore"):
        if op == "sum":
            return functools.reduce(np.add, x)  # np.sum starts from +0
        return (np.max if op == "max" else np.min)(x, axis=0)  # numpy's propagate NaN, as ours


def hostile(comm: Any) -> list[bytes]:
    """Every pair of special values, in the first and the last rank; zeros (the neutral -0) between."""
    digests = []
    for code in FLOATS:
        dtype = DTYPES[code]
        special = _hostile(dtype)
        first, last = (np.tile(a.ravel(), 23) for a in np.meshgrid(special, special))  # long enough for whole vectors and tails
        others = {"sum": -0.0, "max": -float(ml_dtypes.finfo(dtype).max), "min": float(ml_dtypes.finfo(dtype).max)}
        for op, neutral in others.items():
            inputs = [np.full(first.size, neutral).astype(dtype) for _ in range(comm.nranks)]
            inputs[0], inputs[-1] = first, last
            got = comm.all_reduce(inputs[comm.rank].copy(), op=op)
            x = np.stack(inputs).astype(_wide(dtype))
            expected = _fold(x, op)
            if op == "sum":
                with np.errstate(all="ignore"):
                    expected = expected.astype(np.float32).astype(dtype) if dtype.itemsize < 4 else expected.astype(dtype)
            value, expected = got.astype(np.float64), expected.astype(np.float64)
            nan = np.isnan(expected)
            where = f"{dtype} {op} on {comm.nranks} ranks"
            np.testing.assert_array_equal(np.isnan(value), nan, err_msg=where)
            np.testing.assert_array_equal(value[~nan], expected[~nan], err_msg=where)
            if op == "sum":  # of zeros only -0 + -0 is -0; an order among zeros max and min do not have
                np.testing.assert_array_equal(np.signbit(value[~nan]), np.signbit(expected[~nan]), err_msg=where)
            digests.append(got.tobytes())
    return digests


@pytest.mark.parametrize("nodes", [(0, 0), (0, 0, 0), (0, 1), (0, 1, 1), (0, 1, 2)], ids=str)
def test_hostile_values(run_ranks: Any, nodes: tuple[int, ...]) -> None:
    results = run_ranks(hostile, len(nodes), env=Environment(Layout("hostile", nodes)))
    assert all(result == results[0] for result in results)


# --- one run that must not depend on how calls are made ---


def _in_a_way(comm: Any, way: int, call: Any) -> None:
    if way == 0:
        call()
    elif way == 1:
        call(async_op=True).wait()
    else:
        with comm.group():
            call()


def _small_and_mixed(comm: Any) -> list[bytes]:
    """Every collective that has a short way when it is small, over the size where that ends, as the ranks take it or not."""
    n, me, digests = comm.nranks, comm.rank, []
    for number, (count, way) in enumerate(itertools.product((1, 7, 300, 341, 342, 1024, 1366, 3000), range(4))):
        root, mine = number % n, (way + me) % 3 if way < 3 else 0
        blocks = np.stack([np.arange(n * count, dtype=np.int32) * (r + 1) + number for r in range(n)])  # what each rank has
        total, own = blocks.sum(0), slice(me * count, (me + 1) * count)
        out, part = np.zeros(n * count, np.int32), np.zeros(count, np.int32)
        x = blocks[me].copy()
        _in_a_way(comm, mine, functools.partial(comm.broadcast, x, root))
        np.testing.assert_array_equal(x, blocks[root], err_msg=f"broadcast {count}")
        x = blocks[me].copy()
        _in_a_way(comm, mine, functools.partial(comm.reduce, x, root=root))
        np.testing.assert_array_equal(x, total if me == root else blocks[me], err_msg=f"reduce {count}")
        _in_a_way(comm, mine, functools.partial(comm.all_gather, blocks[me][:count].copy(), out))
        np.testing.assert_array_equal(out, blocks[:, :count].ravel(), err_msg=f"all_gather {count}")
        _in_a_way(comm, mine, functools.partial(comm.reduce_scatter, blocks[me].copy(), part))
        np.testing.assert_array_equal(part, total[own], err_msg=f"reduce_scatter {count}")
        _in_a_way(comm, mine, functools.partial(comm.all_to_all, blocks[me].copy(), out))
        np.testing.assert_array_equal(out, blocks[:, own].ravel(), err_msg=f"all_to_all {count}")
        x = blocks[me].copy()  # in place
        _in_a_way(comm, mine, functools.partial(comm.all_to_all, x, x))
        np.testing.assert_array_equal(x, blocks[:, own].ravel(), err_msg=f"all_to_all in place {count}")
        x = blocks[me].copy()
        _in_a_way(comm, mine, functools.partial(comm.all_gather, x[own], x))
        np.testing.assert_array_equal(x, blocks[np.arange(n).repeat(count), np.arange(n * count)], err_msg="all_gather in place")
        x = blocks[me].copy()
        _in_a_way(comm, mine, functools.partial(comm.reduce_scatter, x, x[own]))
        np.testing.assert_array_equal(x[own], total[own], err_msg=f"reduce_scatter in place {count}")
        _in_a_way(comm, mine, comm.barrier)
        digests.append(total.tobytes())
    return digests


def blocking_and_async(comm: Any) -> list[bytes]:
    """The same operations, some ranks blocking, others not, others in a group: one wire protocol."""
    digests = []
    for number, count in enumerate((1, 100, 1000, 5000, 40000)):
        for way in range(3):
            x = (np.arange(count) * (comm.rank + 1) + number).astype(np.float32)
            mine = (way + comm.rank) % 3
            if mine == 0:
                comm.all_reduce(x)
            elif mine == 1:
                comm.all_reduce(x, async_op=True).wait()
            else:
                with comm.group():
                    comm.all_reduce(x)
            n = comm.nranks
            np.testing.assert_array_equal(x, np.arange(count) * (n * (n + 1) // 2) + n * number)
            digests.append(x.tobytes())
    digests += _small_and_mixed(comm)
    works, arrays = [], []
    for number in range(40):  # many in flight
        arrays.append(np.full(1 + number * 97, comm.rank + number, np.int64))
        works.append(comm.all_reduce(arrays[-1], async_op=True))
    for number, (work, x) in reversed(list(enumerate(zip(works, arrays)))):
        work.wait()
        assert (x == sum(r + number for r in range(comm.nranks))).all(), number
    return digests


@pytest.mark.parametrize(
    ("nodes", "chunk"),  # with the preset one, messages move about within their slots
    [((0, 0), CHUNK), ((0, 0), 131072), ((0, 0, 0), CHUNK), ((0, 1, 2), CHUNK), ((0, 0, 1, 1), CHUNK)],
    ids=str,
)
def test_blocking_and_async_mix(run_ranks: Any, nodes: tuple[int, ...], chunk: int) -> None:
    results = run_ranks(blocking_and_async, len(nodes), env=Environment(Layout("mix", nodes, chunk=chunk)))
    assert all(result == results[0] for result in results)


# --- barriers ---


def late_in_turn(comm: Any) -> list[tuple[float, float]]:
    """When this rank came to a barrier and when it left, for each rank that came late to one."""
    times = []
    for late in range(comm.nranks):
        comm.barrier()
        if comm.rank == late:
            time.sleep(0.3)
        came = time.monotonic()
        comm.barrier()
        times.append((came, time.monotonic()))
    return times


@pytest.mark.parametrize("nodes", [(0, 1, 2), (0, 0, 1, 1), (0, 0, 1, 1, 2, 2)], ids=str)
def test_nobody_leaves_a_barrier_before_the_last_has_come(run_ranks: Any, nodes: tuple[int, ...]) -> None:
    """Nor does a rank leave before one of another node that is no leader there. All ranks have this machine's clock."""
    results = run_ranks(late_in_turn, len(nodes), env=Environment(Layout("barrier", nodes)))
    for late, of_ranks in enumerate(zip(*results)):
        last = max(came for came, _ in of_ranks)
        early = [rank for rank, (_, left) in enumerate(of_ranks) if left < last]
        assert not early, f"ranks {early} left before rank {late} had come"


# --- past 4 GiB ---

HUGE = (1 << 32) + 3
BLOCK = 1 << 16


def _available() -> int:
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def huge(comm: Any) -> dict[str, int]:
    """Checksums of blocks around the places where 32-bit counts would wrap, after a sum of HUGE bytes."""
    x = np.zeros(HUGE, np.uint8)
    places = [0, (1 << 31) - BLOCK // 2, (1 << 32) - BLOCK // 2, HUGE - BLOCK // 2]
    blocks = [slice(max(0, p), min(p + BLOCK, HUGE)) for p in places]
    for number, block in enumerate(blocks):
        x[block] = np.arange(block.stop - block.start, dtype=np.uint64).astype(np.uint8) * np.uint8(2 * comm.rank + 1) + np.uint8(
            number
        )
    comm.all_reduce(x)
    for number, block in reversed(list(enumerate(blocks))):  # the last two overlap: the later write counts
        end = block.stop if number != 2 else min(block.stop, blocks[3].start)
        expected = sum(
            np.arange(block.stop - block.start, dtype=np.uint64).astype(np.uint8) * np.uint8(2 * r + 1) + np.uint8(number)
            for r in range(comm.nranks)
        )
        np.testing.assert_array_equal(x[block.start : end], expected[: end - block.start], err_msg=f"block {number}")
    untouched = slice(1 << 20, (1 << 20) + (1 << 26))
    assert not x[untouched].any()
    return {f"{b.start}": zlib.crc32(x[b]) for b in blocks}


@pytest.mark.slow
@pytest.mark.limit(110)
@pytest.mark.parametrize("nodes", [(0, 0), (0, 1)], ids=["node", "tcp"])
def test_past_4_gib(run_ranks: Any, nodes: tuple[int, ...]) -> None:
    need = 2 * HUGE + (1 << 30)
    if _available() < need:
        pytest.skip(f"needs {need >> 20} MiB of memory, {_available() >> 20} MiB are available")
    first, second = run_ranks(huge, 2, env=Environment(Layout("huge", nodes, chunk=131072), None), timeout=90, comm_timeout=80)
    assert first == second
