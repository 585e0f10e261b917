"""Work: what a process group's calls return, over the core's work handles."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from hfreduce import work as core_work
from hfreduce._ffi import lib
from hfreduce.errors import HfreduceError
from hfreduce.torch.completion import completer
from hfreduce.torch.streams import tensors_in
from hfreduce.torch.tracing import untraced

#: torch's way to say that a wait has no end of its own.
NO_TIMEOUT = timedelta(0)
# Whoever wants the future of an operation of so few bytes waits so many seconds for the operation itself, where it may end at
# once: handing a future to another thread and back takes longer.
_SMALL, _BRIEFLY = 64 << 10, 50e-6
# What DDP's built-in compression hook makes of gradients: it alone reads a future's value in C++.
_HALF = (torch.float16, torch.bfloat16)


# The value of a future made in Python is a Python object, which DDP's built-in FP16 hook cannot read. TorchScript makes
# futures of its own types; the script holds no thread while it waits.
_SCRIPT = """
def after(done: Future[int], tensors: List[Tensor]) -> List[Tensor]:
    torch.jit.wait(done)
    return tensors

def start(done: Future[int], tensors: List[Tensor]) -> Future[List[Tensor]]:
    return torch.jit.fork(after, done, tensors)
"""


@functools.cache
def _script() -> Any:
    return torch.jit.CompilationUnit(_SCRIPT)


def typed_future(future: Any, tensors: list[Any]) -> Any:
    """A future whose value, for C++ too, is the list of tensors once `future` is complete; its error is `future`'s, as text.

    It is completed, and its callbacks run, in one of torch's few inter-op threads: not for callbacks that wait for others.
    """
    return _script().start(future, tensors)


def _asked_by_cpp() -> bool:
    """Whether the caller of our caller is C++, as DDP's built-in hooks are: the frame below is backward()'s, or there is none."""
    try:
        return sys._getframe(2).f_code.co_name == "_engine_run_backward"
    except ValueError:
        return True


def seconds_of(timeout: Any) -> float | None:
    """torch's timeout of a wait: zero and negative mean none of its own."""
    if timeout is None:
        return None
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else float(timeout)
    return seconds if seconds > 0 else None


@untraced
class Work(dist.Work):  # type: ignore[misc, unused-ignore]
    """An operation of a process group.

    `core` is the core's handle (None: it has ended already). `finish` puts the result where the caller wants it, once, before
    anybody learns that the operation has ended. `outputs` is the value of `result()` and of the future.
    """

    def __init__(
        self,
        group: Any,
        core: core_work.Work | None,
        outputs: Sequence[Any],
        finish: Callable[[], None] | None = None,
        source: Callable[[], int] | None = None,
    ) -> None:
        super().__init__()
        self._group = group
        self._core = core
        self._outputs = list(outputs)
        self._finish = finish
        self._source = source
        self._error: HfreduceError | None = None
        self._future: Any = None
        self._trigger: Any = None
        self._lock = threading.Lock()

    # --- what torch calls ---

    def wait(self, timeout: Any = NO_TIMEOUT) -> bool:
        """Wait until it has ended; raise its error. With a timeout (timedelta): raise when that passes; the operation goes on."""
        core = self._core
        if core is not None:
            try:
                core.wait(None if timeout is NO_TIMEOUT else seconds_of(timeout))
            except HfreduceError as error:
                if not core.done():
                    raise self._group._as_torch(error) from None
                self._fail(error)
            except BaseException:  # a signal: the operation goes on
                raise
            else:
                if self._finish is None:
                    return True
        self._conclude()
        return True

    def synchronize(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        core = self._core
        if core is None or core.done():
            try:
                self._conclude()
            except HfreduceError:
                pass
            return True
        return False

    def is_success(self) -> bool:
        return self.is_completed() and self._error is None

    def exception(self) -> BaseException | None:
        return self._error if self.is_completed() else None

    def result(self) -> list[Any]:
        """The tensors that it writes."""
        return self._outputs

    def source_rank(self) -> int:
        """Rank in the group that a receive got its message from."""
        return -1 if self._source is None else self._source()

    _source_rank = source_rank

    def get_future(self) -> Any:
        """A torch.futures.Future of the list of tensors; its callbacks run in a thread of the package's."""
        with self._lock:
            future = self._future
            if future is not None:
                return future
            native = getattr(self._group, "_native", None)
            if native is not None:
                future = self._future = native.make_future()
            else:
                # A callback that raises is how Python gives a future an error that C++ callers see too.
                trigger: Any = torch.futures.Future()
                future = trigger.then(self._value)
                if self._outputs and self._outputs[0].dtype in _HALF and _asked_by_cpp():
                    future = typed_future(future, self._outputs)
                self._future, self._trigger = future, trigger
        core = self._core
        if core is not None and self._is_small():
            lib.hfreduceWorkWait(core._handle, _BRIEFLY)
        if core is None or core.done():
            self.complete()
        else:
            completer().add(core._handle, self)
        return future

    def _is_small(self) -> bool:
        return bool(sum([tensor.numel() * tensor.element_size() for tensor in self._outputs]) <= _SMALL)

    # --- ours ---

    def complete(self) -> None:
        """The operation has ended: conclude it and complete the future."""
        if self._trigger is not None:
            try:
                self.is_completed()
            finally:
                self._trigger.set_result(None)
            return
        native = self._group._native
        try:
            self._conclude()
        except BaseException as error:
            native.fail(self._future, error)
        else:
            native.complete(self._future, self._outputs)

    def _value(self, _: Any) -> list[Any]:
        self._conclude()
        return self._outputs

    def _fail(self, error: HfreduceError) -> None:
        with self._lock:
            if self._error is None:
                self._error = self._group._as_torch(error)

    def _conclude(self) -> None:
        """It has ended: finish it, or raise its error."""
        core = self._core
        if core is not None:
            error = core.exception()
            if error is not None:
                self._fail(error)
        if self._error is not None:
            raise self._error
        if self._finish is not None:
            with self._lock:
                if self._finish is not None:
                    self._finish()
                    self._finish = None
                    self._core = None


class _Stash:
    """References to the tensors of an operation on a stream, until somebody waits for it.

    From then on the waiting stream comes behind the operation, and the allocator may give the memory to what follows there. Had it been
    told of the operation's stream (record_stream), it would keep the memory until it has seen that stream's event.
    """

    def __init__(self, keep: Any, stream: Any) -> None:
        self.keep, self._stream = keep, stream

    def __del__(self) -> None:
        for tensor in tensors_in(self.keep):  # nobody has waited
            tensor.record_stream(self._stream)


@untraced
class DeviceWork(Work):
    """An operation that is in the order of a stream, from its beginning on."""

    def __init__(
        self,
        group: Any,
        core: core_work.Work,
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
        self._stash: _Stash | None = None
        self.then(finish)

    def then(self, finish: Callable[[], Any] | None) -> None:
        """Put one more thing to do at its end, on its stream."""
        with torch.cuda.stream(self._stream):
            if finish is not None:
                finish()
            self._event = self._stream.record_event()

    def hold(self, keep: Any) -> None:
        """See to it that the memory of its tensors is not given to others before the operation's stream is through with it."""
        self._stash = _Stash(keep, self._stream)

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
        stash = self._stash
        if stash is not None:
            stash.keep = None
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


@untraced
class CoalescedWork(dist.Work):  # type: ignore[misc, unused-ignore]
    """Several works as one."""

    def __init__(self, works: Sequence[Any]) -> None:
        super().__init__()
        self._works = list(works)

    def wait(self, timeout: Any = NO_TIMEOUT) -> bool:
        for work in self._works:
            work.wait(timeout)
        return True

    def synchronize(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)

    def is_success(self) -> bool:
        return all(work.is_success() for work in self._works)

    def exception(self) -> BaseException | None:
        return next((error for error in (work.exception() for work in self._works) if error is not None), None)

    def result(self) -> list[Any]:
        return [tensor for work in self._works for tensor in work.result()]

    def source_rank(self) -> int:
        return -1

    _source_rank = source_rank

    def get_future(self) -> Any:
        return torch.futures.collect_all([work.get_future() for work in self._works]).then(
            lambda all_: [tensor for each in all_.value() for tensor in each.value()]
        )
