"""Finds tool calls in an answer's text as it streams. However the text is split, the calls are the same."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any, NamedTuple, Protocol


class CallPiece(NamedTuple):
    """A piece of one call. Only the first piece has the function's name."""

    number: int
    name: str | None
    arguments: str


class Found(NamedTuple):
    """What a piece of text contains: plain content, and pieces of calls in order."""

    pieces: list[str]
    calls: list[CallPiece]

    @property
    def content(self) -> str:
        return "".join(self.pieces)


class Finder(Protocol):
    """Splits one answer. `feed` takes each piece of its text, `finish` says that it has ended."""

    def feed(self, text: str) -> Found: ...

    def finish(self) -> Found: ...


class Spelling(NamedTuple):
    """How a model spells calls: JSON between two marks. `bare`: an answer may start with unmarked JSON."""

    opening: str
    closing: str = ""
    bare: bool = False


SPELLINGS = {
    "hermes": Spelling("<tool_call>", "</tool_call>"),
    "mistral": Spelling("[TOOL_CALLS]"),
    "llama3": Spelling("<|python_tag|>", bare=True),
}
SEPARATORS = " \t\r\n;"
"""What may stand between two bare calls."""


class PlainText:
    """An answer without calls."""

    def feed(self, text: str) -> Found:
        return Found([text], [])

    def finish(self) -> Found:
        return Found([], [])


class FreeCalls:
    """Calls in a model's own spelling. Each comes out whole, so that a malformed one, or one that names no function of
    `names`, stays plain content. White space around a call is dropped."""

    def __init__(self, spelling: Spelling, names: Collection[str], parallel: bool = True) -> None:
        """`parallel`: whether more than the first call counts."""
        self._spelling, self._names, self._parallel = spelling, names, parallel
        self._held = ""  # not yet decided upon
        self._lead = ""  # of a call that has begun: what precedes its JSON
        self._end: _JsonEnd | None = None  # of that JSON, which `_held` begins with
        self._starts = True  # no content since the beginning, or since the last call
        self._calls = 0

    def feed(self, text: str) -> Found:
        self._held += text
        found = Found([], [])
        while self._begins(found) if self._end is None else self._ends(found, self._end):
            pass
        return found

    def finish(self) -> Found:
        found, end = Found([], []), self._end.found if self._end else None
        unclosed = end is not None and self._spelling.closing.startswith(self._held[end:].strip())
        if unclosed and self._take(self._held[:end], found):
            return found
        self._release(self._lead + self._held, found)
        return found

    def _begins(self, found: Found) -> bool:
        """Look for a call, and release all text outside of one. Whether one begins."""
        held, mark = self._held, self._spelling.opening
        at = held.find(mark)
        space = len(held) - len(held.lstrip(SEPARATORS if self._calls else None))
        if self._spelling.bare and self._starts and held.startswith("{", space):
            lead, body = 0, space
        elif at >= 0:
            lead, body = len(held[:at].rstrip()), at + len(mark)
        elif self._spelling.bare and self._starts and space == len(held):
            return False
        else:
            lead = len(held[: len(held) - _overlap(held, mark)].rstrip())
            self._release(held[:lead], found)
            self._held = held[lead:]
            return False
        self._release(held[:lead], found)
        self._lead, self._held, self._end = held[lead:body], held[body:], _JsonEnd()
        return True

    def _ends(self, found: Found, scan: _JsonEnd) -> bool:
        """Continue the call that has begun. Whether it has ended, or proved malformed."""
        closing, held = self._spelling.closing, self._held
        if not scan.broken and (end := scan.look(held)) is not None:
            rest = held[end:].lstrip() if closing else held[end:]
            if rest != closing and closing.startswith(rest):
                return False
            if rest.startswith(closing) and self._take(held[:end], found):
                self._held = rest.removeprefix(closing)
                return True
        elif not scan.broken:
            return False
        self._release(self._lead, found)
        self._lead, self._end, self._starts = "", None, False
        return True

    def _take(self, text: str, found: Found) -> bool:
        """Whether `text` is a call, or a list of calls, which `found` then gets."""
        calls = _parsed(text, self._names)
        pieces = [CallPiece(self._calls + place, *call) for place, call in enumerate(calls)]
        found.calls.extend(piece for piece in pieces if self._parallel or piece.number == 0)
        self._calls += len(calls)
        if calls:
            self._lead, self._held, self._end, self._starts = "", "", None, True
        return bool(calls)

    def _release(self, text: str, found: Found) -> None:
        """`text` is content."""
        if self._starts and self._calls:
            text = text.lstrip()
        if text:
            self._starts = False
            found.pieces.append(text)


class BoundCalls:
    """Calls that a grammar binds to `HEAD`, arguments and "}", one a line. They are streamed as they arrive. Text that
    does not begin with a call is plain content, and so is the head of a truncated call."""

    HEAD = re.compile(r'(?:}\n)?{"name": "([^"]+)", "arguments": ')

    def __init__(self) -> None:
        self._held, self._calls = "", 0
        self._end: _JsonEnd | None = None  # of the arguments that `_held` begins with
        self._is_plain = False

    def feed(self, text: str) -> Found:
        self._held += text
        found = Found([], [])
        self._is_plain |= not self._calls and not self._held.startswith("{"[: len(self._held)])
        if self._is_plain:
            return self.finish()
        while self._held and self._advance(found):
            pass
        return found

    def finish(self) -> Found:
        rest, self._held = self._held, ""
        return Found([] if self._calls and rest == "}" else [rest], [])

    def _advance(self, found: Found) -> bool:
        """Whether something was decided."""
        if self._end is None:
            head = self.HEAD.match(self._held)
            if head is None:
                return False
            found.calls.append(CallPiece(self._calls, head[1], ""))
            self._held, self._end, self._calls = self._held[head.end() :], _JsonEnd(), self._calls + 1
            return True
        end = self._end.look(self._held)
        piece, self._held = self._held[:end], self._held[len(self._held) if end is None else end :]
        found.calls.append(CallPiece(self._calls - 1, None, piece))
        if end is None:
            self._end.at = 0
        else:
            self._end = None
        return True


class _JsonEnd:
    """Finds the end of the JSON object or array that a text begins with. Reads each character once.

    Attributes:
        at: where to go on in the text.
        found: index after the end, once it is reached.
        broken: the text so far cannot be JSON.
    """

    def __init__(self) -> None:
        self.at, self.broken = 0, False
        self.found: int | None = None
        self._depth, self._in_string, self._escaped = 0, False, False

    def look(self, text: str) -> int | None:
        """`found`, after reading all of `text` that was not read before."""
        while self.found is None and not self.broken and self.at < len(text):
            self._read(text[self.at])
            self.at += 1
        return self.found

    def _read(self, character: str) -> None:
        if self._in_string:
            self._in_string = self._escaped or character != '"'
            self._escaped = not self._escaped and character == "\\"
        elif character in "{[":
            self._depth += 1
        elif character.isspace():
            pass
        elif not self._depth or not (character.isalnum() or character in '"]},:.+-'):
            self.broken = True
        elif character == '"':
            self._in_string = True
        elif character in "]}":
            self._depth -= 1
            self.found = None if self._depth else self.at + 1


def _parsed(text: str, names: Collection[str]) -> list[tuple[str, str]]:
    """Name and arguments, as JSON, of each call in `text`; nothing if any of them is malformed."""
    try:
        value = json.loads(text)
        calls = [(call["name"], call.get("arguments", call.get("parameters"))) for call in _listed(value)]
        wrong = not all(name in names and isinstance(arguments, dict) for name, arguments in calls)
        return [] if wrong else [(name, json.dumps(a, ensure_ascii=False, allow_nan=False)) for name, a in calls]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return []


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _overlap(text: str, mark: str) -> int:
    """Length of the longest suffix of `text` that is a prefix of `mark`."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)
