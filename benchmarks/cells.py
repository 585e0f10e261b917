"""What was measured, cell by cell, as plain data that goes to JSON and back; ratios, tables and plots are made from it alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from measuring import human, markdown, micros, rule, spread
from peers import OURS

#: A cell: {"collective", "dtype", "size", "nranks", "runs"}; a run: {"times": {library: [us]}, "limit": us or None}.
#: One run a launcher: what is compared is always of one run, so of the same processes and the same minutes.
Cell = dict[str, Any]

_ORDER = ["hfreduce", "numpy", "openmpi", "mpich", "mpi", "gloo"]


class Ratio(NamedTuple):
    """Time of one of OURS by another's: below 1, hfreduce is faster."""

    value: float
    other: str


def of_peer(cell: Cell, ours: str) -> Ratio | None:
    """Our median by that of the best peer of the same run; of the run where that is largest. None without a peer."""
    found = []
    for run in cell["runs"]:
        medians = {name: float(np.median(times)) for name, times in run["times"].items()}
        peers = [name for name in medians if name not in OURS]
        if ours in medians and peers:
            best = min(peers, key=medians.__getitem__)
            found.append(Ratio(medians[ours] / medians[best], best))
    return max(found) if found else None


def of_limit(cell: Cell, ours: str) -> Ratio | None:
    """Our median by the limit that the same run measured; of the run where that is largest. None without a limit."""
    found = [
        Ratio(float(np.median(run["times"][ours])) / run["limit"], "limit")
        for run in cell["runs"]
        if ours in run["times"] and run["limit"]
    ]
    return max(found) if found else None


def names(cells: Iterable[Cell]) -> list[str]:
    """The libraries that stand in cells, ours first."""
    seen = {name for cell in cells for run in cell["runs"] for name in run["times"]}
    return sorted(seen, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name))


def pooled(cell: Cell, name: str) -> list[float]:
    """The times of a library, of all runs."""
    return [time for run in cell["runs"] for time in run["times"].get(name, [])]


def merge(runs: Sequence[Sequence[Cell]]) -> list[Cell]:
    """Cells of several launchers as one list: what was measured in more than one becomes a cell of several runs."""
    merged: dict[tuple[Any, ...], Cell] = {}
    for cells in runs:
        for cell in cells:
            key = tuple(cell[part] for part in ("collective", "dtype", "nranks", "size"))
            if key in merged:
                merged[key]["runs"] += cell["runs"]
            else:
                merged[key] = {**cell, "runs": list(cell["runs"])}
    return list(merged.values())


# --- the table ---


def _digits(ratio: float) -> str:
    return f"{ratio:.3f}" if ratio < 0.1 else f"{ratio:.2f}" if ratio < 100 else f"{ratio:.0f}"


def head(libraries: Sequence[str]) -> list[str]:
    """The columns' titles."""
    ours = [name for name in libraries if name in OURS]
    peers = [f"{name} / peer" for name in ours] + ["best peer"] if len(ours) < len(libraries) else []
    return ["size", *libraries, "limit", *peers, *(f"{name} / limit" for name in ours)]


def row(cell: Cell, libraries: Sequence[str]) -> list[str]:
    """The columns of one size: median (p10 to p90) in us of each library, the limit, the ratios."""
    ours = [name for name in libraries if name in OURS]
    limits = [run["limit"] for run in cell["runs"] if run["limit"]]
    columns = [human(cell["size"])]
    for name in libraries:
        times = pooled(cell, name)
        columns.append(spread(times) if times else "")
    columns.append(micros(float(np.median(limits))) if limits else "")
    if len(ours) < len(libraries):
        against = [of_peer(cell, name) for name in ours]
        columns += ["" if ratio is None else _digits(ratio.value) for ratio in against]
        columns.append(next((ratio.other for ratio in against if ratio is not None), ""))
    for name in ours:
        ratio = of_limit(cell, name)
        columns.append("" if ratio is None else _digits(ratio.value))
    return columns


def widths(libraries: Sequence[str]) -> list[int]:
    """Of the columns."""
    return [max(len(title), 26 if title in libraries else 10) for title in head(libraries)]


def title(cell: Cell, libraries: Sequence[str]) -> list[str]:
    """The lines before the first row of a collective."""
    what = cell["collective"] if cell["collective"] == "barrier" else f"{cell['collective']}, {cell['dtype']}"
    return [f"\n{what}, {cell['nranks']} ranks\n", markdown(head(libraries), widths(libraries)), rule(widths(libraries))]


def table(cells: Sequence[Cell]) -> str:
    """All of it, a block a collective, datatype and number of ranks."""
    libraries, lines, before = names(cells), [], None
    for cell in cells:
        block = tuple(cell[part] for part in ("collective", "dtype", "nranks"))
        if block != before:
            lines += title(cell, libraries)
            before = block
        lines.append(markdown(row(cell, libraries), widths(libraries)))
    return "\n".join(lines).lstrip("\n")


# --- the plot ---


def can_plot() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def plot(cells: Sequence[Cell], path: str) -> None:
    """Draw time over size, both logarithmic: a picture a block of the table, a line a library, the limit dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    blocks: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        if cell["size"]:  # a barrier has none
            blocks.setdefault(tuple(cell[part] for part in ("collective", "dtype", "nranks")), []).append(cell)
    if not blocks:
        return
    across = min(3, len(blocks))
    down = -(-len(blocks) // across)
    figure, axes = pyplot.subplots(down, across, figsize=(5.5 * across, 4.2 * down), squeeze=False, layout="constrained")
    for axis in axes.flat[len(blocks) :]:
        axis.remove()
    for axis, ((collective, dtype, nranks), block) in zip(axes.flat, blocks.items()):
        for index, name in enumerate(names(cells)):
            points = [(cell["size"], np.median(times)) for cell in block if (times := pooled(cell, name))]
            if points:
                axis.plot(*zip(*points), marker="o", markersize=3, label=name, color=f"C{index}")
        limits = [
            (cell["size"], np.median([run["limit"] for run in cell["runs"]]))
            for cell in block
            if all(run["limit"] for run in cell["runs"])
        ]
        if limits:
            axis.plot(*zip(*limits), linestyle="--", color="black", label="limit")
        axis.set(xscale="log", yscale="log", xlabel="bytes", ylabel="us", title=f"{collective}, {dtype}, {nranks} ranks")
        axis.grid(True, which="both", alpha=0.2)
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
