"""A rank that is stopped while its operation is decided: another rank's abort or death does not undo what has arrived."""

from __future__ import annotations

import signal
import time

import pytest
from test_interrupts import Job

#: What both ranks call; rank 0 can end it without rank 1 once rank 1 is inside.
CALLS = {
    "barrier": "comm.barrier()",
    "all_reduce": "comm.all_reduce(x)",
    "all_reduce of 16 KiB": "comm.all_reduce(large)",
    "broadcast": "comm.broadcast(x, 0)",
    "recv": "comm.recv(x, 0) if rank else comm.send(x, 1)",
}
ROUNDS = 5

PROGRAM = """
large = np.ones(4096, np.float32)
for round in range({rounds}):
    comm = hfreduce.Communicator(rank, nranks, hfreduce.UniqueId.from_address(address, "", round))
    {call}
    comm.barrier()
    if rank == 0:
        stay()
        {call}
        {end}
        say("done")
        stay()
    else:
        say("in")
        try:
            {call}
            say("returned")
        except hfreduce.HfreduceError as error:
            say("error", type(error).__name__, error)
    comm.close()
stay()
"""


@pytest.mark.parametrize(
    ("call", "nodes"),  # between nodes collectives need an answer of rank 1
    [*((call, "one node") for call in CALLS), ("recv", "two nodes")],
)
@pytest.mark.parametrize("end", ["comm.abort()", "say('done'); os.kill(os.getpid(), signal.SIGKILL)"], ids=["abort", "death"])
def test_what_has_arrived_counts(call: str, nodes: str, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dies = "SIGKILL" in end
    program = PROGRAM.format(call=CALLS[call], end=end, rounds=1 if dies else ROUNDS)
    hosts = "os.environ['HFREDUCE_HOSTID'] = os.environ['RANK_']\n" if nodes == "two nodes" else ""
    with Job(hosts + program, hosts + program) as (first, rank):
        for _ in range(1 if dies else ROUNDS):
            assert rank.line() == ["in"]
            time.sleep(0.3)
            rank.process.send_signal(signal.SIGSTOP)
            first.go_on()
            assert first.line(20) == ["done"]
            time.sleep(0.3)
            rank.process.send_signal(signal.SIGCONT)
            assert rank.line() == ["returned"]
            if not dies:
                first.go_on()
