"""The HTTP port's answers, asked for by the clients that people have."""

import asyncio

import openai
import pytest

from front_door.http.openai_responses import CompletionDialect, Reply
from front_door.http.tool_calls import PlainText
from tests.front_door.http.calling import HELLO, with_client
from tests.verifier_svc.fake_engine import FakeEngine, until
from treeline.v1 import generation_pb2 as pb


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
