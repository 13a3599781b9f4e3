"""The target writes its own training text: a user's turn after the chat template's bare prefix, then the answer.

Every step runs the new tokens of every text in one pass: all given tokens, or the one chosen last. When a text ends,
it has features of all its tokens, and none was run twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lm.features import FeatureTap
from lm.kv_cache import SequenceCache
from lm.model import LanguageModel
from lm.packed import PackedSequence
from lm.sampling import Row, choose_tokens
from treeline.errors import ConfigError
from treeline.sampling import SamplingParams

BLOCK_TOKENS = 32
MAX_TURN_TOKENS = 96
TURN_TEMPERATURE = 1.0
TURN_TOP_K = 100
ANSWER_TEMPERATURES = (0.0, 0.0, 0.8)
"""Served text is mostly greedy; sampled answers keep the head from learning a single path only."""
MAX_LOOP_TOKENS = 24
LOOP_REPEATS = 3


@dataclass(frozen=True)
class Template:
    """A chat template taken apart: prefix, user's turn, infix, answer. The infix begins with the end-of-turn token."""

    prefix: list[int]
    infix: list[int]

    @classmethod
    def of(cls, model: LanguageModel) -> Template:
        """Raises ConfigError if the tokenizer's chat template cannot be taken apart."""
        mark = "\u2402"
        chat = [{"role": "user", "content": mark}]
        text = str(model.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
        before, found, after = text.partition(mark)
        if not found or not after:
            raise ConfigError(f"the chat template of {model.name} does not contain the user's turn verbatim")
        prefix, infix = (model.tokenizer(part, add_special_tokens=False).input_ids for part in (before, after))
        return cls(prefix, infix)


@dataclass
class Text:
    """One text as it grows.

    Attributes:
        index: identifies the text; with the run's seed it decides every sampled token.
        cache: its keys and values.
        given: tokens to run next, whatever the target predicts.
        token_ids: those already run.
        features: of these, [tokens, width] per pass.
    """

    index: int
    cache: SequenceCache
    given: list[int]
    turn_start: int
    answering: bool = False
    ended: bool = False
    token_ids: list[int] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)

    @property
    def turn_tokens(self) -> int:
        return len(self.token_ids) - self.turn_start

    def loops(self) -> bool:
        """Whether it ends in a repeated sequence."""
        tail = self.token_ids[-MAX_LOOP_TOKENS * LOOP_REPEATS :]
        return any(
            tail[-period * LOOP_REPEATS :] == tail[-period:] * LOOP_REPEATS
            for period in range(1, min(MAX_LOOP_TOKENS, len(tail) // LOOP_REPEATS) + 1)
        )


class Writer:
    """Lets a target write texts, as many at once as it has slots."""

    def __init__(self, model: LanguageModel, tap: FeatureTap, slots: int, max_tokens: int, seed: int) -> None:
        self._model, self._tap, self._seed = model, tap, seed
        self._template = Template.of(model)
        blocks = slots * -(-max_tokens // BLOCK_TOKENS)
        self._cache = model.new_cache(blocks * BLOCK_TOKENS, BLOCK_TOKENS)
        self._slots, self._max_tokens = slots, max_tokens

    @torch.inference_mode()
    def write(self, indices: Iterable[int], prompts: list[list[int]]) -> Iterator[Text]:
        """Yield texts as they end. Those with an index below the number of `prompts` answer that prompt."""
        waiting, open_texts = deque(indices), list[Text]()
        while waiting or open_texts:
            while waiting and len(open_texts) < self._slots:
                open_texts.append(self._begin(waiting.popleft(), prompts))
            self._step(open_texts)
            for text in open_texts:
                if text.ended:
                    self._cache.free(text.cache)
                    yield text
            open_texts = [text for text in open_texts if not text.ended]

    def _begin(self, index: int, prompts: list[list[int]]) -> Text:
        prefix, infix = self._template.prefix, self._template.infix
        cache = self._cache.allocate(self._max_tokens)
        assert cache is not None
        if index < len(prompts):
            turn = prompts[index][: self._max_tokens // 2]
            return Text(index, cache, [*prefix, *turn, *infix], len(prefix), answering=True)
        return Text(index, cache, [*prefix], len(prefix))

    def _step(self, texts: list[Text]) -> None:
        """Run the given tokens of every text, and choose the next."""
        given = [text.given[: self._max_tokens - len(text.token_ids)] for text in texts]
        packed = [PackedSequence(text.cache, new, None, "last") for text, new in zip(texts, given, strict=True)]
        logits = self._model.forward(packed, self._cache)
        self._cache.commit([(text.cache, list(range(len(new)))) for text, new in zip(texts, given, strict=True)])
        features = self._tap.take().split([len(new) for new in given])
        for text, new, seen in zip(texts, given, features, strict=True):
            text.token_ids.extend(new)
            text.features.append(seen)
            text.given = []
            text.ended = len(text.token_ids) == self._max_tokens or (
                text.answering and (new[-1] in self._model.eos_token_ids or text.loops())
            )
        free = [place for place, text in enumerate(texts) if not text.ended]
        if not free:
            return
        rows = [Row(self._params(texts[place]), len(texts[place].token_ids)) for place in free]
        for place, token_id in zip(free, choose_tokens(logits[free], rows).tolist(), strict=True):
            self._continue(texts[place], token_id)

    def _continue(self, text: Text, token_id: int) -> None:
        infix = self._template.infix
        if not text.answering and (token_id == infix[0] or text.turn_tokens >= MAX_TURN_TOKENS):
            text.given.extend(infix)
            text.answering = True
        else:
            text.given.append(token_id)

    def _params(self, text: Text) -> SamplingParams:
        seed = self._seed << 32 | text.index
        if not text.answering:
            return SamplingParams(temperature=TURN_TEMPERATURE, top_k=TURN_TOP_K, seed=seed)
        temperature = ANSWER_TEMPERATURES[text.index % len(ANSWER_TEMPERATURES)]
        return SamplingParams(temperature=temperature, seed=seed)
