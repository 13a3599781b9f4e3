"""What replicas know of their own addresses."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from collections import deque

import pytest

from deploy import replicas
from deploy.replicas import discover, known_profiles, openmp, unreachable
from treeline.config import SPIN_COUNT, Config
from treeline.rpc.channels import OWN_ADDRESS, freeze_started, reachable_host

HERE, THERE = "10.0.0.1", "10.0.0.2"


@pytest.mark.parametrize(
    ("endpoint", "asked_from", "says"),
    [
        ("127.0.0.1:5", THERE, "127.0.0.1:5 cannot be reached from 10.0.0.2: set internal.host"),
        ("[::1]:5", THERE, "cannot be reached"),
        ("127.0.0.1:5", HERE, ""),
        ("127.0.0.1:5", "", ""),
        (f"{HERE}:5", THERE, ""),
    ],
)
def test_a_peer_on_another_node_cannot_reach_loopback(endpoint, asked_from, says):
    problem = unreachable(endpoint, asked_from, HERE)
    assert says in problem
    assert bool(says) == bool(problem)


def test_a_server_on_all_interfaces_names_the_address_that_ray_knows(monkeypatch):
    monkeypatch.setenv(OWN_ADDRESS, HERE)
    assert reachable_host("0.0.0.0") == HERE
    assert reachable_host("127.0.0.1") == "127.0.0.1"


@pytest.mark.parametrize(
    ("service", "settings", "threads"),
    [
        ("verifier", {}, os.cpu_count()),
        ("verifier", {"verifier": {"target": {"threads": 3}}}, 3),
        ("drafter", {}, 1),
        ("drafter", {"drafter": {"model": {"model": "default", "threads": 2}}}, 2),
        ("front-door", {}, 1),
    ],
)
def test_a_replica_has_the_threads_of_its_model(monkeypatch, service, settings, threads):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    expected = {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": SPIN_COUNT}
    assert openmp(service, Config.model_validate(settings)) == expected


SILENT = object()


class Replicas:
    """A handle of replicas with these answers, one of which may be an exception, or SILENT."""

    def __init__(self, *answers):
        self.answers = answers

    def broadcast(self, method, *arguments):
        return self

    async def _fetch_replica_results_async(self):
        return [Replica(answer) for answer in self.answers]


class Unknown(Replicas):
    """Serve does not say which replicas there are."""

    async def _fetch_replica_results_async(self):
        await asyncio.sleep(60)


class Replica:
    def __init__(self, answer):
        self.answer = answer

    async def get_async(self):
        if self.answer is SILENT:
            await asyncio.sleep(60)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_a_verifier_starts_although_others_do_not_send_their_profiles(monkeypatch, caplog):
    monkeypatch.setattr(replicas, "DISCOVERY_TIMEOUT_S", 0.01)
    said = ["not all other verifiers sent their device profiles within 0.01 s"]
    for handle, profiles in ((Replicas(SILENT, {"a": "b"}), [{"a": "b"}]), (Unknown(), [])):
        caplog.clear()
        assert asyncio.run(known_profiles(handle)) == profiles
        assert [record.message for record in caplog.records] == said


def test_a_replica_that_hangs_hides_no_other(monkeypatch):
    """It stays known itself, as it may only be busy; one that is gone does not answer at all."""
    monkeypatch.setattr(replicas, "DISCOVERY_TIMEOUT_S", 0.01)
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: HERE)
    handle = Replicas("a:1", "b:1")
    endpoints = discover(handle)

    async def found(*answers):
        handle.answers = answers
        return sorted(await endpoints())

    async def scenario():
        assert await found("a:1", "b:1") == ["a:1", "b:1"]
        assert await found("a:1", SILENT, "c:1") == ["a:1", "b:1", "c:1"]
        assert await found(SILENT, SILENT) == ["a:1", "b:1", "c:1"]
        assert await found("a:1", RuntimeError("broken")) == ["a:1"]

    asyncio.run(scenario())


def test_the_collector_passes_over_what_lives_at_the_start_and_soon_finds_what_ends_later():
    kept, live, most, thresholds = [[] for _ in range(200_000)], deque(maxlen=1000), 0, gc.get_threshold()
    try:
        freeze_started()
        assert gc.get_freeze_count() > len(kept)
        for number in range(60_000):
            cycle = []
            cycle.append(cycle)
            live.append(cycle)
            if number % 1000 == 0:
                most = max(most, len(gc.get_objects()))
        # 10,200; 14,100 without the second collection, or at the usual thresholds. On 3.13 always 13,200: no proof.
        assert most < (13_700 if sys.version_info >= (3, 13) else 12_000)
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
