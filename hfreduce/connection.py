"""Connection: what has gone between a rank and a peer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hfreduce._ffi import ffi, lib
from hfreduce.errors import check, text


@dataclass(frozen=True)
class Connection:
    """What has gone between this rank and one peer since the communicator was made, over all channels between them.

    What collectives exchange inside a node goes through its common memory and is no connection; sends and receives are.
    """

    #: The other rank.
    peer: int
    #: "shm", "tcp" or "verbs".
    transport: str
    #: This end: "10.0.0.1:4711", "mlx5_0:1" (device and port); "" for shared memory, or while it is not up. Of one channel, where
    #: there are several.
    local: str
    #: The other end.
    remote: str
    #: Bytes of payload given to the transport, without the library's headers.
    bytes_sent: int
    #: Bytes of payload taken from it.
    bytes_received: int
    #: Messages given to the transport; an array goes in chunks (HFREDUCE_CHUNK), each a message.
    messages_sent: int
    #: Messages taken from it.
    messages_received: int
    #: Messages that had to wait for room: the peer, or the network, took no more.
    stalls: int
    #: What was sent again. tcp: segments, as the kernel counts them. verbs: what the whole port sent again since the communicator
    #: uses it, also for others, as far as its driver counts it (queue pairs do not tell). shm: 0.
    retries: int


def connections(handle: Any) -> tuple[Connection, ...]:
    """The connections of an open hfreduceComm_t, by peer."""
    count, raw = ffi.new("int *"), ffi.new("hfreduceConnection_t *")
    check(lib.hfreduceCommConnectionCount(handle, count), handle)
    found = []
    for index in range(count[0]):
        check(lib.hfreduceCommGetConnection(handle, index, raw), handle)
        found.append(
            Connection(
                peer=int(raw.peer),
                transport=text(raw.transport),
                local=text(raw.local),
                remote=text(raw.remote),
                bytes_sent=int(raw.bytes_sent),
                bytes_received=int(raw.bytes_received),
                messages_sent=int(raw.messages_sent),
                messages_received=int(raw.messages_received),
                stalls=int(raw.stalls),
                retries=int(raw.retries),
            )
        )
    return tuple(sorted(found, key=lambda connection: connection.peer))
