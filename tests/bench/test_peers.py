"""Peers: complete rows, agreement that counts, and missing peers that are named."""

from __future__ import annotations

import json
import sys
import time

import pytest
import torch
from typer.testing import CliRunner

from bench.peers.compare import Lineup, MissingPeerError, run_peers
from bench.peers.llama_cpp import llama_cpp
from bench.peers.openvino import openvino_genai
from bench.peers.transformers import continuous_batching, generate_one_by_one
from cli.main import app
from tests.lm.tiny import tiny_llama, tiny_tokenizer

PROMPTS = [[72, 101, 108], [65, 66, 67, 68]]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fixed(answers):
    """A peer that has its answers ready."""

    def answer(prompts, concurrency):
        time.sleep(0.001)
        return answers[: len(prompts)]

    return answer


def test_agreement_is_the_share_of_answers_like_the_first_peers():
    lineup = Lineup()
    lineup.add("transformers", "plain", lambda: fixed([[1, 2, 9], [3, 4]]), serial=True)
    lineup.add("treeline", "smart", lambda: fixed([[1, 2], [3, 5]]), note="one differs")
    rows = run_peers(lineup, PROMPTS, frozenset({9}), 3, [1, 8])
    assert [(row["system"], row["mode"], row["concurrency"], row["agreement"]) for row in rows] == [
        ("transformers", "plain", 1, 1.0),
        ("transformers", "plain", 8, 1.0),
        ("treeline", "smart", 1, 0.5),
        ("treeline", "smart", 8, 0.5),
    ]
    assert rows[0]["tokens_per_s"] == rows[1]["tokens_per_s"]  # one after the other is measured once
    assert rows[2]["note"] == "one differs"
    assert all(0 < row["tokens_per_s_min"] <= row["tokens_per_s"] <= row["tokens_per_s_max"] for row in rows)


def test_who_cannot_be_built_or_cannot_answer_is_missing():
    def refuse(*_):
        raise MissingPeerError("not here")

    lineup, seen = Lineup(), []
    lineup.add("transformers", "plain", lambda: fixed([[1], [2]]))
    lineup.add("other", "unbuilt", refuse)
    lineup.add("other", "mute", lambda: refuse)
    rows = run_peers(lineup, PROMPTS, frozenset(), 2, [1], seen.append)
    assert [row["system"] for row in rows] == ["transformers"]
    assert [(m.mode, m.reason) for m in lineup.missing] == [("unbuilt", "not here"), ("mute", "not here")]
    assert seen == ["transformers plain, warm-up", "other mute, warm-up", *["transformers plain, 1"] * 2]


def test_transformers_modes_answer_alike():
    hf = tiny_llama()
    hf.set_attn_implementation("sdpa")
    plain = generate_one_by_one(hf, 8)(PROMPTS, 1)
    assert [len(answer) for answer in plain] == [8, 8]
    assert generate_one_by_one(hf, 8, assistant_model=tiny_llama())(PROMPTS, 1) == plain
    assert generate_one_by_one(hf, 8, prompt_lookup_num_tokens=4)(PROMPTS, 1) == plain
    assert continuous_batching(tiny_llama(), 8)(PROMPTS, 2) == plain


def test_packages_that_are_not_installed_are_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "openvino_genai", None)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(MissingPeerError, match="pip install openvino-genai"):
        openvino_genai(tmp_path / "m.gguf", 8, [1], frozenset(), prompt_lookup=False)
    with pytest.raises(MissingPeerError, match="pip install llama-cpp-python"):
        llama_cpp(tmp_path / "m.gguf", 8, 64, frozenset())


@pytest.mark.parametrize("kind", ["ngram", "model"])
def test_the_command_names_everyone(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("TREELINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("bench.common.VERSIONS_OF", ("torch", "no-such-package"))
    model = tmp_path / "tiny"
    tiny_llama().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    draft = f", model: {{model: {model}, dtype: float32}}" if kind == "model" else ""
    config, report = tmp_path / "c.yaml", tmp_path / "r.json"
    config.write_text(
        f"verifier: {{target: {{model: {model}, dtype: float32}}, kv_cache_tokens: 2048}}\n"
        f"drafter: {{kind: {kind}{draft}}}\n"
    )
    options = ["--limit", "2", "--max-tokens", "6", "--rounds", "1", "--concurrency", "1", "--concurrency", "2"]
    result = CliRunner().invoke(app, ["bench", "peers", "-c", str(config), *options, "--json", str(report)])
    assert result.exit_code == 0, result.output
    written = json.loads(report.read_text())
    rows, missing = written["rows"], {(m["system"], m["mode"]): m["reason"] for m in written["missing"]}
    seen = {(row["system"], row["mode"]) for row in rows}
    assert seen | missing.keys() == {
        ("transformers", "plain"),
        ("transformers", "assistant_model"),
        ("transformers", "prompt_lookup"),
        ("transformers", "continuous_batching"),
        ("treeline", "off"),
        ("treeline", "smart"),
        ("openvino-genai", "plain"),
        ("openvino-genai", "prompt_lookup"),
        ("llama.cpp", "plain"),
    }
    assert written["versions"].keys() == {"python", "torch"}
    assert len(rows) == 2 * len(seen)
    assert all(row["agreement"] == 1.0 for row in rows)
    assert (kind == "ngram") == ("ngram" in missing.get(("transformers", "assistant_model"), ""))
    assert "missing: llama.cpp plain" in result.stdout


def test_a_prompt_that_does_not_fit_is_one_line(tmp_path):
    model = tmp_path / "tiny"
    tiny_llama().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    (tmp_path / "c.yaml").write_text(f"verifier: {{target: {{model: {model}, dtype: float32}}}}\n")
    result = CliRunner().invoke(app, ["bench", "peers", "-c", str(tmp_path / "c.yaml"), "--max-tokens", "510"])
    assert result.exit_code == 2
    assert "exceed the context of 512" in result.stderr
