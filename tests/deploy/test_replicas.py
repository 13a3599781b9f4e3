"""What replicas know of their own addresses."""

from __future__ import annotations

import pytest

from deploy.replicas import unreachable
from treeline.rpc.channels import OWN_ADDRESS, reachable_host

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
