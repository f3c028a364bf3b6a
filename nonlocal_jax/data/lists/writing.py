"""Lists as they are written, so that they are read back as they were."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from nonlocal_jax import files
from nonlocal_jax.data import DataError
from nonlocal_jax.data.lists.records import Annotations
from nonlocal_jax.data.lists.text import unquoted_name
from nonlocal_jax.files import AnyPath
from nonlocal_jax.terminal import printable

# Names without any character that a reader of lists could take for a separator or a quote.
PLAIN_NAME = re.compile(r"""[^\s,;|"'#\ufeff]+""")


def path_line(path: str, label: int) -> str:
    r"""Returns the line of a list that is read back as this path and label.

    Raises:
        ValueError: The path has a line break or is not UTF-8, which a list cannot have.

    >>> path_line("run/a.mp4", 3), path_line("long jump/b.mp4", 4)
    ('run/a.mp4 3\n', '"long jump/b.mp4" 4\n')
    """
    return f"{name_field(path)} {label}\n"


def name_field(name: str) -> str:
    """Returns a name as it is written to a list, in double quotes if it needs them.

    Raises:
        ValueError: The name has a line break or is not UTF-8, which a list cannot have.
    """
    if "\n" in name or "\r" in name:
        raise ValueError("the name has a line break.")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError("the name is not UTF-8.") from error
    return name if PLAIN_NAME.fullmatch(name) else '"' + name.replace('"', '""') + '"'


def write_folder(
    videos: Annotations, folder: AnyPath, list_file: AnyPath, names_file: AnyPath
) -> None:
    """Writes the list of the videos in a folder, and the names of their classes.

    Args:
        videos: The videos, as `nonlocal_jax.data.annotations.index` returns them.
        folder: The folder, which paths in the list are relative to.
        list_file: File for the list.
        names_file: File for the names of the classes.

    Raises:
        DataError: The name of a video or of a class cannot be written. Nothing is left behind.
    """
    base: Any = folder.absolute()  # of the same kind as the path of every record
    lines, names = [], []
    for record in videos.records:
        with naming(record.path):
            path = str(record.path.absolute().relative_to(base))
            lines.append(path_line(path, record.labels[0]))
    for name in videos.names:
        with naming(folder / name):
            quoted = name_field(name)  # which checks the name
            names.append(f"{name if unquoted_name(name) == name else quoted}\n")
    # Nested, so that no list is left behind if the names cannot be written.
    with files.atomic_write(list_file) as partial:
        partial.write_text("".join(lines), encoding="utf-8")
        files.write_text(names_file, "".join(names))


@contextlib.contextmanager
def naming(path: AnyPath) -> Iterator[None]:
    """Context manager that names the file in the errors of `path_line` and `name_field`."""
    try:
        yield
    except ValueError as error:
        raise DataError(
            f"{printable(path)} cannot be written to a list: {error} Rename it, or pass the folder "
            "instead of a list."
        ) from error
