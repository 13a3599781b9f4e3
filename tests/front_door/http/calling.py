"""Calls to the HTTP port of a front door over fake engines."""

import json
import urllib.error
import urllib.request

import openai

from tests.front_door.doors import with_front_door
from tests.verifier_svc.fake_engine import FakeEngine

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
