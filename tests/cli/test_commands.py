import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import grpc
import pytest
import yaml
from typer.testing import CliRunner

import lm.store
from cli.doctor import examine
from cli.main import app
from treeline import __version__
from treeline.config import Config, ServerConfig
from treeline.v1 import generation_pb2 as pb
from treeline.v1 import generation_pb2_grpc as pb_grpc


def treeline(*arguments: str, **options):
    return CliRunner().invoke(app, list(arguments), **options)


def test_generate_streams_the_text(service):
    engine, endpoint = service
    result = treeline("generate", "hi", "--server", endpoint, "--max-tokens", "6")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "a0 a1 a2 \n", "")
    assert bytes(engine.requests[0].prompt_token_ids) == b"<user>hi<assistant>"


def test_generate_passes_every_option_on(service):
    engine, endpoint = service
    options = (
        "--max-tokens 4 --temperature 0.5 --top-p 0.9 --top-k 7 --seed 3 --stop x --stop yy --policy chain:2 "
        "--min-p 0.1 --repetition-penalty 1.2 --presence-penalty 0.5 --frequency-penalty -0.5 --logit-bias 65:5 "
        "--logit-bias 7:-1.5 --stop-token-id 9 --include-stop --ignore-eos --min-tokens 2 --keep-special-tokens "
        "--priority 1 --max-nodes 6 "
        "--max-depth 3 --logprobs 0 --regex [0-9]+"
    )
    result = treeline("generate", "hi", "--system", "be brief", *options.split(), "--server", endpoint)
    assert result.exit_code == 0, result.stderr
    request = engine.requests[0]
    assert bytes(request.prompt_token_ids) == b"<system>be brief<user>hi<assistant>"
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.5, 0.9, 7, 3)
    assert (request.max_tokens, request.stop, request.policy) == (4, ("x", "yy"), "chain:2")
    assert (sampling.min_p, sampling.repetition_penalty, sampling.logit_bias) == (0.1, 1.2, {65: 5.0, 7: -1.5})
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.5)
    assert (request.stop_token_ids, request.include_stop, request.ignore_eos) == ({9}, True, True)
    assert (request.min_tokens, request.skip_special_tokens, request.priority) == (2, False, 1)
    assert (request.max_nodes, request.max_depth, request.logprobs) == (6, 3, 0)
    assert request.grammar is not None


def test_generate_has_the_rest_of_the_contract_too(service):
    engine, endpoint = service
    options = ["--n", "2", "--prompt-logprobs", "0", "--model", "fake", "--request-id", "mine", "--begin", "Well,"]
    options += ["--template-arguments", '{"a": 1}', "--explain-tree", "--lark", "start: /a+/", "--max-tokens", "4"]
    result = treeline("generate", "hi", *options, "--json", "--server", endpoint)
    assert result.exit_code == 0, result.stderr
    first, second = engine.requests
    assert bytes(first.prompt_token_ids) == b"<a>1<user>hi<assistant>Well,"
    assert (first.request_id, second.request_id, first.prompt_logprobs) == ("mine", "mine#1", 0)
    assert first.explain_tree
    assert first.grammar is not None
    assert treeline("generate", "7 8", "--token-ids", "--server", endpoint).exit_code == 0
    assert engine.requests[-1].prompt_token_ids == [7, 8]
    two = treeline("generate", "hi", "--n", "2", "--max-tokens", "4", "--server", endpoint)
    assert two.stdout == "a0 a1 \n\na0 a1 \n"
    for wrong in (["7 x", "--token-ids"], ["7", "--raw", "--begin", "x"], ["x", "--template-arguments", "[]"]):
        assert treeline("generate", *wrong, "--server", endpoint).exit_code == 2


def test_a_chat_remembers_what_was_said(service):
    engine, endpoint = service
    options = ["--system", "be brief", "--max-tokens", "2", "--seed", "3", "--server", endpoint]
    result = treeline("chat", *options, input="hi\n\nand?\n")
    assert (result.exit_code, result.stdout) == (0, "a0 \na0 \n")
    last = bytes(engine.requests[-1].prompt_token_ids)
    assert last == b"<system>be brief<user>hi<assistant>a0 <user>and?<assistant>"
    assert engine.requests[-1].sampling.seed == 3


def test_the_version_and_the_model_list():
    assert treeline("--version").stdout == f"{__version__}\n"
    assert treeline("models").exit_code == 0
    assert "Possible options" in treeline("generate", "x", "--prot", "1").stderr


def test_what_cannot_be_reached_or_is_late_is_said_once(service):
    engine, endpoint = service
    engine.step_s = 0.02
    late = treeline("generate", "x", "--max-tokens", "100", "--timeout", "0.1", "--server", endpoint)
    assert late.stderr == "treeline: DEADLINE_EXCEEDED: it took longer than its timeout\n"
    assert "]" not in treeline("generate", "x", "--server", "nonsense").stderr


def test_ports_on_the_command_line_go_before_the_file(tmp_path, monkeypatch):
    started = []
    quick = SimpleNamespace(run=lambda config, **_: started.append(config))  # the real one loads Ray
    monkeypatch.setitem(sys.modules, "deploy.run", quick)
    monkeypatch.setattr("cli.serve.check_startable", lambda config: None)
    (tmp_path / "c.yaml").write_text("server: {port: 1, resume_wait_s: 5}")
    result = treeline("serve", "-c", str(tmp_path / "c.yaml"), "--port", "7001", "--http-port", "0")
    assert result.exit_code == 0, result.stderr
    server = started[0].server
    assert (server.port, server.http.port, server.resume_wait_s) == (7001, 0, 5)


def test_raw_text_from_standard_input(service):
    engine, endpoint = service
    result = treeline("generate", "-", "--raw", "--server", endpoint, input="from a pipe")
    assert result.exit_code == 0
    assert bytes(engine.requests[0].prompt_token_ids) == b"from a pipe"


def test_json_lines(service):
    _, endpoint = service
    result = treeline("generate", "hi", "--json", "--seed", "5", "--max-tokens", "4", "--server", endpoint)
    messages = [json.loads(line) for line in result.stdout.splitlines()]
    assert [message["chunk"]["text"] for message in messages[:-1]] == ["a0 ", "a1 "]
    complete = messages[-1]["complete"]
    assert (complete["finish_reason"], complete["seed"]) == ("FINISH_REASON_LENGTH", 5)
    assert complete["usage"]["completion_tokens"] == 4
    assert messages[0]["chunk"]["logprobs"] == []


def test_json_keeps_zeros_and_a_bad_bias_is_named(service):
    _, endpoint = service
    ask = ["generate", "x", "--raw", "--json", "--seed", "0", "--max-tokens", "2", "--server", endpoint]
    complete = json.loads(treeline(*ask).stdout.splitlines()[-1])["complete"]
    assert (complete["seed"], complete["usage"]["cached_prompt_tokens"]) == (0, 0)
    wrong = treeline(*ask, "--logit-bias", "seven")
    assert wrong.exit_code == 2
    assert "TOKEN_ID:BIAS" in wrong.stderr


def test_explain_shows_each_step_and_a_summary(service):
    _, endpoint = service
    result = treeline("generate", "hi", "--explain", "--max-tokens", "4", "--server", endpoint)
    first, second, summary = result.stdout.splitlines()
    assert "'a0 '" in first
    assert "drafted  4, verified  3, accepted  1" in second
    assert "paid" in second
    assert "4 tokens" in summary
    assert "2.00 tokens a step" in summary


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--max-tokens", "0"], "stopping.max_tokens"),
        (["--top-p", "3"], "sampling.top_p"),
        (["--policy", "none-such"], "speculation.policy"),
    ],
)
def test_refused_requests_are_one_line(service, arguments, named):
    _, endpoint = service
    result = treeline("generate", "hi", "--server", endpoint, *arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 1
    assert named in result.stderr


def test_a_timeout_is_one_line_and_frees_the_request(service):
    engine, endpoint = service
    engine.step_s = 0.05
    result = treeline("generate", "hi", "--server", endpoint, "--max-tokens", "100", "--timeout", "0.3")
    assert result.exit_code == 1
    assert "DEADLINE_EXCEEDED" in result.stderr
    time.sleep(0.3)
    assert not engine.open


def test_no_service_is_one_line():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    result = treeline("generate", "hi", "--server", endpoint)
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [f"treeline: cannot reach {endpoint}: Connection refused"]


def test_ctrl_c_ends_the_request_and_exits_130(service):
    engine, endpoint = service
    engine.step_s = 0.05
    # SIGINT is ignored if this runs in a shell's background. A preexec_fn would fork in the middle of gRPC's threads.
    begin = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    command = [sys.executable, "-c", begin + "from cli.main import main; main()"]
    arguments = ["generate", "hi", "--server", endpoint, "--max-tokens", "100"]
    process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.read(3) == "a0 ", process.communicate()[1]  # streamed while the answer is still being made
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=10)
    time.sleep(0.3)
    assert (process.returncode, "Traceback" in stderr, engine.open) == (130, False, set())


def test_top_shows_the_load(service):
    _, endpoint = service
    result = treeline("top", "--once", "--server", endpoint)
    assert result.exit_code == 0
    assert "fake" in result.stdout
    assert "0 of 16" in result.stdout
    assert "8 of 64" in result.stdout
    assert "50 ms" in result.stdout
    assert "30 ms, objective 40 ms (steps, 1.0 s old)" in result.stdout
    assert "nothing fresh" in result.stdout


def test_config_prints_defaults_that_load_again(tmp_path):
    printed = treeline("config").stdout
    assert Config.model_validate(yaml.safe_load(printed)) == Config()
    (tmp_path / "mine.yaml").write_text("server: {port: 6000}\n")
    result = treeline("config", str(tmp_path / "mine.yaml"))
    assert yaml.safe_load(result.stdout)["server"]["port"] == 6000


@pytest.mark.parametrize("command", [["config"], ["serve", "--config"], ["demo", "--config"]])
@pytest.mark.parametrize("text", ["server: {prot: 1}", "server: [", "limits: {max_running_requests: 0}"])
def test_a_wrong_file_is_one_line_and_exit_2(tmp_path, command, text):
    (tmp_path / "wrong.yaml").write_text(text)
    result = treeline(*command, str(tmp_path / "wrong.yaml"))
    assert (result.exit_code, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    assert "wrong.yaml" in result.stderr


def test_models_lists_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TREELINE_CACHE", str(tmp_path))
    assert "no models" in treeline("models", "list").stdout
    folder = lm.store.cache_folder() / "models" / "tiny"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    assert str(folder) in treeline("models", "list").stdout
    assert treeline("models", "pull", str(folder)).stdout.strip() == str(folder)
    missing = treeline("models", "pull", "/no/such")
    assert (missing.exit_code, len(missing.stderr.splitlines())) == (2, 1)


def test_doctor_looks_at_everything(tmp_path, monkeypatch):
    monkeypatch.setenv("TREELINE_CACHE", str(tmp_path))
    result = treeline("doctor")
    assert result.exit_code == 0, result.stdout
    for subject in ("treeline", "torch", "ray", "cpu", "gpu", "models", "server.port", "server.http.port"):
        assert f"ok    {subject}" in result.stdout


def test_doctor_tells_our_service_on_a_port_from_another_program(monkeypatch):
    monkeypatch.setattr("cli.doctor.ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        found = {subject: (fine, said) for fine, subject, said in examine(Config(server=ServerConfig(port=port)))}
    fine, said = found["server.port"]
    assert not fine
    assert f"127.0.0.1:{port} is in use, and no Treeline answers" in said


def test_doctor_asks_a_running_service_about_its_drafter():
    class Wrong(pb_grpc.GenerationServiceServicer):
        def GetLoad(self, request, context):
            return pb.GetLoadResponse(drafter_ready=True, drafter_problem="never right")

    server = grpc.server(ThreadPoolExecutor(1))
    pb_grpc.add_GenerationServiceServicer_to_server(Wrong(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        found = list(examine(Config(server=ServerConfig(port=port))))
        assert (False, "drafter", "never right") in found
        assert (True, "server.port", f"127.0.0.1:{port} is in use by this service") in found
    finally:
        server.stop(None)


def test_help_and_clients_need_no_torch():
    code = (
        "import sys, cli.main\n"
        "from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(cli.main.app, ['generate', '--help']).exit_code == 0\n"
        "print([m for m in ('torch', 'transformers', 'ray', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("inherited", "used"), [(None, "30000"), ("7", "7")])
def test_models_run_by_commands_spin_as_those_of_replicas_do(inherited, used):
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    if inherited:
        environment["GOMP_SPINCOUNT"] = inherited
    code = "import sys; sys.argv[1:] = ['--help']; from cli.main import main\ntry: main()\nfinally: import torch"
    environment["OMP_DISPLAY_ENV"] = "verbose"  # torch's OpenMP tells what it found when it is loaded
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert f"GOMP_SPINCOUNT = '{used}'" in run.stderr
