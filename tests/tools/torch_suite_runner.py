"""Run tests of torch's DistributedTest._DistTestBase in one process, as one persona; the process of torch_suite.py that imports torch.

torch's tests skip by the name of the backend: by decorators, evaluated when the module is imported, and in their bodies. The
backend under test therefore appears there as one of torch's own (the persona), and everywhere else under its own name. Nothing
of torch is edited.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import tempfile
import time
import unittest
import warnings
from pathlib import Path
from typing import Any, TextIO

#: How much of a failed test's output is kept.
OUTPUT_CHARACTERS = 6000


class Persona(str):
    """The backend's name, that also equals the persona's: bodies of tests ask `BACKEND == "gloo"`."""

    persona = ""

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or other == self.persona

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def load_tests(backend: str, persona: str, nranks: int, seconds: int, folder: str) -> type[unittest.TestCase]:
    """Import torch's module as `persona` and return a test class that runs on `backend`.

    seconds: limit of a test and of its process groups. folder: for torch's temporary files.
    """
    os.environ.update(BACKEND=persona, WORLD_SIZE=str(nranks), TEMP_DIR=folder, INIT_METHOD=f"file://{folder}/init")
    import torch.multiprocessing
    import torch.testing._internal.common_distributed as common

    # It asks for 8 ranks to spare GPUs; the tests so marked make a group of two and need 3.
    common.skip_if_small_worldsize = lambda function: function
    import torch.testing._internal.distributed.distributed_test as suite

    Persona.persona = persona
    suite.BACKEND = Persona(backend)
    common.TIMEOUT_DEFAULT = suite.default_pg_timeout = seconds

    class TestDistributed(suite.TestDistBackend, suite.DistributedTest._DistTestBase):
        """Ranks are forked from this process, which has imported torch: 0.3 s a test, 7 s when each imports it."""

        def setUp(self) -> None:
            super().setUp()
            self._start_processes(torch.multiprocessing.get_context("fork").Process)

        def tearDown(self) -> None:
            for process in self.processes:
                process.kill()
                process.join()
            super().tearDown()

    return TestDistributed


class Result(unittest.TestResult):
    """Outcome, reason, seconds and (of failures) output of each test; a line a test as it ends."""

    def __init__(self, progress: TextIO, capture: TextIO) -> None:
        super().__init__()
        self.progress, self.capture = progress, capture
        self.outcomes: dict[str, dict[str, Any]] = {}

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self.capture.seek(0)
        self.capture.truncate()
        self.begun = time.monotonic()

    def note(self, test: Any, outcome: str, reason: str = "", output: str = "") -> None:
        name = getattr(test, "_testMethodName", str(test))
        seconds = round(time.monotonic() - self.begun, 2)
        self.outcomes[name] = {"outcome": outcome, "reason": reason, "seconds": seconds, "output": output}
        print(f"{outcome:8} {seconds:5.1f} s  {name}" + (f"  ({reason})" if reason else ""), file=self.progress, flush=True)

    def addSuccess(self, test: unittest.TestCase) -> None:
        self.note(test, "passed")

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        self.note(test, "skipped", " ".join(reason.split()))

    def addFailure(self, test: unittest.TestCase, error: Any) -> None:
        text = self._exc_info_to_string(error, test)
        lines = [
            line.strip()
            for line in text.splitlines()
            if re.match(r"\s*[\w.]*(Error|Exception)\b|\s*Process \d+ (exited|term)", line)
        ]
        self.capture.seek(0)
        output = "" if "and exception:" in text else self.capture.read()[-OUTPUT_CHARACTERS:]  # the ranks' own words
        output += text[-OUTPUT_CHARACTERS:]
        self.note(test, "failed", (lines or text.splitlines() or ["?"])[-1][:300], output)

    addError = addFailure


def on_shim(module: str) -> bool:
    """Whether the groups were torch's own over hfreduce's C++ shim, so that torch answers some questions itself."""
    return module == "hfreduce.torch" and importlib.import_module("hfreduce.torch.shim").load() is not None


def main() -> None:
    """Run the tests named in --tests (all without it), write their outcomes to --json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--module", default="")
    parser.add_argument("--persona", required=True)
    parser.add_argument("--world", type=int, required=True)
    parser.add_argument("--timeout", type=int, required=True)
    parser.add_argument("--tests", default="")
    parser.add_argument("--json", required=True)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    # From here on what the tests and their ranks print is captured; progress goes to what was stdout.
    progress = os.fdopen(os.dup(1), "w")
    capture = tempfile.TemporaryFile("w+", errors="replace", prefix="output-")  # noqa: SIM115
    if options.module:
        importlib.import_module(options.module)
    folder = tempfile.mkdtemp()
    case = load_tests(options.backend, options.persona, options.world, options.timeout, folder)
    names = unittest.defaultTestLoader.getTestCaseNames(case)
    if options.tests:
        wanted = json.loads(Path(options.tests).read_text())
        names = [name for name in names if name in wanted]
    os.dup2(capture.fileno(), 1)
    os.dup2(capture.fileno(), 2)
    result = Result(progress, capture)
    for name in names:
        case(name).run(result)
        result.failures.clear()
    import torch

    found = {"torch": torch.__version__, "shim": on_shim(options.module), "outcomes": result.outcomes}
    Path(options.json).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
