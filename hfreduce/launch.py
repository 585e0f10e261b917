"""init(): a communicator over the ranks that a launcher started, found from its environment variables.

The first launcher whose variables are there counts:

1. HFREDUCE_RANK, HFREDUCE_NRANKS, HFREDUCE_ADDR (host:port of rank 0), HFREDUCE_SECRET (hex; without it only a loopback
   address is accepted). `hfreduce run` sets them, or you do.
2. torchrun: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT. The unique id travels through the process group's store if
   torch.distributed is initialised, else through the agent's TCPStore; whoever can reach that can read the id and join, unless
   HFREDUCE_SECRET is set on all ranks, which encrypts it. Without either (variables set by hand, or no torch)
   rank 0 listens on MASTER_ADDR at MASTER_PORT + 1, and HFREDUCE_SECRET is needed unless that is loopback.
3. Open MPI: OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_SIZE.
4. MPICH and its kin (Hydra): PMI_RANK, PMI_SIZE. As with Open MPI: if the program has initialised mpi4py, the id is
   broadcast over MPI.COMM_WORLD; else, if all ranks are on this machine, it is handed over in a file that only this user
   can read (no MPI is initialised then); else mpi4py is imported and used.
5. Slurm's srun: SLURM_PROCID, SLURM_STEP_NUM_TASKS. On one machine through such a file. On several, rank 0 listens on the
   step's first host at a port made from the job's number, and HFREDUCE_SECRET must be in the environment:
   `export HFREDUCE_SECRET=$(openssl rand -hex 16)` before srun.

In 2 to 5 HFREDUCE_ADDR and HFREDUCE_SECRET, if set, go first: the launcher then only says rank and size. None of these: a
single rank.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from hfreduce import arguments, sealing
from hfreduce._ffi import lib
from hfreduce.communicator import Communicator
from hfreduce.errors import DeadlineError, InvalidArgumentError, InvalidUsageError
from hfreduce.params import default_timeout, join_timeout, warn_after
from hfreduce.unique_id import UniqueId, get_unique_id

Environment = Mapping[str, str]
_T = TypeVar("_T")

# Calls of init in this process so far: the n-th call of each rank belongs together.
_calls = 0


class Launch(NamedTuple):
    """What a launcher's variables say. local: all ranks are on this machine. job: text that tells this job from others."""

    launcher: str
    rank: int
    nranks: int
    local: bool
    job: str


def init(timeout: float | None = None) -> Communicator:
    """Make the communicator of all ranks that the launcher started; without a launcher, of this process alone. Collective.

    timeout: seconds that an operation may take (None: HFREDUCE_TIMEOUT, else 1800); joining may take HFREDUCE_JOIN_TIMEOUT
    seconds (300), and no more than timeout. It may be called more than once, by all ranks alike. Launchers and how the ranks find each other: see the module hfreduce.launch.
    InvalidArgumentError for variables that make no sense, InvalidUsageError if the ranks have no way to find each other
    (the message says what to set); else as Communicator.
    """
    global _calls
    tag, _calls = _calls, _calls + 1
    seconds = default_timeout() if timeout is None else arguments.seconds(timeout)
    launch = detect(os.environ)
    if launch.nranks == 1:
        return Communicator(0, 1, timeout=seconds)
    address = os.environ.get("HFREDUCE_ADDR", "")
    if address:
        return _join(launch, UniqueId.from_address(address, os.environ.get("HFREDUCE_SECRET", ""), tag), seconds)
    if launch.launcher == "torchrun":
        return _init_torchrun(launch, tag, seconds)
    if launch.launcher in ("Open MPI", "MPICH"):
        mpi = _initialised_mpi(launch)
        if mpi is None and launch.local:
            return _init_file(launch, tag, seconds)
        return _init_mpi(launch, mpi if mpi is not None else _import_mpi(launch), seconds)
    if launch.launcher == "Slurm":
        if launch.local:
            return _init_file(launch, tag, seconds)
        return _init_slurm(launch, tag, seconds)
    raise InvalidUsageError("HFREDUCE_ADDR: not set; it is host:port of rank 0, the same on all ranks")


# --- which launcher ---


def detect(env: Environment) -> Launch:
    """Find the launcher, rank and number of ranks in environment variables.

    InvalidArgumentError if they are incomplete or make no sense.
    """
    for find in (_find_own, _find_torchrun, _find_openmpi, _find_mpich, _find_slurm):
        launch = find(env)
        if launch is not None:
            if launch.nranks < 1:
                raise InvalidArgumentError(f"{launch.launcher}: the number of ranks is {launch.nranks}")
            if not 0 <= launch.rank < launch.nranks:
                raise InvalidArgumentError(f"{launch.launcher}: rank {launch.rank} is not from 0 to {launch.nranks - 1}")
            return launch
    return Launch("none", 0, 1, True, "")


def _number(env: Environment, name: str, preset: int | None = None) -> int:
    value = env.get(name, "")
    if not value and preset is not None:
        return preset
    try:
        return int(value)
    except ValueError:
        why = f"{value!r} is not an integer" if value else "is not set, although the launcher's other variables are"
        raise InvalidArgumentError(f"{name}: {why}") from None


def _find_own(env: Environment) -> Launch | None:
    if env.get("HFREDUCE_RANK", "-1") in ("", "-1") and env.get("HFREDUCE_NRANKS", "-1") in ("", "-1"):
        return None
    return Launch("HFREDUCE_RANK", _number(env, "HFREDUCE_RANK"), _number(env, "HFREDUCE_NRANKS"), False, "")


def _find_torchrun(env: Environment) -> Launch | None:
    if not all(env.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
        return None
    nranks = _number(env, "WORLD_SIZE")
    job = f"{env.get('TORCHELASTIC_RUN_ID', '')}/{env.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return Launch("torchrun", _number(env, "RANK"), nranks, _number(env, "LOCAL_WORLD_SIZE", 0) == nranks, job)


def _find_openmpi(env: Environment) -> Launch | None:
    if "OMPI_COMM_WORLD_RANK" not in env:
        return None
    nranks = _number(env, "OMPI_COMM_WORLD_SIZE")
    job = env.get("PMIX_NAMESPACE") or env.get("OMPI_MCA_ess_base_jobid", "")
    return Launch(
        "Open MPI", _number(env, "OMPI_COMM_WORLD_RANK"), nranks, _number(env, "OMPI_COMM_WORLD_LOCAL_SIZE", 0) == nranks, job
    )


def _find_mpich(env: Environment) -> Launch | None:
    if "PMI_RANK" not in env or "PMI_SIZE" not in env:
        return None
    local = env.get("MPI_LOCALNRANKS", "")
    if not local and "SLURM_STEP_ID" in env:
        return None  # srun --mpi=pmi2: Slurm's own variables say more
    nranks = _number(env, "PMI_SIZE")
    job = env.get("PMI_JOBID", "") or _slurm_job(env)
    return Launch("MPICH", _number(env, "PMI_RANK"), nranks, local == str(nranks), job)


def _find_slurm(env: Environment) -> Launch | None:
    # A batch script's own shell has SLURM_PROCID and SLURM_NTASKS too; only what srun started has a step with a number of tasks.
    if "SLURM_PROCID" not in env or "SLURM_STEP_ID" not in env:
        return None
    nranks = _number(env, "SLURM_STEP_NUM_TASKS", _number(env, "SLURM_NTASKS", 1))
    nodes = _number(env, "SLURM_STEP_NUM_NODES", _number(env, "SLURM_NNODES", 0))
    return Launch("Slurm", _number(env, "SLURM_PROCID"), nranks, nodes == 1, _slurm_job(env))


def _slurm_job(env: Environment) -> str:
    return ".".join(env.get(f"SLURM_{name}", "") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT")).strip(".")


def _join(launch: Launch, unique_id: UniqueId, timeout: float) -> Communicator:
    return Communicator(launch.rank, launch.nranks, unique_id, timeout=timeout)


def _make_id(launch: Launch) -> UniqueId:
    return get_unique_id(local=launch.local)


# --- torchrun ---


def _init_torchrun(launch: Launch, tag: int, timeout: float) -> Communicator:
    store = _torch_store(timeout)
    if store is None:
        host, port = os.environ["MASTER_ADDR"], _number(os.environ, "MASTER_PORT")
        port = port + 1 if port < 65535 else port - 1  # MASTER_PORT itself is for torch.distributed
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return _join(launch, UniqueId.from_address(address, os.environ.get("HFREDUCE_SECRET", ""), tag), timeout)
    key = f"hfreduce/{launch.job}/{tag}"
    if launch.rank == 0:
        unique_id = _make_id(launch)
        store.set(key, sealing.to_text(unique_id, sealing.job_key()))
    else:
        unique_id = sealing.from_text(text_in_store(store, key, launch.rank, join_timeout(timeout)), sealing.job_key())
    return _join(launch, unique_id, timeout)


def _torch_store(timeout: float) -> Any:
    """The store of an initialised process group, else a client of the torchrun agent's store, else None."""
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if "torch" not in sys.modules and not agent:
        return None
    try:
        import torch.distributed as dist
    except ImportError:
        return None
    if not dist.is_available():
        return None
    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    if not agent:
        return None
    from datetime import timedelta

    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        _number(os.environ, "MASTER_PORT"),
        is_master=False,
        timeout=timedelta(seconds=join_timeout(timeout)),
    )


# --- MPI ---


def _initialised_mpi(launch: Launch) -> Any:
    """mpi4py's MPI if the program has initialised it under this launcher, else None."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or not mpi.Is_initialized() or mpi.Is_finalized() or mpi.COMM_WORLD.Get_size() != launch.nranks:
        return None
    return mpi


def _import_mpi(launch: Launch) -> Any:
    remedy = (
        "install an mpi4py that fits this mpirun, or set HFREDUCE_ADDR (host:port of rank 0) and HFREDUCE_SECRET on all ranks"
    )
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise InvalidUsageError(
            f"{launch.launcher} started {launch.nranks} ranks on several machines, and mpi4py cannot be imported "
            f"({error}): {remedy}"
        ) from error
    size = MPI.COMM_WORLD.Get_size()
    if size != launch.nranks:
        raise InvalidUsageError(
            f"{launch.launcher} started {launch.nranks} ranks, but mpi4py sees {size} (it belongs to another MPI): {remedy}"
        )
    return MPI


def _init_mpi(launch: Launch, mpi: Any, timeout: float) -> Communicator:
    unique_id = bytes(_make_id(launch)) if launch.rank == 0 else b""
    return _join(launch, UniqueId(mpi.COMM_WORLD.bcast(unique_id, root=0)), timeout)


# --- Slurm on several machines ---


def first_host(nodelist: str) -> str:
    """The first host of a Slurm node list: "node[003-007,9],other" -> "node003"."""
    head, bracket, rest = nodelist.partition("[")
    if not bracket or "," in head:
        return head.partition(",")[0].strip()
    ranges, _, tail = rest.partition("]")
    number = ranges.partition(",")[0].partition("-")[0]
    suffix = tail.partition(",")[0]
    return head.strip() + number + (first_host(suffix) if "[" in suffix else suffix.strip())


def slurm_port(job: str) -> int:
    """A port below the ephemeral ones, the same on all ranks of a job step."""
    value = 0
    for char in job:
        value = (value * 31 + ord(char)) & 0xFFFFFFFF
    return 20000 + value % 12000


def _init_slurm(launch: Launch, tag: int, timeout: float) -> Communicator:
    secret = os.environ.get("HFREDUCE_SECRET", "")
    if not secret:
        raise InvalidUsageError(
            f"Slurm started {launch.nranks} ranks on several machines, and they share no secret: "
            "run `export HFREDUCE_SECRET=$(openssl rand -hex 16)` before srun"
        )
    nodelist = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST", "")
    host = first_host(nodelist)
    if not host:
        raise InvalidArgumentError("SLURM_STEP_NODELIST: not set; set HFREDUCE_ADDR to host:port of rank 0")
    return _join(launch, UniqueId.from_address(f"{host}:{slurm_port(launch.job)}", secret, tag), timeout)


# --- ranks on one machine: a file in a directory of this user alone ---


def _init_file(launch: Launch, tag: int, timeout: float) -> Communicator:
    path = os.path.join(_private_directory(), _job_key(launch, tag))
    if launch.rank:
        return _join(launch, _read_id(path, launch, join_timeout(timeout)), timeout)
    mine = f"{path}.{os.getpid()}"
    try:
        descriptor = os.open(mine, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(f"{os.getpid()} {_start_time(os.getpid())} {_make_id(launch).hex()}\n".encode())
        os.replace(mine, path)
        return _join(launch, _parse_id(path), timeout)  # returns when all ranks have joined, so all have read it
    finally:
        for leftover in (mine, path):
            try:
                os.unlink(leftover)
            except FileNotFoundError:
                pass


def _private_directory() -> str:
    """A directory that this user owns and nobody else can enter; all ranks on this machine find the same."""
    base = os.environ.get("TMPDIR", "")
    path = os.path.join(base if os.path.isdir(base) else "/tmp", f"hfreduce-{os.getuid()}")
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    status = os.lstat(path)
    if not os.path.isdir(path) or os.path.islink(path) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise InvalidUsageError(f"{path}: must be a directory of this user with mode 0700, and is not; remove it, or set TMPDIR")
    return path


_LAUNCHERS = ("prterun", "prted", "orted", "mpirun", "mpiexec", "hydra_pmi_proxy", "slurmstepd")


def _job_key(launch: Launch, tag: int) -> str:
    """A file name that the ranks of this job share with no other job, present or past.

    The launcher's process is their common ancestor.
    """
    pid, ancestor = os.getppid(), os.getppid()
    while pid > 1:
        name, parent, _ = _process(pid)
        if name.startswith(_LAUNCHERS):
            ancestor = pid
            break
        pid = parent
    job = "".join(char if char.isalnum() else "-" for char in launch.job)[:100]
    return f"{ancestor}-{_start_time(ancestor)}-{job}-{tag}"


def _process(pid: int) -> tuple[str, int, str]:
    """(name, parent, start time) of a process; ("", 0, "") if it is gone."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            stat = file.read()
    except OSError:
        return "", 0, ""
    name = stat[stat.index("(") + 1 : stat.rindex(")")]
    fields = stat[stat.rindex(")") + 2 :].split()
    return name, int(fields[1]), fields[19]


def _start_time(pid: int) -> str:
    return _process(pid)[2]


def _parse_id(path: str) -> UniqueId:
    """The id in the file. FileNotFoundError if there is none, or it is of a process that is gone."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as file:
        pid, start, code = file.read().decode().split()
    if _start_time(int(pid)) != start:
        raise FileNotFoundError(path)
    return UniqueId(bytes.fromhex(code))


def _read_id(path: str, launch: Launch, timeout: float) -> UniqueId:
    return _poll(
        lambda: _parse_id(path),
        timeout,
        f"rank {launch.rank} waits for rank 0 to leave the unique id in {path}",
        f"rank 0 of {launch.launcher}'s {launch.nranks} ranks did not leave the unique id in {path} within {timeout} s: "
        "it did not call hfreduce.init(), has died, or sees another file system",
    )


def text_in_store(store: Any, key: str, rank: int, timeout: float) -> str:
    """The unique id, as text, that rank 0 puts into a store of torch's. Waits in Python: in the store's own wait signals are not handled."""

    def read() -> str:
        if not store.check([key]):
            raise FileNotFoundError(key)
        return str(store.get(key).decode())

    return _poll(
        read,
        timeout,
        f"rank {rank} waits for rank 0 to put the unique id into torch's store",
        f"rank 0 did not put the unique id into torch's store within {timeout:g} s: it did not come here, or has died",
    )


def _poll(read: Callable[[], _T], timeout: float, waits: str, message: str) -> _T:
    """What `read` gives, once it does not raise FileNotFoundError. waits: said while that lasts; message: of the DeadlineError."""
    begin, pause, speaks = time.monotonic(), 0.001, warn_after()
    while True:
        try:
            return read()
        except FileNotFoundError:
            seconds = time.monotonic() - begin
            if seconds > timeout:
                raise DeadlineError(message, op="init", phase="connect") from None
        if 0 < speaks <= seconds:
            lib.hfreduceLog(lib.hfreduceLogWarn, f"{waits} ({seconds:.0f} s of {timeout:g} s)".encode())
            speaks *= 2
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)
