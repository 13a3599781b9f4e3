"""The command of treeline-client, with nothing of treeline-serve."""

from __future__ import annotations

import json
import subprocess
import sys

import treeline
from treeline.client.command import client_command


def test_generate_streams_the_text(service, capsys):
    engine, endpoint = service
    options = ["--max-tokens", "6", "--temperature", "0.5", "--seed", "3", "--server", endpoint]
    assert client_command(["generate", "hi", *options]) == 0
    assert capsys.readouterr().out == "a0 a1 a2 \n"
    request = engine.requests[0]
    assert bytes(request.prompt_token_ids) == b"<user>hi<assistant>"
    assert (request.max_tokens, request.sampling.temperature, request.sampling.seed) == (6, 0.5, 3)


def test_raw_text_has_no_template(service):
    engine, endpoint = service
    assert client_command(["generate", "--raw", "hi", "--server", endpoint]) == 0
    assert bytes(engine.requests[0].prompt_token_ids) == b"hi"


def test_load_and_models_are_json(service, capsys):
    _, endpoint = service
    assert client_command(["models", "--server", endpoint]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == treeline.__version__
    assert client_command(["load", "--server", endpoint]) == 0
    assert "max_requests_running" in json.loads(capsys.readouterr().out)


def test_no_service_is_one_line(capsys):
    assert client_command(["load", "--server", "127.0.0.1:9"]) == 1
    assert capsys.readouterr().err == "treeline: cannot reach 127.0.0.1:9: Connection refused\n"


def test_the_client_imports_nothing_that_only_the_server_installs():
    code = "import sys, treeline.client.command; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"pydantic", "yaml", "numpy", "typer", "prometheus_client", "torch", "ray"} & set(loaded)
