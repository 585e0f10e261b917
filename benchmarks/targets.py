"""What hfreduce aims at on one node, what must be measured to judge it, and the judgement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from cells import Cell, of_limit, of_peer
from measuring import human

KIB, MIB = 1 << 10, 1 << 20
_SWEEP = [8, KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB]
_FOUR = [8, 64 * KIB, 4 * MIB, 64 * MIB]
_MOVING = ["all_gather", "broadcast", "all_to_all", "reduce"]


class Target(NamedTuple):
    """A ratio that is to be at most `aim` at each size of `sizes` that is measured; with `mean`, on average over them.

    memory: "numpy" (arrays as a program has them) or "hfreduce" (hfreduce.empty); against: "peer" (the best) or "limit".
    """

    what: str
    collectives: Sequence[str]
    sizes: Sequence[int]
    aim: float
    nranks: Sequence[int] = (2,)
    dtypes: Sequence[str] = ("float32",)
    memory: str = "numpy"
    against: str = "peer"
    mean: bool = False


class Verdict(NamedTuple):
    """A target, and at which cell how it came out."""

    target: Target
    where: str
    ratio: float
    other: str

    @property
    def met(self) -> bool:
        return self.ratio <= self.target.aim


TARGETS = [
    Target("all_reduce, 8 B to 16 KiB", ["all_reduce"], [8, KIB, 16 * KIB], 0.6),
    Target("all_reduce, 64 KiB to 1 MiB", ["all_reduce"], [64 * KIB, 256 * KIB, MIB], 0.5),
    Target("all_reduce, 4 MiB", ["all_reduce"], [4 * MIB], 0.85),
    Target("all_reduce, 4 MiB, hfreduce.empty", ["all_reduce"], [4 * MIB], 0.45, memory="hfreduce"),
    Target("all_reduce, 16 MiB", ["all_reduce"], [16 * MIB], 0.5),
    Target("all_reduce, 64 MiB", ["all_reduce"], [64 * MIB], 0.25),
    Target("all_reduce of 16-bit floats, 1 MiB", ["all_reduce"], [MIB], 0.3, dtypes=("bfloat16", "float16")),
    Target("moving and reduce, each", _MOVING, _FOUR, 1.0),
    Target("moving and reduce, on average", _MOVING, _FOUR, 0.7, mean=True),
    Target("reduce_scatter, from 4 MiB on", ["reduce_scatter"], [4 * MIB, 16 * MIB, 64 * MIB], 0.4),
    Target("all_reduce beside the limit, 64 MiB", ["all_reduce"], [64 * MIB], 1.3, against="limit"),
    Target("more ranks than cores, all_reduce", ["all_reduce"], _SWEEP, 1.0, nranks=(4, 8)),
]


def suite(nranks: int) -> list[tuple[str, str, int]]:
    """(collective, dtype, size) of all that the targets for so many ranks need, in the order of a table."""
    wanted = []
    for target in TARGETS:
        for collective in target.collectives if nranks in target.nranks else ():
            wanted += [(collective, dtype, size) for dtype in target.dtypes for size in target.sizes]
    order = list(dict.fromkeys((collective, dtype) for collective, dtype, _ in wanted))
    return sorted(set(wanted), key=lambda one: (order.index(one[:2]), one[2]))


def judge(cells: Sequence[Cell]) -> list[Verdict]:
    """A verdict for every cell that a target speaks of, or for their average. What was not measured has none."""
    verdicts = []
    for target in TARGETS:
        found = []
        for cell in cells:
            if (
                cell["collective"] in target.collectives
                and cell["dtype"] in target.dtypes
                and cell["nranks"] in target.nranks
                and cell["size"] in target.sizes
            ):
                ratio = (of_peer if target.against == "peer" else of_limit)(cell, target.memory)
                if ratio is not None:
                    where = f"{cell['collective']} {cell['dtype']} {human(cell['size'])}, {cell['nranks']} ranks"
                    found.append(Verdict(target, where, ratio.value, ratio.other))
        if target.mean and found:
            found = [Verdict(target, f"mean of {len(found)}", sum(one.ratio for one in found) / len(found), "best peers")]
        verdicts += found
    return verdicts


def lines(verdicts: Sequence[Verdict], targets: Sequence[Target] = TARGETS) -> list[str]:
    """A table in Markdown: each target with its verdicts, or a line that nothing was measured for it."""
    text = ["| target | where | ratio | to | at most | |", "|---|---|---|---|---|---|"]
    for target in targets:
        mine = [verdict for verdict in verdicts if verdict.target is target]
        if not mine:
            text.append(f"| {target.what} | | | | {target.aim:g} | not measured |")
        for one in mine:
            word = "met" if one.met else "MISSED"
            text.append(f"| {target.what} | {one.where} | {one.ratio:.2f} | {one.other} | {target.aim:g} | {word} |")
    return text


def as_json(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """The verdicts as plain data."""
    return [
        {
            "target": one.target.what,
            "where": one.where,
            "ratio": one.ratio,
            "to": one.other,
            "aim": one.target.aim,
            "met": one.met,
        }
        for one in verdicts
    ]
