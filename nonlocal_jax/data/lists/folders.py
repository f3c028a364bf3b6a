"""Where the files that a list names are looked up."""

import dataclasses
import functools
import os
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

from nonlocal_jax.files import AnyPath, as_path
from nonlocal_jax.remote_paths import WITHOUT_FOLDERS, RemotePath

# The order in which files of the same name are preferred.
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


class LineError(Exception):
    """A line of a list cannot be used.

    Attributes:
        can_be_left_out: Whether the option `leave_out` may skip the line.
    """

    def __init__(self, message: str, *, can_be_left_out: bool = False) -> None:
        super().__init__(message)
        self.can_be_left_out = can_be_left_out


@dataclasses.dataclass(frozen=True)
class Listing:
    """Names of the entries of a folder.

    Attributes:
        names: The names as they are stored.
    """

    names: frozenset[str]

    @functools.cached_property
    def by_normal_form(self) -> dict[str, str]:
        """Each name by its Unicode normal form."""
        return {normal_form(name): name for name in sorted(self.names, reverse=True)}

    @functools.cached_property
    def by_stem(self) -> dict[str, str]:
        """Each video by its name without the suffix, in Unicode normal form."""
        videos = [name for name in sorted(self.names) if is_video(name)]
        # The last one is kept, which has the most common suffix.
        videos.sort(key=lambda name: -VIDEO_SUFFIXES.index(suffix(name)))
        return {normal_form(Path(name).stem): name for name in videos}


@dataclasses.dataclass(frozen=True)
class Folders:
    """Where the paths of a list are looked up.

    Attributes:
        list_folder: Folder of the list, which paths are relative to unless there is a root.
        root: Folder that paths are relative to and must lie in; None allows any place.
        listings: Entries of each folder that was listed so far.
    """

    list_folder: AnyPath
    root: AnyPath | None
    listings: dict[AnyPath, Listing] = dataclasses.field(default_factory=dict)

    def file(self, name: str) -> AnyPath:
        """Returns the file that a path in the list names, which need not exist.

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
        return file.name in self.listing(file.parent).names

    def listing(self, folder: AnyPath) -> Listing:
        """Lists a folder once. One that is missing, or cannot be listed, has no entries."""
        if folder not in self.listings:
            self.listings[folder] = Listing(frozenset(_entries(folder)))
        return self.listings[folder]

    def find(self, name: str) -> AnyPath:
        """Returns the file that a path in the list names.

        If there is none, and the path has letters outside of ASCII, it may be stored with another
        normal form of Unicode: macOS decomposes "é" into "e" and an accent, other systems do not.

        Raises:
            LineError: The name cannot be a path, or lies outside the root.
        """
        file = self.file(name)
        return file if name.isascii() or self.has(file) else self._stored(file)

    def _stored(self, path: AnyPath) -> AnyPath:
        """Returns a path as the folders on disk spell it, as far as they have it."""
        if str(path).isascii() or path.parent == path:
            return path
        folder = self._stored(path.parent)
        listing = self.listing(folder)
        if path.name in listing.names:
            return folder / path.name
        return folder / listing.by_normal_form.get(normal_form(path.name), path.name)

    def video(self, stems: Sequence[str]) -> AnyPath:
        """Returns the first video that exists, whatever its suffix.

        Args:
            stems: Possible paths, without suffixes. If none exists, the first is returned as .mp4.
        """
        candidates = [self.file(f"{stem}.mp4") for stem in stems]
        for candidate in candidates:
            if self.has(candidate):
                return candidate
        for candidate in candidates:
            folder = self._stored(candidate.parent)
            name = self.listing(folder).by_stem.get(normal_form(candidate.stem))
            if name is not None:
                return folder / name
        return candidates[0]


def _entries(folder: AnyPath) -> list[str]:
    if isinstance(folder, RemotePath) and folder.protocol in WITHOUT_FOLDERS:
        return []
    try:
        return [entry.name for entry in folder.iterdir()]
    except FileNotFoundError:
        return []
    except OSError:
        if isinstance(folder, RemotePath):
            raise
        return []


def lies_in(file: AnyPath, folder: AnyPath) -> bool:
    """Whether a file is in a folder; a local one is never in a remote one."""
    if isinstance(file, RemotePath):
        return isinstance(folder, RemotePath) and file.is_relative_to(folder)
    return isinstance(folder, Path) and file.is_relative_to(folder)


def plain_path(path: AnyPath) -> AnyPath:
    """Makes a path absolute and removes `..`. Links are kept, since data sets are often links."""
    if isinstance(path, RemotePath):
        return path
    return Path(os.path.normpath(path.absolute()))


def is_file(path: Path) -> bool:
    """Whether a file exists. A name that is too long, or a closed folder, is no error."""
    return is_kind(path, Path.is_file)


def is_kind(path: Path, test: Callable[[Path], bool]) -> bool:
    """Whether `test`, such as `Path.is_dir`, is true of a path and raises no error."""
    try:
        return test(path)
    except OSError:
        return False


def suffix(name: str) -> str:
    """Returns the suffix of a file name in lower case."""
    return Path(name).suffix.lower()


def is_video(name: str) -> bool:
    """Whether a file name has the suffix of a video."""
    return suffix(name) in VIDEO_SUFFIXES


def normal_form(name: str) -> str:
    """Returns a name in the Unicode normal form NFC, in which names are compared."""
    return unicodedata.normalize("NFC", name)
