"""Formats: supported ones are read, others are described, and damage raises an error."""

import errno
import gzip
import os
import pickle
import random
import re
import zipfile
from collections import OrderedDict
from unittest.mock import Mock

import numpy as np
import pytest
import safetensors.numpy
from weights import forge, samples
from weights.forge import mapping, number, whole

from nonlocal_jax.weights import FileFormatError, UnsafeFileError, read
from nonlocal_jax.weights.readers import checkpoint_files

ARRAYS = forge.example()


GOOD = {
    **{f"caffe2 {protocol}": pickle.dumps({"blobs": ARRAYS}, protocol) for protocol in range(6)},
    **{f"caffe2 by Python 2, {protocol}": forge.python2(ARRAYS, protocol) for protocol in (0, 2)},
    "caffe2 without blobs": pickle.dumps(OrderedDict(ARRAYS)),
    "torch": forge.zip_of(ARRAYS),
    "torch deflated": forge.zip_of(ARRAYS, compression=zipfile.ZIP_DEFLATED),
    "torch legacy": forge.legacy_of(ARRAYS),
    "safetensors": safetensors.numpy.save(ARRAYS),
}


@pytest.mark.parametrize("case", GOOD)
def test_every_format_is_read(case, opened):
    checkpoint = opened(GOOD[case])
    assert checkpoint.format == case.split()[0]
    assert checkpoint.ignored == {}
    samples.assert_arrays(checkpoint.arrays, ARRAYS)


def test_max_bytes_counts_an_array_once_for_each_name(opened, refused):
    shared = pickle.dumps(dict.fromkeys("abcdefghij", np.ones(1000)))
    opened(shared, max_bytes=80_000)
    refused(
        shared,
        UnsafeFileError,
        match="its arrays would take 80000 bytes, over max_bytes=79999",
        max_bytes=79_999,
    )
    refused(
        shared,
        UnsafeFileError,
        match="its pickle would take 8[0-9]{3} bytes, over max_bytes=8000",
        max_bytes=8_000,
    )
    opened(forge.zip_of(ARRAYS), max_bytes=44)
    refused(
        forge.zip_of(ARRAYS),
        UnsafeFileError,
        match="its tensors would take 44 bytes, over max_bytes=43",
        max_bytes=43,
    )
    refused(
        safetensors.numpy.save(ARRAYS), UnsafeFileError, match="over max_bytes=100", max_bytes=100
    )


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "it is empty. Supported are"),
        (b"<!DOCTYPE html><html>", "looks like a web page"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid",
            "a pointer of Git LFS; `git lfs pull`",
        ),
        (
            b"layer,mean\nconv1,0.5\n" * 9,
            re.escape("text that starts with 'layer,mean\\nconv1,0.5\\nlayer,mean\\nconv1,0.'"),
        ),
        (gzip.compress(b"x", mtime=0), "compressed with gzip; decompress it first"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "looks like HDF5"),
        (b"\x93NUMPY\x01\0", "a NumPy .npy file"),
        (b"sys_info".ljust(257, b"\0") + b"ustar", "a tar archive of torch before 0.2"),
        (
            b"\0\1\2\3\xff\xfe\xfd\xfc",
            "an unknown format that starts with the bytes 00 01 02 03 ff fe fd fc",
        ),
        (b"PK\3\4" + bytes(200), "truncated: a zip archive ends with its directory"),
        (b"(dp0\nS'\\q'\nNs.", "its pickle is damaged .DeprecationWarning: invalid escape"),
        (b"\xff\xfe\xfd", "an unknown format that starts with the bytes ff fe fd"),
        (whole(b"]"), "a pickle of list of 0; expected a dict of arrays"),
        (whole(b"}"), "it holds no weights, but nothing"),
        (
            whole(mapping({"a": number(1)})),
            re.escape("it holds no weights, but 'a' (not weights: int)"),
        ),
        (whole(mapping({"a": number(1)})[:-1] + b"a"), "its pickle is damaged"),
        (forge.zipped(b"]", {}), "torch.save was given list of 0; expected a state dict"),
        (forge.zipped(b"K\1", {}), "torch.save was given int"),
        (
            forge.zipped(mapping({"epoch": number(1)}), {}),
            re.escape("it holds no weights, but 'epoch' (not weights: int)"),
        ),
    ],
)
def test_unsupported_files_are_described(content, match, refused):
    refused(content, match=match)


def test_unsupported_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileFormatError, match="pipe: it is neither a file nor a folder"):
        read(tmp_path / "pipe")


def test_errors_of_the_file_system_name_the_file(tmp_path, monkeypatch):
    file = tmp_path / "weights.bin"
    file.write_bytes(GOOD["torch"])
    failure = OSError(errno.EIO, os.strerror(errno.EIO))  # as reading from an open file raises it
    monkeypatch.setattr(checkpoint_files, "read_torch", Mock(side_effect=failure))
    with pytest.raises(OSError, match=rf"Input/output error: '{file}'"):
        read(file)


def test_file_names_are_escaped(tmp_path):
    file = tmp_path / "a\x1b[2J.pth"
    file.write_bytes(b"")
    with pytest.raises(FileFormatError, match=r"/a\\x1b\[2J\.pth: it is empty"):
        read(file)


def damaged(file):
    """Yields the file truncated at 80 places, then with one to three bytes changed, 250 times."""
    rng = random.Random(len(file))
    for n in range(80):
        yield file[: len(file) * n // 80]
    for _ in range(250):
        changed = bytearray(file)
        for _ in range(rng.randint(1, 3)):
            position = rng.randrange(min(len(file), rng.choice([64, 10**6])))
            changed[position] = rng.choice([0, 1, 46, 128, 255, rng.randrange(256)])
        yield bytes(changed)


@pytest.mark.parametrize("case", GOOD)
def test_damage_gives_an_error_that_names_the_file(case, opened):
    refusals = successes = 0
    for file in damaged(GOOD[case]):
        try:
            opened(file)
        except (FileFormatError, UnsafeFileError) as error:
            refusals += "weights.bin: " in str(error)
        else:
            successes += 1
    assert refusals > 100
    assert refusals + successes == 330
