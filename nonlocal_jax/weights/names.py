"""What a table of names is made of: rows that read both ways, and what is done to the arrays.

`{stage}`, `{i}` and the like stand for the same thing in a name of theirs and in ours; `words` says how each is written there
where it is not written as here. Our names are paths in `params`, or in `batch_stats` for "mean" and "var".
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy.typing as npt

Weights = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Transform:
    """From an array of theirs to one of ours, and back.

    Attributes:
        shapes: what it does to the axes; O and I are output and input channels.
        to_ours, to_theirs: the two directions.
    """

    shapes: str
    to_ours: Callable[[Weights], Weights]
    to_theirs: Callable[[Weights], Weights]


def _flat(array: Weights, axes: int) -> Weights:
    """Without the axes of length 1 after the first few; other shapes stay, and are then refused for what they are."""
    return (
        array.reshape(array.shape[:axes])
        if array.size and set(array.shape[axes:]) <= {1}
        else array
    )


def _conv_to_ours(array: Weights) -> Weights:
    if array.ndim == 4:  # of an image network
        array = array[:, :, None]
    return array.transpose(2, 3, 4, 1, 0) if array.ndim == 5 else array


def _matrix_to_ours(array: Weights) -> Weights:
    array = _flat(array, 2)
    return array.T if array.ndim == 2 else array


VECTOR = Transform("(C,) → (C,)", lambda a: _flat(a, 1), lambda a: a)
CONV = Transform(
    "(O, I, T, H, W) → (T, H, W, I, O)", _conv_to_ours, lambda a: a.transpose(4, 3, 0, 1, 2)
)
CONV2D = Transform(
    "(O, I, H, W) → (H, W, I, O)",
    lambda a: a.transpose(2, 3, 1, 0) if a.ndim == 4 else a,
    lambda a: a.transpose(3, 2, 0, 1),
)
DENSE = Transform("(O, I) → (I, O)", _matrix_to_ours, lambda a: a.T)
POINTWISE = Transform(
    "(O, I, 1, 1, 1) → (I, O)", _matrix_to_ours, lambda a: a.T[..., None, None, None]
)
POINTWISE2D = Transform("(O, I, 1, 1) → (I, O)", _matrix_to_ours, lambda a: a.T[..., None, None])
W_F = Transform(
    "(1, 2d, 1, 1) → (2d,)",
    lambda a: _flat(a[0], 1) if a.ndim > 1 else a,
    lambda a: a[None, :, None, None],
)


def dense_of_map(channels: int, height: int, width: int) -> Transform:
    """A dense layer over a flattened map, which is (C, H, W) there and (H, W, C) here."""

    def to_ours(a: Weights) -> Weights:
        if a.ndim != 2 or a.shape[1] != channels * height * width:
            return a
        return a.reshape(-1, channels, height, width).transpose(2, 3, 1, 0).reshape(-1, a.shape[0])

    def to_theirs(a: Weights) -> Weights:
        return a.reshape(height, width, channels, -1).transpose(3, 2, 0, 1).reshape(a.shape[1], -1)

    return Transform("(O, C·H·W) → (H·W·C, O)", to_ours, to_theirs)


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of weight.

    Attributes:
        theirs, ours: the name there and here.
        transform: from their array to ours.
        example: a name there, and here.
    """

    theirs: str
    ours: str
    transform: Transform
    example: tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Source:
    """The names of one source.

    Attributes:
        name: of the source.
        rows: the first that fits is taken.
        words: for each field, how our word is written there; a field without words is a number.
        no_weights: what of the file's entries is known to hold no weights.
    """

    name: str
    rows: tuple[Row, ...]
    words: Mapping[str, Mapping[str, str]]
    no_weights: tuple[str, ...] = ()

    def to_ours(self, theirs: str) -> tuple[str, Row] | None:
        """Our name of a name there, and its row; None where there is no such row."""
        for row in self.rows:
            if match := self._pattern(row, "theirs").fullmatch(theirs):
                return _fill(
                    row.ours,
                    {
                        field: self._word(field, word, back=True)
                        for field, word in match.groupdict().items()
                    },
                ), row
        return None

    def to_theirs(self, ours: str) -> tuple[str, Row] | None:
        """Their name of one here, and its row; None where there is no such row."""
        for row in self.rows:
            if match := self._pattern(row, "ours").fullmatch(ours):
                return _fill(
                    row.theirs,
                    {field: self._word(field, word) for field, word in match.groupdict().items()},
                ), row
        return None

    def holds_no_weights(self, theirs: str) -> bool:
        """Whether an entry is one of those that need not be loaded."""
        return any(re.fullmatch(pattern, theirs) for pattern in self.no_weights)

    def _word(self, field: str, word: str, back: bool = False) -> str:
        words = self.words.get(field, {})
        return (
            {there: here for here, there in words.items()}.get(word, word)
            if back
            else words.get(word, word)
        )

    def _pattern(self, row: Row, side: str) -> re.Pattern[str]:
        words = tuple(
            (field, tuple(w.values() if side == "theirs" else w.keys()))
            for field, w in self.words.items()
        )
        return _compiled(getattr(row, side), words)


@functools.cache
def _compiled(template: str, words: tuple[tuple[str, tuple[str, ...]], ...]) -> re.Pattern[str]:
    known = dict(words)
    parts = re.split(r"\{(\w+)\}", template)
    for k in range(1, len(parts), 2):
        field = parts[k]
        choices = "|".join(map(re.escape, known[field])) if field in known else "0|[1-9][0-9]*"
        parts[k] = f"(?P<{field}>{choices})"
    parts[::2] = map(re.escape, parts[::2])
    return re.compile("".join(parts))


def _fill(template: str, words: Mapping[str, str]) -> str:
    return template.format_map(words)


def variable_path(name: str) -> str:
    """The path in `variables` of a name of ours."""
    collection = "batch_stats" if name.rsplit("/", 1)[-1] in ("mean", "var") else "params"
    return f"{collection}/{name}"


def flatten(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of variables by path, "params/res2_0/conv_a/kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *outer, last = path.split("/")
        inner = tree
        for name in outer:
            inner = inner.setdefault(name, {})
        inner[last] = leaf
    return tree
