"""What goes to the drafter once per step, and what the drafter holds of each request."""

from __future__ import annotations

from treeline.drafting import DraftLink, DraftReply, DraftRequest, DraftSequence
from treeline.plan import Plan
from verifier_svc.engine.sequence import Sequence
from verifier_svc.speculation.hidden_states import HiddenStates


class Exchange:
    """Sends each request's new tokens and features, and the ids of ended requests; reads what the drafter holds.

    Attributes:
        hidden_states: the features that a draft head reads.
    """

    def __init__(self, link: DraftLink | None, hidden_states: HiddenStates, timeout_s: float) -> None:
        """
        Args:
            link: None never drafts.
            timeout_s: longest wait for an answer.
        """
        self.hidden_states = hidden_states
        self._link = link
        self._timeout_s = timeout_s
        self._told: set[int] = set()  # sessions that the drafter may hold; uncertain after a late answer
        self._unreleased: list[int] = []
        self._step_id = 0

    @property
    def connected(self) -> bool:
        return self._link is not None and self._link.connected

    @property
    def ready(self) -> bool:
        return self._link is not None and self._link.ready

    @property
    def owes_release(self) -> bool:
        """Whether the drafter can be told now of requests that have ended."""
        return bool(self._unreleased) and self.ready

    def follow_drafter(self) -> None:
        """Take a late answer; from the next pass on, keep the features that the present drafter reads."""
        if self._link is not None:
            self._link.refresh()
        self.hidden_states.follow(self._link.features if self._link else None)

    def draft(
        self,
        sequences: list[Sequence],
        limits: list[tuple[int, int]],
        weights: list[float],
        plan: Plan,
        wait_s: float,
    ) -> DraftReply | None:
        """One tree for each of `sequences`, or None if there is no answer in time.

        Args:
            limits: (most nodes, deepest layer) of each tree.
            weights: value of each request's tokens.
        """
        features = self.hidden_states.unsent(sequences)
        messages = []
        for sequence, (max_nodes, max_depth), weight, unsent in zip(sequences, limits, weights, features, strict=True):
            start = min(sequence.drafter_tokens, len(sequence.token_ids) - 1)
            self._told.add(sequence.session_id)
            messages.append(
                DraftSequence(
                    session_id=sequence.session_id,
                    start=start,
                    token_ids=sequence.token_ids[start:],
                    sampling=sequence.request.sampling,
                    policy=sequence.policy.spec,
                    max_nodes=max_nodes,
                    max_depth=max_depth,
                    weight=weight,
                    features=unsent,
                    prompt_tokens=sequence.prompt_tokens,
                )
            )
        reply = self._send(messages, plan, min(self._timeout_s, wait_s))
        if reply is not None:
            for sequence, unsent in zip(sequences, features, strict=True):
                held = reply.held.get(sequence.session_id)
                sequence.drafter_tokens = len(sequence.token_ids) if held is None else held
                if held is not None:
                    self.hidden_states.lost(sequence)
                elif len(unsent):
                    self.hidden_states.sent(sequence)
        return reply

    def release(self, plan: Plan) -> None:
        """Tell the drafter which requests have ended, in a step that drafts nothing."""
        if self.owes_release:
            self._send([], plan, self._timeout_s)

    def forget(self, sequence: Sequence) -> None:
        """The request has ended: its session is to be released."""
        self.hidden_states.forget(sequence)
        if sequence.session_id in self._told:
            self._told.remove(sequence.session_id)
            self._unreleased.append(sequence.session_id)

    def _send(self, sequences: list[DraftSequence], plan: Plan, wait_s: float) -> DraftReply | None:
        assert self._link is not None
        self._step_id += 1
        # Sent once: a late message still arrives, and a broken stream takes its sessions with it.
        released, self._unreleased = self._unreleased, []
        return self._link.draft(DraftRequest(self._step_id, plan, sequences, released), wait_s)
