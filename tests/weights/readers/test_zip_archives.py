"""Zip archives with a directory that does not match their members are refused."""

import io
import struct

import numpy as np
from weights import forge

from nonlocal_jax.weights import UnsafeFileError


def patched(file, member, offset, value):
    """Changes the entry of a member in the zip directory."""
    position = file.rindex(b"PK\1\2", 0, file.rindex(member)) + offset
    return file[:position] + value + file[position + len(value) :]


def test_inconsistent_directories(refused):
    file = forge.torch_archive(extra=[("archive/copy", b"x")])
    start = struct.pack("<I", file.index(b"PK\3\4", 10))
    refused(
        patched(file, b"archive/copy", 42, start), UnsafeFileError, match="overlaps the next member"
    )
    refused(
        patched(file, b"archive/copy", 42, struct.pack("<I", 5)),
        UnsafeFileError,
        match="overlaps the next member",
    )
    refused(patched(file, b"archive/copy", 8, b"\1"), match="is encrypted")
    refused(
        patched(file, b"archive/copy", 24, struct.pack("<I", 2)),
        UnsafeFileError,
        match="expands from 1 to 2 bytes",
    )
    long = struct.pack("<I", 2**31)
    refused(
        file[:-10] + long + file[-6:],
        UnsafeFileError,
        match="its zip directory has 2147483648 bytes",
    )


def test_member_names_are_unique(refused):
    file = forge.torch_archive(extra=[("archive/data/x", b"24")])
    refused(
        file.replace(b"archive/data/x", b"archive/data/0"),
        UnsafeFileError,
        match="several members of the same name",
    )


def test_archives_of_other_programs(refused):
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(3))
    refused(buffer.getvalue(), match="torch.save did not write: it has no data.pkl, but 'a.npy'")
    refused(b"PK\5\6" + bytes(18), match="torch.save did not write")
