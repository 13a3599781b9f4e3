import random
from copy import deepcopy
from typing import NamedTuple

import numpy as np
import pytest
import torch

from drafter_svc.drafter import DrafterInfo, TreeDrafter
from drafter_svc.model_proposer import MAX_CATCH_UP_TOKENS, ModelProposer
from lm.model import LanguageModel
from lm.sampling import Row, choose_tokens
from tests.drafter_svc.doubles import GREEDY, paths, plan, tiny_language_model, tree_paths, trees_of
from tests.lm.tiny import tiny_llama
from treeline.drafting import DraftRequest, DraftSequence, DraftStats
from treeline.forest import Forest
from treeline.sampling import SamplingParams

MAX_NODES = 16

PLAN = plan()


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_language_model()


@pytest.fixture(scope="module")
def reference():
    return deepcopy(tiny_llama())


class Step(NamedTuple):
    """What one step brought, by session."""

    trees: dict[int, Forest]
    held: dict[int, int]
    stats: DraftStats


class Bench:
    """A drafter on a tiny model, driven as a verifier would."""

    def __init__(self, model, cache_tokens: int = 4096, max_sessions: int = 64) -> None:
        self.cache = model.new_cache(cache_tokens, 16)
        self.proposer = ModelProposer(model, self.cache, MAX_NODES)
        info = DrafterInfo("tiny")
        self.drafter = TreeDrafter(info, max_sessions, self.proposer)
        self.told: dict[int, int] = {}

    def step(self, tokens: dict[int, list[int]], policy="chain:4", sampling=GREEDY, released=(), **more) -> Step:
        """One step over whole sequences; sends what the drafter does not hold."""
        sequences = []
        for session_id, whole in tokens.items():
            start = min(self.told.get(session_id, 0), len(whole) - 1)
            given = {"max_nodes": MAX_NODES, "max_depth": 8} | more
            sequences.append(DraftSequence(session_id, start, whole[start:], sampling, policy, **given))
        request = DraftRequest(1, PLAN, sequences, list(released))
        reply = self.drafter.draft(request)
        for session_id, whole in tokens.items():
            self.told[session_id] = reply.held.get(session_id, len(whole))
        return Step(trees_of(request, reply), reply.held, reply.stats)


def continuation(reference, tokens: list[int], count: int, params: SamplingParams = GREEDY) -> list[int]:
    """The model's own next tokens, by plain recomputation."""
    tokens = list(tokens)
    for _ in range(count):
        with torch.inference_mode():
            logits = reference(torch.tensor([tokens])).logits[0, -1:].float()
        row = Row(params, len(tokens), np.asarray(tokens, np.int64))
        tokens.append(int(choose_tokens(logits, [row])[0]))
    return tokens[-count:]


def some_tokens(generator: random.Random, count: int) -> list[int]:
    return [generator.randrange(256) for _ in range(count)]


def advance(generator: random.Random, tokens: list[int], tree: Forest) -> list[int]:
    """Tokens committed next: a random part of the first path of the tree, then a token of the verifier's own."""
    path, node = [], -1
    for i, parent in enumerate(tree.parents.tolist()):
        if parent == node and generator.random() < 0.8:
            path.append(int(tree.token_ids[i]))
            node = i
    return tokens + path + [generator.randrange(256)]


def test_chains_are_the_models_own_greedy_text_whatever_was_accepted(model, reference):
    generator, bench = random.Random(0), Bench(model)
    tokens = {i: some_tokens(generator, 3 + 4 * i) for i in range(4)}
    for _ in range(12):
        present = {i: tokens[i] for i in generator.sample(sorted(tokens), generator.randrange(1, 5))}
        reply = bench.step(present)
        for i, tree in reply.trees.items():
            assert tree.token_ids.tolist() == continuation(reference, tokens[i], 4)
            assert tree.parents.tolist() == [-1, 0, 1, 2]
            tokens[i] = advance(generator, tokens[i], tree)


@pytest.mark.parametrize("policy", ["static:3-2-2", "eagle2:4,3,12", "smart"])
def test_first_choices_are_right_under_every_node(model, reference, policy):
    """Acceptance follows any path of the tree, so scratch entries of later siblings get committed, too."""
    generator, bench = random.Random(1), Bench(model)
    tokens = {i: some_tokens(generator, 5 + i) for i in range(3)}
    for _ in range(8):
        reply = bench.step(tokens, policy)
        for i, tree in reply.trees.items():
            assert tree.depths.max() > 1
            ordered = list(tree_paths(tree))
            above = [path[:-1] for path in ordered]
            for node, path in enumerate(ordered):
                if path[:-1] not in above[:node]:
                    assert continuation(reference, tokens[i] + list(path[:-1]), 1) == [path[-1]]
            tokens[i] = [*tokens[i], *generator.choice(ordered), generator.randrange(256)]


def test_accepted_tokens_are_not_run_again(model):
    bench = Bench(model)
    tokens = list(range(40, 70))
    tree = bench.step({1: tokens}).trees[1]
    assert bench.proposer.stats.nodes == [1, 1, 1, 1]
    tokens = [*tokens, *tree.token_ids[:3].tolist(), 7]
    bench.step({1: tokens})
    assert bench.proposer.stats.catch_up_tokens == 0
    tokens = [*tokens, 1, 2, 3]
    bench.step({1: tokens})
    assert bench.proposer.stats.catch_up_tokens == 2  # beside the root


def test_rewritten_tokens_are_forgotten(model, reference):
    bench, generator = Bench(model), random.Random(2)
    tokens = some_tokens(generator, 30)
    bench.step({1: tokens})
    for start in (29, 20, 3, 0):
        tokens = tokens[:start] + some_tokens(generator, 6)
        bench.told[1] = start
        assert bench.step({1: tokens}).trees[1].token_ids.tolist() == continuation(reference, tokens, 4)


def test_the_same_step_asked_again_gives_the_same_tree(model):
    bench = Bench(model)
    first, again = (bench.step({1: [1, 2, 3]}, "static:3-2").trees[1] for _ in range(2))
    assert paths(first) == paths(again)
    assert len(first) == 9


def test_sessions_make_room_for_one_another_and_return(model, reference):
    generator, bench = random.Random(3), Bench(model, cache_tokens=768)
    tokens = {i: some_tokens(generator, 20) for i in range(5)}
    for _ in range(4):
        for i in tokens:
            tree = bench.step({i: tokens[i]}).trees[i]
            assert tree.token_ids.tolist() == continuation(reference, tokens[i], 4)
            tokens[i] = advance(generator, tokens[i], tree)
    assert bench.cache.used_blocks <= bench.cache.total_blocks


def test_a_step_beyond_the_cache_serves_whom_it_can(model, reference):
    generator, bench = random.Random(4), Bench(model, cache_tokens=256)
    tokens = {i: some_tokens(generator, 60) for i in range(5)}
    reply = bench.step(tokens)
    served = [i for i, tree in reply.trees.items() if len(tree)]
    assert 0 < len(served) < 5
    for i in served:
        assert reply.trees[i].token_ids.tolist() == continuation(reference, tokens[i], 4)
    assert bench.step({i: tokens[i] for i in served}).stats.catch_up_tokens == 0


def test_a_growing_session_outgrows_its_place_and_stays_right(model, reference):
    generator, bench = random.Random(5), Bench(model, cache_tokens=640)
    tokens = some_tokens(generator, 30)
    for _ in range(20):
        tokens += some_tokens(generator, 23)
        tree = bench.step({1: tokens}).trees[1]
        assert tree.token_ids.tolist() in ([], continuation(reference, tokens, 4))
    assert len(tree) == 4


def test_long_prompts_catch_up_in_chunks_beside_running_sessions(reference):
    long_context = tiny_language_model()
    long_context.max_context_tokens = 4096
    bench = Bench(long_context)
    generator = random.Random(6)
    short, long = some_tokens(generator, 20), some_tokens(generator, 2 * MAX_CATCH_UP_TOKENS + 100)
    sizes, run = [], []
    for _ in range(4):
        reply = bench.step({1: short, 2: long})
        assert reply.trees[1].token_ids.tolist() == continuation(reference, short, 4)
        sizes.append(len(reply.trees[2]))
        run.append(reply.stats.catch_up_tokens)
        short = [*short, 5]
    assert sizes == [0, 0, 4, 4]
    assert max(run) <= MAX_CATCH_UP_TOKENS + 20


def test_no_token_is_run_beyond_the_draft_models_context(model):
    bench, tokens = Bench(model), [3] * model.max_context_tokens
    assert len(bench.step({1: tokens[:-2]}).trees[1]) == 3
    for _ in range(3):
        tree = bench.step({1: tokens}).trees[1]
    assert len(tree) == 1
    assert len(bench.step({1: [*tokens, 3]}).trees[1]) == 0
    assert bench.cache.used_blocks == 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
def test_sampled_first_choices_are_the_targets_own_seeded_sample(model, reference, temperature):
    generator, bench = random.Random(7), Bench(model)
    for seed in (1, 2**63 + 5, 2**64 - 1):
        params = SamplingParams(temperature=temperature, seed=seed)
        tokens, session_id = some_tokens(generator, 9), seed
        for _ in range(4):
            tree = bench.step({session_id: tokens}, sampling=params).trees[session_id]
            assert tree.token_ids.tolist() == continuation(reference, tokens, 4, params)
            tokens = advance(generator, tokens, tree)


def test_noise_belongs_to_the_seed(model):
    bench = Bench(model)
    texts = {
        tuple(bench.step({i: [1, 2, 3]}, sampling=SamplingParams(temperature=2.0, seed=i)).trees[i].token_ids.tolist())
        for i in range(1, 6)
    }
    assert len(texts) == 5


def test_catch_up_alone_grows_nothing_but_saves_the_next_step(model):
    bench = Bench(model)
    tokens = list(range(100, 160))
    assert len(bench.step({1: tokens}, max_nodes=0).trees[1]) == 0
    assert len(bench.step({1: [*tokens, 4]}).trees[1]) == 4
    assert bench.proposer.stats.catch_up_tokens <= 1


def test_released_sessions_leave_nothing(model):
    bench = Bench(model)
    bench.step({1: [1, 2, 3], 2: [4, 5, 6]})
    assert bench.cache.used_blocks > 0
    bench.step({}, released=[1, 2, 99])
    assert bench.cache.used_blocks == 0
    assert bench.drafter.sessions == 0
    bench.told.clear()
    bench.step({1: [1, 2, 3]})
    bench.drafter.close()
    assert bench.cache.used_blocks == 0


def test_more_sessions_than_allowed_push_out_the_oldest_which_returns(model, reference):
    generator, bench = random.Random(9), Bench(model, max_sessions=2)
    tokens = {i: some_tokens(generator, 10) for i in range(3)}
    for i in range(3):
        bench.step({i: tokens[i]})
    tokens[0].append(7)
    assert bench.step({0: tokens[0]}).held == {0: 0}
    assert bench.step({0: tokens[0]}).trees[0].token_ids.tolist() == continuation(reference, tokens[0], 4)
    assert bench.step({i: tokens[i] for i in range(3)}).held.keys() <= {1, 2}


def test_measured_costs_leave_the_cache_empty(model):
    bench = Bench(model)
    layer_s, node_s = bench.proposer.measure()
    assert 0 < layer_s < 1
    assert 0 <= node_s < 0.1
    assert bench.cache.used_blocks == 0
