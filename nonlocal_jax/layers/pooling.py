"""Subsampling of the keys: max pooling over windows that do not overlap."""

import functools

import jax
import jax.numpy as jnp

from nonlocal_jax.types import Array, Features, Pooled, PooledMask, PositionMask


def max_pool(x: Features, window: tuple[int, ...], mask: PositionMask | None = None) -> Pooled:
    """The largest value of each window; what is left over at the end of an axis is dropped, as in the references.

    Strided slices and `jnp.maximum`, because their gradient is several times faster than that of `reduce_window`.

    Args:
        x: (B, *positions, C).
        window: its size along each position axis; the stride is the same.
        mask: (B, *positions) of bool. Padding (False) is never the largest; a window of padding alone gives 0.

    Returns:
        (B, *pooled, C), each position axis divided by its window and rounded down.

    Raises:
        ValueError: a window of another rank than the positions, empty or larger than the map; a mask of another shape.

    >>> import jax.numpy as jnp
    >>> max_pool(jnp.array([[1.0, 3.0, 2.0, 0.0, 9.0]])[..., None], (2,))[0, :, 0]
    Array([3., 2.], dtype=float32)
    """
    if mask is None:
        return _max_over_windows(x, window)
    if mask.shape != x.shape[:-1]:
        raise ValueError(f"mask must have shape {x.shape[:-1]}, one entry per position; got {mask.shape}.")
    pooled = _max_over_windows(jnp.where(mask[..., None], x, -jnp.inf), window)
    return jnp.where(pool_mask(mask, window)[..., None], pooled, 0)


def pool_mask(mask: PositionMask, window: tuple[int, ...]) -> PooledMask:
    """The mask of the pooled keys: a window is real if any of its positions is.

    Args:
        mask: (B, *positions) of bool.
        window: its size along each position axis.

    Returns:
        (B, *pooled) of bool.

    Raises:
        ValueError: a window of another rank than the positions, empty or larger than the map.

    >>> import jax.numpy as jnp
    >>> pool_mask(jnp.array([[True, False, False, False, True]]), (2,))
    Array([[ True, False]], dtype=bool)
    """
    return _max_over_windows(mask[..., None], window)[..., 0]


def _max_over_windows(x: Array, window: tuple[int, ...]) -> Array:
    positions = x.shape[1:-1]
    if len(window) != len(positions) or not all(1 <= size <= n for size, n in zip(window, positions, strict=True)):
        raise ValueError(f"window must have a size from 1 to that of the map for each axis of {positions}; got {window}.")
    for axis, size in enumerate(window, start=1):
        if size > 1:
            end = x.shape[axis] // size * size
            x = functools.reduce(jnp.maximum, [jax.lax.slice_in_dim(x, i, end, stride=size, axis=axis) for i in range(size)])
    return x
