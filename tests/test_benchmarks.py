"""The comparison harness of benchmarks/: that it runs, that its columns and ratios are right, and that it catches wrong values."""

from __future__ import annotations

import importlib.util
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks

import hfreduce

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import cells  # noqa: E402
import gradient_sizes  # noqa: E402
import limits  # noqa: E402
import measuring  # noqa: E402
import network  # noqa: E402
import peers  # noqa: E402
import targets  # noqa: E402

has_torch = importlib.util.find_spec("torch") is not None


def run(*command: str, status: int = 0) -> str:
    """A program of benchmarks/, with no launcher around it."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HFREDUCE_")}
    done = subprocess.run(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=100,
        check=False,
        cwd=BENCHMARKS,
        env=env,
    )
    assert done.returncode == status, f"status {done.returncode}\n{done.stdout}"
    return done.stdout


def tables(text: str) -> list[list[list[str]]]:
    """The Markdown tables in a text: rows of columns, the title row first."""
    found: list[list[list[str]]] = []
    inside = False
    for line in text.splitlines():
        if not line.startswith("|"):
            inside = False
            continue
        if not inside:
            found.append([])
        inside = True
        if not set(line) <= set("|- "):
            found[-1].append([column.strip() for column in line.strip("|").split("|")])
    return found


# --- compare ---


def test_compare(tmp_path: Path) -> None:
    """Every collective and datatype, hfreduce on both kinds of memory and Gloo: rows, ratios and JSON agree."""
    path = tmp_path / "found.json"
    sizes = ["8", "64K"]
    options = ["--rounds", "2", "--batch", "0", "--collectives", "all", "--dtypes", "float32", "float16", "--sizes", *sizes]
    text = run("compare.py", "--ranks", "2", *options, "--libraries", "hfreduce", "numpy", "gloo", "--json", str(path))
    found = json.loads(path.read_text())["cells"]
    assert len(found) == (len(measuring.COLLECTIVES) - 1) * 2 * len(sizes) + 1
    blocks = tables(text)
    assert len(blocks) == (len(measuring.COLLECTIVES) - 1) * 2 + 1, text
    libraries = ["hfreduce", "numpy", *(["gloo"] if has_torch else [])]
    for block in blocks:
        assert block[0] == cells.head(libraries), text
    rows = [row for block in blocks for row in block[1:]]
    for cell, row in zip(found, rows):
        (one,) = cell["runs"]
        assert set(one["times"]) == set(libraries) and all(len(times) == 2 and min(times) > 0 for times in one["times"].values())
        columns = dict(zip(cells.head(libraries), row))
        assert columns["size"] == measuring.human(cell["size"])
        assert (one["limit"] is not None) == (cell["size"] >= limits.SMALLEST) == bool(columns["limit"])
        if has_torch:
            ratio = float(np.median(one["times"]["numpy"]) / np.median(one["times"]["gloo"]))
            assert float(columns["numpy / peer"]) == pytest.approx(ratio, abs=0.006)
            assert columns["best peer"] == "gloo"


def test_compare_judges(tmp_path: Path) -> None:
    """Targets that were measured are judged, the others are said not to be; --strict makes a missed one the exit status."""
    path = tmp_path / "found.json"
    options = ["--rounds", "1", "--batch", "0", "--sizes", "1K", "--libraries", "numpy", "gloo", "--targets"]
    text = run("compare.py", *options, "--json", str(path))
    (judged,) = tables(text)[1:]
    assert judged[0] == ["target", "where", "ratio", "to", "at most", ""]
    assert {row[5] for row in judged[1:] if row[1] == ""} == {"not measured"}
    assert len(json.loads(path.read_text())["targets"]) == int(has_torch)


def mpiruns() -> list[str]:
    """Those beside this Python, and of MPICH in $HFREDUCE_TEST_MPICH, if mpi4py is there, too."""
    folders = [str(Path(sys.executable).parent), os.environ.get("HFREDUCE_TEST_MPICH", "")]
    found = [str(Path(folder) / "mpirun") for folder in folders if folder and (Path(folder) / "mpirun").exists()]
    return found if importlib.util.find_spec("mpi4py") is not None else []


def test_compare_launchers(tmp_path: Path) -> None:
    """Several launchers and rank counts make one table, with each MPI in its column."""
    launchers = mpiruns()
    if not launchers:
        pytest.skip("no mpirun and mpi4py beside this Python")
    path = tmp_path / "found.json"
    options = ["--ranks", "2", "3", "--rounds", "1", "--batch", "0", "--sizes", "1K", "--libraries", "numpy", "mpi"]
    text = run("compare.py", "--mpirun", *launchers, *options, "--json", str(path))
    found = json.loads(path.read_text())
    assert [(cell["nranks"], len(cell["runs"])) for cell in found["cells"]] == [(2, len(launchers)), (3, len(launchers))]
    names = cells.names(found["cells"])
    assert len(names) == 1 + len(launchers) and names[0] == "numpy" and "mpi" not in names
    assert [block[0] for block in tables(text)][-2:] == [cells.head(names)] * 2
    for one in found["cells"]:
        for run_of_one, launcher in zip(one["runs"], launchers):
            assert len(run_of_one["times"]) == 2, f"{launcher}: {run_of_one['times']}"


def test_compare_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.png"
    run("compare.py", "--rounds", "1", "--batch", "0", "--sizes", "64K", "128K", "--libraries", "numpy", "--plot", str(path))
    assert path.read_bytes().startswith(b"\x89PNG")


def test_compare_refuses() -> None:
    assert "--rounds" in run("compare.py", "--rounds", "0", status=2)
    assert "no such program" in run("compare.py", "--mpirun", "/nowhere/mpirun", status=1)
    assert "neither Open MPI's nor MPICH's" in run("compare.py", "--mpirun", "/bin/true", status=1)


class Faulty(peers.Hfreduce):
    """A library that gives wrong values: on rank `who` the last element of a collective's result, or a barrier that does not wait."""

    def __init__(self, comm: hfreduce.Communicator, who: int) -> None:
        super().__init__(comm, plain=True)
        self.name, self.who = "faulty", who

    def bind(self, collective: str, dtype: str, send: Any, recv: Any) -> peers.Call:
        right = super().bind(collective, dtype, send, recv)
        if self.comm.rank != self.who:
            return (lambda: None) if collective == "barrier" else right
        if collective == "barrier":
            return lambda: None

        def wrong() -> object:
            right()
            recv[-1] ^= 0x40
            return recv

        return wrong


def inject(comm: hfreduce.Communicator, collective: str, who: int) -> list[Any]:
    """What the harness finds of a faulty library beside a right one."""
    import compare

    libraries = [peers.Hfreduce(comm, True), Faulty(comm, who)]
    cell, complaints = compare.measure_cell(comm, libraries, (collective, "float32", 1000), 1, 0.0)
    return [sorted(cell["runs"][0]["times"]), complaints]


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("collective", measuring.COLLECTIVES)
def test_wrong_values_are_caught(collective: str, who: int) -> None:
    """On any rank, and all ranks learn of it; the library's times do not get into the table."""
    if collective == "reduce" and who == 1:
        pytest.skip("only the root has a result")
    for names, complaints in ranks.run_ranks(inject, 2, collective, who):
        assert names == ["numpy"]
        (complaint,) = complaints
        assert complaint.startswith(f"faulty, {collective} of float32") and "WRONG" in complaint


# --- overlap ---

LAUNCH = ["-m", "hfreduce", "run", "-n", "2"]


def test_overlap(tmp_path: Path) -> None:
    """All three tables: their rows, and ratios that follow from the times."""
    path = tmp_path / "found.json"
    options = ["--rounds", "2", "--launch-sizes", "8", "--overlap-sizes", "64K", "--tensors", "9", "--json", str(path)]
    text = run(*LAUNCH, str(BENCHMARKS / "overlap.py"), *options, "--libraries", "hfreduce", "numpy")
    launch, overlap, tensors = tables(text)
    assert launch[0] == ["library, size", "launch", "launch, on the CPU", "launch and wait", "target"]
    assert overlap[0] == ["library, size", "compute alone", "communication alone", "both", "hidden"]
    assert tensors[0] == ["model, memory, way", "ms", "of fused", "target"]
    assert [row[0] for row in launch[1:]] == ["hfreduce, 8 B", "numpy, 8 B"]
    assert "at most 3 us" in launch[1][4] and launch[2][4] == ""
    assert len(overlap) == 1 + 2 and len(tensors) == 1 + 2 * 2 * 3
    found = json.loads(path.read_text())
    for one in found["launch"]:
        assert all(0 < launched <= whole for launched, whole in zip(one["launch_us"], one["whole_us"])), one
    for one in found["overlap"]:
        a, b, c = (float(np.median(times)) for times in one["ms"])
        assert one["hidden"] == pytest.approx((a + b - c) / min(a, b))
    by_way = {(one["model"], one["memory"], one["way"]): one for one in found["tensors"]}
    fused = by_way["resnet50", "numpy", "one fused buffer"]
    grouped = by_way["resnet50", "numpy", "one by one in a group"]
    assert grouped["of_fused"] == pytest.approx(np.median(grouped["ms"]) / np.median(fused["ms"]))
    verdicts = [row[3] for row in tensors[1:]]
    assert sum("at most 1.15" in verdict for verdict in verdicts) == 2 * 2


def test_launch_times() -> None:
    """A launch that sleeps takes time by the clock, but not the caller's CPU; waiting counts only as a whole."""
    import overlap

    launched, cpu, whole = overlap.launch_step(lambda: (time.sleep(0.01), lambda: time.sleep(0.02))[1], 4)
    assert cpu < 0.005 < 0.01 <= launched < 0.03 <= whole


class FaultyStart(peers.Hfreduce):
    """A library whose asynchronous all_reduce forgets the last element."""

    def start(self, dtype: str, buffer: Any) -> Any:
        return super().start(dtype, buffer[:-4])


def start_faulty(comm: hfreduce.Communicator) -> str:
    import overlap

    assert overlap.checked_start(comm, peers.Hfreduce(comm, True), 1024) is not None
    try:
        overlap.checked_start(comm, FaultyStart(comm, True), 1024)
    except SystemExit as error:
        return str(error)
    return ""


def test_overlap_checks_sums() -> None:
    assert ranks.run_ranks(start_faulty, 2) == ["overlap: numpy gives a wrong sum of 1024 bytes"] * 2


def check_gradients(comm: hfreduce.Communicator, spoil: str) -> str:
    import overlap

    fused, single = overlap.gradients(comm, [(3, 5), (7,)], True)
    comm.all_reduce(fused)
    for tensor in single:
        comm.all_reduce(tensor)
    if comm.rank == 1 and spoil:
        (fused[:1] if spoil == "fused" else single[-1][-1:])[...] += np.float32(1e-3)
    try:
        overlap.check_sums(comm, fused, single)
    except SystemExit as error:
        return str(error)
    return ""


@pytest.mark.parametrize("spoil", ["", "fused", "tensor"])
def test_overlap_checks_gradients(spoil: str) -> None:
    """A thousandth too much in one element, on one rank, stops all."""
    assert ranks.run_ranks(check_gradients, 2, spoil) == ["overlap: wrong sums of the gradients" if spoil else ""] * 2


def test_gradient_sizes() -> None:
    """As the published models have them."""
    sizes = {name: (len(make()), sum(map(gradient_sizes.count, make()))) for name, make in gradient_sizes.MODELS.items()}
    assert sizes == {"resnet50": (161, 25_557_032), "gpt2-small": (148, 124_439_808)}


# --- cost ---


def test_cost(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    options = ["--rounds", "2", "--batch", "1", "--sizes", "64K", "1M", "--memory-size", "1M", "--json", str(path)]
    text = run(*LAUNCH, str(BENCHMARKS / "cost.py"), *options, "--libraries", "hfreduce", "numpy")
    memory, cpu = tables(text)
    assert memory[0][:3] == ["library", "open, peak MiB", "open, stays MiB"] and len(memory) == 3
    assert cpu[0] == [
        "library, size",
        "us a call",
        "CPU s a GB, all ranks",
        "cores busy",
        "bytes a byte, derived",
        "bytes a byte, missed",
    ]
    assert [row[0] for row in cpu[1:]] == ["hfreduce, 64 KiB", "numpy, 64 KiB", "hfreduce, 1 MiB", "numpy, 1 MiB"]
    assert [row[4] for row in cpu[1:]] == ["", "", "4.50", "4.50"]
    for row in json.loads(path.read_text())["cpu"]:
        busy = row["cores_busy"]
        assert 0 < busy < 4, row  # two ranks, the progress threads beside them


class Hungry(peers.Hfreduce):
    """A library that takes `extra` bytes for the time of each call."""

    extra = 24 << 20

    def bind(self, collective: str, dtype: str, send: Any, recv: Any) -> peers.Call:
        right = super().bind(collective, dtype, send, recv)

        def call() -> object:
            np.full(self.extra, 1, np.uint8)
            return right()

        return call


def measure_memory(comm: hfreduce.Communicator) -> list[Any]:
    import cost

    first = cost.calls_peak(peers.Hfreduce(comm, True), 1 << 20)
    hungry = cost.calls_peak(Hungry(comm, True), 1 << 20)

    def take() -> mmap.mmap:
        pages = [mmap.mmap(-1, size << 20) for size in (8, 16)]
        for page in pages:
            np.frombuffer(page, np.uint8)[...] = 1
        return pages[0]

    kept, peak, stays = cost.peak_of(take)
    kept.close()
    return [cost.reset_peak(), first, hungry, peak, stays]


def test_cost_sees_memory() -> None:
    """What a call takes shows in the peak even if it gives it back; what stays is told apart."""
    for resets, first, hungry, peak, stays in ranks.run_ranks(measure_memory, 1):
        if not resets:
            pytest.skip("VmHWM cannot be reset here")
        assert first < 8, "hfreduce's own"
        assert 20 < hungry - max(first, 0) < 30
        assert 22 < peak < 27 and 6 < stays < 10


def touch_pages(rank: int) -> float:
    import threading

    import cost

    counter = cost.Counter(*cost.Counter.PAGE_FAULTS)
    pages = mmap.mmap(-1, 500 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_NOHUGEPAGE)

    def touch() -> None:
        for page in range(500):
            pages[page * mmap.PAGESIZE] = 1

    thread = threading.Thread(target=touch)
    thread.start()
    thread.join()
    seen = counter.read()
    counter.close()
    return seen


def test_cost_counts_events() -> None:
    """Of a thread that was started later, too."""
    (outcome,) = ranks.run_ranks(touch_pages, 1, comm=False, check=False)
    if isinstance(outcome.error, OSError):
        pytest.skip(f"no perf events here: {outcome.error}")
    assert outcome.ok, outcome
    assert 500 <= outcome.value < 2000


# --- network ---


def setup_row(part: str, hosts: int, per_host: int, size: int, ours: float, gloo: float, wire: float = 0.0) -> dict[str, Any]:
    rate = "" if part == "unshaped" else "500mbit"
    row = {"part": part, "hosts": hosts, "per_host": per_host, "rate": rate, "size": size}
    limit = network.limit(network.Setup(part, hosts, per_host, rate, ()), size)
    return {**row, "times": {"hfreduce": [ours], "gloo": [gloo]}, "wire": {"hfreduce": wire, "gloo": 0.0}, "limit": limit}


def test_network_limit() -> None:
    """62.5 MB/s: 16 MiB among four hosts, 24 MiB out of each."""
    setup = network.Setup("shaped", 4, 1, "500mbit", ())
    assert network.limit(setup, 16 << 20) == pytest.approx((24 << 20) / 62.5)
    assert network.limit(setup._replace(rate=""), 8) is None
    assert network.bytes_per_second("10gbit") == 1.25e9
    with pytest.raises(ValueError, match="not a rate"):
        network.bytes_per_second("fast")


def test_network_judges() -> None:
    big = 16 << 20
    least = 2 * big * 7 / 8 / 62.5
    rows = [
        setup_row("shaped", 8, 1, big, 1.07 * least, least),
        setup_row("shaped", 8, 1, 8, 31.0, 100.0),
        setup_row("shaped", 4, 1, big, 1e9, 1.0, wire=1000.0),
        setup_row("wire", 4, 2, big, 1.0, 1.0, wire=1021.0),
        setup_row("unshaped", 2, 1, 8, 0.7, 1.0),
    ]
    found = {tuple(one.strip() for one in line.split("|")[1:3]): line.split("|")[-2].strip() for line in network.judge(rows)[2:]}
    assert found == {
        ("shaped, 16 MiB beside the limit", "8 hosts, 16 MiB"): "met",
        ("shaped, 16 MiB beside the limit", "4 hosts, 16 MiB"): "MISSED",
        ("shaped, 8 hosts, 8 B and 64 KiB", "8 hosts, 8 B"): "MISSED",
        ("not shaped, every size", "2 hosts, 8 B"): "met",
        ("bytes on the wire, 4 hosts of 2 ranks", "16 MiB"): "MISSED",
    }
    assert all("not measured" in line for line in network.judge([])[2:])


def need_hosts() -> None:
    if os.geteuid():
        pytest.skip("network namespaces need root")
    tool = network.load_hosts()
    try:
        tool.Hosts(2).close()
    except tool.HostsError as error:
        pytest.skip(f"no network namespaces with a bridge here: {error}")


@pytest.mark.parametrize("libraries", [["hfreduce", "gloo"], ["numpy", "openmpi"]])
def test_network(libraries: list[str], tmp_path: Path) -> None:
    """Two hosts; a shaped link is as slow as it should be, and what goes over it is counted."""
    need_hosts()
    path = tmp_path / "found.json"
    options = ["--parts", "shaped", "--hosts", "2", "--rate", "200mbit", "--sizes", "8", "2M", "--rounds", "1", "--targets"]
    text = run("network.py", *options, "--libraries", *libraries, "--json", str(path))
    took, judged = tables(text)
    small, large = json.loads(path.read_text())["rows"]
    here = [name for name in libraries if name in large["times"]]
    assert took[0] == network.columns(here)
    assert [row[0] for row in took[1:]] == ["2 x 1, 200mbit, 8 B", "2 x 1, 200mbit, 2 MiB"]
    assert len(judged) == 1 + len(network.AIMS) + 1
    for name in here:
        assert min(large["times"][name]) > 0.8 * large["limit"], "faster than the link"
        assert large["wire"][name] > 0.99 * 2 * large["size"], "less than must have gone over the wire"
    assert large["wire"][here[0]] < 1.1 * 2 * large["size"], "hfreduce sends too much"
    assert set(small["times"]) == set(here)
    if libraries[1] not in here:
        assert f"# {libraries[1]}: left out: " in text, text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("library", ["hfreduce", "openmpi"])
def test_network_leaves_nothing(library: str, number: signal.Signals, tmp_path: Path) -> None:
    """No process, and so no namespace, when it is ended in the middle; whoever started the ranks."""
    need_hosts()
    name, value = "NETWORK_TEST_MARK", f"{os.getpid()}-{library}-{int(number)}"
    mark = f"{name}={value}"
    options = ["--parts", "shaped", "--hosts", "2", "--sizes", "64M", "--rounds", "100", "--libraries", *{"numpy", library}]
    command = [sys.executable, str(BENCHMARKS / "network.py"), *options]
    env = {**os.environ, name: value, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
    ) as process:
        try:
            wait_until(lambda: sum(b"--as-rank" in line and b"mpirun" not in line for line in marked(mark).values()) >= 2, 60)
            process.send_signal(number)
            assert process.wait(20) == (130 if number == signal.SIGTERM else -number)
            wait_until(lambda: not marked(mark), 10)
        finally:
            process.kill()
            left = marked(mark)
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        assert not left, left


def marked(mark: str) -> dict[int, bytes]:
    """Command lines of the processes, by id, that have the mark in their environment."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_bytes()
        except OSError:
            pass
    return found


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not after {seconds} s"
        time.sleep(0.05)


# --- what is made of the times ---


def cell(size: int, times: dict[str, list[float]], limit: float | None = None, **more: Any) -> cells.Cell:
    what = {"collective": "all_reduce", "dtype": "float32", "size": size, "nranks": 2} | more
    return {**what, "runs": [{"times": times, "limit": limit, "calls": {}, "kernels": {}}]}


def test_ratios() -> None:
    """To the best peer of the same run; of several runs the worst."""
    first = cell(8, {"hfreduce": [1.0, 2.0, 3.0], "openmpi": [4.0, 4.0, 9.0], "gloo": [100.0] * 3}, limit=0.5)
    second = cell(8, {"hfreduce": [6.0, 6.0, 6.0], "mpich": [8.0] * 3, "gloo": [7.0] * 3}, limit=3.0)
    assert cells.of_peer(first, "hfreduce") == (0.5, "openmpi")
    assert cells.of_limit(first, "hfreduce") == (4.0, "limit")
    assert cells.of_peer(first, "numpy") is None
    (merged,) = cells.merge([[first], [second]])
    assert cells.of_peer(merged, "hfreduce") == (6 / 7, "gloo")
    assert cells.of_limit(merged, "hfreduce") == (4.0, "limit")
    assert cells.names([merged]) == ["hfreduce", "openmpi", "mpich", "gloo"]
    assert len(cells.pooled(merged, "gloo")) == 6 and len(first["runs"]) == 1


def test_verdicts() -> None:
    """A ratio of exactly the aim meets it; an average is taken over all sizes and collectives."""
    found = [
        cell(4 << 20, {"numpy": [0.85], "hfreduce": [0.46], "gloo": [1.0]}),
        cell(64 << 20, {"numpy": [0.26], "gloo": [1.0]}, limit=0.2),
        cell(8, {"numpy": [1.1], "gloo": [1.0]}, collective="broadcast"),
        cell(8, {"numpy": [0.1], "gloo": [1.0]}, collective="reduce"),
    ]
    met = {(one.target.what, one.where.split()[0]): one.met for one in targets.judge(found)}
    assert met == {
        ("all_reduce, 4 MiB", "all_reduce"): True,
        ("all_reduce, 4 MiB, hfreduce.empty", "all_reduce"): False,
        ("all_reduce, 64 MiB", "all_reduce"): False,
        ("all_reduce beside the limit, 64 MiB", "all_reduce"): True,
        ("moving and reduce, each", "broadcast"): False,
        ("moving and reduce, each", "reduce"): True,
        ("moving and reduce, on average", "mean"): True,
    }
    assert "all_reduce of 16-bit floats, 1 MiB | | | | 0.3 | not measured" in "\n".join(targets.lines(targets.judge(found)))


def test_the_suite_covers_the_targets() -> None:
    """What --targets measures by itself leaves no target without a verdict."""
    found = [
        cell(
            size, {"numpy": [1.0], "hfreduce": [1.0], "gloo": [1.0]}, limit=1.0, collective=collective, dtype=dtype, nranks=nranks
        )
        for nranks in (2, 4, 8)
        for collective, dtype, size in targets.suite(nranks)
    ]
    assert {one.target.what for one in targets.judge(found)} == {target.what for target in targets.TARGETS}
    assert targets.suite(3) == []


def measure_naps(comm: hfreduce.Communicator) -> list[float]:
    """Rank 1 begins its batch 200 ms after rank 0; each takes 10 ms."""
    turns = iter(range(100))

    def barrier() -> None:
        comm.barrier()
        if next(turns) % 2 and comm.rank:
            time.sleep(0.2)

    def nap() -> None:
        time.sleep(0.01)

    plain = [measuring.Entry("plain", nap, barrier)]
    alone = [measuring.Entry("alone", nap, barrier, alone=True)]
    return [float(measuring.measure(comm, entry, 1, 0.0)[0][0, 0]) for entry in (plain, alone)]


def test_measure() -> None:
    """The slowest rank's time; of calls that wait for nobody, from the first begin to the last end."""
    for plain, alone in ranks.run_ranks(measure_naps, 2):
        assert 10_000 <= plain < 150_000 < alone


def measure_counts(comm: hfreduce.Communicator) -> list[Any]:
    """A call of 20 ms (on the slower rank) in batches of 90 ms, beside a counter of calls."""
    calls = [0]

    def call() -> None:
        calls[0] += 1
        time.sleep(0.02 if comm.rank else 0.005)

    times, counts, grown = measuring.measure(
        comm, [measuring.Entry("nap", call, comm.barrier)], 3, 0.09, [lambda: float(calls[0])]
    )
    return [counts, times.shape, grown.tolist()]


def test_measure_counts() -> None:
    """All ranks make as many calls as the slowest takes in a batch; a counter is given by call."""
    (first, second) = ranks.run_ranks(measure_counts, 2)
    assert first == second
    (count,), shape, grown = first
    assert 2 <= count <= 4 and shape == (1, 3)
    assert grown == [[[1.0]] * 3]


def test_limit() -> None:
    """Two ranks, 1000 bytes: a copy moves 4000 bytes, an addition 6000; the faster counts."""
    times = {limits.COPY: [2.0, 1.0, 3.0], limits.ADD: [2.0, 2.0, 2.0]}
    assert limits.bandwidth(times, 1000, 2) == 3000
    least = {"all_reduce": 4, "all_to_all": 4, "all_gather": 3, "reduce_scatter": 3, "reduce": 3, "broadcast": 2, "barrier": 0}
    assert {name: limits.least_bytes(name, 1000, 2) / 1000 for name in measuring.COLLECTIVES} == least
    assert limits.limit("all_reduce", times, 1000, 2) == 4000 / 3000


def test_sizes() -> None:
    """Whole elements, at least one of each part."""
    assert measuring.whole_size("all_reduce", "float32", 8, 8) == 8
    assert measuring.whole_size("all_gather", "float32", 8, 8) == 32
    assert measuring.whole_size("all_to_all", "float16", 1000, 3) == 996
    assert measuring.whole_size("barrier", "float32", 8, 8) == 0
    assert [measuring.human(size) for size in (8, 1000, 1024, 1536, 64 << 20)] == ["8 B", "1000 B", "1 KiB", "1536 B", "64 MiB"]
