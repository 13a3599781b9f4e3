"""The clients that people have, against a running service with a tiny real model: no answer here is made up."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import threading
import time
import urllib.request
from pathlib import Path

import openai
import pydantic
import pytest

from tests.verifier_svc.services import running_services, save_tiny_model, tiny_config

ROOT = Path(__file__).parents[3]
CLIENTS_PYTHON = ROOT / "build/clients/bin/python"
"""Has LangChain and LiteLLM, whose requirements exclude ours (.ci/run makes it)."""
NODE = pytest.mark.skipif(
    not (shutil.which("node") and (ROOT / "examples/node/node_modules/openai").exists()),
    reason="needs npm install in examples/node",
)
OTHERS = pytest.mark.skipif(
    not CLIENTS_PYTHON.exists(), reason="needs tests/front_door/http/clients/requirements.txt in build/clients"
)
ASK = [{"role": "user", "content": "hi"}]
GREEDY = {"model": "", "messages": ASK, "temperature": 0, "max_tokens": 8}
CITY = {"type": "object", "properties": {"city": {"enum": ["Ulm", "Bonn"]}}, "required": ["city"]}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Weather.", "parameters": CITY | {"additionalProperties": False}},
}


class Answer(pydantic.BaseModel):
    model_config = {"extra": "forbid"}
    sure: bool


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """Base URL of the service, which runs in a thread of its own."""
    target = save_tiny_model(tmp_path_factory.mktemp("models") / "target")
    shape = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(shape | {"max_position_embeddings": 2048}))
    loop, found, ready = asyncio.new_event_loop(), [], threading.Event()
    stop = asyncio.Event()

    async def serve():
        async with running_services(tiny_config(target, max_context_tokens=2048)) as services:
            found.append((services.door.http.port, services.verifier.metrics_port))
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert ready.wait(60)
    yield f"http://127.0.0.1:{found[0][0]}/v1", f"http://127.0.0.1:{found[0][1]}/metrics"
    loop.call_soon_threadsafe(stop.set)
    thread.join(30)
    loop.close()


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=url[0], api_key="none", max_retries=0) as client:
        yield client


def aborted(url) -> float:
    """How many requests have been aborted."""
    with urllib.request.urlopen(url[1], timeout=5) as page:
        counts = re.findall(r'finished_reason="aborted"[^}]*} (\S+)', page.read().decode())
    return sum(map(float, counts))


def until_aborted(url, count: float) -> None:
    deadline = time.monotonic() + 5
    while aborted(url) < count:
        assert time.monotonic() < deadline, "the request goes on"
        time.sleep(0.05)


def test_openai_for_python(client, url):
    whole = client.chat.completions.create(**GREEDY, logprobs=True, top_logprobs=2)
    text = whole.choices[0].message.content
    assert (whole.usage.completion_tokens, len(whole.choices[0].logprobs.content)) == (8, 8)
    assert [len(token.top_logprobs) for token in whole.choices[0].logprobs.content] == [2] * 8
    chunks = list(client.chat.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage == whole.usage
    several = client.chat.completions.create(**GREEDY | {"temperature": 1, "seed": 1}, n=3)
    assert len({choice.message.content for choice in several.choices}) == 3
    parsed = client.chat.completions.parse(**GREEDY | {"max_tokens": 40}, response_format=Answer)
    assert isinstance(parsed.choices[0].message.parsed, Answer)
    assert client.completions.create(model="", prompt=text or "a", max_tokens=2).usage.completion_tokens == 2
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**GREEDY | {"temperature": -1})
    assert caught.value.param == "sampling.temperature"
    before = aborted(url)
    stream = client.chat.completions.create(**GREEDY | {"max_tokens": 1000}, stream=True)
    next(iter(stream))
    stream.close()
    until_aborted(url, before + 1)


def test_openai_for_python_calls_tools(client):
    asked = GREEDY | {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 80}
    whole = client.chat.completions.create(**asked)
    message = whole.choices[0].message
    assert whole.choices[0].finish_reason == "tool_calls"
    assert json.loads(message.tool_calls[0].function.arguments)["city"] in ("Ulm", "Bonn")
    with client.chat.completions.stream(**asked) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion().choices[0].message
    assert [call.function.arguments for call in streamed.tool_calls] == [message.tool_calls[0].function.arguments]
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "warm"}
    turns = [*ASK, message.model_dump(), result]
    assert client.chat.completions.create(**GREEDY | {"messages": turns}, tools=[WEATHER]).choices


@NODE
def test_openai_for_node(client, url):
    before = aborted(url)
    found = told(["node", "--input-type=module", "-e", NODE_CLIENT], url[0], cwd=ROOT / "examples/node")
    assert found.pop("call") in ('{"city":"Ulm"}', '{"city": "Ulm"}', '{"city":"Bonn"}', '{"city": "Bonn"}')
    assert json.loads(found.pop("schema")).keys() == {"sure"}
    assert found == expected(client) | {"status": 400, "param": "sampling.temperature"}
    until_aborted(url, before + 1)


@NODE
def test_the_example_for_node(client, url):
    answer = client.chat.completions.create(model="", messages=ASK, max_tokens=100, temperature=0)
    example = ["node", str(ROOT / "examples/node/openai.mjs"), "hi", url[0]]
    done = subprocess.run(example, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == (f"{answer.choices[0].message.content}\n", "")


@OTHERS
@pytest.mark.parametrize("name", ["langchain", "litellm"])
def test_clients_on_top_of_openais(name, client, url):
    script = Path(__file__).parent / f"clients/{name}_client.py"
    before = aborted(url)
    found = told([CLIENTS_PYTHON, script], url[0])
    assert json.loads(found.pop("call"))["city"] in ("Ulm", "Bonn")
    assert json.loads(found.pop("schema")).keys() == {"sure"}
    assert found == expected(client) | {"status": 400, "param": "sampling.temperature"}
    until_aborted(url, before + 1)


def test_curl(client, url):
    def curl(body, *options):
        call = ["curl", "-sN", *options, f"{url[0]}/chat/completions", "-H", "Content-Type: application/json"]
        return subprocess.run([*call, "-d", json.dumps(body)], capture_output=True, text=True, timeout=30).stdout

    whole = json.loads(curl(GREEDY | {"n": 2, "logprobs": True}))
    assert [choice["message"]["content"] for choice in whole["choices"]] == [expected(client)["text"]] * 2
    assert len(whole["choices"][0]["logprobs"]["content"]) == 8
    events = [line.removeprefix("data: ") for line in curl(GREEDY | {"stream": True}).splitlines() if line]
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events[:-1]]
    assert ("".join(delta.get("content", "") for delta in deltas), events[-1]) == (expected(client)["text"], "[DONE]")
    forced = {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "weather"}}}
    call = json.loads(curl(GREEDY | {"max_tokens": 80} | forced))["choices"][0]["message"]["tool_calls"][0]
    assert json.loads(call["function"]["arguments"])["city"] in ("Ulm", "Bonn")
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": Answer.model_json_schema()}}
    answer = json.loads(curl(GREEDY | {"max_tokens": 40, "response_format": schema}))
    assert json.loads(answer["choices"][0]["message"]["content"]).keys() == {"sure"}
    wrong = curl(GREEDY | {"n": 99}, "-w", "%{http_code}")
    assert (json.loads(wrong[:-3])["error"]["param"], wrong[-3:]) == ("n", "400")
    before = aborted(url)
    curl(GREEDY | {"max_tokens": 1000, "stream": True}, "--max-time", "0.3")
    until_aborted(url, before + 1)


def expected(client) -> dict[str, object]:
    """What every client must find."""
    text = client.chat.completions.create(**GREEDY).choices[0].message.content
    return {"text": text, "streamed": text, "answers": 3, "logprobs": 8}


def told(command, url, cwd=None) -> dict[str, object]:
    """What a client prints of its calls, as JSON."""
    quiet = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}  # else it looks for prices on the net
    given = os.environ | quiet | {"URL": url, "WEATHER": json.dumps(WEATHER)}
    done = subprocess.run(list(map(str, command)), env=given, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


NODE_CLIENT = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.env.URL, apiKey: "none", maxRetries: 0 });
const chat = (more) => client.chat.completions.create(
  { model: "", messages: [{ role: "user", content: "hi" }], temperature: 0, max_tokens: 8, ...more });
const text = (await chat({})).choices[0].message.content;
let streamed = "";
for await (const chunk of await chat({ stream: true })) streamed += chunk.choices[0].delta.content ?? "";
const answers = (await chat({ n: 3 })).choices.length;
const logprobs = (await chat({ logprobs: true })).choices[0].logprobs.content.length;
const tools = [JSON.parse(process.env.WEATHER)];
const called = await chat({ tools, tool_choice: "required", parallel_tool_calls: false, max_tokens: 80 });
const call = called.choices[0].message.tool_calls[0].function.arguments;
const properties = { sure: { type: "boolean" } };
const shape = { type: "object", properties, required: ["sure"], additionalProperties: false };
const response_format = { type: "json_schema", json_schema: { name: "a", schema: shape } };
const schema = (await chat({ response_format, max_tokens: 40 })).choices[0].message.content;
const { status, param } = await chat({ temperature: -1 }).catch((error) => error);
for await (const _ of await chat({ stream: true, max_tokens: 1000 })) break;
console.log(JSON.stringify({ text, streamed, answers, logprobs, call, schema, status, param }));
"""
