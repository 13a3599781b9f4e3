"""The page of metrics."""

from __future__ import annotations

import urllib.error
import urllib.request

import pytest
from prometheus_client import CollectorRegistry, Gauge

from treeline import __version__
from treeline.config import MetricsConfig
from treeline.errors import ConfigError
from treeline.metrics import VerifierMetrics
from treeline.telemetry.page import labelled, new_registry, serve_metrics


def page(port: int, headers: dict[str, str], path: str = "/metrics") -> tuple[int, bytes]:
    asked = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(asked, timeout=5) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_a_page_may_need_a_token(tmp_path):
    registry = CollectorRegistry()
    Gauge("secrets", "how many", registry=registry).set(3)
    assert page(serve_metrics(registry, MetricsConfig(base_port=0)), {})[0] == 200
    path = tmp_path / "tokens"
    config = MetricsConfig(base_port=0, token_file=path)
    with pytest.raises(ConfigError, match="cannot read"):
        serve_metrics(registry, config)
    path.write_text("scraper\n")
    port = serve_metrics(registry, config)
    for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "Basic scraper"}):
        status, text = page(port, headers)
        assert status == 401
        assert b"secrets" not in text
    status, text = page(port, {"Authorization": "bearer scraper"})
    assert (status, b"secrets 3.0" in text) == (200, True)
    assert page(port, {}, "/healthz") == (200, b"alive\n")
    assert page(port, {}, "/")[0] == 404


def test_series_carry_their_models_and_replicas_name():
    registry = new_registry()
    verifier = VerifierMetrics(registry)
    verifier.observe_finished("stop", 30, 5, queue_s=0.5, ttft_s=0.75, total_s=2.0, accepted_length=2.0)
    verifier.set_load(running=1, waiting=0, kv_used=16, kv_total=64, drafter_ready=True, problem=False)
    values = labelled(registry, model_name="m", replica="1").get_sample_value

    def value(name, **labels):
        return values(name, {"model_name": "m", "replica": "1", **labels})

    assert value("treeline_request_success_total", finished_reason="stop") == 1
    assert value("treeline_request_prefill_time_seconds_sum") == 0.25
    assert value("treeline_request_decode_time_seconds_sum") == 1.25
    assert value("treeline_request_prompt_tokens_sum") == 30
    assert value("treeline_request_generation_tokens_bucket", le="8.0") == 1
    assert value("treeline_kv_cache_usage_perc") == 0.25
    assert value("treeline_build_info", version=__version__) == 1
    assert value("process_resident_memory_bytes") > 1e6
