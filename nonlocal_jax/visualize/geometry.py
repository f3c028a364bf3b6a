"""Which input frames and pixels a position of a feature map sees: the receptive field.

Away from the borders, index j along an axis of a feature map sees the input indices stride · j + start to
stride · j + start + size − 1. A convolution or pooling of k taps, with stride s and p positions of padding, makes of that

    stride ← s · stride,   start ← start − p · stride,   size ← size + (k − 1) · stride.

At the borders it sees less, and what poolings without padding leave over is seen by none; so what each index sees is kept.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

NOTHING = np.iinfo(np.int64).max  # the first index of what sees padding alone


class GeometryError(ValueError):
    """Positions that cannot be followed back to the input."""


@dataclasses.dataclass(frozen=True)
class Field:
    """What the indices along one axis of a map see of one axis of the input.

    Attributes:
        axis: of the input, 0 being the first position axis: frames of a video, rows of an image.
        stride: input indices from one index to the next.
        start: the first input index that index 0 sees, were there no borders.
        size: how many it sees.
        first: for each index, the first input index that it sees indeed: padding is not seen, nor what poolings leave over.
        last: the last one; less than `first` where an index sees padding alone.
    """

    axis: int
    stride: int
    start: int
    size: int
    first: Int[np.ndarray, " n"]
    last: Int[np.ndarray, " n"]

    @classmethod
    def of_input(cls, axis: int, length: int) -> "Field":
        """Each index sees itself."""
        return cls(axis, 1, 0, 1, np.arange(length), np.arange(length))

    def through(
        self, taps: int = 1, stride: int = 1, padding: tuple[int, int] = (0, 0), dilation: int = 1
    ) -> "Field":
        """After a convolution or a pooling.

        >>> after = Field.of_input(0, 224).through(7, 2, (3, 3)).through(3, 2, (1, 1))  # conv1 and pool1 of a ResNet
        >>> after.stride, after.start, after.size, after.first[:3], after.last[-1]
        (4, -5, 11, array([0, 0, 3]), np.int64(223))
        """
        before, behind = padding
        span = (taps - 1) * dilation + 1
        count = (len(self.first) + before + behind - span) // stride + 1
        seen = (
            np.arange(count)[:, None] * stride + np.arange(taps) * dilation - before
        )  # indices of this field
        real = (seen >= 0) & (seen < len(self.first))
        seen = np.clip(seen, 0, len(self.first) - 1)
        return Field(
            self.axis,
            stride * self.stride,
            self.start - before * self.stride,
            self.size + (span - 1) * self.stride,
            np.where(real, self.first[seen], NOTHING).min(axis=1),
            np.where(real, self.last[seen], -1).max(axis=1),
        )

    def joined(self, other: "Field") -> "Field | None":
        """The smallest field that holds both, as of a sum; None where there is none."""
        if (self.axis, self.stride) != (other.axis, other.stride):
            return None
        start, end = (
            min(self.start, other.start),
            max(self.start + self.size, other.start + other.size),
        )
        first, last = np.minimum(self.first, other.first), np.maximum(self.last, other.last)
        return Field(self.axis, self.stride, start, end - start, first, last)

    @property
    def centre(self) -> float:
        """The middle of what index 0 sees, were there no borders."""
        return self.start + (self.size - 1) / 2


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The receptive fields of a feature map.

    Attributes:
        fields: for each of its axes; None for one of size 1 that sees all, as after an average over time.
        grid: its size.
        input: the size of the input, (T, H, W), (H, W) or (N,).
    """

    fields: tuple[Field | None, ...]
    grid: tuple[int, ...]
    input: tuple[int, ...]

    def pooled(self, window: Sequence[int]) -> "Geometry":
        """That of keys which are the largest of windows, as the non-local block subsamples them."""
        fields = tuple(
            None if field is None else field.through(size, size)
            for field, size in zip(self.fields, window, strict=True)
        )
        return Geometry(
            fields, tuple(n // size for n, size in zip(self.grid, window, strict=True)), self.input
        )


class Pixels(NamedTuple):
    """Input positions, by axis: frame, row and column in video, row and column in an image.

    Attributes:
        first: (..., axes), the first index that is seen.
        last: (..., axes), the last one; `first` - 1 where padding alone is seen.
        centre: (..., axes), the middle of the receptive field before it is cut off at the borders of the input, or the border
            where it lies beyond.
    """

    first: Int[np.ndarray, "*q axes"]
    last: Int[np.ndarray, "*q axes"]
    centre: Float[np.ndarray, "*q axes"]


def pixels_of(geometry: Geometry, positions: Any) -> Pixels:
    """What positions (..., grid axes) see. Raises IndexError where one lies outside the grid."""
    positions = np.asarray(positions)
    if (
        positions.ndim == 0
        or positions.shape[-1] != len(geometry.grid)
        or not np.issubdtype(positions.dtype, np.integer)
    ):
        raise ValueError(
            f"positions must be integers, (..., {len(geometry.grid)}) for a map of {geometry.grid}; got {positions.dtype} "
            f"of shape {positions.shape}."
        )
    outside = (positions < 0) | (positions >= np.array(geometry.grid))
    if outside.any():
        position = tuple(
            positions.reshape(-1, len(geometry.grid))[
                np.nonzero(outside.reshape(-1, outside.shape[-1]))[0][0]
            ]
        )
        raise IndexError(
            f"positions must lie inside the map {geometry.grid}; got {tuple(map(int, position))}."
        )
    shape = (*positions.shape[:-1], len(geometry.input))
    limit = np.array(geometry.input) - 1
    first, last = np.zeros(shape, np.int64), np.broadcast_to(limit, shape).copy()
    centre = np.broadcast_to(limit / 2, shape).copy()
    for field, index in zip(geometry.fields, np.moveaxis(positions, -1, 0), strict=True):
        if field is not None:
            first[..., field.axis], last[..., field.axis] = field.first[index], field.last[index]
            centre[..., field.axis] = field.stride * index + field.centre
    centre = np.clip(centre, 0, limit)
    first = np.where(last < first, np.floor(centre).astype(np.int64), first)
    return Pixels(first, np.maximum(last, first - 1), centre)
