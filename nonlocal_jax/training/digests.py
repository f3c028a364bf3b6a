"""Digests of arrays, computed on the devices that hold them."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nonlocal_jax.types import Array

Tree = Any


def digests(tree: Tree) -> list[str]:
    """Returns 16 hexadecimal digits for each leaf, whatever devices it is split over.

    The digest sums a bijective mix of each word and its place. One changed word always changes it,
    and several do except in one case of 2⁶⁴. It protects against decay, not against an attacker.
    """
    # One at a time: XLA on CPU has too few threads for several collectives at once.
    pairs = [jax.device_get(_digest(leaf)) for leaf in jax.tree.leaves(tree)]
    return [f"{int(high):08x}{int(low):08x}" for high, low in pairs]


@jax.jit
def _digest(x: Array) -> Array:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    word_type = jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")
    words = lax.bitcast_convert_type(x, word_type).astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)
    # A reshape to one axis would move the parts of a sharded leaf between devices.
    for axis, size in enumerate(words.shape):
        place = place * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, words.shape, axis)

    def total(seed: int) -> Array:
        mixed = words ^ _mix(place + jnp.uint32(seed))
        return jnp.sum(_mix(mixed), dtype=jnp.uint32)

    return jnp.stack([total(0x9E3779B9), total(0x85EBCA6B)])


def _mix(x: Array) -> Array:
    """Maps the 32-bit integers to themselves one to one (Wellons' lowbias32)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
