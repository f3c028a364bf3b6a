"""Zip archives whose directory is checked before any member is read.

No member may overlap another, have the name of another, lie outside the archive, or expand far
beyond its stored size.
"""

import io
import struct
import zipfile
import zlib

from nonlocal_jax.terminal import printable
from nonlocal_jax.weights.readers.errors import FileFormatError, UnsafeFileError

ZIP_MAGIC = (b"PK\3\4", b"PK\5\6")
MAX_MEMBERS = 100_000
MAX_DIRECTORY_BYTES = 16 << 20
MAX_EXPANSION = 100  # of deflated members; torch itself does not compress


class ZipArchive:
    """A zip archive in an open file of `size` bytes.

    Raises:
        FileFormatError: The archive is damaged, truncated, encrypted or compressed by another
            method than deflate.
        UnsafeFileError: The directory is inconsistent, or a member is larger than its size in the
            file explains.
    """

    def __init__(self, file: io.BufferedIOBase, size: int) -> None:
        directory_start = _directory_start(file, size)
        try:
            self.archive = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
            raise FileFormatError(
                f"its zip directory is damaged ({printable(error):.100})."
            ) from error
        members = self.archive.infolist()
        if self.archive.start_dir != directory_start or len(members) > MAX_MEMBERS:
            raise UnsafeFileError(
                f"its zip directory is inconsistent, or has more than {MAX_MEMBERS} members."
            )
        end = directory_start
        for member in sorted(members, key=lambda member: member.header_offset, reverse=True):
            _check_member(member)
            _check_position(file, member, end)
            end = member.header_offset
        self.members = {member.filename: member for member in members}
        if len(self.members) < len(members):
            raise UnsafeFileError("its zip archive has several members of the same name.")

    def __contains__(self, name: str) -> bool:
        return name in self.members

    def read(self, name: str, max_bytes: int) -> bytes:
        """Reads a member of at most `max_bytes`."""
        member = self.members.get(name)
        if member is None:
            raise FileFormatError(f"its zip archive lacks {name!a:.100}.")
        if member.file_size > max_bytes:
            raise UnsafeFileError(
                f"{name!a:.100} has {member.file_size} bytes in its zip archive; "
                f"expected at most {max_bytes}."
            )
        try:
            with self.archive.open(member) as stream:
                content = stream.read(member.file_size)
        except (
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            NotImplementedError,
            RuntimeError,
            ValueError,
        ) as error:
            raise FileFormatError(
                f"{name!a:.100} is damaged in its zip archive ({printable(error):.100}). "
                "Download it again."
            ) from error
        if len(content) != member.file_size:
            raise FileFormatError(
                f"{name!a:.100} must have {member.file_size} bytes in its zip archive; "
                f"it has {len(content)}."
            )
        return content


def _directory_start(file: io.BufferedIOBase, size: int) -> int:
    """Returns the position at which the directory starts.

    The last 22 bytes of the archive say it, or the last 98 in zip64. The zipfile module would read
    a directory of any size into memory, so its size is checked here first.
    """
    file.seek(max(0, size - 98))
    tail = file.read().rjust(98, b"\0")
    if tail[76:80] != b"PK\5\6":
        raise FileFormatError(
            "truncated: a zip archive ends with its directory, and this file does not. "
            "Download it again."
        )
    length, end = int.from_bytes(tail[88:92], "little"), size - 22
    if tail[:4] == b"PK\6\6" and tail[56:60] == b"PK\6\7":
        length, end = int.from_bytes(tail[40:48], "little"), size - 98
    limit = min(end, MAX_DIRECTORY_BYTES)
    if length > limit:
        raise UnsafeFileError(f"its zip directory has {length} bytes; expected at most {limit}.")
    return end - length


def _check_member(member: zipfile.ZipInfo) -> None:
    """Checks the name, the compression and the declared sizes of a member."""
    name = member.orig_filename
    if name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
        raise UnsafeFileError(f"its zip archive has a member outside it, {name!a:.100}.")
    is_encrypted = member.flag_bits & 1
    is_stored = member.compress_type == zipfile.ZIP_STORED
    if is_encrypted or not (is_stored or member.compress_type == zipfile.ZIP_DEFLATED):
        raise FileFormatError(
            f"{name!a:.100} in its zip archive is encrypted, "
            "or compressed by a method that torch cannot read."
        )
    if member.file_size > member.compress_size * (1 if is_stored else MAX_EXPANSION):
        raise UnsafeFileError(
            f"{name!a:.100} in its zip archive expands "
            f"from {member.compress_size} to {member.file_size} bytes."
        )


def _check_position(file: io.BufferedIOBase, member: zipfile.ZipInfo, end: int) -> None:
    """Checks that a member starts where the directory says, and ends before the byte `end`."""
    file.seek(max(0, member.header_offset))
    header = file.read(30).ljust(30, b"\0")
    name_bytes = int.from_bytes(header[26:28], "little")
    extra_bytes = int.from_bytes(header[28:30], "little")
    start = member.header_offset + 30 + name_bytes + extra_bytes
    if member.header_offset < 0 or header[:4] != b"PK\3\4" or start + member.compress_size > end:
        raise UnsafeFileError(
            f"{member.orig_filename!a:.100} overlaps the next member of its zip archive, "
            "or does not start where the directory says."
        )
