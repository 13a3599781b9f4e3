"""The HTTP port, called by the clients that people have."""

import asyncio
import json
import socket
import urllib.error
import urllib.request

import openai
import pytest
from pydantic import ValidationError

from front_door.openai_requests import ChatBody
from front_door.openai_responses import CompletionDialect, Reply
from front_door.tool_calls import PlainText
from tests.front_door.test_server import METRICS, with_front_door
from tests.verifier_svc.fake_engine import FakeEngine, until
from treeline.config import Config, LimitsConfig, ServerConfig
from treeline.errors import ConfigError
from treeline.v1 import generation_pb2 as pb

HELLO = [{"role": "user", "content": "hello"}]


def with_client(scenario, *engines, config=None, api_key="none", pages=None, **options):
    async def run(s):
        url = f"http://127.0.0.1:{s.door.http.port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key=api_key, max_retries=0, **options) as client:
            return await scenario(client, s)

    given = {"config": config, "pages": pages}
    return with_front_door(run, *(engines or [FakeEngine()]), **{k: v for k, v in given.items() if v is not None})


def post(port, path, body, headers=None):
    """(status, headers, JSON) of a plain POST."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    call = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json", **(headers or {})}
    )
    try:
        with urllib.request.urlopen(call, timeout=10) as answer:
            return answer.status, answer.headers, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, error.headers, json.load(error)


def test_a_chat_is_answered_as_over_grpc():
    async def scenario(client, s):
        answer = await client.chat.completions.create(
            model="fake",
            messages=HELLO,
            max_tokens=6,
            seed=3,
            logprobs=True,
            top_logprobs=2,
            extra_body={"policy": "off"},
        )
        return answer, s.engines[0].requests[0]

    answer, request = with_client(scenario)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "a0 a1 a2 ", "length")
    assert (answer.object, answer.usage.completion_tokens) == ("chat.completion", 6)
    assert [len(token.top_logprobs) for token in choice.logprobs.content] == [2] * 6
    assert choice.logprobs.content[0].token == "A"
    assert bytes(request.prompt_token_ids) == b"<user>hello<assistant>"
    assert (request.policy, request.sampling.seed, request.max_tokens) == ("off", 3, 6)


@pytest.mark.parametrize("empty", [{"content": ""}, {"content": None}, {"content": []}, {}])
def test_an_empty_turn_of_the_assistant_may_lie_in_the_history_or_end_it(empty):
    async def scenario(client, s):
        asked = [*HELLO, {"role": "assistant", **empty}]
        for messages in ([*asked, *HELLO], asked):
            await client.chat.completions.create(model="fake", messages=messages, max_tokens=2)
        return [bytes(request.prompt_token_ids) for request in s.engines[0].requests]

    once = b"<user>hello<assistant>"
    assert with_client(scenario) == [once + once, once]


def test_a_stream_brings_role_text_reason_and_usage():
    async def scenario(client, s):
        stream = await client.chat.completions.create(
            model="fake", messages=HELLO, max_tokens=4, stream=True, stream_options={"include_usage": True}
        )
        return [chunk async for chunk in stream]

    chunks = with_client(scenario)
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert [delta.role for delta in deltas] == ["assistant", None, None]
    assert "".join(delta.content or "" for delta in deltas) == "a0 a1 "
    assert chunks[-2].choices[0].finish_reason == "length"
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 4)


def test_n_answers_each_have_their_own_noise():
    async def scenario(client, s):
        whole = await client.chat.completions.create(model="fake", messages=HELLO, max_tokens=2, n=3, seed=5)
        stream = await client.chat.completions.create(model="fake", messages=HELLO, max_tokens=2, n=2, stream=True)
        streamed = {chunk.choices[0].index async for chunk in stream}
        return whole, streamed, [request.sampling.seed for request in s.engines[0].requests[:3]]

    whole, streamed, seeds = with_client(scenario)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert (sorted(seeds), streamed) == ([5, 6, 7], {0, 1})
    assert whole.usage.completion_tokens == 6


@pytest.mark.parametrize("prompt", ["hi", [104, 105], ["hi", "ho"], [[104, 105], [104, 111]]])
def test_completions_take_texts_and_token_ids(prompt):
    async def scenario(client, s):
        answer = await client.completions.create(model="fake", prompt=prompt, max_tokens=2, logprobs=1)
        return answer, [bytes(request.prompt_token_ids) for request in s.engines[0].requests]

    answer, prompts = with_client(scenario)
    assert sorted(prompts) == ([b"hi", b"ho"] if len(answer.choices) == 2 else [b"hi"])
    assert answer.choices[0].text == "a0 "
    assert answer.choices[0].logprobs.tokens == ["A", "B"]


def test_every_sampling_and_stopping_field_reaches_the_engine():
    async def scenario(client, s):
        answer = await client.chat.completions.create(
            model="fake",
            messages=HELLO,
            max_tokens=6,
            temperature=0.5,
            presence_penalty=0.5,
            frequency_penalty=-0.25,
            logit_bias={"65": 5, "66": -100},
            stop=["z"],
            extra_body={
                "min_p": 0.1,
                "top_k": -1,
                "repetition_penalty": 1.1,
                "min_tokens": 4,
                "stop_token_ids": [7],
                "include_stop_str_in_output": True,
                "skip_special_tokens": False,
            },
        )
        return answer, s.engines[0].requests[0]

    answer, request = with_client(scenario)
    sampling = request.sampling
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.min_p) == (0.5, -0.25, 0.1)
    assert (sampling.top_k, sampling.repetition_penalty, sampling.logit_bias) == (0, 1.1, {65: 5.0, 66: -100.0})
    assert (request.min_tokens, request.stop, request.stop_token_ids) == (4, ("z",), {7})
    assert (request.include_stop, request.skip_special_tokens) == (True, False)
    assert answer.usage.prompt_tokens_details.cached_tokens == answer.usage.prompt_tokens - 1


def test_completions_echo_their_prompts():
    async def scenario(client, s):
        ask = {"model": "fake", "prompt": ["hi", "ho"], "max_tokens": 4, "echo": True}
        whole = await client.completions.create(**ask)
        streamed = ["", ""]
        async for chunk in await client.completions.create(**ask, stream=True):
            streamed[chunk.choices[0].index] += chunk.choices[0].text
        scored = await client.completions.create(**ask | {"logprobs": 1, "prompt": "hi"})
        return [choice.text for choice in whole.choices], streamed, scored.choices[0].logprobs

    texts, streamed, logprobs = with_client(scenario)
    assert texts == streamed == ["hia0 a1 ", "hoa0 a1 "]
    assert logprobs.tokens == ["h", "i", *"ABAB"]
    assert logprobs.token_logprobs == [None, -2.0, *[-0.5] * 4]
    assert logprobs.text_offset == [0, 1, 2, 3, 4, 5]


def test_offsets_of_a_stream_go_on_and_tell_what_is_echoed_from_special_tokens():
    def position(text):
        return pb.PositionLogprobs(chosen=pb.TokenLogprob(text=text))

    reply = Reply(CompletionDialect(), "r", "m", ["hi you"], [PlainText()])
    asked = [position(text) for text in ("<bos>", "hi", " you")]
    chunks = [
        pb.GenerateChunk(text="", logprobs=[position(" A")], prompt_logprobs=asked),
        pb.GenerateChunk(text=" A b", logprobs=[position(" b")]),
    ]
    parts = [reply.chunk(0, pb.GenerateResponse(chunk=chunk), i == 0)["choices"][0] for i, chunk in enumerate(chunks)]
    assert [part["logprobs"]["text_offset"] for part in parts] == [[0, 0, 2, 6], [8]]


@pytest.mark.parametrize("prompt", ["hi", [104, 105]])
@pytest.mark.parametrize("stream", [False, True])
def test_prompts_are_scored_without_an_answer(prompt, stream):
    async def scenario(client, s):
        ask = {"model": "fake", "prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 0, "stream": stream}
        answer = await client.completions.create(**ask)
        choices = [part.choices[0] async for part in answer] if stream else answer.choices
        return "".join(choice.text for choice in choices), choices[0].logprobs, choices[-1].finish_reason

    text, logprobs, reason = with_client(scenario)
    assert (text, logprobs.tokens, reason) == ("hi", ["h", "i"], "length")
    assert logprobs.token_logprobs == [None, -2.0]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {"-1": 1}}, "logit_bias.-1.[key]"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x.[key]"),
        ({"logit_bias": {"256": 1}}, "sampling.logit_bias[256]"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
        ({"max_tokens": 2**70}, "max_tokens"),
        ({"priority": 2**40}, "priority"),
        ({"min_p": 2}, "sampling.min_p"),
    ],
)
def test_numbers_of_no_sense_are_refused(fields, param):
    async def scenario(client, s):
        body = {"model": "fake", "messages": HELLO, **fields}
        return await asyncio.to_thread(post, s.door.http.port, "/v1/chat/completions", body)

    status, _, answer = with_client(scenario)
    assert (status, answer["error"]["param"]) == (400, param)


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, None),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}, None),
        ({"extra_body": {"structured_outputs": {"regex": "[0-9]+"}}}, None),
        ({"extra_body": {"structured_outputs": {"choice": ["yes", "no"]}}}, None),
        ({"extra_body": {"structured_outputs": {"json": SCHEMA}}}, None),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no-such"}}}},
            "grammar.json_schema",
        ),
        ({"extra_body": {"structured_outputs": {"regex": "("}}}, "grammar.regex"),
        ({"extra_body": {"structured_outputs": {}}}, "structured_outputs"),
        ({"extra_body": {"structured_outputs": {"regex": "a", "choice": ["b"]}}}, "structured_outputs"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ],
)
def test_grammars_reach_the_engine_and_wrong_ones_are_named(fields, error):
    async def scenario(client, s):
        ask = client.chat.completions.create(model="fake", messages=HELLO, max_tokens=2, **fields)
        if error is None:
            await ask
            return s.engines[0].requests[0].grammar is not None
        with pytest.raises(openai.BadRequestError) as caught:
            await ask
        return caught.value.param

    assert with_client(scenario) == (error or "text" not in str(fields))


def test_a_taken_port_is_said():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = Config(server=ServerConfig(port=0, http={"port": port}), metrics=METRICS)
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: .* server.http.port"):
            with_client(None, config=config)


def test_models_health_metrics_and_tokenize():
    async def scenario(client, s):
        models = [(model.id, model.treeline) async for model in client.models.list()]
        port = s.door.http.port

        def read(path):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
                return answer.read().decode()

        health, metrics = await asyncio.to_thread(read, "/health"), await asyncio.to_thread(read, "/metrics")
        tokens = await asyncio.to_thread(post, port, "/tokenize", {"messages": HELLO})
        return models, health, metrics, tokens[2]

    [(model, shown)], health, metrics, tokens = with_client(scenario, FakeEngine())
    assert (model, health, tokens["count"]) == ("fake", "SERVING\n", len("<user>hello<assistant>"))
    assert (shown["default_policy"], shown["eos_token_ids"]) == ("smart", [0])
    penalties = {"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
    assert shown["default_sampling"] == {"temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0, **penalties}
    assert "treeline_front_door_verifiers 1.0" in metrics


@pytest.mark.parametrize(
    ("fields", "kind", "param"),
    [
        ({"temperature": -1}, openai.BadRequestError, "sampling.temperature"),
        ({"n": 99}, openai.BadRequestError, "n"),
        ({"model": "other"}, openai.NotFoundError, None),
        ({"messages": []}, openai.BadRequestError, "messages"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_have_openais_form_and_name_the_field(fields, kind, param, stream):
    async def scenario(client, s):
        with pytest.raises(kind) as caught:
            await client.chat.completions.create(**({"model": "fake", "messages": HELLO, "stream": stream} | fields))
        return caught.value

    error = with_client(scenario)
    assert (error.param, error.type) == (param, "invalid_request_error")


def test_a_full_queue_says_when_to_come_back():
    async def scenario(client, s):
        with pytest.raises(openai.RateLimitError) as caught:
            await client.chat.completions.create(model="fake", messages=HELLO)
        return caught.value.response.headers["retry-after"]

    assert with_client(scenario, FakeEngine(capacity=0)) == "1"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_ends_its_requests(stream):
    async def scenario(client, s):
        call = client.chat.completions.create(model="fake", messages=HELLO, max_tokens=1000, n=2, stream=stream)
        if stream:
            answer = await call
            await anext(aiter(answer))
            await answer.close()
        else:
            task = asyncio.create_task(call)
            await until(lambda: len(s.engines[0].open) == 2)
            task.cancel()
        await until(lambda: not s.engines[0].open)
        return len(s.engines[0].requests)

    assert with_client(scenario, FakeEngine(step_s=0.02)) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_refused_ends_its_siblings(stream):
    async def scenario(client, s):
        async def ask():
            options = {"max_tokens": 1000, "n": 2, "stream": stream}
            answer = await client.chat.completions.create(model="fake", messages=HELLO, **options)
            return [chunk async for chunk in answer]

        with pytest.raises(openai.APIError):
            await ask()
        await until(lambda: not s.engines[0].open, timeout_s=1)

    with_client(scenario, FakeEngine(step_s=0.02, capacity=1))


def test_an_error_in_mid_stream_is_an_event():
    async def scenario(client, s):
        stream = await client.chat.completions.create(model="fake", messages=HELLO, max_tokens=8, stream=True)
        with pytest.raises(openai.APIError) as caught:
            [chunk async for chunk in stream]
        return caught.value

    assert "secret" not in str(with_client(scenario, FakeEngine(fail=ValueError("secret"))))


def test_ids_go_in_and_out_and_ignored_fields_are_named():
    async def scenario(client, s):
        port, body = s.door.http.port, {"model": "fake", "messages": HELLO, "user": "me", "frobnicate": 1}
        return await asyncio.to_thread(post, port, "/v1/chat/completions", body, {"x-request-id": "mine"})

    status, headers, body = with_client(scenario)
    assert (status, headers["x-request-id"], body["id"]) == (200, "mine", "chatcmpl-mine")
    assert headers["x-treeline-ignored"] == "frobnicate, user"


def test_an_ignored_field_names_the_one_that_was_meant():
    async def scenario(client, s):
        body = {"model": "fake", "messages": HELLO, "max_new_tokens": 3, "temprature": 1, "store": True}
        odd = {"model": "fake", "messages": HELLO, "größe\r\n": 3, "雪" * 100_000: 1}
        return [await asyncio.to_thread(post, s.door.http.port, "/v1/chat/completions", each) for each in (body, odd)]

    (_, named, _), (status, odd, _) = with_client(scenario)
    meant = "max_new_tokens (did you mean max_tokens?), store, temprature (did you mean temperature?)"
    assert named["x-treeline-ignored"] == meant
    assert (status, odd["x-treeline-ignored"][:14]) == (200, "gr%C3%B6%C3%9F")


def test_prometheus_finds_the_pages_of_all_replicas(tmp_path):
    (tmp_path / "tokens").write_text("letmein\n")
    server = ServerConfig(port=0, http={"port": 0}, token_file=tmp_path / "tokens")

    async def pages():
        return {"verifier": ["b:2", "a:1"], "drafter": []}

    async def scenario(client, s):
        answer = await client.with_options(base_url=f"http://127.0.0.1:{s.door.http.port}").get(
            "/targets", cast_to=object
        )
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="wrong").get("../targets", cast_to=object)
        return answer

    config = Config(server=server, metrics=METRICS)
    assert with_client(scenario, config=config, api_key="letmein", pages=pages) == [
        {"targets": ["a:1", "b:2"], "labels": {"service": "verifier"}},
        {"targets": [], "labels": {"service": "drafter"}},
    ]


def test_a_token_is_needed_where_one_is_configured(tmp_path):
    (tmp_path / "tokens").write_text("letmein\n")
    server = ServerConfig(port=0, http={"port": 0}, token_file=tmp_path / "tokens")
    config = Config(server=server, metrics=METRICS)

    async def ask(client, s):
        answer = await client.chat.completions.create(model="fake", messages=HELLO, max_tokens=2)
        status, _, _ = await asyncio.to_thread(
            post, s.door.http.port, "/tokenize", {"prompt": "x"}, {"authorization": "bearer letmein"}
        )
        return answer.choices[0].message.content, status

    with pytest.raises(openai.AuthenticationError):
        with_client(ask, config=config, api_key="wrong")
    assert with_client(ask, config=config, api_key="letmein") == ("a0 ", 200)


@pytest.mark.parametrize("fields", [{"stop": ["\ud800"]}, {"chat_template_kwargs": {"a": "\ud800"}}, {"\ud800": 1}])
def test_half_a_surrogate_pair_is_no_text(fields):
    async def scenario(client, s):
        body = json.dumps({"messages": HELLO, **fields}).encode()
        return await asyncio.to_thread(post, s.door.http.port, "/v1/chat/completions", body)

    status, _, answer = with_client(scenario)
    assert (status, answer["error"]["param"]) == (400, next(iter(fields)).replace("\ud800", "?"))


def test_a_long_list_is_refused_at_its_first_wrong_element():
    with pytest.raises(ValidationError) as caught:
        ChatBody.model_validate({"messages": HELLO, "stop_token_ids": ["x"] * 100_000})
    assert len(caught.value.errors()) == 1


def test_bodies_are_bounded_and_must_be_json():
    limits = LimitsConfig(max_message_bytes=1 << 16)
    config = Config(server=ServerConfig(port=0, http={"port": 0}), metrics=METRICS, limits=limits)

    async def scenario(client, s):
        port, path = s.door.http.port, "/v1/chat/completions"
        large = await asyncio.to_thread(post, port, path, b"x" * (1 << 17))
        broken = await asyncio.to_thread(post, port, path, b"{")
        return large[0], broken[0], broken[2]["error"]["type"]

    assert with_client(scenario, config=config) == (413, 400, "invalid_request_error")
