"""The two Gaussians, f = exp(scale · θ_i·φ_j), C = Σ_j f, without storing the N×M affinity.

A part of the affinity is in memory at a time. The gradient keeps θ, φ, g, y and the log-sum-exp
λ_i = log Σ_j exp(logit_ij), and recomputes each part:

    p_ij = exp(logit_ij − λ_i)                  s_ij = p_ij (ȳ_i·g_j − ȳ_i·y_i)
    ḡ_j = Σ_i p_ij ȳ_i    θ̄_i = scale Σ_j s_ij φ_j    φ̄_j = scale Σ_i s_ij θ_i
    scale' = Σ_ij s_ij θ_i·φ_j

(Milakov and Gimelshein 2018; Dao et al. 2022.) It takes any N, M, d and e, and memory for
O((N + M)(d + e)) numbers and one part: a tile of a sample on CPU, some rows or columns of all
samples on accelerators. On CPU, an affinity of a few megabytes is stored for the gradient instead.
On GPUs, an affinity for which parts would not save memory is left to the definition.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from nonlocal_jax.ops import sharded, softmax_tiles
from nonlocal_jax.ops.definition import widen
from nonlocal_jax.ops.kernels import dense
from nonlocal_jax.ops.kernels.kernel import Forecast, Kernel, Operands, Sizes
from nonlocal_jax.ops.platforms import PLATFORMS
from nonlocal_jax.ops.softmax_rows import Rows
from nonlocal_jax.ops.softmax_tiles import Tiles
from nonlocal_jax.types import Array, Responses

Form = Tiles | Rows

# On an H100, the logits of 8 samples fill a third of the cache, and 128 rows one tile of a product.
GPU_ROWS = Rows(numbers=1 << 19, leaves_small=True)
# On TPU v5e, the rows of 8 samples fill about half of the vector memory. Parts of a gradient may be
# larger than that: for 12544 queries and keys, 448 keys at once take 0.98 of the estimated time of
# 256 on a v5e, 0.84 on a v5p and 0.71 on a v6e.
SETTINGS: dict[str, Form] = {
    "cpu": Tiles(),
    "gpu": GPU_ROWS,
    "rocm": GPU_ROWS,
    "tpu": Rows(numbers=7 << 19, sums_by_product=True, gradient_least=640),
}


def respond(operands: Operands, form: Form) -> Responses:
    """Computes a softmax over the keys, with logits and sums in float32 or wider.

    Args:
        operands: The operands of one of the two Gaussians.
        form: How it is computed.

    Returns:
        (..., N, e) in the dtype of g.
    """
    (n, d), (m, e) = operands.theta.shape[-2:], operands.g.shape[-2:]
    if form.leaves_to_definition(n, m, d + e):
        return _definition(operands)
    theta, phi, g = (
        x.reshape(-1, *x.shape[-2:]) for x in (operands.theta, operands.phi, operands.g)
    )
    mask = operands.key_mask
    if mask is not None:
        mask = mask.reshape(-1, mask.shape[-1])
    scale = jnp.asarray(operands.scale, widen(theta).dtype)
    y = _respond(form, theta, phi, g, scale, mask)
    return y.reshape(*operands.theta.shape[:-1], g.shape[-1])


def respond_split(
    operands: Operands,
    form: Form,
    axis_name: str,
    gathered_bytes: int = sharded.GATHERED_BYTES,
) -> Responses:
    """Gathers the keys of all devices, or sends them around a ring if they are too large."""
    _, theta, phi, g, key_mask, scale, _ = operands
    if not sharded.takes_ring(phi, g, axis_name, gathered_bytes):
        return respond(operands.gather_keys(axis_name), form)
    return sharded.ring(
        theta,
        phi,
        g,
        scale,
        key_mask,
        axis_name,
        respond_to_part=partial(form.respond, dtype=widen(g).dtype),
        differentiate_part=form.differentiate,
    )


def cost(sizes: Sizes, platform: str) -> Forecast:
    """Forecasts the products over all pairs; the gradient may compute the logits once more."""
    batch, n, m, d, e = sizes.batch, sizes.n, sizes.m, sizes.d, sizes.e
    pairs, item_bytes, form = sizes.pairs, sizes.item_bytes, SETTINGS[platform]
    if form.leaves_to_definition(n, m, d + e):
        return dense.cost(sizes, platform)
    stored = form.stores_affinity(pairs * item_bytes)
    products_of_keys = 3 if stored else 4
    flops = (2 * pairs * (d + e), 2 * pairs * (products_of_keys * d + 3 * e))
    tile_bytes = form.tile_bytes(batch, n, m, d + e, item_bytes)
    rows_bytes = batch * (n * (d + e) + m * (d + e)) * item_bytes
    affinity_bytes = 2 * (pairs * item_bytes if stored else tile_bytes)
    temporary = (tile_bytes + batch * n * item_bytes, affinity_bytes + rows_bytes)
    if platform in ("gpu", "rocm"):
        # XLA:GPU keeps logits and exponentials at once, and in the gradient three such arrays. The
        # sums over parts are the results themselves unless those are in half precision.
        exponentials = tile_bytes // item_bytes * jnp.dtype(sizes.dtype).itemsize
        sums = rows_bytes if exponentials < tile_bytes else 0
        temporary = (tile_bytes + exponentials, 3 * tile_bytes + sums)
    return Forecast(flops, temporary, PLATFORMS[platform].seconds(sum(flops), moved=0))


def _definition(operands: Operands) -> Responses:
    """Computes the definition, and its affinity again for the gradient.

    As `by_platform` is a conditional, what it kept would be allocated on other platforms as well.
    Within one program XLA merges the two affinities.
    """

    def respond(theta: Array, phi: Array, g: Array) -> Responses:
        return dense.respond(operands._replace(theta=theta, phi=phi, g=g), None)

    recomputing = jax.checkpoint(respond, prevent_cse=False)
    return recomputing(operands.theta, operands.phi, operands.g)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _respond(
    form: Form, theta: Array, phi: Array, g: Array, scale: Array, mask: Array | None
) -> Array:
    y, _ = form.respond(theta, phi, g, scale, mask, g.dtype)
    return y


def _forward(
    form: Form, theta: Array, phi: Array, g: Array, scale: Array, mask: Array | None
) -> tuple[Array, tuple[Any, ...]]:
    if _stores_affinity(form, theta, phi):
        y, *kept = softmax_tiles.respond_and_store(theta, phi, g, scale, mask)
    else:
        y, *kept = form.respond(theta, phi, g, scale, mask, widen(g).dtype)
    # The gradient subtracts ȳ·y from ȳ·g, so it keeps y as it is before rounding.
    return y.astype(g.dtype), (theta, phi, g, scale, mask, y, *kept)


def _backward(form: Form, residuals: tuple[Any, ...], dy: Array) -> tuple[Array | None, ...]:
    theta, phi, g, scale, mask, y, *kept = residuals
    scale = jnp.asarray(scale)  # a NumPy scalar, where it was a constant
    # Σ_j p_ij ȳ_i·g_j, since Σ_j p_ij g_j = y_i
    mean = jnp.sum(widen(dy) * y, axis=-1)
    if _stores_affinity(form, theta, phi):
        gradients = softmax_tiles.differentiate_stored(theta, phi, g, dy, mean, *kept)
    else:
        gradients = form.differentiate(theta, phi, g, scale, mask, dy, mean, *kept)
    dtheta, dphi, dg = gradients
    dscale = jnp.sum(dtheta * widen(theta))
    dtheta, dphi = scale * dtheta, scale * dphi
    return dtheta.astype(theta.dtype), dphi.astype(phi.dtype), dg.astype(g.dtype), dscale, None


_respond.defvjp(_forward, _backward)


def _stores_affinity(form: Form, theta: Array, phi: Array) -> bool:
    batch, n, _ = theta.shape
    if not isinstance(batch, int):  # a symbolic batch may be large
        return False
    return form.stores_affinity(batch * n * phi.shape[1] * widen(theta).dtype.itemsize)


KERNEL = Kernel(
    name="streaming",
    instantiations=("gaussian", "embedded_gaussian"),
    respond=respond,
    cost=cost,
    settings=SETTINGS,
    respond_split=respond_split,
)
