"""The service on several nodes: scaled, redeployed and robbed of nodes under streams of which none may break."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import pytest

from tests.deploy.cluster import BURST, STREAMS, Deployed, Streams, deployed, growing, until
from treeline.client import TreelineClient

pytestmark = pytest.mark.ray
SERVICES = ("planner", "drafter", "verifier", "front-door")


@pytest.fixture(scope="module")
def service(tmp_path_factory) -> Iterator[Deployed]:
    with deployed(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture
def streams(service) -> Iterator[Streams]:
    *_, expected = growing(TreelineClient(f"127.0.0.1:{service.port}"), "off")
    running = Streams(service.port, expected)
    running.run(STREAMS)
    yield running
    running.stop()
    assert not running.problems
    assert running.whole >= STREAMS


def test_verifiers_follow_the_load(service, streams):
    streams.run(BURST)
    until(lambda: service.verifiers() == 2, "a second verifier while requests wait")
    streams.run(STREAMS)
    until(lambda: service.verifiers() == 1, "one verifier again")
    streams.go_on()


def test_a_changed_setting_restarts_those_whom_it_concerns(service, streams):
    before = {name: service.replicas(name) for name in SERVICES}
    redeploy(service, prefill_chunk_tokens=48)
    streams.go_on()
    for name in ("planner", "drafter", "front-door"):
        assert service.replicas(name) == before[name]


def test_a_verifier_that_is_lost_with_its_node_comes_back_on_another(service, streams):
    (lost,) = service.replicas("verifier")
    service.lose_node_of(lost)
    until(lambda: lost not in service.replicas("verifier"), "a verifier on another node")
    streams.go_on()
    service.add_node(verifiers=1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_times_down_to_one_verifier(service, streams):
    seconds = []
    for _ in range(20):
        streams.run(BURST)
        up_s = until(lambda: service.verifiers() == 2, "a second verifier")
        streams.run(STREAMS)
        seconds.append((up_s, until(lambda: service.verifiers() == 1, "one verifier again")))
        assert not streams.problems
    report("scale up, scale down", seconds, streams)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_times_redeployed(service, streams):
    seconds = []
    for turn in range(20):
        new_s = redeploy(service, prefill_chunk_tokens=33 + turn % 2)
        seconds.append((new_s, streams.go_on()))
        assert not streams.problems
    report("new verifier, next answers", seconds, streams)


@pytest.mark.slow
def test_a_front_door_that_is_lost_with_its_node_comes_back_on_another(service, streams):
    """Two nodes for front doors alone; the streams' clients resume by themselves."""
    (first,) = service.replicas("front-door")
    for _ in range(2):
        service.add_node(others=1)
    service.deploy("server", resources={"num_cpus": 0, "custom": {"others": 1}})
    until(lambda: service.replicas("front-door") not in ([], [first]), "the front door on one of them")
    streams.go_on()
    (lost,) = service.replicas("front-door")
    service.lose_node_of(lost)
    back_s = until(lambda: lost not in service.replicas("front-door") and service.verifiers() > 0, "a front door")
    report("front door back, next answers", [(back_s, streams.go_on())], streams)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_drafters_follow_the_time_that_verifiers_wait_for_them(service):
    """With long drafts two verifiers wait for one drafter; short ones of one stream leave it idle."""
    *_, expected = growing(TreelineClient(f"127.0.0.1:{service.port}"), "off")
    before = service.replicas("drafter")
    service.scale("verifier", 2)
    service.scale(
        "drafter", {"min": 1, "max": 2, "up_after_s": 0, "down_after_s": 2}, kind="model", model=service.target
    )
    until(lambda: service.replicas("drafter") not in ([], before) and service.verifiers() == 2, "two verifiers")
    busy, calm = Streams(service.port, expected, "chain:8"), Streams(service.port, expected, "chain:1")
    busy.run(STREAMS)
    up_s = until(lambda: len(service.drafter_sessions()) == 2, "a second drafter")
    shared_s = until(lambda: min(service.drafter_sessions()) > 0, "a verifier that drafts with it")
    calm.run(1)
    busy.stop()
    down_s = until(lambda: len(service.replicas("drafter")) == 1, "one drafter again")
    calm.go_on()
    until(lambda: service.drafter_sessions() == [1], "drafts of the one that is left")
    calm.stop()
    report("scale up, shared, scale down", [(up_s, shared_s, down_s)], busy)
    for streams in (busy, calm):
        assert streams.whole
        assert not streams.problems


def redeploy(service: Deployed, **settings: int) -> float:
    """Change the verifiers' settings. Returns the seconds until new ones run."""
    before = set(service.replicas("verifier"))
    service.deploy(**settings)
    return until(lambda: not before & set(service.replicas("verifier")), "a new verifier")


def report(what: str, seconds: list[tuple[float, float]], streams: Streams) -> None:
    """Print the medians and maxima, for docs/operations.md."""
    shown = [f"{statistics.median(column):.1f} s (most {max(column):.1f})" for column in zip(*seconds, strict=True)]
    print(f"\n{what}: {', '.join(shown)}; {streams.whole} answers, {streams.refused} refused")
