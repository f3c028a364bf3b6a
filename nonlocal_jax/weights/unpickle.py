"""A pickle reader that runs nothing: few opcodes, few names, and stand-ins where a pickle would have objects.

A pickle is a program for a small stack machine. Here the machine is that of the standard library, cut down to the opcodes
that weights are written with. A name is looked up in a table, never imported, and what the table gives is inert: it records
what the file says, and becomes an array only after the sizes have been added up.
"""

import io
import math
import pickle
import pickletools
import struct
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

MAX_STEPS = 5_000_000  # reads in one pickle, about two for each opcode; ResNet-152 with its optimiser takes 100,000
MAX_AXES = 32
NOTHING_RAN = "Nothing was run. If you trust the file, load it with what wrote it and save plain arrays, in torch a state dict."
OPCODES = (  # those whose code in the standard library is left as it is
    "PROTO STOP MARK POP POP_MARK PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL BINPERSID "
    "NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE "
    "BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT"
)
Names = Mapping[
    tuple[str, str], object
]  # where it gives text, that says what is harmless but not read
Storages = Callable[[object], object]  # from a persistent id
NUMBERS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")


class FileFormatError(ValueError):
    """The file is damaged, or of a kind that is not read."""


class UnsafeFileError(ValueError):
    """The file asks for what weights never need: a name outside the table, or far more memory than it should."""


class Source:
    """A file that is never read past its end, nor in more than `MAX_STEPS` steps."""

    def __init__(self, file: io.BufferedIOBase, size: int) -> None:
        self.file, self.left, self.steps = file, size, MAX_STEPS

    def read(self, n: int) -> bytes:
        self._take(n)
        return self.file.read(n)

    def skip(self, n: int) -> int:
        """Where the n bytes start that it goes past."""
        self._take(n)
        return self.file.seek(n, io.SEEK_CUR) - n

    def _take(self, n: int) -> None:
        self.spend(1)
        if n > self.left:
            raise FileFormatError(
                f"cut short: {n} more bytes should follow, {self.left} do. Fetch it again."
            )
        self.left -= n

    def readline(self) -> bytes:
        self.spend(1)
        line = self.file.readline(self.left)
        if not line.endswith(b"\n"):
            raise FileFormatError(
                f"cut short: it ends within the line {line[:40]!r}. Fetch it again."
            )
        self.left -= len(line)
        return line

    def spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise UnsafeFileError(
                f"its pickle takes more than {MAX_STEPS} steps; weights never need as many."
            )


class DType:
    """Stands for numpy.dtype, of numbers and bools only."""

    def __init__(self, name: str) -> None:
        self.numpy = np.dtype(name)

    def fill(self, state: object) -> None:
        if (
            not isinstance(state, tuple)
            or state[1:2] not in (("<",), (">",), ("|",), ("=",))
            or state[2:5] != (None,) * 3
        ):
            raise UnsafeFileError(
                f"the state of a numpy dtype is not that of a number: {kind(state)}."
            )
        self.numpy = self.numpy.newbyteorder(state[1])


class NumpyArray:
    """Stands for numpy.ndarray: what the file says of it, checked as it is said."""

    def __init__(self) -> None:
        self.dtype: DType | None = None
        self.shape: tuple[int, ...] = (0,)
        self.data: str | bytes = b""
        self.axes: tuple[int, ...] = ()  # if any, the order in which to take those in memory

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def fill(self, state: object) -> None:
        match state:
            case (
                int(),
                tuple() as shape,
                DType() as dtype,
                int() as fortran,
                str() | bytes() as data,
            ) if self.dtype is None:
                self.shape, self.dtype, self.fortran, self.data = (
                    integers(shape),
                    dtype,
                    fortran,
                    data,
                )
            case _:
                raise UnsafeFileError(
                    f"the state of a numpy array is not that of new numbers: {kind(state)}."
                )
        if len(data) != (nbytes := size_of(shape, dtype.numpy.itemsize)):
            raise FileFormatError(
                f"an array {shape} of {dtype.numpy} takes {nbytes} bytes; it comes with {len(data)}."
            )

    def array(self) -> np.ndarray:
        if self.dtype is None:
            raise FileFormatError("a numpy array is never given its content.")
        try:
            data = self.data.encode("latin1") if isinstance(self.data, str) else self.data
        except UnicodeEncodeError as error:
            raise FileFormatError("the content of a numpy array is text, not bytes.") from error
        array = np.ndarray(self.shape, self.dtype.numpy, data, order="F" if self.fortran else "C")
        array = array.transpose(self.axes) if self.axes else array
        return np.asarray(array, array.dtype.type, order="C")  # in the byte order of this machine


def kind(value: object) -> str:
    """What came out of a pickle, in a word or two: never its content, which shared references may make endless."""
    if isinstance(value, dict | list | tuple):
        return f"{'dict' if isinstance(value, dict) else type(value).__name__} of {len(value)}"
    return type(value).__name__


def integers(value: object) -> tuple[int, ...]:
    """As in a shape or in strides: few, none negative, none beyond what can be addressed."""
    if (
        isinstance(value, tuple)
        and len(value) <= MAX_AXES
        and all(type(n) is int and 0 <= n <= sys.maxsize for n in value)
    ):
        return value
    raise FileFormatError(
        f"sizes and strides must be up to {MAX_AXES} integers from 0 to {sys.maxsize}; got {kind(value)}."
    )


def size_of(shape: tuple[int, ...], itemsize: int) -> int:
    """Bytes of an array, which NumPy must be able to address even where one axis is empty."""
    if math.prod(n or 1 for n in shape) * itemsize > sys.maxsize:
        raise FileFormatError(f"the shape {shape} is beyond what can be addressed.")
    return math.prod(shape) * itemsize


def insert(target: Any, items: list[Any]) -> Any:
    """Keys and values, in turn, into a dict. No tuple is a key: to hash a deep one overflows the stack."""
    if type(target) not in (dict, OrderedDict) or len(items) % 2:
        raise FileFormatError(
            f"keys and values do not pair up, or belong to no dict but {kind(target)}."
        )
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | bytes | int | float | None) or (
            isinstance(key, int) and key.bit_length() > 64
        ):
            raise FileFormatError(
                f"a key of a dict must be text or a number of 64 bits; got {kind(key)}."
            )
        target[key] = value
    return target


# What the names of a pickle stand for. What they are called with is the file's: anything, and any number of it.


def _reconstruct(cls: object, shape: object, typecode: object) -> NumpyArray:
    if cls is not NumpyArray or shape != (0,):
        raise UnsafeFileError(
            "numpy's _reconstruct is asked for something else than an empty array to fill."
        )
    return NumpyArray()


def _frombuffer(
    data: object, dtype: object, shape: object, order: object, axes: object = None
) -> NumpyArray:
    array = NumpyArray()
    array.fill((1, shape, dtype, order == "F", data))
    if order == "K":
        array.axes = integers(axes)
    if order not in ("C", "F", "K") or (
        array.axes and sorted(array.axes) != list(range(len(array.shape)))
    ):
        raise FileFormatError(f"the axes of an array {array.shape} come in an unknown order.")
    return array


def _scalar(dtype: object, data: object) -> NumpyArray:
    array = NumpyArray()
    array.fill((1, (), dtype, False, data))
    return array


def _dtype(name: object, align: object = False, copy: object = False) -> DType:
    if not isinstance(name, str) or name not in NUMBERS:
        what = name if isinstance(name, str) else kind(name)
        raise UnsafeFileError(
            f"it asks for numpy.dtype({what!a:.40}); only arrays of real numbers and bools are read."
        )
    return DType(name)


def _encode(text: object, encoding: object) -> str:
    """Protocols below 3 write bytes as encode(text, "latin1"). Text it stays, until an array wants bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise UnsafeFileError("_codecs.encode is asked for something else than text as latin1.")
    return text


def _ordered(pairs: object = ()) -> OrderedDict[Any, Any]:
    if not isinstance(pairs, list | tuple) or any(
        not isinstance(p, list | tuple) or len(p) != 2 for p in pairs
    ):
        raise UnsafeFileError(f"OrderedDict is made of something else than pairs: {kind(pairs)}.")
    ordered: OrderedDict[Any, Any] = insert(
        OrderedDict(), [item for pair in pairs for item in pair]
    )
    return ordered


NUMPY_NAMES: Names = {
    ("collections", "OrderedDict"): _ordered,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): lambda: b"",  # as protocols below 3 write empty bytes
    ("numpy", "ndarray"): NumpyArray,
    ("numpy", "dtype"): _dtype,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
}


class _Opcodes(dict[int, Callable[[Any], None]]):
    def __missing__(self, code: int) -> Callable[[Any], None]:
        names = [op.name for op in pickletools.opcodes if ord(op.code) == code]
        if not names:
            raise FileFormatError(f"its pickle is damaged: byte {code:#04x} is no opcode.")
        raise UnsafeFileError(
            f"its pickle uses the opcode {names[0]}, which weights are never written with. {NOTHING_RAN}"
        )


_Base: Any = pickle._Unpickler


class _Unpickler(_Base):
    """The one in Python, because in the one in C opcodes cannot be chosen and the memo grows as large as the file says."""

    def __init__(self, source: Source, names: Names, storage: Storages | None) -> None:
        super().__init__(source, encoding="latin1")  # of the text of Python 2
        self.source, self.names, self.storage = source, names, storage

    def find_class(self, module: str, name: str) -> object:
        found = self.names.get((module, name))
        if found is None:
            raise UnsafeFileError(
                f"it asks for {f'{module}.{name}'!a:.100}, which weights never need. {NOTHING_RAN}"
            )
        if isinstance(found, str):
            raise FileFormatError(
                f"it holds {found} ({module}.{name}), which are not read. Convert them before saving."
            )
        return found

    def persistent_load(self, pid: object) -> object:
        if self.storage is None:
            raise UnsafeFileError(
                "its pickle refers to data outside it, as only those of torch may."
            )
        return self.storage(pid)

    def _bytearray(self) -> None:
        self.append(
            self.read(struct.unpack("<Q", self.read(8))[0])
        )  # the base class fills one of any size with zeros

    def _frame(self) -> None:
        self.read(8)  # its length; frames only help to read ahead

    def _instance(self) -> None:
        self.load_global()  # says which name, where it is not in the table
        _Opcodes()[ord(pickle.INST)]

    def _reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack[-1]
        if not callable(function) or not isinstance(arguments, tuple):
            raise FileFormatError(f"its pickle calls {kind(function)} with {kind(arguments)}.")
        self.source.spend(
            sum(len(a) for a in arguments if isinstance(a, list | tuple))
        )  # which the function may copy
        self.stack[-1] = function(*arguments)

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, NumpyArray | DType):
            target.fill(state)
        elif not isinstance(
            target, OrderedDict
        ):  # its attributes, such as torch's _metadata, are left out
            raise UnsafeFileError(
                f"its pickle sets the state of {kind(target)}, which weights never need. {NOTHING_RAN}"
            )

    def _dict(self) -> None:
        items = self.pop_mark()
        self.append(insert({}, items))

    def _setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        insert(self.stack[-1], [key, value])

    def _setitems(self) -> None:
        items = self.pop_mark()
        insert(self.stack[-1], items)

    dispatch = _Opcodes(
        {
            code: _Base.dispatch[code]
            for code in (getattr(pickle, name)[0] for name in OPCODES.split())
        }
        | {pickle.FRAME[0]: _frame, pickle.BYTEARRAY8[0]: _bytearray, pickle.INST[0]: _instance}
        | {pickle.REDUCE[0]: _reduce, pickle.BUILD[0]: _build}
        | {pickle.DICT[0]: _dict, pickle.SETITEM[0]: _setitem, pickle.SETITEMS[0]: _setitems}
    )


def load(source: Source, names: Names = NUMPY_NAMES, storage: Storages | None = None) -> object:
    """The tree that a pickle describes: dicts, lists, tuples, text and numbers, with stand-ins for everything else.

    Args:
        source: read from where it is to the end of this pickle.
        names: what each (module, name) stands for; any other is refused.
        storage: what a persistent id stands for; without it there may be none.

    Raises:
        UnsafeFileError: a name, opcode or state that weights never need.
        FileFormatError: a pickle that is damaged or ends early.
    """
    try:
        with warnings.catch_warnings(
            action="error", category=DeprecationWarning
        ):  # of escapes that are none, in text
            return _Unpickler(source, names, storage).load()
    except (FileFormatError, UnsafeFileError):
        raise  # as it is
    except (
        pickle.UnpicklingError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        struct.error,
        Warning,
    ) as error:
        raise FileFormatError(
            f"its pickle is damaged ({type(error).__name__}: {error!s:.100})."
        ) from error
