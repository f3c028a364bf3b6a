"""A clip as pictures, and where the positions of a map lie on them."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from nonlocal_jax.visualize.geometry import Geometry, Pixels, pixels_of
from nonlocal_jax.visualize.maps import AffinityMap


def to_pixels(affinity: AffinityMap, positions: Any, of: str = "queries") -> Pixels:
    """The input frames and pixels that positions of a map see, by the receptive fields of the network.

    Strides, padding and pooling of the path are followed, and for "keys" their subsampling; at borders what is seen indeed.
    Left out is what mixes all positions: other non-local blocks on the way, and sums over whole axes, as norms' statistics.

    Args:
        affinity: of `affinities`.
        positions: (..., axes), of the map of the queries, or of the keys.
        of: "queries" or "keys".

    Returns:
        The first and the last input index that is seen, and the middle, each (..., axes of the input).

    Raises:
        IndexError: a position outside the map.
        ValueError: positions that are not integers of as many axes; GeometryError where the path to the block is not one of
            windows (convolutions, poolings, slices), and says what is in the way.

    >>> import jax, jax.numpy as jnp
    >>> import flax.linen as nn, nonlocal_jax as nl
    >>> model = nn.Sequential([nn.Conv(8, (3, 3), strides=2), nl.layers.nonlocal_block("embedded_gaussian")])
    >>> image = jnp.ones((1, 24, 24, 3))
    >>> maps = nl.visualize.affinities(model, model.init(jax.random.key(0), image), image)
    >>> seen = to_pixels(maps["layers_1"], (5, 7))
    >>> seen.first, seen.last, seen.centre
    (array([10, 14]), array([12, 16]), array([11., 15.]))
    >>> to_pixels(maps["layers_1"], (2, 3), of="keys").last
    array([12, 16])
    """
    return pixels_of(affinity.geometry(of), positions)


def from_pixels(affinity: AffinityMap, where: Any) -> tuple[int, ...]:
    """The query whose receptive field has its middle nearest to an input position: from what one sees to what one asks.

    Args:
        affinity: of `affinities`.
        where: frame, row and column of the input, row and column in an image; fractions are welcome.

    Returns:
        A position of the map `affinity.queries`, for `rows`, `arrows` and the like; of equals the first.

    Raises:
        ValueError: not one number for each axis of the input, or a position outside of it.
        GeometryError: as `to_pixels`.

    >>> import jax, jax.numpy as jnp
    >>> import flax.linen as nn, nonlocal_jax as nl
    >>> model = nn.Sequential([nn.Conv(8, (3, 3), strides=2), nl.layers.nonlocal_block("embedded_gaussian")])
    >>> image = jnp.ones((1, 24, 24, 3))
    >>> maps = nl.visualize.affinities(model, model.init(jax.random.key(0), image), image)
    >>> from_pixels(maps["layers_1"], (11, 15))
    (5, 7)
    """
    size = np.array(affinity.geometry().input)
    where = np.asarray(where, float)
    if where.shape != size.shape or not ((where >= -0.5) & (where <= size - 0.5)).all():
        raise ValueError(
            f"where must be {len(size)} numbers, a position inside the input {tuple(size.tolist())}; got {where}."
        )
    every = np.moveaxis(np.indices(affinity.queries), 0, -1).reshape(-1, len(affinity.queries))
    distance = np.abs(to_pixels(affinity, every).centre - where).sum(axis=-1)
    return tuple(every[distance.argmin()].tolist())


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a picture of a map is drawn on.

    Attributes:
        pictures: (T, H, W, 3), from 0 to 1: for each frame of the map of queries the input frame in the middle of what it sees.
        numbers: (T,), which input frames these are.
        queries, keys: the receptive fields, always of (T, H, W); an image is a clip of one frame.
    """

    pictures: Float[np.ndarray, "t h w 3"]
    numbers: Int[np.ndarray, " t"]
    queries: Geometry
    keys: Geometry

    def place(self, position: Any, of: str) -> tuple[int, float, float]:
        """Panel, row and column (in pixels) of a position of the map of "queries" or "keys"."""
        geometry = self.queries if of == "queries" else self.keys
        frame, row, column = pixels_of(geometry, np.asarray(position)).centre
        panel = position[0] if of == "queries" else int(np.abs(self.centres - frame).argmin())
        return int(panel), float(row), float(column)

    def key_frame(self, panel: int) -> int:
        """The frame of the keys that lies nearest to a panel."""
        field = self.keys.fields[0]
        if field is None:
            return 0
        return int(
            np.abs(
                field.stride * np.arange(self.keys.grid[0]) + field.centre - self.centres[panel]
            ).argmin()
        )

    @property
    def centres(self) -> Float[np.ndarray, " t"]:
        """The middle, in time, of each frame of the map."""
        frames = np.arange(self.queries.grid[0])
        return pixels_of(self.queries, np.stack([frames, 0 * frames, 0 * frames], axis=-1)).centre[
            :, 0
        ]

    def edges(self, of: str) -> tuple[Float[np.ndarray, " columns"], Float[np.ndarray, " rows"]]:
        """Where the cells of a map of "queries" or "keys" begin and end, along columns and rows, in pixels.

        They reach half way to the neighbours' middles, and at the borders to the border.
        """
        geometry = self.queries if of == "queries" else self.keys
        edges = []
        for axis in (2, 1):
            field, n, length = geometry.fields[axis], geometry.grid[axis], geometry.input[axis]
            between: Any = (
                [] if field is None else field.stride * (np.arange(1, n) - 0.5) + field.centre
            )
            edges.append(np.array([-0.5, *between, length - 0.5]).clip(-0.5, length - 0.5))
        return edges[0], edges[1]


def of_sample(affinity: AffinityMap, clip: Any, sample: int) -> tuple[AffinityMap, Scene]:
    """The map of one clip of the batch, and what it is drawn on; `clip` is the batch or that one of it."""
    one = affinity[sample]
    if np.ndim(clip) == len(one.geometry().input) + 2 and len(clip) == affinity.batch:
        clip = clip[sample]
    return one, scene(one, clip)


def scene(affinity: AffinityMap, clip: Any) -> Scene:
    """The frames to draw a map on.

    Args:
        affinity: of one clip, a video or an image.
        clip: that clip, (T, H, W, C), or the image (H, W, C), of 1 or 3 channels: integers from 0 to 255, or numbers from
            0 to 1; others, as of a normalised clip, are stretched from their smallest to their largest.

    Raises:
        ValueError: a sequence, a map of which rows do not run along rows, a clip of another size than the network saw, or one
            that is not finite.
    """
    queries, keys = affinity.geometry("queries"), affinity.geometry("keys")
    if len(queries.input) not in (2, 3) or len(queries.grid) not in (2, 3):
        raise ValueError(
            f"pictures want a map of (T, H, W) or (H, W); {affinity.block} has {queries.grid}."
        )
    clip = np.asarray(clip)
    if clip.ndim == len(queries.input) + 2 and len(clip) == 1:
        clip = clip[0]
    if clip.shape[:-1] != queries.input or clip.shape[-1] not in (1, 3):
        raise ValueError(
            f"clip must be the one that the network saw, {(*queries.input, 3)}, with 1 or 3 channels; got {clip.shape}."
        )
    if not np.issubdtype(clip.dtype, np.integer) and not np.isfinite(clip).all():
        raise ValueError("clip must be finite; got NaN or infinity.")
    if np.issubdtype(clip.dtype, np.integer) and clip.min() >= 0 and clip.max() <= 255:
        clip = clip.astype(np.float32) / 255
    elif clip.min() < 0 or clip.max() > 1:
        clip = clip.astype(np.float32) - clip.min()
        clip /= max(clip.max(), np.finfo(np.float32).tiny)
    clip = clip.reshape(*(1,) * (4 - clip.ndim), *clip.shape)
    queries, keys = _with_time(queries), _with_time(keys)
    for field, axis in zip(queries.fields, range(3), strict=True):
        if field is not None and field.axis != axis:
            raise ValueError(
                f"pictures want the axes of a map in the order of the input's; those of {affinity.block} are not."
            )
    one = Scene(np.empty((0, 1, 1, 3)), np.empty(0, int), queries, keys)
    numbers = np.floor(one.centres + 0.5).astype(int).clip(0, len(clip) - 1)
    pictures = np.broadcast_to(clip, (*clip.shape[:-1], 3))[numbers].astype(np.float32)
    return dataclasses.replace(one, pictures=pictures, numbers=numbers)


def _with_time(geometry: Geometry) -> Geometry:
    """That of an image as of a clip of one frame; a map without time, of a video, as one that sees all of it."""
    fields, grid, size = geometry.fields, geometry.grid, geometry.input
    if len(size) == 2:
        fields, size = (
            tuple(field and dataclasses.replace(field, axis=field.axis + 1) for field in fields),
            (1, *size),
        )
    if len(grid) == 2:
        fields, grid = (None, *fields), (1, *grid)
    return Geometry(fields, grid, size)
