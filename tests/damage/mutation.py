"""Mutates files at random, and checks that a reader answers each with a value or a documented
error.

A mutation depends only on the file, its seed and its number, so a failure can be repeated.
"""

import collections
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

# Values that lengths, counts, offsets and exponents break at.
EXTREMES = [
    number.to_bytes(width, order)
    for width in (2, 4, 8)
    for number in (0, 1, (1 << (8 * width - 1)) - 1, 1 << (8 * width - 1), (1 << (8 * width)) - 1)
    for order in ("little", "big")
]
# Text that breaks parsers of numbers, names and structure.
TEXTS = [
    *(
        b"\0",
        b"\n",
        b"\r",
        b"\t",
        b" ",
        b'"',
        b"'",
        b"\\",
        b"/",
        b",",
        b";",
        b":",
        b"#",
        b"%",
        b".",
    ),
    *(
        b"..",
        b"-",
        b"-1",
        b"1e999",
        b"NaN",
        b"Infinity",
        b"null",
        b"true",
        b"{}",
        b"[]",
        b"[",
        b"}",
    ),
    *(b"9" * 40, b"\xff", b"\xc3\x28", b"\xef\xbb\xbf", b"\x1b[2J", b"[/x]", "é".encode()),
    b"[" * 3000,
]


def mutate(data: bytes, generator: np.random.Generator) -> bytes:
    """Returns `data` with one to three random changes."""
    for _ in range(generator.choice([1, 1, 1, 2, 3])):
        data = CHANGES[generator.integers(len(CHANGES))](data, generator)
    return data


def mutations(data: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """Yields `count` mutated versions of a file."""
    for number in range(count):
        yield mutate(data, np.random.default_rng((seed, number)))


def outcomes(
    read: Callable[[Path], object],
    path: Path,
    data: bytes,
    count: int,
    errors: tuple[type[Exception], ...],
    *,
    seed: int = 0,
    seconds: float = 30.0,
) -> collections.Counter[str]:
    """Reads mutated versions of a file.

    Args:
        read: Reader under test.
        path: Where each version is written.
        data: The undamaged file.
        count: Number of versions.
        errors: The documented errors of the reader. Each must name the file.
        seed: Of the mutations.
        seconds: Longest time that the reader may take.

    Returns:
        How many versions were read, and how many raised each error.

    Raises:
        AssertionError: A version raised another error, or took too long. It stays at `path`.
    """
    found: collections.Counter[str] = collections.Counter()
    for number, mutated in enumerate(mutations(data, count, seed)):
        path.write_bytes(mutated)
        start = time.monotonic()
        try:
            read(path)
        except Exception as error:
            if not isinstance(error, errors) or path.name not in str(error):
                message = f"mutation {number} of {path}, seed {seed}: {error!r}"
                raise AssertionError(message) from error
            found[type(error).__name__] += 1
        else:
            found["read"] += 1
        taken = time.monotonic() - start
        assert taken < seconds, f"mutation {number} of {path}, seed {seed}, took {taken:.0f} s"
    return found


def _place(data: bytes, generator: np.random.Generator) -> int:
    """Returns a position, which is near an end of the file in two of three cases.

    Headers and directories are at the ends, and a uniform choice would rarely meet them.
    """
    near = int(min(len(data), generator.exponential(200)))
    return (near, len(data) - near, int(generator.integers(len(data) + 1)))[generator.integers(3)]


def _length(data: bytes, generator: np.random.Generator) -> int:
    return int(min(len(data), generator.choice([1, 2, 4, 8, 16, 64, 512])))


def _flip_bit(data: bytes, generator: np.random.Generator) -> bytes:
    place = min(_place(data, generator), len(data) - 1)
    if place < 0:
        return data
    return data[:place] + bytes([data[place] ^ 1 << generator.integers(8)]) + data[place + 1 :]


def _overwrite(data: bytes, generator: np.random.Generator) -> bytes:
    place, length = _place(data, generator), _length(data, generator)
    return data[:place] + generator.bytes(length) + data[place + length :]


def _zero(data: bytes, generator: np.random.Generator) -> bytes:
    place, length = _place(data, generator), _length(data, generator)
    return data[:place] + bytes(length) + data[place + length :]


def _delete(data: bytes, generator: np.random.Generator) -> bytes:
    place = _place(data, generator)
    return data[:place] + data[place + _length(data, generator) :]


def _repeat(data: bytes, generator: np.random.Generator) -> bytes:
    place, length = _place(data, generator), _length(data, generator)
    return data[: place + length] + data[place:]


def _move(data: bytes, generator: np.random.Generator) -> bytes:
    source, place, length = (
        _place(data, generator),
        _place(data, generator),
        _length(data, generator),
    )
    return data[:place] + data[source : source + length] + data[place + length :]


def _truncate(data: bytes, generator: np.random.Generator) -> bytes:
    return data[: _place(data, generator)]


def _extreme(data: bytes, generator: np.random.Generator) -> bytes:
    place, value = _place(data, generator), EXTREMES[generator.integers(len(EXTREMES))]
    return data[:place] + value + data[place + len(value) :]


def _insert_text(data: bytes, generator: np.random.Generator) -> bytes:
    place = _place(data, generator)
    return data[:place] + TEXTS[generator.integers(len(TEXTS))] + data[place:]


def _replace_text(data: bytes, generator: np.random.Generator) -> bytes:
    place, text = _place(data, generator), TEXTS[generator.integers(len(TEXTS))]
    return data[:place] + text + data[place + len(text) :]


CHANGES = [
    *(_flip_bit, _flip_bit, _overwrite, _zero, _delete, _repeat, _move, _truncate, _extreme),
    *(_insert_text, _replace_text),
]
