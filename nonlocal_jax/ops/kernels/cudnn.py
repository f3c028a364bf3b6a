"""The two Gaussians by NVIDIA's attention kernel, in half precision on NVIDIA GPUs.

It is the algorithm of `streaming.py`, fused by cuDNN into one kernel.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from nonlocal_jax.ops.definition import widen
from nonlocal_jax.ops.kernels.kernel import Forecast, Kernel, Operands, Sizes
from nonlocal_jax.ops.platforms import PLATFORMS
from nonlocal_jax.types import Responses


def respond(operands: Operands, settings: None) -> Responses:
    """Computes softmax attention with cuDNN, for operands that `refusal` accepts.

    cuDNN receives a mask as a bias (..., N, M), so memory is linear in N + M only without one.

    Returns:
        (..., N, d) in the dtype of the operands.
    """
    _, theta, phi, g, key_mask, scale, _ = operands
    batch = theta.shape[:-2]
    if not isinstance(scale, int | float):  # cuDNN's own scale is a compile-time constant
        theta, scale = (widen(theta) * scale).astype(theta.dtype), 1.0
    # JAX's interface has axes (batch, positions, heads, channels); here there is one head.
    queries, keys, values = (x.reshape(-1, x.shape[-2], 1, x.shape[-1]) for x in (theta, phi, g))
    mask = None
    if key_mask is not None:
        shape = (queries.shape[0], 1, queries.shape[1], keys.shape[1])
        mask = jnp.broadcast_to(key_mask.reshape(shape[0], 1, 1, shape[-1]), shape)
    y = jax.nn.dot_product_attention(
        queries, keys, values, mask=mask, scale=scale, implementation="cudnn"
    )
    y = y.reshape(*batch, *y.shape[1:2], y.shape[-1])
    if key_mask is None:
        return y
    # Without any key, cuDNN's response is undefined; Eq. 1's is 0.
    return jnp.where(key_mask.any(axis=-1)[..., None, None], y, 0)


def refusal(sizes: Sizes, platform: str) -> str | None:
    """Returns why cuDNN's attention is not available, or None if it is."""
    if platform != "gpu":
        return f"cuDNN needs an NVIDIA GPU, and the platform is {platform!r}"
    # "9.0" for a Hopper, which is assumed where this host has no NVIDIA GPU; "gfx942" on AMD's.
    capability = str(getattr(jax.devices()[0], "compute_capability", "9.0"))
    major = int(capability.split(".")[0]) if capability[0].isdigit() else 9
    if sizes.dtype not in (jnp.float16, jnp.bfloat16):
        return f"cuDNN's attention takes float16 and bfloat16, and the inputs are {sizes.dtype}"
    if sizes.d != sizes.e:
        return (
            f"cuDNN's attention needs values as wide as keys; got {sizes.e} and {sizes.d} channels"
        )
    if major < 8:
        return f"cuDNN's attention needs an Ampere or later, 8.0; this GPU is {capability}"
    max_channels = 256 if major >= 9 else 128
    if sizes.d > max_channels or sizes.d % 8:
        return (
            f"cuDNN's head size must be a multiple of 8 up to {max_channels} on this GPU; "
            f"got {sizes.d} channels"
        )
    return None


@functools.cache
def _untraceable(channels: int, dtype: Any) -> str | None:
    rows = jax.ShapeDtypeStruct((1, 8, 1, channels), dtype)
    attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    try:
        jax.eval_shape(attend, rows, rows, rows)
    except (RuntimeError, NotImplementedError) as error:
        return f"JAX on this host cannot trace cuDNN's attention for other machines: {error}"
    return None


def untraceable(sizes: Sizes) -> str | None:
    """Returns why JAX cannot trace it on this host, or None if it can.

    JAX looks for cuDNN and for a Hopper while it traces (JAX 0.10 to 0.12).
    """
    return _untraceable(sizes.d, jnp.dtype(sizes.dtype))


def cost(sizes: Sizes, platform: str) -> Forecast:
    """Forecasts the products over all pairs, recomputed in the gradient, on tensor cores."""
    batch, n, pairs, d, e = sizes.batch, sizes.n, sizes.pairs, sizes.d, sizes.e
    forward = 2 * pairs * (d + e)
    flops = (forward, forward + 2 * pairs * (3 * d + 2 * e))
    bias = 2 * pairs if sizes.masked else 0
    temporary = (4 * batch * n + bias, 4 * batch * n * (d + 2) + bias)
    speed = PLATFORMS[platform]
    fused = speed._replace(flops=4 * speed.flops)
    return Forecast(flops, temporary, fused.seconds(sum(flops), moved=4 * bias))


KERNEL = Kernel(
    name="cudnn",
    instantiations=("gaussian", "embedded_gaussian"),
    respond=respond,
    cost=cost,
    refusal=refusal,
    untraceable=untraceable,
)
