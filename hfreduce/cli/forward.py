"""Output of several processes that goes to one place, line by line."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import selectors
import struct
import termios
import time
import tty
from collections.abc import Callable

# A line that has not ended is passed on once its writer has written nothing, and nobody else either, for QUIET seconds; after
# LATEST seconds in any case. So progress bars and prompts are seen, and lines that come in pieces mostly stay whole.
QUIET = 0.2
LATEST = 1.0
_READ = 65536  # bytes
_MOST_HELD = 1 << 20  # bytes: a pipe holds no more, so whatever comes behind them was written later


class Sink:
    """A descriptor that several streams are copied to. It knows whose line stands there unfinished."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.owner: Stream | None = None  # wrote last, and not the end of a line
        self.writer: Stream | None = None  # wrote last
        self.written = 0.0  # when

    def write(self, stream: Stream | None, data: bytes) -> None:
        """Write data of a stream, or of the caller (None), on a line of its own. Raises OSError when nobody reads any more."""
        if self.owner not in (None, stream):
            data = b"\n" + data
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self.fd, view) :]
            except BlockingIOError:
                select.select([], [self.fd], [])
        self.owner = None if data.endswith(b"\n") else stream
        self.writer, self.written = stream, time.monotonic()


class Stream:
    """What one process writes to one descriptor."""

    def __init__(self, fd: int, sink: Sink, label: bytes) -> None:
        self.fd, self.sink, self.label = fd, sink, label
        self.pending = bytearray()  # the beginning of a line
        self.began = self.read = 0.0  # when it came, and when anything came last
        self.midline = False  # a part of the line that goes on in `pending` has been passed on, with its label

    def take(self, data: bytes) -> None:
        """Pass on the lines that data ends; keep the beginning of the next one, unless this stream's line is open already."""
        now = self.read = time.monotonic()
        if not self.pending:
            self.began = now
        end = data.rfind(b"\n") + 1
        if self.sink.owner is self:
            end = len(data)
        if end:
            self._pass_on(bytes(self.pending) + data[:end])
            self.pending.clear()
            self.began = now
        self.pending += data[end:]

    def due(self) -> float | None:
        """When the beginning of a line is to be passed on; None: there is none."""
        if not self.pending:
            return None
        quiet = self.read if self.sink.writer is self else max(self.read, self.sink.written)
        return min(quiet + QUIET, self.began + LATEST)

    def flush(self) -> None:
        """Pass on the beginning of a line."""
        if self.pending:
            self._pass_on(bytes(self.pending))
            self.pending.clear()

    def end(self) -> None:
        """Pass on the last line, which may lack its end."""
        self.flush()
        if self.label and self.sink.owner is self:
            self.sink.write(self, b"\n")

    def _pass_on(self, data: bytes) -> None:
        if self.label:
            begins = not (self.midline and self.sink.owner is self)
            body = data[:-1] if data.endswith(b"\n") else data
            labelled = (self.label if begins else b"") + body.replace(b"\n", b"\n" + self.label)
            data = labelled + data[len(body) :]
        self.midline = not data.endswith(b"\n")
        self.sink.write(self, data)


class Forwarder:
    """Copies streams to sinks, inside the caller's select loop.

    Bytes of a stream come in their order and unchanged; but where a line that has not ended is interrupted by another stream's
    line, a line end is put in between.
    """

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self.selector = selector
        self.streams: dict[int, Stream] = {}

    def open(self, sink: Sink, label: bytes = b"") -> int:
        """A new stream to this sink; returns the end to write to, which the caller closes. It is a terminal if the sink is one."""
        reader = writer = -1
        if os.isatty(sink.fd):
            with contextlib.suppress(OSError):  # there may be no more of them
                reader, writer = os.openpty()
                tty.setraw(writer)  # the sink's own terminal does what there is to do at line ends
                size = fcntl.ioctl(sink.fd, termios.TIOCGWINSZ, struct.pack("HHHH", 0, 0, 0, 0))
                fcntl.ioctl(writer, termios.TIOCSWINSZ, size)
        if reader < 0:
            reader, writer = os.pipe()
        os.set_blocking(reader, False)
        self.streams[reader] = Stream(reader, sink, label)
        self.selector.register(reader, selectors.EVENT_READ)
        return writer

    def due(self) -> float | None:
        """When flush() has something to do next."""
        return min((due for stream in self.streams.values() if (due := stream.due()) is not None), default=None)

    def flush(self) -> None:
        """Pass on beginnings of lines that are due."""
        now = time.monotonic()
        for stream in list(self.streams.values()):
            due = stream.due()
            if due is not None and due <= now:
                self._guard(stream, stream.flush)

    def copy(self, fd: int) -> int:
        """Read from a stream that is ready; how many bytes came. 0: nothing is there, or it has ended and is closed."""
        stream = self.streams[fd]
        try:
            data = os.read(fd, _READ)
        except BlockingIOError:
            return 0
        except OSError:  # a terminal whose other side has been closed
            data = b""
        if data:
            self._guard(stream, lambda: stream.take(data))
        else:
            self._guard(stream, stream.end)
            self._close(fd)
        return len(data)

    def drain(self) -> None:
        """Copy what the streams hold by now."""
        for fd in list(self.streams):
            left = _MOST_HELD
            while fd in self.streams and left > 0 and (got := self.copy(fd)):
                left -= got

    def finish(self) -> None:
        """The writers have ended: pass on what they left, and close. Others who hold their ends open are not waited for."""
        self.drain()
        for fd, stream in list(self.streams.items()):
            self._guard(stream, stream.end)
            self._close(fd)

    def close(self) -> None:
        """Close all at once."""
        for fd in list(self.streams):
            self._close(fd)

    def _guard(self, stream: Stream, write: Callable[[], None]) -> None:
        """Call write(). When nobody reads the sink any more, whoever writes to it is to be told: its streams are closed."""
        try:
            write()
        except OSError:
            for fd in [fd for fd, other in self.streams.items() if other.sink is stream.sink]:
                self._close(fd)

    def _close(self, fd: int) -> None:
        if self.streams.pop(fd, None) is not None:
            self.selector.unregister(fd)
            os.close(fd)
