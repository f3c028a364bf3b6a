"""Inert stand-ins for the NumPy objects in a pickle.

A stand-in records what the file says about an array. It becomes a NumPy array only when
`NumpyArray.array` is called, after the sizes of all arrays have been added up.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np

from nonlocal_jax.weights.readers.errors import FileFormatError, UnsafeFileError
from nonlocal_jax.weights.readers.values import array_bytes, describe_value, insert_pairs, integers

# From (module, name) to what the name stands for. A text stands for a harmless object that is not
# supported.
Names = Mapping[tuple[str, str], object]

NUMBERS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")


class DType:
    """Stands for `numpy.dtype`, of numbers and bools only."""

    def __init__(self, name: str) -> None:
        self.numpy = np.dtype(name)

    def fill(self, state: object) -> None:
        """Sets the byte order from the pickled state, which may describe nothing else."""
        if (
            not isinstance(state, tuple)
            or state[1:2] not in (("<",), (">",), ("|",), ("=",))
            or state[2:5] != (None,) * 3
        ):
            raise UnsafeFileError(
                f"the state of a numpy dtype must be that of a number; got {describe_value(state)}."
            )
        self.numpy = self.numpy.newbyteorder(state[1])


class NumpyArray:
    """Stands for `numpy.ndarray`: what the file says about it, checked when it is recorded."""

    def __init__(self) -> None:
        self.dtype: DType | None = None
        self.shape: tuple[int, ...] = (0,)
        self.data: str | bytes = b""
        self.axes: tuple[int, ...] = ()  # order of the axes in memory, where it is neither C nor F

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def fill(self, state: object) -> None:
        """Records shape, dtype and data from the pickled state. An array is filled only once."""
        match state:
            case (
                int(),
                tuple() as shape,
                DType() as dtype,
                int() as fortran,
                str() | bytes() as data,
            ) if self.dtype is None:
                self.shape, self.dtype = integers(shape), dtype
                self.fortran, self.data = fortran, data
            case _:
                raise UnsafeFileError(
                    "the state of a numpy array must be that of a new array of numbers; "
                    f"got {describe_value(state)}."
                )
        nbytes = array_bytes(shape, dtype.numpy.itemsize)
        if len(data) != nbytes:
            raise FileFormatError(
                f"an array {shape} of {dtype.numpy} must have {nbytes} bytes; got {len(data)}."
            )

    def array(self) -> np.ndarray:
        """Returns the array, in the byte order of this machine."""
        if self.dtype is None:
            raise FileFormatError("a numpy array has no content.")
        try:
            data = self.data.encode("latin1") if isinstance(self.data, str) else self.data
        except UnicodeEncodeError as error:
            raise FileFormatError("the content of a numpy array is text, not bytes.") from error
        array = np.ndarray(self.shape, self.dtype.numpy, data, order="F" if self.fortran else "C")
        array = array.transpose(self.axes) if self.axes else array
        return np.asarray(array, array.dtype.type, order="C")


# The functions below stand for those that a pickle calls. The file chooses the arguments: they can
# be of any type.


def _reconstruct(array_type: object, shape: object, typecode: object) -> NumpyArray:
    if array_type is not NumpyArray or shape != (0,):
        raise UnsafeFileError("numpy's _reconstruct may only be called for an empty array to fill.")
    return NumpyArray()


def _frombuffer(
    data: object, dtype: object, shape: object, order: object, axes: object = None
) -> NumpyArray:
    array = NumpyArray()
    array.fill((1, shape, dtype, order == "F", data))
    if order == "K":
        array.axes = integers(axes)
    is_permutation = sorted(array.axes) == list(range(len(array.shape)))
    if order not in ("C", "F", "K") or (array.axes and not is_permutation):
        raise FileFormatError(f"the axes of an array {array.shape} are in an unknown order.")
    return array


def _scalar(dtype: object, data: object) -> NumpyArray:
    array = NumpyArray()
    array.fill((1, (), dtype, False, data))
    return array


def _dtype(name: object, align: object = False, copy: object = False) -> DType:
    if not isinstance(name, str) or name not in NUMBERS:
        requested = name if isinstance(name, str) else describe_value(name)
        raise UnsafeFileError(
            f"it asks for numpy.dtype({requested!a:.40}); supported are real numbers and bools."
        )
    return DType(name)


def _encode(text: object, encoding: object) -> str:
    """Stands for `_codecs.encode`.

    Protocols below 3 write bytes as encode(text, "latin1"). The text is returned as it is.
    `NumpyArray.array` encodes it, if it is the content of an array.
    """
    if not isinstance(text, str) or encoding != "latin1":
        raise UnsafeFileError("_codecs.encode may only be called for text as latin1.")
    return text


def _empty_bytes() -> bytes:
    """Stands for `bytes`, by which protocols below 3 write empty bytes."""
    return b""


def _ordered_dict(pairs: object = ()) -> OrderedDict[Any, Any]:
    if not isinstance(pairs, list | tuple) or any(
        not isinstance(pair, list | tuple) or len(pair) != 2 for pair in pairs
    ):
        raise UnsafeFileError(f"OrderedDict must be made of pairs; got {describe_value(pairs)}.")
    items = [item for pair in pairs for item in pair]
    ordered: OrderedDict[Any, Any] = insert_pairs(OrderedDict(), items)
    return ordered


# NumPy 2 renamed numpy.core to numpy._core; files have either.
_CORES = ("numpy.core", "numpy._core")
NUMPY_NAMES: Names = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _empty_bytes,
    ("numpy", "ndarray"): NumpyArray,
    ("numpy", "dtype"): _dtype,
    **{(f"{core}.multiarray", "_reconstruct"): _reconstruct for core in _CORES},
    **{(f"{core}.multiarray", "scalar"): _scalar for core in _CORES},
    **{(f"{core}.numeric", "_frombuffer"): _frombuffer for core in _CORES},
}
