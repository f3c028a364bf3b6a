"""Lists of videos and what is in them: Kinetics, Charades, and the frame lists of PySlowFast.

Four kinds are told apart by their first line, and folders by being one:

    path label                                      a video a line, as video-nonlocal-net and PySlowFast; a comma is taken too
    label,youtube_id,time_start,time_end,split      the CSV of the official Kinetics release
    id,...,actions,length                           the CSV of Charades, `c092 11.10 21.50;c147 23.10 31.50` (class, start, end)
    original_vido_id video_id frame_id path labels  a frame a line, as PySlowFast has Charades
    FOLDER/class name/video.mp4                     class-name folders

Every line is checked, and what is wrong is said with its number, before anything is decoded.
"""

import csv
import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nonlocal_jax.data import DataError

SUFFIXES = (
    ".mp4",
    ".mkv",
    ".webm",
    ".avi",
    ".mov",
    ".m4v",
    ".mpg",
    ".mpeg",
    ".ts",
    ".flv",
    ".wmv",
    ".3gp",
    ".ogv",
)
SHOWN = 10  # problems in an error
KINETICS, CHARADES, FRAME_LIST = (
    "youtube_id",
    "actions",
    "original_vido_id",
)  # what tells the kinds apart
CHARADES_CLASSES = 157
Kind = Literal["paths", "kinetics", "charades", "frames", "folder"]


class Action(NamedTuple):
    """What happens in a video, and when.

    Attributes:
        label: class.
        start, end: seconds.
    """

    label: int
    start: float
    end: float


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One video.

    Attributes:
        path: of the file; of a video that is a list of frames, its name.
        labels: classes of the whole video, ascending.
        line: of the list, from 1; 0 in a folder.
        actions: when its classes are seen, where the list says so.
        frames: image files, in place of the video's.
        frame_labels: classes of each of those.
    """

    path: Path
    labels: tuple[int, ...]
    line: int = 0
    actions: tuple[Action, ...] = ()
    frames: tuple[Path, ...] = ()
    frame_labels: tuple[tuple[int, ...], ...] = ()


@dataclasses.dataclass(frozen=True)
class Annotations:
    """A list, read.

    Attributes:
        records: the videos.
        num_classes: of the labels.
        multi_label: whether a video may have any number of classes, as in Charades; else it has one.
        names: of the classes; empty where the list has only numbers.
        left_out: what was wrong with the lines that were left out.
        kind: of the list, in the order of the table above.
    """

    records: tuple[Record, ...]
    num_classes: int
    multi_label: bool = False
    names: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    kind: Kind = "paths"

    def __len__(self) -> int:
        return len(self.records)


class _LineError(Exception):
    """What is wrong with a line; `leave_out` may pass over it where it is not `grave`."""

    def __init__(self, text: str, *, grave: bool = True) -> None:
        super().__init__(text)
        self.grave = grave


def read(
    source: Path,
    *,
    num_classes: int | None = None,
    root: Path | None = None,
    classes: Path | None = None,
    leave_out: bool = False,
) -> Annotations:
    r"""Read a list, or a folder.

    Args:
        source: the file or folder.
        num_classes: of the labels; None takes 157 for Charades, and else what the list has.
        root: folder that paths are relative to, and must lie in; None is that of the list, and then they may lie anywhere.
        classes: names of all classes, one a line, in the order of their numbers; None sorts the names of the list itself, which
            must then have `num_classes` of them.
        leave_out: whether lines of files that are missing, or named before, are left out in place of being an error.

    Raises:
        DataError: there is no such list, or lines of it are wrong: the first of them are named, with their numbers.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "a.mp4").write_bytes(b""), (folder / "list.txt").write_text("a.mp4 3\n")
    >>> read(folder / "list.txt").records[0].labels
    (3,)
    """
    known = read_classes(classes) if classes else ()
    if source.is_dir():
        return index(source, num_classes=num_classes, names=known)
    lines = _lines(source)
    if not lines:
        raise DataError(f"{source} must have a line for each video; it is empty.")
    where = _Where(plain_path(source.parent), plain_path(root) if root else None)
    header = next(csv.reader(lines[:1]), []) if len(lines[0]) < csv.field_size_limit() else []
    if lines[0].startswith(FRAME_LIST):
        parse: _Parse = functools.partial(_of_frames, where)
        return _checked(
            source, "frames", _by_video(lines), parse, num_classes, leave_out, names=known
        )
    if KINETICS in header:
        names = known or _names_of(source, lines)
        parse = functools.partial(
            _of_kinetics, where, {_plain(name): number for number, name in enumerate(names)}
        )
        return _checked(
            source,
            "kinetics",
            _csv(source, lines),
            parse,
            num_classes or len(names),
            leave_out,
            names=names,
        )
    if CHARADES in header:
        parse = functools.partial(_of_charades, where)
        rows = _csv(source, lines)
        return _checked(
            source, "charades", rows, parse, num_classes or CHARADES_CLASSES, leave_out, names=known
        )
    numbered = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
    parse = functools.partial(_path_and_label, where)
    return _checked(
        source, "paths", numbered, parse, num_classes or len(known) or None, leave_out, names=known
    )


def index(
    folder: Path, *, num_classes: int | None = None, names: Sequence[str] = ()
) -> Annotations:
    """The videos of class-name folders; classes are numbered in the order of their names, unless `names` says another.

    Raises:
        DataError: no folder with a video in it, or of a class that `names` lacks.
    """
    folders = sorted(inner for inner in folder.iterdir() if inner.is_dir())
    videos = {
        inner.name: sorted(file for file in inner.iterdir() if file.suffix.lower() in SUFFIXES)
        for inner in folders
    }
    videos = {name: files for name, files in videos.items() if files}
    if not videos:
        raise DataError(
            f"{folder} must have a folder for each class, with videos ({', '.join(SUFFIXES)}) in it; got none."
        )
    names = tuple(names) or tuple(videos)
    if unknown := [name for name in videos if name not in names]:
        raise DataError(
            f"{folder / unknown[0]} must be of one of the {len(names)} classes that are named; it is none."
        )
    if num_classes is not None and len(names) != num_classes:
        raise DataError(f"{folder} must have {num_classes} classes; it has {len(names)}.")
    records = tuple(
        Record(file, (names.index(name),)) for name, files in videos.items() for file in files
    )
    return Annotations(records, len(names), names=names, kind="folder")


class _Where(NamedTuple):
    """From paths in a list to files."""

    folder: Path  # of the list
    root: Path | None

    def file(self, name: str) -> Path:
        if "\0" in name or not name:
            raise _LineError(f"{name!r} is no path")
        file = plain_path((self.root or self.folder) / name)
        if self.root is not None and not file.is_relative_to(self.root):
            raise _LineError(f"{name} lies outside the root {self.root}")
        return file


def plain_path(path: Path) -> Path:
    """Absolute, and without `..`; links are not followed, as data sets are often links."""
    return Path(os.path.normpath(path.absolute()))


_Parse = Callable[[int, Any], Record]  # of a line's number and content; raises a problem


def _checked(
    source: Path,
    kind: Kind,
    rows: Iterable[tuple[int, Any]],
    parse: _Parse,
    num_classes: int | None,
    leave_out: bool,
    *,
    names: Sequence[str] = (),
) -> Annotations:
    """All lines, or what is wrong with the first of them."""
    if names and num_classes is not None and len(names) != num_classes:
        raise DataError(
            f"{source} must be of {num_classes} classes; {len(names)} are named. A file of classes may name all."
        )
    records: list[Record] = []
    seen: dict[Path, int] = {}
    grave: list[str] = []
    light: list[str] = []
    for line, row in rows:
        try:
            record = parse(line, row)
            if wrong := [
                label
                for label in record.labels
                if label < 0 or (num_classes is not None and label >= num_classes)
            ]:
                most = "" if num_classes is None else f" to {num_classes - 1}"
                raise _LineError(f"labels must be from 0{most}; got {wrong[0]}")
            if record.path in seen:
                raise _LineError(f"{record.path} is on line {seen[record.path]} too", grave=False)
            seen[record.path] = line
            first = record.frames[0] if record.frames else record.path
            if not _is_file(first):
                raise _LineError(f"there is no file {first}", grave=False)
            records.append(record)
        except _LineError as problem:
            (grave if problem.grave or not leave_out else light).append(f"line {line}: {problem}")
    if grave:
        more = f"\n  and {len(grave) - SHOWN:,} more" if len(grave) > SHOWN else ""
        shown = "\n  ".join(grave[:SHOWN])
        raise DataError(
            f"{source} has {len(grave):,} line(s) that cannot be used:\n  {shown}{more}"
        )
    if not records:
        raise DataError(
            f"{source} must name at least one video that is there; {len(light):,} line(s) were left out."
        )
    if num_classes is None:
        num_classes = 1 + max((max(record.labels, default=0) for record in records), default=0)
    if names and len(names) != num_classes:
        raise DataError(
            f"{source} has labels up to {num_classes - 1}; {len(names)} classes are named."
        )
    multi_label = kind in ("charades", "frames")
    return Annotations(tuple(records), num_classes, multi_label, tuple(names), tuple(light), kind)


def _path_and_label(where: _Where, number: int, line: str) -> Record:
    parts = line.strip().rsplit(None, 1)
    if len(parts) != 2:
        parts = line.strip().rsplit(",", 1)
    if len(parts) != 2:
        raise _LineError(f"`path label` is expected; got {_short(line)}")
    return Record(
        where.file(parts[0].strip().rstrip(",")), (_integer(parts[1], "a label"),), number
    )


def _of_kinetics(
    where: _Where, numbers: Mapping[str, int], number: int, row: Mapping[str, str | None]
) -> Record:
    label, name = row.get("label") or "", row.get("youtube_id") or ""
    if _plain(label) not in numbers:
        raise _LineError(f"{label!r} is none of the {len(numbers)} classes")
    start, end = (_integer(row.get(key) or "", key) for key in ("time_start", "time_end"))
    trimmed = f"{name}_{start:06d}_{end:06d}"
    folders = ("", f"{label}/", f"{label.replace(' ', '_')}/")
    files = [where.file(f"{folder}{stem}.mp4") for folder in folders for stem in (trimmed, name)]
    found = [file for file in files if _is_file(file)]
    return Record((found or files)[0], (numbers[_plain(label)],), number)


def _names_of(source: Path, lines: Sequence[str]) -> tuple[str, ...]:
    names = sorted({row.get("label") or "" for _, row in _csv(source, lines)} - {""})
    if not names:
        raise DataError(
            f"{source} must have a column `label`; the official list of the test split has none."
        )
    return tuple(names)


def _of_charades(where: _Where, number: int, row: Mapping[str, str | None]) -> Record:
    name = (row.get("id") or "").strip()
    if not name:
        raise _LineError("the column `id` is empty")
    actions = tuple(_action(text) for text in (row.get("actions") or "").split(";") if text.strip())
    return Record(
        where.file(f"{name}.mp4"),
        tuple(sorted({action.label for action in actions})),
        number,
        actions,
    )


def _action(text: str) -> Action:
    parts = text.split()
    if len(parts) != 3 or not re.fullmatch(r"c\d{3}", parts[0]):
        raise _LineError(f"an action is like `c092 11.10 21.50`; got {_short(text)}")
    start, end = (_seconds(part) for part in parts[1:])
    if end < start:
        raise _LineError(f"an action must not end before it starts; got {_short(text)}")
    return Action(int(parts[0][1:]), start, end)


def _by_video(lines: Sequence[str]) -> Iterator[tuple[int, list[tuple[int, str]]]]:
    """The lines of each video, which may be apart, with the number of the first."""
    videos: dict[str, list[tuple[int, str]]] = {}
    for number, line in enumerate(lines[1:], start=2):
        if line.strip():
            videos.setdefault(line.split()[0], []).append((number, line))
    for rows in videos.values():
        yield rows[0][0], rows


def _of_frames(where: _Where, first: int, rows: Sequence[tuple[int, str]]) -> Record:
    frames, labels = [], []
    for number, line in rows:
        parts = line.split()
        if len(parts) != 5:
            raise _LineError(
                f"(line {number}) `original_vido_id video_id frame_id path labels` is expected; got {_short(line)}"
            )
        frames.append(where.file(parts[3]))
        of_frame = parts[4].replace('"', "")
        labels.append(
            tuple(_integer(label, "a label") for label in of_frame.split(",")) if of_frame else ()
        )
    all_labels = tuple(sorted({label for of_frame in labels for label in of_frame}))
    return Record(
        Path(rows[0][1].split()[0]),
        all_labels,
        first,
        frames=tuple(frames),
        frame_labels=tuple(labels),
    )


def _csv(source: Path, lines: Sequence[str]) -> Iterator[tuple[int, dict[str, str | None]]]:
    reader = csv.DictReader(lines)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(
            f"{source}: line {reader.line_num + 1} cannot be read as CSV: {error}."
        ) from error


def _lines(source: Path) -> list[str]:
    try:
        text = source.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source} must be a list in UTF-8; byte {error.start:,} is none."
        ) from error
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror or error}.") from error
    return (
        text.removesuffix("\n").split("\n") if text else []
    )  # and not at what else Unicode has for an end of a line


def read_classes(file: Path) -> tuple[str, ...]:
    """Names of classes, one a line.

    Raises:
        DataError: it cannot be read, or names one twice or none.
    """
    names = tuple(line.strip() for line in _lines(file) if line.strip())
    if len(set(names)) < len(names) or not names:
        raise DataError(
            f"{file} must name each class once, one a line; got {len(names)} lines, {len(set(names))} names."
        )
    return names


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, a folder that may not be entered
        return False


def _plain(name: str) -> str:
    """As it is compared: the releases write spaces and the folders of some copies underscores."""
    return name.strip().replace("_", " ")


def _integer(text: str, what: str) -> int:
    if not re.fullmatch(r"\s*-?[0-9]{1,18}\s*", text):
        raise _LineError(f"{what} must be a whole number; got {_short(text)}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = math.nan if "_" in text else float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise _LineError(f"times must be seconds from 0 on; got {_short(text)}")
    return value


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
