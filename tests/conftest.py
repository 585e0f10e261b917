"""A time limit for every test; `run_ranks`, a function on N ranks (ranks.py); `guest`, a command in a virtual machine (rdma.py)."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ranks
import rdma

# Ranks that wait for each other in vain say so before the test's limit. Read by this process and all that it starts.
os.environ.setdefault("HFREDUCE_TIMEOUT", "30")

#: Seconds that a test may take unless marked @pytest.mark.limit(seconds).
LIMIT = float(os.environ.get("HFREDUCE_TEST_LIMIT", "120"))


class TooLong(BaseException):
    """The test's time limit passed. Not an Exception, so that no test swallows it."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "limit(seconds): time limit of this test")
    config.addinivalue_line("markers", "guest(command, devices, limit): what runs in a virtual machine; see rdma.in_guest")
    config.addinivalue_line("markers", "slow: takes much time or memory; skip with -m 'not slow'")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[Any]:
    """End a test that hangs: with an exception in Python code, with the whole run if it hangs in C."""
    marker = item.get_closest_marker("limit")
    limit = float(marker.args[0]) if marker else LIMIT

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
