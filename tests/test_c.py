"""Build and run the C tests (tests/c/test_*.c), plain and under sanitizers, and build the library with warnings as errors."""

from __future__ import annotations

from pathlib import Path

import pytest
from programs import (
    BUILD_LIMIT,
    PATIENCE,
    SANITIZER_ENV,
    SOURCES,
    build,
    building,
    built,
    environment,
    need_compiler,
    need_sanitizer,
    run_to_end,
    shorten,
)

#: Arguments by program and variant; a sanitized program costs 5 to 20 times as much.
QUICK = {
    "test_collectives": ["--quick"],
    "test_dtypes": ["2,1"],
    "test_misuse": ["1"],
    "test_p2p": ["--quick"],
    "test_plan": ["--quick"],
    "test_verbs": ["--quick"],
}
#: Who has threads, and so is worth running under TSan.
THREADED = ["test_async", "test_base", "test_collectives", "test_misuse", "test_naps", "test_orders", "test_p2p"]
#: The exit status by which a program says that it cannot run here; its output says why.
SKIPPED = 77
#: Seconds that a program may run. Building comes on top.
RUN_LIMIT = 240
PROGRAMS = sorted(p.stem for p in SOURCES.glob("test_*.c"))
CASES = [("plain", p) for p in PROGRAMS] + [("address", p) for p in PROGRAMS] + [("thread", p) for p in PROGRAMS if p in THREADED]


@pytest.mark.limit(RUN_LIMIT + BUILD_LIMIT)
@pytest.mark.parametrize(("variant", "program"), CASES, ids=[f"{v}-{p}" for v, p in CASES])
def test_program(variant: str, program: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need_compiler()
    sanitize = "" if variant == "plain" else variant
    if sanitize:
        need_sanitizer(sanitize, tmp_path)
    target = built(program, variant)
    arguments = QUICK.get(program, []) if sanitize else []
    env = environment(**SANITIZER_ENV[variant])
    if program == "test_base":  # looks at the presets
        del env["HFREDUCE_TIMEOUT"]
    code, text = run_to_end([str(target), *arguments], tmp_path, RUN_LIMIT, env)
    if code == SKIPPED:
        pytest.skip(text.strip() or f"{program} says that it cannot run here")
    if code != 0:
        how = f"still ran at its limit of {RUN_LIMIT} s (times {PATIENCE:g})" if code is None else f"ended with {code}"
        pytest.fail(f"{program} ({variant}) {how}\n{shorten(text)}", pytrace=False)
    with capsys.disabled():
        print(f"\n  {program} ({variant}): {text.strip().splitlines()[-1] if text.strip() else 'no output'}", end=" ")


@pytest.mark.limit(BUILD_LIMIT)
@pytest.mark.parametrize("cc", ["gcc", "clang"])
def test_libraries_build_without_warnings(cc: str) -> None:
    need_compiler(cc)
    with building(f"strict-{cc}") as out:
        assert build.build_nccl(out, werror=True, cc=cc).exists()
