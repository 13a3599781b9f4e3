"""The page of metrics."""

from __future__ import annotations

import urllib.error
import urllib.request

import pytest
from prometheus_client import CollectorRegistry, Gauge

from treeline.config import MetricsConfig
from treeline.errors import ConfigError
from treeline.metrics import serve_metrics


def page(port: int, headers: dict[str, str]) -> tuple[int, bytes]:
    asked = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers=headers)
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
