"""Joining: who is let in and who is told why not, what joining leaves open, and variables that are refused or misspelt."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from programs import BUILD_LIMIT, build, building, environment, need_compiler
from ranks import reserved_address

import hfreduce
from hfreduce import Communicator, get_unique_id

PACKAGE = Path(hfreduce.__file__).parent


def python(code: str, limit: float = 60, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own, with no parameters but these."""
    return subprocess.run([sys.executable, "-c", code], env=environment(**more), capture_output=True, text=True, timeout=limit)


# --- variables ---


def test_no_variable_that_is_read_counts_as_misspelt() -> None:
    texts = [path.read_text() for path in PACKAGE.rglob("*.py")]
    names = {name for text in texts for name in re.findall(r"\bHFREDUCE_[A-Z0-9_]*[A-Z0-9]\b", text)}
    names -= {name for name in names if re.fullmatch(r"HFREDUCE_(MAJOR|MINOR|PATCH|VERSION_CODE|UNIQUE_ID_BYTES|H)", name)}
    assert {"HFREDUCE_RANK", "HFREDUCE_TORCH_SHIM", "HFREDUCE_TIMEOUT"} <= names, names
    done = python("import hfreduce; hfreduce.get_unique_id(local=True)", **dict.fromkeys(names, ""))
    assert done.returncode == 0, done.stderr
    assert "no parameter" not in done.stderr, done.stderr


def test_a_misspelt_variable_is_named_once() -> None:
    code = "import hfreduce\nfor _ in range(2): hfreduce.Communicator(0, 1, hfreduce.get_unique_id(local=True)).close()"
    done = python(code, HFREDUCE_TIMEOT="5")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("HFREDUCE_TIMEOT (in the environment) is no parameter") == 1, done.stderr
    assert "is HFREDUCE_TIMEOUT meant?" in done.stderr, done.stderr


@pytest.mark.parametrize(("seconds", "good"), [("0", True), ("0.5", True), ("8", True), ("0.49", False), ("0.001", False)])
def test_a_heartbeat_below_half_a_second_is_refused(seconds: str, good: bool) -> None:
    code = "import hfreduce; hfreduce.Communicator(0, 1, hfreduce.get_unique_id(local=True)).close()"
    done = python(code, HFREDUCE_HEARTBEAT=seconds)
    if good:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode != 0, "the communicator was made"
        assert "InvalidArgumentError" in done.stderr, done.stderr
        assert f"HFREDUCE_HEARTBEAT is {seconds} s" in done.stderr, done.stderr
        assert "at least 0.5 s" in done.stderr, done.stderr


# --- listeners ---


def _listening() -> set[int]:
    """TCP ports on which this process listens, on IPv4."""
    links = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.add(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue
    rows = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    return {int(row[1].split(":")[1], 16) for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in links}


CYCLES = """
import os, socket, hfreduce
from hfreduce import Communicator, UniqueId, get_unique_id

def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

def cycle(by_address):
    unique_id = UniqueId.from_address(f"127.0.0.1:{free_port()}", "ab" * 16) if by_address else get_unique_id(local=True)
    with Communicator(0, 1, unique_id) as comm:
        comm.barrier()

for by_address in (False, True):
    cycle(by_address)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(200):
        cycle(by_address)
    print(by_address, before, len(os.listdir("/proc/self/fd")))
"""


def test_listeners_close_with_their_last_user() -> None:
    done = python(CYCLES, limit=100)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 2, done.stdout
    for by_address, before, after in lines:
        assert int(after) <= int(before), f"by_address {by_address}: {before} descriptors became {after} in 200 cycles"


def test_a_listener_stays_for_an_id_that_nobody_has_used() -> None:
    before = _listening()
    waiting = get_unique_id(local=True)  # handed out, not joined
    ports = _listening() - before
    for _ in range(3):
        Communicator(0, 1, get_unique_id(local=True)).close()
    assert ports <= _listening(), "the listener closed before the id was used"
    Communicator(0, 1, waiting, timeout=20).close()
    assert not (_listening() - before), "the listener is still open"


# --- two ranks, each a process; strangers at the port ---

SECRET = "ab" * 16
#: Join, and print the instants of the attempt and of its end (time.monotonic() is one clock for all processes), and how it ended.
JOIN = """
import sys, time
import hfreduce
begun = time.monotonic()
try:
    comm = hfreduce.init(float(sys.argv[1]))
except hfreduce.HfreduceError as error:
    print(begun, time.monotonic(), type(error).__name__, error, flush=True)
else:
    print(begun, time.monotonic(), "joined", comm.nranks, flush=True)
    comm.barrier()
    comm.close()
"""


class Rank:
    """A rank in a process of its own that joins within so many seconds."""

    def __init__(
        self, rank: int, address: str, folder: Path, timeout: float = 60, secret: str = SECRET, code: str = JOIN, **more: str
    ):
        self.log = folder / f"rank{rank}-{time.monotonic_ns()}"
        env = environment(
            HFREDUCE_RANK=str(rank),
            HFREDUCE_NRANKS="2",
            HFREDUCE_ADDR=address,
            HFREDUCE_SECRET=secret,
            PYTHONUNBUFFERED="1",
            **more,
        )
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, str(timeout)], env=env, stdout=subprocess.PIPE, stderr=log, text=True
            )

    def __enter__(self) -> Rank:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()

    def wait_for(self, words: str, limit: float = 60) -> None:
        """Until it has logged these words."""
        end = time.monotonic() + limit
        while words not in self.log.read_text():
            assert time.monotonic() < end, f"not logged within {limit:g} s: {words}\n{self.log.read_text()}"
            time.sleep(0.02)

    def end(self, limit: float = 90) -> tuple[float, float, str, str]:
        """When its attempt began and ended, and how: the error's class and text, or "joined"."""
        try:
            output, _ = self.process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still joining after {limit:g} s\n{self.log.read_text()}")
        assert output, self.log.read_text()
        begun, ended, kind, text = output.split(" ", 3)
        return float(begun), float(ended), kind, text.strip()


def other_library(name: str, *flags: str) -> dict[str, str]:
    """The variables that put a library with another version.c in the place of the package's."""
    need_compiler()
    with building("plain") as out:
        objects = [path for path in build.compile_objects(out / "obj", build.sources()) if path.name != "base_version.o"]
        objects += build.compile_objects(out / name, [build.HERE / "base" / "version.c"], extra=list(flags))
        library = build.link_shared(out / name / "libhfreduce.so", objects, [], sanitize="", cc=None)
    return {"LD_PRELOAD": str(library)}


@pytest.mark.limit(BUILD_LIMIT)
@pytest.mark.parametrize("odd", [0, 1])
def test_another_protocol_fails_at_once_on_both_sides(odd: int, tmp_path: Path) -> None:
    special = other_library("protocol", "-DHFR_PROTOCOL=77u")
    with reserved_address() as address, contextlib.ExitStack() as stack:
        ranks = [stack.enter_context(Rank(r, address, tmp_path, **(special if r == odd else {}))) for r in range(2)]
        ends = [rank.end() for rank in ranks]
    last = max(begun for begun, *_ in ends)
    for number, (_, ended, kind, text) in enumerate(ends):
        assert kind == "InvalidUsageError", f"rank {number}: {kind} {text}"
        assert "(protocol 77)" in text, f"rank {number}: {text}"
        assert re.search(r"hfreduce \d+\.\d+\.\d+ [0-9a-f]{8} \(protocol \d\)", text), f"rank {number}: {text}"
        assert "rank 1 " in text, f"rank {number}: {text}"
        assert "install the same version on all hosts" in text, f"rank {number}: {text}"
        assert ended - last < 10, f"rank {number} took {ended - last:.1f} s, of 60: {text}"


@pytest.mark.limit(BUILD_LIMIT)
def test_another_build_of_one_protocol_joins_with_one_warning(tmp_path: Path) -> None:
    special = other_library("build", "-UHFR_BUILD", "-DHFR_BUILD=0x0badcafeu")
    with reserved_address() as address, Rank(0, address, tmp_path) as one, Rank(1, address, tmp_path, **special) as two:
        assert one.end()[2:] == ("joined", "2"), one.log.read_text()
        assert two.end()[2:] == ("joined", "2"), two.log.read_text()
        logs = one.log.read_text() + two.log.read_text()
    assert logs.count("WARN") == 1, logs
    assert "0badcafe" in logs, logs
    assert "install the same version on all hosts" in logs, logs


def test_equal_builds_say_nothing(tmp_path: Path) -> None:
    with reserved_address() as address, Rank(0, address, tmp_path) as one, Rank(1, address, tmp_path) as two:
        assert one.end()[2:] == two.end()[2:] == ("joined", "2"), one.log.read_text() + two.log.read_text()
        assert not one.log.read_text() + two.log.read_text()


def test_another_secret_is_told_on_both_sides(tmp_path: Path) -> None:
    with reserved_address() as address, Rank(0, address, tmp_path, timeout=20) as root:
        with Rank(1, address, tmp_path, timeout=5, secret="cd" * 16) as other:
            root.wait_for("refused a connection while ranks are joining: wrong secret from 127.0.0.1")
            other.wait_for("the other side has another secret")
            _, _, kind, text = other.end()
        assert kind == "InvalidUsageError", text
        assert "give all ranks the same HFREDUCE_SECRET" in text, text
        _, _, kind, text = root.end()
    assert kind == "DeadlineError", text
    assert "missing rank 1" in text, text
    assert re.search(r"\d+ connections? w\w+ refused: wrong secret from 127\.0\.0\.1", text), text


@pytest.mark.slow
@pytest.mark.limit(150)
def test_another_secret_is_believed_after_half_a_minute(tmp_path: Path) -> None:
    with (
        reserved_address() as address,
        Rank(0, address, tmp_path, timeout=130),
        Rank(1, address, tmp_path, timeout=120, secret="cd" * 16) as other,
    ):
        begun, ended, kind, text = other.end(140)
    assert kind == "InvalidUsageError", text
    assert 29 < ended - begun < 90, f"{ended - begun:.1f} s: {text}"


def test_a_rank_that_meets_the_old_root_joins_the_new_one(tmp_path: Path) -> None:
    with (
        reserved_address() as address,
        Rank(0, address, tmp_path, secret="cd" * 16) as old,
        Rank(1, address, tmp_path) as rank,
    ):
        rank.wait_for("It goes on trying")
        old.process.kill()
        old.process.wait()
        with Rank(0, address, tmp_path) as new:
            assert new.end()[2:] == ("joined", "2"), new.log.read_text()
            assert rank.end()[2:] == ("joined", "2"), rank.log.read_text()


# The handshake, as a stranger would speak it: csrc/base/auth.h.
GREETING, HELLO, ANSWER = struct.Struct("<4sI16s"), struct.Struct("<4sI72x"), struct.Struct("<4sIII16s")
WELCOME, UNKNOWN = 0, 1


@contextlib.contextmanager
def stranger(serve: Callable[[socket.socket], None]) -> Iterator[str]:
    """Listen, and serve each connection in turn; the address. An error in `serve` ends its connection only."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def work() -> None:
            while True:
                try:
                    visitor, _ = listener.accept()
                except OSError:
                    return
                with contextlib.suppress(OSError), visitor:
                    visitor.settimeout(60)
                    serve(visitor)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
    thread.join(10)


def read(visitor: socket.socket, count: int) -> bytes:
    """So many bytes; fewer when the other side closes before."""
    got = b""
    with contextlib.suppress(ConnectionResetError):
        while len(got) < count and (part := visitor.recv(count - len(got))):
            got += part
    return got


def protocol() -> int:
    """The number that this library speaks: a rank tells it to whoever greets it."""
    said: list[int] = []

    def serve(visitor: socket.socket) -> None:
        visitor.sendall(GREETING.pack(b"HFRS", 2, bytes(16)))
        hello = read(visitor, HELLO.size)
        if len(hello) == HELLO.size:
            said.append(HELLO.unpack(hello)[1])

    with stranger(serve) as address, pytest.raises(hfreduce.HfreduceError):
        Communicator(1, 2, hfreduce.UniqueId.from_address(address, SECRET), timeout=1)
    return said[0]


def test_a_false_root_without_the_secret_learns_nothing() -> None:
    said: list[bytes] = []
    number = protocol()

    def serve(visitor: socket.socket) -> None:
        visitor.sendall(GREETING.pack(b"HFRS", number, bytes(16)))
        if len(read(visitor, HELLO.size)) < HELLO.size:
            return  # the rank's time was over
        visitor.sendall(ANSWER.pack(b"HFRA", WELCOME, 100, 0, os.urandom(16)))  # a proof that proves nothing
        said.append(read(visitor, 1000))  # a rank that believed it would hand in its record

    with stranger(serve) as address, pytest.raises(hfreduce.DeadlineError, match="the other side does not know the secret"):
        Communicator(1, 2, hfreduce.UniqueId.from_address(address, SECRET), timeout=3)
    assert said
    assert not any(said), said


def test_a_root_of_an_older_protocol_is_warned_of_and_tried_again(tmp_path: Path) -> None:
    with (
        stranger(lambda visitor: visitor.sendall(GREETING.pack(b"HFRS", 1, bytes(16)))) as address,
        Rank(1, address, tmp_path) as rank,
    ):
        rank.wait_for("says that it speaks protocol 1 of hfreduce")
        rank.wait_for("It goes on trying")
        with Rank(1, address, tmp_path, timeout=2) as other:
            _, _, kind, text = other.end()
            assert kind == "InvalidUsageError", text
            assert "install the same hfreduce on all hosts" in text, text
        assert rank.process.poll() is None, "nothing of it is proven, and the rank failed at once"


def test_strangers_make_no_root_fail(tmp_path: Path) -> None:
    with reserved_address() as address, Rank(0, address, tmp_path) as root:
        host, port = address.split(":")
        old = struct.pack("<4sI56x", b"HFRC", 1)  # the hello of the first protocol
        forged = struct.pack("<4sIBBHii60x", b"HFRC", 77, 1, 0, 0, 1, -1)  # another protocol, and no proof
        for word in (old, forged, b"GET / HTTP/1.1\r\n\r\n", os.urandom(200)):
            end = time.monotonic() + 60
            while True:
                with contextlib.suppress(ConnectionRefusedError), socket.create_connection((host, int(port)), 10) as visit:
                    visit.settimeout(20)
                    assert read(visit, GREETING.size)[:4] == b"HFRS"
                    visit.sendall(word)
                    read(visit, 1000)  # until it closes
                    break
                assert time.monotonic() < end, "nobody listens"
                time.sleep(0.05)
        root.wait_for("refused a connection while ranks are joining: an older protocol of hfreduce from 127.0.0.1")
        with Rank(1, address, tmp_path) as rank:
            assert rank.end()[2:] == ("joined", "2"), rank.log.read_text()
        assert root.end()[2:] == ("joined", "2"), root.log.read_text()


def test_who_is_refused_is_named_by_address_though_it_has_gone(tmp_path: Path) -> None:
    with reserved_address() as address, Rank(0, address, tmp_path) as root:
        host, port = address.split(":")
        end = time.monotonic() + 60
        while True:
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection((host, int(port)), 10) as visit:
                visit.settimeout(20)
                assert read(visit, GREETING.size)[:4] == b"HFRS"
                root.process.send_signal(signal.SIGSTOP)
                visit.sendall(struct.pack("<4sI56x", b"HFRC", 1))  # the hello of the first protocol
                visit.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closed by a reset
                break
            assert time.monotonic() < end, "nobody listens"
            time.sleep(0.05)
        root.process.send_signal(signal.SIGCONT)
        root.wait_for("refused a connection while ranks are joining: an older protocol of hfreduce from 127.0.0.1")


def test_a_refusal_is_told_though_silence_came_after_it() -> None:
    visits: list[int] = []
    number = protocol()

    def serve(visitor: socket.socket) -> None:
        visits.append(1)
        if len(visits) > 1:
            read(visitor, 1)  # silent, until the rank gives up
            return
        visitor.sendall(GREETING.pack(b"HFRS", number, bytes(16)))
        read(visitor, HELLO.size)
        visitor.sendall(ANSWER.pack(b"HFRA", UNKNOWN, 100, 0, bytes(16)))

    with stranger(serve) as address, pytest.raises(hfreduce.DeadlineError, match="does not know this communicator"):
        Communicator(1, 2, hfreduce.UniqueId.from_address(address, SECRET), timeout=3)
    assert len(visits) > 1


# --- loopback without a secret: this user only ---

NOBODY = 65534
#: As JOIN, as another user once the library is loaded (whose files that user may not read).
JOIN_AS = (
    f"import os, hfreduce\nhfreduce.init, hfreduce.HfreduceError\nos.setresgid({NOBODY}, {NOBODY}, {NOBODY})\nos.setresuid({NOBODY}, {NOBODY}, {NOBODY})\n"
    + JOIN
)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_ranks_of_one_user_meet_without_a_secret(host: str, tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            pytest.skip(f"no {host} here")
        port = probe.getsockname()[1]
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    # Two homes and two nodes: nothing but the user is common, and data goes over TCP.
    with (
        Rank(0, address, tmp_path, secret="", HOME="/nowhere", HFREDUCE_HOSTID="a") as one,
        Rank(1, address, tmp_path, secret="", HFREDUCE_HOSTID="b") as two,
    ):
        assert one.end()[2:] == two.end()[2:] == ("joined", "2"), one.log.read_text() + two.log.read_text()


@as_root
def test_another_user_is_not_believed_as_root_without_a_secret(tmp_path: Path) -> None:
    with (
        reserved_address() as address,
        Rank(0, address, tmp_path, secret="", code=JOIN_AS) as false,
        Rank(1, address, tmp_path, secret="") as rank,
    ):
        rank.wait_for("what listens there is a process of another user")
        assert false.process.poll() is None, false.log.read_text()
        false.process.kill()
        false.process.wait()
        with Rank(0, address, tmp_path, secret="") as root:
            assert root.end()[2:] == ("joined", "2"), root.log.read_text()
            assert rank.end()[2:] == ("joined", "2"), rank.log.read_text()


# --- descriptors ---

LIMITED = """
import os, resource, sys
import hfreduce
hfreduce.Communicator, hfreduce.get_unique_id, hfreduce.HfreduceError  # are loaded now
most = int(sys.argv[1])
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard if len(sys.argv) > 2 else most))
"""


@pytest.mark.parametrize(("raise_it", "more"), [(True, {}), (False, {"HFREDUCE_RAISE_NOFILE": "0"})])
def test_the_soft_limit_of_descriptors_is_raised(raise_it: bool, more: dict[str, str]) -> None:
    code = LIMITED.replace("sys.argv[1]", "'100'").replace("len(sys.argv) > 2", "True")
    code += "hfreduce.get_unique_id(local=True)\nprint(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    done = python(code, **more)
    assert done.returncode == 0, done.stderr
    soft, hard = map(int, done.stdout.split())
    assert soft == (hard if raise_it else 100), done.stdout


RUN_OUT = """
left = int(sys.argv[1])
held = []
while True:
    try:
        held.append(os.dup(0))
    except OSError:
        break
for _ in range(left):
    os.close(held.pop())
try:
    comm = hfreduce.Communicator(0, 1, hfreduce.get_unique_id(local=True), timeout=3)
    print("joined")
except hfreduce.HfreduceError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.limit(240)
def test_descriptors_that_run_out_are_named_wherever_that_is() -> None:
    failures = 0
    for left in range(30):
        code = LIMITED.replace("sys.argv[1]", "'64'").replace("len(sys.argv) > 2", "False")
        done = python(code + RUN_OUT.replace("sys.argv[1]", f"'{left}'"))
        assert done.returncode == 0, f"{left} descriptors left: {done.stderr}"
        if done.stdout.startswith("joined"):
            break
        failures += 1
        said = done.stdout + done.stderr
        assert "may open 64 descriptors (ulimit -n)" in said, f"{left} descriptors left: {said}"
    else:
        pytest.fail("30 descriptors are not enough for one rank")
    assert failures >= 3, f"{failures} descriptors are enough for a rank"


# --- late ---


def test_a_late_rank_is_told_at_once_why_the_others_failed() -> None:
    unique_id = get_unique_id(local=True)
    errors: list[Exception] = []

    def join(rank: int, nranks: int) -> None:
        try:
            Communicator(rank, nranks, unique_id, timeout=60).close()
        except hfreduce.HfreduceError as error:
            errors.append(error)

    early = [threading.Thread(target=join, args=(0, 3)), threading.Thread(target=join, args=(1, 4))]
    for thread in early:
        thread.start()
        time.sleep(1)  # the first to come says how many there are: the late rank agrees with it
    for thread in early:
        thread.join(60)
    assert len(errors) == 2, errors
    assert all("give all the same number" in str(error) for error in errors), errors
    begun = time.monotonic()
    with pytest.raises(hfreduce.InvalidUsageError, match="give all the same number"):
        Communicator(2, 3, unique_id, timeout=30)
    assert time.monotonic() - begun < 15, "it waited for ranks that had failed"
