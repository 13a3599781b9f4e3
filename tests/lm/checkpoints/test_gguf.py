"""Whole GGUF files of each format, as transformers reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from lm.cpu.grouped_linear import GroupedLinear, kernels
from lm.model import LanguageModel
from lm.packed import PackedSequence
from tests.lm.tiny import CONFIGS, tiny_model
from tests.lm.tiny_gguf import write_gguf
from treeline.config import ModelConfig

SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64}
BITS = {"Q4_K": 4, "Q5_K": 8, "Q6_K": 16, "Q8_0": 8}
PROMPT = list(b"above the tree line")
NEW_TOKENS = 24


@torch.inference_mode()
def greedy(model: LanguageModel) -> list[int]:
    cache = model.new_cache(64, 16)
    sequence = cache.allocate(len(PROMPT) + NEW_TOKENS)
    assert sequence is not None
    answer: list[int] = []
    while len(answer) < NEW_TOKENS:
        new = answer[-1:] or PROMPT
        answer.append(int(model.forward([PackedSequence(sequence, new)], cache)[-1].argmax()))
        cache.commit([(sequence, list(range(len(new))))])
    return answer


@pytest.mark.parametrize("kind", BITS)
def test_a_file_writes_what_transformers_writes_and_stays_in_groups(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TREELINE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / f"tiny-{kind}.gguf"
    write_gguf(tiny_model(LlamaConfig(**CONFIGS["llama"].to_dict() | SHAPE)), file, kind)
    model = LanguageModel.load(ModelConfig(model=str(file), dtype="float32", device="cpu", arithmetic="float32"))
    bits = [module.struct.bits for module in model.hf.modules() if isinstance(module, GroupedLinear)]
    assert bits == ([BITS[kind]] * 9 if kernels() else [])
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    reference.generation_config.eos_token_id = None
    written = reference.generate(torch.tensor([PROMPT]), max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist()
    assert greedy(model) == written[len(PROMPT) :]
    assert len(set(written[len(PROMPT) :])) > 5, "the answer tells tokens apart"
