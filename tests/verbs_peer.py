"""A peer of the verbs transport, written from its protocol (csrc/transport/verbs_link.h) with pyverbs, sharing no code with it.

Both ends send a hello over an authenticated TCP connection, bring up their queue pairs to what the other's hello says, and send
one byte more: ready. Then message m goes by RDMA WRITE_WITH_IMM to slot m mod depth of the receiver, over queue pair m mod nqps.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import socket
import struct
import time
from collections import deque
from typing import Any

import pyverbs.enums as e
from pyverbs.addr import GID, AHAttr, GlobalRoute
from pyverbs.cq import CQ
from pyverbs.device import Context
from pyverbs.mr import MR
from pyverbs.pd import PD
from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr
from pyverbs.wr import SGE, RecvWR, SendWR

QPS = 16
HEADER = 64  # bytes of a slot before the payload
CREDIT = 0x80000000
MASK = 0x7FFF
MESSAGE_MAGIC = 0x31724648
MESSAGE = struct.Struct("<IIQQQQiBBBB")  # magic, crc, bytes, offset; seq, count, root, coll, op, dtype, pad


@dataclasses.dataclass
class Hello:
    """What the ends tell each other first, little-endian, in this order."""

    magic: int = 0x76726668
    version: int = 2
    depth: int = 0
    nqps: int = 1
    slot_bytes: int = 0
    address: int = 0
    rkey: int = 0
    lid: int = 0
    link_layer: int = 2
    mtu: int = 3
    gid: bytes = bytes(16)
    port: bytes = b"pyverbs"
    qpn: tuple[int, ...] = (0,) * QPS
    psn: tuple[int, ...] = (0,) * QPS
    epoch: int = 0  # failovers so far; this peer has one port and makes none
    ports: int = 1
    received: int = 0
    released: int = 0
    ahead: int = 0
    unused: int = 0

    LAYOUT = struct.Struct(f"<IIIIQQIHBB16s80s{QPS}I{QPS}IIIQQII")

    def pack(self) -> bytes:
        """As it goes over the connection."""
        values = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return self.LAYOUT.pack(*(word for value in values for word in (value if isinstance(value, tuple) else (value,))))

    @classmethod
    def unpack(cls, data: bytes) -> Hello:
        """From what came."""
        words = cls.LAYOUT.unpack(data)
        at = 12  # of qpn
        return cls(*words[:at], words[at : at + QPS], words[at + QPS : at + 2 * QPS], *words[at + 2 * QPS :])


def exactly(connection: socket.socket, count: int) -> bytes:
    """So many bytes, or EOFError."""
    data = b""
    while len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            raise EOFError(f"the other end closed after {len(data)} of {count} bytes")
        data += more
    return data


class Peer:
    """One end of a link; depth and slot size are the other's."""

    def __init__(self, connection: socket.socket, device: str, port: int, gid_index: int, nqps: int = 1) -> None:
        self.connection = connection
        self.theirs = Hello.unpack(exactly(connection, Hello.LAYOUT.size))
        self.depth, self.slot_bytes = self.theirs.depth, self.theirs.slot_bytes
        self.context = Context(name=device)
        attributes = self.context.query_port(port)
        gid = self.context.query_gid(port, gid_index)
        self.pd = PD(self.context)
        # received slots, then those to send from, then a place for receives, which carry immediates only
        self.mr = MR(self.pd, 2 * self.depth * self.slot_bytes + 64, e.IBV_ACCESS_LOCAL_WRITE | e.IBV_ACCESS_REMOTE_WRITE)
        self.cq = CQ(self.context, 8 * self.depth * nqps)
        cap = QPCap(max_send_wr=4 * self.depth, max_recv_wr=4 * self.depth)
        init = QPInitAttr(qp_type=e.IBV_QPT_RC, scq=self.cq, rcq=self.cq, cap=cap)
        access = QPAttr(port_num=port)
        access.qp_access_flags = e.IBV_ACCESS_REMOTE_WRITE
        self.qps = [QP(self.pd, init, access) for _ in range(nqps)]
        self.by_number = {qp.qp_num: index for index, qp in enumerate(self.qps)}
        mine = Hello(
            depth=self.depth,
            nqps=nqps,
            slot_bytes=self.slot_bytes,
            address=self.mr.buf,
            rkey=self.mr.rkey,
            lid=attributes.lid,
            link_layer=attributes.link_layer,
            mtu=attributes.active_mtu,
            gid=ipaddress.IPv6Address(gid.gid).packed,
            port=f"{device}:{port}".encode(),
            qpn=tuple(qp.qp_num for qp in self.qps) + (0,) * (QPS - nqps),
            psn=tuple(1000 + i for i in range(nqps)) + (0,) * (QPS - nqps),
        )
        connection.sendall(mine.pack())
        self.nqps = min(nqps, self.theirs.nqps)
        for i in range(self.nqps):
            self._connect(i, mine, port, gid_index)
        connection.sendall(b"\x01")
        assert exactly(connection, 1) == b"\x01", "ready"
        self.posted = self.credited = 0  # messages sent, and released over there
        self.consumed = self.told = 0  # messages received, and those that the other was told of
        self.next = list(range(self.nqps))  # message that comes next, by queue pair
        self.unsignalled: dict[int, int] = {}  # sends under way, by queue pair
        self.slots: dict[int, int] = {}  # arrived: message -> bytes, header included
        self.received: deque[tuple[int, int, bytes]] = deque()

    def _connect(self, i: int, mine: Hello, port: int, gid_index: int) -> None:
        groups = self.theirs.gid.hex(":", 2)
        attr = QPAttr(port_num=port)
        attr.path_mtu = min(mine.mtu, self.theirs.mtu)
        attr.dest_qp_num, attr.rq_psn, attr.sq_psn = self.theirs.qpn[i], self.theirs.psn[i], mine.psn[i]
        attr.max_rd_atomic = attr.max_dest_rd_atomic = 1
        attr.min_rnr_timer, attr.timeout, attr.retry_cnt, attr.rnr_retry = 12, 14, 6, 7
        attr.qp_access_flags = e.IBV_ACCESS_REMOTE_WRITE
        route = GlobalRoute(dgid=GID(groups), sgid_index=gid_index)
        attr.ah_attr = AHAttr(port_num=port, is_global=1, gr=route, dlid=self.theirs.lid)
        self.qps[i].to_rts(attr)
        for _ in range(4 * self.depth):
            self._post_receive(i)

    def _post_receive(self, i: int) -> None:
        place = SGE(self.mr.buf + 2 * self.depth * self.slot_bytes, 64, self.mr.lkey)
        self.qps[i].post_recv(RecvWR(wr_id=i, num_sge=1, sg=[place]))

    def _write(self, i: int, immediate: int, offset: int, length: int, slot: int) -> None:
        sge = SGE(self.mr.buf + offset, length, self.mr.lkey)
        flags = e.IBV_SEND_SIGNALED
        wr = SendWR(wr_id=i, opcode=e.IBV_WR_RDMA_WRITE_WITH_IMM, num_sge=1, sg=[sge], send_flags=flags)
        wr.imm_data = socket.htonl(immediate)
        wr.set_wr_rdma(self.theirs.rkey, self.theirs.address + slot * self.slot_bytes)
        self.qps[i].post_send(wr)
        if i == 0:  # counts of the others are not looked at: they may come late
            self.told = self.consumed

    def send(self, offset: int, payload: bytes) -> bool:
        """Send a message if there is room for it here and there."""
        m = self.posted
        if m - self.credited >= self.depth:
            return False
        slot = m % self.depth
        at = (self.depth + slot) * self.slot_bytes
        head = MESSAGE.pack(MESSAGE_MAGIC, 0, len(payload), offset, 7, len(payload), -1, 0, 0, 0, 0).ljust(HEADER, b"\0")
        self.mr.write(head + payload, HEADER + len(payload), at)
        self._write(m % self.nqps, (self.consumed & MASK) << 16 | m & MASK, at, HEADER + len(payload), slot)
        self.posted += 1
        return True

    def poll(self) -> None:
        """Take what has come: completions, credits, messages into `received` as (number, offset, payload)."""
        _, completions = self.cq.poll(16)
        for wc in completions:
            assert wc.status == e.IBV_WC_SUCCESS, f"status {wc.status}, opcode {wc.opcode}"
            if wc.opcode == e.IBV_WC_RECV_RDMA_WITH_IMM:
                self._arrived(self.by_number[wc.qp_num], socket.ntohl(wc.imm_data), wc.byte_len)
        while self.consumed in self.slots:
            self._take(self.slots.pop(self.consumed))
        if self.consumed - self.told >= self.depth // 2:
            self._write(0, CREDIT | (self.consumed & MASK) << 16, 0, 0, 0)

    def _arrived(self, i: int, immediate: int, length: int) -> None:
        self._post_receive(i)
        more = ((immediate >> 16) - self.credited) & MASK
        if i == 0:  # over one queue pair they come in order
            assert more <= self.posted - self.credited, "released messages that were not sent"
            self.credited += more
        if immediate & CREDIT:
            return
        m = self.next[i]
        assert immediate & MASK == m & MASK, f"message {immediate & MASK} on queue pair {i}, expected {m & MASK}"
        assert m - self.consumed < self.depth, "a slot that was not released was overwritten"
        self.next[i] += self.nqps
        self.slots[m] = length

    def _take(self, length: int) -> None:
        slot = self.mr.read(length, self.consumed % self.depth * self.slot_bytes)
        magic, _, count, offset, *_ = MESSAGE.unpack_from(slot)
        assert magic == MESSAGE_MAGIC and count == length - HEADER, (hex(magic), count, length)
        self.received.append((self.consumed, offset, slot[HEADER:]))
        self.consumed += 1

    def close(self) -> None:
        """Free the device's objects, then the connection: its end tells the other."""
        for thing in (*self.qps, self.cq, self.mr, self.pd, self.context):
            thing.close()
        self.connection.close()


def echo(peer: Peer, messages: list[bytes], expected: int, seconds: float) -> list[Any]:
    """Send all messages, as fast as there is room, and return the `expected` ones that came back: (offset, payload) in order."""
    sent, end, back = 0, time.monotonic() + seconds, []
    while len(back) < expected or sent < len(messages):
        assert time.monotonic() < end, f"{sent} sent, {len(back)} came back, {peer.posted - peer.credited} not released"
        while sent < len(messages) and peer.send(sent, messages[sent]):
            sent += 1
        peer.poll()
        while peer.received:
            number, offset, payload = peer.received.popleft()
            assert number == len(back)
            back.append((offset, payload))
    return back
