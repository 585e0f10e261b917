"""Skip this directory where torch is absent; one pool of ranks for all its tests."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest


def pytest_pycollect_makemodule(module_path: Any, parent: Any) -> None:
    """Skip a test module before it is imported: it imports torch."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed", allow_module_level=True)
    import torch

    if not torch.distributed.is_available():
        pytest.skip("this torch was built without torch.distributed", allow_module_level=True)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Any]:
    """harness.Ranks: run a function on N ranks, compare with a reference."""
    import harness

    with harness.pool() as started:
        yield started
