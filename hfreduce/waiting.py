"""Waits in the C core that come back to Python now and then, so that signals are handled: Ctrl-C ends them."""

from __future__ import annotations

from typing import Any

from hfreduce._ffi import lib

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
