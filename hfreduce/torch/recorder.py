"""The last operations of a process group, for the message that says where a rank stood."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from typing import Any

#: Operations kept a group.
CAPACITY = int(os.environ.get("HFREDUCE_TORCH_RECORD") or 64)


class FlightRecorder:
    """A ring of the last operations: sequence number, name, shapes, dtype, when issued, how it stands."""

    def __init__(self, name: str, rank: int, size: int) -> None:
        self.name = name
        self.rank = rank
        self.size = size
        self.seq = 0
        # plain tuples: this is done for every operation, however small
        self._ring: deque[tuple[int, str, Any, Any, float, Any]] = deque(maxlen=CAPACITY)

    def add(self, name: str, shapes: Any, dtype: Any, work: Any) -> int:
        """Note an operation; work: None for one that the caller waits for, else an object with done() and exception()."""
        self.seq += 1
        self._ring.append((self.seq, name, shapes, dtype, time.monotonic(), work))
        return self.seq

    def entries(self) -> list[dict[str, Any]]:
        """The operations, oldest first: seq, op, shapes, dtype, age (seconds since issue), state ("done", "running", "failed",
        "called": a blocking one, which is over unless it is the last)."""
        now = time.monotonic()
        return [
            {
                "seq": seq,
                "op": name,
                "shapes": _shapes(shapes),
                "dtype": str(dtype).replace("torch.", ""),
                "age": now - issued,
                "state": _state(work),
            }
            for seq, name, shapes, dtype, issued, work in list(self._ring)
        ]

    def last(self) -> str:
        """The last operation as text."""
        if not self._ring:
            return "no operation"
        entry = self.entries()[-1]
        return _line(entry)

    def dump(self, why: str) -> str:
        """Write the record to standard error, or to the file HFREDUCE_TORCH_RECORD_FILE (%r: rank, %p: pid); returns it."""
        lines = [f"hfreduce flight record of rank {self.rank} of {self.size}, group {self.name!r}: {why}"]
        lines += [f"  {_line(entry)}, {entry['age']:.3f} s ago, {entry['state']}" for entry in self.entries()]
        text = "\n".join(lines) + "\n"
        path = os.environ.get("HFREDUCE_TORCH_RECORD_FILE", "")
        try:
            if path:
                with open(path.replace("%r", str(self.rank)).replace("%p", str(os.getpid())), "a") as file:
                    file.write(text)
            else:
                sys.stderr.write(text)
        except OSError as error:
            sys.stderr.write(f"hfreduce: the flight record cannot be written to {path}: {error}\n")
        return text


def _line(entry: dict[str, Any]) -> str:
    return f"#{entry['seq']} {entry['op']} {entry['shapes']} {entry['dtype']}"


def _shapes(shapes: Any) -> list[list[int]]:
    """One shape, or a tuple of shapes."""
    if not isinstance(shapes, (tuple, list)):
        return []
    if all(isinstance(extent, int) for extent in shapes) and type(shapes) is not tuple:
        return [list(shapes)]
    return [list(shape) for shape in shapes]


def _state(work: Any) -> str:
    if work is None:
        return "called"
    if not work.done():
        return "running"
    return "done" if work.exception() is None else "failed"
