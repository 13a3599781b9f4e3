"""Our kernels compile for every architecture that we serve on, without spills and within its shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SHARED_BYTES = 99 << 10
"""Of one block on sm_89, which has the least."""


@pytest.mark.timeout(600)
def test_kernels_fit_every_architecture() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.lm.cuda.ptxas"], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr[-2000:]
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    assert {kernel["architecture"] for kernel in kernels} == {80, 89, 90}
    for kernel in kernels:
        assert kernel["STACK"] == kernel["LOCAL"] == 0, f"spills: {kernel}"
        assert kernel["shared_bytes"] <= SHARED_BYTES, kernel
