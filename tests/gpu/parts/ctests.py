"""The C tests of device memory (tests/c/test_cuda*.c) on this driver, case by case: a case that hangs costs its own time alone."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import results
from libcuda import Cuda
from results import Absent, Wrong

WORK = Path(os.environ["FIRST_CONTACT_WORK"])
STAND_IN = bool(os.environ.get("FIRST_CONTACT_STAND_IN"))
LIMIT = 20
#: Program, case, layouts; most valuable first, and last what may disturb those behind it.
CASES = [
    "test_cuda collectives 1 2",
    "test_cuda collectives 4 t2 t4",
    "test_cuda types 2",
    "test_cuda mixed 2",
    "test_cuda messages 2 t4",
    "test_cuda one_by_one 2",
    "test_cuda answer 2",
    "test_cuda_chunks across 2",
    "test_cuda_chunks gap 2",
    "test_cuda_blocked message 2",
    "test_cuda_blocked first_call 2",
    "test_cuda_blocked destroyed 2",
    "test_cuda_blocked graph_gone 2",
    "test_cuda_blocked late t2",
    "test_cuda_queues many 2",
    "test_cuda several 2",
    "test_cuda one_caller 1",
    "test_cuda streams 2",
    "test_cuda streams t2",
    "test_cuda_graph replay 2",
    "test_cuda_graph threads t2",
    "test_cuda_faults mismatch 2",
    "test_cuda_faults deadline 2",
    "test_cuda_faults aborted 2 t2",
    "test_cuda_faults destroyed 2",
    "test_cuda_lend lent 2",
    "test_cuda_lend late 2",
    "test_cuda_lend by_turns 2 t2",
    "test_cuda uneven 2",
    "test_cuda kinds 2",
    "test_cuda backlog 2",
    "test_cuda late_factor 2",
    "test_cuda patience 2",
    "test_cuda collectives 1,1 2,2",
    "test_cuda_graph teardown 2",
    "test_cuda_graph refused 2",
    "test_cuda_graph broken 2",
    "test_cuda_graph idle 2",
    "test_cuda_faults elsewhere 2",
    "test_cuda_pairs bits 2 t2",
    "test_cuda_pairs averages 2",
    "test_cuda_faults pointers 1 2",
]
#: What a dry run takes of them: the rest has tests of its own on the stand-in.
DRY = {
    "test_cuda types 2",
    "test_cuda mixed 2",
    "test_cuda_graph threads t2",
    "test_cuda_faults mismatch 2",
    "test_cuda_pairs bits 2 t2",
}


def execute(words: str) -> tuple[int, str]:
    """Run the program, killed after LIMIT with all its ranks; its status and output."""
    program, *arguments = words.split()
    path = json.loads((WORK / "programs.json").read_text())[program]
    pipe = subprocess.PIPE
    command = [path, "--quick", *arguments]
    process = subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, errors="replace")
    try:
        text, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        text, _ = process.communicate()
        print(text, flush=True)
        raise Wrong(f"killed after {LIMIT} s: {last_line(text)}") from None
    print(text, flush=True)
    return process.returncode, text


def kill_tree(pid: int) -> None:
    """Kill a process and the ranks that it forked, without leaving this part's session, which is killed at the part's limit."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    ranks = [int(word) for word in children.read_text().split()] if children.exists() else []
    for each in (pid, *ranks):
        try:
            os.kill(each, signal.SIGKILL)
        except ProcessLookupError:
            pass


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1]


def case(words: str) -> Callable[[], str]:
    def run() -> str:
        if "pairs" in words and devices < 2:
            raise Absent("needs two GPUs that NVLink joins")
        code, text = execute(words)
        if code == 77:
            raise Absent(last_line(text))
        if code:
            first = next((line for line in text.splitlines() if "rank" in line or "failed" in line), last_line(text))
            raise Wrong(f"ended with {code}: {first}")
        results.same("stand-in driver" in text, STAND_IN, "that it ran on the stand-in")
        return last_line(text)

    run.__name__ = words
    return run


def a_killed_rank_is_reported() -> str:
    """The planted error: a rank that kills itself has to be told by the program, and the waits of the others end."""
    code, text = execute("test_cuda_faults killed 2")
    results.same((code, "ended with signal 9" in text, "killed, 2: 1 ranks failed" in text), (1, True, True), "status and words")
    return "the other rank's waits ended"


def count_devices() -> int:
    count = ctypes.c_int()
    Cuda(context=False)("cuDeviceGetCount", ctypes.byref(count))
    return count.value


if __name__ == "__main__":
    devices = count_devices()
    chosen = [words for words in CASES if not STAND_IN or words in DRY]
    results.run("ctests", case(chosen[0]), a_killed_rank_is_reported, *map(case, chosen[1:]))
