"""The command line: perf's table, run's duties as a parent, info, config."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hfreduce
from hfreduce import types
from hfreduce.perf import collectives, patterns

HFREDUCE = [sys.executable, "-m", "hfreduce"]
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def cli(*args: str, timeout: float = 60, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*HFREDUCE, *args], capture_output=True, text=True, timeout=timeout, check=False, **options)


def program(folder: Path, text: str) -> str:
    """A program for ranks. What several of them print goes out by os.write: unbuffered, print() writes its line end by itself."""
    path = folder / "program.py"
    path.write_text("import os, signal, sys, time\nrank = int(os.environ['HFREDUCE_RANK'])\n" + text)
    return str(path)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for(condition: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.02)


# --- the front ---


def test_help_and_version() -> None:
    assert cli("--version").stdout == f"hfreduce {hfreduce.__version__}\n"
    done = cli()
    assert done.returncode == 2
    for command in ("perf", "run", "info", "config"):
        assert command in done.stdout
        assert cli(command, "--help").returncode == 0


def test_console_script() -> None:
    script = Path(sys.executable).with_name("hfreduce")
    if not script.exists():
        pytest.skip("hfreduce is not installed in this environment: no console script")
    assert subprocess.run([script, "--version"], capture_output=True, text=True, check=True).stdout.startswith("hfreduce ")


# --- run ---


def test_run_sets_the_environment(tmp_path: Path) -> None:
    path = program(
        tmp_path,
        "values = [os.environ['HFREDUCE_' + n] for n in ('NRANKS', 'ADDR', 'SECRET')]\n"
        "sys.stdout.write(' '.join([str(rank), *values, *sys.argv[1:]]) + '\\n')",
    )
    done = cli("run", "-n", "3", path, "-x", "--timeout", "5")
    assert done.returncode == 0, done.stderr
    lines = sorted(line.split() for line in done.stdout.splitlines())
    assert [line[0] for line in lines] == ["0", "1", "2"]
    assert len({tuple(line[1:]) for line in lines}) == 1
    nranks, address, secret, *rest = lines[0][1:]
    assert nranks == "3"
    assert re.fullmatch(r"127\.0\.0\.1:\d+", address)
    assert len(bytes.fromhex(secret)) == 16
    assert rest == ["-x", "--timeout", "5"]


def test_run_labels_output(tmp_path: Path) -> None:
    path = program(tmp_path, "print('one'); print('two', end=''); print('three', file=sys.stderr)")
    done = cli("run", "-n", "2", "-l", path)
    assert sorted(done.stdout.splitlines()) == ["[0] one", "[0] two", "[1] one", "[1] two"]
    assert sorted(done.stderr.splitlines()) == ["[0] three", "[1] three"]


PIECES = """
import random
dice, lines = random.Random(rank), []
for i in range(60):
    filler = bytes(dice.choices([9, 13, 65, 0, 255, 128], k=dice.choice([0, 1, 70, 5000, 5000, 300_000 if i % 20 == 7 else 3])))
    lines.append(b"%d %d %s\\n" % (rank, i, filler))
for i, line in enumerate(lines):
    while line:
        n = dice.randrange(1, 1 + max(2, len(line) // 2))
        n = min(n, os.write(1 + i % 2, line[:n]))
        line = line[n:]
os.write(1, b"the end of %d" % rank)
"""


@pytest.mark.parametrize("label", [False, True])
def test_run_forwards_whole_lines(tmp_path: Path, label: bool) -> None:
    """Ranks that write at the same time and in pieces, also binary data: both streams have each line whole, in each rank's order."""
    path = program(tmp_path, PIECES)
    patient = (
        "import sys; from hfreduce.cli import forward, main; forward.QUIET = forward.LATEST = 1e4; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", patient, "run", "-n", "4", *(["-l"] if label else []), path]
    done = subprocess.run(command, capture_output=True, timeout=100, check=True)
    for number, text in ((1, done.stdout), (2, done.stderr)):
        lines = text.split(b"\n")
        for rank in range(4):
            dice, expected = random.Random(rank), []
            for i in range(60):
                size = dice.choice([0, 1, 70, 5000, 5000, 300_000 if i % 20 == 7 else 3])
                expected.append(b"%d %d %s" % (rank, i, bytes(dice.choices([9, 13, 65, 0, 255, 128], k=size))))
            expected = expected[number - 1 :: 2] + ([b"the end of %d" % rank] if number == 1 else [])
            mine = b"[%d] " % rank if label else b""
            got = [line for line in lines if line.startswith((mine + b"%d " % rank, mine + b"the end of %d" % rank))]
            assert got == [mine + line for line in expected], f"rank {rank}, stream {number}"
        assert len([line for line in lines if line]) == 4 * (31 if number == 1 else 30)


def test_run_adds_no_line_end(tmp_path: Path) -> None:
    done = subprocess.run(
        [*HFREDUCE, "run", program(tmp_path, "os.write(1, b'x\\r\\nno end') if rank else None")],
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == b"x\r\nno end"


@pytest.mark.limit(30)
def test_run_shows_lines_that_have_not_ended(tmp_path: Path) -> None:
    """Progress bars and prompts are seen while they stand there; another rank's line does not go on behind them."""
    path = program(
        tmp_path,
        f"""
def wait_for(name):
    while not os.path.exists({str(tmp_path)!r} + name):
        time.sleep(0.01)
if rank == 0:
    os.write(1, b'\\r10%')
    wait_for('/seen')
    os.write(1, b'\\r20%')
    wait_for('/both')
    os.write(1, b'\\r30%\\n')
else:
    wait_for('/again')
    os.write(1, b'a line\\n')
""",
    )
    with subprocess.Popen([*HFREDUCE, "run", path], stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None
        try:
            for expected, name in (b"\r10%", "seen"), (b"\r20%", "again"), (b"\na line\n", "both"):
                assert launcher.stdout.read(len(expected)) == expected
                (tmp_path / name).touch()
            assert launcher.stdout.read() == b"\r30%\n"
            assert launcher.wait(20) == 0
        finally:
            launcher.kill()


@pytest.mark.limit(60)
@pytest.mark.parametrize("grandchild", ["sleep 300", "yes"])
def test_run_does_not_wait_for_grandchildren(tmp_path: Path, grandchild: str) -> None:
    path = program(
        tmp_path,
        "import subprocess\nif rank == 0:\n"
        f"    child = subprocess.Popen({grandchild.split()!r}, start_new_session=True)\n"
        "    os.write(2, b'%d\\n' % child.pid)\ntime.sleep(0.3)\nos.write(1, b'said last by %d\\n' % rank)",
    )
    with subprocess.Popen([*HFREDUCE, "run", path], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as launcher:
        out, err = launcher.communicate(timeout=40)
    pid = int(err)
    try:
        assert launcher.returncode == 0
        assert sorted(line for line in out.splitlines() if line.startswith(b"said")) == [b"said last by 0", b"said last by 1"]
        if grandchild == "yes":
            wait_for(lambda: gone(pid))  # nobody reads what it writes
    finally:
        if not gone(pid):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.limit(60)
def test_run_ends_when_nobody_reads(tmp_path: Path) -> None:
    path = program(tmp_path, "signal.signal(signal.SIGPIPE, signal.SIG_DFL)\nwhile True:\n    os.write(1, b'again\\n' * 1000)")
    with subprocess.Popen([*HFREDUCE, "run", path], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == b"again\n"
        launcher.stdout.close()
        try:
            assert launcher.wait(40) == 128 + signal.SIGPIPE
        finally:
            launcher.kill()


@pytest.mark.limit(60)
@pytest.mark.parametrize("nranks", [1, 3])
def test_run_on_a_terminal(tmp_path: Path, nranks: int) -> None:
    """Ranks under a launcher on a terminal write to one, too: programs show their lines as they write them."""
    path = program(tmp_path, "print(f'{rank} {sys.stdout.isatty()} {sys.stderr.isatty()}', flush=True)")
    ours, theirs = os.openpty()
    with subprocess.Popen([*HFREDUCE, "run", "-n", str(nranks), path], stdout=theirs, stderr=subprocess.DEVNULL) as launcher:
        os.close(theirs)
        text = b""
        with contextlib.suppress(OSError):  # EIO once the other side is closed
            while data := os.read(ours, 4096):
                text += data
        assert launcher.wait(20) == 0
    os.close(ours)
    assert sorted(text.splitlines()) == [b"%d True False" % rank for rank in range(nranks)], text


def test_run_passes_input_to_rank_0(tmp_path: Path) -> None:
    path = program(tmp_path, "sys.stdout.write(f'{rank} {sys.stdin.read()}\\n')")
    done = cli("run", path, input="hello")
    assert sorted(done.stdout.splitlines()) == ["0 hello", "1 "]


@pytest.mark.parametrize(("end", "status"), [("sys.exit(7)", 7), ("os.kill(os.getpid(), signal.SIGKILL)", 128 + 9)])
def test_run_returns_the_first_failing_status(tmp_path: Path, end: str, status: int) -> None:
    path = program(tmp_path, f"if rank == 1:\n    {end}\ntime.sleep(60)")
    start = time.monotonic()
    done = cli("run", "-n", "3", path)
    assert done.returncode == status
    assert "rank 1" in done.stderr
    assert time.monotonic() - start < 20


def test_run_kills_what_ignores_sigterm(tmp_path: Path) -> None:
    path = program(
        tmp_path,
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nos.write(1, b'%d\\n' % os.getpid())\nsys.exit(3) if rank else time.sleep(60)",
    )
    done = cli("run", path)
    assert done.returncode == 3
    assert all(gone(int(pid)) for pid in done.stdout.split())


def test_run_timeout(tmp_path: Path) -> None:
    done = cli("run", "--timeout", "0.5", program(tmp_path, "time.sleep(60)"))
    assert done.returncode == 124
    assert "not done after 0.5 s" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_run_forwards_signals(tmp_path: Path, number: int) -> None:
    path = program(
        tmp_path,
        f"signal.signal({int(number)}, lambda n, f: (os.write(1, b'got %d\\n' % n), sys.exit(5)))\nos.write(1, b'up\\n')\n"
        "time.sleep(60)",
    )
    with subprocess.Popen([*HFREDUCE, "run", "-n", "2", path], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        assert [launcher.stdout.readline() for _ in range(2)] == ["up\n"] * 2
        launcher.send_signal(number)
        assert launcher.stdout.read().count(f"got {int(number)}") == 2
        assert launcher.wait(20) == 5


def test_run_kills_at_the_third_signal(tmp_path: Path) -> None:
    path = program(
        tmp_path,
        "signal.signal(signal.SIGINT, lambda n, f: os.write(1, b'got it\\n'))\nos.write(1, b'up\\n')\n"
        "end = time.monotonic() + 60\nwhile time.monotonic() < end: time.sleep(1)",
    )
    with subprocess.Popen([*HFREDUCE, "run", "-n", "2", path], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        assert [launcher.stdout.readline() for _ in range(2)] == ["up\n"] * 2
        for _ in range(2):  # each is heard before the next is sent
            launcher.send_signal(signal.SIGINT)
            assert [launcher.stdout.readline() for _ in range(2)] == ["got it\n"] * 2
        launcher.send_signal(signal.SIGINT)
        assert launcher.stdout.read() == ""
        assert launcher.wait(20) == 128 + signal.SIGKILL


def test_run_ranks_die_with_it(tmp_path: Path) -> None:
    path = program(tmp_path, "os.write(1, b'%d\\n' % os.getpid())\ntime.sleep(60)")
    with subprocess.Popen([*HFREDUCE, "run", "-n", "2", path], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        pids = [int(launcher.stdout.readline()) for _ in range(2)]
        launcher.kill()
        launcher.wait()
        wait_for(lambda: all(gone(pid) for pid in pids))


def test_run_mistakes() -> None:
    assert cli("run", "-n", "0", "true").returncode == 2
    done = cli("run", "no-such-program")
    assert done.returncode == 127
    assert "not found" in done.stderr
    assert cli("run", "true").returncode == 0


def test_run_joins_a_communicator(tmp_path: Path) -> None:
    path = program(
        tmp_path,
        "import hfreduce, numpy as np\nwith hfreduce.init() as comm:\n"
        "    x = comm.all_reduce(np.ones(2, np.float32) * comm.rank)\n"
        "    sys.stdout.write(f'{comm.rank} {comm.nranks} {x.tolist()}\\n')",
    )
    done = cli("run", "-n", "3", "--timeout", "30", path)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"{r} 3 [3.0, 3.0]" for r in range(3)]


# --- perf ---


def rows_of(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("collective", list(collectives.COLLECTIVES))
def test_perf(collective: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = cli("perf", collective, "-b", "8", "-e", "64K", "-f", "8", "-n", "3", "-w", "1", "--ranks", "2", "--json", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(done.stdout)
    assert len(rows) == 5
    assert [int(row[0]) for row in rows] == [8, 64, 512, 4096, 32768]
    for row in rows:
        assert len(row) == 17
        assert row[2] == "float"
        assert row[3] == ("sum" if collectives.COLLECTIVES[collective].reduces else "none")
        assert row[4] == ("0" if collectives.COLLECTIVES[collective].rooted else "-1")
        assert row[8] == "0"
        assert row[12] == ("0" if collectives.COLLECTIVES[collective].in_place else "N/A")
    assert "# Out of bounds values : 0 OK" in done.stdout
    assert re.search(r"# Avg bus bandwidth    : \d", done.stdout)
    table = json.loads(out.read_text())["tables"][0]
    assert table["wrong"] == 0
    assert [row["size"] for row in table["rows"]] == [8, 64, 512, 4096, 32768]
    half = table["rows"][-1]["out_of_place"]
    assert half["busbw"] == pytest.approx(half["algbw"] * collectives.COLLECTIVES[collective].bus(2))
    assert half["p50"] <= half["p99"]


def test_perf_says_which_transport_ran(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    path = program(
        tmp_path,
        "os.environ['HFREDUCE_HOSTID'] = f'host{rank // 2}'\n"
        f"os.execv(sys.executable, [sys.executable, '-m', 'hfreduce', 'perf', 'all_reduce', '-b', '1M', '-e', '1M', '-n', '4', '-w', '1',"
        f" '--json', {str(out)!r}])",
    )
    done = cli("run", "-n", "4", path, env={**os.environ, "HFREDUCE_TRANSPORT": "tcp"})
    assert done.returncode == 0, done.stderr
    host = socket.gethostname().split(".")[0]
    assert re.search(
        rf"^# Transport            : tcp on {host}\S* 127\.0\.0\.1; [\d.]+ MB in \d+ messages, \d+ stalls, ", done.stdout, re.M
    )
    (tcp,) = json.loads(out.read_text())["traffic"]
    # two nodes exchange halves, or whole, of 10 operations' data, both ways
    assert tcp["transport"] == "tcp" and 10 << 20 <= tcp["bytes_sent"] <= 25 << 20, tcp


def test_perf_every_dtype_and_op() -> None:
    args = ["-d", "all", "-o", "all", "-b", "4K", "-e", "4K", "-n", "1", "-w", "0", "--ranks", "3"]
    done = cli("perf", "all_reduce", *args, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(done.stdout)
    dtypes = 12 if "bfloat16" in done.stdout else 9
    assert len(rows) == dtypes * 5
    assert {row[3] for row in rows} == set(hfreduce.OP_NAMES)


def test_perf_step_bytes_and_unchecked() -> None:
    done = cli("perf", "all_reduce", "-b", "1K", "-e", "3K", "-i", "1K", "-c", "0", "-n", "1", "-w", "0", "--ranks", "1")
    assert done.returncode == 0, done.stderr
    rows = rows_of(done.stdout)
    assert [row[0] for row in rows] == ["1024", "2048", "3072"]
    assert {row[8] for row in rows} == {"N/A"}


def test_benchmark_script_is_the_same() -> None:
    for name in collectives.COLLECTIVES:
        assert (BENCHMARKS / f"{name}_perf.py").exists()
    command = [sys.executable, str(BENCHMARKS / "all_gather_perf.py"), "-b", "8", "-e", "64", "-n", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "# all_gather" in done.stdout
    assert len(rows_of(done.stdout)) == 4


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-b", "8", "-e", "4"], "is less than -b"),
        (["-f", "1"], "is not greater than 1"),
        (["-i", "0"], "would never end"),
        (["-n", "0"], "-n must be at least 1"),
        (["-d", "float12"], "-d float12 is not one of"),
        (["-o", "mean"], "-o mean is not one of"),
        (["-b", "x"], "is not a size"),
        (["--ranks", "0"], "--ranks 0 is less than 1"),
        (["-r", "2", "-e", "8"], "-r 2 is not from 0 to 1"),
    ],
)
def test_perf_mistakes(args: list[str], message: str) -> None:
    done = cli("perf", "all_reduce", *args)
    assert done.returncode == 2
    assert message in done.stderr


def test_perf_finds_wrong_values(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from hfreduce.cli import main

    monkeypatch.setenv("HFREDUCE_RANK", "0")
    monkeypatch.setenv("HFREDUCE_NRANKS", "1")
    real = patterns.reduced

    def wrong(nranks: int, op: str, dtype: Any) -> Any:
        values = real(nranks, op, dtype).copy()
        values[1] += 1
        return values

    monkeypatch.setattr(patterns, "reduced", wrong)
    assert main(["perf", "all_reduce", "-b", "64", "-e", "64", "-n", "1"]) == 1
    out = capsys.readouterr().out
    assert "# Out of bounds values : 2 FAILED" in out
    assert rows_of(out)[0][8] == "1"


def test_plot(tmp_path: Path) -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        done = cli("perf", "all_reduce", "--plot", str(tmp_path / "x.png"))
        assert done.returncode == 2
        assert "pip install matplotlib" in done.stderr
        return
    assert cli("perf", "all_reduce", "-e", "64", "-n", "1", "--plot", str(tmp_path / "x.png")).returncode == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


# --- the patterns themselves ---


@pytest.mark.parametrize("nranks", [1, 2, 3, 7, 16, 17, 100])
@pytest.mark.parametrize("dtype", hfreduce.DTYPE_NAMES)
def test_patterns_are_exact_in_any_order(nranks: int, dtype: str) -> None:
    kind = types.numpy_dtype(hfreduce.DTYPE_NAMES.index(dtype))
    for op in ("sum", "prod", "max", "min"):
        total = None
        for rank in reversed(range(nranks)):
            values = patterns.reduced_input(rank, nranks, op, kind)
            if total is None:
                total = values
                continue
            with np.errstate(over="raise"):
                function = {"sum": np.add, "prod": np.multiply, "max": np.maximum, "min": np.minimum}[op]
                total = function(total, values).astype(kind)  # rounds after each rank
        assert total is not None
        assert patterns.wrong(total, patterns.reduced(nranks, op, kind)) == 0


def test_wrong_counts_elements() -> None:
    x = np.zeros(3 * patterns.PERIOD + 5, np.float32)
    pattern = patterns.moved(1, x.dtype)
    patterns.fill(x, pattern)
    assert patterns.wrong(x, pattern) == 0
    x[[0, patterns.PERIOD, -1]] = [99, 99, np.nan]
    assert patterns.wrong(x, pattern) == 3
    assert patterns.wrong(np.array([-0.0], np.float32), np.zeros(patterns.PERIOD, np.float32)) == 0


# --- info and config ---


def test_info() -> None:
    done = cli("info")
    assert done.returncode == 0, done.stderr
    for word in ("simd", "transport", "HFREDUCE_TIMEOUT", "seconds that an operation may take", "hfreduce.h"):
        assert word.lower() in done.stdout.lower()
    done = cli("info", "--json", env={**os.environ, "HFREDUCE_TIMEOUT": "12"})
    found = {p["name"]: p for p in json.loads(done.stdout)["parameters"]}
    assert float(found["HFREDUCE_TIMEOUT"]["value"]) == 12
    assert found["HFREDUCE_TIMEOUT"]["is_set"]
    assert all(p["help"] for p in found.values())


def test_info_names_each_interface_once() -> None:
    """Loopback alone has two addresses, 127.0.0.1 and ::1, where the kernel has IPv6."""
    done = cli("info", env={**os.environ, "HFREDUCE_SOCKET_IFNAME": "=none-such"})
    found = re.search(r'HFREDUCE_SOCKET_IFNAME="=none-such" admits no interface .*; there are: (.*)', done.stdout)
    assert found, done.stdout
    names = found.group(1).split()
    assert "lo" in names and len(names) == len(set(names)), names


def test_config_builds_a_c_program(tmp_path: Path) -> None:
    compiler = next((c for c in (os.environ.get("CC", "").split()[:1] or ["gcc"]) if shutil.which(c)), None)
    if compiler is None:
        pytest.skip("no C compiler")
    source = tmp_path / "version.c"
    source.write_text(
        "#include <hfreduce.h>\n#include <stdio.h>\n"
        "int main(void) { int v = 0; if (hfreduceGetVersion(&v)) return 1;"
        ' printf("%d\\n", v); return v != HFREDUCE_VERSION_CODE; }\n'
    )
    flags = cli("config", "--cflags", "--libs").stdout
    subprocess.run(f"{compiler} -Wall -Werror {source} -o {tmp_path}/version {flags}", shell=True, check=True)
    assert subprocess.run([tmp_path / "version"], capture_output=True, text=True, check=True).stdout == "100\n"
    everything = cli("config").stdout
    assert "includedir: " in everything
