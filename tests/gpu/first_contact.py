#!/usr/bin/env python3
"""From a bare checkout on a machine with a GPU to a written report in a few minutes, in one command.

    python tests/gpu/first_contact.py --out DIR [--wheels DIR] [--minutes 8] [--only PART ...] [--stand-in]

It installs the package into a private place, builds the C tests and runs parts, most valuable first, each a process of its own with
a time limit of its own. DIR/report.md, report.json and log.txt are complete after every part. README.md beside this file says more.
Needs Python 3.9, a C compiler, and setuptools, cffi, pycparser and NumPy, installed or as wheels. Exit status: 0 no part failed, 1 one did,
2 it could not be done (one line says why, and nothing is left behind).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))
sys.dont_write_bytecode = True

import install  # noqa: E402
import session  # noqa: E402
from catalogue import PARTS, Part  # noqa: E402
from install import Refused  # noqa: E402
from report import Report  # noqa: E402

OLDEST_DRIVER = 11070
#: Seconds that installing may take, and that a part needs at least to be begun.
INSTALL_LIMIT, LEAST = 240, 4.0
#: Bytes that building takes, roughly.
ROOM = 200 << 20
#: Bytes that the report takes at most.
REPORT_ROOM = 4 << 20
#: What asks the driver for its version and its devices, in a process of its own: a driver may hang or crash.
PROBE = """
import ctypes
try:
    cuda = ctypes.CDLL("libcuda.so.1")
except OSError as error:
    raise SystemExit(f"no CUDA driver: {error}")
version, count, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(128)
text = ctypes.c_char_p()
cuda.cuDriverGetVersion(ctypes.byref(version))
if version.value < OLDEST:
    raise SystemExit(f"the CUDA driver is {version.value // 1000}.{version.value % 1000 // 10}, older than 11.7: update it")
code = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
if code:
    cuda.cuGetErrorName(code, ctypes.byref(text))
    raise SystemExit(f"no CUDA device: {(text.value or b'error').decode()} ({code})")
if not count.value:
    raise SystemExit("no CUDA device: the driver counts 0")
cuda.cuDeviceGetName(name, 128, 0)
print(f"{count.value} x {name.value.decode()}, driver {version.value // 1000}.{version.value % 1000 // 10}")
"""


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Refused for an unknown part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the report goes; made if it is not there")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels that were brought along; nothing is fetched")
    parser.add_argument("--minutes", type=float, default=8, help="time for all of it (default: 8)")
    parser.add_argument("--only", nargs="+", metavar="PART", default=[], help=f"of {', '.join(p.name for p in PARTS)}")
    parser.add_argument("--stand-in", action="store_true", help="run on a test double of the driver: a dry run, no GPU")
    parser.add_argument("--work", type=Path, help="where to build and keep what is built (default: a temporary folder, removed)")
    parser.add_argument(
        "--part-limit", type=float, default=1e6, help="seconds that a part may take at most, if less than its own"
    )
    args = parser.parse_args(argv)
    unknown = [name for name in args.only if name not in {p.name for p in PARTS}]
    if unknown:
        raise Refused(f"no part is called {unknown[0]}: the parts are {', '.join(p.name for p in PARTS)}")
    if not args.minutes > 0:
        raise Refused("--minutes: give more than 0")
    if args.wheels and not args.wheels.is_dir():
        raise Refused(f"--wheels {args.wheels}: there is no such folder")
    return args


class Contact:
    """One run: its folders, environment and time."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.work = args, work
        self.end = time.monotonic() + 60 * args.minutes
        self.cc = install.compiler()
        self.target = work / "target"
        shutil.rmtree(self.target, ignore_errors=True)
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("HFREDUCE_")}
        if "HFREDUCE_WERROR" in os.environ:
            self.environment["HFREDUCE_WERROR"] = os.environ["HFREDUCE_WERROR"]
        before = [p for p in [os.environ.get("PYTHONPATH", "")] if p]
        self.environment |= {
            "PYTHONPATH": os.pathsep.join([str(self.target), str(HERE), str(ROOT / "tests"), *before]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "FIRST_CONTACT_WORK": str(work),
            "FIRST_CONTACT_CC": self.cc,
            "FIRST_CONTACT_STAND_IN": "1" if args.stand_in else "",
        }
        if args.stand_in:
            path = install.stand_in(self.cc, work / "stand-in")
            self.environment["LD_LIBRARY_PATH"] = f"{path}:{os.environ.get('LD_LIBRARY_PATH', '')}".rstrip(":")
            self.environment.setdefault("FAKE_CUDA", "devices=1")

    def check(self) -> str:
        """Refuse what cannot work before anything is written; the driver and its devices, in words."""
        command = [sys.executable, "-c", PROBE.replace("OLDEST", str(OLDEST_DRIVER))]
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=self.environment, timeout=60)
        except subprocess.TimeoutExpired:
            raise Refused("the CUDA driver does not answer within 60 s") from None
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            raise Refused(lines[-1] if lines else f"asking the CUDA driver ended with status {done.returncode}")
        free = shutil.disk_usage(self.work).free
        if free < ROOM:
            raise Refused(
                f"{self.work} has {free >> 20} MiB left and building takes {ROOM >> 20} MiB: name another place with --work"
            )
        place = next(p for p in (self.args.out.resolve(), *self.args.out.resolve().parents) if p.exists())
        if shutil.disk_usage(place).free < REPORT_ROOM:
            raise Refused(f"--out {self.args.out}: No space left on device for a report, which may take {REPORT_ROOM >> 20} MiB")
        if self.needs_package():
            self._check_packages()
        return done.stdout.strip()

    def needs_package(self) -> bool:
        """Whether a part runs that needs the installed package."""
        return any(part.installed for part in self.chosen())

    def chosen(self) -> list[Part]:
        """The parts that run."""
        return [part for part in PARTS if not self.args.only or part.name in self.args.only]

    def _check_packages(self) -> None:
        missing = install.missing_packages(self.args.wheels)
        if missing:
            raise Refused(
                f"this Python has no {', no '.join(missing)} of the version needed: bring the wheels, and name their folder with --wheels"
            )
        if install.pip("--version", environment=self.environment).returncode:
            raise Refused(f"{sys.executable} has no pip, which installs the package: use a Python that has it")
        if self.args.wheels:
            install.install_wheels(self.args.wheels, self.target, self.environment)

    # ---- running ----

    def begin_install(self) -> subprocess.Popen[bytes] | None:
        """Build in the background: the parts that need the driver alone run meanwhile."""
        if not self.needs_package():
            return None
        self.install_began = time.monotonic()
        return session.start(
            [sys.executable, "-u", str(HERE / "install.py")], self.work / "install.output", self.environment, self.work
        )

    def end_install(self, process: subprocess.Popen[bytes]) -> dict[str, Any]:
        """Wait for it; its entry of the report."""
        limit = min(INSTALL_LIMIT, max(1.0, self.end - time.monotonic()))
        status = session.finish(process, limit)
        took = round(time.monotonic() - self.install_began, 1)
        return {
            **session.judge("install", self.work / "install.output", status, took, took),
            "title": "the package and the C tests",
        }

    def run(self, part: Part) -> dict[str, Any]:
        """Run one part, or say that no time is left for it."""
        limit = min(part.seconds, self.args.part_limit, self.end - time.monotonic())
        if limit < min(LEAST, part.seconds, self.args.part_limit):
            return not_run(part, "no time left: give more --minutes, or name it with --only")
        entry = session.run(part.name, HERE / "parts" / f"{part.name}.py", limit, self.environment, self.work)
        return {**entry, "title": part.title}

    def all(self, report: Report) -> None:
        """Run everything; the report is whole after each part."""
        process = self.begin_install()
        try:
            usable = True
            for part in sorted(self.chosen(), key=lambda p: p.installed):
                if part.installed and process:
                    entry, process = self.end_install(process), None
                    usable = entry["result"] == "ok"
                    self.tell(report, entry)
                self.tell(
                    report, self.run(part) if usable or not part.installed else not_run(part, "the package is not installed")
                )
        finally:
            if process:
                session.kill(process)

    def tell(self, report: Report, entry: dict[str, Any]) -> None:
        """Add to the report, and say on the terminal how the part went."""
        report.add(entry)
        print(f"{entry['part']}: {entry['result']} after {entry['seconds']} s {entry['error'][:300]}".rstrip(), flush=True)


def not_run(part: Part, why: str) -> dict[str, Any]:
    """The entry of a part that did not run."""
    return {"part": part.name, "title": part.title, "result": "not run", "seconds": 0.0, "figure": "", "error": why, "cases": []}


def facts(args: argparse.Namespace, driver: str) -> dict[str, Any]:
    """What the head of the report says."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    commit = ""
    if (ROOT / ".git").exists() and shutil.which("git"):
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return {
        "driver": driver,
        "stand_in": args.stand_in,
        "began": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "host": f"{platform.machine()}, Linux {platform.release()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
        "commit": commit or "unknown (no .git)",
        "minutes": args.minutes,
        "only": ", ".join(args.only) or "all parts",
    }


@contextlib.contextmanager
def working_folder(args: argparse.Namespace) -> Iterator[Path]:
    """--work, which stays; or a temporary folder, which goes."""
    if args.work:
        args.work.mkdir(parents=True, exist_ok=True)
        yield args.work.resolve()
        return
    with (
        tempfile.TemporaryDirectory(prefix="first-contact-", ignore_cleanup_errors=True)
        if sys.version_info
        >= (
            3,
            10,
        )
        else tempfile.TemporaryDirectory(prefix="first-contact-") as folder
    ):
        yield Path(folder)


def contact(args: argparse.Namespace) -> int:
    """Check, run all, print the table; the exit status."""
    fresh = not args.out.exists()
    with working_folder(args) as work:
        run = Contact(args, work)
        driver = run.check()
        report = Report(args.out, facts(args, driver))
        try:
            args.out.mkdir(parents=True, exist_ok=True)
            report.write()
        except OSError as error:
            if fresh:
                shutil.rmtree(args.out, ignore_errors=True)
            raise Refused(f"--out {args.out}: {error.strerror}") from None
        try:
            run.all(report)
        except OSError as error:
            kept = len(report.parts) - 1
            if fresh and not kept:
                shutil.rmtree(args.out, ignore_errors=True)
            raise Refused(f"--out {args.out}: {error.strerror}; the report there holds {kept} parts") from None
    print(f"\n{report.text()}\n\nreport: {args.out / 'report.md'}")
    return int(any(part["result"] not in ("ok", "skipped") for part in report.parts))


def main() -> int:
    """Run; bad input is one line and status 2."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the session of the part in progress is killed on the way out
    try:
        return contact(arguments())
    except Refused as why:
        print(f"first_contact: {why}", file=sys.stderr)
    except OSError as error:
        print(f"first_contact: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
