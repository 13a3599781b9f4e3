"""`treeline bench objectives` on a scripted service, without Ray: which steps it takes, and what it reports."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager

import grpc
import pytest
from typer.testing import CliRunner

from bench.common import Prompt
from bench.load import Answer, End, Request, Tokens
from bench.local_engine import encode
from bench.service import objectives
from bench.synthetic import parse_acceptance
from cli.bench import objectives as command
from cli.main import app
from lm.store import load_tokenizer
from planner.fast.builtin_plan import builtin_plan
from planner.service.latency import PrometheusError
from tests.verifier_svc.services import save_tiny_model, tiny_config
from treeline.drafting import DraftRequest, DraftSequence, reply_from_proto, request_to_proto
from treeline.sampling import SamplingParams
from treeline.v1 import generation_pb2 as pb
from treeline.v1.drafting_pb2_grpc import DraftingServiceStub

TOKEN_S = 0.01


def test_a_step_settles_where_no_later_value_exceeds_the_limit():
    assert objectives.settled_s([(1, 5.0), (2, 9.0), (3, 5.0), (4, 6.0)], most=6) == 3
    assert objectives.settled_s([(1, 5.0), (2, 6.0)], most=6) == 1
    assert objectives.settled_s([(1, 5.0), (2, 9.0)], most=6) is None


@pytest.mark.parametrize(
    ("values", "turns"),
    [([], 0), ([5, 9, 14], 0), ([5, 6, 5, 6], 0), ([5, 9, 5, 9], 2), ([9, 5, 6, 4, 9], 1), ([5, 7, 6, 9, 5, 8], 2)],
)
def test_only_large_turns_are_swings(values, turns):
    assert objectives.swings(values, least=3) == turns


class ScriptedService:
    """Each open request gets a token every TOKEN_S, two of them with trees; plans rest on what runs."""

    def __init__(self, objective_s: float | None) -> None:
        self.objective_s, self.url, self.up = objective_s, "http://scripted", True
        self.open, self.ended = {}, []

    def submit(self, request):
        self.open[request.id] = request

    def poll(self, timeout_s):
        time.sleep(TOKEN_S)
        ended, self.ended = [End(key) for key in self.ended], []
        return ended + [Tokens(key, [1] if r.policy == "off" else [1, 2]) for key, r in self.open.items()]

    def abort(self, request_ids):
        self.ended, self.open = request_ids, {}

    def stop(self):
        self.up = False

    def restart(self):
        self.up = True

    def plan(self):
        source = "prometheus" if self.up else "steps"
        signal = pb.PlanSignal(name="inter_token_p95", value_s=TOKEN_S, objective_s=self.objective_s, source=source)
        return pb.VerifierPlan(version=1, step_budget_s=0.03 if self.objective_s else None, signals=[signal])


def test_a_synthetic_drafter_serves_what_the_target_said(tmp_path):
    config, prompt = tiny_config(save_tiny_model(tmp_path)), Prompt("a", "", "one two three")
    answers = [Answer(Request("a", prompt, 8, "off"), 0.0, list(range(10, end))) for end in (18, 12)]
    tokens = [*encode(load_tokenizer(tmp_path), prompt), 10]
    sequence = DraftSequence(1, 0, tokens, SamplingParams(), "chain:4", 4, 4, 1.0)
    request = DraftRequest(1, builtin_plan(config.limits), [sequence])
    with (
        objectives.synthetic_drafter(config, parse_acceptance("1"), answers) as endpoint,
        grpc.insecure_channel(endpoint) as channel,
    ):
        reply = next(DraftingServiceStub(channel).Draft(iter([request_to_proto(request)]), timeout=10))
    assert reply_from_proto(reply, request, 260).forest.token_ids.tolist() == [11, 12, 13, 14]


def test_the_command_steps_the_load_stops_prometheus_and_reports(tmp_path, monkeypatch):
    services, path = [], tmp_path / "report.json"

    @contextmanager
    def started(config, report):
        assert config.metrics.prometheus == "auto"
        assert config.drafter.endpoints == (["synthetic:1"] if services else [])
        asked_ms = config.planner.objectives.inter_token_p95_ms
        services.append(ScriptedService(asked_ms and asked_ms / 1000))
        yield objectives.Service(services[-1], services[-1].plan, services[-1])

    @contextmanager
    def synthetic_drafter(config, acceptance, answers):
        assert acceptance[0][0] == 0.72
        assert {tuple(answer.token_ids[:1]) for answer in answers} == {(1,)}
        yield "synthetic:1"

    async def measured(url):
        if not services[-1].up:
            raise PrometheusError("away")
        return {"a": {"inter_token_p95": TOKEN_S}, "b": {}}

    monkeypatch.setattr(objectives, "started", started)
    monkeypatch.setattr(objectives, "synthetic_drafter", synthetic_drafter)
    monkeypatch.setattr(objectives, "measure_all", measured)
    monkeypatch.setattr(objectives, "SAMPLE_S", 0.02)
    monkeypatch.setattr(objectives.shutil, "which", lambda program: program)
    monkeypatch.setattr(command, "check_startable", lambda config: None)
    result = CliRunner().invoke(app, ["bench", "objectives", "--seconds", "0.2", "--json", str(path)])
    assert result.exit_code == 0, result.output

    report = json.loads(path.read_text())
    rows = report["rows"]
    assert [(row["arm"], row["streams"]) for row in rows] == [
        (arm, streams) for arm in ("plain", "free", "held") for streams in (1, 16, 4)
    ] + [("outage", 16)]
    plain_ms = rows[2]["p95_ms_clients"]
    assert plain_ms >= 1000 * TOKEN_S
    assert {row["objective_ms"] for row in rows} == {services[2].objective_s * 1000}
    assert rows[0]["objective_ms"] == pytest.approx(1.3 * plain_ms)
    assert all(row["p95_ms_prometheus"] == 1000 * TOKEN_S for row in rows[:-1])
    away = [second for second in report["seconds"] if second["source"] == "steps"]
    assert {second["arm"] for second in away} == {"outage"}
    assert all(second["p95_ms_prometheus"] is None for second in away)
    assert {second["step_budget_ms"] for second in away} == {30.0}
    assert report["outage"]["fallback_s"] >= 0
    assert report["outage"]["return_s"] >= 0
