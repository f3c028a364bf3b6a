"""Convolutions on CPU as one matrix product."""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax

from nonlocal_jax.layers.convolution.folding import Triple, tap_inputs
from nonlocal_jax.types import Array


def dot_over_rows(x: Array, kernel: Array, **options: Any) -> Array:
    """Computes x (*positions, C) times a kernel (C, features), as one product of matrices.

    Given several position axes, XLA makes a transposed copy of ȳ for the gradient of the kernel,
    and computes what leads to ȳ again for it. A training step of an embedded-Gaussian block at
    3136/784 takes 9% less time this way, one of a dot-product block at 12544/12544 14% less.
    """
    rows = x.reshape(-1, x.shape[-1])
    products = lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), **options)
    return products.reshape(*x.shape[:-1], kernel.shape[-1])


def row_product(x: Array, kernel: Array, strides: Triple, groups: int) -> Array:
    """Computes a 1×1×1 convolution."""
    return dot_over_rows(x[:, :: strides[0], :: strides[1], :: strides[2]], kernel[0, 0, 0])


def taps_side_by_side(x: Array, kernel: Array, strides: Triple, groups: int) -> Array:
    """Computes a convolution as one product, with all taps in the channels."""
    patches = jnp.concatenate(tap_inputs(x, kernel.shape[:3], strides), axis=-1)
    return dot_over_rows(patches, kernel.reshape(-1, kernel.shape[-1]))


def shifted_products(x: Array, kernel: Array, strides: Triple, groups: int) -> Array:
    """Computes a t×1×1 convolution as one product whose parts are shifted and summed."""
    taps, _, _, channels, features = kernel.shape
    x = x[:, :, :: strides[1], :: strides[2]]
    tap_columns = jnp.moveaxis(kernel[:, 0, 0], 0, 1).reshape(channels, taps * features)
    products = dot_over_rows(x, tap_columns)
    shifted = tap_inputs(products, (taps, 1, 1), (strides[0], 1, 1))
    terms = (
        product[..., tap * features : (tap + 1) * features] for tap, product in enumerate(shifted)
    )
    return functools.reduce(jnp.add, terms)
