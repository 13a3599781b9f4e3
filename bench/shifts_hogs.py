"""CPU hogs: processes that do nothing but take time from others."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

HOG = """
import os, sys
parent = int(sys.argv[1])
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, range(os.cpu_count()))
print(flush=True)
while os.getppid() == parent:
    for _ in range(1_000_000):
        pass
"""
"""Spins until it is killed, or its parent is; on any core, whichever its parent keeps to."""


@contextmanager
def cpu_hogs(count: int) -> Iterator[None]:
    """So many processes that spin, all from the first moment on; they are gone when this ends, however it does."""
    command = [sys.executable, "-S", "-c", HOG, str(os.getpid())]
    hogs: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(count):
            # In a session of its own: Ctrl-C is for us, who then end it.
            hogs.append(subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True))
        for hog in hogs:
            assert hog.stdout is not None
            hog.stdout.readline()
        yield
    finally:
        for hog in hogs:
            hog.kill()
        for hog in hogs:
            hog.communicate()
