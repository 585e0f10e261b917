"""The report: report.json for programs, report.md for people, log.txt with what the parts printed; complete on disk after every part."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

#: Bytes that a file may have: what borrowed machines give back is limited to 16 MiB each.
MOST = 15 << 20
STAND_IN = "STAND-IN: a test double of the driver, no GPU; its figures measure nothing but the harness"


class Report:
    """What is known so far. `add` puts a part in and writes all files; OSError if they cannot be written, the last ones stay then."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder, self.facts = folder, facts
        self.parts: list[dict[str, Any]] = []
        self.log = ""

    def add(self, entry: dict[str, Any]) -> None:
        """Put in one part's entry (session.judge), and write."""
        self.log += f"==== {entry['part']}: {entry['result']} after {entry['seconds']} s\n{entry.pop('output', '')}\n"
        self.parts.append(entry)
        self.write()

    def write(self) -> None:
        """Write each file under another name first: a reader never finds half of one."""
        everything = {**self.facts, "written": time.strftime("%Y-%m-%d %H:%M:%S %z"), "parts": self.parts}
        contents = {
            "log.txt": self.log.encode()[-MOST:],
            "report.md": self.markdown().encode(),
            "report.json": json.dumps(everything, indent=1).encode(),
        }
        made = []
        try:
            for name, content in contents.items():
                made.append(self.folder / f".{name}.new")
                with made[-1].open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            for new, name in zip(made, contents):
                new.replace(self.folder / name)
        finally:
            for new in made:
                new.unlink(missing_ok=True)

    # ---- for people ----

    def table(self) -> list[tuple[str, ...]]:
        """Rows: part, result, seconds, figure, first line of the error."""
        head = ("part", "result", "s", "figure", "first line of the error")
        mark = " [stand-in]" if self.facts["stand_in"] else ""
        rows = []
        for part in self.parts:
            figure = part["figure"] + (mark if part["figure"] else "")
            rows.append((part["part"], part["result"], f"{part['seconds']:.1f}", figure, part["error"][:300]))
        return [head, *rows]

    def text(self) -> str:
        """The table for a terminal."""
        rows = [tuple(cell[:110] for cell in row) for row in self.table()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        return "\n".join([*([STAND_IN] if self.facts["stand_in"] else []), *lines])

    def markdown(self) -> str:
        """report.md: the facts, the table, then every case of every part."""
        lines = ["# First contact with a GPU", ""]
        if self.facts["stand_in"]:
            lines += [f"**{STAND_IN}.**", ""]
        lines += [f"- {name.replace('_', ' ')}: {value}" for name, value in self.facts.items()] + [""]
        lines += _grid(self.table())
        for part in self.parts:
            lines += ["", f"## {part['part']}: {part.get('title', '')}", "", f"{part['result']} {part['error']}".strip(), ""]
            head = ("case", "result", "s", "figure", "error")
            rows = [
                (c["case"], c["result"], str(c.get("seconds", "")), c.get("figure", ""), c.get("error", "")[:600])
                for c in part["cases"]
            ]
            lines += _grid([head, *rows]) if rows else ["(it said nothing)"]
        return "\n".join(lines) + "\n"


def _grid(rows: list[tuple[str, ...]]) -> list[str]:
    lines = ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]
