import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from drafter_svc.drafter import DrafterInfo, TreeDrafter, build_drafter, find_head
from drafter_svc.head_proposer import HeadProposer
from lm.draft_head import save_head
from lm.store import vocabulary_sha256
from tests.drafter_svc.doubles import GREEDY, plan
from tests.lm.tiny import tiny_llama, tiny_tokenizer
from tests.lm.tiny_head import (
    DRAFT_VOCAB_SIZE,
    reference_logits,
    target_features,
    tiny_draft_ids,
    tiny_head,
    tiny_head_module,
)
from treeline.config import DrafterConfig, LimitsConfig, ModelConfig
from treeline.drafting import NO_FEATURES, DraftRequest, DraftSequence
from treeline.errors import ConfigError
from treeline.forest import ROOT, Forest
from treeline.sampling import SamplingParams

MAX_NODES = 24
TOKENS = [3, 70, 12, 199, 5, 41, 70, 12]
MORE = [90, 8, 133]

PLAN = plan()


@pytest.fixture(scope="module")
def hf():
    return tiny_llama()


class Bench:
    """A drafter on a tiny head, driven as a verifier would."""

    def __init__(self, hf, cache_tokens: int = 2048) -> None:
        self.hf = hf
        head = tiny_head(hf)
        self.cache = head.new_cache(cache_tokens, 16)
        self.drafter = TreeDrafter(DrafterInfo("tiny"), 64, HeadProposer(head, self.cache, MAX_NODES))

    def step(
        self, tokens: list[int], start=0, rows=None, session_id=1, policy="static:3-2-2", sampling=GREEDY
    ) -> Forest:
        """A tree below `tokens`, of which those from `start` on are sent, and the newest `rows` features."""
        rows = len(tokens) - max(start, 1) if rows is None else rows
        features = bits(self.hf, tokens)[len(tokens) - 1 - rows : -1] if rows else NO_FEATURES
        sequence = DraftSequence(session_id, start, tokens[start:], sampling, policy, MAX_NODES, 8, features=features)
        return self.drafter.draft(DraftRequest(1, PLAN, [sequence])).forest


def bits(hf, tokens: list[int]) -> np.ndarray:
    return target_features(hf, tokens).bfloat16().view(torch.int16).numpy().view(np.uint16)


def check(hf, tree: Forest, tokens: list[int], first: int = 1) -> None:
    """Every node is the head's own choice of its place below its parent, with the head's own probability."""
    assert len(tree)
    paths: list[list[int]] = []
    parents = tree.parents.tolist()
    for node, (token, parent, prob) in enumerate(zip(tree.token_ids, parents, tree.draft_probs, strict=True)):
        above = paths[parent] if parent != ROOT else []
        probs = torch.softmax(reference_logits(hf, tokens, above, first), dim=-1)
        column = int(probs.sort(descending=True, stable=True).indices[parents[:node].count(parent)])
        assert token == tiny_draft_ids()[column]
        assert prob == pytest.approx(float(probs[column]), rel=1e-3)
        paths.append([*above, int(token)])


def test_a_tree_is_what_the_head_says_with_its_own_output_in_place_of_features(hf):
    tree = Bench(hf).step(TOKENS)
    assert len(tree) == 3 + 6 + 12
    check(hf, tree, TOKENS)


def test_later_steps_send_only_what_is_new_and_change_nothing(hf):
    bench = Bench(hf)
    bench.step(TOKENS)
    for length in range(len(TOKENS) + 1, len(TOKENS + MORE) + 1):
        tokens = (TOKENS + MORE)[:length]
        check(hf, bench.step(tokens, start=length - 1), tokens)
    check(hf, bench.step(TOKENS + MORE + TOKENS, start=len(TOKENS + MORE)), TOKENS + MORE + TOKENS)


def test_tokens_that_changed_are_run_again(hf):
    bench = Bench(hf)
    bench.step(TOKENS + MORE)
    other = [*TOKENS, 77, 9]
    check(hf, bench.step(other, start=len(TOKENS)), other)


def test_a_head_begins_where_its_features_begin(hf):
    check(hf, Bench(hf).step(TOKENS, rows=4), TOKENS, first=len(TOKENS) - 4)


def test_missing_features_in_between_make_it_begin_anew(hf):
    bench = Bench(hf)
    bench.step(TOKENS)
    tokens = TOKENS + MORE
    check(hf, bench.step(tokens, start=len(TOKENS), rows=2), tokens, first=len(tokens) - 2)


def test_without_features_nothing_is_drafted(hf):
    assert len(Bench(hf).step(TOKENS, rows=0, policy="chain:3")) == 0


def test_a_sampled_request_gets_drafts_under_its_own_noise(hf):
    sampling = SamplingParams(temperature=1.0, seed=5)
    first, again = (Bench(hf).step(TOKENS, sampling=sampling).token_ids.tolist() for _ in range(2))
    assert first == again
    assert first != Bench(hf).step(TOKENS, sampling=SamplingParams(temperature=1.0, seed=6)).token_ids.tolist()
    assert set(first) <= set(tiny_draft_ids().tolist())


def test_a_full_cache_makes_room_and_a_session_returns(hf):
    bench = Bench(hf, cache_tokens=128)
    for session_id in (1, 2, 3, 1):
        check(hf, bench.step(TOKENS, session_id=session_id, policy="chain:3"), TOKENS)
    bench.drafter.close()
    assert bench.cache.used_blocks == 0


def test_it_measures_its_layers(hf):
    head = tiny_head(hf)
    cache = head.new_cache(512, 16)
    layer_s, node_s = HeadProposer(head, cache, MAX_NODES).measure()
    assert layer_s > 0
    assert node_s >= 0
    assert cache.used_blocks == 0


@pytest.fixture
def target_folder(hf, tmp_path):
    folder = tmp_path / "target"
    hf.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_saved_head_drafts_for_its_target_and_no_other(hf, target_folder, tmp_path):
    module = tiny_head_module(hf)
    module.config = replace(module.config, vocabulary_sha256="other")
    save_head(tmp_path / "head", module, hf.get_output_embeddings().weight[tiny_draft_ids()], tiny_draft_ids())
    config = DrafterConfig(kind="head+ngram", head=tmp_path / "head", kv_cache_tokens=1024)
    target = ModelConfig(model=str(target_folder), dtype="float32", device="cpu")
    drafter = build_drafter(config, target, LimitsConfig(), "other")
    assert drafter.info.name == "head"
    assert drafter.features is not None
    assert drafter.features.width == bits(hf, TOKENS).shape[1]
    sequence = DraftSequence(1, 0, TOKENS, GREEDY, "chain:2", 8, 8, features=bits(hf, TOKENS)[:-1])
    assert len(drafter.draft(DraftRequest(1, PLAN, [sequence])).forest) == 2
    with pytest.raises(ConfigError, match="another vocabulary"):
        build_drafter(config, target, LimitsConfig(), vocabulary_sha256(tiny_tokenizer()))


def test_a_drafter_with_a_head_starts_without_transformers(hf, target_folder, tmp_path):
    """It takes longer to load than all else that such a drafter needs."""
    output = hf.get_output_embeddings().weight[tiny_draft_ids()]
    module = tiny_head_module(hf)
    module.config = replace(module.config, vocabulary_sha256=vocabulary_sha256(tiny_tokenizer()))
    save_head(tmp_path, module, output, tiny_draft_ids())
    config = {
        "drafter": {"kind": "head", "head": str(tmp_path), "kv_cache_tokens": 1024},
        "verifier": {"target": {"model": str(target_folder)}},
    }
    code = f"""
import sys
from drafter_svc.server import _build
from treeline.config import Config
assert _build(Config.model_validate({config!r})).features
heavy = {{"transformers", "scipy", "sympy", "torch._dynamo", "fastapi", "huggingface_hub"}}
sys.exit(", ".join(heavy & sys.modules.keys()) or 0)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_a_missing_or_broken_head_is_one_clear_line(target_folder, tmp_path):
    target = ModelConfig(model=str(target_folder), dtype="float32", device="cpu")
    with pytest.raises(ConfigError, match="no draft head in"):
        build_drafter(DrafterConfig(kind="head", head=tmp_path / "none"), target, LimitsConfig(), None)
    (tmp_path / "config.json").write_text('{"target": 1}')
    with pytest.raises(ConfigError, match="cannot load the draft head"):
        build_drafter(DrafterConfig(kind="head", head=tmp_path), target, LimitsConfig(), None)
    with pytest.raises(ConfigError, match="has no draft head"):
        find_head(DrafterConfig(kind="head"), target)
    assert find_head(DrafterConfig(), target) is None
    assert DRAFT_VOCAB_SIZE < 256
