"""Start-time fair queueing (Goyal, Vin and Cheng, 1996) over clients, in tokens."""

from __future__ import annotations


class FairShares:
    """Each client's turn, a virtual time in tokens; the client with the lowest turn is next.

    A request advances its client's turn by the most tokens that it may use, divided by the client's weight; tokens
    that it did not use are given back. A new or returning client starts at the current turn: idle time earns no
    credit, and tokens used while nobody waited cost nothing.

    Example: A and B, of weights 1 and 2, keep requests of 10 tokens queued. Both turns are 0; A starts a request
    (its turn is now 10), then B (5), B (10), A (20), B (15), B (20): B gets twice as many.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._turns: dict[str, float] = {}

    def turn(self, client: str) -> float:
        """The client's turn, in tokens."""
        return max(self._now, self._turns.get(client, 0.0))

    def start(self, client: str, tokens: int, weight: float, earliest: float) -> None:
        """Charge the client for a starting request. `earliest`: the lowest turn of all waiting clients, its own too."""
        turn = self.turn(client)
        self._now = max(self._now, earliest)
        self._turns[client] = turn + tokens / weight
        self._turns = {name: turn for name, turn in self._turns.items() if turn > self._now}

    def give_back(self, client: str, tokens: int, weight: float) -> None:
        """Refund the tokens that an ended request did not use."""
        if client in self._turns:
            self._turns[client] -= tokens / weight
