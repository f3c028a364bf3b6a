"""CIFAR-10 and CIFAR-100 from their official archives, without TensorFlow.

tensorflow-datasets downloads the archive and checks its SHA-256, but would prepare it with
TensorFlow (about 1.3 GB for the CPU build). So the archive is read here, once, into ArrayRecord
files that hold its records as they are: one byte per label, then 3 × 32 × 32 bytes of red, green
and blue. Nothing in it is run or unpickled.

Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images (2009);
https://www.cs.toronto.edu/~kriz/cifar.html.
"""

import dataclasses
import hashlib
import socket
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np

from nonlocal_jax import files
from nonlocal_jax.data import DataError
from nonlocal_jax.data.images import Images
from nonlocal_jax.data.toy_video import Split
from nonlocal_jax.lazy import extra

Name = Literal["cifar10", "cifar100"]
SIDE, CHANNELS = 32, 3
PIXELS = CHANNELS * SIDE * SIDE
CONNECTION_TIMEOUT = 5.0  # seconds
CHUNK = 1 << 20  # bytes
MAX_REASON = 200  # characters of an error of array_record that a message shows


@dataclasses.dataclass(frozen=True)
class Archive:
    """One official archive.

    Attributes:
        url: Where it is published.
        sha256: Checksum of the file, as tensorflow-datasets has it.
        size: Bytes of the file, likewise.
        files: Files of each split, in order.
        label_bytes: Bytes of a record before the pixels. The last of them is the label.
        num_classes: Number of classes.
    """

    url: str
    sha256: str
    size: int
    files: dict[Split, tuple[str, ...]]
    label_bytes: int
    num_classes: int

    @property
    def name(self) -> str:
        """Name of the file."""
        return Path(urlsplit(self.url).path).name

    @property
    def record_bytes(self) -> int:
        """Bytes of a record."""
        return self.label_bytes + PIXELS


ARCHIVES: dict[Name, Archive] = {
    "cifar10": Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        170_052_171,
        {
            "train": tuple(f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6)),
            "test": ("cifar-10-batches-bin/test_batch.bin",),
        },
        label_bytes=1,
        num_classes=10,
    ),
    "cifar100": Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        168_513_733,
        {"train": ("cifar-100-binary/train.bin",), "test": ("cifar-100-binary/test.bin",)},
        label_bytes=2,  # coarse, fine
        num_classes=100,
    ),
}


def load(name: Name, split: Split, folder: Path, archive: Archive | None = None) -> Images:
    """Loads one split into memory.

    It is read from the record files in `folder`. If they are missing, they are made from the
    archive in `folder`, and if that is missing too, it is downloaded first.

    Args:
        name: "cifar10" or "cifar100".
        split: "train" (50,000 images) or "test" (10,000).
        folder: Folder of the data. About 180 MB are written to it.
        archive: Another archive of the same format. Defaults to the official one.

    Raises:
        DataError: The folder has no data and the server cannot be reached, the archive is not the
            official one, or a file is damaged.
        ImportError: array_record is not installed or, for the download, tensorflow-datasets.
    """
    archive = archive or ARCHIVES[name]
    records = folder / f"{name}-{split}.array_record"
    if not records.exists():
        if not (folder / archive.name).exists():
            _download(name, archive, folder)
        prepare(name, folder, archive)
    return _read(records, archive)


def prepare(name: Name, folder: Path, archive: Archive | None = None) -> None:
    """Writes the archive in `folder` as `<name>-<split>.array_record`, atomically.

    Raises:
        DataError: The archive is not the official one or is damaged.
    """
    with extra("experiments"):
        from array_record.python.array_record_module import ArrayRecordWriter

    archive = archive or ARCHIVES[name]
    file = folder / archive.name
    _check(file, archive)
    for split in archive.files:
        with files.atomic_write(folder / f"{name}-{split}.array_record") as partial:
            # One record per group, so that a reader can fetch each alone.
            writer = ArrayRecordWriter(str(partial), "group_size:1")
            for record in _records(file, archive, split):
                writer.write(record)
            writer.close()


def _check(file: Path, archive: Archive) -> None:
    size = file.stat().st_size
    if size != archive.size:
        raise DataError(
            f"{file} must be the official archive, {archive.size:,} bytes; it has {size:,}. "
            f"Download {archive.url} again."
        )
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != archive.sha256:
        raise DataError(
            f"{file} must have the SHA-256 {archive.sha256}; it has {digest.hexdigest()}. "
            f"Download {archive.url} again."
        )


def _records(file: Path, archive: Archive, split: Split) -> Iterator[bytes]:
    size = archive.record_bytes
    try:
        with tarfile.open(file, "r:gz") as tar:
            for name in archive.files[split]:
                member = tar.extractfile(name)
                if member is None:
                    raise DataError(f"{file}: {name} is not a file.")
                while record := member.read(size):
                    if len(record) != size:
                        raise DataError(f"{file}: {name} ends within a record of {size} bytes.")
                    yield record
    except (tarfile.TarError, zlib.error, EOFError, KeyError, OSError) as error:
        raise DataError(
            f"{file} cannot be read as the archive of {archive.url}: {error}."
        ) from error


def _read(file: Path, archive: Archive) -> Images:
    remedy = f"Delete the file to regenerate it from {archive.name}."
    try:
        records = _read_records(file)
    except (RuntimeError, ValueError, IndexError, OSError) as error:  # of array_record
        reason = str(error).split(";")[0][:MAX_REASON]
        raise DataError(f"{file} cannot be read as ArrayRecord: {reason}. {remedy}") from error
    size = archive.record_bytes
    if not records:
        raise DataError(f"{file} must have a record for each image; it has none. {remedy}")
    if wrong := [len(record) for record in records if len(record) != size]:
        raise DataError(f"{file} must have records of {size} bytes; one has {wrong[0]}. {remedy}")
    table = np.frombuffer(b"".join(records), np.uint8).reshape(-1, size)
    planes = table[:, archive.label_bytes :].reshape(-1, CHANNELS, SIDE, SIDE)
    labels = table[:, archive.label_bytes - 1].astype(np.int32)
    if labels.max() >= archive.num_classes:
        raise DataError(
            f"{file} must have labels from 0 to {archive.num_classes - 1}; one is {labels.max()}. "
            f"{remedy}"
        )
    return Images(np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels, archive.num_classes)


def _read_records(file: Path) -> list[bytes]:
    with extra("experiments"):
        from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(file))
    try:
        records: list[bytes] = reader.read_all()
    finally:
        reader.close()  # raises the same error again
    return records


def _download(name: Name, archive: Archive, folder: Path) -> None:
    server: Any = urlsplit(archive.url)
    # Without a network tensorflow-datasets would retry for minutes, so the server is tried first.
    try:
        address = (server.hostname, server.port or 443)
        socket.create_connection(address, timeout=CONNECTION_TIMEOUT).close()
    except OSError as error:
        raise DataError(
            f"{name} is not in {folder}, and {server.hostname} cannot be reached ({error}). "
            f"Either go online to have it downloaded, or put {archive.name}, from {archive.url}, "
            f"into {folder}."
        ) from error
    with extra("experiments"):
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core.download.checksums import UrlInfo

    folder.mkdir(parents=True, exist_ok=True)
    info = UrlInfo(size=archive.size, checksum=archive.sha256, filename=archive.name)
    manager = tfds.download.DownloadManager(
        download_dir=folder / "downloads",
        dataset_name=name,
        url_infos={archive.url: info},
        force_checksums_validation=True,
    )
    try:
        downloaded = manager.download(archive.url)
    except Exception as error:  # errors of requests, and of the checksum, share no other class
        raise DataError(f"{archive.url} could not be downloaded: {error}") from error
    Path(downloaded).replace(folder / archive.name)
