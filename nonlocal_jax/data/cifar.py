"""CIFAR-10 and CIFAR-100 from their official archives, without TensorFlow.

tensorflow-datasets would prepare them with TensorFlow (about 1.3 GB for the CPU build), which this file does not need: it
takes from it what fetches the archive and knows its SHA-256, and reads the archive itself, once, into ArrayRecord files of the
archive's own records: one byte a label, then 3 × 32 × 32 bytes of red, green and blue. Nothing in it is run or unpickled.

Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images (2009); https://www.cs.toronto.edu/~kriz/cifar.html.
"""

import dataclasses
import hashlib
import os
import socket
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np

from nonlocal_jax.data import DataError
from nonlocal_jax.data.images import Images
from nonlocal_jax.data.toy_video import Split

Name = Literal["cifar10", "cifar100"]
SIDE, CHANNELS = 32, 3
PIXELS = CHANNELS * SIDE * SIDE
PATIENCE = 5.0  # seconds to reach the server
CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Archive:
    """One official archive.

    Attributes:
        url: where it is.
        sha256, size: of the file, as tensorflow-datasets has them.
        files: of each split, in order.
        label_bytes: of a record; the last one is the label.
        num_classes: of the labels.
    """

    url: str
    sha256: str
    size: int
    files: dict[Split, tuple[str, ...]]
    label_bytes: int
    num_classes: int

    @property
    def name(self) -> str:
        """Of the file."""
        return Path(urlsplit(self.url).path).name


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
    """One split in memory: from the records in `folder`, else from the archive in it, else from the archive fetched into it.

    Args:
        name: "cifar10" or "cifar100".
        split: "train" (50,000 images) or "test" (10,000).
        folder: of the data; about 180 MB are written to it.
        archive: another archive of the same format; None is the official one.

    Raises:
        DataError: there is nothing in the folder and the server cannot be reached; the archive is not the official one, or
            is damaged.
        ImportError: array_record (or, to fetch, tensorflow-datasets) is not installed.
    """
    archive = archive or ARCHIVES[name]
    records = folder / f"{name}-{split}.array_record"
    if not records.exists():
        if not (folder / archive.name).exists():
            _fetch(name, archive, folder)
        prepare(name, folder, archive)
    return _read(records, archive)


def prepare(name: Name, folder: Path, archive: Archive | None = None) -> None:
    """Read the archive in `folder` into `<name>-<split>.array_record`, whole or not at all.

    Raises:
        DataError: as `load`.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    archive = archive or ARCHIVES[name]
    file = folder / archive.name
    _check(file, archive)
    for split in archive.files:
        handle, partial = tempfile.mkstemp(prefix=f".{name}-{split}-", dir=folder)
        os.close(handle)
        try:
            writer = ArrayRecordWriter(partial, "group_size:1")
            for record in _records(file, archive, split):
                writer.write(record)
            writer.close()
            Path(partial).replace(folder / f"{name}-{split}.array_record")
        finally:
            Path(partial).unlink(missing_ok=True)


def _check(file: Path, archive: Archive) -> None:
    size = file.stat().st_size
    if size != archive.size:
        raise DataError(
            f"{file} must be the official archive, {archive.size:,} bytes; it has {size:,}. Fetch {archive.url} again."
        )
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != archive.sha256:
        raise DataError(
            f"{file} must have the SHA-256 {archive.sha256}; it has {digest.hexdigest()}. Fetch {archive.url} again."
        )


def _records(file: Path, archive: Archive, split: Split) -> Iterator[bytes]:
    size = archive.label_bytes + PIXELS
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
    except (tarfile.TarError, EOFError, KeyError, OSError) as error:
        raise DataError(
            f"{file} cannot be read as the archive of {archive.url}: {error}."
        ) from error


def _read(file: Path, archive: Archive) -> Images:
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(file))
    try:
        records = reader.read_all()
    finally:
        reader.close()
    size = archive.label_bytes + PIXELS
    if wrong := [len(record) for record in records if len(record) != size]:
        raise DataError(
            f"{file} must have records of {size} bytes; one has {wrong[0]}. Delete it, to make it anew."
        )
    table = np.frombuffer(b"".join(records), np.uint8).reshape(-1, size)
    planes = table[:, archive.label_bytes :].reshape(-1, CHANNELS, SIDE, SIDE)
    labels = table[:, archive.label_bytes - 1].astype(np.int32)
    return Images(np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels, archive.num_classes)


def _fetch(name: Name, archive: Archive, folder: Path) -> None:
    """By tensorflow-datasets, which retries for minutes without a network: so try to reach the server first."""
    server: Any = urlsplit(archive.url)
    try:
        socket.create_connection((server.hostname, server.port or 443), timeout=PATIENCE).close()
    except OSError as error:
        raise DataError(
            f"{name} is not in {folder}, and {server.hostname} cannot be reached ({error}). Either go online, and it is "
            f"fetched; or put {archive.name}, from {archive.url}, into {folder}."
        ) from error
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
    except Exception as error:  # of requests, of the checksum
        raise DataError(f"{archive.url} could not be fetched: {error}") from error
    Path(downloaded).replace(folder / archive.name)
