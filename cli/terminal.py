"""What commands put on the terminal: progress on standard error, tables on standard output."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table


class Counted:
    """A bar over things that take unequally long, each named when it begins. A context manager."""

    def __init__(self, first: str) -> None:
        columns = (TextColumn("{task.description:<36}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task(first, total=None)
        self._begun = False

    def expect(self, total: int) -> None:
        """So many things are to come."""
        self._progress.update(self._task, total=total)

    def begin(self, what: str) -> None:
        """This is next; what was before is done."""
        self._progress.update(self._task, advance=int(self._begun), description=what)
        self._begun = True

    def __enter__(self) -> Counted:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], names: int = 1) -> Table:
    """The first `names` columns are text, the others numbers."""
    made = Table(title=title)
    for index, heading in enumerate(headings):
        made.add_column(heading, justify="left" if index < names else "right")
    for row in rows:
        made.add_row(*row)
    return made


def number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"
