"""Products of matrices in half precision, which accelerators are made for."""

from functools import partial

import jax
import jax.numpy as jnp

from nonlocal_jax.ops.definition import wide_dtype
from nonlocal_jax.types import Array


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def product(equation: str, x: Array, y: Array) -> Array:
    """Computes an einsum of two arrays, multiplied in their dtype and summed in float32 or wider.

    Two numbers in half precision have an exact product in float32, so the result is that of
    widening both first, at half of the traffic. The gradients are products in the dtype of the
    inputs as well: JAX's own would multiply a float32 cotangent.

    Args:
        equation: Equation of `jnp.einsum`.
        x: Array.
        y: Array, usually of the same dtype.

    Returns:
        The sums, in float32 or wider.

    >>> product("nd,md->nm", jnp.ones((2, 3), jnp.bfloat16), jnp.ones((1, 3), jnp.bfloat16))
    Array([[3.],
           [3.]], dtype=float32)
    """
    return jnp.einsum(equation, x, y, preferred_element_type=_sum_dtype(x, y))


@product.defjvp
def _product_jvp(
    equation: str, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    (x, y), (x_tangent, y_tangent) = primals, tangents
    terms = jnp.einsum(equation, x_tangent, y), jnp.einsum(equation, x, y_tangent)
    tangent, other_tangent = (term.astype(_sum_dtype(x, y)) for term in terms)
    return product(equation, x, y), tangent + other_tangent


def _sum_dtype(x: Array, y: Array) -> jnp.dtype:
    return wide_dtype(jnp.result_type(x, y))
