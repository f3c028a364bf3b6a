"""Parsers of the formats of lists: each turns the rows of a file into records.

A parser raises `LineError` for a row that it cannot use. What holds for every format, such as that
files exist, is checked in `nonlocal_jax.data.annotations`.
"""

import csv
import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nonlocal_jax.data import DataError
from nonlocal_jax.data.lists.records import Action, ListFormat, Record
from nonlocal_jax.files import AnyPath, as_path
from nonlocal_jax.remote_paths import WITHOUT_FOLDERS, RemotePath

# A column, or the first word of the header, that only this format has.
KINETICS_COLUMN, CHARADES_COLUMN, FRAME_LIST_START = "youtube_id", "actions", "original_vido_id"
CHARADES_CLASSES = 157
FRAME_LIST_HEADER = "original_vido_id video_id frame_id path labels"
MAX_QUOTED = 60  # characters of a line that an error message shows

NumberedRow = tuple[int, Any]  # number of the line, and what the parser takes
Parser = Callable[[int, Any], Record]


class LineError(Exception):
    """A line of a list cannot be used.

    Attributes:
        can_be_left_out: Whether the option `leave_out` may skip the line.
    """

    def __init__(self, message: str, *, can_be_left_out: bool = False) -> None:
        super().__init__(message)
        self.can_be_left_out = can_be_left_out


@dataclasses.dataclass(frozen=True)
class Folders:
    """Where the paths of a list are looked up.

    Attributes:
        list_folder: Folder of the list, which paths are relative to unless there is a root.
        root: Folder that paths are relative to and must lie in; None allows any place.
        listings: Names of the entries of each remote folder that was listed so far.
    """

    list_folder: AnyPath
    root: AnyPath | None
    listings: dict[RemotePath, frozenset[str]] = dataclasses.field(default_factory=dict)

    def file(self, name: str) -> AnyPath:
        """Returns the file that a path in the list names.

        Raises:
            LineError: The name cannot be a path, or lies outside the root.
        """
        if "\0" in name or not name:
            raise LineError(f"{name!r} is not a path")
        folder = self.root or self.list_folder
        if "://" in name or Path(name).is_absolute():
            try:
                file = plain_path(as_path(name))
            except (ValueError, ImportError) as error:
                raise LineError(str(error).removesuffix(".")) from error
        else:
            file = plain_path(folder / name)
        if self.root is not None and not lies_in(file, self.root):
            raise LineError(f"{name} lies outside the root {self.root}")
        return file

    def has(self, file: AnyPath) -> bool:
        """Whether a file exists. A name that is too long, or a closed folder, is not an error.

        A remote folder is listed once, since a list of Kinetics has 240,000 files.
        """
        if isinstance(file, Path):
            return is_file(file)
        if file.protocol in WITHOUT_FOLDERS:
            return file.is_file()
        folder = file.parent
        if folder not in self.listings:
            try:
                self.listings[folder] = frozenset(entry.name for entry in folder.iterdir())
            except FileNotFoundError:
                self.listings[folder] = frozenset()
        return file.name in self.listings[folder]


def lies_in(file: AnyPath, folder: AnyPath) -> bool:
    """Whether a file is in a folder; a local one is never in a remote one."""
    if isinstance(file, RemotePath):
        return isinstance(folder, RemotePath) and file.is_relative_to(folder)
    return isinstance(folder, Path) and file.is_relative_to(folder)


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
    """Finds out the format of a list by its first line.

    Args:
        source: The list, for error messages.
        lines: Its lines, at least one.
        folders: Where its paths are looked up.
        names: Names of the classes, if a file with them was given.
    """
    first = lines[0]
    # The csv module raises an error for longer fields, and no header is that long.
    header = next(csv.reader([first]), []) if len(first) < csv.field_size_limit() else []
    if first.startswith(FRAME_LIST_START):
        parse: Parser = functools.partial(_frame_list_record, folders)
        return ParsedList("frames", _rows_by_video(lines), parse, names, None)
    if KINETICS_COLUMN in header:
        names = names or _class_names(source, lines)
        numbers = {comparable_name(name): number for number, name in enumerate(names)}
        parse = functools.partial(_kinetics_record, folders, numbers)
        return ParsedList("kinetics", _csv_rows(source, lines), parse, names, len(names))
    if CHARADES_COLUMN in header:
        parse = functools.partial(_charades_record, folders)
        rows = _csv_rows(source, lines)
        return ParsedList("charades", rows, parse, names, CHARADES_CLASSES)
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    parse = functools.partial(_path_and_label, folders)
    return ParsedList("paths", numbered, parse, names, len(names) or None)


def _path_and_label(folders: Folders, number: int, line: str) -> Record:
    parts = line.strip().rsplit(None, 1)
    if len(parts) != 2:
        parts = line.strip().rsplit(",", 1)
    if len(parts) != 2:
        raise LineError(f"`path label` is expected; got {_quoted(line)}")
    file = folders.file(parts[0].strip().rstrip(","))
    return Record(file, (_integer(parts[1], "a label"),), number)


def _kinetics_record(
    folders: Folders, numbers: Mapping[str, int], number: int, row: Mapping[str, str | None]
) -> Record:
    label, name = row.get("label") or "", row.get("youtube_id") or ""
    if comparable_name(label) not in numbers:
        raise LineError(f"{label!r} is not one of the {len(numbers)} classes")
    start, end = (_integer(row.get(key) or "", key) for key in ("time_start", "time_end"))
    # Copies of Kinetics differ in whether files lie in class folders and have times in their names.
    trimmed = f"{name}_{start:06d}_{end:06d}"
    class_folders = ("", f"{label}/", f"{label.replace(' ', '_')}/")
    candidates = [f"{folder}{stem}.mp4" for folder in class_folders for stem in (trimmed, name)]
    files = [folders.file(candidate) for candidate in candidates]
    existing = [file for file in files if folders.has(file)]
    return Record((existing or files)[0], (numbers[comparable_name(label)],), number)


def _class_names(source: AnyPath, lines: Sequence[str]) -> tuple[str, ...]:
    """Returns the sorted names of the classes in a list of Kinetics."""
    names = {row.get("label") or "" for _, row in _csv_rows(source, lines)} - {""}
    if not names:
        raise DataError(
            f"{source} must have a column `label`; the official list of the test split has none."
        )
    return tuple(sorted(names))


def _charades_record(folders: Folders, number: int, row: Mapping[str, str | None]) -> Record:
    name = (row.get("id") or "").strip()
    if not name:
        raise LineError("the column `id` is empty")
    texts = [text for text in (row.get("actions") or "").split(";") if text.strip()]
    actions = tuple(map(_action, texts))
    labels = tuple(sorted({action.label for action in actions}))
    return Record(folders.file(f"{name}.mp4"), labels, number, actions)


def _action(text: str) -> Action:
    parts = text.split()
    if len(parts) != 3 or not re.fullmatch(r"c\d{3}", parts[0]):
        raise LineError(f"an action must look like `c092 11.10 21.50`; got {_quoted(text)}")
    start, end = map(_seconds, parts[1:])
    if end < start:
        raise LineError(f"an action must not end before it starts; got {_quoted(text)}")
    return Action(int(parts[0][1:]), start, end)


def _rows_by_video(lines: Sequence[str]) -> Iterator[tuple[int, list[tuple[int, str]]]]:
    """Groups the lines of a frame list by video; those of one video need not be consecutive."""
    videos: dict[str, list[tuple[int, str]]] = {}
    for number, line in enumerate(lines[1:], start=2):
        if line.strip():
            videos.setdefault(line.split()[0], []).append((number, line))
    for rows in videos.values():
        yield rows[0][0], rows


def _frame_list_record(
    folders: Folders, first_line: int, rows: Sequence[tuple[int, str]]
) -> Record:
    frames, frame_labels = [], []
    for number, line in rows:
        parts = line.split()
        if len(parts) != 5:
            raise LineError(
                f"(line {number}) `{FRAME_LIST_HEADER}` is expected; got {_quoted(line)}"
            )
        frames.append(folders.file(parts[3]))
        labels = parts[4].replace('"', "")
        numbers = [_integer(label, "a label") for label in labels.split(",")] if labels else []
        frame_labels.append(tuple(numbers))
    video_name = rows[0][1].split()[0]
    return Record(
        Path(video_name),
        tuple(sorted(set().union(*frame_labels))),
        first_line,
        frames=tuple(frames),
        frame_labels=tuple(frame_labels),
    )


def _csv_rows(source: AnyPath, lines: Sequence[str]) -> Iterator[tuple[int, dict[str, str | None]]]:
    reader = csv.DictReader(lines)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        line = reader.line_num + 1
        raise DataError(f"{source}: line {line} cannot be read as CSV: {error}.") from error


def read_lines(source: AnyPath) -> list[str]:
    """Reads the lines of a text file.

    Raises:
        DataError: The file cannot be read or is not UTF-8.
    """
    try:
        text = source.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source} must be a text file in UTF-8; byte {error.start:,} is not."
        ) from error
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror or error}.") from error
    # `splitlines` would also split at other line ends of Unicode, which file names may contain.
    return text.removesuffix("\n").split("\n") if text else []


def plain_path(path: AnyPath) -> AnyPath:
    """Makes a path absolute and removes `..`. Links are kept, since data sets are often links."""
    if isinstance(path, RemotePath):
        return path
    return Path(os.path.normpath(path.absolute()))


def is_file(path: Path) -> bool:
    """Whether a file exists. A name that is too long, or a closed folder, is no error."""
    try:
        return path.is_file()
    except OSError:
        return False


def comparable_name(name: str) -> str:
    """Returns the name of a class with spaces, as in the releases; folders may have underscores."""
    return name.strip().replace("_", " ")


def _integer(text: str, name: str) -> int:
    if not re.fullmatch(r"\s*-?[0-9]{1,18}\s*", text):
        raise LineError(f"{name} must be a whole number; got {_quoted(text)}")
    return int(text)


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
