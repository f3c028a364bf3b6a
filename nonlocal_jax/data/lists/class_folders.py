"""Folders that have a folder of videos for each class."""

import os
from collections.abc import Sequence
from pathlib import Path

from nonlocal_jax.data import DataError
from nonlocal_jax.data.lists.folders import VIDEO_SUFFIXES, is_file, is_kind, is_video, normal_form
from nonlocal_jax.data.lists.formats import comparable_name
from nonlocal_jax.data.lists.records import Annotations, Record
from nonlocal_jax.files import AnyPath

# Made by Synology, QNAP, macOS, Windows, Python and file systems, in lower case.
SYSTEM_FOLDERS = frozenset(
    (
        *("@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot"),
        *("__macosx", "network trash folder", "temporary items"),
        *("$recycle.bin", "recycler", "recycled", "system volume information", "found.000"),
        *("__pycache__", "lost+found"),
    )
)


def read_folder(
    folder: AnyPath, num_classes: int | None, names: Sequence[str], leave_out: bool
) -> Annotations:
    """Lists the videos; the arguments are those of `nonlocal_jax.data.annotations.index`."""
    videos, left_out = _find_videos(folder, frozenset(map(comparable_name, names)), leave_out)
    if not videos:
        raise DataError(
            f"{folder} must have a folder for each class, with videos in it "
            f"({', '.join(VIDEO_SUFFIXES)}); it has none. Hidden files and folders do not count."
        )
    numbers = _class_numbers(folder, list(videos), names)
    names = tuple(names) or tuple(videos)
    if num_classes is not None and len(names) != num_classes:
        raise DataError(f"{folder} must have {num_classes} classes; it has {len(names)}.")
    records = tuple(
        Record(file, (numbers[name],)) for name, files in videos.items() for file in files
    )
    return Annotations(records, len(names), names=names, left_out=tuple(left_out), format="folder")


def _find_videos(
    folder: AnyPath, named: frozenset[str], leave_out: bool
) -> tuple[dict[str, list[AnyPath]], list[str]]:
    """Finds the videos of each class.

    Args:
        folder: The folder with the folders of the classes.
        named: Names of classes that the user passed, comparable. Their folders are never hidden.
        leave_out: Whether to leave out links to files that do not exist.

    Returns:
        The videos of each class by its name, and what was left out with the reasons.
    """
    videos: dict[str, list[AnyPath]] = {}
    left_out: list[str] = []
    for inner in _visible(folder, named):
        if not _is_class_folder(inner, folder):
            continue
        files = [file for file in _visible(inner) if is_video(file.name)]
        broken = [file for file in files if isinstance(file, Path) and _is_broken_link(file)]
        if broken and not leave_out:
            raise DataError(
                f"{broken[0]} is a link to a file that does not exist. Repair or remove it, or "
                "leave such files out."
            )
        left_out += [f"{file} is a link to a file that does not exist" for file in broken]
        files = [file for file in files if not isinstance(file, Path) or is_file(file)]
        if files:
            videos[inner.name] = files
        else:
            is_class = comparable_name(inner.name) in named
            left_out.append(
                f"{inner} has no video" + ("" if is_class else ", so it is not a class")
            )
    return videos, left_out


def is_hidden(name: str) -> bool:
    """Whether a file or folder was not put there by the user.

    Names that start with a dot are those of thumbnails, copies that notebooks keep, metadata of
    macOS, and partial files of rsync and of this library.

    >>> [is_hidden(name) for name in (".thumbnails", "._a.mp4", "@eaDir", "__MACOSX", "run")]
    [True, True, True, True, False]
    """
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def _visible(folder: AnyPath, named: frozenset[str] = frozenset()) -> list[AnyPath]:
    """Returns what is not hidden in a folder, or is named.

    The order does not depend on Unicode normal forms.
    """
    try:
        entries = [
            entry
            for entry in folder.iterdir()
            if not is_hidden(entry.name) or comparable_name(entry.name) in named
        ]
    except OSError as error:
        if not isinstance(folder, Path):
            raise
        raise DataError(f"{folder} cannot be read: {error.strerror or error}.") from error
    return sorted(entries, key=lambda entry: (normal_form(entry.name), entry.name))


def _is_class_folder(inner: AnyPath, folder: AnyPath) -> bool:
    """Whether this is a folder, and no link back to the folder of the classes or above it."""
    if not (isinstance(inner, Path) and isinstance(folder, Path)):
        return inner.is_dir()
    if not is_kind(inner, Path.is_dir):
        return False
    return not Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(inner))


def _is_broken_link(file: Path) -> bool:
    return file.is_symlink() and not is_kind(file, Path.exists)


def _class_numbers(folder: AnyPath, found: Sequence[str], names: Sequence[str]) -> dict[str, int]:
    """Returns the number of the class of each folder, by its name."""
    if not names:
        return {name: number for number, name in enumerate(found)}
    exact = {name: number for number, name in enumerate(names)}
    similar = {comparable_name(name): number for number, name in enumerate(names)}
    numbers = {}
    for name in found:
        number = exact.get(name, similar.get(comparable_name(name)))
        if number is None:
            raise DataError(
                f"{folder / name} must be named like one of the {len(names)} classes; it is not."
            )
        numbers[name] = number
    return numbers
