"""Keep torch.compile out of our frames: C++ calls the operations inside compiled regions, and there is nothing in them to compile."""

from __future__ import annotations

import types
from typing import Any

import torch


def _skip(code: types.CodeType) -> None:
    """Have the code, and what it calls, run as it is. torch._dynamo.disable would wrap every call, and import the compiler."""
    frames: Any = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
    if hasattr(frames, "set_code_exec_strategy"):
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(code, frames._FrameExecStrategy(skip, skip))
    elif hasattr(frames, "skip_code"):  # torch up to 2.6
        frames.skip_code(code)


def untraced(cls: Any) -> Any:
    """Class decorator: its own methods are never compiled."""
    for member in vars(cls).values():
        function = getattr(member, "fget", member)
        while isinstance(function, types.FunctionType):
            _skip(function.__code__)
            function = getattr(function, "__wrapped__", None)
    return cls
