"""The package's exceptions as torch's users catch them: each is also a torch.distributed.DistBackendError, so a RuntimeError."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from hfreduce import errors

_Base: type[RuntimeError] = getattr(dist, "DistBackendError", RuntimeError)
_kinds: dict[type[errors.HfreduceError], type[errors.HfreduceError]] = {}


def as_torch(error: errors.HfreduceError, extra: str = "") -> errors.HfreduceError:
    """The same error, of a class that is also torch's; `extra` is appended to its text."""
    kind: Any = type(error)
    made: Any
    if issubclass(kind, _Base):
        made = kind
    else:
        made = _kinds.get(kind) or _kinds.setdefault(
            kind, type(kind.__name__, (kind, _Base), {"__module__": __name__, "__doc__": kind.__doc__})
        )
    new: errors.HfreduceError = made(f"{error}{extra}")
    facts = dict(error.__dict__)
    new.__dict__.update(facts)
    return new
