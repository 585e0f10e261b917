"""The verbs transport against a peer written with pyverbs from the protocol's description: hello, writes, immediates, credits.

Needs an RDMA device and pyverbs (tests/verbs_peer.py).
"""

from __future__ import annotations

import os
import random
import socket
import subprocess
from pathlib import Path

import pytest
from test_c import build, building, need_compiler

from hfreduce import rdma

ROOT = Path(__file__).resolve().parents[1]
CHUNK = 64 << 10
MESSAGES = 600
SIZES = [0, 1, 63, 64, 65, 191, 192, 193, 256, 4096, 4097, CHUNK - 1, CHUNK]


def usable() -> rdma.Port:
    """The first active port, or a skip."""
    try:
        import verbs_peer  # noqa: F401
    except Exception as error:
        pytest.skip(f"pyverbs cannot be used here: {type(error).__name__}: {error}")
    for port in rdma.find().ports:
        if port.state == "active" and any("." in gid.address for gid in port.gids):
            return port
    pytest.skip("no active RDMA port with an IPv4 address")


@pytest.mark.limit(300)
@pytest.mark.parametrize(
    ("theirs", "ours", "every"),
    [(1, 1, 1), (3, 2, 1), (1, 1, 50)],
    ids=["one queue pair", "the fewer of 3 and 2 queue pairs", "mostly one way"],
)
def test_an_independent_peer(theirs: int, ours: int, every: int) -> None:
    """The peer sends hundreds of messages of all sizes; every n-th comes back."""
    port = usable()
    from verbs_peer import Peer, echo

    need_compiler("gcc")
    with building("plain") as out:
        program = build.build_program(out, ROOT / "tests" / "c" / "verbs_echo.c")
    gid = next(gid.index for gid in port.gids if "." in gid.address)
    choice = random.Random(7)
    messages = [choice.randbytes(choice.choice(SIZES)) for _ in range(MESSAGES)]
    expected = list(enumerate(messages))[every - 1 :: every]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HFREDUCE_")}
    environment |= {"HFREDUCE_IB_HCA": f"={port.device}:{port.number}", "HFREDUCE_IB_QPS_PER_CONNECTION": str(theirs)}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connection = socket.create_connection(listener.getsockname(), timeout=20)
        accepted, _ = listener.accept()
    with accepted:
        accepted.setblocking(False)
        os.set_inheritable(accepted.fileno(), True)
        command = [str(program), str(accepted.fileno()), str(CHUNK), str(len(messages)), str(every)]
        driver = subprocess.Popen(
            command, env=environment, pass_fds=[accepted.fileno()], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    try:
        try:
            peer = Peer(connection, port.device, port.number, gid, ours)
            assert peer.nqps == min(theirs, ours)
            back = echo(peer, messages, len(expected), 100)
        except (AssertionError, EOFError, OSError) as error:
            driver.kill()
            pytest.fail(f"{error}\nverbs_echo: {driver.communicate()[0]}")
        assert back == expected
        output, _ = driver.communicate(timeout=20)  # it drains while the peer still stands
        assert (driver.returncode, output) == (0, f"{len(messages)} messages, {sum(map(len, messages))} bytes\n")
        peer.close()
    finally:
        driver.kill()
        driver.wait()
