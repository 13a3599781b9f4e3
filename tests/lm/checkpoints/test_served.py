"""Quantised checkpoints from files to text, which is what transformers writes with their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel

from lm.cpu.grouped_linear import kernels
from lm.model import LanguageModel
from lm.parallel import load_model
from tests.lm.checkpoints.packing import FORMATS, KEPT, checkpoint
from tests.lm.tiny import _SHAPE, tiny_model, tiny_tokenizer
from tests.verifier_svc.doubles import OracleDrafter
from tests.verifier_svc.engine.test_engine import Known, engine_for, run
from treeline.config import ModelConfig
from treeline.sampling import SamplingParams
from verifier_svc.engine.request import Chunk, GenerationRequest

pytestmark = pytest.mark.skipif(not kernels(), reason="without kernels the default dtype may be bfloat16")
PROMPTS = ("The tree line", "Above it, nothing grows")
MAX_TOKENS = 16
# All sides are whole groups.
CONFIG = LlamaConfig(**_SHAPE | {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4})


@pytest.mark.parametrize("form", ["w4a16", "w8a16-channel", "fp8-channel", "fp8-block", "awq", "gptq", "gptq-v2"])
def test_a_quantised_target_writes_what_transformers_writes_with_its_weights(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TREELINE_CACHE", str(tmp_path / "cache"))
    reference = quantized(form, tmp_path / "model")
    settings = ModelConfig(model=str(tmp_path / "model"), device="cpu", arithmetic="float32")
    load_model(settings)
    target = load_model(settings)
    assert len(list((tmp_path / "cache/models").glob("[!.]*"))) == 1, "unpacked once"
    assert (target.name, target.dtype) == ("model", torch.float32)
    known = Known()
    for prompt in PROMPTS:
        token_ids = torch.tensor([target.tokenizer.encode(prompt)])
        answer = reference.generate(token_ids, max_new_tokens=MAX_TOKENS, do_sample=False, eos_token_id=-1)
        known.add(token_ids[0].tolist(), answer[0, token_ids.shape[1] :].tolist())
    expected = [target.tokenizer.decode(answer, skip_special_tokens=True) for _, answer in known.answers]
    assert texts(target, known, "off") == (expected, 0)
    written, accepted = texts(target, known, "smart")
    assert written == expected
    assert accepted > 0


def quantized(form: str, folder: Path) -> PreTrainedModel:
    """Write a checkpoint whose linear layers are quantised; returns a float32 model of the weights that are served."""
    hf, tensors, weights = tiny_model(CONFIG), {}, {}
    quantization: dict[str, Any] = {}
    for seed, (name, weight) in enumerate(hf.state_dict().items()):
        if name.endswith("_proj.weight"):
            quantization, parts, weights[name] = FORMATS[form](tuple(weight.shape), seed)
            tensors |= {name.removesuffix("weight") + part: tensor for part, tensor in parts.items()}
        else:
            tensors[name] = weights[name] = weight
    tiny_tokenizer().save_pretrained(checkpoint(folder, CONFIG, quantization, tensors))
    hf.load_state_dict(weights)
    return hf if form in KEPT else hf.bfloat16().float()


def texts(target: LanguageModel, known: Known, policy: str) -> tuple[list[str], int]:
    """What the target writes behind the known prompts, and how many nodes of trees it accepted."""
    requests = [
        GenerationRequest(str(index), prompt, SamplingParams(), MAX_TOKENS, ignore_eos=True, policy=policy)
        for index, (prompt, _) in enumerate(known.answers)
    ]
    outputs = run(engine_for(target, OracleDrafter(known, target.vocab_size)), requests).values()
    written = ["".join(item.text for item in items if isinstance(item, Chunk)) for items in outputs]
    return written, sum(items[-1].speculation.accepted_nodes for items in outputs)
