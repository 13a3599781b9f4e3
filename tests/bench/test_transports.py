"""`treeline bench transports` on a front door over an engine that counts."""

from __future__ import annotations

import asyncio
import json

import pytest
from typer.testing import CliRunner

from bench.service.transports import IN_TURN, Block, rows_of
from cli.main import app
from tests.front_door.doors import with_front_door
from tests.verifier_svc.fake_engine import FakeEngine


def test_costs_are_medians_of_rounds_the_warm_up_left_out():
    warm_up = [(0, "grpc", Block(1.0, 9.0)), (0, "http", Block(9.0, 1.0))]
    rounds = [
        (round_, transport, Block(100.0 * round_, 10.0) if transport == "grpc" else Block(rate, 10.0 + round_))
        for round_, rate in ((1, 90.0), (2, 190.0), (3, 297.0))
        for transport in IN_TURN
    ]
    rows, cost = rows_of([*warm_up, *rounds])
    assert [(row["transport"], row["tokens_per_s"], row["ttft_ms"]) for row in rows] == [
        ("grpc", 200.0, 10.0),
        ("http", 190.0, 12.0),
    ]
    assert cost == pytest.approx({"http_tokens_per_s_cost": 0.05, "http_ttft_cost_ms": 2.0})


def test_both_ports_are_asked_for_the_same_in_turns(tmp_path):
    async def scenario(s):
        report = tmp_path / "report.json"
        command = ["bench", "transports", "--server", s.door.endpoint, "--http", f"127.0.0.1:{s.door.http.port}"]
        command += ["--streams", "2", "--rounds", "1", "--per-stream", "2", "--max-tokens", "6", "--json", str(report)]
        done = await asyncio.to_thread(CliRunner().invoke, app, command)
        assert done.exit_code == 0, done.output
        assert "HTTP costs" in done.output
        asked = [sorted(bytes(r.prompt_token_ids) for r in s.engines[0].requests[i : i + 4]) for i in range(0, 24, 4)]
        return json.loads(report.read_text()), asked, {r.max_tokens for r in s.engines[0].requests}

    report, asked, lengths = with_front_door(scenario, FakeEngine(step_s=0.001))
    assert [row["transport"] for row in report["rows"]] == ["grpc", "http"]
    assert all(row["tokens_per_s"] > 0 and row["ttft_ms"] > 0 for row in report["rows"])
    assert asked == [asked[0]] * 6
    assert lengths == {6}
