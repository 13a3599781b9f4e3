"""The target's hidden states for a draft head: copied from each pass and kept per request until they are sent."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lm.device import download, upload
from lm.features import FeatureTap
from lm.model import LanguageModel
from treeline.drafting import MAX_DRAFT_MESSAGE_BYTES, NO_FEATURES, FeatureSpec
from treeline.errors import ConfigError
from verifier_svc.engine.scheduler import Batch
from verifier_svc.engine.sequence import Sequence
from verifier_svc.engine.walk import Walk

logger = logging.getLogger(__name__)

WINDOW_TOKENS = 256
"""Most feature rows kept per request: the context with which a head starts after a long prompt or a gap. They take
1.2 MB per request for the default target (4.5 KiB a row), 6.3 MB for an 8B one (24 KiB a row)."""
UNREAD_TOKENS = 256
"""Tokens whose features are copied together while nothing is drafted: 16 steps of 16 streams."""


@dataclass
class Unread:
    """Passes whose features have not been copied yet.

    Attributes:
        passes: for each pass its features by layer, each [tokens, hidden].
        tokens: sum over the passes.
        wanted: (session, row indices over all passes), in the order of the rows.
    """

    passes: list[list[Tensor]] = field(default_factory=list)
    tokens: int = 0
    wanted: list[tuple[int, list[int]]] = field(default_factory=list)


class HiddenStates:
    """Owns the running requests' features that the drafter may still need: uint16 rows [width], bits of bfloat16.

    The rows of a request belong to consecutive tokens, the last one to the token before its root.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._budget_bytes = MAX_DRAFT_MESSAGE_BYTES // 2
        self._window_tokens = WINDOW_TOKENS
        self._spec: FeatureSpec | None = None
        self._tap: FeatureTap | None = None
        self._unread = Unread()
        self._rows: dict[int, deque[NDArray[np.uint16]]] = {}
        self._wait: Callable[[], None] = lambda: None
        """Waits until the last rows have come from the device."""
        self._sent_tokens: dict[int, int] = {}

    def follow(self, spec: FeatureSpec | None) -> None:
        """Copy the features of this drafter from the next pass on; those of another drafter are dropped."""
        if spec == self._spec:
            return
        self._spec = spec
        self._unread = Unread()
        self._rows.clear()
        self._sent_tokens.clear()
        if spec is None:
            return  # The tap stays: captured passes read it, and the same drafter usually returns.
        if self._tap is not None:
            if (self._tap.layers, self._tap.width) == (spec.layers, spec.width):
                return
            self._tap.close()
            self._tap = None
        try:
            self._tap = self._model.tap(spec.layers)
        except ConfigError as error:
            logger.warning("the drafter's head receives no features: %s", error)
            return
        if self._tap.width != spec.width:
            logger.warning("the drafter's head reads %d features a token, not %d", spec.width, self._tap.width)
            self._tap.close()
            self._tap = None
        # One message holds the windows of two new requests.
        self._window_tokens = max(1, min(WINDOW_TOKENS, self._budget_bytes // (4 * spec.width)))

    def keep(self, batch: Batch, walks: list[Walk], tree_nodes: list[int]) -> None:
        """Note the features of the tokens that the pass has committed.

        Args:
            walks: those of `batch.decoding` come first.
            tree_nodes: verified nodes of each of `batch.decoding`.
        """
        if self._tap is None or self._spec is None:
            return
        unread = self._unread
        first = unread.tokens
        for sequence, walk, nodes in zip(batch.decoding, walks, tree_nodes, strict=False):
            unread.wanted.append((sequence.session_id, [first, *[first + 1 + node for node in walk.accepted]]))
            first += 1 + nodes
        for sequence, tokens in batch.prefilling:
            rows = range(first + max(0, tokens - self._window_tokens), first + tokens)
            unread.wanted.append((sequence.session_id, list(rows)))
            first += tokens
        unread.passes.append(self._tap.parts())
        unread.tokens = first
        # After a step with trees the drafter asks again: start the copy now.
        if any(tree_nodes) or first >= UNREAD_TOKENS:
            self._read()

    def _read(self) -> None:
        """Copy the wanted rows of the unread passes."""
        unread, self._unread = self._unread, Unread()
        if not unread.wanted:
            return
        passes = [torch.cat(parts, dim=-1).bfloat16() for parts in unread.passes]
        hidden = torch.cat(passes) if len(passes) > 1 else passes[0]
        rows = [row for _, rows in unread.wanted for row in rows]
        if len(rows) < len(hidden):
            hidden = hidden[upload(np.asarray(rows), self._model.device)]
        bits, self._wait = download(hidden.view(torch.int16))
        values = iter(bits.numpy().view(np.uint16))
        for session_id, rows in unread.wanted:
            kept = self._rows.setdefault(session_id, deque(maxlen=self._window_tokens))
            kept.extend(islice(values, len(rows)))

    def unsent(self, sequences: list[Sequence]) -> list[NDArray[np.uint16]]:
        """For each sequence uint16 [k, width]: features of the tokens before its last k that are new since `sent`.

        If the message would be too large, the sequences with the most rows lose their oldest ones.
        """
        self._read()
        self._wait()
        budget_bytes = self._budget_bytes
        found = []
        for index, sequence in enumerate(sequences):
            rows: Iterable[NDArray[np.uint16]] = self._rows.get(sequence.session_id, ())
            wanted = len(sequence.token_ids) - self._sent_tokens.get(sequence.session_id, 0)
            newest = list(rows)[-wanted:]
            if newest:  # Later sequences share what earlier ones leave of their shares.
                share = budget_bytes // (len(sequences) - index) // newest[0].nbytes
                newest = newest[max(0, len(newest) - share) :]
            features = np.stack(newest) if newest else NO_FEATURES
            budget_bytes -= features.nbytes
            found.append(features)
        return found

    def sent(self, sequence: Sequence) -> None:
        """The drafter now has the kept features of all tokens before this sequence's last one."""
        self._sent_tokens[sequence.session_id] = len(sequence.token_ids)

    def lost(self, sequence: Sequence) -> None:
        """The drafter has lost this sequence's features."""
        self._sent_tokens.pop(sequence.session_id, None)

    def forget(self, sequence: Sequence) -> None:
        """The request has ended."""
        self._unread.wanted = [each for each in self._unread.wanted if each[0] != sequence.session_id]
        self._rows.pop(sequence.session_id, None)
        self._sent_tokens.pop(sequence.session_id, None)
