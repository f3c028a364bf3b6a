"""Sorting and lookups for `sorted_keys`, by unsigned integers, which XLA sorts the fastest."""

import jax
import jax.numpy as jnp
from jax import lax

from nonlocal_jax.types import Array


def take(x: Array, rows: Array) -> Array:
    """Looks up rows whose indices are known to be in bounds."""
    return x.at[rows].get(mode="promise_in_bounds")


def count_below(ascending: Array, x: Array) -> Array:
    """Counts the entries of `ascending` that are less than each x."""
    return jnp.searchsorted(ascending, x, side="left").astype(jnp.int32)


def ordered_integers(x: Array) -> Array:
    """Converts floats to unsigned integers of the same order.

    The bits of positive floats are ordered like integers. Those of negative floats are ordered in
    reverse, so they are inverted; setting the sign bit of positive floats puts them above.
    """
    width = 8 * x.dtype.itemsize
    bits = lax.bitcast_convert_type(x, jnp.dtype(f"uint{width}"))
    sign = bits.dtype.type(1 << (width - 1))
    return jnp.where(bits < sign, bits | sign, ~bits)


def argsort(x: Array, sort_bits: int, width: int | None = None) -> Array:
    """Returns the indices that sort unsigned integers of `width` bits in ascending order, stably.

    A value and its index are packed into one integer of `sort_bits` bits, which XLA sorts several
    times faster than pairs or floats. If the value does not fit next to the index, it is sorted
    digit by digit, starting with the least significant one (a radix sort).
    """
    row_bits = max((x.size - 1).bit_length(), 1)
    digit_bits = sort_bits - row_bits
    with jax.enable_x64(True):  # without it, JAX makes 32-bit integers of 64-bit ones
        row_mask = jnp.dtype(f"uint{sort_bits}").type((1 << row_bits) - 1)
        rows = places = lax.iota(row_mask.dtype, x.size)
        for shift in range(0, width or 8 * x.dtype.itemsize, digit_bits):
            # With the index in them, the integers are distinct, so an unstable sort is stable here.
            digit = (take(x, rows) >> shift).astype(row_mask.dtype)
            packed = digit << row_bits | places
            order = lax.sort(packed, is_stable=False) & row_mask
            rows = take(rows, order)
        return rows.astype(jnp.int32)
