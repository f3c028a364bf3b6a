"""Files that torch.save wrote, read without torch: a zip archive since torch 1.6, before that pickles, then raw storages.

Both hold a pickle whose tensors are views (offset, shape, strides) of storages that lie outside it. The pickle is read first,
with stand-ins for the tensors; of the storages only those of the weights are read, after every size has been checked.
"""

import functools
import io
import math
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from nonlocal_jax.weights.unpickle import (
    NUMPY_NAMES,
    FileFormatError,
    Names,
    Source,
    UnsafeFileError,
    integers,
    kind,
    load,
    size_of,
)

ZIP_MAGIC = (b"PK\3\4", b"PK\5\6")
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
MAX_PICKLE = 64 << 20  # bytes of data.pkl; ResNet-152 has 100 thousand
MAX_MEMBERS = 100_000
MAX_DIRECTORY = 16 << 20  # bytes of the zip directory
MAX_RATIO = 100  # of deflated members; torch itself does not compress


@dataclass(frozen=True, eq=False)
class Storage:
    """Stands for a torch storage: `size` elements that lie outside the pickle, under `key`."""

    key: str
    dtype: np.dtype[Any]
    size: int

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Tensor:
    """Stands for a torch tensor, a view of a storage that it stays within. Offset and strides count elements."""

    storage: Storage
    dtype: np.dtype[Any]
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def array(self, content: bytes, order: str) -> np.ndarray:
        """Of the content of its storage, in the order "little" or "big" of bytes."""
        if not self.nbytes:
            return np.zeros(self.shape, self.dtype)
        size = self.dtype.itemsize
        view = np.ndarray(
            self.shape, self.dtype, content, self.offset * size, [n * size for n in self.strides]
        )
        array = np.asarray(view, order="C")
        return (
            array if order == sys.byteorder else array.view(f"u{size}").byteswap().view(self.dtype)
        )


# What the names of torch stand for. What they are called with is the file's: anything, and any number of it.


def _storage(known: dict[str, Storage], pid: object) -> Storage:
    match pid:
        case ("storage", np.dtype() as dtype, str() as key, str(), size, *view) if view in (
            [],
            [None],
        ):
            storage = Storage(key, dtype, *integers((size,)))
            if known.setdefault(key, storage).nbytes == storage.nbytes:
                return storage
            raise FileFormatError(
                f"storage {key!a:.40} is said to have {known[key].nbytes} bytes and to have {storage.nbytes}."
            )
    raise FileFormatError(
        f"its pickle refers to {kind(pid)} outside it; expected a whole storage of real numbers."
    )


def _tensor(
    storage: object, offset: object, shape: object, strides: object, dtype: object = None
) -> Tensor:
    dtype = storage.dtype if dtype is None and isinstance(storage, Storage) else dtype
    if not isinstance(storage, Storage) or not isinstance(dtype, np.dtype):
        raise FileFormatError(
            f"a tensor is made of {kind(storage)} and {kind(dtype)}; expected a storage and a dtype."
        )
    sizes, steps, (start,) = integers(shape), integers(strides), integers((offset,))
    if len(sizes) != len(steps):
        raise FileFormatError(f"a tensor of {len(sizes)} axes has {len(steps)} strides.")
    nbytes = size_of(sizes, dtype.itemsize)
    steps = tuple(step if n > 1 else 0 for n, step in zip(sizes, steps, strict=True))
    end = dtype.itemsize * (
        1 + start + sum((n - 1) * step for n, step in zip(sizes, steps, strict=True))
    )
    if nbytes and end > storage.nbytes:
        raise UnsafeFileError(
            f"a tensor {sizes} reaches to byte {end} of a storage of {storage.nbytes}."
        )
    return Tensor(storage, dtype, start, sizes, steps)


def _tensor_v2(*arguments: object) -> Tensor:
    """Called with storage, offset, shape, strides, requires_grad, hooks and, since torch 2.0, metadata."""
    _no_metadata(arguments[6:])
    storage, offset, shape, strides = arguments[:4]
    return _tensor(storage, offset, shape, strides)


def _tensor_v3(*arguments: object) -> Tensor:
    """Called with storage, offset, shape, strides, requires_grad, hooks, dtype and metadata."""
    _no_metadata(arguments[7:])
    storage, offset, shape, strides, _, _, dtype = arguments[:7]
    return _tensor(storage, offset, shape, strides, dtype)


def _no_metadata(metadata: tuple[object, ...]) -> None:
    if any(metadata):
        raise FileFormatError(
            "a tensor is stored to be negated or conjugated later. Call resolve_neg() before saving."
        )


def _parameter(data: object, grad: object, hooks: object) -> object:
    return data


def _size(dims: object = ()) -> object:
    return dims


_INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
_DTYPES = {name: np.dtype(name) for name in ["float64", "float32", "float16", "bool", *_INTEGERS]}
_DTYPES["bfloat16"] = np.dtype(ml_dtypes.bfloat16)
_STORAGES = {
    **{
        "Double": "float64",
        "Float": "float32",
        "Half": "float16",
        "BFloat16": "bfloat16",
        "Bool": "bool",
    },
    **{"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8"},
}
_UNREAD = {
    "complex tensors": [
        "ComplexFloatStorage",
        "ComplexDoubleStorage",
        "complex32",
        "complex64",
        "complex128",
    ],
    "quantised tensors": [
        "QInt8Storage",
        "QUInt8Storage",
        "QInt32Storage",
        "QUInt4x2Storage",
        "QUInt2x4Storage",
        "qint8",
    ],
    "8-bit floats": ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"],
}
TORCH_NAMES: Names = {
    **NUMPY_NAMES,  # of numpy scalars beside the weights, such as the best accuracy so far
    **{("torch", name): what for what, names in _UNREAD.items() for name in names},
    **{("torch", f"{name}Storage"): _DTYPES[dtype] for name, dtype in _STORAGES.items()},
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
    ("torch", "Size"): _size,
    ("torch.storage", "UntypedStorage"): _DTYPES["uint8"],
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_qtensor"): "quantised tensors",
    ("torch._utils", "_rebuild_sparse_tensor"): "sparse tensors",
}


class _Zip:
    """A zip archive whose directory has been checked: no member overlaps, expands or hides another."""

    def __init__(self, file: io.BufferedIOBase, size: int) -> None:
        start = _directory_start(file, size)
        try:
            self.archive = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
            raise FileFormatError(f"its zip directory is damaged ({error!s:.100}).") from error
        members = self.archive.infolist()
        if self.archive.start_dir != start or len(members) > MAX_MEMBERS:
            raise UnsafeFileError(
                f"its zip directory is inconsistent, or has over {MAX_MEMBERS} members."
            )
        for member in sorted(members, key=lambda member: member.header_offset, reverse=True):
            _check_member(file, member, end=start)
            start = member.header_offset
        self.members = {member.filename: member for member in members}
        if len(self.members) < len(members):
            raise UnsafeFileError("its zip archive has several members of the same name.")

    def read(self, name: str, at_most: int) -> bytes:
        member = self.members.get(name)
        if member is None:
            raise FileFormatError(f"its zip archive lacks {name!a:.100}.")
        if member.file_size > at_most:
            raise UnsafeFileError(
                f"{name!a:.100} has {member.file_size} bytes in its zip archive; expected at most {at_most}."
            )
        try:
            with self.archive.open(member) as stream:
                data = stream.read(member.file_size)
        except (
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            NotImplementedError,
            RuntimeError,
            ValueError,
        ) as error:
            raise FileFormatError(
                f"{name!a:.100} is damaged in its zip archive ({error!s:.100}). Fetch it again."
            ) from error
        if len(data) != member.file_size:
            raise FileFormatError(
                f"{name!a:.100} has {len(data)} bytes of {member.file_size} in its zip archive."
            )
        return data


def _directory_start(file: io.BufferedIOBase, size: int) -> int:
    """Of the last 22 bytes, or 98 in zip64. The zipfile module would keep a directory of any size in memory."""
    file.seek(max(0, size - 98))
    tail = file.read().rjust(98, b"\0")
    if tail[76:80] != b"PK\5\6":
        raise FileFormatError(
            "cut short: a zip archive ends with its directory, and this does not. Fetch it again."
        )
    length, end = int.from_bytes(tail[88:92], "little"), size - 22
    if tail[:4] == b"PK\6\6" and tail[56:60] == b"PK\6\7":
        length, end = int.from_bytes(tail[40:48], "little"), size - 98
    if length > min(end, MAX_DIRECTORY):
        raise UnsafeFileError(
            f"its zip directory has {length} bytes; expected at most {min(end, MAX_DIRECTORY)}."
        )
    return end - length


def _check_member(file: io.BufferedIOBase, member: zipfile.ZipInfo, end: int) -> None:
    """It lies before `end`, and becomes as large as it says."""
    name = member.orig_filename
    if name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
        raise UnsafeFileError(f"its zip archive has a member outside it, {name!a:.100}.")
    if member.flag_bits & 1 or member.compress_type not in (
        zipfile.ZIP_STORED,
        zipfile.ZIP_DEFLATED,
    ):
        raise FileFormatError(
            f"{name!a:.100} in its zip archive is encrypted, or compressed otherwise than torch can read."
        )
    stored = member.compress_type == zipfile.ZIP_STORED
    if member.file_size > member.compress_size * (1 if stored else MAX_RATIO):
        raise UnsafeFileError(
            f"{name!a:.100} in its zip archive expands from {member.compress_size} to {member.file_size} bytes."
        )
    file.seek(max(0, member.header_offset))
    header = file.read(30).ljust(30, b"\0")
    start = (
        member.header_offset
        + 30
        + int.from_bytes(header[26:28], "little")
        + int.from_bytes(header[28:30], "little")
    )
    if member.header_offset < 0 or header[:4] != b"PK\3\4" or start + member.compress_size > end:
        raise UnsafeFileError(
            f"{name!a:.100} overlaps what follows it in its zip archive, or is not where it should be."
        )


@dataclass(frozen=True)
class TorchFile:
    """What torch.save was given, with a `Tensor` for each tensor; the bytes of a storage; their order."""

    tree: object
    content: Callable[[Storage], bytes]
    order: str


def _read_zip(file: io.BufferedIOBase, size: int) -> TorchFile:
    zipped = _Zip(file, size)
    root = next(iter(zipped.members), "").split("/")[0]
    if f"{root}/constants.pkl" in zipped.members or any(
        name.startswith(f"{root}/code/") for name in zipped.members
    ):
        raise FileFormatError(
            "it is a TorchScript archive, a program with weights; save its state_dict() instead."
        )
    if f"{root}/data.pkl" not in zipped.members:
        some = ", ".join(list(zipped.members)[:3])
        raise FileFormatError(
            f"it is a zip archive that torch.save did not write: it has no data.pkl, but {some!a:.100}."
        )
    order = (
        zipped.read(f"{root}/byteorder", 8).decode("latin1")
        if f"{root}/byteorder" in zipped.members
        else "little"
    )
    if order not in ("little", "big"):
        raise FileFormatError(f"its byte order must be little or big; got {order!a}.")
    pickled = zipped.read(f"{root}/data.pkl", MAX_PICKLE)
    tree = load(
        Source(io.BytesIO(pickled), len(pickled)), TORCH_NAMES, functools.partial(_storage, {})
    )

    def content(storage: Storage) -> bytes:
        data = zipped.read(f"{root}/data/{storage.key}", storage.nbytes)
        if len(data) != storage.nbytes:
            raise FileFormatError(
                f"storage {storage.key!a:.40} must have {storage.nbytes} bytes; it has {len(data)}."
            )
        return data

    return TorchFile(tree, content, order)


def _read_legacy(file: io.BufferedIOBase, size: int) -> TorchFile:
    """Pickles: a magic number, the protocol, the writer's machine, the object, the keys. Then each storage, after its size."""
    source = Source(file, size)
    if load(source, {}) != LEGACY_MAGIC or load(source, {}) != LEGACY_PROTOCOL:
        raise FileFormatError(
            f"it starts as a file of torch, but not as one of protocol {LEGACY_PROTOCOL}."
        )
    load(source, {})
    storages: dict[str, Storage] = {}
    tree = load(source, TORCH_NAMES, functools.partial(_storage, storages))
    keys = load(source, {})
    if not isinstance(keys, list) or any(
        not isinstance(key, str) or key not in storages for key in keys
    ):
        raise FileFormatError("its list of storages is not that of its tensors.")
    starts: dict[str, int] = {}
    for key in keys:
        count = int.from_bytes(source.read(8), "little")
        if count != storages[key].size:
            raise FileFormatError(
                f"storage {key!a:.40} must have {storages[key].size} elements; it has {count}."
            )
        starts[key] = source.skip(storages[key].nbytes)

    def content(storage: Storage) -> bytes:
        if storage.key not in starts:
            raise FileFormatError(f"it lacks storage {storage.key!a:.40}.")
        file.seek(starts[storage.key])
        return file.read(storage.nbytes)

    return TorchFile(tree, content, "little")  # whatever the writer's machine


def read_torch(file: io.BufferedIOBase, size: int) -> TorchFile:
    """Read the pickle, but none of the storages.

    Raises:
        UnsafeFileError: a name, opcode, member or size that weights never need.
        FileFormatError: a file that is damaged or ends early, or holds a program or tensors that are not read.
    """
    file.seek(0)
    zipped = file.read(4) in ZIP_MAGIC
    file.seek(0)
    return _read_zip(file, size) if zipped else _read_legacy(file, size)
