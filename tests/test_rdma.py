"""RDMA over real queue pairs: the C suite, lost packets, dead and stopped ranks, two devices, ports that go, wrong parameters.

Everything runs in a virtual machine (rdma.py), under emulation: slow, and with times that say little.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
from programs import BUILD_LIMIT
from rdma import BATCH_LIMIT, Guest, in_guest

pytestmark = pytest.mark.limit(BATCH_LIMIT + BUILD_LIMIT)

VERBS = "HFREDUCE_TRANSPORT=verbs"
SYSTEM, USAGE, REMOTE, TIMEOUT = 2, 5, 6, 8  # of hfreduceResult_t
#: Seconds from a death to the error at every survivor. On real cores it is 1; here, so that it was neither a deadline nor the
#: heartbeat's 8 that ended the wait.
NOTICE = 5.0


class End(NamedTuple):
    """How a rank of `steady` ended; error 0: well."""

    transports: str
    error: int
    peer: int
    after: float
    rounds: int
    wrong: int
    text: str


def ends(guest: Guest) -> dict[int, End]:
    """The ranks of `steady` that told how they ended."""
    form = r"^rank (\d+) \((\S+)\): (?:done|error (\d+), peer (-?\d+),) after (\S+) s, (\d+) rounds, (\d+) wrong(.*)$"
    found = re.findall(form, guest.output, re.MULTILINE)
    return {
        int(rank): End(transports, int(error or 0), int(peer or -1), float(after), int(rounds), int(wrong), text)
        for rank, transports, error, peer, after, rounds, wrong, text in found
    }


def refusals(guest: Guest) -> list[tuple[int, str]]:
    """The errors, and their texts, of the ranks of `steady` that got no communicator."""
    return [
        (int(e), text) for e, text in re.findall(r"^rank \d+: no communicator: error (\d+): (.*)$", guest.output, re.MULTILINE)
    ]


def all_went_well(guest: Guest, nranks: int, transport: str = "verbs") -> None:
    guest.clean()
    done = ends(guest)
    assert len(done) == nranks, str(guest)
    assert all(not end.error and not end.wrong and end.rounds >= 5 and transport in end.transports for end in done.values()), str(
        guest
    )


# --- the suite of the other transports ---


@pytest.mark.parametrize(
    "layout",
    [
        *[
            "1,1",
            "--quick 1,2",
            "--quick 1,1,1",
            "--quick 2,2",
            "--quick 1,1,1,1",
            "--quick 3,1,2",
            "--quick 0.1.0.2.1",
            "--quick 1,1,1,1,1",
        ],
        *["--quick 2,2,2,2", "--quick 1,1,1,1,1,1", "--quick 2,1,1,1,1,1,1", "--quick 1,1,1,1,1,1,1,1"],
    ],
)
@in_guest(VERBS + " test_collectives {layout}", limit=60)
def test_collectives(guest: Guest, layout: str) -> None:
    guest.over_rdma(packets=1000)


@pytest.mark.parametrize("layout", ["1,1", "2,1", "1,1,1,1,1"])
@in_guest(VERBS + " test_dtypes {layout}", limit=60)
def test_dtypes(guest: Guest, layout: str) -> None:
    guest.over_rdma(packets=1000)


@pytest.mark.parametrize("program", ["test_p2p --quick", "test_async 1,1 2,1", "test_verbs --quick"])
@in_guest(VERBS + " {program}", limit=90)
def test_program(guest: Guest, program: str) -> None:
    guest.over_rdma(packets=1000)


@pytest.mark.parametrize("program", ["test_verbs_memory", "test_verbs_peer"])
@in_guest("{program}", limit=60)
def test_parts(guest: Guest, program: str) -> None:
    guest.well()


@in_guest(VERBS + " HFREDUCE_IB_CACHE=64M test_collectives --quick 1,1,1", limit=60)
def test_registered_buffers(guest: Guest) -> None:
    guest.over_rdma(packets=1000)


@in_guest(VERBS + " HFREDUCE_IB_QPS_PER_CONNECTION=4 test_collectives --quick 2,1", limit=60)
def test_several_queue_pairs(guest: Guest) -> None:
    guest.over_rdma(packets=1000)


# --- a bad network ---


#: Between two devices: what a device sends to itself does not cross the network.
EACH = "for dev in rdma0 rdma1; do tc {} dev $dev {}; done"


@pytest.mark.parametrize("disturbance", ["loss 1%", "delay 300us reorder 95%", "duplicate 2%", "corrupt 0.5%"])
@in_guest(
    "trap '"
    + EACH.format("qdisc del", "root")
    + "' EXIT; "
    + EACH.format("qdisc add", "root netem {disturbance} limit 100000")
    + "; "
    + VERBS
    + " steady -s 3 -a 1,1,1; "
    + EACH.format("-s qdisc show", ""),
    devices=2,
    limit=60,
)
def test_bad_network(guest: Guest, disturbance: str) -> None:
    all_went_well(guest, 3)
    guest.over_rdma("rxe0", "rxe1")
    sent = [(int(packets), int(dropped)) for packets, dropped in re.findall(r"bytes (\d+) pkt \(dropped (\d+)", guest.output)]
    assert len(sent) == 2 and min(packets for packets, _ in sent) > 500, str(guest)
    if disturbance.startswith("loss"):
        assert all(dropped for _, dropped in sent), str(guest)


# --- ranks that die or stop ---


@pytest.mark.parametrize(("layout", "nranks", "dead"), [("1,1", 2, 1), ("1,1,1", 3, 0), ("2,1", 3, 2), ("2,2", 4, 1)])
@in_guest(VERBS + " steady -s 60 {layout} 'kill -9 $PID{dead}'")
def test_death(guest: Guest, layout: str, nranks: int, dead: int) -> None:
    guest.clean()
    left = ends(guest)
    assert sorted(left) == [rank for rank in range(nranks) if rank != dead], str(guest)
    for end in left.values():
        assert (end.error, end.peer) == (REMOTE, dead) and f"rank {dead}" in end.text, str(guest)
        assert end.after < NOTICE and not end.wrong and "verbs" in end.transports, str(guest)


@in_guest(VERBS + " steady -s 60 -t 3 1,1,1 'kill -STOP $PID1; sleep 6; kill -9 $PID1'")
def test_stopped_rank(guest: Guest) -> None:
    guest.clean()
    left = ends(guest)
    assert sorted(left) == [0, 2], str(guest)
    assert all((end.error, end.peer) == (TIMEOUT, 1) and "rank 1" in end.text for end in left.values()), str(guest)


# --- two devices ---


@in_guest(VERBS + " test_collectives --quick 2,2", devices=2, limit=60)
def test_ranks_of_a_node_use_all_ports(guest: Guest) -> None:
    guest.over_rdma("rxe0", "rxe1", packets=1000)


@in_guest(VERBS + " steady -a 1,1,1", devices=2)
def test_ranks_on_different_ports(guest: Guest) -> None:
    all_went_well(guest, 3)
    guest.over_rdma("rxe0", "rxe1")


@pytest.mark.parametrize(("rule", "used", "idle"), [("rxe1", "rxe1", "rxe0"), ("^rxe1", "rxe0", "rxe1")])
@in_guest(VERBS + " HFREDUCE_IB_HCA={rule} steady -s 1 2,1", devices=2)
def test_chosen_device(guest: Guest, rule: str, used: str, idle: str) -> None:
    all_went_well(guest, 3)
    guest.over_rdma(used)
    assert guest.packets[idle] < 20, str(guest)  # router solicitations of the interface and such


#: Make rxe1 again, and its interface if that has gone too.
MEND = (
    "ip link show rdma1 >/dev/null || ip link add rdma1 link segment type macvlan mode bridge;"
    " ip addr replace 10.77.0.2/24 dev rdma1; ip link set rdma1 up; rdma dev show rxe1 || rdma link add rxe1 type rxe netdev rdma1"
)


@pytest.mark.parametrize("loss", ["ip link set rdma1 down", "ip link delete rdma1", "rdma link delete rxe1"])
@in_guest(VERBS + " steady -s 6 -t 30 -a 1,1 '{loss}'; " + MEND, devices=2, limit=60)
def test_port_goes(guest: Guest, loss: str) -> None:
    guest.clean()
    found = ends(guest)
    assert sorted(found) == [0, 1] and not any(end.wrong for end in found.values()), str(guest)
    if loss.startswith("rdma") and not any(end.error for end in found.values()):
        return  # the kernel may wait for the device's users
    for rank, end in found.items():
        assert end.error in (SYSTEM, REMOTE) and f"rank {1 - rank}" in end.text and "rxe1:1" in end.text, str(guest)


#: The first port goes down, comes back, and the other one goes: with what is under way from one to the other and back.
THERE_AND_BACK = "ip link set rdma0 down; sleep 1.5; ip link set rdma0 up; sleep 1; ip link set rdma1 down"
BOTH_UP = "ip link set rdma0 up; ip link set rdma1 up"


@pytest.mark.parametrize(("layout", "nranks", "queue_pairs"), [("1,1", 2, 1), ("2,1", 3, 1), ("1,1,1,1", 4, 3)])
@in_guest(
    VERBS + " HFREDUCE_IB_QPS_PER_CONNECTION={queue_pairs} steady -s 5 -t 20 {layout} '" + THERE_AND_BACK + "'; " + BOTH_UP,
    devices=2,
    limit=60,
)
def test_failover(guest: Guest, layout: str, nranks: int, queue_pairs: int) -> None:
    all_went_well(guest, nranks)
    guest.over_rdma("rxe0", "rxe1")
    assert "goes on over rxe1:1, no longer over rxe0:1" in guest.output, str(guest)


@in_guest(VERBS + " HFREDUCE_IB_FAILOVER=0 steady -s 6 -t 30 1,1 'ip link set rdma0 down'; " + BOTH_UP, devices=2, limit=60)
def test_no_failover(guest: Guest) -> None:
    guest.clean()
    found = ends(guest)
    assert sorted(found) == [0, 1], str(guest)
    assert all(end.error in (SYSTEM, REMOTE) and "rxe0:1" in end.text for end in found.values()), str(guest)


# --- a peer that shares no code ---


@in_guest(
    "command -v verbs_echo && PYTHONPATH=build/pyverbs {python} -m pytest -q -rs -p no:cacheprovider tests/test_rdma_peer.py",
    limit=120,
)
def test_independent_peer(guest: Guest) -> None:
    guest.well()
    skipped = re.search(r"SKIPPED.*?: (.*)", guest.output)
    if skipped:
        pytest.skip(skipped[1])
    guest.over_rdma(packets=1000)
    assert re.search(r"\b3 passed", guest.output), str(guest)


# --- parameters and machines that do not allow it ---


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("IB_HCA==nosuch", 'rxe0:1: HFREDUCE_IB_HCA="=nosuch" leaves it out'),
        ("IB_HCA=rxe0:5", 'rxe0:1: HFREDUCE_IB_HCA="rxe0:5" leaves it out'),
        ("IB_GID_INDEX=77", "rxe0:1: HFREDUCE_IB_GID_INDEX is 77; its GIDs: 0 "),
        ("IB_PKEY=9", "rxe0:1: HFREDUCE_IB_PKEY is index 9; its table has "),
    ],
)
@in_guest("export HFREDUCE_{setting}; " + VERBS + " steady 1,1; steady -s 0.5 1,1")
def test_wrong_parameter(guest: Guest, setting: str, said: str) -> None:
    all_went_well(guest, 2, "tcp")
    refused = refusals(guest)
    assert len(refused) == 2 and all(error == USAGE and said in text for error, text in refused), str(guest)


#: Automatic choice, verbs by name, and what `hfreduce info` says.
THREE_WAYS = "steady -s 0.5 1,1; " + VERBS + " steady 1,1; {python} -m hfreduce info | grep -E '^(transport|rdma)'"


@in_guest('prlimit --memlock=65536 setpriv --bounding-set=-ipc_lock --inh-caps=-ipc_lock bash -c "' + THREE_WAYS + '"')
def test_locked_memory_limit(guest: Guest) -> None:
    all_went_well(guest, 2, "tcp")
    refused = refusals(guest)
    assert len(refused) == 2 and all(error == USAGE and "locked memory" in text for error, text in refused), str(guest)
    lines = [line for line in guest.output.splitlines() if line.startswith(("transport", "rdma")) and "locked memory" in line]
    assert len(lines) == 1 and "64 KiB" in lines[0] and "ulimit -l" in lines[0], str(guest)


@in_guest("trap 'rdma link add rxe0 type rxe netdev lo' EXIT; rdma link delete rxe0; " + THREE_WAYS)
def test_no_device(guest: Guest) -> None:
    all_went_well(guest, 2, "tcp")
    refused = refusals(guest)
    assert len(refused) == 2 and all(error == USAGE and "no RDMA devices" in text for error, text in refused), str(guest)
    assert "transport verbs:" in guest.output and "not usable: no RDMA devices" in guest.output, str(guest)


# --- from Python ---

AS_NODES = "{python} -m hfreduce run -n 2 sh -c 'HFREDUCE_HOSTID=host$HFREDUCE_RANK exec {python}"


@in_guest(VERBS + " " + AS_NODES + " -m hfreduce perf all_reduce -b 8 -e 1M -f 8 -n 2 -w 1'", limit=90)
def test_perf_says_so(guest: Guest) -> None:
    guest.over_rdma(packets=1000)
    assert re.search(r"transports verbs\b", guest.output), str(guest)


@in_guest(f"{VERBS} PYTHONPATH=tests/tools/light {AS_NODES} examples/train_digits.py --epochs 2 --hidden 64 --check'", limit=120)
def test_digits_trainer(guest: Guest) -> None:
    if "No module named 'sklearn'" in guest.output:
        pytest.skip("scikit-learn, whose digits are learnt, is not installed")
    guest.over_rdma()
    assert "transports verbs" in guest.output and "bit-identical on all ranks" in guest.output, str(guest)
