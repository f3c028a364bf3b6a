"""Positions of affinity maps in the input, and the frames on which maps are drawn."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from nonlocal_jax.visualize.affinity_map import AffinityMap
from nonlocal_jax.visualize.geometry import Field, Geometry, Pixels, pixels_of


def to_pixels(affinity: AffinityMap, positions: Any, of: str = "queries") -> Pixels:
    """Returns the receptive fields of positions of a map: the frames and pixels they depend on.

    Follows the strides, padding and pooling of the layers between the input and the block, and for
    "keys" their subsampling. Fields are clipped at the borders of the input. What combines all
    positions is left out: other non-local blocks and sums over whole axes, such as the statistics
    of norms.

    Args:
        affinity: A map that `affinities` returned.
        positions: (..., axes), positions of the map of the queries or of the keys.
        of: "queries" or "keys".

    Returns:
        The first and the last input index and the centre of each field, each (..., axes of the
        input).

    Raises:
        IndexError: A position outside the map.
        ValueError: Positions that are not integers, or have another number of axes than the map.
        GeometryError: The block is reached by something other than windows (convolutions, pooling,
            slices); the message names the obstacle.

    >>> import jax, jax.numpy as jnp
    >>> import flax.linen as nn, nonlocal_jax as nl
    >>> block = nl.layers.nonlocal_block("embedded_gaussian")
    >>> model = nn.Sequential([nn.Conv(8, (3, 3), strides=2), block])
    >>> image = jnp.ones((1, 24, 24, 3))
    >>> maps = nl.visualize.affinities(model, model.init(jax.random.key(0), image), image)
    >>> field = to_pixels(maps["layers_1"], (5, 7))
    >>> field.first, field.last, field.centre
    (array([10, 14]), array([12, 16]), array([11., 15.]))
    >>> to_pixels(maps["layers_1"], (2, 3), of="keys").last
    array([12, 16])
    """
    return pixels_of(affinity.geometry(of), positions)


def from_pixels(affinity: AffinityMap, pixel: Any) -> tuple[int, ...]:
    """Returns the query whose receptive field has its centre nearest to an input position.

    Args:
        affinity: A map that `affinities` returned.
        pixel: Frame, row and column of the input; row and column in an image. Fractions are
            allowed.

    Returns:
        A position of the map `affinity.queries`, for `rows`, `arrows` and other functions; the
        first one on ties.

    Raises:
        ValueError: Another number of coordinates than the input has axes, or a position outside the
            input.
        GeometryError: See `to_pixels`.

    >>> import jax, jax.numpy as jnp
    >>> import flax.linen as nn, nonlocal_jax as nl
    >>> block = nl.layers.nonlocal_block("embedded_gaussian")
    >>> model = nn.Sequential([nn.Conv(8, (3, 3), strides=2), block])
    >>> image = jnp.ones((1, 24, 24, 3))
    >>> maps = nl.visualize.affinities(model, model.init(jax.random.key(0), image), image)
    >>> from_pixels(maps["layers_1"], (11, 15))
    (5, 7)
    """
    size = np.array(affinity.geometry().input)
    pixel = np.asarray(pixel, float)
    # Index i covers the interval from i − 1/2 to i + 1/2. NaN fails both comparisons.
    if pixel.shape != size.shape or not ((pixel >= -0.5) & (pixel <= size - 0.5)).all():
        raise ValueError(
            f"pixel must be {len(size)} numbers, a position inside the input "
            f"{tuple(size.tolist())}; got {pixel}."
        )
    axes = len(affinity.queries)
    positions = np.moveaxis(np.indices(affinity.queries), 0, -1).reshape(-1, axes)
    distances = np.abs(to_pixels(affinity, positions).centre - pixel).sum(axis=-1)
    return tuple(positions[distances.argmin()].tolist())


@dataclasses.dataclass(frozen=True)
class Scene:
    """The frames on which a map is drawn, and the position of its cells on them.

    Attributes:
        pictures: (T, H, W, 3), from 0 to 1: for each frame of the map of the queries, the input
            frame at the centre of its receptive field.
        numbers: (T,), indices of these input frames.
        queries, keys: The receptive fields. Both always have (T, H, W) axes; an image is a clip of
            one frame.
    """

    pictures: Float[np.ndarray, "t h w 3"]
    numbers: Int[np.ndarray, " t"]
    queries: Geometry
    keys: Geometry

    def geometry(self, side: str) -> Geometry:
        """Returns the receptive fields of the "queries" or of the "keys"."""
        return self.queries if side == "queries" else self.keys

    def place(self, position: Any, side: str) -> tuple[int, float, float]:
        """Returns panel, row and column (in pixels) of a position of the "queries" or "keys"."""
        frame, row, column = pixels_of(self.geometry(side), np.asarray(position)).centre
        nearest = np.abs(_frame_centres(self.queries) - frame).argmin()
        panel = position[0] if side == "queries" else nearest
        return int(panel), float(row), float(column)

    def key_frame(self, panel: int) -> int:
        """Returns the frame of the keys that is nearest to a panel."""
        field = self.keys.fields[0]
        if field is None:
            return 0
        key_centres = field.stride * np.arange(self.keys.grid[0]) + field.centre
        return int(np.abs(key_centres - _frame_centres(self.queries)[panel]).argmin())

    def edges(self, side: str) -> tuple[Float[np.ndarray, " columns"], Float[np.ndarray, " rows"]]:
        """Returns the boundaries between the cells of a map along columns and rows, in pixels.

        They lie halfway between neighbouring centres; the outermost cells extend to the borders.
        """
        geometry = self.geometry(side)
        rows, columns = (
            _cell_edges(geometry.fields[axis], geometry.grid[axis], geometry.input[axis])
            for axis in (1, 2)
        )
        return columns, rows


def _frame_centres(geometry: Geometry) -> Float[np.ndarray, " t"]:
    """Returns the centre of the receptive field, in time, of each frame of a map (T, H, W)."""
    frames = np.arange(geometry.grid[0])
    positions = np.stack([frames, 0 * frames, 0 * frames], axis=-1)
    return pixels_of(geometry, positions).centre[:, 0]


def _cell_edges(field: Field | None, count: int, length: int) -> Float[np.ndarray, " n"]:
    inner: Any = [] if field is None else field.stride * (np.arange(1, count) - 0.5) + field.centre
    return np.array([-0.5, *inner, length - 0.5]).clip(-0.5, length - 0.5)


def select_clip(affinity: AffinityMap, clip: Any, sample: int) -> tuple[AffinityMap, Scene]:
    """Returns the map of one clip and the scene on which it is drawn.

    Args:
        affinity: The map of a batch.
        clip: The batch, or only the clip that is selected.
        sample: Index of the clip in the batch.
    """
    selected = affinity[sample]
    batched = np.ndim(clip) == len(selected.geometry().input) + 2
    if batched and len(clip) == affinity.batch:
        clip = clip[sample]
    return selected, make_scene(selected, clip)


def make_scene(affinity: AffinityMap, clip: Any) -> Scene:
    """Selects the frames on which a map is drawn.

    Args:
        affinity: The map of one clip, a video or an image.
        clip: The clip (T, H, W, C) or image (H, W, C), with 1 or 3 channels: integers from 0 to 255
            or numbers from 0 to 1. Other values, such as those of a normalised clip, are scaled so
            that their range becomes 0 to 1.

    Raises:
        ValueError: A map of a sequence, a map whose axes are not in the order of the input's, a
            clip of another size than the network saw, or a clip that is not finite.
    """
    queries, keys = affinity.geometry("queries"), affinity.geometry("keys")
    if len(queries.input) not in (2, 3) or len(queries.grid) not in (2, 3):
        raise ValueError(
            f"pictures need a map of size (T, H, W) or (H, W); {affinity.block} has {queries.grid}."
        )
    frames = _clip_frames(clip, queries.input)
    queries, keys = _add_time_axis(queries), _add_time_axis(keys)
    axes = [field.axis for field in queries.fields if field is not None]
    if axes != [axis for axis in range(3) if queries.fields[axis] is not None]:
        raise ValueError(
            "pictures need a map whose axes are in the order of the input's; those of "
            f"{affinity.block} are not."
        )
    nearest = np.floor(_frame_centres(queries) + 0.5).astype(int)
    numbers = nearest.clip(0, len(frames) - 1)
    return Scene(frames[numbers], numbers, queries, keys)


def _clip_frames(clip: Any, size: tuple[int, ...]) -> Float[np.ndarray, "t h w 3"]:
    """Returns the frames of a clip in colour, with values from 0 to 1."""
    clip = np.asarray(clip)
    if clip.ndim == len(size) + 2 and len(clip) == 1:
        clip = clip[0]
    if clip.shape[:-1] != size or clip.shape[-1] not in (1, 3):
        raise ValueError(
            f"clip must be the one that the network saw, of shape {(*size, 3)} (or with 1 "
            f"channel); got {clip.shape}."
        )
    integers = np.issubdtype(clip.dtype, np.integer)
    if not integers and not np.isfinite(clip).all():
        raise ValueError("clip must be finite; got NaN or infinity.")
    low, high = clip.min(), clip.max()
    frames = clip.astype(np.float32)
    if integers and low >= 0 and high <= 255:
        frames /= 255
    elif low < 0 or high > 1:
        frames -= low
        frames /= max(frames.max(), np.finfo(np.float32).tiny)
    frames = frames.reshape(*(1,) * (4 - frames.ndim), *frames.shape)
    return np.broadcast_to(frames, (*frames.shape[:-1], 3))


def _add_time_axis(geometry: Geometry) -> Geometry:
    """Adds a time axis where there is none.

    An image becomes a clip of one frame. A map without time in a video becomes one frame that
    depends on all frames.
    """
    fields, grid, size = geometry.fields, geometry.grid, geometry.input
    if len(size) == 2:
        fields = tuple(
            field and dataclasses.replace(field, axis=field.axis + 1) for field in fields
        )
        size = (1, *size)
    if len(grid) == 2:
        fields, grid = (None, *fields), (1, *grid)
    return Geometry(fields, grid, size)
