"""Tests whose commands run in a virtual machine with RDMA devices (tools/rdma-vm).

A test says by @in_guest what is run there, and gets how that went as the fixture `guest`. Booting takes seconds, so the
commands of all chosen tests that want as many devices run in one machine, one after the other; the first test waits for them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from programs import PATIENCE, ROOT, SOURCES, built, environment, need_compiler, shorten

TOOLS = ROOT / "tests" / "tools"
VM = str(TOOLS / "rdma-vm")
#: What each machine ran, with times and output.
LOGS = ROOT / "build" / "rdma"
#: Seconds, times PATIENCE, that a machine may run, with all its cases.
BATCH_LIMIT = 600


@dataclass
class Guest:
    """How a test's command went: its status (None: its limit passed), output, packets sent by each device, and what was left."""

    code: int | None
    seconds: float
    output: str
    packets: dict[str, int]
    left: str

    def __str__(self) -> str:
        end = "its limit passed" if self.code is None else f"status {self.code}"
        return f"{end} after {self.seconds:.1f} s; packets {self.packets}; left behind: {self.left or 'nothing'}\n{shorten(self.output)}"

    def clean(self) -> None:
        """Assert that it ended by itself and left nothing behind: no process, no object of a device."""
        assert self.code is not None and not self.left, str(self)

    def well(self) -> None:
        """Assert that it succeeded, cleanly."""
        self.clean()
        assert self.code == 0, str(self)

    def over_rdma(self, *devices: str, packets: int = 100) -> None:
        """Assert that it succeeded and that these devices (one at least, if none is named) moved data."""
        self.well()
        moved = [self.packets[device] for device in devices] or [max(self.packets.values())]
        assert min(moved) >= packets, f"too few packets for data over RDMA; {self}"


def in_guest(command: str, *, devices: int = 1, limit: float = 30) -> Any:
    """Mark a test: bash runs `command` in the guest, with the test's parameters put in by str.format, under a limit in seconds, times PATIENCE.

    The C programs of tests/c are on its PATH, {python} is this Python with hfreduce.
    """
    return pytest.mark.guest(command=command, devices=devices, limit=limit)


_results: dict[str, Guest | str] = {}  # by test; what became of its machine instead, if it has no result


def result(item: pytest.Item, session: pytest.Session) -> Guest:
    """How the test's command went, after running those of all tests that share its machine."""
    if item.nodeid not in _results:
        devices = item.get_closest_marker("guest").kwargs["devices"]  # type: ignore[union-attr]
        marked = [(i, m.kwargs) for i in session.items if (m := i.get_closest_marker("guest")) is not None]
        _run_batch([(i, mark) for i, mark in marked if mark["devices"] == devices], devices)
    found = _results[item.nodeid]
    if isinstance(found, str):
        pytest.fail(found, pytrace=False)
    return found


def need_vm() -> None:
    """Skip unless the machine can be started here."""
    if os.environ.get("RDMA_VM"):
        pytest.skip("this is the virtual machine")
    checked = subprocess.run([VM, "--check"], capture_output=True, text=True)
    if checked.returncode:
        pytest.skip(f"no virtual machine with RDMA devices here: {checked.stderr.strip()}")


def _command(item: pytest.Item, mark: Any) -> str:
    given = item.callspec.params if hasattr(item, "callspec") else {}
    return str(mark["command"].format(**given, python=sys.executable))


def _run_batch(batch: list[tuple[pytest.Item, Any]], devices: int) -> None:
    need_vm()
    need_compiler()
    commands = [_command(item, mark) for item, mark in batch]
    words = {word for command in commands for word in re.findall(r"\w+", command)}
    folders = {built(path.stem).parent for path in SOURCES.glob("*.c") if path.stem in words}
    path = ":".join([*map(str, folders), os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    with tempfile.TemporaryDirectory(prefix="hfreduce-rdma-") as folder:
        cases = [[item.name, command, mark["limit"] * PATIENCE] for (item, mark), command in zip(batch, commands)]
        Path(folder, "cases.json").write_text(json.dumps(cases))
        start = [VM, "-t", str(int(BATCH_LIMIT * PATIENCE)), "-d", str(devices), "--rw", folder, "--"]
        done = subprocess.run(
            [*start, sys.executable, str(TOOLS / "rdma_guest.py"), folder],
            env=environment(PATH=path),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
        log = done.stdout + done.stderr
        for number, (item, _) in enumerate(batch):
            try:
                _results[item.nodeid] = Guest(**json.loads(Path(folder, f"{number}.json").read_text()))
            except FileNotFoundError:
                _results[item.nodeid] = (
                    f"the virtual machine ended (status {done.returncode}) before the case was done; it had come to:\n"
                    f"{shorten(done.stdout + done.stderr)}"
                )
            log += f"\n{item.name}: {_results[item.nodeid]}"
        LOGS.mkdir(parents=True, exist_ok=True)
        LOGS.joinpath(f"devices-{devices}.log").write_text(log)
