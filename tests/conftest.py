"""A time limit for every test; which tests share a worker, and what each file took; `run_ranks`, a function on N ranks (ranks.py); `guest`, a command in a virtual machine (rdma.py)."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ranks
import rdma

# Ranks that wait for each other in vain say so before the test's limit. Read by this process and all that it starts.
os.environ.setdefault("HFREDUCE_TIMEOUT", "30")

#: Seconds, times ranks.PATIENCE, that a test may take unless marked @pytest.mark.limit(seconds).
LIMIT = float(os.environ.get("HFREDUCE_TEST_LIMIT", "120"))


class TooLong(BaseException):
    """The test's time limit passed. Not an Exception, so that no test swallows it."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "limit(seconds): time limit of this test on quiet cores; ranks.PATIENCE times that is given"
    )
    config.addinivalue_line("markers", "guest(command, devices, limit): what runs in a virtual machine; see rdma.in_guest")
    config.addinivalue_line("markers", "xdist_group(name): tests that share a worker, where pytest-xdist runs some at a time")
    config.addinivalue_line("markers", "slow: takes much time or memory; skip with -m 'not slow'")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests whose file keeps something for all of them, or that share a virtual machine, share a worker, too."""
    for item in items:
        if (guest := item.get_closest_marker("guest")) is not None:
            item.add_marker(pytest.mark.xdist_group(f"machine-{guest.kwargs['devices']}"))
        elif getattr(item.module, "SHARED", False):  # type: ignore[attr-defined]
            item.add_marker(pytest.mark.xdist_group(item.module.__name__))  # type: ignore[attr-defined]


_seconds: Counter[str] = Counter()  # by file


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _seconds[report.location[0]] += report.duration


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What each file took, with its fixtures; two of them may have run at a time."""
    if _seconds:
        terminalreporter.section("seconds by file")
        for name, seconds in _seconds.most_common():
            if seconds >= 1:
                terminalreporter.write_line(f"{seconds:7.1f}  {name}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[Any]:
    """End a test that hangs: with an exception in Python code, with the whole run if it hangs in C."""
    marker = item.get_closest_marker("limit")
    limit = (float(marker.args[0]) if marker else LIMIT) * ranks.PATIENCE

    def late(number: int, frame: Any) -> None:
        faulthandler.dump_traceback(sys.__stderr__)
        raise TooLong(f"{item.nodeid} was not done after {limit:g} s")

    old = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, limit)
    faulthandler.dump_traceback_later(limit + 20, exit=True, file=sys.__stderr__)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, old)


@pytest.fixture
def run_ranks() -> Callable[..., list[Any]]:
    """ranks.run_ranks: call a function on N ranks."""
    return ranks.run_ranks


@pytest.fixture
def guest(request: pytest.FixtureRequest) -> rdma.Guest:
    """How the command of @rdma.in_guest went."""
    return rdma.result(request.node, request.session)
