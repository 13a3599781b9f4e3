"""The target writes its own training text: a user's turn behind the chat template's bare prefix, then the answer.

Every token, given or chosen, goes through the same one-token steps of a full batch, so that the features of all tokens
are at hand when a text ends, and nothing is run twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from lm.attention import CONTEXT, AttentionOptions
from lm.features import FeatureTap
from lm.model import LanguageModel
from lm.sampling import Row, choose_tokens
from treeline.errors import ConfigError
from treeline.sampling import SamplingParams

MAX_TURN_TOKENS = 96
TURN_TEMPERATURE = 1.0
TURN_TOP_K = 100
ANSWER_TEMPERATURES = (0.0, 0.0, 0.8)
"""Served text is greedy more often than not; what is sampled keeps the head from knowing one path alone."""
MAX_LOOP_TOKENS = 24
LOOP_REPEATS = 3


@dataclass(frozen=True)
class Template:
    """A chat template taken apart: prefix, user's turn, infix, answer. The infix begins with what ends a turn."""

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
            raise ConfigError(f"the chat template of {model.name} does not show the user's turn as it is")
        prefix, infix = (model.tokenizer(part, add_special_tokens=False).input_ids for part in (before, after))
        return cls(prefix, infix)


@dataclass
class Text:
    """One text as it grows.

    Attributes:
        index: names the text; with the seed of the whole it decides every sampled token.
        given: tokens that come next whatever the target says.
        token_ids: what has been run, one `features` row [width] each.
    """

    index: int
    given: deque[int]
    turn_start: int
    answering: bool = False
    ended: bool = False
    token_ids: list[int] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)

    @property
    def turn_tokens(self) -> int:
        return len(self.token_ids) - self.turn_start

    def loops(self) -> bool:
        """It ends in a few tokens over and over."""
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
        self._batch = _Batch(model, slots, max_tokens)
        self._slots, self._max_tokens = slots, max_tokens

    @torch.inference_mode()
    def write(self, indices: Iterable[int], prompts: list[list[int]]) -> Iterator[Text]:
        """Texts as they end. Those with an index below the number of `prompts` answer that prompt's turn."""
        waiting, open_texts = deque(indices), list[Text]()
        while waiting or open_texts:
            while waiting and len(open_texts) < self._slots:
                self._batch.lengths[len(open_texts)] = 0
                open_texts.append(self._begin(waiting.popleft(), prompts))
            self._step(open_texts)
            for slot in reversed(range(len(open_texts))):
                if open_texts[slot].ended:
                    yield open_texts[slot]
                    self._batch.move(len(open_texts) - 1, slot)
                    open_texts[slot] = open_texts[-1]
                    open_texts.pop()

    def _begin(self, index: int, prompts: list[list[int]]) -> Text:
        prefix, infix = self._template.prefix, self._template.infix
        if index < len(prompts):
            turn = prompts[index][: self._max_tokens // 2]
            return Text(index, deque([*prefix, *turn, *infix]), len(prefix), answering=True)
        return Text(index, deque(prefix), len(prefix))

    def _step(self, texts: list[Text]) -> None:
        """Run one token of every text, and find out its next."""
        token_ids = [text.given.popleft() for text in texts]
        logits = self._batch.forward(token_ids)
        features = self._tap.take()
        for text, token_id, row in zip(texts, token_ids, features, strict=True):
            text.token_ids.append(token_id)
            text.features.append(row)
            text.ended = len(text.token_ids) == self._max_tokens or (
                text.answering and not text.given and (token_id in self._model.eos_token_ids or text.loops())
            )
        free = [slot for slot, text in enumerate(texts) if not text.ended and not text.given]
        if not free:
            return
        rows = [Row(self._params(texts[slot]), len(texts[slot].token_ids)) for slot in free]
        for slot, token_id in zip(free, choose_tokens(logits[free], rows).tolist(), strict=True):
            self._continue(texts[slot], token_id)

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


class _Batch:
    """One token a slot: the KV cache of a full batch, and its attention. Slots in use are always the first ones."""

    def __init__(self, model: LanguageModel, slots: int, max_tokens: int) -> None:
        self._model = model
        self.lengths = torch.zeros(slots, dtype=torch.int64, device=model.device)
        shapes = [(slots, layer.kv_heads, max_tokens, layer.key_dim) for layer in model.layers]
        self._keys = [torch.zeros(shape, dtype=model.dtype, device=model.device) for shape in shapes]
        self._values = [torch.zeros_like(keys) for keys in self._keys]

    def forward(self, token_ids: list[int]) -> Tensor:
        """Logits float32 [n, vocab] behind one more token of each of the first n slots."""
        n = len(token_ids)
        ids = torch.tensor(token_ids, device=self._model.device)
        self._here = self.lengths[:n].clone()
        longest = int(self._here.max()) + 1
        hidden = torch.arange(longest, device=ids.device) > self._here[:, None]
        self._mask = torch.zeros(hidden.shape, dtype=self._model.dtype, device=ids.device)
        self._mask = self._mask.masked_fill_(hidden, -torch.inf)[:, None, None]
        output = self._model.hf(input_ids=ids[None], position_ids=self._here[None], use_cache=False, **{CONTEXT: self})
        self.lengths[:n] += 1
        return output.logits[0].float()

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        n, heads, dim = query.shape
        slots = torch.arange(n, device=query.device)
        keys, values = self._keys[layer], self._values[layer]
        keys[slots, :, self._here] = key
        values[slots, :, self._here] = value
        longest = self._mask.shape[-1]
        grouped = query.reshape(n, key.shape[1], -1, dim)
        mixed = F.scaled_dot_product_attention(
            grouped, keys[:n, :, :longest], values[:n, :, :longest], self._mask, scale=options.scale
        )
        return mixed.reshape(n, heads, -1)

    def move(self, source: int, target: int) -> None:
        """Put what is in slot `source` into slot `target`."""
        if source != target:
            length = int(self.lengths[source])
            self.lengths[target] = length
            for tensor in (*self._keys, *self._values):
                tensor[target, :, :length] = tensor[source, :, :length]
