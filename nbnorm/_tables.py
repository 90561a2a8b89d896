"""Tables and progress on the terminal: drawn by rich where it is installed, else in plain text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count


@dataclass
class Table:
    """Rows of text under headers: first columns of words, to the left, then columns of numbers, to the right."""

    title: str
    headers: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    caption: str = ""
    words: int = 1

    def show(self) -> None:
        """Print the table."""
        try:
            self._draw()
        except ImportError:
            print(self.plain())

    def plain(self) -> str:
        """Lay the table out in plain text."""
        lines = [self.headers, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.headers))]
        text = [self.title, ""] if self.title else []
        text += ["  ".join(map(self._align, line, widths, count())).rstrip() for line in lines]
        if any(self.headers):
            text.insert(len(text) - len(self.rows), "  ".join("-" * width for width in widths))
        else:
            text.pop(len(text) - len(self.rows) - 1)
        return "\n".join([*text, *(["", self.caption] if self.caption else [])])

    def _align(self, cell: str, width: int, column: int) -> str:
        return cell.ljust(width) if column < self.words else cell.rjust(width)

    def _draw(self) -> None:
        from rich import box
        from rich.console import Console
        from rich.table import Table as RichTable

        table = RichTable(
            title=self.title, title_justify="left", show_header=any(self.headers), box=box.SIMPLE_HEAD
        )
        for i, header in enumerate(self.headers):
            table.add_column(header, justify="left" if i < self.words else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        console = Console(highlight=False)
        console.print(table)
        if self.caption:
            console.print(self.caption, soft_wrap=True)


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str], object]]:
    """Give a function that shows what is going on now, on stderr: where nobody looks it says nothing."""
    if quiet or not sys.stderr.isatty():
        yield lambda text: None
        return
    try:
        from rich.console import Console
    except ImportError:
        yield lambda text: print(text, "...", file=sys.stderr, flush=True)
        return
    with Console(stderr=True).status("") as status:
        yield lambda text: status.update(f"{text} ...")


def columns(rows: Sequence[tuple[str, object]], title: str) -> Table:
    """Return a table of names and values."""
    return Table(title, ("", ""), [(name, str(value)) for name, value in rows], words=2)
