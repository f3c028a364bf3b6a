"""What became of every entry of a file, and tables for those who read along."""

import dataclasses
import io
import math
import sys
from collections.abc import Iterable, Sequence


@dataclasses.dataclass(frozen=True)
class LoadedWeight:
    """What became of one entry of a file, or of one leaf of the network.

    Attributes:
        source: the entry of the file; "" for a leaf that stays as it was initialised.
        target: the leaf, a path of `variables`; "" for an entry that is not loaded.
        source_shape, shape: theirs and ours.
        transform: what was done to the array, or why nothing was.
    """

    source: str
    target: str
    source_shape: tuple[int, ...]
    shape: tuple[int, ...]
    transform: str


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What became of every entry of a file and every leaf of a network; `print` shows the table.

    Attributes:
        source: whose names the file has.
        weights: in the order of the file, the leaves that it does not have at the end.
    """

    source: str
    weights: tuple[LoadedWeight, ...]

    @property
    def summary(self) -> str:
        """How much was loaded, in one line."""
        loaded = [w for w in self.weights if w.source and w.target]
        left = [w for w in self.weights if not w.source]
        numbers = sum(math.prod(w.shape) for w in loaded)
        total = f"{len(loaded)} weights loaded by the names of {self.source}, {numbers:,} numbers"
        return total + (f"; {len(left)} left at their initialisation" if left else "")

    def __str__(self) -> str:
        lines = [
            f"{w.source or '–':<58} {dims(w.source_shape):<18} {w.target or '–':<52} {dims(w.shape):<18} {w.transform}"
            for w in self.weights
        ]
        return "\n".join([*lines, self.summary])


def dims(shape: Sequence[int]) -> str:
    """A shape as it is read aloud: 3×1×1×64×64; nothing for a number."""
    return "×".join(map(str, shape))


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]], wide: int = 170) -> str:
    """A table as text, as wide as the terminal, or as `wide` characters where there is none.

    Args:
        title: the line above it.
        header: of the columns; those that start with ">" are aligned to the right.
        rows: one text for each column.
        wide: characters of a line.

    Returns:
        The lines, without a newline at the end.
    """
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    out = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD)
    for name in header:
        out.add_column(
            name.removeprefix(">"),
            justify="right" if name.startswith(">") else "left",
            overflow="fold",
        )
    for row in rows:
        out.add_row(*map(escape, row))
    terminal = Console().width if sys.stdout.isatty() else wide
    text = io.StringIO()
    Console(file=text, width=terminal, color_system=None).print(out)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()).rstrip()
