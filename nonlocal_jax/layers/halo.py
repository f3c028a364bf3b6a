"""The halo of a window, where the first position axis is split over devices.

A halo is the rows that a device needs from its neighbours.
"""

import jax.numpy as jnp
from jax import lax

from nonlocal_jax.types import Array


def add_halo(
    x: Array, axis_name: str, leading_rows: int, trailing_rows: int, fill_value: float = 0.0
) -> Array:
    """Adds rows of the neighbouring devices to the rows of this device.

    Args:
        x: (B, n, ...), the n rows of each device of the mapped axis, in the order of the devices.
        axis_name: Name of the mapped axis of `jax.shard_map` or `jax.pmap`.
        leading_rows: Number of rows added in front, the last ones of the devices ahead. More than n
            come from more than one device.
        trailing_rows: Number of rows added at the end, the first ones of the devices behind.
        fill_value: Value of the rows in front of the first device and behind the last one.

    Returns:
        (B, leading_rows + n + trailing_rows, ...).
    """
    length = x.shape[1]
    leading = [
        _receive(x, axis_name, hop, min(rows, length), fill_value)
        for hop, rows in _hops(leading_rows, length)
    ]
    trailing = [
        _receive(x, axis_name, -hop, min(rows, length), fill_value)
        for hop, rows in _hops(trailing_rows, length)
    ]
    return jnp.concatenate([*reversed(leading), x, *trailing], axis=1) if leading or trailing else x


def local_windows(
    length: int, window: int, stride: int, padding: int, axis_name: str
) -> tuple[int, int]:
    """Returns the halo with which each device computes the windows that begin in its own rows.

    Args:
        length: Number of rows on each device.
        window: Size of the window along the split axis.
        stride: Distance between windows.
        padding: Rows added on both sides of the whole axis.
        axis_name: Name of the mapped axis, for the error message.

    Returns:
        The numbers of rows ahead and behind, for `add_halo`.

    Raises:
        ValueError: If the devices would not compute equal numbers of windows.
    """
    if length % stride or not -stride <= 2 * padding - window < 0:
        raise ValueError(
            f"positions split over {axis_name!r} must be a multiple of the stride on each device, "
            "with one window for each stride; "
            f"got {length} positions, window {window}, stride {stride}, padding {padding}."
        )
    return padding, max(window - stride - padding, 0)


def _hops(rows: int, length: int) -> list[tuple[int, int]]:
    """Returns each device that sends rows: its distance, and the rows missing from there on."""
    return [(1 + i, rows - i * length) for i in range(-(-rows // length))]


def _receive(x: Array, axis_name: str, hop: int, rows: int, fill_value: float) -> Array:
    """Receives the last rows of the device `hop` places ahead.

    If `hop` is negative, these are the first rows of a device behind.
    """
    size = lax.axis_size(axis_name)
    sent = (
        lax.slice_in_dim(x, x.shape[1] - rows, None, axis=1)
        if hop > 0
        else lax.slice_in_dim(x, 0, rows, axis=1)
    )
    pairs = [(i, i + hop) for i in range(size) if 0 <= i + hop < size]
    received = lax.ppermute(sent, axis_name, pairs)
    if fill_value == 0:  # `ppermute` gives zeros to a device that nobody sends to.
        return received
    index = lax.axis_index(axis_name)
    has_sender = (index >= hop) & (index < size + hop)
    return jnp.where(has_sender, received, fill_value)
