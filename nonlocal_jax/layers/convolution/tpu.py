"""Forms of convolutions that are the fastest on TPUs, by XLA:TPU's own estimates for a v5e.

XLA:TPU keeps the batch and the channels of a convolution in the last two dimensions of its layout.
What costs time around its convolutions is less the products than the copies from one layout to
another.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax

from nonlocal_jax.layers.convolution.folding import Lowering, Triple, fold, temporal_convolution
from nonlocal_jax.types import Array

MAX_FEW_CHANNELS = 4
MIN_DIRECT_BATCH = 8  # the sublanes of a TPU


def choose(batch: Any, kernel_shape: tuple[int, ...], groups: int) -> Lowering:
    """Returns the fastest known form of a convolution.

    XLA's own 3-D convolution is the fastest for inference of many clips:

    | I3D R50, clips of 32 × 224² | folded | XLA's own |
    |---|--:|--:|
    | inference of 1 clip | 3.9 ms | 4.7 ms |
    | of 2 clips | 6.1 ms | 9.3 ms |
    | of 8 clips | 18 ms | 14.5 ms |
    | training step with 4 clips | 31.6 ms | 96 ms |
    """
    if groups == 1 and kernel_shape[:3] != (1, 1, 1) and kernel_shape[3] <= MAX_FEW_CHANNELS:
        return Lowering.of(frames_in_lanes)
    folded = fold(kernel_shape, groups)
    lowering = Lowering.of(columns_as_batch if folded is temporal_convolution else folded)
    if isinstance(batch, int) and batch >= MIN_DIRECT_BATCH:  # not a symbolic one
        return lowering._replace(inference=direct)
    return lowering


def direct(x: Array, kernel: Array, strides: Triple, groups: int) -> Array:
    """Computes XLA's own 3-D convolution.

    All convolutions of a network then have the same layout, so there are fewer copies.
    """
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        [(size // 2, size // 2) for size in kernel.shape[:3]],
        dimension_numbers=("NTHWC", "THWIO", "NTHWC"),
        feature_group_count=groups,
    )


def columns_as_batch(x: Array, kernel: Array, strides: Triple, groups: int) -> Array:
    """Computes a t×1×1 convolution as a 3-D one of 1×t×1 over (B, T, H), whose batch is W.

    With the columns and the channels last, XLA keeps the layout of x. With clips as the batch it
    moves the clips behind the positions and back: those copies took 6 ms of a training step of 49.
    """
    padding = kernel.shape[0] // 2
    return lax.conv_general_dilated(
        x[:, :, :: strides[1], :: strides[2]],
        jnp.swapaxes(kernel, 0, 1),
        (1, strides[0], 1),
        [(0, 0), (padding, padding), (0, 0)],
        dimension_numbers=("DHWNC", "DHWIO", "DHWNC"),
    )


def frames_in_lanes(x: Array, kernel: Array, strides: Triple, groups: int) -> Array:
    """Computes a convolution of few channels as a 2-D one of all frames, which fill the lanes.

    Taps in time are in the channels. The 128 lanes of a TPU hold the last dimension of an array,
    and three channels would leave most of them empty. Each tap's frames are transposed before they
    are joined, because XLA copies three times as much otherwise. The first layer of I3D R50 with
    its norm and pooling takes 5.7 ms this way and 9.3 folded.
    """
    padding = [(taps // 2, taps // 2) for taps in kernel.shape[1:3]]
    return _convolve_frames_in_lanes(x, kernel, strides, padding)


def frames_in_lanes_to_pairs(x: Array, kernel: Array, strides: Triple, groups: int) -> Array:
    """Computes `frames_in_lanes` with two columns side by side, `pair(frames_in_lanes(...))`.

    The kernel of the second column is that of the first, moved by one stride.
    """
    stride, taps, columns = strides[2], kernel.shape[2], x.shape[3]
    first, second = (
        jnp.pad(kernel, ((0, 0), (0, 0), (shift, stride - shift), (0, 0), (0, 0)))
        for shift in (0, stride)
    )
    pairs = -(-columns // stride) // 2
    left = taps // 2
    right = (pairs - 1) * 2 * stride + taps + stride - columns - left
    return _convolve_frames_in_lanes(
        x,
        jnp.concatenate([first, second], axis=-1),
        (*strides[:2], 2 * stride),
        [(kernel.shape[1] // 2, kernel.shape[1] // 2), (left, right)],
    )


def _convolve_frames_in_lanes(
    x: Array, kernel: Array, strides: Triple, padding: list[tuple[int, int]]
) -> Array:
    batch, length, *size = x.shape[:4]
    taps, *window, _, features = kernel.shape
    steps = -(-length // strides[0])
    time = taps // 2
    padded = jnp.pad(x, ((0, 0), (time, time), (0, 0), (0, 0), (0, 0)))
    tap_inputs = []
    for tap in range(taps):
        frames = padded[:, tap : tap + (steps - 1) * strides[0] + 1 : strides[0]]
        tap_inputs.append(_to_lanes(frames.reshape(-1, *size, x.shape[-1])))
    y = lax.conv_general_dilated(
        jnp.concatenate(tap_inputs, axis=2),
        jnp.moveaxis(kernel, 0, 2).reshape(*window, -1, features),
        strides[1:],
        padding,
        dimension_numbers=("HWCN", "HWIO", "NHWC"),
    )
    return y.reshape(batch, steps, *y.shape[1:])


def _to_lanes(frames: Array) -> Array:
    """Transposes frames (F, H, W, C) to (H, W, C, F).

    In bfloat16, this is a product with the identity, which takes 1.2 ms for 5 taps of 128 frames of
    224², where the copies of a transpose take 1.9 ms. It is exact, because each sum has at most one
    nonzero term. A row with a number that is not finite becomes NaN.
    """
    if frames.dtype != jnp.bfloat16:
        return frames.transpose(1, 2, 3, 0)
    return jnp.einsum("fhwc,wv->hvcf", frames, jnp.eye(frames.shape[2], dtype=frames.dtype))
