"""Operations on CUDA tensors, in the order of torch's streams; all that the package uses of torch.cuda is here.

    current stream ───┬───────────────────── wait() ───►
                      └─► operation's stream ──┘

What the caller waits for runs on his current stream itself. Any other operation goes on from there on a stream beside it, and
wait() has the then current stream go on after it; the host waits for neither. Collectives of a group follow each other on one
stream a device. Every message has one of its own: a receive whose message is late keeps no later send or receive from starting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from hfreduce._ffi import ffi
from hfreduce.device import stream_handle
from hfreduce.errors import HfreduceError, InvalidArgumentError
from hfreduce.torch.tracing import untraced
from hfreduce.torch.work import NO_TIMEOUT, Work, seconds_of
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


def device_of(keep: Any) -> Any:
    """The CUDA device of an operation's tensors; None: they are on the CPU. InvalidArgumentError if they are on several."""
    devices = {tensor.device for tensor in tensors_in(keep)}
    if len(devices) > 1:
        names = " and ".join(sorted(map(str, devices)))
        raise InvalidArgumentError(f"tensors: they are on {names}; an operation takes tensors of one device")
    device = devices.pop() if devices else None
    return None if device is None or device.type == "cpu" else device


class Streams:
    """The streams of a group beside the user's."""

    def __init__(self) -> None:
        self._collectives: dict[Any, Any] = {}

    def of(self, device: Any, name: str, waits: bool) -> Any:
        """The stream for an operation; if nobody waits for it at once, one that goes on from the current one."""
        current = torch.cuda.current_stream(device)
        if waits:
            return current
        new_stream: Any = torch.cuda.Stream
        if name in _MESSAGES:
            stream = new_stream(device)
        else:
            stream = self._collectives.get(device)
            if stream is None:
                stream = self._collectives[device] = new_stream(device)
        stream.wait_stream(current)
        return stream


def handle_of(stream: Any) -> Any:
    """A stream as the core takes it."""
    return ffi.cast("void *", stream_handle(stream))


@untraced
class DeviceWork(Work):
    """An operation that is in the order of a stream, from its beginning on."""

    def __init__(
        self,
        group: Any,
        core: CoreWork,
        outputs: Sequence[Any],
        device: Any,
        stream: Any,
        finish: Callable[[], None] | None,
        source: Callable[[], int] | None,
    ) -> None:
        super().__init__(group, core, outputs, None, source)
        self._device = device
        self._stream = stream
        self._event: Any = None
        self.then(finish)

    def then(self, finish: Callable[[], Any] | None) -> None:
        """Put one more thing to do at its end, on its stream."""
        with torch.cuda.stream(self._stream):
            if finish is not None:
                finish()
            self._event = self._stream.record_event()

    def hold(self, keep: Any) -> None:
        """See to it that the memory of its tensors is not given to others before the operation's stream is through with it."""
        for tensor in tensors_in(keep):
            tensor.record_stream(self._stream)

    def wait(self, timeout: Any = NO_TIMEOUT) -> bool:
        """Have the current stream go on after it; raise its error if there is one already. The host does not wait.

        With a timeout (timedelta) the host does: until the CPU's part has ended, or TimeoutError is raised.
        """
        core, seconds = self._core, seconds_of(timeout)
        assert core is not None
        if seconds is not None:
            try:
                core.wait(seconds)
            except HfreduceError as error:
                raise self._group._as_torch(error) from None
        self._conclude()
        torch.cuda.current_stream(self._device).wait_event(self._event)
        return True

    def is_completed(self) -> bool:
        """Whether the device is through with it."""
        if not self._event.query():
            return False
        return super().is_completed()

    def source_rank(self) -> int:
        """Rank in the group that a receive got its message from. Waits for it: the host has to know."""
        if self._core is not None and self._source is not None:
            self.wait(self._group.options._timeout)
        return super().source_rank()

    _source_rank = source_rank

    def get_future(self) -> Any:
        """A future of the list of tensors, complete at once: its value is in the order of the streams of whoever takes it."""
        with self._lock:
            if self._future is None:
                native = getattr(self._group, "_native", None)
                future = native.make_future([self._device]) if native else torch.futures.Future(devices=[self._device])
                with torch.cuda.stream(self._stream):  # what the future records is where this stream stands
                    if native:
                        native.complete(future, self._outputs)
                    else:
                        future.set_result(self._outputs)
                self._future = future
            return self._future
