#!/usr/bin/env python3
"""Run PyTorch's own c10d tests, which lie in the installed wheel, against a backend.

  python tests/tools/torch_suite.py                  everything, on backend hfreduce with 4 ranks
  python tests/tools/torch_suite.py --ci             the fixed part listed in torch_suite_ci.txt, none of which may be skipped
  python tests/tools/torch_suite.py --backend gloo --module ''

The tests are those of torch.testing._internal.distributed.distributed_test, DistributedTest._DistTestBase. They need torch, numpy
and expecttest. Each runs as Gloo's; what torch gives only to MPI (all_to_all on the CPU) runs as MPI's.

Exit status 1: a test failed that is not listed in torch_suite_expected.py, one listed there passed, or one was skipped for a
reason that is not listed there (with --ci: for any reason).
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import torch_suite_expected as expected

HERE = Path(__file__).resolve().parent

#: By test: {"outcome": "passed" | "failed" | "skipped", "reason", "seconds", "output"}.
Outcomes = dict[str, dict[str, Any]]


def ci_tests() -> list[str]:
    """The fixed part for CI."""
    lines = (HERE / "torch_suite_ci.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def run_persona(options: argparse.Namespace, persona: str, tests: Iterable[str] | None, folder: str) -> dict[str, Any]:
    """Run `tests` (None: all) as `persona` in a new process; return torch's version, whether on the shim, and the outcomes."""
    out, wanted = Path(folder) / f"{persona}.json", Path(folder) / f"{persona}-tests.json"
    command = [sys.executable, str(HERE / "torch_suite_runner.py"), "--persona", persona, "--json", str(out)]
    command += ["--backend", options.backend, "--module", options.module]
    command += ["--world", str(options.world), "--timeout", str(options.timeout)]
    if tests is not None:
        wanted.write_text(json.dumps(sorted(tests)))
        command += ["--tests", str(wanted)]
    # torch's tests leave files behind: their temporary folder goes with ours
    environment = {"OMP_NUM_THREADS": "1", "PYTORCH_PRINT_REPRO_ON_FAILURE": "0", **os.environ, "TMPDIR": folder}
    code = subprocess.run(command, env=environment).returncode
    if code or not out.exists():
        raise SystemExit(f"the tests as {persona} ended with status {code}")
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def run(options: argparse.Namespace, tests: list[str] | None) -> dict[str, Any]:
    """Run `tests` (None: all), first as Gloo's, then what is MPI's alone as MPI's."""
    with tempfile.TemporaryDirectory(prefix="torch-suite-") as folder:
        found = run_persona(options, "gloo", tests, folder)
        outcomes: Outcomes = found["outcomes"]
        mpi = [name for name, test in outcomes.items() if test["outcome"] == "skipped" and "Only MPI" in test["reason"]]
        if mpi:
            outcomes.update(run_persona(options, "mpi", mpi, folder)["outcomes"])
    return found


def judge(
    outcomes: Outcomes, cannot_pass: Mapping[str, str], skipped: Mapping[str, str], must_pass: Iterable[str] = ()
) -> dict[str, str]:
    """What is unexpected, by test.

    cannot_pass: tests that fail, with the reason. skipped: patterns of the reasons for which a test may be skipped. must_pass:
    tests that may not be skipped, nor be absent.
    """
    unexpected = {name: "must pass, but torch has no such test" for name in must_pass if name not in outcomes}
    must_pass = set(must_pass)
    for name, test in outcomes.items():
        outcome, reason = test["outcome"], test["reason"]
        if outcome == "failed" and name not in cannot_pass:
            unexpected[name] = f"failed: {reason}"
        elif outcome == "passed" and name in cannot_pass:
            unexpected[name] = f"passed, but is listed as one that cannot pass: {cannot_pass[name]}"
        elif outcome == "skipped":
            if name in must_pass:
                unexpected[name] = f"must pass, but was skipped: {reason}"
            elif not any(re.fullmatch(pattern, reason) for pattern in skipped):
                unexpected[name] = f"skipped for a reason that is not listed: {reason}"
    return unexpected


def report(outcomes: Outcomes, unexpected: Mapping[str, str], cannot_pass: Mapping[str, str]) -> None:
    """Print the skips by reason, the listed failures, and what is unexpected with its output."""
    reasons = collections.Counter(test["reason"] for test in outcomes.values() if test["outcome"] == "skipped")
    for reason, count in reasons.most_common():
        print(f"  skipped {count:3} x {reason}")
    for name, test in outcomes.items():
        if test["outcome"] == "failed" and name not in unexpected:
            print(f"  cannot pass: {name}: {cannot_pass[name]}")
    for name in unexpected:
        if outcomes.get(name, {}).get("output"):
            print(f"\n-- {name}\n{outcomes[name]['output'].rstrip()}")
    for name, what in unexpected.items():
        print(f"  UNEXPECTED {name}: {what}")


def main() -> int:
    """Run, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="hfreduce", help="name of the backend (hfreduce)")
    parser.add_argument("--module", default="hfreduce.torch", help="module that registers it (hfreduce.torch); '' for none")
    parser.add_argument("--world", type=int, default=4, help="ranks (4, for which the expectations were written)")
    parser.add_argument("--timeout", type=int, default=60, help="seconds that a test may take (60)")
    parser.add_argument("--ci", action="store_true", help="only the tests of torch_suite_ci.txt, none of which may be skipped")
    parser.add_argument("-k", default="", metavar="PATTERN", help="only tests whose name matches the regular expression")
    parser.add_argument("--json", metavar="FILE", help="write the outcomes there")
    options = parser.parse_args()
    tests = ci_tests() if options.ci else None
    if options.k:
        tests = [name for name in (tests if tests is not None else all_tests()) if re.search(options.k, name)]
    found = run(options, tests)
    outcomes: Outcomes = found["outcomes"]
    cannot_pass = {**expected.CANNOT_PASS, **(expected.CANNOT_PASS_ON_SHIM if found["shim"] else {})}
    unexpected = judge(outcomes, cannot_pass, expected.SKIPPED, tests or () if options.ci else ())
    report(outcomes, unexpected, cannot_pass)
    counts = collections.Counter(test["outcome"] for test in outcomes.values())
    seconds = sum(test["seconds"] for test in outcomes.values())
    print(
        f"torch {found['torch']}, backend {options.backend}{' on the shim' if found['shim'] else ''}, {options.world} ranks: {counts['passed']} passed, {counts['failed']} failed, "
        f"{counts['skipped']} skipped, {len(unexpected)} unexpected, {seconds:.0f} s"
    )
    if options.json:
        Path(options.json).write_text(json.dumps(outcomes, indent=1) + "\n")
    return 1 if unexpected else 0


def all_tests() -> list[str]:
    """The names of all tests, read from the module's source, so that torch need not be imported here."""
    root = importlib.util.find_spec("torch")
    if root is None or root.origin is None:
        raise SystemExit("torch is not installed")
    source = Path(root.origin).parent / "testing" / "_internal" / "distributed" / "distributed_test.py"
    return re.findall(r"^ +def (test_\w+)\(", source.read_text(), re.MULTILINE)


if __name__ == "__main__":
    sys.exit(main())
