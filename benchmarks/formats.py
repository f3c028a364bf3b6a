"""Formats numbers, and the tables of the report."""

import math
from collections.abc import Sequence

from benchmarks.records import Record
from benchmarks.targets import RESOLUTION, Target, seconds, temporary


def table(head: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int) -> str:
    """Returns a Markdown table whose first columns are aligned left and the others right."""
    marks = ["---" if column < text_columns else "--:" for column in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, marks, *rows))


def number(value: float | None, factor: float = 1.0) -> str:
    """Formats three digits without an exponent, and None as a dash."""
    if value is None:
        return "–"
    value = float(f"{value * factor:.3g}")
    decimals = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{min(max(decimals, 0), 3)}f}"


def milliseconds(record: Record) -> str:
    """Formats the median time."""
    return number(seconds(record), 1e3)


def megabytes(record: Record) -> str:
    """Formats the temporary memory, no finer than it is measured."""
    measured = temporary(record)
    return "< 0.1" if measured is not None and measured <= RESOLUTION else number(measured, 1e-6)


def target_cells(target: Target) -> list[str]:
    """Returns the cells of a target in its table: claim, measured, aim, met."""
    met = {True: "yes", False: "no", None: "not measured"}[target.met]
    measured = "–" if target.measured is None else f"{number(target.measured)}{target.unit}"
    return [
        target.claim,
        measured,
        f"{'≥' if target.is_minimum else '≤'} {target.bound:g}{target.unit}",
        met,
    ]
