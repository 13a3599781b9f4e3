"""What commands put on the terminal: progress on standard error, tables on standard output."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

LINE_CHARS = 88
"""Of text in a line, so that a label fits in front of it on a terminal of 100 columns."""


class Counted:
    """A progress bar over items of unequal duration, each named when it begins. A context manager."""

    def __init__(self, first: str) -> None:
        columns = (TextColumn("{task.description:<36}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task(first, total=None)
        self._begun = False

    def expect(self, total: int) -> None:
        """Set the number of items."""
        self._progress.update(self._task, total=total)

    def begin(self, what: str) -> None:
        """Begin the next item; the one before is done."""
        self._progress.update(self._task, advance=int(self._begun), description=what)
        self._begun = True

    def __enter__(self) -> Counted:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


class Narrator:
    """Prints several streams at once so that each can be read: a labelled line whenever one of them has filled it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._pending: dict[str, str] = {}
        self._lock = threading.Lock()

    def __call__(self, label: str, text: str) -> None:
        with self._lock:
            text = self._pending.get(label, "") + text
            while cut := line_end(text):
                line, text = text[:cut].rstrip(), text[cut:]
                if line:
                    self._console.print(f"[bold]{label:>8}[/] | {escape(line)}", highlight=False, soft_wrap=True)
            self._pending[label] = text


def line_end(text: str) -> int:
    """How many characters to print as one line; 0 while there is no whole line yet."""
    newline = text.find("\n", 0, LINE_CHARS + 1)
    if newline >= 0:
        return newline + 1
    if len(text) > LINE_CHARS:
        return text.rfind(" ", 0, LINE_CHARS) + 1 or LINE_CHARS
    return 0


FILE_WIDTH = 160
"""Columns of a table that goes to a file or a pipe."""


def show_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], names: int = 1) -> None:
    """Print a table. The first `names` columns are text, the others numbers."""
    table = Table(title=title)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index < names else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    console.print(table)


def number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"
