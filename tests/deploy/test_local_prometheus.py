"""The Prometheus beside `treeline serve`."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import psutil
import pytest

SERVING = """
import sys, time
from pathlib import Path
from deploy.local_prometheus import LocalPrometheus
from treeline.config import Config
folder = Path(sys.argv[1])
(folder / "prometheus").write_text("#!/bin/sh\\nexec sleep 60\\n")
(folder / "prometheus").chmod(0o700)
own = LocalPrometheus(str(folder / "prometheus"))
own.start(Config(), "127.0.0.1:1", folder / "data", folder)
print(own._process.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot tie a process to its parent")
def test_it_ends_with_a_service_that_is_killed(tmp_path):
    serving = subprocess.Popen([sys.executable, "-c", SERVING, tmp_path], stdout=subprocess.PIPE, text=True)
    assert serving.stdout is not None
    child = psutil.Process(int(serving.stdout.readline()))
    time.sleep(0.2)
    assert child.is_running()
    serving.send_signal(signal.SIGKILL)
    serving.wait()
    _, alive = psutil.wait_procs([child], timeout=5)
    assert not alive
