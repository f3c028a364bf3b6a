"""What a device needs of its neighbours where the first position axis is split over devices: the halo of a window."""

import jax.numpy as jnp
from jax import lax

from nonlocal_jax.types import Array


def with_halo(x: Array, axis_name: str, before: int, after: int, beyond: float = 0.0) -> Array:
    """This device's rows between the last `before` rows of the devices ahead of it and the first `after` of those behind.

    Args:
        x: (B, n, ...), of each device of the mapped axis `axis_name` n rows, in the devices' order.
        axis_name: of `jax.shard_map` or `jax.pmap`.
        before: rows; more than n come from more than one device.
        after: rows too.
        beyond: what stands for the rows before the first device's and after the last one's.

    Returns:
        (B, before + n + after, ...).
    """
    ahead = [
        _from(x, axis_name, hop, min(rows, x.shape[1]), beyond)
        for hop, rows in _hops(before, x.shape[1])
    ]
    behind = [
        _from(x, axis_name, -hop, min(rows, x.shape[1]), beyond)
        for hop, rows in _hops(after, x.shape[1])
    ]
    return jnp.concatenate([*reversed(ahead), x, *behind], axis=1) if ahead or behind else x


def local_windows(
    length: int, window: int, stride: int, padding: int, axis_name: str
) -> tuple[int, int]:
    """The halo, (before, after), with which each device computes the windows that begin in its own rows.

    Args:
        length: rows of each device.
        window: of the operation along the split axis.
        stride: from one window to the next.
        padding: rows added on both sides of all devices' rows.
        axis_name: for the message.

    Raises:
        ValueError: the windows of all devices do not come out as equal parts.
    """
    if length % stride or not -stride <= 2 * padding - window < 0:
        raise ValueError(
            f"positions split over {axis_name!r} must be a multiple of the stride on each device, and the windows as many as "
            f"strides; got {length} positions, window {window}, stride {stride}, padding {padding}."
        )
    return padding, max(window - stride - padding, 0)


def _hops(rows: int, length: int) -> list[tuple[int, int]]:
    """How many devices away, and how many rows are still wanted from there on."""
    return [(1 + i, rows - i * length) for i in range(-(-rows // length))]


def _from(x: Array, axis_name: str, hop: int, rows: int, beyond: float) -> Array:
    """The last rows of the device `hop` places ahead, or the first ones of one that is behind, where hop is negative."""
    size = lax.axis_size(axis_name)
    part = (
        lax.slice_in_dim(x, x.shape[1] - rows, None, axis=1)
        if hop > 0
        else lax.slice_in_dim(x, 0, rows, axis=1)
    )
    received = lax.ppermute(
        part, axis_name, [(i, i + hop) for i in range(size) if 0 <= i + hop < size]
    )
    if beyond == 0:  # which is what a device without such a neighbour receives
        return received
    index = lax.axis_index(axis_name)
    return jnp.where((index >= hop) & (index < size + hop), received, beyond)
