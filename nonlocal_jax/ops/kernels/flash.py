"""The two Gaussians by the flash attention for TPUs that comes with JAX, a Pallas kernel.

It is the algorithm of `streaming.py` in one kernel for the response and two for its gradients. The
kernels work on blocks of 128 or more queries, keys and channels, so the operands are padded.

XLA cannot split a Pallas kernel: under `jit`, operands that are split over devices are an error of
JAX's. Under `jax.shard_map`, each device computes its own samples.
"""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from nonlocal_jax.ops.definition import widen
from nonlocal_jax.ops.kernels.kernel import Forecast, Kernel, Operands, Sizes
from nonlocal_jax.ops.platforms import PLATFORMS
from nonlocal_jax.types import Array, KeyMask, Responses

LANES = 128  # numbers in a row of a TPU's vector registers
# Limits of a block. The kernels have 16 MB of vector memory, which also holds logits; with these
# limits they compile for v4, v5e, v5p and v6e, with a mask, and float32 also with the precision
# "highest" (JAX 0.10, libtpu 0.0.42).
MAX_QUERIES = 640
MAX_KEYS = 896
MAX_BLOCK_BYTES = 512 << 10


def respond(operands: Operands, settings: None) -> Responses:
    """Computes softmax attention with the Pallas kernel, for operands that `refusal` accepts.

    Returns:
        (..., N, e) in the widest dtype of the operands.
    """
    # Pallas is imported on first use, because few programs need it.
    from jax.experimental.pallas.ops.tpu import flash_attention as pallas

    _, theta, phi, g, key_mask, scale, _ = operands
    (n, d), (m, e) = theta.shape[-2:], g.shape[-2:]
    if not isinstance(scale, int | float):  # the kernel's own scale is a compile-time constant
        theta, scale = (widen(theta) * scale).astype(theta.dtype), 1.0
    dtype = jnp.result_type(theta, phi, g)
    query_block, key_block, channels = blocks(n, m, d, e, dtype)
    queries = _pad(theta.astype(dtype), query_block, channels)
    keys, values = (_pad(x.astype(dtype), key_block, channels) for x in (phi, g))
    mask = _pad_mask(key_mask, keys, m)

    def respond_to_sample(queries: Array, keys: Array, values: Array, mask: Array | None) -> Array:
        segment_ids = None
        if mask is not None:  # a query sums over the keys that have its id, 1
            query_ids = jnp.ones((1, queries.shape[0]), jnp.int32)
            segment_ids = pallas.SegmentIds(query_ids, mask.astype(jnp.int32)[None])
        # JAX's interface has axes (batch, heads, positions, channels).
        return pallas.flash_attention(
            *(x[None, None] for x in (queries, keys, values)),
            segment_ids=segment_ids,
            sm_scale=float(scale),
            block_sizes=_block_sizes(pallas, query_block, key_block),
        )[0, 0]

    # With its own batch axis, the kernel needs a batch of a known size.
    y = jax.vmap(respond_to_sample)(queries, keys, values, mask)
    # Without any key, the kernel's response is the mean of all values, which are 0 where masked.
    return y[:, :n, :e].reshape(*theta.shape[:-1], e)


def blocks(n: int, m: int, d: int, e: int, dtype: Any) -> tuple[int, int, int]:
    """Returns the queries and the keys of a block, and the channels that it is padded to.

    >>> blocks(3136, 784, 256, 256, jnp.bfloat16), blocks(784, 196, 512, 512, jnp.bfloat16)
    ((640, 896, 256), (512, 256, 512))
    """
    channels = _round_up(max(d, e), LANES)
    # Logits take more memory than rows of few channels.
    rows = MAX_BLOCK_BYTES // (max(channels, 256) * jnp.dtype(dtype).itemsize)
    return _block(n, min(rows, MAX_QUERIES)), _block(m, min(rows, MAX_KEYS)), channels


def _block(rows: int, max_rows: int) -> int:
    """Returns the size of blocks that needs the least padding, and of those the largest.

    >>> _block(100, 640), _block(3136, 640), _block(1024, 640)  # 1, 5 and 2 blocks
    (128, 640, 512)
    """
    most = max(max_rows // LANES, 1)
    whole = -(-rows // LANES)
    if whole <= most:
        return whole * LANES
    candidates = [count * LANES for count in range(min(2, most), most + 1)]
    return min(candidates, key=lambda block: (_round_up(rows, block), -block))


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _pad(x: Array, block: int, channels: int) -> Array:
    """Merges the batch axes, and appends zeros up to a multiple of the block and to `channels`."""
    x = x.reshape(-1, *x.shape[-2:])
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block), (0, channels - x.shape[2])])


def _pad_mask(key_mask: KeyMask | None, keys: Array, m: int) -> Array | None:
    """Returns which of the padded keys are real, or None if all are."""
    batch, padded_m, _ = keys.shape
    if key_mask is None and padded_m == m:
        return None
    real = jnp.ones((batch, m), bool) if key_mask is None else key_mask.reshape(-1, m)
    return jnp.pad(real, [(0, 0), (0, padded_m - m)])


def _block_sizes(pallas: ModuleType, query_block: int, key_block: int) -> Any:
    return pallas.BlockSizes(
        block_b=1,
        block_q=query_block,
        block_k_major=key_block,
        block_k=key_block,
        block_q_major_dkv=query_block,
        block_q_dkv=query_block,
        block_k_major_dkv=key_block,
        block_k_dkv=key_block,
        block_q_dq=query_block,
        # JAX stores ȳ_i·y_i once for each key of a block.
        block_k_major_dq=LANES,
        block_k_dq=LANES,
    )


def refusal(sizes: Sizes, platform: str) -> str | None:
    """Returns why the Pallas kernel is not available, or None if it is."""
    if platform != "tpu":
        return f"JAX's Pallas kernel needs a TPU, and the platform is {platform!r}"
    if sizes.dtype not in (jnp.bfloat16, jnp.float32):
        return f"JAX's Pallas kernel takes bfloat16 and float32, and the inputs are {sizes.dtype}"
    max_channels = MAX_BLOCK_BYTES // LANES // jnp.dtype(sizes.dtype).itemsize
    if max(sizes.d, sizes.e) > max_channels:
        return (
            f"JAX's Pallas kernel has memory for {max_channels} channels of {sizes.dtype}; "
            f"got {max(sizes.d, sizes.e)}"
        )
    return None


def untraceable(sizes: Sizes) -> str | None:
    """Returns why the kernel's products would not compile, or None if they would (JAX 0.10)."""
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    precisions = [None, "default", "fastest", "bfloat16"]
    if sizes.dtype == jnp.float32:
        precisions += ["highest", "float32"]
    if precision in precisions:
        return None
    return (
        f"JAX's Pallas kernel has no products of {sizes.dtype} with the precision {precision!r} "
        "of jax_default_matmul_precision"
    )


def cost(sizes: Sizes, platform: str) -> Forecast:
    """Forecasts the products over all pairs and the traffic of copies, padding included.

    Each of the gradient's two kernels recomputes the logits and ȳ_i·g_j.
    """
    batch, n, m, d, e = sizes.batch, sizes.n, sizes.m, sizes.d, sizes.e
    query_block, key_block, channels = blocks(n, m, d, e, sizes.dtype)
    padded_n, padded_m = _round_up(n, query_block), _round_up(m, key_block)
    product = 2 * batch * padded_n * padded_m * channels
    flops = (2 * product, 9 * product)
    copies = batch * (padded_n + padded_m) * channels * jnp.dtype(sizes.dtype).itemsize
    # A number of each query, such as its id or the sum of its row, is stored once for each lane.
    numbers = batch * padded_n * LANES * 4
    temporary = (2 * copies + numbers, 4 * (copies + numbers))
    return Forecast(flops, temporary, PLATFORMS[platform].seconds(sum(flops), sum(temporary)))


KERNEL = Kernel(
    name="flash",
    instantiations=("gaussian", "embedded_gaussian"),
    respond=respond,
    cost=cost,
    refusal=refusal,
    untraceable=untraceable,
    only_on_request="XLA cannot estimate its time, and it was not measured on a TPU",
)
