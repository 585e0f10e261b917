"""Waits in the C core that come back to Python now and then, so that signals are handled: Ctrl-C ends them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from hfreduce._ffi import ffi, lib

#: A call that waits comes back to Python after so many seconds.
PATIENCE = 0.25


def leave(handle: Any) -> None:
    """Wait for what runs on a communicator with that patience, 30 s at most, then leave and free it.

    An exception of a signal handler aborts what runs, and comes once the communicator is gone.
    """
    try:
        while lib.hfreduceCommLeave(handle) == lib.hfreduceInProgress:
            pass
    except BaseException:
        lib.hfreduceCommAbort(handle)
        raise
    finally:
        lib.hfreduceCommDestroy(handle)


class _Join:
    """A call that joins: what made it end early. stop: another thread wants that."""

    def __init__(self, stop: threading.Event | None) -> None:
        self.stop = stop
        self.error: BaseException | None = None


_current = threading.local()


def _keep(kind: Any, error: BaseException, trace: Any) -> int:
    """Called with the exception of a signal handler: the call that joins ends, and raises it then."""
    _current.join.error = error
    return 1


# C asks while it joins. That Python code runs is all that signal handlers need.
@ffi.def_extern(error=1, onerror=_keep)  # type: ignore[untyped-decorator, misc, unused-ignore]
def hfr_python_interrupted(argument: Any) -> int:
    stop = _current.join.stop
    return int(stop is not None and stop.is_set())


def join(config: Any, handle: Any, call: Callable[[], int], stop: threading.Event | None = None) -> int:
    """The result of `call`, which joins as `config` says and then puts a communicator at `handle`.

    An exception of a signal handler ends it within about a tenth of a second and is raised; so does `stop`, with AbortedError.
    """
    config.interrupted = lib.hfr_python_interrupted
    outer, _current.join = getattr(_current, "join", None), _Join(stop)
    try:
        code = call()
        if _current.join.error is not None:
            raise _current.join.error
    except BaseException:
        if handle[0] != ffi.NULL:  # it had joined by then
            lib.hfreduceCommDestroy(handle[0])
        raise
    finally:
        _current.join = outer
    return code
