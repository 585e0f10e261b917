"""PyTorch's own c10d tests on the backend: the part for CI, and how tools/torch_suite.py judges outcomes."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).resolve().parent.parent / "tools" / "torch_suite.py"


def load_tool() -> Any:
    """tools/torch_suite.py as a module."""
    spec = importlib.util.spec_from_file_location("torch_suite", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outcome(kind: str, reason: str = "") -> dict[str, Any]:
    return {"outcome": kind, "reason": reason, "seconds": 0.0, "output": ""}


def test_what_is_expected_and_what_is_not() -> None:
    outcomes = {
        "test_fine": outcome("passed"),
        "test_known": outcome("failed", "RuntimeError: no"),
        "test_gpu": outcome("skipped", "Need at least 2 CUDA devices"),
        "test_broken": outcome("failed", "RuntimeError: oh"),
        "test_mended": outcome("passed"),
        "test_gone_quiet": outcome("skipped", "Only bongo supports this"),
        "test_longer_reason": outcome("skipped", "Need at least 2 CUDA devices and luck"),
    }
    cannot_pass = {"test_known": "torch asks for its name", "test_mended": "torch asks for its name"}
    judge = load_tool().judge
    unexpected = judge(outcomes, cannot_pass, {r"Need at least \d CUDA devices": ""}, ["test_fine", "test_absent"])
    assert sorted(unexpected) == ["test_absent", "test_broken", "test_gone_quiet", "test_longer_reason", "test_mended"]
    assert "oh" in unexpected["test_broken"] and "torch asks for its name" in unexpected["test_mended"]


def test_ci_test_must_not_be_skipped() -> None:
    outcomes = {"test_gpu": outcome("skipped", "Need at least 2 CUDA devices")}
    judge = load_tool().judge
    assert not judge(outcomes, {}, {".*": ""})
    assert list(judge(outcomes, {}, {".*": ""}, ["test_gpu"])) == ["test_gpu"]


def test_ci_list_has_no_test_that_cannot_pass() -> None:
    tool = load_tool()
    names = tool.ci_tests()
    assert len(names) == len(set(names)) > 100
    assert not set(names) & set(tool.expected.CANNOT_PASS)


@pytest.mark.limit(480)
def test_torch_suite() -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("expecttest", reason="torch's own tests need the package expecttest")
    command = [sys.executable, str(TOOL), "--ci"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    ) as process:
        try:
            output = process.communicate()[0]
        finally:
            if process.poll() is None:  # out of time: with it go the ranks that it forked
                os.killpg(process.pid, signal.SIGKILL)
    print(output)
    assert process.returncode == 0, output.splitlines()[-1:]
