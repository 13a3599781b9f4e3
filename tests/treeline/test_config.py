from __future__ import annotations

import random
from pathlib import Path

import pytest
import yaml

from treeline.config import Config
from treeline.config_file import load_config
from treeline.errors import ConfigError
from treeline.sampling import SamplingParams


def load(tmp_path: Path, text: str) -> Config:
    path = tmp_path / "treeline.yaml"
    path.write_text(text)
    return load_config(path)


def test_no_file_and_an_empty_file_are_the_defaults(tmp_path):
    assert load_config(None) == Config() == load(tmp_path, "")


def test_the_defaults_survive_yaml(tmp_path):
    assert load(tmp_path, yaml.safe_dump(Config().model_dump(mode="json"))) == Config()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("server: {prot: 1}", "server.prot: Extra inputs.*; did you mean port"),
        ("serve: {}", "serve: Extra inputs"),
        ("limits: {max_running_requests: 0}", "limits.max_running_requests"),
        ("server: {port: many}", "server.port"),
        ("drafter: {kind: model}", "needs a draft model"),
        ("server: {host: 0.0.0.0}", "leaves the machine"),
        ("internal: {host: 0.0.0.0}", "internal.token_file"),
        ("verifier: {target: {dtype: float8}}", "verifier.target.dtype"),
        ("- a list", "expected sections"),
        ("a: [", "is not YAML"),
        ("a: " + "[" * 500, "is not YAML"),
        ("a: 2020-99-99", "is not YAML"),
        ("!!int x", "is not YAML"),
        ("!!timestamp x", "is not YAML"),
        ("limits: {max_waiting_requests: " + "1" * 5000 + "}", "is not YAML"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(tmp_path, text, problem):
    with pytest.raises(ConfigError, match=problem) as caught:
        load(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_a_mutated_file_is_read_or_refused_in_one_line(tmp_path):
    rng, refused = random.Random(0), 0
    whole = yaml.safe_dump({"server": {"port": 1, "http": {"enabled": True}}, "limits": {"max_running_requests": 9}})
    pieces = [
        "[",
        "]",
        "{",
        "}",
        ": ",
        "- ",
        "\n  ",
        "&a ",
        "*a",
        "!!int ",
        "!!set ",
        "'",
        '"',
        "|",
        "%",
        "?",
        "é",
        "\0",
    ]
    for _ in range(200):
        text = list(whole)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(text))
            text[at : at + rng.randint(0, 2)] = rng.choice(pieces) * rng.choice((1, 1, 30))
        try:
            load(tmp_path, "".join(text))
        except ConfigError as error:
            refused += 1
            assert "\n" not in str(error)  # noqa: PT017
    assert 20 < refused < 200, "some are refused, some are not"


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "nowhere.yaml")


def test_paths_are_made_absolute_and_model_names_stay(tmp_path, monkeypatch):
    for name in ("model", "head"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    config = Config.model_validate(
        {
            "verifier": {"target": {"model": "model"}},
            "drafter": {"head": "head"},
            "server": {"token_file": "tokens"},
        }
    ).with_absolute_paths()
    assert config.verifier.target.model == str(tmp_path / "model")
    assert config.drafter.head == str(tmp_path / "head")
    assert config.server.token_file == tmp_path / "tokens"
    assert Config().with_absolute_paths().verifier.target.model == "default"


def test_the_environment_changes_the_file_and_settings_change_both(tmp_path, monkeypatch):
    (tmp_path / "file.yaml").write_text("server: {port: 1, http: {port: 2}}\nverifier: {prefix_caching: true}")
    monkeypatch.setenv("TREELINE_SERVER__PORT", "3")
    monkeypatch.setenv("TREELINE_SERVER__HTTP__PORT", "4")
    monkeypatch.setenv("TREELINE_VERIFIER__TARGET__MODEL", "some/model")
    monkeypatch.setenv("TREELINE_DRAFTER__ENDPOINTS", "[a:1, b:2]")
    monkeypatch.setenv("TREELINE_SERVER", "not:a-setting")
    config = load_config(tmp_path / "file.yaml", {"server.port": 5})
    assert (config.server.port, config.server.http.port) == (5, 4)
    assert (config.verifier.target.model, config.verifier.prefix_caching) == ("some/model", True)
    assert config.drafter.endpoints == ["a:1", "b:2"]
    monkeypatch.setenv("TREELINE_SERVER__PRT", "3")
    with pytest.raises(ConfigError, match=r"server\.prt: .*did you mean port"):
        load_config(None)


def test_sampling_defaults_of_the_operator_go_before_the_models():
    model = SamplingParams(temperature=0.7, top_k=40)
    config = Config.model_validate({"verifier": {"sampling_defaults": {"temperature": 0.2, "top_p": 0.9}}})
    expected = SamplingParams(temperature=0.2, top_p=0.9, top_k=40)
    assert config.verifier.sampling_defaults.over(model) == expected
