"""The load report: what happened to every entry of a file and every leaf of a network."""

import dataclasses
import io
import math
import sys
from collections.abc import Iterable, Sequence

from nonlocal_jax.terminal import printable


@dataclasses.dataclass(frozen=True)
class LoadedWeight:
    """What happened to one entry of a file, or to one leaf of the network.

    Attributes:
        source: The entry of the file; "" for a leaf that keeps its initial value.
        target: The leaf, a path in the variables; "" for an entry that is not loaded.
        source_shape: Shape of the array in the file.
        shape: Shape of the leaf.
        transform: What was done to the array, or why it is not loaded.
    """

    source: str
    target: str
    source_shape: tuple[int, ...]
    shape: tuple[int, ...]
    transform: str


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What happened to every entry of a file and every leaf of a network.

    `print` shows it as a table.

    Attributes:
        source: The source whose names the file has.
        weights: One row for each entry in the order of the file, then one for each leaf that the
            file does not have.
    """

    source: str
    weights: tuple[LoadedWeight, ...]

    @property
    def summary(self) -> str:
        """One-line summary of what was loaded."""
        loaded = [weight for weight in self.weights if weight.source and weight.target]
        initial = [weight for weight in self.weights if not weight.source]
        numbers = sum(math.prod(weight.shape) for weight in loaded)
        total = f"{len(loaded)} weights loaded by the names of {self.source}, {numbers:,} numbers"
        return total + (f"; {len(initial)} keep their initial value" if initial else "")

    def __str__(self) -> str:
        return "\n".join([*map(_line, self.weights), self.summary])


def _line(weight: LoadedWeight) -> str:
    source = f"{printable(weight.source) or '–':<58} {dims(weight.source_shape):<18}"
    target = f"{printable(weight.target) or '–':<52} {dims(weight.shape):<18}"
    return f"{source} {target} {weight.transform}"


def dims(shape: Sequence[int]) -> str:
    """Formats a shape as 3×1×1×64×64; the shape of a number is empty."""
    return "×".join(map(str, shape))


def table(
    title: str, header: Sequence[str], rows: Iterable[Sequence[str]], width: int = 170
) -> str:
    """Formats a table as text, as wide as the terminal if there is one.

    Control characters are escaped, and markup of rich is not interpreted.

    Args:
        title: The line above the table.
        header: Titles of the columns. A column whose title starts with ">" is aligned to the right.
        rows: One text for each column.
        width: Characters of a line where there is no terminal.

    Returns:
        The lines, without a newline at the end.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=Text(printable(title)), title_justify="left", box=box.SIMPLE_HEAD)
    for column in header:
        is_right = column.startswith(">")
        name = column.removeprefix(">")
        grid.add_column(name, justify="right" if is_right else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(printable(cell)) for cell in row))
    columns = Console().width if sys.stdout.isatty() else width
    text = io.StringIO()
    Console(file=text, width=columns, color_system=None).print(grid)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()).rstrip()
