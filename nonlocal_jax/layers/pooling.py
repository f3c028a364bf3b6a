"""Max pooling: of the keys, over windows that do not overlap, and of networks, over windows that may."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from nonlocal_jax.layers.halo import local_windows, with_halo
from nonlocal_jax.types import Array, Features, Pooled, PooledMask, PositionMask


def max_pool(x: Features, window: tuple[int, ...], mask: PositionMask | None = None) -> Pooled:
    """The largest value of each window; what is left over at the end of an axis is dropped, as in the references.

    Of several that are the largest the first has the gradient, as in the references. On CPU the gradient takes a quarter
    to two fifths of the time of that of `reduce_window`.

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
        raise ValueError(
            f"mask must have shape {x.shape[:-1]}, one entry per position; got {mask.shape}."
        )
    pooled = _max_over_windows(jnp.where(mask[..., None], x, -jnp.inf), window)
    return jnp.where(pool_mask(mask, window)[..., None], pooled, 0)


def strided_max_pool(
    x: Features,
    window: tuple[int, ...],
    strides: tuple[int, ...],
    padding: tuple[int, ...],
    axis_name: str | None = None,
) -> Pooled:
    """The largest value of each window, the windows `strides` apart; padding is never the largest.

    Of several that are the largest the first has the gradient, as in the references.

    Args:
        x: (B, *positions, C).
        window: its size along each position axis.
        strides: from one window to the next.
        padding: positions added on both sides of each axis, fewer than a window.
        axis_name: under `jax.shard_map` or `jax.pmap`, the mapped axis over whose devices the first position axis is split.

    Returns:
        (B, *pooled, C), along each axis (positions + 2 · padding − window) / stride + 1, rounded down.

    Raises:
        ValueError: a window that is larger than a padded axis, or windows that do not split equally over the devices.

    >>> import jax.numpy as jnp
    >>> strided_max_pool(jnp.array([[1.0, 3.0, 2.0, 0.0, 9.0]])[..., None], (3,), (2,), (1,))[0, :, 0]
    Array([3., 3., 9.], dtype=float32)
    """
    if axis_name is not None:
        halo = local_windows(x.shape[1], window[0], strides[0], padding[0], axis_name)
        x, padding = with_halo(x, axis_name, *halo, beyond=-math.inf), (0, *padding[1:])
    if window == strides and not any(padding):
        return max_pool(x, window)
    for axis, (size, stride, pad) in enumerate(zip(window, strides, padding, strict=True), start=1):
        if size > x.shape[axis] + 2 * pad:
            raise ValueError(
                f"window must not be larger than the padded map; got {size} for {x.shape[axis]} + 2·{pad}."
            )
        if (size, stride, pad) != (1, 1, 0):
            x = _max_along(x, axis, size, stride, pad)
    return x


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
    if len(window) != len(positions) or not all(
        1 <= size <= n for size, n in zip(window, positions, strict=True)
    ):
        raise ValueError(
            f"window must have a size from 1 to that of the map for each axis of {positions}; got {window}."
        )
    return x if math.prod(window) == 1 else _largest(x, window)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _largest(x: Array, window: tuple[int, ...]) -> Array:
    x = _whole_windows(x, window)
    for axis, size in enumerate(window, start=1):
        places = [
            jax.lax.slice_in_dim(x, start, None, stride=size, axis=axis) for start in range(size)
        ]
        x = functools.reduce(jnp.maximum, places)
    return x


@_largest.defjvp
def _largest_jvp(
    window: tuple[int, ...], primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    """The first of the largest has the derivative. Which one that is is kept in bytes, so that x need not be.

    It comes from a reduction because XLA on CPU would do anything else again in the gradient, from x.
    """
    largest = _largest(*primals, window)
    in_window = tuple(range(2, 2 * len(window) + 1, 2))
    x, dx = (_in_windows(a, window) for a in (*primals, *tangents))
    places = math.prod(window)
    place = jnp.arange(places, dtype=np.min_scalar_type(places)).reshape(
        1, *(n for size in window for n in (1, size)), 1
    )
    equal = x == jnp.expand_dims(largest, in_window)
    winner = jnp.min(
        jnp.where(equal, place, place.dtype.type(places)), axis=in_window, keepdims=True
    )
    return largest, jnp.sum(jnp.where(winner == place, dx, 0), axis=in_window)


def _in_windows(x: Array, window: tuple[int, ...]) -> Array:
    """(B, pooled, window, pooled, window, ..., C)."""
    x = _whole_windows(x, window)
    cut = (
        n
        for length, size in zip(x.shape[1:-1], window, strict=True)
        for n in (length // size, size)
    )
    return x.reshape(x.shape[0], *cut, x.shape[-1])


def _whole_windows(x: Array, window: tuple[int, ...]) -> Array:
    return x[
        :,
        *(slice(length // size * size) for length, size in zip(x.shape[1:-1], window, strict=True)),
    ]


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3, 4))
def _max_along(x: Array, axis: int, size: int, stride: int, padding: int) -> Array:
    return functools.reduce(jnp.maximum, _places(x, -jnp.inf, axis, size, stride, padding))


@_max_along.defjvp
def _max_along_jvp(
    axis: int, size: int, stride: int, padding: int, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    largest = _max_along(*primals, axis, size, stride, padding)
    dx = _places(*tangents, 0.0, axis, size, stride, padding)
    derivative = dx[-1]
    for place, dplace in reversed(
        list(zip(_places(*primals, -jnp.inf, axis, size, stride, padding), dx, strict=True))[:-1]
    ):
        derivative = jnp.where(place == largest, dplace, derivative)
    return largest, derivative


def _places(
    x: Array, beyond: float, axis: int, size: int, stride: int, padding: int
) -> list[Array]:
    """What is at each place of all windows along one axis."""
    around = [(0, 0)] * x.ndim
    around[axis] = (padding, padding)
    x = jnp.pad(x, around, constant_values=beyond)
    span = (x.shape[axis] - size) // stride * stride + 1
    return [jax.lax.slice_in_dim(x, start, start + span, stride, axis) for start in range(size)]
