"""Parsers of the formats of lists: each turns the rows of a file into records.

A parser raises `LineError` for a row that it cannot use. What holds for every format, such as that
files exist, is checked in `nonlocal_jax.data.annotations`.
"""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nonlocal_jax.data import DataError
from nonlocal_jax.data.lists.folders import Folders, LineError, normal_form
from nonlocal_jax.data.lists.records import Action, ListFormat, Record
from nonlocal_jax.data.lists.text import (
    BLANKS,
    DELIMITERS,
    Table,
    csv_fields,
    is_blank,
    split_label,
    table_rows,
)
from nonlocal_jax.files import AnyPath

# A column, or the first column, that only this format has.
KINETICS_COLUMN, CHARADES_COLUMN, FRAME_LIST_START = "youtube_id", "actions", "original_vido_id"
# Columns of tables of paths and labels.
PATH_COLUMNS = (
    *("path", "file", "filename", "file_name", "filepath", "file_path"),
    *("video", "video_path", "video_name", "video_file"),
)
LABEL_COLUMNS = ("label", "labels", "label_id", "class", "class_id", "class_index", "target")
CHARADES_CLASSES = 157
FRAME_LIST_HEADER = "original_vido_id video_id frame_id path labels"
WHOLE_NUMBER = re.compile(r"\s*(?P<digits>-?[0-9]{1,18})(\.0*)?\s*")
MAX_QUOTED = 60  # characters of a line that an error message shows

NumberedRow = tuple[int, Any]  # number of the line, and what the parser takes
Parser = Callable[[int, Any], Record]
Row = Mapping[str, str]  # text of a row of a table by column; columns that the row lacks are ""


class ParsedList(NamedTuple):
    """A list whose format is known and whose rows are not parsed yet.

    Attributes:
        format: The format.
        rows: Rows with their line numbers.
        parse: Parser of one row.
        names: Names of the classes, as far as they are known.
        num_classes: Number of classes that the format or the names imply; None if unknown.
    """

    format: ListFormat
    rows: Iterable[NumberedRow]
    parse: Parser
    names: tuple[str, ...]
    num_classes: int | None


def recognise(
    source: AnyPath, lines: Sequence[str], folders: Folders, names: tuple[str, ...]
) -> ParsedList:
    """Finds out the format of a list by its first line that is not blank.

    Args:
        source: The list, for error messages.
        lines: Its lines, at least one of them not blank.
        folders: Where its paths are looked up.
        names: Names of the classes, if a file with them was given.
    """
    table = _find_header(lines)
    if table is None or _has_only_paths_and_labels(table):
        # As lines, paths may contain the delimiter without being quoted.
        first = 0 if table is None else table.header + 1
        numbered = enumerate(lines[first:], start=first + 1)
        rows = [(number, line) for number, line in numbered if not is_blank(line)]
        parse: Parser = functools.partial(_path_and_label, folders)
        return ParsedList("paths", rows, parse, names, len(names) or None)
    if table.columns[0] == FRAME_LIST_START:
        parse = functools.partial(_frame_list_record, folders, table)
        return ParsedList("frames", _rows_by_video(source, table), parse, names, None)
    fields = table_rows(source, table)
    if KINETICS_COLUMN in table.columns:
        names = names or _class_names(source, table)
        numbers = {comparable_name(name): number for number, name in enumerate(names)}
        parse = _of_columns(table, functools.partial(_kinetics_record, folders, numbers))
        return ParsedList("kinetics", fields, parse, names, len(names))
    if CHARADES_COLUMN in table.columns:
        parse = _of_columns(table, functools.partial(_charades_record, folders))
        return ParsedList("charades", fields, parse, names, CHARADES_CLASSES)
    path_column, label_column = _path_columns(table.columns)
    parse = functools.partial(_path_and_label_columns, folders, path_column, label_column)
    return ParsedList("paths", fields, _of_columns(table, parse), names, len(names) or None)


def _find_header(lines: Sequence[str]) -> Table | None:
    """Returns the table that a list is, or None if its lines are paths with labels."""
    header = next(index for index, line in enumerate(lines) if not is_blank(line))
    path_line = split_label(lines[header])
    if path_line is not None and WHOLE_NUMBER.fullmatch(path_line.label):
        return None  # a path may contain the name of a column, but no header ends in a number
    for delimiter in DELIMITERS:
        columns = tuple(name.strip().lower() for name in csv_fields(lines[header], delimiter))
        if _is_header(columns):
            return Table(columns, delimiter, lines, header)
    return None


def _is_header(columns: tuple[str, ...]) -> bool:
    """Whether these are the columns of one of the tables that can be read."""
    is_kinetics = KINETICS_COLUMN in columns and not {"label", "time_start"}.isdisjoint(columns)
    is_charades = {"id", CHARADES_COLUMN} <= set(columns)
    is_frame_list = columns[:1] == (FRAME_LIST_START,)
    return is_kinetics or is_charades or is_frame_list or all(_path_columns(columns))


def _has_only_paths_and_labels(table: Table) -> bool:
    columns = table.columns
    return columns[:2] == _path_columns(columns) and not any(columns[2:])


def _path_columns(columns: Sequence[str]) -> tuple[str, str]:
    """Returns the first columns that can be the path and the label; "" where there is none."""
    path = next((name for name in columns if name in PATH_COLUMNS), "")
    return path, next((name for name in columns if name in LABEL_COLUMNS), "")


def _of_columns(table: Table, parse: Callable[[int, Row], Record]) -> Parser:
    """Returns a parser of the fields of a row."""

    def parse_fields(number: int, fields: Sequence[str]) -> Record:
        columns = table.columns
        if not all(map(is_blank, fields[len(columns) :])):
            raise LineError(
                f"the header has {len(columns)} columns, the line {len(fields)}; put fields that "
                f"contain {table.delimiter!r} in double quotes"
            )
        cells = [*fields, *[""] * (len(columns) - len(fields))]
        return parse(number, dict(zip(columns, cells, strict=False)))

    return parse_fields


def _path_and_label(folders: Folders, number: int, line: str) -> Record:
    split = split_label(line)
    if split is None:
        raise LineError(f"`path label` is expected; got {_quoted(line)}")
    label = _integer(split.label, "a label")
    if split.quoted is None:
        return Record(_only_file(folders, split.plain), (label,), number)
    return Record(_first_file(folders, (split.quoted, *split.plain)), (label,), number)


def _path_and_label_columns(
    folders: Folders, path_column: str, label_column: str, number: int, row: Row
) -> Record:
    label = _integer(row[label_column], "a label")
    path = row[path_column]
    names = tuple(dict.fromkeys((path, path.strip(BLANKS))))
    return Record(_first_file(folders, names), (label,), number)


def _first_file(folders: Folders, names: Sequence[str]) -> AnyPath:
    """Returns the file of the first path that exists, or of the first path."""
    files = _files(folders, names)
    first = next(files)
    return first if folders.has(first) else next(filter(folders.has, files), first)


def _only_file(folders: Folders, names: Sequence[str]) -> AnyPath:
    """Returns the file of the only path that exists, or of the first path."""
    files = list(dict.fromkeys(_files(folders, names)))
    if len(files) == 1:  # not looked for here, since that takes long in some file systems
        return files[0]
    existing = [file for file in files if folders.has(file)]
    if len(existing) > 1:
        raise LineError(
            f"the path can be {str(existing[0])!r} or {str(existing[1])!r}, and both exist; "
            "put it in double quotes"
        )
    return (existing or files)[0]


def _files(folders: Folders, names: Sequence[str]) -> Iterator[AnyPath]:
    """Yields the file of the first path, and those of the others that can be used."""
    yield folders.find(names[0])
    for name in names[1:]:
        with contextlib.suppress(LineError):
            yield folders.find(name)


def _kinetics_record(folders: Folders, numbers: Mapping[str, int], number: int, row: Row) -> Record:
    label, name = row.get("label", "").strip(), row[KINETICS_COLUMN].strip()
    if comparable_name(label) not in numbers:
        raise LineError(f"{_quoted(label)} is not one of the {len(numbers)} classes")
    if not name:
        raise LineError(f"the column `{KINETICS_COLUMN}` is empty")
    start, end = (_integer(row.get(key, ""), key) for key in ("time_start", "time_end"))
    # Copies of Kinetics differ in whether files lie in class folders and have times in their names.
    trimmed = f"{name}_{start:06d}_{end:06d}"
    class_folders = ("", f"{label}/", f"{label.replace(' ', '_')}/")
    stems = [f"{folder}{stem}" for folder in class_folders for stem in (trimmed, name)]
    return Record(folders.video(stems), (numbers[comparable_name(label)],), number)


def _class_names(source: AnyPath, table: Table) -> tuple[str, ...]:
    """Returns the sorted names of the classes in a list of Kinetics."""
    column = table.columns.index("label") if "label" in table.columns else len(table.columns)
    names: dict[str, str] = {}
    for _, fields in table_rows(source, table):
        if name := "".join(fields[column : column + 1]).strip():
            names.setdefault(comparable_name(name), name)
    if not names:
        raise DataError(
            f"{source} must have a column `label`; the official list of the test split has none."
        )
    return tuple(sorted(names.values()))


def _charades_record(folders: Folders, number: int, row: Row) -> Record:
    name = row.get("id", "").strip()
    if not name:
        raise LineError("the column `id` is empty")
    texts = [text for text in row[CHARADES_COLUMN].split(";") if text.strip()]
    actions = tuple(map(_action, texts))
    labels = tuple(sorted({action.label for action in actions}))
    return Record(folders.video([name]), labels, number, actions)


def _action(text: str) -> Action:
    parts = text.split()
    if len(parts) != 3 or not re.fullmatch(r"c\d{3}", parts[0], re.ASCII):
        raise LineError(f"an action must look like `c092 11.10 21.50`; got {_quoted(text)}")
    start, end = map(_seconds, parts[1:])
    if end < start:
        raise LineError(f"an action must not end before it starts; got {_quoted(text)}")
    return Action(int(parts[0][1:]), start, end)


def _rows_by_video(
    source: AnyPath, table: Table
) -> Iterator[tuple[int, list[tuple[int, list[str]]]]]:
    """Groups the rows of a frame list by video; those of one video need not be consecutive."""
    videos: dict[str, list[tuple[int, list[str]]]] = {}
    for number, fields in table_rows(source, table):
        videos.setdefault(fields[0], []).append((number, fields))
    for rows in videos.values():
        yield rows[0][0], rows


def _frame_list_record(
    folders: Folders, table: Table, first_line: int, rows: Sequence[tuple[int, list[str]]]
) -> Record:
    frames, frame_labels = [], []
    for number, fields in rows:
        while len(fields) > 5 and not fields[-1].strip():  # separators at the end of the line
            fields = fields[:-1]
        if len(fields) != 5:
            text = table.delimiter.join(fields)
            raise LineError(
                f"(line {number}) `{FRAME_LIST_HEADER}` is expected; got {_quoted(text)}"
            )
        frames.append(folders.find(fields[3]))
        labels = fields[4].replace('"', "")
        numbers = [_integer(label, "a label") for label in labels.split(",")] if labels else []
        frame_labels.append(tuple(numbers))
    video_name = rows[0][1][0]
    return Record(
        Path(video_name),
        tuple(sorted(set().union(*frame_labels))),
        first_line,
        frames=tuple(frames),
        frame_labels=tuple(frame_labels),
    )


def comparable_name(name: str) -> str:
    """Returns the name of a class with spaces, as in the releases; folders may have underscores."""
    return normal_form(name.strip().replace("_", " "))


def _integer(text: str, name: str) -> int:
    match = WHOLE_NUMBER.fullmatch(text)
    if match is None:
        raise LineError(f"{name} must be a whole number; got {_quoted(text)}")
    return int(match["digits"])


def _seconds(text: str) -> float:
    try:
        value = math.nan if "_" in text else float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise LineError(f"times must be non-negative seconds; got {_quoted(text)}")
    return value


def _quoted(text: str) -> str:
    return repr(text if len(text) <= MAX_QUOTED else text[: MAX_QUOTED - 3] + "...")
