"""What the engine samples follows the target's own distribution, whatever trees are verified."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from lm.model import LanguageModel
from planner.fast.builtin_plan import builtin_plan
from tests.lm.tiny import tiny_llama, tiny_tokenizer
from tests.trees import tree_of
from treeline.config import Config, LimitsConfig, ModelConfig, VerifierConfig
from treeline.drafting import DraftReply, DraftRequest
from treeline.forest import Forest
from treeline.sampling import SamplingParams
from treeline.v1 import generation_pb2 as pb
from verifier_svc.engine.engine import Engine
from verifier_svc.engine.request import Chunk, GenerationRequest
from verifier_svc.service.fields import ServedModel
from verifier_svc.service.grammars import GrammarCompiler
from verifier_svc.speculation.link import LocalLink

DRAWS = {"grammar": 4_000}
"""By case, 10,000 unless here: fewer where fewer tokens may come."""
PROMPT = [7, 30, 99]
LIMITS = LimitsConfig(max_running_requests=64, max_context_tokens=64, max_tree_nodes=12, max_tree_depth=4)
CONFIG = Config(
    verifier=VerifierConfig(
        target=ModelConfig(dtype="float32"), kv_cache_tokens=2048, kv_block_tokens=4, prefill_chunk_tokens=256
    ),
    limits=LIMITS,
)
CASES = {
    "temperature": SamplingParams(temperature=2.0),
    "top-k": SamplingParams(temperature=2.5, top_k=6),
    "top-p": SamplingParams(temperature=2.5, top_p=0.8),
    # Tokens of the answer become likelier, so that most trees hold tokens of their own path again.
    "penalties": SamplingParams(
        temperature=2.0,
        repetition_penalty=1.1,
        presence_penalty=-1.5,
        frequency_penalty=-1.5,
        min_p=0.02,
        logit_bias={7: 2.0, 30: -1.0},
    ),
    "grammar": SamplingParams(temperature=1.5, frequency_penalty=0.5),
}
GRAMMAR = "([a-h][i-p]|[i-p][a-h])[a-p]"
"""What may come second depends on the first: each node of a tree has a mask of its own."""


class LikelyDrafter:
    """Proposes the target's most likely continuations as a chain, a fan, a full tree or nothing, in turn."""

    features = None

    def __init__(self, top: dict[tuple[int, ...], list[int]]) -> None:
        self._top = top
        self._count = 0

    def draft(self, request: DraftRequest) -> DraftReply:
        trees = []
        for sequence in request.sequences:
            self._count += 1
            trees.append(self._tree(tuple(sequence.token_ids[sequence.length - sequence.start - 1 :])))
        return DraftReply(request.step_id, Forest.join([Forest.empty(0), *trees]))

    def _tree(self, root: tuple[int, ...]) -> Forest:
        best = self._top[root]
        shape = self._count % 4
        if shape == 0:
            return Forest.empty(1)
        if shape == 1:
            return tree_of(best[:1], [-1])
        if shape == 2:
            return tree_of(best[:4], [-1] * 4)
        return tree_of([*best[:3], 5, 6, 7], [-1, -1, -1, 0, 0, 1])

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel.from_hf(tiny_llama(seed=3), tiny_tokenizer())


def reference(model: LanguageModel, tokens: list[int], params: SamplingParams, bound: bool) -> np.ndarray:
    """float64 [vocab]: the target's next-token distribution, computed the plain way.

    `bound`: the answer matches GRAMMAR.
    """
    model.hf.set_attn_implementation("eager")
    with torch.inference_mode():
        logits = model.hf(torch.tensor([tokens])).logits[0, -1].double().numpy()
    model.hf.set_attn_implementation("treeline")
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    for token in set(tokens):
        logits[token] *= params.repetition_penalty ** -np.sign(logits[token])
    for token in tokens[len(PROMPT) :]:
        logits[token] -= params.frequency_penalty
    for token in set(tokens[len(PROMPT) :]):
        logits[token] -= params.presence_penalty
    if bound:
        allowed = model.tokenizer("abcdefghijklmnop").input_ids
        if len(tokens) == len(PROMPT) + 1:
            allowed = allowed[8:] if tokens[-1] in allowed[:8] else allowed[:8]
        logits[~np.isin(np.arange(len(logits)), allowed)] = -np.inf
    logits /= params.temperature
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    order = np.argsort(-probs)
    kept = np.ones(len(probs), bool)
    if params.top_k:
        kept[order[params.top_k :]] = False
    if params.top_p < 1:
        before = np.cumsum(probs[order]) - probs[order]
        kept[order[before >= params.top_p]] = False
    kept[probs < params.min_p * probs.max()] = False
    probs[~kept] = 0
    return probs / probs.sum()


@pytest.mark.parametrize("case", CASES)
def test_three_tokens_follow_the_targets_distribution(model, case):
    params, bound, draws = CASES[case], case == "grammar", DRAWS.get(case, 10_000)
    info = ServedModel("m", "arch", "float32", model.vocab_size, 512, model.eos_token_ids, has_chat_template=True)
    grammar = GrammarCompiler(model.tokenizer, info)(pb.Grammar(regex=GRAMMAR)) if bound else None
    first = reference(model, PROMPT, params, bound)
    firsts = np.argsort(-first)[:5].tolist()
    top = {(t,): np.argsort(-reference(model, [*PROMPT, t], params, bound))[:6].tolist() for t in range(260)}
    plan = builtin_plan(LIMITS)
    engine = Engine(model, LocalLink(LikelyDrafter(top)), lambda: plan, CONFIG)
    answers: list[tuple[int, ...]] = []
    drawn: dict[str, list[int]] = {}
    started = accepted = 0
    while len(answers) < draws:
        while started < draws and len(engine.scheduler.running) + len(engine.scheduler.waiting) < 64:
            sampling = replace(params, seed=started)
            # The second token has a tree before it, whose nodes say what the third one is.
            request = GenerationRequest(str(started), PROMPT, sampling, 3, ignore_eos=True, policy="eagle2:2,4,12")
            engine.add(replace(request, grammar=grammar))
            started += 1
        for output in engine.step()[0]:
            if isinstance(output.item, Chunk):
                drawn.setdefault(output.request_id, []).extend(output.item.token_ids)
            else:
                accepted += output.item.speculation.accepted_nodes
                answers.append(tuple(drawn.pop(output.request_id)))
    assert accepted > draws / 20, "hardly a node was accepted, so the trees tested nothing"
    pair = Counter(answer[:2] for answer in answers).most_common(1)[0][0]
    for begun in ((), (firsts[0],), (firsts[1],), pair):
        after = [answer[len(begun)] for answer in answers if answer[: len(begun)] == begun]
        expected = reference(model, [*PROMPT, *begun], params, bound)
        assert p_value(np.bincount(after, minlength=260), expected) > 0.01


def p_value(counts: np.ndarray, probs: np.ndarray) -> float:
    """Of a chi-square test, tokens expected fewer than 8 times taken together; impossible ones must not occur."""
    assert counts[probs == 0].sum() == 0
    expected = probs * counts.sum()
    common = expected >= 8
    observed = [*counts[common], counts[~common].sum()]
    wanted = [*expected[common], expected[~common].sum()]
    if wanted[-1] < 1e-9:
        observed, wanted = observed[:-1], wanted[:-1]
    return float(chisquare(observed, np.asarray(wanted) * sum(observed) / sum(wanted)).pvalue)
