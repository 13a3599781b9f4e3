"""Bodies that are wrong in every way: each is refused with its field named, or answered; nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import random
from collections import Counter
from copy import deepcopy
from http.client import HTTPConnection

import pytest
from prometheus_client import CollectorRegistry

from front_door.access import AccessLog
from front_door.http.app import create_app
from front_door.server import no_pages
from tests.front_door.doors import with_front_door
from tests.front_door.http.test_tools import TOOLS, TURNS
from tests.verifier_svc.fake_engine import FakeEngine, until

SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, "x"]}}, "required": ["a"]}
CHAT = {
    "model": "fake",
    "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}],
    "max_tokens": 4,
    "n": 2,
    "seed": 1,
    "stop": ["x"],
    "logit_bias": {"65": 1},
    "logprobs": True,
    "top_logprobs": 1,
    "stream": False,
    "stream_options": {"include_usage": True},
    "chat_template_kwargs": {"a": 1},
}
SAMPLED = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": 1}
MORE = {
    "policy": "smart",
    "max_draft_nodes": 3,
    "explain": "tree",
    "priority": 1,
    "min_tokens": 1,
    "stop_token_ids": [1],
}
BODIES = [
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", CHAT | SAMPLED | MORE),
    ("/v1/chat/completions", CHAT | TOOLS | {"messages": TURNS, "stream": True}),
    ("/v1/chat/completions", CHAT | TOOLS | {"tool_choice": "required", "parallel_tool_calls": False}),
    ("/v1/chat/completions", CHAT | {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}),
    ("/v1/chat/completions", CHAT | {"structured_outputs": {"regex": "[a-z]+"}, "continue_final_message": False}),
    ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 4, "echo": True, "stream": True}),
    ("/v1/completions", {"prompt": [[65], [66]], "max_tokens": 4, "logprobs": 1}),
    ("/v1/completions", {"prompt": [65, 66], "max_tokens": 0, "logprobs": 1, "echo": True}),
    ("/tokenize", {"messages": TURNS, **TOOLS}),
    ("/tokenize", {"prompt": "a"}),
    ("/detokenize", {"tokens": [65, 66]}),
]
NUMBERS = [0, -1, 1, 2**31, 2**32, 2**63, -(2**63) - 1, 2**64, 10**400, 0.5, 1e308, float("nan"), float("inf"), -0.0]
TEXTS = ["", "\0", "\ud800", "é" * 50, "x" * 3000, "{", "[", "(", "auto", "user", "tool", "<user>", "$ref", "object"]
OTHERS = [None, True, False, [], {}, [[]], [{}], {"": ""}, {"type": "function"}, {"$ref": "#"}]
KEYS = ["", "\ud800\n雪", "messages", "tools", "type", "$defs", "pattern", "content", "__class__", "stream"]
MOST_VALUES = 1_000
"""Lists that are extended again and again would be a body of gigabytes, and writing it would block the event loop."""


def deep(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


def mutated(rng: random.Random) -> tuple[str, bytes]:
    """A path, and a body that was right once."""
    path, body = rng.choice(BODIES)
    body = json.loads(json.dumps(body))
    for _ in range(rng.choice([1, 1, 1, 2, 3, 6])):
        values = walk(body)
        if len(values) > MOST_VALUES:
            break
        holder = rng.choice([value for value in values if isinstance(value, dict | list)])
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        value = rng.choice([*map(rng.choice, (NUMBERS, TEXTS, deepcopy(OTHERS))), deep(rng.choice([2, 20, 300]))])
        what = rng.random()
        if what < 0.6 and keys:
            holder[rng.choice(keys)] = value
        elif what < 0.75 and keys:
            del holder[rng.choice(keys)]
        elif isinstance(holder, dict):
            holder[rng.choice([*KEYS, *MORE, *CHAT])] = value
        else:
            holder.extend(deepcopy([value] * rng.choice([1, 2, 40])))
    raw = json.dumps(body).encode()
    if rng.random() < 0.1:
        at = rng.randrange(len(raw))
        raw = rng.choice([raw[:at], raw[:at] + rng.randbytes(3) + raw[at:], raw * 2, b"[" * 20000, rng.randbytes(20)])
    return path, raw


def walk(value: object) -> list[object]:
    """The value and all within it."""
    found = [value]
    for inner in found:
        found.extend(inner.values() if isinstance(inner, dict) else inner if isinstance(inner, list) else ())
    return found


async def call(app, path: str, raw: bytes) -> tuple[int, bytes]:
    """(status, body) of an application's answer, without a socket."""
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "headers": [(b"content-type", b"application/json")],
        "query_string": b"",
    }
    messages, sent, done = [{"type": "http.request", "body": raw}], [], asyncio.Event()

    async def receive():
        if not messages:
            await done.wait()
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    await app(scope, receive, send)
    done.set()
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


def posted(port: int, path: str, raw: bytes) -> tuple[int, bytes]:
    """(status, body) over a real socket."""
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    with contextlib.closing(connection):
        connection.request("POST", path, raw, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()


def is_object(raw: bytes) -> bool:
    try:
        return isinstance(json.loads(raw), dict)
    except (ValueError, RecursionError):
        return False


def check(path: str, raw: bytes, status: int, answer: bytes) -> None:
    assert status < 500, (path, raw[:1000], answer)
    if status != 200:
        error = json.loads(answer)["error"]
        assert error.keys() == {"message", "type", "param", "code"}, (path, raw[:1000], answer)
        assert (bool(error["message"]), error["type"]) == (True, "invalid_request_error")
        assert error["param"] is not None or status != 400 or not is_object(raw), (path, raw[:1000], answer)
    assert b"internal" not in answer.lower(), (path, raw[:1000], answer)


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
def test_mutated_bodies_are_answered_or_refused_and_leave_nothing(count):
    rng = random.Random(count)

    async def scenario(s):
        app = create_app(s.door._door, CollectorRegistry(), None, 1 << 20, no_pages, AccessLog())
        statuses: Counter[int] = Counter()

        async def some(count):
            for _ in range(count):
                path, raw = mutated(rng)
                try:
                    status, answer = await asyncio.wait_for(call(app, path, raw), 60)
                except TimeoutError:
                    pytest.fail(f"{path} hangs on {raw[:1000]!r}")
                check(path, raw, status, answer)
                statuses[status] += 1

        await some(count // 5)
        tasks, held = len(asyncio.all_tasks()), await objects()
        await asyncio.gather(*(some(count // 10) for _ in range(8)))
        await until(lambda: len(asyncio.all_tasks()) <= tasks)
        assert not s.engines[0].open
        assert not s.door._door._open
        grown = await objects() - held
        assert grown < 5_000 + count, f"{grown} objects more"  # caches fill; a leak of one small object a call shows
        for _ in range(count // 50):
            path, raw = mutated(rng)
            check(path, raw, *await asyncio.to_thread(posted, s.door.http.port, path, raw))
        return statuses

    async def objects():
        await asyncio.sleep(0.05)
        gc.collect()
        return len(gc.get_objects())

    statuses = with_front_door(scenario, FakeEngine(says=["a", " b"]), timeout_s=580)
    assert min(statuses[200], statuses[400]) > count // 20
