"""Drafts without a model: what followed the last few tokens when they occurred before in the prompt or the output.

Known as prompt lookup decoding. Here all the earlier occurrences vote, so that a lookup gives a small tree.
"""

from __future__ import annotations

from array import array

from drafter_svc.proposer import Children, GrowingTree
from drafter_svc.sessions import Session
from treeline.tree import ROOT, Source

MIN_GRAM = 2
MAX_GRAM = 4
MAX_MATCHES = 16
NONE = -1

Match = tuple[int, int]
"""(index of the token that followed, how many tokens before it agree: MIN_GRAM to MAX_GRAM)."""


class NgramIndex:
    """Where each n-gram of one sequence occurred, newest first, as hash chains; all operations cost O(tokens changed).

    An n-gram is entered under the index of the token that follows it, as soon as there is one.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._newest: dict[tuple[int, ...], int] = {}
        # For each n, the previous occurrence of the n-gram that ends right before each index.
        self._previous = {n: array("i") for n in range(MIN_GRAM, MAX_GRAM + 1)}

    def extend(self, token_ids: list[int]) -> None:
        """Append tokens."""
        for token_id in token_ids:
            for n, previous in self._previous.items():
                index = len(self.tokens)
                if index < n:
                    previous.append(NONE)
                    continue
                gram = tuple(self.tokens[index - n :])
                previous.append(self._newest.get(gram, NONE))
                self._newest[gram] = index
            self.tokens.append(token_id)

    def truncate(self, length: int) -> None:
        """Drop all tokens from `length` on."""
        while len(self.tokens) > length:
            self.tokens.pop()
            index = len(self.tokens)
            for n, previous in self._previous.items():
                before = previous.pop()
                if index < n:
                    continue
                gram = tuple(self.tokens[index - n :])
                if before == NONE:
                    del self._newest[gram]
                else:
                    self._newest[gram] = before

    def matches(self) -> list[Match]:
        """Earlier occurrences of the sequence's end, the longest first, then the newest; at most MAX_MATCHES."""
        found: dict[int, int] = {}
        for n in range(MAX_GRAM, MIN_GRAM - 1, -1):
            if len(self.tokens) < n:
                continue
            index = self._newest.get(tuple(self.tokens[-n:]), NONE)
            for _ in range(MAX_MATCHES):
                if index == NONE or len(found) == MAX_MATCHES:
                    break
                found.setdefault(index, n)
                index = self._previous[n][index]
        return list(found.items())

    def follow(self, matches: list[Match], token_id: int) -> list[Match]:
        """The matches that go on with `token_id`, moved past it; they then agree in one token more."""
        last = len(self.tokens) - 1
        return [
            (index + 1, min(agreed + 1, MAX_GRAM))
            for index, agreed in matches
            if index < last and self.tokens[index] == token_id
        ]

    def next_tokens(self, matches: list[Match], limit: int) -> list[tuple[int, float]]:
        """(token, probability) of the likeliest next tokens, best first; equals go to the newest and longest match.

        Each match votes with a weight that doubles with every token in which it agrees, and one vote of weight 1 goes
        to all other tokens: p = votes / (all votes + 1).
        """
        votes: dict[int, float] = {}
        for index, agreed in matches:
            token_id = self.tokens[index]
            votes[token_id] = votes.get(token_id, 0.0) + 2.0 ** (agreed - 3)
        total = sum(votes.values()) + 1.0
        best = sorted(votes.items(), key=lambda item: -item[1])[:limit]
        return [(token_id, weight / total) for token_id, weight in best]


class NgramProposer:
    """Proposes children for every node that lies on an earlier continuation of the sequence's last tokens."""

    source = Source.NGRAM

    def __init__(self) -> None:
        self._indexes: dict[int, NgramIndex] = {}
        self._matches: dict[int, dict[int, list[Match]]] = {}
        """By session, then by node of its growing tree."""

    def begin(self, sessions: list[Session]) -> None:
        self._matches = {}
        for session in sessions:
            index = self._indexes.setdefault(session.session_id, NgramIndex())
            index.truncate(session.unchanged)
            index.extend(session.tokens[len(index.tokens) :])
            self._matches[session.session_id] = {ROOT: index.matches()}

    def propose(self, wanted: list[tuple[GrowingTree, list[int]]]) -> list[Children]:
        return [self._children(tree, nodes) for tree, nodes in wanted]

    def release(self, session_id: int) -> None:
        self._indexes.pop(session_id, None)
        self._matches.pop(session_id, None)

    def _children(self, tree: GrowingTree, nodes: list[int]) -> Children:
        index = self._indexes[tree.session.session_id]
        matches = self._matches[tree.session.session_id]
        children = Children()
        for node in nodes:
            if node != ROOT:
                matches[node] = index.follow(matches.get(tree.parents[node], []), tree.token_ids[node])
            for rank, (token_id, prob) in enumerate(index.next_tokens(matches[node], tree.policy.max_children)):
                children.parents.append(node)
                children.token_ids.append(token_id)
                children.probs.append(prob)
                children.ranks.append(rank)
        return children
