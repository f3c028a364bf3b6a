"""Lists of videos with their classes: Kinetics, Charades, and the frame lists of PySlowFast.

The format is recognised by the first line, or by the list being a folder:

| first line | format |
|---|---|
| `path label` | one video per line, as in video-nonlocal-net and PySlowFast |
| `path,label` | the same with a header, in a CSV table |
| `label,youtube_id,time_start,time_end,split` | CSV of the official Kinetics release |
| `id,...,actions,length` | CSV of Charades, with actions `c092 11.10 21.50;c147 23.10 31.50` |
| `original_vido_id video_id frame_id path labels` | one frame per line, Charades in PySlowFast |
| a folder | `FOLDER/class name/video.mp4`, a folder of videos for each class |

Fields are separated by commas, semicolons, tabs, bars or blanks; other blanks of Unicode, such as
U+3000, belong to a file name. Fields are quoted as Python's csv module and pandas write them; in a
table, a quote that is not closed or has text after it is an error. Columns that are not needed,
blank lines and separators at the end of a line are ignored. In lines `path label` everything before
the last separator is the path, so only a path that could be read in another way needs quotes. Where
a line can be read in two ways, the file that exists decides. A file name may have another Unicode
normal form than the list.

Videos of Kinetics are `youtube_id.mp4` or `youtube_id_000005_000015.mp4`, beside the list, in the
root, or in folders of the classes. Any of the suffixes in `VIDEO_SUFFIXES` may replace `.mp4`; of
several files, the suffix that comes first there is used. The same holds for the ids of Charades.

Lists, folders and videos may be remote, such as gs://bucket/train.csv; a local list may name remote
videos. Every line is checked before anything is decoded, and errors name the line by its number.
"""

from collections.abc import Sequence

from nonlocal_jax.data import DataError
from nonlocal_jax.data.lists.class_folders import read_folder
from nonlocal_jax.data.lists.folders import VIDEO_SUFFIXES, Folders, LineError, plain_path
from nonlocal_jax.data.lists.formats import ParsedList, recognise
from nonlocal_jax.data.lists.records import Action, Annotations, ListFormat, Record
from nonlocal_jax.data.lists.text import is_blank, read_lines, unquoted_name
from nonlocal_jax.files import AnyPath, PathLike, as_path

MAX_LABEL = 2**31 - 1  # labels are stored as int32
MAX_PROBLEMS = 10  # lines that an error message shows

__all__ = [
    "VIDEO_SUFFIXES",
    "Action",
    "Annotations",
    "ListFormat",
    "Record",
    "index",
    "read",
    "read_classes",
]


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
        return index(source, num_classes=num_classes, names=names, leave_out=leave_out)
    lines = read_lines(source)
    if all(map(is_blank, lines)):
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
    largest = MAX_LABEL if num_classes is None else num_classes - 1
    for label in record.labels:
        if not 0 <= label <= largest:
            raise LineError(f"labels must be from 0 to {largest}; got {label}")


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
    folder: PathLike,
    *,
    num_classes: int | None = None,
    names: Sequence[str] = (),
    leave_out: bool = False,
) -> Annotations:
    """Lists the videos in a folder that has a folder of videos for each class.

    Hidden files and folders do not count: those whose names start with a dot, such as `.thumbnails`
    and `._a.mp4`, and those of systems, such as `__MACOSX` and `@eaDir`. Neither do files without
    one of the suffixes in `VIDEO_SUFFIXES`, in lower or upper case, and links back to the folder
    or to one above it. A folder without any video is not a class, unless `names` has it; it is
    listed in `left_out`. A folder that `names` has is never hidden.

    Args:
        folder: The folder.
        num_classes: Number of classes that there must be; None accepts any.
        names: Names of the classes in the order of their numbers. By default they are those of the
            folders, sorted. Folders may have underscores where names have spaces.
        leave_out: Whether to leave out links to files that do not exist, instead of raising an
            error.

    Raises:
        DataError: No inner folder has a video, one has a name that is not in `names`, a folder
            cannot be read, or a link is broken.
    """
    return read_folder(as_path(folder), num_classes, names, leave_out)


def read_classes(file: PathLike) -> tuple[str, ...]:
    """Reads the names of classes, one per line.

    Blanks around a name are removed, unless it is in double quotes, and so are the quotes.

    Raises:
        DataError: The file cannot be read, names a class twice, or names none.
    """
    lines = [line for line in read_lines(as_path(file)) if line.strip()]
    names = tuple(map(unquoted_name, lines))
    if len(set(names)) < len(names) or not all(names) or not names:
        raise DataError(
            f"{file} must name each class once, one per line; "
            f"got {len(names)} lines with {len(set(names))} different names."
        )
    return names
