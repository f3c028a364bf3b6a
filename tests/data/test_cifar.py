"""A small archive in the official format is read without TensorFlow."""

import contextlib
import dataclasses
import functools
import hashlib
import http.server
import io
import socket
import sys
import tarfile
import threading
import time

import numpy as np
import pytest

from nonlocal_jax.data import cifar
from nonlocal_jax.data.cifar import ARCHIVES, DataError

RECORDS_PER_FILE = 7


def make_archive(folder, name="cifar10", truncate=0, missing=()):
    """Writes an archive of the official layout with random images.

    Returns:
        The description of the archive, and the records of each split.
    """
    archive = ARCHIVES[name]
    rng = np.random.default_rng(0)
    records = {}
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / archive.name, "w:gz") as tar:
        for split, names in archive.files.items():
            for file in names:
                size = (RECORDS_PER_FILE, archive.record_bytes)
                table = rng.integers(0, 256, size, dtype=np.uint8)
                label_size = (RECORDS_PER_FILE, archive.label_bytes)
                table[:, : archive.label_bytes] = rng.integers(0, 10, label_size)
                records.setdefault(split, []).append(table)
                if file not in missing:
                    content = table.tobytes()[: table.nbytes - truncate]
                    info = tarfile.TarInfo(file)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    content = (folder / archive.name).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    archive = dataclasses.replace(archive, size=len(content), sha256=digest)
    return archive, {split: np.concatenate(tables) for split, tables in records.items()}


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_every_pixel_and_label(name, tmp_path):
    archive, records = make_archive(tmp_path, name)
    for split, table in records.items():
        images = cifar.load(name, split, tmp_path, archive)
        assert images.num_classes == {"cifar10": 10, "cifar100": 100}[name]
        assert images.images.shape == (len(table), 32, 32, 3)
        # CIFAR-100 has a coarse and a fine label; the fine one is used.
        np.testing.assert_array_equal(images.labels, table[:, archive.label_bytes - 1])
        pixels = table[:, archive.label_bytes :]
        for n, y, x, c in ((0, 0, 0, 0), (3, 31, 0, 1), (5, 4, 17, 2), (6, 31, 31, 0)):
            # Red, green and blue are stored one after the other, row by row.
            assert images.images[n, y, x, c] == pixels[n, 1024 * c + 32 * y + x]


def test_record_files_are_enough(tmp_path):
    archive, _ = make_archive(tmp_path)
    first = cifar.load("cifar10", "train", tmp_path, archive)
    (tmp_path / archive.name).unlink()
    second = cifar.load("cifar10", "train", tmp_path, archive)
    np.testing.assert_array_equal(second.images, first.images)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "cifar10-test.array_record",
        "cifar10-train.array_record",
    ]
    assert "tensorflow" not in sys.modules


def test_the_official_checksums_are_those_of_tensorflow_datasets():
    from tensorflow_datasets.core.download import checksums
    from tensorflow_datasets.core.utils import resource_utils

    for name, archive in ARCHIVES.items():
        infos = checksums.load_url_infos(resource_utils.tfds_path(f"url_checksums/{name}.txt"))
        info = infos[archive.url]
        assert (info.checksum, info.size) == (archive.sha256, archive.size)


def test_other_archives_are_refused(tmp_path):
    archive, _ = make_archive(tmp_path)
    with pytest.raises(DataError, match=r"must be the official archive, 170,052,171 bytes; it has"):
        cifar.load("cifar10", "train", tmp_path)
    file = tmp_path / archive.name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(DataError, match=f"must have the SHA-256 {archive.sha256}; it has"):
        cifar.load("cifar10", "train", tmp_path, archive)
    assert [file.name for file in tmp_path.iterdir()] == [archive.name]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"truncate": 5}, "ends within a record of 3073 bytes"),
        ({"missing": ("cifar-10-batches-bin/test_batch.bin",)}, "cannot be read"),
    ],
)
def test_a_damaged_archive_leaves_no_partial_split(damage, message, tmp_path):
    archive, _ = make_archive(tmp_path, **damage)
    with pytest.raises(DataError, match=message):
        cifar.load("cifar10", "test", tmp_path, archive)
    assert not [*tmp_path.glob("*test*"), *tmp_path.glob(".*")]


def test_without_a_network_the_error_comes_at_once_and_says_what_to_do(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    start = time.monotonic()
    message = (
        r"www.cs.toronto.edu cannot be reached .* put cifar-10-binary.tar.gz, from https://.*, into"
    )
    with pytest.raises(DataError, match=message):
        cifar.load("cifar10", "train", tmp_path / "data")
    assert time.monotonic() - start < 10


@contextlib.contextmanager
def file_server(folder):
    """Serves a folder over HTTP and yields the address."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    handler.func.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_archive_is_downloaded_by_tensorflow_datasets_and_checked(tmp_path):
    archive, records = make_archive(tmp_path / "server")
    with file_server(tmp_path / "server") as address:
        served = dataclasses.replace(archive, url=f"{address}/{archive.name}")
        images = cifar.load("cifar10", "test", tmp_path / "data", served)
        np.testing.assert_array_equal(images.labels, records["test"][:, 0])
        wrong = dataclasses.replace(served, sha256="0" * 64)
        with pytest.raises(DataError, match="could not be downloaded"):
            cifar.load("cifar10", "test", tmp_path / "wrong", wrong)
    assert not list((tmp_path / "wrong").glob("*.array_record"))


def write_records(folder, records):
    from array_record.python.array_record_module import ArrayRecordWriter

    file = folder / "cifar10-train.array_record"
    writer = ArrayRecordWriter(str(file), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return file


GOOD = bytes(3073)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "must have a record for each image; it has none"),
        ([GOOD, bytes(3074)], "must have records of 3073 bytes; one has 3074"),
        ([GOOD, bytes([77]) + GOOD[1:]], "must have labels from 0 to 9; one is 77"),
        ([GOOD, bytes([10]) + GOOD[1:]], "must have labels from 0 to 9; one is 10"),
    ],
)
def test_record_files_with_wrong_records(records, message, tmp_path):
    file = write_records(tmp_path, records)
    message = f"{file} {message}. Delete the file to regenerate it from cifar-10-binary.tar.gz"
    with pytest.raises(DataError, match=message):
        cifar.load("cifar10", "train", tmp_path)
    write_records(tmp_path, [GOOD, bytes([9]) + GOOD[1:]])
    assert cifar.load("cifar10", "train", tmp_path).labels.tolist() == [0, 9]


@pytest.mark.parametrize("content", [b"", b"hello", bytes(200_000), "cut", "folder"])
def test_damaged_record_files(content, tmp_path):
    file = write_records(tmp_path, [GOOD])
    if content == "folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes(file.read_bytes()[:-5] if content == "cut" else content)
    message = f"{file} cannot be read as ArrayRecord: .+. Delete the file to regenerate it from"
    with pytest.raises(DataError, match=message):
        cifar.load("cifar10", "train", tmp_path)


def test_an_archive_that_cannot_be_unpacked(tmp_path):
    """Damaged where gzip has no checksum yet."""
    archive, _ = make_archive(tmp_path)
    content = bytearray((tmp_path / archive.name).read_bytes())
    content[3000:3100] = b"\xff" * 100
    (tmp_path / archive.name).write_bytes(bytes(content))
    archive = dataclasses.replace(archive, sha256=hashlib.sha256(content).hexdigest())
    with pytest.raises(DataError, match="cannot be read as the archive of https://"):
        cifar.load("cifar10", "train", tmp_path, archive)
