"""A restricted pickle reader that executes nothing.

A pickle is a program for a small stack machine. The machine here is that of the standard library,
reduced to the opcodes with which weights are written. A name is looked up in a table and never
imported, and what the table returns is inert: see `numpy_objects` and `torch_objects`.
"""

import io
import pickle
import pickletools
import struct
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from nonlocal_jax.terminal import printable
from nonlocal_jax.weights.readers.errors import FileFormatError, UnsafeFileError
from nonlocal_jax.weights.readers.numpy_objects import NUMPY_NAMES, DType, Names, NumpyArray
from nonlocal_jax.weights.readers.values import describe_value, insert_pairs

# Reads in one pickle, about two for each opcode. A ResNet-152 with its optimiser takes 100,000.
MAX_STEPS = 5_000_000
FREE_STEPS = 250_000  # in a file of any size; a step takes up to 200 bytes of memory
ADVICE = (
    "Nothing was executed. If you trust the file, load it with the library that wrote it and save "
    "plain arrays, in torch a state dict."
)
# The opcodes whose implementation in the standard library is used unchanged.
OPCODES = (
    "PROTO STOP MARK POP POP_MARK PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET GLOBAL "
    "STACK_GLOBAL BINPERSID NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 FLOAT "
    "BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 "
    "BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST "
    "APPEND APPENDS EMPTY_DICT"
)
UNCHANGED_CODES = tuple(ord(getattr(pickle, name)) for name in OPCODES.split())
Storages = Callable[[object], object]  # from a persistent id to what it stands for


def explained_steps(size: int) -> int:
    """Returns the number of steps that a file of `size` bytes explains.

    Every opcode takes a byte, unless the pickle is deflated or copies shared values.
    """
    return min(MAX_STEPS, FREE_STEPS + size)


class ByteStream:
    """A binary file that is never read past its end, and in a limited number of steps.

    Args:
        file: The file, read from its current position.
        size: Number of bytes that follow.
        max_steps: Limit of the reads and of the copied values, against pickles that copy shared
            values again and again. Defaults to what `size` explains.
    """

    def __init__(self, file: io.BufferedIOBase, size: int, max_steps: int | None = None) -> None:
        self.file = file
        self.bytes_left = size
        self.max_steps = explained_steps(size) if max_steps is None else max_steps
        self.steps_left = self.max_steps

    def read(self, count: int) -> bytes:
        self._take(count)
        return self.file.read(count)

    def skip(self, count: int) -> int:
        """Skips bytes and returns the position at which they start."""
        self._take(count)
        return self.file.seek(count, io.SEEK_CUR) - count

    def _take(self, count: int) -> None:
        self.spend(1)
        if count > self.bytes_left:
            raise FileFormatError(
                f"truncated: {count} more bytes should follow, but only {self.bytes_left} do. "
                "Download it again."
            )
        self.bytes_left -= count

    def readline(self) -> bytes:
        self.spend(1)
        line = self.file.readline(self.bytes_left)
        if not line.endswith(b"\n"):
            raise FileFormatError(
                f"truncated: it ends within the line {line[:40]!r}. Download it again."
            )
        self.bytes_left -= len(line)
        return line

    def spend(self, steps: int) -> None:
        """Counts steps against the limit."""
        self.steps_left -= steps
        if self.steps_left < 0:
            raise UnsafeFileError(
                f"its pickle takes more than {self.max_steps} steps, more than weights ever need."
            )


class _Opcodes(dict[int, Callable[[Any], None]]):
    """The implementation of each allowed opcode. Looking up any other raises an error."""

    def __missing__(self, code: int) -> Callable[[Any], None]:
        names = [opcode.name for opcode in pickletools.opcodes if ord(opcode.code) == code]
        if not names:
            raise FileFormatError(f"its pickle is damaged: {code:#04x} is not an opcode.")
        raise UnsafeFileError(
            f"its pickle uses the opcode {names[0]}, which weights are never written with. {ADVICE}"
        )


class _Memo(dict[Any, Any]):
    """Values by their index, of which the text is the key: see `NumberKey`."""

    def __getitem__(self, index: int) -> object:
        return super().__getitem__(str(index))

    def __setitem__(self, index: int, value: object) -> None:
        super().__setitem__(str(index), value)


_StandardUnpickler: Any = pickle._Unpickler


class _Unpickler(_StandardUnpickler):
    """The restricted stack machine.

    It extends the Python implementation: that in C cannot restrict opcodes, and grows its memo as
        far as a file says.
    """

    def __init__(self, stream: ByteStream, names: Names, storages: Storages | None) -> None:
        super().__init__(stream, encoding="latin1")  # as pickles of Python 2 need
        self.stream, self.names, self.storages = stream, names, storages
        self.memo = _Memo()

    def find_class(self, module: str, name: str) -> object:
        found = self.names.get((module, name))
        if found is None:
            raise UnsafeFileError(
                f"it asks for {f'{module}.{name}'!a:.100}, which weights never need. {ADVICE}"
            )
        if isinstance(found, str):
            raise FileFormatError(
                f"it holds {found} ({module}.{name}), which are not supported. "
                "Convert them before saving."
            )
        return found

    def persistent_load(self, pid: object) -> object:
        if self.storages is None:
            raise UnsafeFileError(
                "its pickle refers to data outside itself, which only torch files may do."
            )
        return self.storages(pid)

    def _bytearray(self) -> None:
        # The standard implementation allocates the length that the file declares before it reads.
        self.append(self.read(struct.unpack("<Q", self.read(8))[0]))

    def _frame(self) -> None:
        self.read(8)  # the length of the frame, which only helps to read ahead

    def _instance(self) -> None:
        self.load_global()  # names the class in the error, if it is not in the table
        _Opcodes()[ord(pickle.INST)]

    def _reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack[-1]
        if not callable(function) or not isinstance(arguments, tuple):
            raise FileFormatError(
                f"its pickle calls {describe_value(function)} with {describe_value(arguments)}."
            )
        # The call copies its arguments, and the function may copy what is in them. A pickle could
        # repeat that with shared values from few opcodes.
        lengths = (len(item) for item in arguments if isinstance(item, list | tuple))
        self.stream.spend(len(arguments) + sum(lengths))
        self.stack[-1] = function(*arguments)

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, NumpyArray | DType):
            target.fill(state)
        elif not isinstance(target, OrderedDict):
            raise UnsafeFileError(
                f"its pickle sets the state of {describe_value(target)}, which weights never need. "
                f"{ADVICE}"
            )
        # Attributes of an OrderedDict, such as torch's _metadata, are dropped.

    def _dict(self) -> None:
        items = self.pop_mark()
        self.append(insert_pairs({}, items))

    def _setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        insert_pairs(self.stack[-1], [key, value])

    def _setitems(self) -> None:
        items = self.pop_mark()
        insert_pairs(self.stack[-1], items)

    dispatch = _Opcodes(
        {
            **{code: _StandardUnpickler.dispatch[code] for code in UNCHANGED_CODES},
            ord(pickle.FRAME): _frame,
            ord(pickle.BYTEARRAY8): _bytearray,
            ord(pickle.INST): _instance,
            ord(pickle.REDUCE): _reduce,
            ord(pickle.BUILD): _build,
            ord(pickle.DICT): _dict,
            ord(pickle.SETITEM): _setitem,
            ord(pickle.SETITEMS): _setitems,
        }
    )


def read_pickle(
    stream: ByteStream, names: Names = NUMPY_NAMES, storages: Storages | None = None
) -> object:
    """Reads one pickle without executing anything.

    Args:
        stream: The bytes, read from the current position to the end of this pickle.
        names: What each (module, name) stands for. Any other name is refused.
        storages: From a persistent id to what it stands for. Without it, persistent ids are
            refused.

    Returns:
        The tree that the pickle describes: dicts, lists, tuples, text and numbers, with stand-ins
            for everything else.

    Raises:
        UnsafeFileError: The pickle uses a name, opcode or state that weights never need.
        FileFormatError: The pickle is damaged or truncated.
    """
    try:
        # Python warns about invalid escapes in text; in a pickle they mean damage.
        with warnings.catch_warnings(action="error", category=DeprecationWarning):
            return _Unpickler(stream, names, storages).load()
    except (FileFormatError, UnsafeFileError):
        raise
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
            f"its pickle is damaged ({type(error).__name__}: {printable(error):.100})."
        ) from error
