"""How records are separated and quoted in text: lines with a label at the end, and CSV tables."""

import csv
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from nonlocal_jax.data import DataError
from nonlocal_jax.files import AnyPath

DELIMITERS = (",", ";", "\t", "|", " ")
BLANKS = "\t\v\f\r "  # other blanks of Unicode, such as U+3000 and U+00A0, belong to a file name
SEPARATORS = ",;|" + BLANKS  # between a path and its label there may be several of them


class PathLine(NamedTuple):
    """A line `path label`, with everything that its path can mean.

    Attributes:
        quoted: The path without its quotes; None if it is not quoted.
        plain: Paths that the line can mean when quotes are part of the name, most likely first.
        label: The text of the label.
    """

    quoted: str | None
    plain: tuple[str, ...]
    label: str


class Table(NamedTuple):
    """A CSV table with a header.

    Attributes:
        columns: Names of the columns, in lower case.
        delimiter: Character between two fields.
        lines: Lines of the file.
        header: Index of the line of the header.
    """

    columns: tuple[str, ...]
    delimiter: str
    lines: Sequence[str]
    header: int


def read_lines(source: AnyPath) -> list[str]:
    """Reads the lines of a text file.

    Raises:
        DataError: The file cannot be read or is not UTF-8.
    """
    try:
        text = source.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source} must be a text file in UTF-8; byte {error.start:,} is not."
        ) from error
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror or error}.") from error
    # `splitlines` would also split at other line ends of Unicode, which file names may contain.
    line_end = "\n" if "\n" in text else "\r"
    lines = [line.removesuffix("\r") for line in text.removesuffix(line_end).split(line_end)]
    return lines if text else []


def is_blank(text: str) -> bool:
    """Whether there is nothing but separators, as in empty rows of a spreadsheet."""
    return not text.strip(SEPARATORS) or text.isspace()


def csv_fields(line: str, delimiter: str) -> list[str]:
    """Returns the fields of one line of CSV; none if a quote is not closed or has text after it."""
    try:
        reader = csv.reader([line], delimiter=delimiter, skipinitialspace=True, strict=True)
        return next(reader, [])
    except csv.Error:  # also raised for fields of more than 131,072 characters
        return []


def split_label(line: str) -> PathLine | None:
    """Splits the label from the end of a line; None if there is no separator.

    >>> split_label("riding a bike/x y.mp4,3").plain
    ('riding a bike/x y.mp4',)
    >>> split_label('"c,d.mp4";3')
    PathLine(quoted='c,d.mp4', plain=('"c,d.mp4"',), label='3')
    """
    text = line.rstrip(SEPARATORS).rstrip()
    start = 1 + max(map(text.rfind, SEPARATORS))
    unstripped = text[: max(start - 1, 0)]
    path = unstripped.rstrip(SEPARATORS)
    if not path.strip(BLANKS):
        return None
    # Existing files decide whether blanks or a comma beside the path belong to its name.
    plain = dict.fromkeys((path.strip(BLANKS), path, unstripped.strip(BLANKS), unstripped))
    return PathLine(_quoted_path(text.strip(BLANKS)), tuple(plain), text[start:].strip('"'))


def _quoted_path(text: str) -> str | None:
    if text.startswith('"'):
        for delimiter in DELIMITERS:
            fields = [field for field in csv_fields(text, delimiter) if not is_blank(field)]
            if len(fields) == 2:
                return fields[0]
    return None


def table_rows(source: AnyPath, table: Table) -> Iterator[tuple[int, list[str]]]:
    """Yields the rows of a table that are not blank, with the numbers of their first lines.

    Raises:
        DataError: The quotes are wrong, or a field is too long.
    """
    before = table.header + 1  # lines before the rows
    reader = csv.reader(
        table.lines[before:], delimiter=table.delimiter, skipinitialspace=True, strict=True
    )
    line = before + 1
    try:
        for fields in reader:
            if not all(map(is_blank, fields)):
                yield line, fields
            line = before + reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{source}: line {line} cannot be read as CSV: {error}. Close each quote, and double "
            "those inside quotes."
        ) from error


def unquoted_name(line: str) -> str:
    """Returns the name on a line of a file of names, without blanks and quotes around it."""
    text = line.strip()
    fields = csv_fields(text, ",") if text.startswith('"') else []
    return fields[0] if len(fields) == 1 else text
