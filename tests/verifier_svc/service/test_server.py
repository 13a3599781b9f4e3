"""All four services together, through the clients' port."""

from __future__ import annotations

import asyncio
import random
import re
import threading
from pathlib import Path

import grpc
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from cli.top import load_table
from lm.model import LanguageModel
from tests.lm.tiny import tiny_llama, tiny_tokenizer
from tests.verifier_svc.service.test_service import failure
from tests.verifier_svc.services import Services, running_services, save_tiny_model, tiny_config
from treeline.config import Config, DrafterConfig, ModelConfig, ObjectivesConfig
from treeline.errors import ConfigError
from treeline.sampling import SamplingParams
from treeline.v1 import generation_pb2 as pb
from verifier_svc.service.server import served
from verifier_svc.service.validation import parse_generate

POLICIES = ("off", "chain:4", "static:3-2-1", "eagle2:4,3,8", "smart-paper", "smart")
PROMPT = "one two three, one two three, one two"
UNHURRIED_S = 60
ENDLESS_TOKENS = 3_500
"""An answer that no test waits for: seconds of work on any machine."""


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "target")


@pytest.fixture(scope="module")
def endless_config(tmp_path_factory) -> Config:
    """With room for endless answers. The target is its own draft model."""
    target = save_tiny_model(tmp_path_factory.mktemp("models") / "target", max_position_embeddings=4096)
    return tiny_config(target, drafters(target)["both"], max_context_tokens=4096, max_output_tokens=4096)


def with_services(scenario, config: Config):
    async def run():
        async with running_services(config) as services:
            return await asyncio.wait_for(scenario(services), UNHURRIED_S)

    return asyncio.run(run())


def ask(prompt: str = PROMPT, max_tokens: int = 32, policy: str = "smart", **sampling) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        prompt=prompt,
        sampling=pb.SamplingParams(**sampling),
        stopping=pb.StoppingParams(max_tokens=max_tokens),
        speculation=pb.SpeculationOptions(policy=policy),
    )


async def answer(services: Services, request: pb.GenerateRequest) -> tuple[list[int], pb.GenerateComplete]:
    """Token ids and the last message."""
    responses = [response async for response in services.stub.Generate(request, timeout=UNHURRIED_S)]
    tokens = [token for response in responses[:-1] for token in response.chunk.token_ids]
    assert "".join(response.chunk.text for response in responses[:-1]) or not tokens
    return tokens, responses[-1].complete


async def nothing_left(services: Services) -> None:
    """Until no request, block or session is held by anyone."""

    async def idle() -> bool:
        load = await services.load()
        sessions = "treeline_drafter_sessions 0.0" in await services.page(services.drafter.metrics_port)
        return sessions and not (load.num_requests_running or load.num_requests_waiting or load.kv_blocks_used)

    for _ in range(200):
        if await idle():
            return
        await asyncio.sleep(0.02)
    pytest.fail(f"left behind: {await services.load()}")


def drafters(target: Path) -> dict[str, DrafterConfig]:
    draft_model = ModelConfig(model=str(target), dtype="float32", threads=1)
    return {
        "ngram": DrafterConfig(kind="ngram"),
        "model": DrafterConfig(kind="model", model=draft_model),
        "both": DrafterConfig(kind="model+ngram", model=draft_model),
    }


@pytest.mark.parametrize("kind", ["ngram", "model", "both"])
def test_greedy_answers_are_the_targets_own_under_every_policy(target, kind):
    hf = AutoModelForCausalLM.from_pretrained(target)
    prompt = torch.tensor([AutoTokenizer.from_pretrained(target)(PROMPT).input_ids])

    async def scenario(services):
        mixed = [answer(services, ask(policy=policy, max_tokens=48)) for policy in POLICIES]
        found = await asyncio.gather(*mixed)
        await nothing_left(services)
        return found

    config = tiny_config(target, drafters(target)[kind])
    found = with_services(scenario, config)
    expected = hf.generate(prompt, max_new_tokens=48, do_sample=False, pad_token_id=0)[0, prompt.shape[1] :].tolist()
    assert [tokens for tokens, _ in found] == [expected] * len(POLICIES)
    accepted = {complete.policy: complete.speculation.accepted_nodes for _, complete in found}
    assert accepted["off"] == 0
    assert accepted["chain:4"] > 0


def test_a_drafter_of_another_target_is_named_wherever_people_look(target, tmp_path):
    async def scenario(services):
        await asyncio.gather(*(answer(services, ask(f"{i} {PROMPT}", 48, "chain:4")) for i in range(4)))
        while not re.search(r"treeline_drafter_problem\{.*\} 1.0", await services.page(services.verifier.metrics_port)):
            await asyncio.sleep(0.05)
        return load_table("load", await services.load())

    other = drafters(save_tiny_model(tmp_path / "other", seed=1))["model"]
    shown = with_services(scenario, tiny_config(target, other))
    assert any("first choices" in str(cell) for column in shown.columns for cell in column.cells)


def test_a_seed_gives_one_text_whatever_the_policy(target):
    async def scenario(services):
        asked = [
            ask(policy=policy, temperature=0.9, top_k=50, top_p=0.95, seed=seed)
            for seed in (7, 8)
            for policy in POLICIES
        ]
        return [tokens for tokens, _ in await asyncio.gather(*(answer(services, request) for request in asked))]

    found = with_services(scenario, tiny_config(target, drafters(target)["both"]))
    of_seed_7, of_seed_8 = found[: len(POLICIES)], found[len(POLICIES) :]
    assert of_seed_7 == [of_seed_7[0]] * len(POLICIES)
    assert of_seed_8 == [of_seed_8[0]] * len(POLICIES)
    assert of_seed_7[0] != of_seed_8[0]


def test_each_of_n_answers_is_that_of_its_seed_under_every_policy(target):
    """And the prompt is computed once, for the first of them."""

    async def scenario(services):
        async def together(policy: str) -> tuple[list[list[int]], list[int]]:
            request = ask(f"{policy} {PROMPT}" * 4, 12, policy, temperature=0.9, seed=7)
            request.n = 3
            tokens, cached = [[], [], []], [0, 0, 0]
            async for response in services.stub.Generate(request):
                tokens[response.chunk.index] += response.chunk.token_ids
                cached[response.complete.index] |= response.complete.usage.cached_prompt_tokens
            return tokens, cached

        for policy in ("off", "chain:4", "smart"):
            tokens, cached = await together(policy)
            assert cached[0] == 0
            assert min(cached[1:]) >= 16, "no whole block of the prompt came from the cache"
            alone = [ask(f"{policy} {PROMPT}" * 4, 12, "off", temperature=0.9, seed=7 + i) for i in range(3)]
            assert tokens == [(await answer(services, request))[0] for request in alone]
        await nothing_left(services)

    with_services(scenario, tiny_config(target, drafters(target)["both"]))


def test_unset_sampling_is_as_the_operator_says():
    hf = tiny_llama()
    hf.generation_config = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.9, eos_token_id=[7, 9])
    model = LanguageModel.from_hf(hf, tiny_tokenizer())
    config = Config.model_validate({"verifier": {"sampling_defaults": {"temperature": 0.5}}})
    info = served(model, config)
    assert (info.sampling, info.eos_token_ids) == (SamplingParams(0.5, top_p=0.9), {7, 9, 256})
    limits, verifier = config.limits, config.verifier
    asked, _ = parse_generate(pb.GenerateRequest(prompt="x"), info, limits, verifier)
    cold, _ = parse_generate(ask(temperature=0.001, top_k=-1), info, limits, verifier)
    assert asked.sampling.temperature == 0.5
    assert (cold.sampling.temperature, cold.sampling.top_k) == (0.0, 0)


def test_sixteen_streams_with_cancellations_and_deadlines_leave_nothing(endless_config):
    """Half of the streams run to their end; a quarter are dropped and a quarter run out of time, at random moments."""
    chance = random.Random(0)

    async def dropped(services, request) -> str:
        call = services.stub.Generate(request)
        for _ in range(chance.randint(1, 4)):
            await call.read()
        call.cancel()
        return "CANCELLED"

    async def late(services, request) -> str:
        call = services.stub.Generate(request, timeout=chance.uniform(0.02, 0.2))
        return (await failure(call)).code().name

    async def finished(services, request) -> str:
        tokens, complete = await answer(services, request)
        assert len(tokens) == complete.usage.completion_tokens == request.stopping.max_tokens
        return pb.FinishReason.Name(complete.finish_reason)

    async def scenario(services):
        long, short = ask(max_tokens=ENDLESS_TOKENS), ask(max_tokens=24, temperature=0.7)
        short.stopping.ignore_eos = True
        streams = [finished(services, short) for _ in range(8)]
        streams += [dropped(services, long) for _ in range(4)] + [late(services, long) for _ in range(4)]
        chance.shuffle(streams)
        ends = await asyncio.gather(*streams)
        await nothing_left(services)
        load = await services.load()
        tasks = {task.get_name() for task in asyncio.all_tasks() if "Generate" in repr(task.get_coro())}
        return sorted(ends), load.kv_blocks_total, tasks

    ends, kv_blocks_total, tasks = with_services(scenario, endless_config)
    assert ends == ["CANCELLED"] * 4 + ["DEADLINE_EXCEEDED"] * 4 + ["FINISH_REASON_LENGTH"] * 8
    assert kv_blocks_total > 0
    assert not tasks


def test_a_full_queue_refuses_and_takes_again_when_there_is_room(target):
    async def end(services) -> str:
        try:
            return pb.FinishReason.Name((await answer(services, ask(max_tokens=100)))[1].finish_reason)
        except grpc.aio.AioRpcError as error:
            return error.code().name

    async def scenario(services):
        ends = await asyncio.gather(*(end(services) for _ in range(12)))
        await nothing_left(services)
        return ends, await end(services)

    ends, afterwards = with_services(scenario, tiny_config(target, max_running_requests=1, max_waiting_requests=2))
    assert set(ends) == {"RESOURCE_EXHAUSTED", "FINISH_REASON_LENGTH"}
    assert ends.count("FINISH_REASON_LENGTH") >= 3
    assert afterwards == "FINISH_REASON_LENGTH"


def test_abort_ends_a_stream_and_an_open_id_is_refused(endless_config):
    async def scenario(services):
        request = ask(max_tokens=ENDLESS_TOKENS)
        request.request_id = "mine"
        call = services.stub.Generate(request)
        await call.read()
        twice = await failure(services.stub.Generate(request))
        aborted = (await services.stub.Abort(pb.AbortRequest(request_ids=["mine", "nobody's"]))).aborted
        while not (response := await call.read()).HasField("complete"):
            pass
        await nothing_left(services)
        return twice.code(), aborted, response.complete.finish_reason

    twice, aborted, reason = with_services(scenario, endless_config)
    assert twice is grpc.StatusCode.ALREADY_EXISTS
    assert aborted == 1
    assert reason == pb.FINISH_REASON_ABORTED


def test_answers_survive_the_drafter_and_speculation_comes_back(target):
    async def scenario(services):
        request = ask(max_tokens=200, policy="chain:4")
        call = services.stub.Generate(request)
        tokens = list((await call.read()).chunk.token_ids)
        await services.stop_drafter()
        while not (response := await call.read()).HasField("complete"):
            tokens += response.chunk.token_ids
        alone, complete_alone = await answer(services, request)
        await services.start_drafter()
        while not (await services.load()).drafter_ready:
            await asyncio.sleep(0.05)
        drafted, complete_drafted = await answer(services, request)
        await nothing_left(services)
        return (tokens, alone, drafted), (complete_alone, complete_drafted)

    (tokens, alone, drafted), (complete_alone, complete_drafted) = with_services(
        scenario, tiny_config(target, drafters(target)["model"])
    )
    assert tokens == alone == drafted
    assert complete_alone.speculation.drafted_nodes == 0
    assert complete_drafted.speculation.accepted_nodes > 0


def test_answers_survive_the_planner(target):
    async def scenario(services):
        before, _ = await answer(services, ask())
        await services.planner.stop(0)
        after, complete = await answer(services, ask())
        return before, after, complete.finish_reason

    before, after, reason = with_services(scenario, tiny_config(target))
    assert before == after
    assert reason == pb.FINISH_REASON_LENGTH


def test_every_metrics_page_shows_the_work(target):
    async def scenario(services):
        await answer(services, ask(policy="chain:4"))
        await answer(services, ask(policy="smart"))
        parts = services.verifier, services.drafter, services.planner, services.door

        async def planned() -> bool:
            return "treeline_planner_steps_total" in await services.page(services.planner.metrics_port)

        while not await planned():
            await asyncio.sleep(0.05)
        return [await services.page(part.metrics_port) for part in parts]

    verifier, drafter, planner, door = with_services(scenario, tiny_config(target, drafters(target)["model"]))
    assert re.search(r'treeline_request_success_total\{finished_reason="length",model_name=[^}]*\} 2.0', verifier)
    assert re.search(r'treeline_spec_decode_num_accepted_tokens_per_pos_total\{.*position="0"', verifier)
    assert "treeline_drafter_nodes_total" in drafter
    assert "treeline_planner_plan_version" in planner
    assert 'grpc_server_handled_total{grpc_code="OK",grpc_method="Generate"} 2.0' in door


def test_a_context_longer_than_the_models_is_refused_at_the_start(target):
    async def scenario(services):
        pytest.fail("started")

    with pytest.raises(ConfigError, match="max_context_tokens is 4096"):
        with_services(scenario, tiny_config(target, max_context_tokens=4096))


def test_the_thread_that_loads_has_ended_when_it_serves(target):
    loads = LanguageModel.load
    loaded_in = []

    def load(config: ModelConfig) -> LanguageModel:
        loaded_in.append(threading.current_thread())
        return loads(config)

    async def scenario(services):
        return [thread for thread in loaded_in if thread.is_alive()]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModel, "load", load)
        alive = with_services(scenario, tiny_config(target))
    assert loaded_in
    assert not alive


def test_the_autoscaler_hears_of_requests_and_of_missed_objectives(endless_config):
    objectives = ObjectivesConfig(inter_token_p95_ms=0.001)
    planner = endless_config.planner.model_copy(update={"objectives": objectives})

    async def scenario(services: Services):
        before = services.verifier.stats()
        answers = asyncio.gather(*(answer(services, ask(max_tokens=ENDLESS_TOKENS)) for _ in range(12)))
        most, wanted = before, {"running": 8, "waiting": 4, "late": 1}
        while any(most[name] < wanted[name] for name in wanted):  # or a timeout fails the test
            await asyncio.sleep(0.02)
            most = {name: max(most[name], value) for name, value in services.verifier.stats().items()}
        answers.cancel()
        await nothing_left(services)
        return before, most

    before, most = with_services(scenario, endless_config.model_copy(update={"planner": planner}))
    assert before == {"running": 0, "waiting": 0, "slots": 8, "late": 0}
    assert most["running"] == 8
    assert most["waiting"] >= 4
