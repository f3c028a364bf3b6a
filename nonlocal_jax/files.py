"""Files, local or remote: their paths, and how they are written.

A path is a `pathlib.Path`, or a `RemotePath` for a URL such as gs://bucket/folder/file. Both have
the same methods, so most of the library does not distinguish them. `as_path` converts what a user
passes.
"""

import contextlib
import os
import re
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeAlias

from nonlocal_jax.remote_paths import URL, RemotePath, is_protocol

COLLAPSED_URL = re.compile(r"(?P<protocol>[A-Za-z][A-Za-z0-9+.-]+):/(?P<rest>[^/].*)", re.DOTALL)
LOCAL_PROTOCOLS = ("file", "local")
MAX_NAME_BYTES = 255  # longest name of a file, on all common file systems
PARTIAL_RANDOM_BYTES = 4
PARTIAL_NAME = re.compile(
    rf"\.(?P<stem>.*)\.[0-9a-f]{{{2 * PARTIAL_RANDOM_BYTES}}}\.partial", re.DOTALL
)

AnyPath: TypeAlias = Path | RemotePath
PathLike: TypeAlias = str | os.PathLike[str] | RemotePath  # what users may pass for a path


def as_path(location: PathLike) -> AnyPath:
    """Converts what a user passes to a path, which is remote if it is a URL.

    Args:
        location: A local path, a URL such as gs://bucket/file, or a path that this returned.

    Raises:
        ValueError: The protocol of a URL is unknown, or the location is a `pathlib.Path` of a URL,
            which has a single slash after the protocol.
        ImportError: The package for the protocol is not installed.

    >>> as_path("runs/a").name, as_path("file:///tmp/a").is_absolute(), as_path("memory://a/b").name
    ('a', True, 'b')
    >>> as_path(Path("gs://bucket/file"))
    Traceback (most recent call last):
    ValueError: a URL must have two slashes after the colon, as in 'gs://bucket/file'; got
    'gs:/bucket/file'. Pass a string, since pathlib.Path drops one.
    """
    if isinstance(location, RemotePath):
        return location
    text = os.fspath(location)
    if match := URL.fullmatch(text):
        is_local = match["protocol"].lower() in LOCAL_PROTOCOLS
        return Path(match["rest"]) if is_local else RemotePath(text)
    match = COLLAPSED_URL.fullmatch(text)
    if match and is_protocol(match["protocol"]):
        is_local = match["protocol"].lower() in LOCAL_PROTOCOLS
        expected = f"{match['protocol']}:{'///' if is_local else '//'}{match['rest']}"
        raise ValueError(
            f"a URL must have two slashes after the colon, as in {expected!r}; got {text!r}. "
            "Pass a string, since pathlib.Path drops one."
        )
    return Path(location)


def as_local_path(location: PathLike) -> Path:
    """Converts what a user passes to a path, where only a local one can be used.

    Raises:
        ValueError: The path is remote.

    >>> as_local_path("memory://a/b")
    Traceback (most recent call last):
    ValueError: the path must be local; got memory://a/b. Copy the files to this machine first.
    """
    path = as_path(location)
    if isinstance(path, RemotePath):
        raise ValueError(
            f"the path must be local; got {path}. Copy the files to this machine first."
        )
    return path


@contextlib.contextmanager
def atomic_write(path: PathLike) -> Iterator[Path]:
    """Yields a temporary local path, whose file replaces `path` when the block succeeds.

    A local file is written in the same directory, flushed to disk and renamed. It gets the
    permissions that `open` would give it: those of the file that it replaces, or else those of the
    umask. A link is followed. A remote file is uploaded. If the block raises, the temporary file is
    removed and `path` keeps what it had.

    Args:
        path: File to create or replace. Its directory must exist.

    Yields:
        The path to write to. Its name starts with a dot and ends in ".partial", so it matches no
        file type.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "notes.txt")
    >>> with atomic_write(file) as partial:
    ...     _ = partial.write_text("complete")
    >>> file.read_text(), len(list(file.parent.iterdir()))
    ('complete', 1)
    """
    path = as_path(path)
    if isinstance(path, RemotePath):
        with tempfile.TemporaryDirectory() as folder:
            partial = Path(folder, _partial_name(path))
            yield partial
            path.upload(partial)
        return
    path = path.resolve() if path.is_symlink() else path
    partial = path.with_name(_partial_name(path))
    try:
        yield partial
        with partial.open("rb+") as written:
            os.fsync(written.fileno())
        if path.exists():
            partial.chmod(path.stat().st_mode & 0o777)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def partial_files(paths: Iterable[Path]) -> list[Path]:
    """Finds the temporary files of `atomic_write`: in use, or left by killed processes.

    Each directory is scanned once. The temporary files of another path in the same directory are
    found as well if both names are too long to be kept and start alike.

    Args:
        paths: Paths that `atomic_write` was or may be called with.
    """
    stems: dict[Path, set[str]] = {}
    for path in paths:
        stems.setdefault(path.parent, set()).add(_partial_stem(path))
    return [
        file
        for folder, names in stems.items()
        for file in folder.glob(".*.partial")
        if (match := PARTIAL_NAME.fullmatch(file.name)) and match["stem"] in names
    ]


def _partial_name(path: AnyPath) -> str:
    return f".{_partial_stem(path)}.{secrets.token_hex(PARTIAL_RANDOM_BYTES)}.partial"


def _partial_stem(path: AnyPath) -> str:
    """Returns the name of a file, cut so that the name of its temporary file is not too long."""
    room = MAX_NAME_BYTES - len("..") - 2 * PARTIAL_RANDOM_BYTES - len(".partial")
    stem = path.name[:room]
    while len(os.fsencode(stem)) > room:
        stem = stem[:-1]
    return stem


def write_text(path: PathLike, text: str) -> None:
    """Writes a text file atomically, in UTF-8."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def append_line(path: AnyPath, line: str) -> None:
    """Appends a line to a text file. A remote file is rewritten, since few stores can append."""
    if isinstance(path, RemotePath):
        text = path.read_text() if path.exists() else ""
        path.write_text(f"{text}{line}\n")
        return
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


@contextlib.contextmanager
def local_copy(path: AnyPath) -> Iterator[Path]:
    """Yields a local file with the content of `path`: a temporary copy if it is remote."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, path.name)
        path.download(copy)
        yield copy
