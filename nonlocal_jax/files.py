"""Files, local or remote: their paths, and how they are written.

A path is a `pathlib.Path`, or a `RemotePath` for a URL such as gs://bucket/folder/file. Both have
the same methods, so the rest of the library does not tell them apart. `as_path` makes one of what a
user passes. Remote files are reached through fsspec, which requires a package for each protocol,
such as gcsfs for gs:// and s3fs for s3://.

This is not `etils.epath`, because that knows four protocols only, and depends on whether TensorFlow
is installed.
"""

import contextlib
import errno
import fnmatch
import functools
import os
import posixpath
import re
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeAlias

# At least two letters, since C:// is a drive of Windows.
URL = re.compile(r"(?P<protocol>[A-Za-z][A-Za-z0-9+.:-]+)://(?P<rest>.*)", re.DOTALL)
COLLAPSED_URL = re.compile(r"(?P<protocol>[A-Za-z][A-Za-z0-9+.-]+):/(?P<rest>[^/].*)", re.DOTALL)
LOCAL_PROTOCOLS = ("file", "local")
WITHOUT_FOLDERS = ("http", "https")  # protocols that cannot list a folder reliably

# File systems may raise these without an error number.
ERROR_NUMBERS: dict[type[Exception], int] = {
    FileNotFoundError: errno.ENOENT,
    FileExistsError: errno.EEXIST,
    IsADirectoryError: errno.EISDIR,
    NotADirectoryError: errno.ENOTDIR,
    PermissionError: errno.EACCES,
}


class Stat(NamedTuple):
    """What is known about a remote file.

    Attributes:
        st_size: Size in bytes.
    """

    st_size: int


class RemotePath:
    """A file or folder at a URL, with the methods of `pathlib.Path` that the library uses.

    Paths are normalised: `..` and repeated slashes are removed. It is no `os.PathLike`, so that
    functions for local files raise an error instead of looking for a local folder "gs:".

    Every method raises `OSError` with the URL if the file system cannot be reached or refuses.

    >>> folder = RemotePath("memory://bucket/videos")
    >>> file = folder / "../lists/train.txt"
    >>> file, file.name, file.parent
    (RemotePath('memory://bucket/lists/train.txt'), 'train.txt', RemotePath('memory://bucket/lists'))
    >>> file.write_text("a.mp4 3")
    >>> file.read_text(), file.stat().st_size, [path.name for path in file.parent.iterdir()]
    ('a.mp4 3', 7, ['train.txt'])
    """

    __slots__ = ("_pure", "protocol")

    def __init__(self, url: str) -> None:
        """Checks that the URL can be used. Nothing is read.

        Args:
            url: The URL.

        Raises:
            ValueError: This is no URL, or its protocol is unknown.
            ImportError: The package for its protocol is not installed.
        """
        match = URL.fullmatch(url)
        if match is None:
            raise ValueError(f"a remote path must look like gs://bucket/file; got {url!r}.")
        self.protocol = match["protocol"].lower()
        _check_protocol(self.protocol)
        rest = match["rest"]
        below_root = posixpath.normpath("/" + rest.lstrip("/"))[1:]
        root = "/" if rest.startswith("/") else ""
        self._pure = PurePosixPath(root + below_root)

    def _with(self, pure: PurePosixPath) -> "RemotePath":
        return RemotePath(f"{self.protocol}://{pure}")

    def __str__(self) -> str:
        path = str(self._pure)
        return f"{self.protocol}://{'' if path == '.' else path}"

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __reduce__(self) -> Any:
        return RemotePath, (str(self),)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and str(self) == str(other)

    def __lt__(self, other: "RemotePath") -> bool:
        return str(self) < str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(f"{self}/{name}")

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self._pure.name

    @property
    def stem(self) -> str:
        """The last part without its suffix."""
        return self._pure.stem

    @property
    def suffix(self) -> str:
        """The end of the name, from its last dot."""
        return self._pure.suffix

    @property
    def parent(self) -> "RemotePath":
        """The folder of this path."""
        return self._with(self._pure.parent)

    def with_name(self, name: str) -> "RemotePath":
        """Returns the path with another name."""
        return self._with(self._pure.with_name(name))

    def with_suffix(self, suffix: str) -> "RemotePath":
        """Returns the path with another suffix."""
        return self._with(self._pure.with_suffix(suffix))

    def absolute(self) -> "RemotePath":
        """Returns the path itself: every URL is absolute."""
        return self

    def relative_to(self, folder: "RemotePath") -> PurePosixPath:
        """Returns the path below a folder.

        Raises:
            ValueError: The path is not in that folder.
        """
        if not self.is_relative_to(folder):
            raise ValueError(f"{self} is not in {folder}.")
        return self._pure.relative_to(folder._pure)

    def is_relative_to(self, folder: "RemotePath") -> bool:
        """Whether this path is in a folder, or is that folder."""
        return self.protocol == folder.protocol and self._pure.is_relative_to(folder._pure)

    def exists(self) -> bool:
        """Whether there is a file or folder."""
        return self._type() is not None

    def is_file(self) -> bool:
        """Whether there is a file."""
        return self._type() == "file"

    def is_dir(self) -> bool:
        """Whether there is a folder. In an object store, only one that has files."""
        return self._type() == "directory"

    def _type(self) -> str | None:
        # Not `exists` of fsspec, for which a file is missing whenever there is no connection.
        try:
            with _os_errors(self):
                file_system, path = _open_file_system(self)
                return str(file_system.info(path)["type"])
        except FileNotFoundError:
            return None

    def stat(self) -> Stat:
        """Returns the size of the file."""
        with _os_errors(self):
            file_system, path = _open_file_system(self)
            size = file_system.info(path)["size"]
        if size is None:  # a web server need not tell
            size = len(self.read_bytes())
        return Stat(int(size))

    def iterdir(self) -> Iterator["RemotePath"]:
        """Yields the files and folders in a folder, as they are now."""
        with _os_errors(self):
            file_system, path = _open_file_system(self)
            file_system.invalidate_cache(path)  # other hosts may have written files
            entries = file_system.ls(path, detail=False)
        for entry in entries:
            name = entry.rstrip("/")
            if name != path.rstrip("/"):  # object stores may list the folder itself
                yield self / name.rsplit("/", 1)[-1]

    def glob(self, pattern: str) -> Iterator["RemotePath"]:
        """Yields the files and folders in a folder whose names match a pattern."""
        return (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Creates the folder and those above it, where the protocol has folders."""
        with _os_errors(self):
            file_system, path = _open_file_system(self)
            file_system.makedirs(path, exist_ok=True)

    def read_bytes(self, end: int | None = None) -> bytes:
        """Reads the file, or its first `end` bytes."""
        with _os_errors(self):
            file_system, path = _open_file_system(self)
            return bytes(file_system.cat_file(path, start=None if end is None else 0, end=end))

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """Reads a text file."""
        text = self.read_bytes().decode(encoding, errors)
        return text.replace("\r\n", "\n").replace("\r", "\n")  # as Python reads local files

    def write_bytes(self, content: bytes) -> None:
        """Creates or replaces the file."""
        with _os_errors(self):
            file_system, path = _open_file_system(self)
            file_system.pipe_file(path, content)

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        """Creates or replaces a text file."""
        self.write_bytes(text.encode(encoding))

    def download(self, file: Path) -> None:
        """Copies the file to a local one."""
        with _os_errors(self):
            file_system, path = _open_file_system(self)
            file_system.get_file(path, str(file))

    def upload(self, file: Path) -> None:
        """Replaces the file by a local one. In an object store, readers see the old one or the new
        one, never a part.
        """
        with _os_errors(self):
            file_system, path = _open_file_system(self)
            file_system.put_file(str(file), path)


AnyPath: TypeAlias = Path | RemotePath
PathLike: TypeAlias = str | os.PathLike[str] | RemotePath  # what users may pass for a path


def as_path(location: PathLike) -> AnyPath:
    """Returns the path that a user means: local, or remote if it starts with a protocol.

    Args:
        location: A local path, a URL such as gs://bucket/file, or a path that was made before.

    Raises:
        ValueError: The protocol of a URL is unknown; or `pathlib.Path` was made of a URL, which
            leaves a single slash after the protocol.
        ImportError: The package for the protocol is not installed.

    >>> as_path("runs/a").name, as_path("file:///tmp/a").is_absolute(), as_path("memory://a/b").name
    ('a', True, 'b')
    >>> as_path(Path("gs://bucket/file"))
    Traceback (most recent call last):
    ValueError: a remote path must have two slashes, as in 'gs://bucket/file'; got
    'gs:/bucket/file'. Pass a string, since pathlib.Path drops one.
    """
    if isinstance(location, RemotePath):
        return location
    text = os.fspath(location)
    if match := URL.fullmatch(text):
        is_local = match["protocol"].lower() in LOCAL_PROTOCOLS
        return Path(match["rest"]) if is_local else RemotePath(text)
    match = COLLAPSED_URL.fullmatch(text)
    if match and _is_known(match["protocol"]):
        expected = f"{match['protocol']}://{match['rest']}"
        raise ValueError(
            f"a remote path must have two slashes, as in {expected!r}; got {text!r}. "
            "Pass a string, since pathlib.Path drops one."
        )
    return Path(location)


def as_local_path(location: PathLike) -> Path:
    """Returns a path like `as_path`, where only a local one can be used.

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


def _is_known(protocol: str) -> bool:
    from fsspec.registry import known_implementations

    return protocol.lower() in known_implementations


@functools.cache
def _check_protocol(protocol: str) -> None:
    """Raises an error if fsspec does not know a protocol, or lacks the package for it."""
    from fsspec.registry import get_filesystem_class

    try:
        get_filesystem_class(protocol)
    except ValueError as error:
        raise ValueError(
            "a remote path must start with a protocol of fsspec, such as gs:// or s3://; "
            f"got {protocol}://."
        ) from error
    except ImportError as error:
        missing = error.__cause__ if isinstance(error.__cause__, ImportError) else error
        package = (missing.name or str(error)).split(".")[0]
        raise ImportError(
            f"paths that start with {protocol}:// require the package {package}, which is not "
            f"installed: pip install {package}.",
            name=package,
        ) from error


def _open_file_system(path: RemotePath) -> tuple[Any, str]:
    """Returns fsspec's file system, which it keeps, and the path in it."""
    import fsspec

    return fsspec.url_to_fs(str(path))


@contextlib.contextmanager
def _os_errors(path: RemotePath) -> Iterator[None]:
    """Turns what a file system raises into an `OSError` with the URL."""
    try:
        yield
    except Exception as error:  # each package has its own errors of the network and the store
        number = getattr(error, "errno", None)
        if not isinstance(number, int):
            number = ERROR_NUMBERS.get(type(error), errno.EIO)
        reason = f"{type(error).__name__}: {error!s:.300}"
        if type(error) in ERROR_NUMBERS:
            reason = os.strerror(number)
        raise OSError(number, reason, str(path)) from error


@contextlib.contextmanager
def atomic_write(path: PathLike) -> Iterator[Path]:
    """Yields a temporary local path, whose file replaces `path` when the block succeeds.

    A local file is written in the same directory, flushed to disk and renamed. A remote file is
    uploaded. If the block raises, the temporary file is removed and `path` keeps what it had.

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
            partial = Path(folder, f".{path.name}.partial")
            yield partial
            path.upload(partial)
        return
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        with partial.open("rb+") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: PathLike, text: str) -> None:
    """Writes a text file atomically, in UTF-8."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def append_line(path: AnyPath, line: str) -> None:
    """Appends a line to a text file. A remote one is written again: few stores can append."""
    if isinstance(path, RemotePath):
        text = path.read_text() if path.exists() else ""
        path.write_text(f"{text}{line}\n")
        return
    with path.open("a") as file:
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
