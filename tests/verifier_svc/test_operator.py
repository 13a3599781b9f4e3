"""What an operator asks at three in the morning, answered by a running service."""

from __future__ import annotations

import asyncio
import logging
import re

import pytest

from tests.verifier_svc.service.test_service import collect
from tests.verifier_svc.services import running_services, save_tiny_model, tiny_config
from treeline.v1 import generation_pb2 as pb


def ask(request_id: str, max_tokens: int, policy: str) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        request_id=request_id,
        prompt="one two three, one two three, one two",
        stopping=pb.StoppingParams(max_tokens=max_tokens),
        speculation=pb.SpeculationOptions(policy=policy),
    )


def test_why_was_it_slow_what_did_it_get_and_what_was_planned(tmp_path, caplog):
    caplog.set_level(logging.INFO, "front_door.access")

    async def run():
        async with running_services(tiny_config(save_tiny_model(tmp_path), max_running_requests=1)) as services:
            first = asyncio.create_task(collect(services.stub.Generate(ask("first", 200, "off"))))
            while not (await services.load()).num_requests_running:
                await asyncio.sleep(0.01)
            await collect(services.stub.Generate(ask("late", 60, "smart")))
            await first
            async with asyncio.timeout(10):
                while not (plans := (await services.stub.GetPlan(pb.GetPlanRequest())).plans)[0].version:
                    await asyncio.sleep(0.05)
            return plans[0], await services.page(services.verifier.metrics_port)

    plan, page = asyncio.run(run())
    lines = {line["request_id"]: line for line in map(vars, caplog.records) if line["name"] == "front_door.access"}
    first, late = lines["first"], lines["late"]

    # Why was it slow? It waited for the only slot; the parts add up to what the client saw.
    assert late["queue_s"] > max(late["prefill_s"], first["queue_s"])
    assert late["queue_s"] + late["prefill_s"] + late["decode_s"] == pytest.approx(late["seconds"], abs=0.5)

    # Which policy and price did it get?
    assert (first["policy"], first["price"], first["accepted_length"]) == ("off", 0.0, 1.0)
    assert late["policy"] == "smart"
    assert late["price"] > 0

    # What did the planner decide, and why?
    assert plan.reason
    assert plan.price > 0

    # What does speculation buy now?
    speedup = re.search(r"treeline_estimated_speedup\{(.*)\} (\S+)", page)
    assert speedup
    assert 'replica="0"' in speedup[1]
    assert float(speedup[2]) > 0
