from __future__ import annotations

from importlib import import_module
from pathlib import Path

import yaml
from ray import serve
from ray.serve.schema import ServeDeploySchema

from deploy.run import with_secret
from treeline.config import Config
from treeline.rpc.tokens import read_tokens

ROOT = Path(__file__).resolve().parents[2]


def test_each_run_has_a_secret_of_its_own_that_only_its_user_can_read(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    paths = [with_secret(Config(), folder).internal.token_file for folder in folders]
    tokens = [read_tokens(path) for path in paths]
    assert tokens[0] != tokens[1]
    assert [path.stat().st_mode & 0o777 for path in paths] == [0o600, 0o600]


def test_a_configured_secret_stays(tmp_path):
    (tmp_path / "mine").write_text("secret")
    config = Config.model_validate({"internal": {"token_file": tmp_path / "mine"}})
    assert with_secret(config, tmp_path) is config


def test_the_serve_file_names_builders_that_take_its_arguments():
    example = yaml.safe_load((ROOT / "deploy/serve.yaml").read_text())
    ServeDeploySchema(**example)
    for described in example["applications"]:
        module, _, builder = described["import_path"].partition(":")
        assert f"treeline-{builder.replace('_', '-')}" == described["name"]
        assert isinstance(getattr(import_module(module), builder)(described["args"]), serve.Application)
