"""What a part says: one JSON line for each step that it begins and each result that it has; the command reads them from its output.

FIRST_CONTACT_BREAK=PART:hang, PART:crash or PART:wrong plants a break in that part, so that a test sees that the report tells of it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

#: The calls of the planted break that are still to come: "wrong" spoils the first comparison.
_planted: list[str] = []


class Absent(Exception):
    """What the case needs is not here: it is skipped, and the text says what is missing."""


class Wrong(AssertionError):
    """A value is not what it has to be."""


def say(**line: Any) -> None:
    """Print one line of the protocol; it is on its way before this returns, so that a crash loses nothing."""
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def step(text: str) -> None:
    """Say what begins now: the report names the last step of a part that hung or crashed."""
    say(step=text)


def same(got: Any, want: Any, what: str = "value") -> None:
    """Raise Wrong unless the two are equal: bytes, numbers, or arrays of NumPy, whose shape and bits are compared."""
    got, want = (_plain(x) for x in (got, want))
    if "wrong" in _planted:
        _planted.remove("wrong")
        got = bytes([got[0] ^ 1]) + got[1:] if isinstance(got, bytes) and got else ("planted", got)
    if got == want:
        return
    if isinstance(got, bytes) and isinstance(want, bytes) and len(got) == len(want):
        at = next(i for i in range(len(got)) if got[i] != want[i])
        raise Wrong(f"{what}: byte {at} of {len(got)} is {got[at]:#04x}, not {want[at]:#04x}")
    raise Wrong(f"{what} is {got!r:.200}, not {want!r:.200}")


def _plain(x: Any) -> Any:
    return x.tobytes() if hasattr(x, "tobytes") else bytes(x) if isinstance(x, (bytearray, memoryview)) else x


def run(part: str, *cases: Callable[[], Any]) -> None:
    """Run the cases of a part, each a function that returns its figure (text, or text and a dict) and raises Wrong, Absent or any error.

    Ends the process: status 0 when no case failed, else 1.
    """
    plant(part)
    failed = 0
    for case in cases:
        name = case.__name__.replace("_", " ")
        step(name)
        start = time.monotonic()
        try:
            value = case()
            figure, data = value if isinstance(value, tuple) else (value or "", {})
            say(case=name, result="ok", figure=figure, data=data, seconds=round(time.monotonic() - start, 2))
        except Absent as missing:
            say(case=name, result="skipped", error=str(missing))
        except Exception as error:
            failed += 1
            traceback.print_exc()
            text = str(error) if isinstance(error, Wrong) else f"{type(error).__name__}: {error}"
            say(case=name, result="failed", error=text, seconds=round(time.monotonic() - start, 2))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if failed else 0)  # a driver's own threads and pending waits hold up no exit


def plant(part: str) -> None:
    """Do what FIRST_CONTACT_BREAK plants in this part."""
    name, _, how = os.environ.get("FIRST_CONTACT_BREAK", "").partition(":")
    if name != part:
        return
    step("a planted break")
    if how == "hang":
        time.sleep(1e6)
    if how == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    _planted.append(how)
