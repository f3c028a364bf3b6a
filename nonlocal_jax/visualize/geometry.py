"""Receptive fields: which input frames and pixels each position of a feature map depends on.

Away from the borders, index j along an axis of a feature map depends on the input indices from
stride · j + start to stride · j + start + size − 1. A convolution or pooling of k taps with stride
s and padding p turns this into

    stride ← s · stride,   start ← start − p · stride,   size ← size + (k − 1) · stride.

At the borders the field is clipped by the padding, and pooling without padding drops the last
indices. The clipped range of every index is therefore stored as well.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from nonlocal_jax import checks

EMPTY_FIRST = np.iinfo(np.int64).max  # `first` of an index that covers padding only


class GeometryError(ValueError):
    """Raised where positions of a feature map cannot be traced back to the input."""


@dataclasses.dataclass(frozen=True)
class Field:
    """Receptive fields of the indices along one axis of a feature map, on one axis of the input.

    Attributes:
        axis: Input axis, 0 being the first position axis: frames of a video, rows of an image.
        stride: Input indices from one index of the map to the next.
        start: First input index of the field of index 0, borders ignored.
        size: Number of input indices in a field, borders ignored.
        first: First input index of each field after clipping at the borders.
        last: Last input index of each field after clipping; less than `first` where a field covers
            padding only.
    """

    axis: int
    stride: int
    start: int
    size: int
    first: Int[np.ndarray, " n"]
    last: Int[np.ndarray, " n"]

    @classmethod
    def identity(cls, axis: int, length: int) -> "Field":
        """Returns the field of the input itself: each index covers only itself."""
        return cls(axis, 1, 0, 1, np.arange(length), np.arange(length))

    def windowed(
        self, taps: int = 1, stride: int = 1, padding: tuple[int, int] = (0, 0), dilation: int = 1
    ) -> "Field":
        """Returns the field after a convolution or pooling along this axis.

        Args:
            taps: Size of the window.
            stride: Stride of the window.
            padding: Padding at the low and the high end; negative numbers crop.
            dilation: Distance between neighbouring taps.

        >>> conv1 = Field.identity(0, 224).windowed(7, 2, (3, 3))
        >>> pool1 = conv1.windowed(3, 2, (1, 1))  # the stem of a ResNet
        >>> pool1.stride, pool1.start, pool1.size, pool1.first[:3], pool1.last[-1]
        (4, -5, 11, array([0, 0, 3]), np.int64(223))
        """
        low, high = padding
        length = len(self.first)
        span = (taps - 1) * dilation + 1
        count = (length + low + high - span) // stride + 1
        offsets = np.arange(taps) * dilation - low
        indices = np.arange(count)[:, None] * stride + offsets
        inside = (indices >= 0) & (indices < length)
        indices = np.clip(indices, 0, length - 1)
        return Field(
            axis=self.axis,
            stride=stride * self.stride,
            start=self.start - low * self.stride,
            size=self.size + (span - 1) * self.stride,
            first=np.where(inside, self.first[indices], EMPTY_FIRST).min(axis=1),
            last=np.where(inside, self.last[indices], -1).max(axis=1),
        )

    def union(self, field: "Field") -> "Field | None":
        """Returns the smallest field that contains both, as for a sum of two maps.

        Returns None if the fields lie on different input axes or have different strides.
        """
        if (self.axis, self.stride) != (field.axis, field.stride):
            return None
        start = min(self.start, field.start)
        end = max(self.start + self.size, field.start + field.size)
        first = np.minimum(self.first, field.first)
        last = np.maximum(self.last, field.last)
        return Field(self.axis, self.stride, start, end - start, first, last)

    @property
    def centre(self) -> float:
        """Centre of the field of index 0, borders ignored."""
        return self.start + (self.size - 1) / 2


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Receptive fields of a feature map.

    Attributes:
        fields: Field of each axis of the map; None for an axis of size 1 that depends on the whole
            input axis, as after an average over time.
        grid: Size of the map.
        input: Size of the input: (T, H, W), (H, W) or (N,).
    """

    fields: tuple[Field | None, ...]
    grid: tuple[int, ...]
    input: tuple[int, ...]

    def pooled(self, window: Sequence[int]) -> "Geometry":
        """Returns the geometry after max pooling, as the non-local block subsamples its keys."""
        fields = tuple(
            None if field is None else field.windowed(size, size)
            for field, size in zip(self.fields, window, strict=True)
        )
        grid = tuple(length // size for length, size in zip(self.grid, window, strict=True))
        return Geometry(fields, grid, self.input)


class Pixels(NamedTuple):
    """Input positions: frame, row and column of a video; row and column of an image.

    Attributes:
        first: (..., axes), first input index of the receptive field.
        last: (..., axes), last input index; `first` - 1 where the field covers padding only.
        centre: (..., axes), centre of the receptive field before it is clipped at the borders of
            the input, moved to the border if it lies outside.
    """

    first: Int[np.ndarray, "*q axes"]
    last: Int[np.ndarray, "*q axes"]
    centre: Float[np.ndarray, "*q axes"]


def check_side(side: str) -> None:
    """Checks the argument that chooses between the queries and the keys."""
    checks.one_of("of", side, ("queries", "keys"))


def pixels_of(geometry: Geometry, positions: Any) -> Pixels:
    """Returns the receptive fields of positions (..., axes of the map).

    Raises:
        ValueError: Positions that are not integers with one number for each axis of the map.
        IndexError: A position outside the map.
    """
    positions = np.asarray(positions)
    _check_positions(positions, geometry.grid)
    shape = (*positions.shape[:-1], len(geometry.input))
    limit = np.array(geometry.input) - 1
    # Input axes without a field are covered from end to end.
    first = np.zeros(shape, np.int64)
    last = np.broadcast_to(limit, shape).copy()
    centre = np.broadcast_to(limit / 2, shape).copy()
    for field, index in zip(geometry.fields, np.moveaxis(positions, -1, 0), strict=True):
        if field is not None:
            first[..., field.axis] = field.first[index]
            last[..., field.axis] = field.last[index]
            centre[..., field.axis] = field.stride * index + field.centre
    centre = np.clip(centre, 0, limit)
    first = np.where(last < first, np.floor(centre).astype(np.int64), first)
    return Pixels(first, np.maximum(last, first - 1), centre)


def _check_positions(positions: Any, grid: tuple[int, ...]) -> None:
    integers = np.issubdtype(positions.dtype, np.integer)
    if positions.ndim == 0 or positions.shape[-1] != len(grid) or not integers:
        raise ValueError(
            f"positions must be integers of shape (..., {len(grid)}) for a map of size {grid}; got "
            f"{positions.dtype} of shape {positions.shape}."
        )
    outside = ((positions < 0) | (positions >= np.array(grid))).any(axis=-1)
    if outside.any():
        position = tuple(map(int, positions[outside][0]))
        raise IndexError(f"positions must lie inside the map {grid}; got {position}.")
