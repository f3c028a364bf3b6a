"""Checks of values that come from a file, before any memory is allocated for them."""

import math
import sys
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np

from nonlocal_jax.weights.readers.errors import FileFormatError, UnsafeFileError

MAX_AXES = 32

# Arrays may take more memory than the file: names share them, tensors are expanded, archives are
# deflated. Up to FREE_BYTES, or MAX_GROWTH times the size of the file if that is more, this
# happens in weights.
MAX_GROWTH = 32
FREE_BYTES = 16 << 20

# What a reader returns: the arrays by name, and each other entry with the reason why it is ignored.
Contents = tuple[dict[str, np.ndarray], dict[str, str]]


class NumberKey(NamedTuple):
    """A number as the key of a dict, by its text.

    The hashes of numbers are known, so a file could choose numbers that all collide, and a dict of
    a million would take hours. Hashes of text are secret.
    """

    text: str


def describe_value(value: object) -> str:
    """Describes a value by its type and length, never by its content.

    Shared references can make the content endless.
    """
    if isinstance(value, dict):
        return f"dict of {len(value)}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__


def ignored_reason(value: object) -> str:
    """Returns the reason for which an entry that is no array is ignored."""
    return f"not weights: {describe_value(value)}"


def integers(value: object) -> tuple[int, ...]:
    """Checks a shape or strides: at most 32 integers from 0 to the address space."""
    if (
        isinstance(value, tuple)
        and len(value) <= MAX_AXES
        and all(type(n) is int and 0 <= n <= sys.maxsize for n in value)
    ):
        return value
    raise FileFormatError(
        f"sizes and strides must be up to {MAX_AXES} integers from 0 to {sys.maxsize}; "
        f"got {describe_value(value)}."
    )


def array_bytes(shape: tuple[int, ...], itemsize: int) -> int:
    """Returns the size of an array in bytes.

    NumPy must be able to address the array even where an axis of length 0 makes it empty.
    """
    if math.prod(n or 1 for n in shape) * itemsize > sys.maxsize:
        raise FileFormatError(f"the shape {shape} is too large to be addressed.")
    return math.prod(shape) * itemsize


def insert_pairs(target: Any, items: list[Any]) -> Any:
    """Inserts alternating keys and values into a dict.

    Tuples are not accepted as keys: hashing a deeply nested one overflows the stack.
    """
    if type(target) not in (dict, OrderedDict) or len(items) % 2:
        raise FileFormatError(
            f"keys and values must come in pairs, for a dict; got {len(items)} items for "
            f"{describe_value(target)}."
        )
    for key, value in zip(items[::2], items[1::2], strict=True):
        is_long = isinstance(key, int) and key.bit_length() > 64
        if is_long or not isinstance(key, str | bytes | int | float | None):
            raise FileFormatError(
                f"a key of a dict must be text or a number of 64 bits; got {describe_value(key)}."
            )
        target[NumberKey(str(key)) if isinstance(key, int | float) else key] = value
    return target


def check_size(nbytes: int, max_bytes: int, name: str) -> None:
    """Checks that `name` takes at most `max_bytes` in memory."""
    if nbytes > max_bytes:
        raise UnsafeFileError(
            f"{name} would take {nbytes} bytes, over max_bytes={max_bytes}. "
            "If that is intended, pass a larger max_bytes."
        )


def check_explained(nbytes: int, size: int, name: str) -> None:
    """Checks that `name` takes no more memory than a file of `size` bytes explains."""
    limit = max(FREE_BYTES, MAX_GROWTH * size)
    if nbytes > limit:
        raise UnsafeFileError(
            f"{name} would take {nbytes} bytes, which its size of {size} bytes does not explain; "
            f"expected at most {limit}."
        )


def text_keyed(tree: dict[Any, Any]) -> dict[str, Any]:
    """Returns the dict with its keys as text. Some pickles have keys of bytes."""
    entries = {}
    for key, value in tree.items():
        match key:
            case NumberKey(text):
                entries[text] = value
            case bytes():
                entries[key.decode("latin1")] = value
            case _:
                entries[str(key)] = value
    if len(entries) < len(tree):
        raise FileFormatError("two of its entries have the same name.")
    return entries
