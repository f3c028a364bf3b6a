"""Lists of videos with their classes: Kinetics, Charades, and the frame lists of PySlowFast.

The format is recognised by the first line, or by the list being a folder:

| first line | format |
|---|---|
| `path label` | one video per line, as in video-nonlocal-net and PySlowFast, or with a comma |
| `label,youtube_id,time_start,time_end,split` | CSV of the official Kinetics release |
| `id,...,actions,length` | CSV of Charades, with actions `c092 11.10 21.50;c147 23.10 31.50` |
| `original_vido_id video_id frame_id path labels` | one frame per line, Charades in PySlowFast |
| a folder | `FOLDER/class name/video.mp4`, a folder of videos for each class |

Lists, folders and videos may be remote, such as gs://bucket/train.csv; a local list may name remote
videos. Every line is checked before anything is decoded, and errors name the line by its number.
"""

from collections.abc import Sequence

from nonlocal_jax.data import DataError
from nonlocal_jax.data.lists.formats import (
    Folders,
    LineError,
    ParsedList,
    plain_path,
    read_lines,
    recognise,
)
from nonlocal_jax.data.lists.records import Action, Annotations, ListFormat, Record
from nonlocal_jax.files import AnyPath, PathLike, as_path

VIDEO_SUFFIXES = (
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
MAX_PROBLEMS = 10  # lines that an error message shows

__all__ = ["Action", "Annotations", "ListFormat", "Record", "index", "read", "read_classes"]


def read(
    source: PathLike,
    *,
    num_classes: int | None = None,
    root: PathLike | None = None,
    classes: PathLike | None = None,
    leave_out: bool = False,
) -> Annotations:
    r"""Reads a list of videos, or a folder with a folder of videos for each class.

    Args:
        source: The list or the folder.
        num_classes: Number of classes. Defaults to 157 for Charades, and what the list has
            otherwise.
        root: Folder that paths are relative to and must lie in. None is the folder of the list, and
            then files may lie anywhere.
        classes: File with the names of all classes, one per line, in the order of their numbers.
            None sorts the names in the list, of which there must then be `num_classes`.
        leave_out: Whether to leave out lines whose file is missing or was named before, instead of
            raising an error.

    Raises:
        DataError: The list is missing, or lines cannot be used. The first of them are named.

    >>> import tempfile
    >>> from pathlib import Path
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "a.mp4").write_bytes(b""), (folder / "list.txt").write_text("a.mp4 3\n")
    >>> read(folder / "list.txt").records[0].labels
    (3,)
    """
    source = as_path(source)
    names = read_classes(classes) if classes else ()
    if source.is_dir():
        return index(source, num_classes=num_classes, names=names)
    lines = read_lines(source)
    if not lines:
        raise DataError(f"{source} must have a line for each video; it is empty.")
    folders = Folders(plain_path(source.parent), plain_path(as_path(root)) if root else None)
    parsed = recognise(source, lines, folders, names)
    num_classes = num_classes or parsed.num_classes
    if parsed.names and num_classes is not None and len(parsed.names) != num_classes:
        raise DataError(
            f"{source} must have {num_classes} classes; {len(parsed.names)} are named. "
            "Pass a file that names all classes."
        )
    records, left_out = _parse_rows(source, parsed, folders, num_classes, leave_out)
    if num_classes is None:
        num_classes = 1 + max((max(record.labels, default=0) for record in records), default=0)
    if parsed.names and len(parsed.names) != num_classes:
        raise DataError(
            f"{source} has labels up to {num_classes - 1}; {len(parsed.names)} classes are named."
        )
    multi_label = parsed.format in ("charades", "frames")
    return Annotations(
        tuple(records), num_classes, multi_label, parsed.names, tuple(left_out), parsed.format
    )


def _parse_rows(
    source: AnyPath,
    parsed: ParsedList,
    folders: Folders,
    num_classes: int | None,
    leave_out: bool,
) -> tuple[list[Record], list[str]]:
    """Parses and checks every row.

    Returns:
        The records, and why each line that was left out cannot be used.
    """
    records: list[Record] = []
    line_of_path: dict[AnyPath, int] = {}
    errors: list[str] = []
    left_out: list[str] = []
    for line, row in parsed.rows:
        try:
            record = parsed.parse(line, row)
            _check_labels(record, num_classes)
            _check_path(record, line_of_path)
            line_of_path[record.path] = line
            _check_file(record, folders)
            records.append(record)
        except LineError as error:
            is_tolerated = leave_out and error.can_be_left_out
            (left_out if is_tolerated else errors).append(f"line {line}: {error}")
    if errors:
        raise DataError(_summary(source, errors))
    if not records:
        raise DataError(
            f"{source} must name at least one existing video; "
            f"{len(left_out):,} line(s) were left out."
        )
    return records, left_out


def _check_labels(record: Record, num_classes: int | None) -> None:
    for label in record.labels:
        if label < 0 or (num_classes is not None and label >= num_classes):
            bound = "at least 0" if num_classes is None else f"from 0 to {num_classes - 1}"
            raise LineError(f"labels must be {bound}; got {label}")


def _check_path(record: Record, line_of_path: dict[AnyPath, int]) -> None:
    if record.path in line_of_path:
        first_line = line_of_path[record.path]
        raise LineError(f"{record.path} is on line {first_line} too", can_be_left_out=True)


def _check_file(record: Record, folders: Folders) -> None:
    file = record.frames[0] if record.frames else record.path
    if not folders.has(file):
        raise LineError(f"there is no file {file}", can_be_left_out=True)


def _summary(source: AnyPath, errors: Sequence[str]) -> str:
    lines = [f"{source} has {len(errors):,} line(s) that cannot be used:", *errors[:MAX_PROBLEMS]]
    if len(errors) > MAX_PROBLEMS:
        lines.append(f"and {len(errors) - MAX_PROBLEMS:,} more")
    return "\n  ".join(lines)


def index(
    folder: PathLike, *, num_classes: int | None = None, names: Sequence[str] = ()
) -> Annotations:
    """Lists the videos in a folder that has a folder of videos for each class.

    Args:
        folder: The folder.
        num_classes: Number of classes that there must be; None accepts any.
        names: Names of the classes in the order of their numbers. By default they are sorted.

    Raises:
        DataError: No inner folder has a video, or one has a name that is not in `names`.
    """
    folder = as_path(folder)
    videos: dict[str, list[AnyPath]] = {}
    for inner in sorted(inner for inner in folder.iterdir() if inner.is_dir()):
        files = [file for file in inner.iterdir() if file.suffix.lower() in VIDEO_SUFFIXES]
        if files:
            videos[inner.name] = sorted(files)
    if not videos:
        raise DataError(
            f"{folder} must have a folder for each class, with videos in it "
            f"({', '.join(VIDEO_SUFFIXES)}); it has none."
        )
    names = tuple(names) or tuple(videos)
    if unknown := [name for name in videos if name not in names]:
        raise DataError(
            f"{folder / unknown[0]} must be named like one of the {len(names)} classes; it is not."
        )
    if num_classes is not None and len(names) != num_classes:
        raise DataError(f"{folder} must have {num_classes} classes; it has {len(names)}.")
    records = tuple(
        Record(file, (names.index(name),)) for name, files in videos.items() for file in files
    )
    return Annotations(records, len(names), names=names, format="folder")


def read_classes(file: PathLike) -> tuple[str, ...]:
    """Reads the names of classes, one per line.

    Raises:
        DataError: The file cannot be read, names a class twice, or names none.
    """
    names = tuple(line.strip() for line in read_lines(as_path(file)) if line.strip())
    if len(set(names)) < len(names) or not names:
        raise DataError(
            f"{file} must name each class once, one per line; "
            f"got {len(names)} lines with {len(set(names))} different names."
        )
    return names
