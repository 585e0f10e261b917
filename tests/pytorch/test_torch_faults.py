"""The PyTorch backend when something goes wrong: ranks that die, come late or not at all, and processes that end in any way."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

torch = pytest.importorskip("torch", reason="torch is not installed")
if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

import torch.distributed as dist  # noqa: E402

import hfreduce  # noqa: E402
import hfreduce.torch  # noqa: E402

# Importing torch in each rank takes seconds of two shared cores.
pytestmark = pytest.mark.limit(180)


def on_ranks(function: Any, nranks: int, *args: Any, **options: Any) -> list[Any]:
    """function(rank, *args) on ranks that have a process group."""
    options.setdefault("timeout", 120)
    return run_ranks(_with_group, nranks, function, *args, comm=False, **options)


def _with_group(rank: int, function: Any, *args: Any) -> Any:
    torch.set_num_threads(1)
    dist.set_debug_level_from_env()  # torch was imported before the rank's environment was set
    hfreduce.torch.init_process_group(timeout=60)
    value = function(rank, *args)
    if dist.is_initialized():
        dist.destroy_process_group()
    return value


# --- ranks that die ---


def _die_in_backward(rank: int) -> tuple[str, str, float]:
    class Trap(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            if rank == 1 and steps == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return grad

    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(6)])
    wrapped = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.01)
    steps, start = 0, time.monotonic()
    try:
        for steps in range(5):  # noqa: B007  (Trap reads it)
            start = time.monotonic()
            x = model[0](torch.ones(2, 64))
            wrapped(Trap.apply(x)).sum().backward()
    except RuntimeError as error:
        seconds = time.monotonic() - start
        with pytest.raises(RuntimeError):
            dist.all_reduce(torch.ones(1))
        return type(error).__name__, str(error), seconds
    return "", "", 0.0


def test_killed_in_backward() -> None:
    outcomes = on_ranks(_die_in_backward, 3, check=False)
    assert outcomes[1].exitcode == -signal.SIGKILL
    for rank in (0, 2):
        assert outcomes[rank].ok, outcomes[rank]
        kind, text, seconds = outcomes[rank].value
        assert kind and "rank 1" in text, text
        assert seconds < 8, f"rank {rank} noticed after {seconds:.1f} s"


def _die_waited_for(rank: int, how: str) -> str:
    if rank == 1:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    x = torch.ones(1000)
    with pytest.raises(hfreduce.PeerLostError) as caught:
        if how == "sync":
            dist.all_reduce(x)
        elif how == "wait":
            dist.all_reduce(x, async_op=True).wait()
        elif how == "recv":
            dist.recv(x, src=1)
        elif how == "any":
            dist.recv(x)
        elif how == "object":
            dist.all_gather_object([None] * 2, "x")
        else:
            dist.all_reduce(x, async_op=True).get_future().wait()
    assert isinstance(caught.value, dist.DistBackendError)
    return str(caught.value)


@pytest.mark.parametrize("how", ["sync", "wait", "recv", "any", "object"])
def test_killed_while_waited_for(how: str) -> None:
    outcome = on_ranks(_die_waited_for, 2, how, check=False)[0]
    assert outcome.ok, outcome
    assert "rank 1" in outcome.value


def _future_of_the_dead(rank: int) -> str:
    if rank == 1:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    future = dist.all_reduce(torch.ones(1000), async_op=True).get_future()
    with pytest.raises(RuntimeError) as caught:
        future.then(lambda f: f.value()).wait()
    return str(caught.value)


def test_future_of_a_dead_peer_fails() -> None:
    outcome = on_ranks(_future_of_the_dead, 2, check=False)[0]
    assert outcome.ok, outcome
    assert "rank 1" in outcome.value


# --- ranks that are late, or do other things ---


def _late(rank: int) -> str:
    group = dist.new_group([0, 1], timeout=timedelta(seconds=1))
    dist.all_reduce(torch.ones(2, 3), group=group)
    if rank == 1:
        time.sleep(3)
        return ""
    with pytest.raises(hfreduce.DeadlineError) as caught:
        dist.all_reduce(torch.ones(4, 5), group=group)
    return str(caught.value)


def test_deadline_names_the_rank_and_dumps_the_flight_record(tmp_path: Path) -> None:
    values = on_ranks(_late, 2, env={"HFREDUCE_TORCH_RECORD_FILE": str(tmp_path / "record-%r")})
    assert "rank 1" in values[0]
    record = (tmp_path / "record-0").read_text()
    assert "flight record of rank 0 of 2" in record
    assert re.search(r"#1 all_reduce \[\[2, 3\]\] float32.*\n.*#2 all_reduce \[\[4, 5\]\] float32", record), record


def _mismatch(rank: int, detail: bool) -> str:
    shape = (3, 4) if rank == 0 else (4, 3) if detail else (4, 4)
    with pytest.raises(RuntimeError) as caught:
        dist.all_reduce(torch.ones(shape))
    store = dist.distributed_c10d._get_default_store()
    store.set(f"told {rank}", "")  # shapes are asked for through rank 0's store, which ends with it
    store.wait([f"told {1 - rank}"] if rank == 0 else [])
    return str(caught.value)


def test_mismatch_names_both_sides_and_shapes() -> None:
    for text in on_ranks(_mismatch, 2, False):
        assert "rank 0" in text and "rank 1" in text and "[[3, 4]]" in text and "[[4, 4]]" in text, text


def test_detail_compares_shapes() -> None:
    for text in on_ranks(_mismatch, 2, True, env={"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}):
        assert "3, 4" in text and "4, 3" in text and "ank 1" in text, text


def _missing(rank: int) -> tuple[str, float]:
    if rank == 2:
        return "", 0.0
    start = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        hfreduce.torch.init_process_group(timeout=3)
    return str(caught.value), time.monotonic() - start


def test_missing_rank_at_start() -> None:
    values = run_ranks(_missing, 3, comm=False, timeout=60)
    for text, seconds in values[:2]:
        assert "2" in text and seconds < 15, (text, seconds)


def _interrupted(rank: int) -> float:
    if rank == 1:
        time.sleep(2.5)
        dist.all_reduce(torch.ones(4))
        return 0.0
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts in the background ignore it
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        dist.all_reduce(torch.ones(4))
    return time.monotonic() - start


def test_interrupt_ends_a_blocking_call() -> None:
    assert on_ranks(_interrupted, 2)[0] < 2


# --- futures ---


def _slow_callback(rank: int) -> float:
    done = threading.Event()
    works = [dist.all_reduce(torch.ones(8), async_op=True) for _ in range(4)]
    slow = works[0].get_future().then(lambda f: time.sleep(1.5))
    nested = works[1].get_future().then(lambda f: works[2].get_future().wait()[0] + 1)  # waits for another future
    start = time.monotonic()
    works[3].get_future().add_done_callback(lambda f: done.set())
    assert done.wait(30) and (nested.wait() == 3).all()
    seconds = time.monotonic() - start
    slow.wait()
    return seconds


def test_a_slow_callback_delays_nobody() -> None:
    assert max(on_ranks(_slow_callback, 2)) < 1.2


# --- starting and ending ---


def _cycles(rank: int, cycles: int) -> tuple[int, int, int]:
    dist.destroy_process_group()
    store = dist.FileStore(os.environ["STORE"], 2)
    counts = []
    for cycle in range(cycles):
        dist.init_process_group("hfreduce", store=dist.PrefixStore(str(cycle), store), rank=rank, world_size=2)
        x = torch.ones(3)
        work = dist.all_reduce(x, async_op=True)
        future = work.get_future()
        if cycle % 3:
            future.wait()
        if cycle % 2:
            work.wait()
            assert (x == 2).all()
        dist.destroy_process_group()
        dist_was_left = not dist.is_initialized()
        assert dist_was_left
        counts.append((len(os.listdir("/proc/self/fd")), threading.active_count()))
    return counts[10][0], counts[-1][0], counts[-1][1]


def test_two_hundred_starts_and_stops(tmp_path: Path) -> None:
    for early, late, threads in on_ranks(_cycles, 2, 200, env={"STORE": str(tmp_path / "store")}):
        assert late <= early + 3, f"{early} descriptors after 10 cycles, {late} after 200"
        assert threads <= 8


ENDINGS = {
    "no destroy": "",
    "works and futures alive": "works = [dist.all_reduce(torch.ones(1000), async_op=True) for _ in range(20)]; "
    "futures = [w.get_future().then(lambda f: f.value()) for w in works]",
    "callbacks running": "dist.all_reduce(torch.ones(4), async_op=True).get_future().then(lambda f: time.sleep(0.2))",
    "exception": "w = dist.all_reduce(torch.ones(4), async_op=True); sys.exit(0)",
    "destroyed twice": "g = dist.group.WORLD; dist.destroy_process_group(); g.shutdown(); g.abort()",
    # through the store: an abort may overtake what a rank has not finished
    "aborted": "w = dist.irecv(torch.ones(4), src=1 - dist.get_rank()); g = dist.group.WORLD; s = g.get_group_store(); "
    "s.set(f'here{dist.get_rank()}', b'1'); s.wait(['here0', 'here1']); g.abort(); f = w.get_future()",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_ending_is_clean(ending: str, tmp_path: Path) -> None:
    """No abort at interpreter exit, no hang, nothing on standard error from the interpreter."""
    script = tmp_path / "end.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys, time, torch, torch.distributed as dist
            import hfreduce.torch
            torch.set_num_threads(1)
            dist.init_process_group("hfreduce", init_method="file://{tmp_path}/store", rank=int(sys.argv[1]), world_size=2)
            x = torch.ones(3)
            dist.all_reduce(x)
            assert (x == 2).all()
            {ENDINGS[ending]}
            """
        )
    )
    ranks = [subprocess.Popen([sys.executable, str(script), str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    try:
        ended = [(rank.communicate(timeout=90)[1], rank.returncode) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    for text, status in ended:
        assert status == 0, f"ended with {status}\n{text}"
        assert "Fatal" not in text and "terminate" not in text, text


def _after_destroy(rank: int) -> None:
    group = dist.new_group([0, 1])
    kept = dist.group.WORLD
    dist.destroy_process_group(group)
    for call in (lambda: group.allreduce([torch.ones(2)]), lambda: group.barrier(), lambda: group.send([torch.ones(1)], 0, 0)):
        with pytest.raises(RuntimeError, match="destroyed"):
            call()
    x = torch.ones(2)
    dist.all_reduce(x)  # the other group goes on
    assert (x == 2).all()
    dist.destroy_process_group()
    with pytest.raises(RuntimeError, match="destroyed"):
        kept.allreduce([torch.ones(2)])


def test_use_after_destroy() -> None:
    on_ranks(_after_destroy, 2)


# --- cost ---


def _memory() -> float:
    """Resident memory in MiB."""
    with open("/proc/self/smaps_rollup") as file:
        return int(next(line for line in file if line.startswith("Rss:")).split()[1]) / 1024


def _many_groups(rank: int) -> tuple[float, int]:
    x = torch.ones(4 << 20)
    dist.all_reduce(x)
    threads, before = len(os.listdir("/proc/self/task")), _memory()
    groups = [dist.new_group([0, 1, 2, 3]) for _ in range(32)]
    for group in groups:
        work = dist.all_reduce(x, group=group, async_op=True)
        work.get_future().wait()
        work.wait()
    time.sleep(2)
    return _memory() - before, len(os.listdir("/proc/self/task")) - threads


def test_thirty_two_groups_share_threads_and_memory() -> None:
    for mebibytes, threads in on_ranks(_many_groups, 4):
        assert mebibytes < 64
        assert threads <= 4
