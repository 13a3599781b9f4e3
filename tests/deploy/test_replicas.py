"""What replicas know of their own addresses."""

from __future__ import annotations

import asyncio
import gc

import pytest

from deploy import replicas
from deploy.replicas import known_profiles, unreachable
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


class Silent:
    """A handle whose replicas do not answer."""

    def broadcast(self, method):
        return self

    async def results_async(self, return_exceptions):
        await asyncio.sleep(60)


def test_a_verifier_starts_although_others_do_not_send_their_profiles(monkeypatch, caplog):
    monkeypatch.setattr(replicas, "DISCOVERY_TIMEOUT_S", 0.01)
    assert asyncio.run(known_profiles(Silent())) == []
    assert [record.message for record in caplog.records] == ["no device profiles from other verifiers within 0.01 s"]


def test_the_collector_passes_over_what_lives_at_the_start():
    kept = [[] for _ in range(1000)]
    try:
        freeze_started()
        assert len(kept) == 1000
        assert gc.get_freeze_count() > 1000
        assert len(gc.get_objects()) < 1000
    finally:
        gc.unfreeze()
