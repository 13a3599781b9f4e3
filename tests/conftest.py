"""In CI, a test that is skipped for an unexpected reason fails: what it needs should have been installed."""

from __future__ import annotations

import os
import re
from collections.abc import Generator
from typing import Any

import pytest

# Two workers share two cores, and OpenMP threads that wait for each other spin. Read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A thread of Ray Serve that asks a Ray which stops would start another one. Read when ray is imported.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")

import tests.lm.interpreter  # noqa: F401  # before any test imports Triton's kernels

MAY_BE_SKIPPED_IN_CI = re.compile(
    "no CUDA device|this machine has a CUDA device"
    "|no vectors of 16|one core"  # the processor
    "|could not import 'openvino'"  # an optional peer of `treeline bench peers`
    "|cannot fetch gemma3-270m"  # a slow test's model
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    return _judged((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    return _judged((yield))


def _judged(report: Any) -> Any:
    if os.environ.get("CI") and report.skipped and not hasattr(report, "wasxfail"):
        path, line, reason = report.longrepr
        if not MAY_BE_SKIPPED_IN_CI.search(reason):
            report.outcome, report.longrepr = "failed", f"{path}:{line}: CI may not skip this test. {reason}"
    return report
