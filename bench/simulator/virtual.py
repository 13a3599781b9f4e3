"""A virtual clock, and fake models whose passes cost what a device's curve says and whose text follows a law.

The fakes stand in for `LanguageModel` alone. Engine, scheduler, drafter, growth, walk, rule, gate and planner are the
real ones, on the virtual clock.

The text: the first KEY_TOKENS tokens of a prompt are its key. The target's next token follows from
`hash(key, token, position)`. So does the kind of the position (how sure the drafter is there) and its fate (the rank at
which the drafter proposes the target's token, or none). Every policy meets the same text.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bench.simulator.acceptance import KINDS, AcceptanceLaw
from lm.kv_cache import KVCache, LayerShape, SequenceCache
from lm.packed import PackedSequence
from lm.passes import Passes
from planner.fast.cost import pass_s
from treeline.forest import ROOT
from treeline.plan import DEPTHS, CostModel

VOCAB = 128
"""Small, since every node gets logits; large compared with the ranks that a drafter proposes."""
KEY_TOKENS = 4
MAX_CONTEXT_TOKENS = 1 << 16
NOISE = 0.02
"""Standard deviation of a pass's duration, as a share of it."""
_SALTS = np.asarray([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB], np.uint64)


class VirtualClock:
    """Seconds that pass only by `advance`. Call it to read it."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def __call__(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        self._now_s += seconds


class FakeText:
    """What draft model and target produce after a token, for every key and position.

    Attributes:
        guessable: whether drafts are right as often as the law says, or never; may be changed at any time.
    """

    def __init__(self, law: AcceptanceLaw, seed: int) -> None:
        """`seed`: other seeds give other texts of the same law."""
        self.guessable = True
        random = np.random.default_rng(seed)
        drawn = [law.draw(depth, random) for depth in range(1, DEPTHS + 1)]
        self._below = np.stack([true for true, _ in drawn]).cumsum(-1)
        self._claimed = np.stack([claimed for _, claimed in drawn])
        self._seed = np.uint64(seed)

    def said(self, states: NDArray[np.uint64]) -> NDArray[np.int64]:
        """int64 [n]: the target's own next token in each state of the text."""
        return (_mixed(states, 0) % np.uint64(VOCAB)).astype(np.int64)

    def drafted(
        self, states: NDArray[np.uint64], depths: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """(token ids, claimed probabilities), both [n, ranks]: what a drafter proposes there at these depths, from 1.

        The target's token stands at the rank that its law draws, or nowhere; all other ids are wrong.
        """
        rows = np.minimum(depths, len(self._claimed)) - 1, (states % np.uint64(KINDS)).astype(np.intp)
        uniform = (_mixed(states, 1) >> np.uint64(11)) * 2.0**-53
        fate = (uniform[:, None] > self.guessable * self._below[rows]).sum(1)
        said, ranks = self.said(states)[:, None], np.arange(self._below.shape[-1])
        return np.where(ranks == fate[:, None], said, (said + 1 + ranks) % VOCAB), self._claimed[rows]

    def states(
        self, keys: NDArray[np.uint64], token_ids: NDArray[np.uint64], positions: NDArray[np.uint64]
    ) -> NDArray[np.uint64]:
        """uint64 [n]: the state of the text after these tokens at these positions."""
        return _mixed((keys * _SALTS[1] + self._seed) ^ (positions * _SALTS[2] + token_ids), 2)


def _mixed(values: NDArray[np.uint64], salt: int) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014)."""
    values = values + _SALTS[salt]
    values = (values ^ (values >> np.uint64(30))) * _SALTS[1]
    values = (values ^ (values >> np.uint64(27))) * _SALTS[2]
    return values ^ (values >> np.uint64(31))


class FakeModel:
    """A `LanguageModel` without weights: subclasses define the cost and the logits of its passes."""

    name = "fake"
    vocab_size = VOCAB
    max_context_tokens = MAX_CONTEXT_TOKENS
    eos_token_ids: frozenset[int] = frozenset()
    device = torch.device("cpu")

    def __init__(self, text: FakeText, clock: VirtualClock) -> None:
        self._text, self._clock = text, clock
        self.passes = Passes({None}, self.device)  # the engine reads their limits; none is run
        self._keys: WeakKeyDictionary[SequenceCache, int] = WeakKeyDictionary()
        vocabulary = {f"w{token}": token for token in range(VOCAB)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)

    def new_cache(self, num_tokens: int, block_tokens: int) -> KVCache:
        return KVCache([LayerShape(1, 1, 1)], num_tokens, block_tokens, torch.float32, self.device)

    def capture(self, cache: KVCache) -> None:
        """Nothing to capture."""

    def forward(self, sequences: list[PackedSequence], cache: KVCache) -> Tensor:
        """As `LanguageModel.forward`; takes its time on the virtual clock."""
        if not sequences:
            return torch.empty(0, VOCAB)
        self._clock.advance(self._pass_s(sequences))
        states, depths = self._wanted(sequences)
        for sequence in sequences:
            sequence.cache.scratch += len(sequence.token_ids)
        return torch.from_numpy(self._logits(states, depths))

    def _pass_s(self, sequences: list[PackedSequence]) -> float:
        raise NotImplementedError

    def _logits(self, states: NDArray[np.uint64], depths: NDArray[np.int64]) -> NDArray[np.float32]:
        """float32 [n, VOCAB] after each state. depths: 0 after a causal run, 1 and up after nodes of a tree."""
        raise NotImplementedError

    def _wanted(self, sequences: list[PackedSequence]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """(states, depths) of all tokens whose logits are wanted."""
        keys, firsts, counts, tokens, depths = [], [], [], list[int](), []
        for sequence in sequences:
            cache, new = sequence.cache, sequence.token_ids
            start = cache.length + cache.scratch
            if start < KEY_TOKENS:  # a prompt may come in chunks
                self._keys[cache] = _key(new, start) + (self._keys[cache] if start else 0)
            if sequence.logits == "none":
                continue
            wanted = new if sequence.logits == "all" else new[-1:]
            keys.append(self._keys[cache])
            counts.append(len(wanted))
            tokens += wanted
            # Positions of a causal run are consecutive; in a tree they follow from the depth.
            firsts.append(cache.length + (len(new) - len(wanted) if sequence.parents is None else 0))
            depths.append(
                np.arange(len(wanted)) if sequence.parents is None else _depths(sequence.parents)[-len(new) :]
            )
        if not tokens:
            return np.empty(0, np.uint64), np.empty(0, np.int64)
        depth = np.concatenate(depths)
        positions = (np.repeat(firsts, counts) + depth).astype(np.uint64)
        drafted = [sequence.parents is not None for sequence in sequences if sequence.logits != "none"]
        states = self._text.states(
            np.repeat(np.asarray(keys, np.uint64), counts), np.asarray(tokens, np.uint64), positions
        )
        return states, (1 + depth) * np.repeat(drafted, counts)


class FakeTarget(FakeModel):
    """Emits the text, as one-hot logits.

    Attributes:
        slowdown: passes take this many times as long as the curves say; the planner has to find out.
    """

    def __init__(self, text: FakeText, clock: VirtualClock, cost: CostModel, seed: int) -> None:
        super().__init__(text, clock)
        self.slowdown = 1.0
        self._cost, self._random = cost, np.random.default_rng([seed, 1])

    def _pass_s(self, sequences: list[PackedSequence]) -> float:
        context_tokens = sum([sequence.cache.length for sequence in sequences]) // len(sequences)
        tokens = sum([len(sequence.token_ids) for sequence in sequences])
        noise = 1 + NOISE * self._random.standard_normal()
        return self.slowdown * noise * pass_s(self._cost, len(sequences), context_tokens, tokens)

    def _logits(self, states: NDArray[np.uint64], depths: NDArray[np.int64]) -> NDArray[np.float32]:
        logits = np.zeros((len(states), VOCAB), np.float32)
        logits[np.arange(len(states)), self._text.said(states)] = 1.0
        return logits


class FakeDraftModel(FakeModel):
    """Proposes by the law. Its logits are log-probabilities, so that a softmax gives the claimed ones.

    Args:
        layer_s, node_s: seconds of a pass, and of each token in it.
    """

    def __init__(self, text: FakeText, clock: VirtualClock, layer_s: float, node_s: float) -> None:
        super().__init__(text, clock)
        self._layer_s, self._node_s = layer_s, node_s

    def _pass_s(self, sequences: list[PackedSequence]) -> float:
        return self._layer_s + self._node_s * sum([len(sequence.token_ids) for sequence in sequences])

    def _logits(self, states: NDArray[np.uint64], depths: NDArray[np.int64]) -> NDArray[np.float32]:
        ids, claimed = self._text.drafted(states, depths + 1)
        left = np.maximum(1 - claimed.sum(1, keepdims=True), 1e-6) / (VOCAB - claimed.shape[1])
        logits = np.broadcast_to(np.log(left), (len(states), VOCAB)).astype(np.float32)
        np.put_along_axis(logits, ids, np.log(np.maximum(claimed, 1e-6)).astype(np.float32), axis=1)
        return logits


def _key(tokens: list[int], start: int) -> int:
    """What these tokens, from index `start` of a prompt on, add to its key."""
    return sum(token * VOCAB**place for place, token in enumerate(tokens[: KEY_TOKENS - start], start))


def prompt_of(key: int, tokens: int) -> list[int]:
    """A prompt of this many tokens, at least KEY_TOKENS, with this key."""
    return [key // VOCAB**place % VOCAB for place in range(KEY_TOKENS)] + [0] * (tokens - KEY_TOKENS)


def _depths(parents: NDArray[np.int32]) -> list[int]:
    """Of each entry; 0 for children of ROOT. Parents come first: [-1, 0, 0, 1] -> [0, 1, 1, 2]."""
    depths: list[int] = []
    for parent in parents.tolist():
        depths.append(depths[parent] + 1 if parent != ROOT else 0)
    return depths
