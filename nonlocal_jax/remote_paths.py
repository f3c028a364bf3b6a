"""Files and folders at URLs, such as gs://bucket/folder/file, with the methods of `pathlib.Path`.

They are reached through fsspec, which requires a package for each protocol, such as gcsfs for gs://
and s3fs for s3://. This is not `etils.epath`, because that knows four protocols only, and depends
on whether TensorFlow is installed.
"""

import contextlib
import errno
import fnmatch
import functools
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

# At least two letters, since C:// is a drive of Windows.
URL = re.compile(r"(?P<protocol>[A-Za-z][A-Za-z0-9+.:-]+)://(?P<rest>.*)", re.DOTALL)
WITHOUT_FOLDERS = ("http", "https")  # protocols that cannot list a folder reliably
ORBAX_PROTOCOLS = ("gs",)  # where Orbax 0.11 to 0.12 reads and writes arrays

# File systems may raise these without an error number.
ERROR_NUMBERS: dict[type[Exception], int] = {
    FileNotFoundError: errno.ENOENT,
    FileExistsError: errno.EEXIST,
    IsADirectoryError: errno.EISDIR,
    NotADirectoryError: errno.ENOTDIR,
    PermissionError: errno.EACCES,
}


class Stat(NamedTuple):
    """The part of `os.stat_result` that remote files have.

    Attributes:
        st_size: Size in bytes.
    """

    st_size: int


class RemotePath:
    """A file or folder at a URL, with the methods of `pathlib.Path` that the library uses.

    Paths are normalised: `..` and repeated slashes are removed. The class is not an `os.PathLike`,
    so functions for local files raise an error instead of looking for a local folder "gs:".

    Every method raises `OSError` with the URL if the file system cannot be reached or refuses.

    >>> folder = RemotePath("memory://bucket/videos")
    >>> file = folder / "../lists/train.txt"
    >>> file, file.name, file.parent.name
    (RemotePath('memory://bucket/lists/train.txt'), 'train.txt', 'lists')
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
            ValueError: This is not a URL, or its protocol is unknown.
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
        if size is None:  # a web server may not report it
            size = len(self.read_bytes())
        return Stat(int(size))

    def iterdir(self) -> Iterator["RemotePath"]:
        """Yields the files and folders in a folder, as they are now."""
        with _os_errors(self):
            file_system, path = _open_file_system(self)
            file_system.invalidate_cache(path)  # other hosts may have written files since
            entries = file_system.ls(path, detail=False)
        for entry in entries:
            name = entry.rstrip("/")
            if name != path.rstrip("/"):  # object stores may list the folder itself
                yield self / name.rsplit("/", 1)[-1]

    def glob(self, pattern: str) -> Iterator["RemotePath"]:
        """Yields the files and folders in a folder whose names match a pattern."""
        return (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Creates the folder and, always, those above it, where the protocol has folders."""
        with _os_errors(self):
            file_system, path = _open_file_system(self)
            file_system.makedirs(path, exist_ok=exist_ok)

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
        """Replaces the file by a local one.

        In an object store, readers see the old file or the new one, never a part of it.
        """
        with _os_errors(self):
            file_system, path = _open_file_system(self)
            file_system.put_file(str(file), path)


def orbax_can_use(folder: Path | RemotePath) -> bool:
    """Whether Orbax can read and write arrays in a folder."""
    return isinstance(folder, Path) or folder.protocol in ORBAX_PROTOCOLS


def is_protocol(name: str) -> bool:
    """Whether fsspec knows a protocol, for which a package may be missing."""
    from fsspec.registry import known_implementations

    return name.lower() in known_implementations


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
    """Returns the file system, which fsspec caches, and the path in it."""
    import fsspec

    return fsspec.url_to_fs(str(path))


@contextlib.contextmanager
def _os_errors(path: RemotePath) -> Iterator[None]:
    """Converts every error of a file system to an `OSError` with the URL."""
    try:
        yield
    except Exception as error:  # each package has its own classes of errors
        number = getattr(error, "errno", None)
        if not isinstance(number, int):
            number = ERROR_NUMBERS.get(type(error), errno.EIO)
        reason = f"{type(error).__name__}: {error!s:.300}"
        if type(error) in ERROR_NUMBERS:
            reason = os.strerror(number)
        raise OSError(number, reason, str(path)) from error
