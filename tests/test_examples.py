"""Each example, run as examples/README.md says."""

from __future__ import annotations

import importlib.util
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from ranks import reserved_address

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
HFREDUCE = [sys.executable, "-m", "hfreduce"]

needs_digits = pytest.mark.skipif(
    importlib.util.find_spec("sklearn") is None, reason="scikit-learn, whose digits are learnt, is not installed"
)
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")


def run(command: Sequence[str], status: int = 0, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
        check=False,
        cwd=EXAMPLES,
        env=os.environ if env is None else env,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == status, f"status {done.returncode}\n{done.stdout}"
    return done.stdout


def run_ranks(nranks: int, program: str, *args: str) -> str:
    return run([*HFREDUCE, "run", "-n", str(nranks), "--timeout", "90", program, *args])


def run_nodes(nranks: int, per_node: int, *command: str) -> str:
    """As run_ranks, but so many ranks at a time play a host of their own."""
    script = f'HFREDUCE_HOSTID=host$((HFREDUCE_RANK / {per_node})) exec "$@"'
    return run([*HFREDUCE, "run", "-n", str(nranks), "--timeout", "90", "sh", "-c", script, "sh", *command])


def table(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line and not line.startswith("#")]


# --- hello ---


def test_hello() -> None:
    text = run_ranks(4, str(EXAMPLES / "hello.py"))
    assert all(text.count(f"rank {r} of 4 on node 0 of 1: the sum is 10") == 1 for r in range(4)), text


def test_hello_on_several_nodes() -> None:
    text = run_nodes(3, 2, sys.executable, str(EXAMPLES / "hello.py"))
    assert all(text.count(f"rank {r} of 3 on node {r // 2} of 2: the sum is 6") == 1 for r in range(3)), text


# --- cupy_names ---


@pytest.mark.parametrize("nranks", [1, 4])
def test_cupy_names(nranks: int) -> None:
    text = run_ranks(nranks, str(EXAMPLES / "cupy_names.py"))
    for r in range(nranks):
        assert f"rank {r} of {nranks}: the sum is {nranks * (nranks + 1) // 2}" in text, text
        assert f"rank {r} of {nranks}: the first of its half is {r % 2}" in text, text
    assert text.count("3 ranks in one thread: each has from its left [2, 0, 1]") == nranks, text


# --- train_digits ---


def check_training(text: str, nranks: int, nodes: int) -> None:
    assert f"{nranks} ranks on {nodes} nodes" in text, text
    assert "bit-identical on all ranks" in text, text
    assert "equal within rounding" in text, text
    accuracy = float(re.findall(r"accuracy +([0-9.]+) %", text)[-1])
    assert accuracy > 95, text
    losses = [float(loss) for loss in re.findall(r"loss ([0-9.]+)", text)]
    assert losses == sorted(losses, reverse=True), text


@needs_digits
def test_digits_alone() -> None:
    check_training(run([sys.executable, str(EXAMPLES / "train_digits.py"), "--check"]), 1, 1)


@needs_digits
@pytest.mark.parametrize("nranks", [3, 4])
def test_digits(nranks: int) -> None:
    check_training(run_ranks(nranks, str(EXAMPLES / "train_digits.py"), "--check"), nranks, 1)


@needs_digits
@pytest.mark.parametrize(("nranks", "per_node", "nodes"), [(3, 1, 3), (3, 2, 2), (4, 2, 2)])
def test_digits_on_several_nodes(nranks: int, per_node: int, nodes: int) -> None:
    text = run_nodes(nranks, per_node, sys.executable, str(EXAMPLES / "train_digits.py"), "--check")
    check_training(text, nranks, nodes)
    assert "tcp" in text


@needs_digits
@pytest.mark.parametrize("bucket", ["0", "100000"])
def test_digits_with_other_buckets(bucket: str) -> None:
    """One bucket a layer, and one for all; the global batch not divisible by the ranks."""
    options = ["--check", "--bucket", bucket, "--batch", "200", "--hidden", "64"]
    check_training(run_ranks(3, str(EXAMPLES / "train_digits.py"), *options), 3, 1)


@needs_digits
def test_digits_bits_of_every_run() -> None:
    digests = {re.findall(r"weights (\w+):", run_ranks(3, str(EXAMPLES / "train_digits.py"), "--epochs", "5"))[0] for _ in "ab"}
    assert len(digests) == 1


def test_digits_without_scikit_learn(tmp_path: Path) -> None:
    """The message says what to do."""
    (tmp_path / "sklearn.py").write_text("raise ImportError('not here')\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    text = run([sys.executable, str(EXAMPLES / "train_digits.py")], 1, env)
    assert "needs scikit-learn" in text and "pip install scikit-learn" in text and "Traceback" not in text


# --- torch_ddp and torch_fsdp_lm ---


#: Torch's Gloo threads let go of tensors a little after the calls that gave them have returned. When one has the last reference
#: while the interpreter ends, it asks for the interpreter's lock, is ended instead, and C++ aborts: nothing of ours takes part.
GLOO_ABORT = "terminate called without an active exception"


def torchrun(nranks: int, program: str, *args: str) -> str:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nranks)]
    command = [*launcher, str(EXAMPLES / program), *args]
    for _ in range(3 if "gloo" in args else 0):
        try:
            return run(command)
        except AssertionError as error:
            if GLOO_ABORT not in str(error):
                raise
    return run(command)


def check_falling(text: str, nranks: int, backend: str) -> list[float]:
    """The losses that were printed."""
    assert re.search(rf"{nranks} ranks, backend {backend}$", text, re.MULTILINE), text
    losses = [float(loss) for loss in re.findall(r"^(?:epoch|step).* loss ([0-9.]+) ", text, re.MULTILINE)]
    assert len(losses) > 1 and losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0], text
    shares = [float(share) for share in re.findall(r"waiting +([0-9.]+) % of the step", text)]
    assert len(shares) == len(losses) and all(0 <= share <= 100 for share in shares), text
    assert all(float(speed) > 0 for speed in re.findall(r"([0-9.]+) samples/s", text)), text
    return losses


@needs_torch
@needs_digits
@pytest.mark.parametrize(("nranks", "backend", "batch"), [(4, "hfreduce", 240), (3, "hfreduce", 200), (2, "gloo", 240)])
def test_torch_ddp(nranks: int, backend: str, batch: int) -> None:
    options = ["--check", "--backend", backend, "--epochs", "10", "--batch", str(batch)]
    text = torchrun(nranks, "torch_ddp.py", *options)
    check_falling(text, nranks, backend)
    assert "bit-identical on all ranks" in text and "equal within rounding" in text, text
    assert float(re.findall(r"accuracy +([0-9.]+) %", text)[-1]) > 90, text


@needs_torch
@needs_digits
def test_torch_ddp_alone() -> None:
    text = run([sys.executable, str(EXAMPLES / "torch_ddp.py"), "--check", "--epochs", "6"])
    check_falling(text, 1, "hfreduce")
    assert "equal within rounding" in text, text


SMALL_MODEL = shlex.split("--steps 40 --report 20 --width 48 --layers 2 --heads 3")


@needs_torch
@pytest.mark.limit(330)
def test_torch_fsdp_lm() -> None:
    """The same losses on any number of ranks, and on Gloo."""
    texts = {
        (3, "hfreduce"): torchrun(3, "torch_fsdp_lm.py", *SMALL_MODEL),
        (2, "gloo"): torchrun(2, "torch_fsdp_lm.py", "--backend", "gloo", *SMALL_MODEL),
        (1, "hfreduce"): run([sys.executable, str(EXAMPLES / "torch_fsdp_lm.py"), *SMALL_MODEL]),
    }
    found = []
    for (nranks, backend), text in texts.items():
        losses = check_falling(text, nranks, backend)
        found.append([*losses, float(re.findall(r"held-out text: loss ([0-9.]+)", text)[0])])
    assert all(losses == pytest.approx(found[0], abs=2e-3) for losses in found), texts


@needs_torch
def test_torch_fsdp_lm_with_a_short_text(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("too short")
    text = run([sys.executable, str(EXAMPLES / "torch_fsdp_lm.py"), "--text", str(tmp_path / "text")], 2)
    assert "9 characters are too few" in text and "Traceback" not in text


@needs_torch
@needs_digits
@pytest.mark.parametrize(
    ("nranks", "launcher", "options"), [(4, "torchrun", ""), (3, "hfreduce", "--batch 200 --accumulate 3"), (1, "", "")]
)
def test_torch_reducer(nranks: int, launcher: str, options: str) -> None:
    program, arguments = str(EXAMPLES / "torch_reducer.py"), ["--check", *options.split()]
    if launcher == "torchrun":
        text = torchrun(nranks, program, *arguments)
    elif launcher == "hfreduce":
        text = run_ranks(nranks, program, *arguments)
    else:
        text = run([sys.executable, program, *arguments])
    check_training(text, nranks, 1)
    assert len(re.findall(r"[0-9] samples/s  waiting +[0-9.]+ % of the step$", text, re.MULTILINE)) == 4, text


@needs_torch
@needs_digits
def test_torch_reducer_on_two_nodes_in_16_bits() -> None:
    text = run_nodes(2, 1, sys.executable, str(EXAMPLES / "torch_reducer.py"), "--check", "--compress", "bf16")
    check_training(text, 2, 2)
    assert "tcp" in text


@pytest.mark.parametrize("example", ["torch_ddp", "torch_fsdp_lm", "torch_reducer"])
def test_without_torch(example: str, tmp_path: Path) -> None:
    """The message says what to do."""
    (tmp_path / "torch.py").write_text("raise ImportError('not here')\n")
    text = run([sys.executable, str(EXAMPLES / f"{example}.py")], 1, {**os.environ, "PYTHONPATH": str(tmp_path)})
    assert text.startswith(f"{example}: needs PyTorch") and "pip install torch" in text and "Traceback" not in text


@needs_torch
def test_torch_ddp_without_scikit_learn(tmp_path: Path) -> None:
    (tmp_path / "sklearn.py").write_text("raise ImportError('not here')\n")
    text = run([sys.executable, str(EXAMPLES / "torch_ddp.py")], 1, {**os.environ, "PYTHONPATH": str(tmp_path)})
    assert "needs scikit-learn" in text and "pip install scikit-learn" in text and "Traceback" not in text


# --- ping_pong and overlap ---


@pytest.mark.parametrize(("nranks", "per_node"), [(2, 2), (2, 1), (3, 3)])
def test_ping_pong(nranks: int, per_node: int) -> None:
    options = ["--largest", "1", "--round-trips", "5"]
    rows = table(run_nodes(nranks, per_node, sys.executable, str(EXAMPLES / "ping_pong.py"), *options))
    assert [int(row[0]) for row in rows] == [4**i for i in range(11)]
    assert all(row[-1] == "0" and float(row[2]) > 0 for row in rows)


def test_ping_pong_alone() -> None:
    assert "needs two ranks" in run([sys.executable, str(EXAMPLES / "ping_pong.py")], 1)


@pytest.mark.parametrize(("nranks", "per_node"), [(2, 2), (2, 1), (1, 1)])
def test_overlap(nranks: int, per_node: int) -> None:
    options = ["--size", "1", "--repeats", "3"]
    rows = table(run_nodes(nranks, per_node, sys.executable, str(EXAMPLES / "overlap.py"), *options))
    assert [row[0] for row in rows] == ["device", "matmul"]


# --- the C program ---


@pytest.fixture(scope="module")
def c_program(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Built by the line at the head of the file, with warnings as errors; found from another folder."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    source = EXAMPLES / "all_reduce.c"
    line = re.search(r"^ \*   cc (.*) \$\(hfreduce config --cflags --libs\)$", source.read_text(), re.MULTILINE)
    assert line is not None
    folder = tmp_path_factory.mktemp("c")
    shutil.copy(source, folder)
    flags = run([*HFREDUCE, "config", "--cflags", "--libs"])
    done = subprocess.run(
        [compiler, "-Werror", "-pedantic", *shlex.split(line[1]), *shlex.split(flags)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return str(folder / "all_reduce")


@pytest.mark.parametrize(("nranks", "per_node"), [(1, 1), (4, 4), (3, 1), (5, 2)])
def test_c_program(nranks: int, per_node: int, c_program: str) -> None:
    text = run_nodes(nranks, per_node, c_program)
    assert len(text.splitlines()) == nranks
    nodes = -(-nranks // per_node)
    for rank in range(nranks):
        assert re.search(rf"^rank {rank} of {nranks} on \S+ \(node {rank // per_node} of {nodes}\): 0 wrong values$", text, re.M)


def test_c_program_by_hand(c_program: str) -> None:
    """Ranks started one by one; and alone."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith("HFREDUCE_")}
    assert "rank 0 of 1" in run([c_program], env=bare)
    with reserved_address() as address:
        shared = {**bare, "HFREDUCE_NRANKS": "2", "HFREDUCE_ADDR": address, "HFREDUCE_SECRET": secrets.token_hex(16)}
        other = subprocess.Popen([c_program], env={**shared, "HFREDUCE_RANK": "1"}, stdout=subprocess.PIPE, text=True)
        try:
            assert "rank 0 of 2" in run([c_program], env={**shared, "HFREDUCE_RANK": "0"})
            out, _ = other.communicate(timeout=30)
            assert other.returncode == 0 and "rank 1 of 2" in out
        finally:
            other.kill()
            other.wait()


def test_c_program_says_what_is_wrong(c_program: str) -> None:
    env = {**os.environ, "HFREDUCE_RANK": "2", "HFREDUCE_NRANKS": "2", "HFREDUCE_ADDR": "127.0.0.1:1"}
    text = run([c_program], 1, env)
    assert text.startswith("all_reduce: ") and "rank" in text


def test_the_header_is_all_that_is_included() -> None:
    text = (EXAMPLES / "all_reduce.c").read_text()
    assert set(re.findall(r"#include <(.*)>", text)) == {"hfreduce.h", "stdio.h", "stdlib.h"}
