"""The gradient of the first layer's kernel on CPU."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from nonlocal_jax.layers.convolution.folding import Triple
from nonlocal_jax.ops.batching import map_shards
from nonlocal_jax.types import Array


def frame_by_frame(x: Array, kernel: Array, strides: Triple, groups: int) -> Array:
    """Computes a convolution of few channels by products with the patches of one frame at a time.

    A frame takes part in several frames of y, each through another tap. In the transpose by the
    kernel the products are of a frame's patches and frames of ȳ, which are contiguous.
    """

    def convolve(x: Array) -> Array:
        return _frame_by_frame(x, kernel, strides)

    return map_shards(convolve, x)


def _frame_by_frame(x: Array, kernel: Array, strides: Triple) -> Array:
    batch, length, *size, _ = x.shape
    taps, *window, _, features = kernel.shape
    time_stride, *space_strides = strides
    rows, columns = (-(-n // stride) for n, stride in zip(size, space_strides, strict=True))
    frames = _split_phases(x, window, (rows, columns), space_strides)
    tap_matrices = kernel.reshape(taps, -1, features)
    steps = -(-length // time_stride)
    # Products that fall outside the clip are accumulated in padding frames of y, and are
    # dropped.
    padding = taps // 2 // time_stride + 1
    y = jnp.zeros((batch, steps + 2 * padding, rows * columns, features), x.dtype)
    for phase in range(time_stride):
        first_step, tap_order = _reached_steps(phase, taps, time_stride)
        frame_count = len(range(phase, length, time_stride))
        if not tap_order or not frame_count:
            continue

        # The patches are h·w times as large as the frame. Without `checkpoint`, those of all frames
        # would be kept.
        @jax.checkpoint
        def add_products(
            y: Array,
            index: Array,
            phase: int = phase,
            first_step: int = first_step,
            tap_order: list[int] = tap_order,
            frame_count: int = frame_count,
        ) -> tuple[Array, None]:
            clip, step = index // frame_count, index % frame_count
            frame = lax.dynamic_index_in_dim(
                frames, clip * length + step * time_stride + phase, keepdims=False
            )
            patches = _patches(frame, window, (rows, columns), space_strides)
            products = [
                lax.dot_general(patches, tap_matrices[tap], (((0,), (0,)), ((), ())))
                for tap in tap_order
            ]
            start = (clip, step + padding + first_step, 0, 0)
            update = jnp.stack(products)[None]
            return y + lax.dynamic_update_slice(jnp.zeros_like(y), update, start), None

        y, _ = lax.scan(add_products, y, jnp.arange(batch * frame_count))
    return y[:, padding : padding + steps].reshape(batch, steps, rows, columns, features)


def _reached_steps(phase: int, taps: int, time_stride: int) -> tuple[int, list[int]]:
    """Returns which frames of y depend on the frame of x at `time_stride · step + phase`.

    Tap k takes it to frame step + (phase + taps // 2 − k) / time_stride, where that is a whole
    number. These are consecutive frames.

    Returns:
        The first of them, relative to `step`, and the tap for each, in the order of the frames.
    """
    tap_of_step = {}
    for tap in range(taps):
        step, remainder = divmod(phase + taps // 2 - tap, time_stride)
        if remainder == 0:
            tap_of_step[step] = tap
    return min(tap_of_step, default=0), [tap_of_step[step] for step in sorted(tap_of_step)]


def _split_phases(
    x: Array, window: Sequence[int], output_size: Sequence[int], strides: Sequence[int]
) -> Array:
    """Splits padded frames by row and column modulo the strides: a tap then sees one slice.

    Returns:
        (B·T, stride, stride, C, rows, columns).
    """
    sizes = [
        -(-(taps + (size - 1) * stride) // stride)
        for taps, size, stride in zip(window, output_size, strides, strict=True)
    ]
    padding = [
        (taps // 2, size * stride - length - taps // 2, 0)
        for taps, size, stride, length in zip(window, sizes, strides, x.shape[2:4], strict=True)
    ]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 0), *padding, (0, 0, 0)])
    x = x.reshape(-1, sizes[0], strides[0], sizes[1], strides[1], x.shape[-1])
    return x.transpose(0, 2, 4, 5, 1, 3)


def _patches(
    frame: Array, window: Sequence[int], output_size: Sequence[int], strides: Sequence[int]
) -> Array:
    """Returns the patches (h·w·C, rows·columns) of one frame from `_split_phases`."""
    rows, columns = output_size
    slices = []
    for row, column in itertools.product(*map(range, window)):
        row_start, row_phase = divmod(row, strides[0])
        column_start, column_phase = divmod(column, strides[1])
        plane = frame[row_phase, column_phase]
        slices.append(plane[:, row_start:, column_start:][:, :rows, :columns])
    return jnp.concatenate(slices).reshape(-1, rows * columns)
