"""The HTTP port's pages, headers and refusals."""

import asyncio
import json
import socket
import urllib.error
import urllib.request

import openai
import pytest
from pydantic import ValidationError

from front_door.http.openai_requests import ChatBody
from front_door.server import FrontDoorServer
from tests.front_door.http.calling import HELLO, post, with_client
from tests.front_door.test_server import METRICS
from tests.verifier_svc.fake_engine import FakeEngine
from treeline.config import Config, LimitsConfig, ServerConfig
from treeline.errors import ConfigError


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


def test_a_taken_port_is_said_and_nothing_is_left():
    async def scenario():
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: .* server.http.port"):
            await FrontDoorServer.start(config, no_verifiers)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    async def no_verifiers():
        return []

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = Config(server=ServerConfig(port=0, http={"port": port}), metrics=METRICS)
        asyncio.run(scenario())


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
        return large[0], broken[0], broken[2]["error"]

    large, broken, error = with_client(scenario, config=config)
    assert (large, broken, error["type"]) == (413, 400, "invalid_request_error")
    assert error["message"].startswith("body: not JSON (")


FORM = "application/x-www-form-urlencoded"


@pytest.mark.parametrize("content_type", [FORM, "text/plain; charset=utf-8", "", "application/json; charset=utf-8"])
def test_a_body_that_is_json_is_taken_whatever_it_is_called(content_type):
    """curl calls a body of `-d` a form unless it is told otherwise."""

    async def scenario(client, s):
        headers = {"Content-Type": content_type}
        return await asyncio.to_thread(post, s.door.http.port, "/tokenize", {"prompt": "hi"}, headers)

    status, _, answer = with_client(scenario)
    assert (status, answer["count"]) == (200, 2)


def test_a_form_is_told_what_is_wanted():
    async def scenario(client, s):
        headers = {"Content-Type": FORM}
        return await asyncio.to_thread(post, s.door.http.port, "/tokenize", b"prompt=hi", headers)

    status, _, answer = with_client(scenario)
    assert (status, answer["error"]["param"]) == (400, None)
    for said in ("not JSON", FORM, "application/json"):
        assert said in answer["error"]["message"]


@pytest.mark.parametrize("content_type", [FORM, "text/plain", "multipart/form-data; boundary=x"])
def test_a_page_of_another_site_cannot_ask_through_its_reader(content_type):
    """Browsers send such bodies anywhere without asking first; for JSON they ask, and are refused."""

    async def scenario(client, s):
        headers = {"Content-Type": content_type, "Origin": "http://elsewhere"}
        wrong = await asyncio.to_thread(post, s.door.http.port, "/tokenize", {"prompt": "hi"}, headers)
        headers["Content-Type"] = "application/json"
        return wrong, await asyncio.to_thread(post, s.door.http.port, "/tokenize", {"prompt": "hi"}, headers)

    (status, _, answer), (own, _, _) = with_client(scenario)
    assert (status, own) == (415, 200)
    assert content_type in answer["error"]["message"]
    assert "application/json" in answer["error"]["message"]
