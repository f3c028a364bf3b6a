"""The dot product without its N×M pairs: a product of three matrices can start from the right.

    1/n Σ_j (θ_i·φ_j) g_j = θ_i (1/n Σ_j φ_j g_jᵀ)

takes (N + M)·d·e multiply-adds instead of N·M·(d + e).
"""

import jax
import jax.numpy as jnp

from nonlocal_jax.ops.definition import widen
from nonlocal_jax.ops.kernels.kernel import Forecast, Kernel, Operands, Sizes
from nonlocal_jax.ops.platforms import PLATFORMS
from nonlocal_jax.ops.products import product
from nonlocal_jax.types import Array, Responses

# Whether φᵀ g / n is rounded to bfloat16 if θ and g are. The error of y is then at most 1.5 times
# that of "dense". Without it, XLA copies θ and y to float32 on an H100: 208 MB instead of 5 for 8
# samples of 12544 × 256. AMD's GPUs were not looked at. The range of float16 is too small for it.
ROUNDS_TO_BFLOAT16 = {"cpu": False, "gpu": True, "tpu": True, "rocm": True}


def respond(operands: Operands, settings: bool) -> Responses:
    """Computes θ (φᵀ g / n)."""
    return _respond(operands, settings, axis_name=None)


def respond_split(operands: Operands, settings: bool, axis_name: str) -> Responses:
    """Computes θ (φᵀ g / n) with φᵀ g summed over devices: only a d×e matrix is communicated."""
    return _respond(operands, settings, axis_name)


def _respond(operands: Operands, rounds_to_bfloat16: bool, axis_name: str | None) -> Responses:
    theta, phi, g, key_mask = operands.theta, operands.phi, operands.g, operands.key_mask
    key_values = product("...md,...me->...de", phi, g)
    n: int | Array = phi.shape[-2]  # as an int, psum makes a constant of it
    if key_mask is not None:
        n = jnp.sum(key_mask, axis=-1, dtype=key_values.dtype)[..., None, None]
    if axis_name is not None:
        key_values, n = jax.lax.psum((key_values, n), axis_name)
    # A sample without keys has key_values 0, and so the response 0.
    key_values = key_values / jnp.maximum(n, 1)
    if rounds_to_bfloat16 and theta.dtype == g.dtype == jnp.bfloat16:
        return _product_in_bfloat16(theta, key_values)
    return jnp.einsum("...nd,...de->...ne", widen(theta), key_values)


@jax.custom_jvp
def _product_in_bfloat16(theta: Array, key_values: Array) -> Array:
    return jnp.einsum("...nd,...de->...ne", theta, key_values.astype(theta.dtype))


@_product_in_bfloat16.defjvp
def _product_in_bfloat16_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    """Keeps the gradient of φᵀ g / n in float32; it is divided by n before it is rounded."""
    (theta, key_values), (theta_tangent, key_values_tangent) = primals, tangents
    y = _product_in_bfloat16(theta, key_values)
    wide = jnp.einsum("...nd,...de->...ne", widen(theta), key_values_tangent)
    return y, _product_in_bfloat16(theta_tangent, key_values) + wide.astype(y.dtype)


def cost(sizes: Sizes, platform: str) -> Forecast:
    """Forecasts two products over positions, and the traffic of one d×e matrix for each sample."""
    products = sizes.batch * (sizes.n + sizes.m) * sizes.d * sizes.e
    flops = (2 * products, 6 * products)
    matrix_bytes = sizes.batch * sizes.d * sizes.e * sizes.item_bytes
    seconds = PLATFORMS[platform].seconds(sum(flops), moved=6 * matrix_bytes)
    return Forecast(flops, (matrix_bytes, 2 * matrix_bytes), seconds)


KERNEL = Kernel(
    name="reassociated",
    instantiations=("dot_product",),
    respond=respond,
    cost=cost,
    needs_static_sizes=False,
    settings=ROUNDS_TO_BFLOAT16,
    respond_split=respond_split,
    # Across devices, communication dominates, whichever kernel is faster on one device.
    preferred_when_split=True,
)
