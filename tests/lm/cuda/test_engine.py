"""The engine over padded passes by the kernels' own source, interpreted: the text of packed ones, trees and all."""

from __future__ import annotations

import numpy as np
import pytest

from lm.cuda import attention
from lm.layers.fuse import fuse_layers
from lm.model import LanguageModel
from tests.lm.helpers import pad_passes, random_tokens
from tests.lm.tiny import tiny_model, tiny_tokenizer
from tests.verifier_svc.doubles import OracleDrafter
from tests.verifier_svc.engine.test_engine import POLICIES, Known, engine_for, plain_greedy, run, tokens_of
from treeline.sampling import SamplingParams
from verifier_svc.engine.request import GenerationRequest


def test_greedy_text_is_that_of_packed_passes_with_every_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SPLITS", 1)  # The interpreter runs programs without work as well.
    attention.kernel_constants.cache_clear()
    rng, known, requests = np.random.default_rng(1), Known(), []
    plain = LanguageModel.from_hf(tiny_model("qwen3"), tiny_tokenizer())
    for index, policy in enumerate(POLICIES):
        prompt = random_tokens(rng, 2 + index)
        known.add(prompt, plain_greedy(plain, prompt, 4))
        requests.append(GenerationRequest(policy, prompt, SamplingParams(), 4, ignore_eos=True, policy=policy))
    hf = tiny_model("qwen3")
    fuse_layers(hf)
    model = LanguageModel.from_hf(hf, tiny_tokenizer())
    pad_passes(model.passes, interpreted=True)
    monkeypatch.setattr(model, "capture", lambda cache: None)  # Every size would take minutes here.
    outputs = run(engine_for(model, OracleDrafter(known, model.vocab_size)), requests)
    assert [tokens_of(outputs[request.request_id]) for request in requests] == [answer for _, answer in known.answers]
    assert model.passes.counts.keys() == {"eager"}
    assert sum(outputs[request.request_id][-1].speculation.accepted_nodes for request in requests) > 0
