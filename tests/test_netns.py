"""Several hosts: real network interfaces, addresses and failures, in network namespaces made for each test module.

Needs root, iproute2 and util-linux (see tools/hosts). Nothing outside those namespaces is touched.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PERF = [sys.executable, "-m", "hfreduce", "perf"]
DIGITS = [sys.executable, str(ROOT / "examples" / "train_digits.py")]
HOSTS = 3


def load_tool() -> Any:
    """tools/hosts, which has no suffix, as a module."""
    loader = SourceFileLoader("hosts_tool", str(ROOT / "tests" / "tools" / "hosts"))
    spec = importlib.util.spec_from_loader("hosts_tool", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    old, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = old
    return module


tool = load_tool()
SHARED = True  # the hosts


@pytest.fixture(scope="module")
def hosts() -> Iterator[Any]:
    """Three hosts with two interfaces each."""
    if os.geteuid():
        pytest.skip("network namespaces need root")
    try:
        made = tool.Hosts(HOSTS, links=2)
    except tool.HostsError as error:
        pytest.skip(f"no network namespaces with a bridge here: {error}")
    with made:
        yield made


class Job:
    """per_host ranks of a command on each host, ranks in the order of the hosts; a context manager that leaves none alive."""

    _port = 20000  # the addresses are of our own namespaces: any port is free

    def __init__(
        self,
        hosts: Any,
        per_host: int,
        command: Sequence[str],
        folder: Path,
        env: dict[str, str] | None = None,
        address: str = "",
    ) -> None:
        self.nranks = HOSTS * per_host
        self.outputs = [folder / f"rank{rank}.txt" for rank in range(self.nranks)]
        self.ranks: list[subprocess.Popen[bytes]] = []
        Job._port += 1
        shared = {name: value for name, value in os.environ.items() if not name.startswith("HFREDUCE_")}
        shared |= {
            "HFREDUCE_NRANKS": str(self.nranks),
            "HFREDUCE_ADDR": f"{address or hosts.address(0)}:{Job._port}",
            "HFREDUCE_SECRET": secrets.token_hex(16),
            "HFREDUCE_TIMEOUT": "20",
            **(env or {}),
        }
        self.began = time.monotonic()
        for rank, output in enumerate(self.outputs):
            with output.open("wb") as file:
                self.ranks.append(
                    subprocess.Popen(
                        hosts.command(rank // per_host, command),
                        env={**shared, "HFREDUCE_RANK": str(rank)},
                        cwd=folder,
                        stdin=subprocess.DEVNULL,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *error: Any) -> None:
        for process in self.ranks:
            process.kill()
            process.wait()

    def text(self, rank: int) -> str:
        return self.outputs[rank].read_text(errors="replace")

    def everything(self) -> str:
        return "\n".join(f"--- rank {rank}, status {p.poll()}\n{self.text(rank)}" for rank, p in enumerate(self.ranks))

    def wait(self, seconds: float = 80) -> list[int]:
        """Statuses of all ranks; fails if one has not ended by then."""
        end = time.monotonic() + seconds
        for rank, process in enumerate(self.ranks):
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                pytest.fail(f"rank {rank} hangs after {seconds} s\n{self.everything()}")
        return [process.returncode for process in self.ranks]

    def succeed(self) -> str:
        """Wait; all must end with 0. Returns rank 0's output."""
        assert self.wait() == [0] * self.nranks, self.everything()
        return self.text(0)

    def wait_for(self, pattern: str, seconds: float = 30) -> None:
        """Until every rank has written it."""
        end = time.monotonic() + seconds
        while not all(re.search(pattern, self.text(rank)) for rank in range(self.nranks)):
            assert time.monotonic() < end and all(p.poll() is None for p in self.ranks), self.everything()
            time.sleep(0.02)


# --- what must work ---


@pytest.mark.parametrize("per_host", [1, 2])
def test_perf_with_checked_values(hosts: Any, per_host: int, tmp_path: Path) -> None:
    out = tmp_path / "perf.json"
    command = [*PERF, "all_reduce", "-b", "8", "-e", "4M", "-f", "8", "-n", "3", "-w", "1", "--json", str(out)]
    with Job(hosts, per_host, command, tmp_path) as job:
        text = job.succeed()
    assert "# Out of bounds values : 0 OK" in text
    result = json.loads(out.read_text())
    assert (result["nranks"], result["nodes"]) == (HOSTS * per_host, HOSTS)
    assert set(result["transports"]) == ({"tcp"} if per_host == 1 else {"shm", "tcp"})
    assert [row["size"] for row in result["tables"][0]["rows"]] == [8**i for i in range(1, 8)]


@pytest.mark.limit(180)
def test_perf_of_every_collective(hosts: Any, tmp_path: Path) -> None:
    command = [*PERF, "all", "-b", "0", "-e", "300000", "-i", "100000", "-n", "2", "-w", "1"]
    with Job(hosts, 2, command, tmp_path) as job:
        assert "# Out of bounds values : 0 OK" in job.succeed()


@pytest.mark.parametrize("per_host", [1, 2])
def test_digits(hosts: Any, per_host: int, tmp_path: Path) -> None:
    if importlib.util.find_spec("sklearn") is None:
        pytest.skip("scikit-learn is not installed")
    with Job(hosts, per_host, [*DIGITS, "--check"], tmp_path) as job:
        text = job.succeed()
    assert f"{HOSTS * per_host} ranks on {HOSTS} nodes" in text
    assert "bit-identical on all ranks" in text and "equal within rounding" in text


def test_torch_listens_on_the_chosen_interface_alone(hosts: Any, tmp_path: Path) -> None:
    """The store that hfreduce.torch.init_process_group makes, too; the hosts have two interfaces and a loopback each."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    script = ROOT / "tests" / "pytorch" / "scripts" / "listening.py"
    env = {"HFREDUCE_SOCKET_IFNAME": "=eth0", "OMP_NUM_THREADS": "1"}
    with Job(hosts, 1, [sys.executable, str(script), "own"], tmp_path, env) as job:
        job.succeed()
        for rank in range(HOSTS):
            assert f"{rank} {hosts.address(rank)}" in job.text(rank).splitlines(), job.text(rank)


def test_ipv6(hosts: Any, tmp_path: Path) -> None:
    if not os.path.exists("/proc/net/if_inet6"):
        pytest.skip("no IPv6 in this kernel")
    command = [*PERF, "all_reduce", "-b", "1M", "-e", "1M", "-n", "2"]
    env = {"HFREDUCE_SOCKET_FAMILY": "AF_INET6"}
    with Job(hosts, 1, command, tmp_path, env, address=f"[{hosts.address6(0)}]") as job:
        assert "# Out of bounds values : 0 OK" in job.succeed()


# --- interfaces ---

SMALL = [*PERF, "all_reduce", "-b", "1M", "-e", "1M", "-n", "4"]


@pytest.mark.parametrize(
    ("rule", "link"),
    [("eth", None), ("=eth0", 0), ("=eth1", 1), ("^lo", None), ("^lo,eth0", 1), ("^=eth1,lo", 0), ("nope,eth1", 1)],
)
def test_interface_rule(hosts: Any, rule: str, link: int | None, tmp_path: Path) -> None:
    """The data goes over the interface that the rule admits; joining goes to HFREDUCE_ADDR in any case."""
    before = [[hosts.traffic(host, at) for at in range(2)] for host in range(HOSTS)]
    with Job(hosts, 1, SMALL, tmp_path, {"HFREDUCE_SOCKET_IFNAME": rule}) as job:
        assert "# Out of bounds values : 0 OK" in job.succeed()
    for host in range(HOSTS):
        moved = [hosts.traffic(host, at) - before[host][at] for at in range(2)]
        if link is None:
            assert sum(moved) > 4 << 20
        else:
            assert moved[link] > 4 << 20, f"host {host} moved {moved} bytes on eth0, eth1"
            assert moved[1 - link] < 1 << 20, f"host {host} moved {moved} bytes on eth0, eth1"


@pytest.mark.parametrize("rule", ["wlan", "=eth", "^eth,lo", "=eth7"])
def test_interface_rule_that_admits_none(hosts: Any, rule: str, tmp_path: Path) -> None:
    """Every rank says which rule, and which interfaces there are."""
    with Job(hosts, 1, SMALL, tmp_path, {"HFREDUCE_SOCKET_IFNAME": rule, "HFREDUCE_TIMEOUT": "5"}) as job:
        statuses = job.wait(20)
        assert all(statuses), job.everything()
        for rank in range(job.nranks):
            text = job.text(rank)
            assert f'HFREDUCE_SOCKET_IFNAME="{rule}"' in text and "eth0" in text and "eth1" in text, job.everything()
            assert "Traceback" not in text


# --- failures ---

LOOP = """
import sys, time
import numpy as np
import hfreduce
comm = hfreduce.init()
x = np.ones(1 << int(sys.argv[1]), np.float32)
print("running", flush=True)
try:
    while True:
        comm.all_reduce(x, op="avg")
except hfreduce.HfreduceError as error:
    at = time.monotonic()
    print(f"error {at} {type(error).__name__} peer={error.peer} op={error.op} seq={error.seq} phase={error.phase}: {error}", flush=True)
comm.close()
print(f"closed {time.monotonic() - at}", flush=True)
"""


class Failure:
    """What a rank of LOOP wrote when its loop broke."""

    def __init__(self, text: str) -> None:
        found = re.search(r"^error ([\d.]+) (\w+) peer=(\w+) op=(\w+) seq=(\w+) phase=([^:]*): (.*)$", text, re.MULTILINE)
        assert found is not None, text
        self.at, self.kind, self.text = float(found[1]), found[2], found[7]
        self.peer = None if found[3] == "None" else int(found[3])
        assert found[4] in ("all_reduce", "communicator") and found[6] != "None", text  # the operation, or the watcher noticed it
        assert re.search(r"^closed ", text, re.MULTILINE), text


@pytest.mark.parametrize(("per_host", "exponent"), [(1, 2), (1, 22), (2, 2), (2, 20)])
def test_kill_a_rank(hosts: Any, per_host: int, exponent: int, tmp_path: Path) -> None:
    """The others know within a second, and who it was; none hangs."""
    with Job(hosts, per_host, [sys.executable, "-c", LOOP, str(exponent)], tmp_path) as job:
        job.wait_for("running")
        time.sleep(0.5)
        victim = job.nranks - 1
        killed = time.monotonic()
        job.ranks[victim].send_signal(signal.SIGKILL)
        statuses = job.wait(15)
        assert statuses == [0] * victim + [-signal.SIGKILL], job.everything()
        for rank in range(victim):
            failure = Failure(job.text(rank))
            assert failure.kind == "PeerLostError", job.everything()
            assert failure.peer == victim, job.everything()
            assert failure.at - killed < 1.0 + 0.5 * (per_host - 1), f"rank {rank} knew after {failure.at - killed:.2f} s"


@pytest.mark.parametrize(("per_host", "heartbeat"), [(1, "2"), (2, "2"), (1, "0")])
def test_cut_a_link(hosts: Any, per_host: int, heartbeat: str, tmp_path: Path) -> None:
    """No packet says so: silence does, by the heartbeat; or without one the deadline."""
    deadline = 6.0
    env = {"HFREDUCE_HEARTBEAT": heartbeat, "HFREDUCE_TIMEOUT": f"{deadline:g}", "HFREDUCE_SOCKET_IFNAME": "=eth0"}
    with Job(hosts, per_host, [sys.executable, "-c", LOOP, "16"], tmp_path, env) as job:
        job.wait_for("running")
        time.sleep(0.5)
        cut = time.monotonic()
        hosts.set_link(HOSTS - 1, False)
        try:
            assert job.wait(30) == [0] * job.nranks, job.everything()
        finally:
            hosts.set_link(HOSTS - 1, True)
        for rank in range(job.nranks):
            failure = Failure(job.text(rank))
            limit = deadline + 2 if heartbeat == "0" else 2 * float(heartbeat) + 2
            assert failure.kind in ("PeerLostError", "DeadlineError"), job.everything()
            assert failure.at - cut < limit, f"rank {rank} after {failure.at - cut:.2f} s\n{job.everything()}"


def test_wrong_secret_is_refused(hosts: Any, tmp_path: Path) -> None:
    """A stranger on the network does not disturb those who belong together."""
    command = [sys.executable, "-c", LOOP, "10"]
    with Job(hosts, 1, command, tmp_path, {"HFREDUCE_TIMEOUT": "10"}) as job:
        stranger_env = {
            **os.environ,
            "HFREDUCE_RANK": "1",
            "HFREDUCE_NRANKS": str(job.nranks),
            "HFREDUCE_ADDR": f"{hosts.address(0)}:{Job._port}",
            "HFREDUCE_SECRET": "00" * 16,
            "HFREDUCE_TIMEOUT": "3",
        }
        code = "import hfreduce\nhfreduce.init()"
        stranger = subprocess.run(
            hosts.command(1, [sys.executable, "-c", code]),
            env=stranger_env,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        assert stranger.returncode != 0 and "hfreduce.errors." in stranger.stderr, stranger.stderr
        job.wait_for("running")
        assert "error" not in job.everything()


# --- the tool itself ---


def links() -> str:
    return subprocess.run(["ip", "-br", "link"], capture_output=True, text=True, check=True).stdout


def test_hosts_tool_leaves_nothing(hosts: Any) -> None:
    """Not in the caller's network while it runs, and no process after it was killed."""
    before = links()
    path = str(ROOT / "tests" / "tools" / "hosts")
    script = 'echo "$HOSTS_PIDS"; hosts exec 1 ip -br -4 addr show eth0; exec sleep 60'
    with subprocess.Popen([path, "run", "2", "sh", "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split(",")]
        assert "10.77.0.2/24" in process.stdout.readline()
        assert links() == before
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
        process.wait()
        for child in {int(child) for child in children} - set(pids):
            os.kill(child, signal.SIGKILL)  # the command; it holds nothing of ours, but is no holder
    end = time.monotonic() + 5
    while any(os.path.exists(f"/proc/{pid}") and "Z" not in state(pid) for pid in pids):
        assert time.monotonic() < end, "a holder outlived the tool"
        time.sleep(0.02)


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"
