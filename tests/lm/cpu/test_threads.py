"""Threads that keep to cores of their own for a while."""

from __future__ import annotations

import os
import threading
from contextlib import suppress

import pytest
import torch

from lm.cpu.native import library
from lm.cpu.threads import own_cores

CPU = torch.device("cpu")
ALL = os.sched_getaffinity(0)

needs_kernels = pytest.mark.skipif(library() is None, reason="the kernels were not built")


def cores_of_threads() -> list[set[int]]:
    """Of each thread of this process, one after the other."""
    cores = []
    for task in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # It has just ended.
            cores.append(os.sched_getaffinity(int(task)))
    return cores


@pytest.fixture
def found() -> dict[str, list[set[int]]]:
    """What `in_thread` saw."""
    return {}


def in_thread(found: dict[str, list[set[int]]], device: torch.device | None, threads: int) -> None:
    """The cores of all threads before, while and after a thread with so many OpenMP threads has cores of its own."""

    def run() -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            found["before"] = cores_of_threads()
            with own_cores(device):
                found["while"] = cores_of_threads()
            found["after"] = cores_of_threads()
        finally:
            torch.set_num_threads(before)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


@needs_kernels
def test_every_thread_has_a_core_of_its_own_for_as_long_as_asked(found):
    in_thread(found, CPU, len(ALL))
    single = [cores for cores in found["while"] if len(cores) == 1]
    assert sorted(core for cores in single for core in cores) == sorted(ALL) or len(ALL) == 1
    assert all(cores == ALL for cores in found["after"])


@pytest.mark.parametrize("device", [None, torch.device("cuda")])
def test_what_runs_elsewhere_is_left_alone(found, device):
    in_thread(found, device, len(ALL))
    assert all(cores == ALL for cores in found["while"])


@pytest.mark.skipif(len(ALL) < 2, reason="one core")
def test_a_pool_of_other_size_is_left_alone(found):
    in_thread(found, CPU, len(ALL) - 1)
    assert all(cores == ALL for cores in found["while"])
