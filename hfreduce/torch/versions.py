"""The torch versions that the package works with: older ones are refused at import, newer ones warned of at first use."""

from __future__ import annotations

import functools
import re
import warnings

#: The oldest and the newest version (major, minor) that the tests were run with: README.md beside this file.
OLDEST, NEWEST = (2, 4), (2, 14)


def _parsed(version: str) -> tuple[int, int]:
    """Major and minor of a version as torch spells it: "2.13.0+cpu", "2.15.0a0+git123"."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else NEWEST


def _range() -> str:
    return f"torch {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"


def refuse_too_old(version: str) -> None:
    """Raise ImportError if torch's version is older than the range."""
    if _parsed(version) < OLDEST:
        raise ImportError(f"hfreduce.torch works with {_range()}, and torch {version} is installed; install a newer torch")


@functools.cache
def warn_if_newer(version: str) -> None:
    """Warn, once a process, if torch's version is newer than the range. It may work all the same."""
    if _parsed(version) > NEWEST:
        warnings.warn(f"torch {version} is newer than what hfreduce.torch was tested with ({_range()})", stacklevel=3)
