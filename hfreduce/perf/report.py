"""Results as nccl-tests' table (with p50 and p99 after its columns), as JSON, and as a plot."""

from __future__ import annotations

import json
from typing import Any

from hfreduce.perf.collectives import COLLECTIVES
from hfreduce.perf.measure import Half, Plan, Row

_TYPE_NAMES = {  # nccl-tests' names where they differ
    "float16": "half",
    "float32": "float",
    "float64": "double",
    "float8_e4m3fn": "f8e4m3",
    "float8_e5m2": "f8e5m2",
}


def header() -> str:
    """The lines above the table."""
    left = "# {:>10}  {:>12}  {:>8}  {:>6}  {:>6}"
    half = "  {:>7}  {:>6}  {:>6} {:>6}"
    tail = "  {:>8} {:>8}"
    names = left.format("size", "count", "type", "redop", "root") + half.format("time", "algbw", "busbw", "#wrong") * 2
    units = left.format("(B)", "(elements)", "", "", "") + half.format("(us)", "(GB/s)", "(GB/s)", "") * 2
    titles = f"{'#':<52}{'out-of-place':^32}{'in-place':^32}{'out-of-place':^19}{'in-place':^19}".rstrip()
    return "\n".join([titles, names + tail.format("p50", "p99") * 2, units + tail.format("(us)", "(us)") * 2])


def line(plan: Plan, row: Row) -> str:
    """One row of the table."""
    entry = COLLECTIVES[plan.collective]
    left = "{:>12}  {:>12}  {:>8}  {:>6}  {:>6}".format(
        row.size,
        row.count,
        _TYPE_NAMES.get(plan.dtype.name, plan.dtype.name),
        plan.op if entry.reduces else "none",
        plan.root if entry.rooted else -1,
    )
    halves = (row.out_of_place, row.in_place)
    return left + "".join(map(_half, halves)) + "".join(map(_tail, halves))


def _half(half: Half | None) -> str:
    if half is None:
        return "  {:>7}  {:>6}  {:>6} {:>6}".format("N/A", "N/A", "N/A", "N/A")
    return f"  {_time(half.time):>7}  {half.algbw:>6.2f}  {half.busbw:>6.2f} {'N/A' if half.wrong is None else half.wrong:>6}"


def _tail(half: Half | None) -> str:
    return "  {:>8} {:>8}".format(*(("N/A", "N/A") if half is None else (_time(half.p50), _time(half.p99))))


def _time(microseconds: float) -> str:
    return f"{microseconds:.{0 if microseconds >= 10000 else 1 if microseconds >= 100 else 2}f}"


def wrong_values(rows: list[Row]) -> int:
    """Wrong elements in all rows."""
    return sum(half.wrong or 0 for row in rows for half in (row.out_of_place, row.in_place) if half is not None)


def average_busbw(rows: list[Row]) -> float:
    """Mean of all bus bandwidths, GB/s."""
    values = [half.busbw for row in rows for half in (row.out_of_place, row.in_place) if half is not None]
    return sum(values) / len(values) if values else 0.0


def footer(rows: list[Row]) -> str:
    """The lines below the table."""
    bad = wrong_values(rows)
    return f"# Out of bounds values : {bad} {'FAILED' if bad else 'OK'}\n# Avg bus bandwidth    : {average_busbw(rows):g}\n#"


def write_json(path: str, setup: dict[str, Any], results: list[tuple[Plan, list[Row]]]) -> None:
    """Write everything measured: setup, then a list of tables. Times are in microseconds, bandwidths in 1e9 bytes/s."""
    tables = [
        {
            "collective": plan.collective,
            "dtype": plan.dtype.name,
            "op": plan.op if COLLECTIVES[plan.collective].reduces else None,
            "root": plan.root if COLLECTIVES[plan.collective].rooted else None,
            "iterations": plan.iterations,
            "warmup": plan.warmup,
            "average_busbw": average_busbw(rows),
            "wrong": wrong_values(rows) if plan.check else None,
            "rows": [
                {
                    "size": row.size,
                    "count": row.count,
                    "out_of_place": row.out_of_place._asdict(),
                    "in_place": None if row.in_place is None else row.in_place._asdict(),
                }
                for row in rows
            ],
        }
        for plan, rows in results
    ]
    with open(path, "w") as file:
        json.dump({**setup, "tables": tables}, file, indent=1)
        file.write("\n")


def write_plot(path: str, title: str, results: list[tuple[Plan, list[Row]]]) -> None:
    """Draw bus bandwidth over size (out of place), one line a table. ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for plan, rows in results:
        shown = [row for row in rows if row.size]
        label = " ".join([plan.collective, plan.dtype.name] + ([plan.op] if COLLECTIVES[plan.collective].reduces else []))
        axes.plot([row.size for row in shown], [row.out_of_place.busbw for row in shown], marker=".", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("size (bytes)")
    axes.set_ylabel("bus bandwidth (GB/s)")
    axes.set_title(title)
    axes.grid(True, alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
