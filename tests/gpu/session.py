"""Run one part in a session of its own, under a time limit, and read what it says: a hang, a crash or a wrong value costs this part only."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

#: Bytes of a part's output that are kept in the log: the beginning and the end.
KEPT = 60_000


def start(command: list[str], output: Path, environment: dict[str, str], folder: Path) -> subprocess.Popen[bytes]:
    """Start a program in a new session; its output goes to a file, so that processes which outlive it hold no pipe open."""
    with output.open("wb") as file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder,
            start_new_session=True,
        )


def finish(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Wait so long, then kill the whole session; its status, None if it had to be killed."""
    try:
        return process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return None
    finally:
        kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the session. A process that is stuck in the driver may outlive this: nobody waits for it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        pass


def run(name: str, script: Path, seconds: float, environment: dict[str, str], folder: Path) -> dict[str, Any]:
    """Run the part's script for at most so many seconds; its entry of the report, with its output under "output"."""
    output = folder / f"{name}.output"
    begin = time.monotonic()
    status = finish(start([sys.executable, "-u", "-X", "faulthandler", str(script)], output, environment, folder), seconds)
    return judge(name, output, status, round(time.monotonic() - begin, 1), seconds)


def judge(name: str, output: Path, status: int | None, took: float, limit: float) -> dict[str, Any]:
    """Make a part's entry of the report from what it said and how it ended."""
    text = output.read_text(errors="replace") if output.exists() else ""
    cases, last, other = read(text)
    failed = [case for case in cases if case["result"] == "failed"]
    figures = [f"{case['case']}: {case['figure']}" for case in cases if case.get("figure")]
    entry = {"part": name, "seconds": took, "figure": figures[0] if figures else "", "error": "", "cases": cases}
    if status is None:
        entry |= {"result": "hung", "error": f"killed after {limit:.0f} s in: {last}"}
    elif status < 0:
        entry |= {"result": "crashed", "error": f"{signal.Signals(-status).name} in: {last}"}
    elif failed:
        entry |= {"result": "failed", "error": f"{failed[0]['case']}: {failed[0]['error']}".splitlines()[0]}
    elif status or not cases:
        entry |= {"result": "failed", "error": f"ended with {status} in: {last}: {other[-1] if other else 'no word'}"}
    elif all(case["result"] == "skipped" for case in cases):
        entry |= {"result": "skipped", "error": cases[0]["error"]}
    else:
        entry["result"] = "ok"
    more = len(text) - KEPT
    entry["output"] = text if more <= 0 else f"{text[: KEPT // 2]}\n[{more} bytes left out]\n{text[-KEPT // 2 :]}"
    return entry


def read(text: str) -> tuple[list[dict[str, Any]], str, list[str]]:
    """The cases of a part's output, the last step that it began, and the lines that are not of the protocol."""
    cases, last, other = [], "its start", []
    for line in text.splitlines():
        try:
            said = json.loads(line)
        except ValueError:
            said = None
        if isinstance(said, dict) and "step" in said:
            last = said["step"]
        elif isinstance(said, dict) and "case" in said:
            cases.append(said)
        elif line.strip():
            other.append(line.strip())
    return cases, last, other
