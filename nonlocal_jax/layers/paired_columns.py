"""Feature maps with two columns side by side in the channels, which fill the lanes of a TPU.

A TPU computes on vectors of 128 lanes, which hold channels. The 64 channels of a network's first
layer, whose map is its largest, leave half of them empty. A paired map holds columns 2w and 2w + 1
together: (B, T, H, W / 2, 2C). In row-major memory it is the same array, so pairing costs other
platforms nothing. A training step of I3D R50's first layer with its norm and pooling, on 4 clips of
32×224×224 and a TPU v5e, takes 8.3 ms with a paired map and 14.1 ms without, by XLA's estimate.
"""

import functools

import jax
import jax.numpy as jnp

from nonlocal_jax.layers.axis_windows import first_maximum, max_along_axis, members_of_phases
from nonlocal_jax.layers.pooling import check_windows, strided_max_pool
from nonlocal_jax.ops.platforms import by_platform
from nonlocal_jax.types import Array

Triple = tuple[int, int, int]


def pair(x: Array) -> Array:
    """Joins the channels of every two columns: (..., W, C) -> (..., W / 2, 2C)."""
    return x.reshape(*x.shape[:-2], -1, 2 * x.shape[-1])


def unpair(x: Array) -> Array:
    """Separates the columns: (..., W / 2, 2C) -> (..., W, C)."""
    return x.reshape(*x.shape[:-2], -1, x.shape[-1] // 2)


@functools.partial(jax.jit, static_argnames=("window", "strides", "padding", "platform"))
def max_pool_of_paired(
    x: Array, window: Triple, strides: Triple, padding: Triple, platform: str | None = None
) -> Array:
    """Computes `strided_max_pool` of a paired map, whose columns have a stride of 2.

    On TPUs the columns come last, so on ties the gradient goes to the first column, and only among
    its members to the first frame and row.

    Args:
        x: (B, T, H, W / 2, 2C).
        window: As for `strided_max_pool`.
        strides: As for `strided_max_pool`.
        padding: As for `strided_max_pool`.
        platform: Platform whose algorithm runs. None is the one that the program is lowered for.

    Returns:
        (B, *pooled, C). Its columns are not paired.

    Raises:
        ValueError: If the columns have another stride, or a window is larger than a padded axis.
    """
    if strides[2] != 2:
        raise ValueError(f"the stride of paired columns must be 2; got {strides[2]}.")
    positions = (*x.shape[1:3], 2 * x.shape[3])
    check_windows(positions, window, padding)

    def compute(is_tpu: bool, x: Array) -> Array:
        if is_tpu:
            return _columns_last(x, window, strides, padding)
        return strided_max_pool(unpair(x), window, strides, padding, platform=platform)

    return by_platform(lambda name: name == "tpu", compute, x, platform=platform)


def _columns_last(x: Array, window: Triple, strides: Triple, padding: Triple) -> Array:
    clips = x.shape[0]
    frames = x.reshape(-1, *x.shape[2:])
    frames = max_along_axis(frames, 1, window[1], strides[1], padding[1], "tpu")
    x = frames.reshape(clips, -1, *frames.shape[1:])
    x = max_along_axis(x, 1, window[0], strides[0], padding[0], "tpu", compares_phases=True)
    frames = x.reshape(-1, *x.shape[2:])
    members = functools.partial(_members_of_pairs, size=window[2], padding=padding[2])
    columns = first_maximum(members, frames, "tpu")
    return columns.reshape(clips, -1, *columns.shape[1:])


def _members_of_pairs(x: Array, fill_value: float, size: int, padding: int) -> list[Array]:
    """Returns the members of all windows of columns, one array for each place in a window."""
    windows = (2 * x.shape[-2] + 2 * padding - size) // 2 + 1
    halves = jnp.split(x, 2, axis=-1)
    return members_of_phases(halves, fill_value, x.ndim - 2, size, padding, windows)
