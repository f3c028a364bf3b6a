"""Naming tables, which translate the names of a source's weights and transform the arrays.

A row holds two templates. A field such as `{stage}` or `{i}` stands for the same thing in both;
`words` says how the source writes it where that differs. Native names are the paths in `params`, or
in `batch_stats` for "mean" and "var".
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy.typing as npt

Weights = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Transform:
    """Converts an array of a source to its native layout, and back.

    Arrays of an unexpected shape are returned as they are: loading then reports their shape.

    Attributes:
        shapes: The layouts in words. O and I are output and input channels.
        import_array: From the source's array to the native one.
        export_array: From the native array to the source's.
    """

    shapes: str
    import_array: Callable[[Weights], Weights]
    export_array: Callable[[Weights], Weights]


def _drop_axes(array: Weights, axes: int) -> Weights:
    """Drops the axes after the first `axes`, if all of them have length 1."""
    has_only_ones = set(array.shape[axes:]) <= {1}
    return array.reshape(array.shape[:axes]) if array.size and has_only_ones else array


def _import_conv(array: Weights) -> Weights:
    if array.ndim == 4:  # a kernel of an image network
        array = array[:, :, None]
    return array.transpose(2, 3, 4, 1, 0) if array.ndim == 5 else array


def _import_conv2d(array: Weights) -> Weights:
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array


def _import_matrix(array: Weights) -> Weights:
    array = _drop_axes(array, 2)
    return array.T if array.ndim == 2 else array


def _import_w_f(array: Weights) -> Weights:
    return _drop_axes(array[0], 1) if array.ndim > 1 else array


VECTOR = Transform("(C,) → (C,)", lambda array: _drop_axes(array, 1), lambda array: array)
CONV = Transform(
    "(O, I, T, H, W) → (T, H, W, I, O)",
    _import_conv,
    lambda array: array.transpose(4, 3, 0, 1, 2),
)
CONV2D = Transform(
    "(O, I, H, W) → (H, W, I, O)", _import_conv2d, lambda array: array.transpose(3, 2, 0, 1)
)
DENSE = Transform("(O, I) → (I, O)", _import_matrix, lambda array: array.T)
POINTWISE = Transform(
    "(O, I, 1, 1, 1) → (I, O)", _import_matrix, lambda array: array.T[..., None, None, None]
)
POINTWISE2D = Transform(
    "(O, I, 1, 1) → (I, O)", _import_matrix, lambda array: array.T[..., None, None]
)
W_F = Transform("(1, 2d, 1, 1) → (2d,)", _import_w_f, lambda array: array[None, :, None, None])


def flattened_dense(channels: int, height: int, width: int) -> Transform:
    """Makes the transform of a dense layer over a flattened (C, H, W), here (H, W, C)."""

    def import_array(array: Weights) -> Weights:
        if array.ndim != 2 or array.shape[1] != channels * height * width:
            return array
        kernel = array.reshape(-1, channels, height, width).transpose(2, 3, 1, 0)
        return kernel.reshape(-1, array.shape[0])

    def export_array(array: Weights) -> Weights:
        kernel = array.reshape(height, width, channels, -1).transpose(3, 2, 0, 1)
        return kernel.reshape(array.shape[1], -1)

    return Transform("(O, C·H·W) → (H·W·C, O)", import_array, export_array)


@dataclasses.dataclass(frozen=True)
class Row:
    """The names of one kind of weight.

    Attributes:
        source: Template of the source's name.
        native: Template of the native name.
        transform: From the source's array to the native one.
        example: A name of the source, and the native name of the same weight.
    """

    source: str
    native: str
    transform: Transform
    example: tuple[str, str]


@dataclasses.dataclass(frozen=True)
class NamingTable:
    """How one source names its weights, and what else its files imply about their networks.

    Attributes:
        name: Name of the source.
        rows: The templates. The first row that matches is used.
        words: For each field, from the native word to the source's. A field without words is a
            number.
        non_weights: Patterns of the entries that are known to hold no weights.
        epsilon: ε of BatchNorm with which running statistics are folded into affine maps.
        pooled_key: A part of the names of g that only blocks with pooled keys have; None where
            names do not tell.
        shows_pool2: Whether names tell that there is a pool2, without which they would be others.
        flat_c2d: Whether the source's C2D is its network for images, with kernels of two axes.
        network_options: Options of `video_resnet` that the source's networks have in addition to
            their preset.
        frozen_group_size: Option `group_size` of the source's networks with frozen norms for clips
            of 32×4 and 128×1.
    """

    name: str
    rows: tuple[Row, ...]
    words: Mapping[str, Mapping[str, str]]
    non_weights: tuple[str, ...] = ()
    epsilon: float = 1e-5
    pooled_key: str | None = None
    shows_pool2: bool = False
    flat_c2d: bool = False
    network_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    frozen_group_size: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def native_name(self, source_name: str) -> tuple[str, Row] | None:
        """Returns the native name of a source's name, and its row; None if no row matches."""
        for pattern, row in self._source_patterns:
            if match := pattern.fullmatch(source_name):
                fields = {
                    field: self._native_words.get(field, {}).get(word, word)
                    for field, word in match.groupdict().items()
                }
                return row.native.format_map(fields), row
        return None

    def source_name(self, native_name: str) -> tuple[str, Row] | None:
        """Returns the source's name of a native name, and its row; None if no row matches."""
        for pattern, row in self._native_patterns:
            if match := pattern.fullmatch(native_name):
                fields = {
                    field: self.words.get(field, {}).get(word, word)
                    for field, word in match.groupdict().items()
                }
                return row.source.format_map(fields), row
        return None

    def holds_no_weights(self, source_name: str) -> bool:
        """Whether an entry of this name need not be loaded."""
        return any(re.fullmatch(pattern, source_name) for pattern in self.non_weights)

    @functools.cached_property
    def _native_words(self) -> dict[str, dict[str, str]]:
        return {
            field: {source: native for native, source in spelling.items()}
            for field, spelling in self.words.items()
        }

    @functools.cached_property
    def _source_patterns(self) -> tuple[tuple[re.Pattern[str], Row], ...]:
        return tuple((_pattern(row.source, self._native_words), row) for row in self.rows)

    @functools.cached_property
    def _native_patterns(self) -> tuple[tuple[re.Pattern[str], Row], ...]:
        return tuple((_pattern(row.native, self.words), row) for row in self.rows)


def _pattern(template: str, words: Mapping[str, Iterable[str]]) -> re.Pattern[str]:
    """Compiles a template to a pattern with one named group for each field."""
    parts = re.split(r"\{(\w+)\}", template)
    for k in range(1, len(parts), 2):
        field = parts[k]
        choices = "|".join(map(re.escape, words[field])) if field in words else "0|[1-9][0-9]*"
        parts[k] = f"(?P<{field}>{choices})"
    parts[::2] = map(re.escape, parts[::2])
    return re.compile("".join(parts))


def variable_path(name: str) -> str:
    """Returns the path in the variables of a native name, "params/res2_0/conv_a/kernel"."""
    is_statistic = name.rsplit("/", 1)[-1] in ("mean", "var")
    return f"{'batch_stats' if is_statistic else 'params'}/{name}"


def flatten(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the leaves of variables by path, such as "params/res2_0/conv_a/kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Inverts `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        branch = tree
        for name in parents:
            branch = branch.setdefault(name, {})
        branch[last] = leaf
    return tree
