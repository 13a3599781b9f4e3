"""Whose turn it is: start-time fair queueing (Goyal, Vin and Cheng, 1996) over clients, in tokens."""

from __future__ import annotations


class FairShares:
    """Every client's turn as a number of tokens; the client with the least comes next.

    A client's turn moves on by the tokens that its requests may take, divided by its weight, and back by those that
    they did not take. Who comes new, or after a while, starts at the present turn: nobody saves up, and nobody pays
    for what it took while nobody else wanted it.

    Example: A and B, of weights 1 and 2, always want requests of 10 tokens. Their turns are A 0, B 0; A starts
    (A 10), B (5), B (10), A (20), B (15), B (20): B gets twice as many.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._turns: dict[str, float] = {}

    def turn(self, client: str) -> float:
        """When it is this client's turn."""
        return max(self._now, self._turns.get(client, 0.0))

    def start(self, client: str, tokens: int, weight: float, earliest: float) -> None:
        """A request of the client starts. `earliest`: the least turn of all who wait, this one included."""
        turn = self.turn(client)
        self._now = max(self._now, earliest)
        self._turns[client] = turn + tokens / weight
        self._turns = {name: turn for name, turn in self._turns.items() if turn > self._now}

    def give_back(self, client: str, tokens: int, weight: float) -> None:
        """A request has ended without these tokens."""
        if client in self._turns:
            self._turns[client] -= tokens / weight
