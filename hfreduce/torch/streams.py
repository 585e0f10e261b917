"""The streams that operations on CUDA tensors run on, in the order of torch's.

    current stream ───┬───────────────────── wait() ───►
                      └─► operation's stream ──┘

What the caller waits for runs on his current stream itself. Any other operation goes on from there on a stream beside it, and
wait() has the then current stream go on after it; the host waits for neither. Collectives of a group follow each other on one
stream a device. Every message has one of its own: a receive whose message is late keeps no later send from leaving.

These are streams of the core's, of which only idle ones are used again. torch.cuda.Stream would give one of 32 in turn: the user's own, or
that of a receive that still waits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from hfreduce._ffi import ffi, lib
from hfreduce.device import stream_handle
from hfreduce.errors import InvalidArgumentError, check
from hfreduce.work import Work as CoreWork

#: The device types that a group takes, of which the first is the one for what has no tensor of its own.
DEVICE_TYPES = ("cpu", "cuda") if torch.version.cuda else ("cpu",)

_MESSAGES = ("send", "recv", "recv_anysource")


def tensors_in(keep: Any) -> Iterator[Any]:
    """The tensors among nested lists and tuples."""
    if isinstance(keep, torch.Tensor):
        yield keep
    elif isinstance(keep, (list, tuple)):
        for each in keep:
            yield from tensors_in(each)


def without_tensors(keep: Any) -> Any:
    """What else there is among nested lists and tuples."""
    if isinstance(keep, (list, tuple)):
        return [without_tensors(each) for each in keep]
    return None if isinstance(keep, torch.Tensor) else keep


def device_of(keep: Any, name: str = "tensors") -> Any:
    """The CUDA device of tensors; None: they are on the CPU. InvalidArgumentError, which names them so, if they are on several."""
    devices = {tensor.device for tensor in tensors_in(keep)}
    if len(devices) > 1:
        names = " and ".join(sorted(map(str, devices)))
        raise InvalidArgumentError(f"{name}: they are on {names}, and must be on one device")
    device = devices.pop() if devices else None
    return None if device is None or device.type == "cpu" else device


class _Lease:
    """A stream of the core's, which gets it back when nobody needs this object any more."""

    def __init__(self, device: Any) -> None:
        handle = ffi.new("hfreduceStream_t *")
        check(lib.hfreduceStreamGet(handle, torch.cuda.current_device() if device.index is None else device.index))
        self.handle: Any = handle[0]
        self._put = lib.hfreduceStreamPut  # which may be gone from the module when the interpreter ends

    def __del__(self) -> None:
        if hasattr(self, "_put"):
            self._put(self.handle)


def _new_stream(device: Any) -> Any:
    lease = _Lease(device)
    external_stream: Any = torch.cuda.ExternalStream
    stream = external_stream(int(ffi.cast("uintptr_t", lease.handle)), device)
    stream._hfreduce_lease = lease
    return stream


class Streams:
    """The streams of a group beside the user's."""

    def __init__(self) -> None:
        self._collectives: dict[Any, Any] = {}

    def of(self, device: Any, name: str, waits: bool) -> Any:
        """The stream for an operation; if nobody waits for it at once, one that goes on from the current one."""
        current = torch.cuda.current_stream(device)
        if waits:
            return current
        if name in _MESSAGES:
            stream = _new_stream(device)
        else:
            stream = self._collectives.get(device)
            if stream is None:
                stream = self._collectives[device] = _new_stream(device)
        stream.wait_stream(current)
        return stream


def handle_of(stream: Any) -> Any:
    """A stream as the core takes it."""
    return ffi.cast("void *", stream_handle(stream))


class Ordered:
    """Calls of the core that were put on a stream, which the current one is to wait for."""

    def __init__(self, core: CoreWork, device: Any, stream: Any) -> None:
        self._core, self._device = core, device
        self._event = stream.record_event()

    def wait(self) -> None:
        """Have the current stream go on after them; raise their error if there is one already."""
        error = self._core.exception()
        if error is not None:
            raise error
        torch.cuda.current_stream(self._device).wait_event(self._event)

    def done(self) -> bool:
        """Whether the CPU's part has ended."""
        return self._core.done()
