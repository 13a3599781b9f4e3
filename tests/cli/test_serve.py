"""What `treeline serve` finds out before it starts anything: each mistake is one line and exit 2."""

import os
import re
import shutil
import socket
import subprocess
import sys

import pytest
import yaml
from typer.testing import CliRunner

from cli.main import app
from cli.serve import check_startable
from drafter_svc.drafter import DEFAULT_HEAD
from lm.draft_head import save_head
from tests.lm.tiny import tiny_llama
from tests.lm.tiny_head import tiny_draft_ids, tiny_head_module
from tests.verifier_svc.services import save_tiny_model
from treeline.config import Config, ServerConfig, VerifierConfig
from treeline.errors import ConfigError


def treeline(*arguments: str, **options):
    return CliRunner().invoke(app, list(arguments), **options)


def test_serve_stops_before_anything_starts_if_something_is_missing(tmp_path):
    free, taken = ServerConfig(port=0, http={"port": 0}), socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    wrong = [
        (Config(server=free, verifier=VerifierConfig(default_policy="sharp")), "sharp"),
        (Config(server=free, verifier=VerifierConfig(target={"model": "/no/such/model"})), "/no/such/model"),
        (Config(server=ServerConfig(port=port)), f"{port}: .* see server.port"),
        (Config(server=ServerConfig(port=0, http={"port": port})), f"{port}: .* see server.http.port"),
        (Config(server=ServerConfig(port=0, token_file=tmp_path / "none")), "none"),
        (Config(server=ServerConfig(port=0, tls={"certificate": "c.pem", "private_key": "k.pem"})), "c.pem"),
    ]
    with taken:
        for config, named in wrong:
            with pytest.raises(ConfigError, match=named):
                check_startable(config)


def test_serve_refuses_a_damaged_tokenizer(tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    free = ServerConfig(port=0, http={"port": 0})
    with pytest.raises(ConfigError, match="cannot load the tokenizer in"):
        check_startable(Config(server=free, verifier=VerifierConfig(target={"model": str(tmp_path)})))


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("models") / "target")


def copied(folder, to):
    shutil.copytree(folder, to)
    return to


def missing(target, folder):
    return {"head": str(folder / "nowhere")}, f"no draft head in {folder / 'nowhere'}"


def not_a_folder(target, folder):
    (folder / "head").write_text("")
    return {"head": str(folder / "head")}, f"no draft head in {folder / 'head'}"


def empty(target, folder):
    return {"head": str(folder)}, f"no draft head in {folder}: config.json"


def a_model(target, folder):
    return {"head": str(target)}, f"the draft head {target} has 2 layers"


def of_other_things(target, folder):
    (folder / "config.json").write_text('{"num_hidden_layers": 1}')
    return {"head": str(folder)}, f"cannot load the draft head {folder}: 'hidden_size'"


def without_weights(target, folder):
    shutil.copy(DEFAULT_HEAD / "config.json", folder)
    return {"head": str(folder)}, f"cannot load the draft head {folder}: it has no safetensors"


def of_another_width(target, folder):
    return {"head": str(DEFAULT_HEAD)}, f"the draft head {DEFAULT_HEAD} is for .* 576 .* not for target"


def cut_off(target, folder):
    head = copied(DEFAULT_HEAD, folder / "head")
    os.truncate(head / "model.safetensors", 1000)
    return {"head": str(head)}, f"cannot load the draft head {head}: "


@pytest.mark.parametrize(
    "wrong", [missing, not_a_folder, empty, a_model, of_other_things, without_weights, of_another_width, cut_off]
)
def test_serve_names_a_wrong_head_in_one_line_before_ray_starts(target, tmp_path, wrong):
    drafter, problem = wrong(target, tmp_path)
    check_refused(tmp_path, {"verifier": {"target": {"model": str(target)}}, "drafter": drafter}, problem)


def no_gguf(target, folder):
    file = folder / "weights.gguf"
    file.write_bytes(b"version https://git-lfs")
    return file, f"model file '{file}' is no GGUF file"


def a_pointer_for_weights(target, folder):
    model = copied(target, folder / "model")
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    return model, f"cannot read {model}/model.safetensors: "


def weights_cut_off(target, folder):
    model = copied(target, folder / "model")
    os.truncate(model / "model.safetensors", os.path.getsize(model / "model.safetensors") - 1)
    return model, f"cannot read {model}/model.safetensors: "


def config_cut_off(target, folder):
    model = copied(target, folder / "model")
    os.truncate(model / "config.json", 20)
    return model, f"cannot read {model}/config.json: "


@pytest.mark.parametrize("wrong", [no_gguf, a_pointer_for_weights, weights_cut_off, config_cut_off])
def test_serve_names_a_wrong_target_in_one_line_before_ray_starts(target, tmp_path, wrong):
    model, problem = wrong(target, tmp_path)
    check_refused(tmp_path, {"verifier": {"target": {"model": str(model)}}}, problem)


def check_refused(folder, config, problem):
    file = folder / "treeline.yaml"
    file.write_text(yaml.safe_dump({"server": {"port": 0, "http": {"port": 0}}, **config}))
    result = treeline("serve", "--config", str(file))
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert re.match(f"treeline: {problem}", line), line


def test_serve_takes_a_head_of_its_target(target, tmp_path):
    hf = tiny_llama()
    module = tiny_head_module(hf)
    save_head(tmp_path, module, hf.get_output_embeddings().weight[tiny_draft_ids()], tiny_draft_ids())
    verifier, drafter = {"target": {"model": str(target)}}, {"kind": "head", "head": str(tmp_path)}
    check_startable(Config(server=ServerConfig(port=0, http={"port": 0}), verifier=verifier, drafter=drafter))


@pytest.mark.parametrize("drafter", [{}, {"head": str(DEFAULT_HEAD)}])
def test_serve_checks_the_default_model_and_a_head_without_loading_torch(drafter):
    code = (
        "import sys; from cli.main import main; from cli.serve import check_startable; from treeline.config import *;"
    )
    code += f"check_startable(Config(server={{'port': 0, 'http': {{'port': 0}}}}, drafter={drafter}));"
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
