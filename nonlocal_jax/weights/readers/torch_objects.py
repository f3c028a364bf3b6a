"""Inert stand-ins for the torch objects in a pickle.

A tensor in a torch file is a view (offset, shape, strides) of a storage that lies outside the
pickle. The stand-ins record both; `Tensor.array` builds the array once the bytes of the storage
have been read.
"""

import math
import sys
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from nonlocal_jax.weights.readers.errors import FileFormatError, UnsafeFileError
from nonlocal_jax.weights.readers.numpy_objects import NUMPY_NAMES, Names
from nonlocal_jax.weights.readers.values import array_bytes, describe_value, integers


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
    """Stands for a torch tensor, a view of a storage. Offset and strides count elements."""

    storage: Storage
    dtype: np.dtype[Any]
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def array(self, content: bytes, byte_order: str) -> np.ndarray:
        """Returns the array, given the bytes of the storage and their order, "little" or "big"."""
        if not self.nbytes:
            return np.zeros(self.shape, self.dtype)
        size = self.dtype.itemsize
        strides = [stride * size for stride in self.strides]
        view = np.ndarray(self.shape, self.dtype, content, self.offset * size, strides)
        array = np.asarray(view, order="C")
        if byte_order == sys.byteorder:
            return array
        # bfloat16 has no byte order in NumPy, so the bytes are swapped as integers.
        return array.view(f"u{size}").byteswap().view(self.dtype)


def find_storage(storages: dict[str, Storage], pid: object) -> Storage:
    """Returns the storage that a persistent id names, and records it in `storages`."""
    match pid:
        case ("storage", np.dtype() as dtype, str() as key, str(), size, *view) if view in (
            [],
            [None],
        ):
            storage = Storage(key, dtype, *integers((size,)))
            first = storages.setdefault(key, storage)
            if first.nbytes == storage.nbytes:
                return storage
            raise FileFormatError(
                f"storage {key!a:.40} has two sizes, {first.nbytes} and {storage.nbytes} bytes."
            )
    raise FileFormatError(
        f"its pickle refers to {describe_value(pid)} outside itself; "
        "expected a whole storage of real numbers."
    )


# The functions below stand for those that a pickle calls. The file chooses the arguments: they can
# be of any type.


def _tensor(
    storage: object, offset: object, shape: object, strides: object, dtype: object = None
) -> Tensor:
    dtype = storage.dtype if dtype is None and isinstance(storage, Storage) else dtype
    if not isinstance(storage, Storage) or not isinstance(dtype, np.dtype):
        raise FileFormatError(
            "a tensor must be made of a storage and a dtype; "
            f"got {describe_value(storage)} and {describe_value(dtype)}."
        )
    sizes, steps, (start,) = integers(shape), integers(strides), integers((offset,))
    if len(sizes) != len(steps):
        raise FileFormatError(f"a tensor of {len(sizes)} axes has {len(steps)} strides.")
    nbytes = array_bytes(sizes, dtype.itemsize)
    # Torch allows any stride along an axis of length 1, NumPy does not.
    steps = tuple(step if n > 1 else 0 for n, step in zip(sizes, steps, strict=True))
    last = start + sum((n - 1) * step for n, step in zip(sizes, steps, strict=True))
    end = dtype.itemsize * (1 + last)
    if nbytes and end > storage.nbytes:
        raise UnsafeFileError(
            f"a tensor {sizes} extends to byte {end} of a storage of {storage.nbytes} bytes."
        )
    return Tensor(storage, dtype, start, sizes, steps)


def _tensor_v2(*arguments: object) -> Tensor:
    """Takes storage, offset, shape, strides, requires_grad, hooks; since torch 2.0 metadata."""
    _check_no_metadata(arguments[6:])
    storage, offset, shape, strides = arguments[:4]
    return _tensor(storage, offset, shape, strides)


def _tensor_v3(*arguments: object) -> Tensor:
    """Takes storage, offset, shape, strides, requires_grad, hooks, dtype and metadata."""
    _check_no_metadata(arguments[7:])
    storage, offset, shape, strides, _, _, dtype = arguments[:7]
    return _tensor(storage, offset, shape, strides, dtype)


def _check_no_metadata(metadata: tuple[object, ...]) -> None:
    if any(metadata):
        raise FileFormatError(
            "a tensor is a negated or conjugated view. Call resolve_neg() before saving."
        )


def _parameter(data: object, grad: object, hooks: object) -> object:
    return data


def _size(dims: object = ()) -> object:
    return dims


_INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
_DTYPES = {name: np.dtype(name) for name in ["float64", "float32", "float16", "bool", *_INTEGERS]}
_DTYPES["bfloat16"] = np.dtype(ml_dtypes.bfloat16)
_STORAGE_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "BoolStorage": "bool",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
}
_COMPLEX = ["complex32", "complex64", "complex128"]
_COMPLEX_STORAGES = ["ComplexFloatStorage", "ComplexDoubleStorage"]
_QUANTISED = ["QInt8Storage", "QUInt8Storage", "QInt32Storage", "QUInt4x2Storage"]
_QUANTISED += ["QUInt2x4Storage", "qint8"]
_FLOAT8 = ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"]
_UNSUPPORTED = {
    "complex tensors": _COMPLEX_STORAGES + _COMPLEX,
    "quantised tensors": _QUANTISED,
    "8-bit floats": _FLOAT8,
}
TORCH_NAMES: Names = {
    **NUMPY_NAMES,  # checkpoints hold NumPy scalars too, such as the best accuracy so far
    **{("torch", name): title for title, names in _UNSUPPORTED.items() for name in names},
    **{("torch", name): _DTYPES[dtype] for name, dtype in _STORAGE_DTYPES.items()},
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
