"""Reading a file of weights in any supported format, recognised by its content."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from nonlocal_jax import files
from nonlocal_jax.files import AnyPath, PathLike
from nonlocal_jax.remote_paths import RemotePath
from nonlocal_jax.terminal import printable
from nonlocal_jax.weights.readers.caffe2_pickles import is_pickle, read_caffe2
from nonlocal_jax.weights.readers.errors import FileFormatError, UnsafeFileError
from nonlocal_jax.weights.readers.orbax_folders import read_orbax
from nonlocal_jax.weights.readers.safetensors_files import is_safetensors, read_safetensors
from nonlocal_jax.weights.readers.torch_files import is_torch, read_torch
from nonlocal_jax.weights.readers.values import Contents, check_size

Format = Literal["caffe2", "torch", "safetensors", "orbax"]

SUPPORTED = (
    "Supported are pickles of Caffe2, files of torch.save, safetensors files and folders of Orbax."
)
WEB_PAGE = "a web page; did the download ask to log in, or to confirm?"
# What an unsupported file is, by the bytes with which it starts.
FOREIGN_FORMATS = {
    b"version https://git-lfs": "a pointer of Git LFS; `git lfs pull` downloads the file",
    b"<!doctype html": WEB_PAGE,
    b"<html": WEB_PAGE,
    b"\x1f\x8b": "compressed with gzip; decompress it first",
    b"BZh": "compressed with bzip2; decompress it first",
    b"\xfd7zXZ": "compressed with xz; decompress it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; decompress it first",
    b"\x89hdf\r\n": "HDF5",
    b"\x93numpy": "a NumPy .npy file",
}
HEAD_BYTES = 1024  # from which the format is recognised


@dataclass(frozen=True)
class Checkpoint:
    """The weights in a file, under the names that the file has for them.

    Attributes:
        path: The file or folder.
        format: The format that its content showed.
        arrays: The weights in the order of the file, read-only.
        ignored: Every other entry of the file, with the reason why it is ignored.
        configuration: Text of the training configuration in the file; "" if there is none.
    """

    path: AnyPath
    format: Format
    arrays: dict[str, np.ndarray]
    ignored: dict[str, str]
    configuration: str = ""


def read(path: PathLike, *, max_bytes: int = 8 << 30) -> Checkpoint:
    """Reads the weights in a file without executing anything that the file asks for.

    Every error names the file. Control characters in it are escaped.

    Args:
        path: A pickle of Caffe2, a file of `torch.save`, a safetensors file, or a folder that Orbax
            wrote. Of a training state in such a folder, only the variables are read. A remote file,
            such as gs://bucket/file, is copied to a temporary local one. Nothing outside the file
            or folder is read.
        max_bytes: Limit of what the weights may take in memory, in bytes. They may also take no
            more than 32 times the size of the file, or 16 MiB if that is more. That limit is not
            checked for remote folders.

    Returns:
        The arrays by name, and why each other entry is ignored.

    Raises:
        OSError: The path cannot be read; a `FileNotFoundError` if it does not exist.
        FileFormatError: The file is damaged, of an unsupported format, or without weights.
        UnsafeFileError: The file asks for code, for files outside its folder, or for more memory
            or work than `max_bytes` or its size explain.

    >>> import pickle, pathlib, tempfile, numpy as np
    >>> path = pathlib.Path(tempfile.mkdtemp(), "weights.pkl")
    >>> blobs = {"conv1_w": np.ones((2, 3), np.float32), "lr": 0.01}
    >>> _ = path.write_bytes(pickle.dumps({"blobs": blobs}))
    >>> checkpoint = read(path)
    >>> checkpoint.format, checkpoint.arrays["conv1_w"].shape, checkpoint.ignored
    ('caffe2', (2, 3), {'lr': 'training state'})
    """
    path = files.as_path(path)
    try:
        file_format, (arrays, ignored), configuration = _read(path, max_bytes)
        if not arrays:
            entries = [f"{name!a:.40} ({reason})" for name, reason in list(ignored.items())[:8]]
            raise FileFormatError(f"it holds no weights, but {', '.join(entries) or 'nothing'}.")
    except (FileFormatError, UnsafeFileError) as error:
        raise type(error)(f"{printable(path)}: {error}") from error
    except OSError as error:
        if error.filename is None:  # raised while reading the open file
            error.filename = str(path)
        raise
    for array in arrays.values():
        array.flags.writeable = False
    return Checkpoint(path, file_format, arrays, ignored, configuration)


def _read(path: AnyPath, max_bytes: int) -> tuple[Format, Contents, str]:
    """Recognises the format by the first bytes, and reads the file."""
    if path.is_dir():
        return "orbax", read_orbax(path, max_bytes), ""
    path.stat()  # raises an error if there is nothing
    if not path.is_file():
        raise FileFormatError(f"it is neither a file nor a folder. {SUPPORTED}")
    head = _read_head(path)
    if not (is_torch(head) or is_safetensors(head) or is_pickle(head)):
        raise FileFormatError(f"it {_appearance(head)}. {SUPPORTED}")
    if isinstance(path, RemotePath):
        check_size(path.stat().st_size, max_bytes, "the remote file")
    with files.local_copy(path) as local, local.open("rb") as file:
        size = local.stat().st_size
        if is_torch(head):
            return "torch", *read_torch(file, size, max_bytes)
        if is_safetensors(head):
            return "safetensors", read_safetensors(local, head, size, max_bytes), ""
        return "caffe2", read_caffe2(file, size, max_bytes), ""


def _read_head(path: AnyPath) -> bytes:
    if isinstance(path, RemotePath):
        return path.read_bytes(HEAD_BYTES)
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


def _appearance(head: bytes) -> str:
    """Describes a file of an unsupported format by its first bytes."""
    for start, description in FOREIGN_FORMATS.items():
        if head.lower().startswith(start.lower()):
            return f"looks like {description}"
    if head[257:262] == b"ustar":
        return "looks like a tar archive of torch before 0.2; load it there and save it again"
    if not head:
        return "is empty"
    text = head.decode("utf-8", "replace")
    if all(_is_text(letter) for letter in text[:200]):
        return f"looks like text that starts with {text[:40]!r}"
    return f"is of an unknown format that starts with the bytes {head[:8].hex(' ')}"


def _is_text(letter: str) -> bool:
    is_undecodable = letter == "\ufffd"
    return (letter.isprintable() or letter.isspace()) and not is_undecodable
