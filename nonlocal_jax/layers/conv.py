"""Video convolutions computed as the matrix products and 2-D convolutions that they are."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from nonlocal_jax.layers.halo import local_windows, with_halo
from nonlocal_jax.layers.winograd import tiled
from nonlocal_jax.ops.platforms import host_platform
from nonlocal_jax.types import Array, Video

Triple = tuple[int, int, int]
Lowered = Callable[[Array, Array, Triple, int], Array]  # of x, kernel, strides and groups
BLOCK = 64  # positions along a row, and features, that XLA's convolution on CPU takes at once; blocks are shared among cores
JOINED = 32 * BLOCK  # positions of a row that has enough blocks
CACHED = 1 << 22  # bytes that are written and read again without going far


class Lowering(NamedTuple):
    """How one convolution is computed: y, which is linear in x, and the linear part by the kernel, whose transpose is the
    kernel's gradient. They are equal; each is the fastest where it is used.
    """

    value: Lowered
    by_kernel: Lowered


def dot_over_positions(
    x: Array, kernel: Array, dimension_numbers: lax.DotDimensionNumbers, **options: Any
) -> Array:
    """The `dot_general` of an `nn.Dense` over channels: a 1×1×1 convolution of x (*positions, C), kernel (C, features).

    On CPU all positions are the rows of one matrix: from several position axes XLA makes a transposed copy of ȳ for the
    gradient of the kernel, with whatever computes ȳ done again for it. A training step of an embedded-Gaussian block at
    3136/784 takes 9% less time this way, of a dot-product block at 12544/12544 14%. Elsewhere the axes stay, since they
    may be sharded.
    """
    if host_platform() != "cpu":
        return lax.dot_general(x, kernel, dimension_numbers, **options)
    rows = lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), **options)
    return rows.reshape(*x.shape[:-1], kernel.shape[-1])


def lowering(
    x: tuple[int, ...],
    kernel: tuple[int, ...],
    strides: Triple = (1, 1, 1),
    groups: int = 1,
    dtype: Any = None,
    has_halo: bool = False,
) -> Lowering:
    """How x (B, T, H, W, C) and a kernel (t, h, w, C / groups, features) are convolved. The one place that chooses.

    With its halo x has the frames around it already, and is not padded in time.

    On CPU, by measurement with JAX 0.10 on two cores: XLA's convolutions are as fast as its products, but for

    - three taps and a stride of 1, which need a half to a fourth of the products in tiles (`winograd`);
    - small arrays, and inside `jax.lax.scan`, where they run on one thread: all taps side by side, one product, as long as
      all of it stays in the cache (16 to 16 channels of 128·32·32 positions take 52 ms this way, directly 6);
    - the gradient of the kernel of t×1×1, two to four times as slow: one product, then shifts;
    - the gradient of the kernel of the first layer, three times as slow: products, frame by frame.

    Elsewhere what is a product is one, and what is a 2-D convolution is one; this was not measured.
    """
    taps, cpu = math.prod(kernel[:3]), host_platform() == "cpu"
    if has_halo:
        chosen = _of(_temporal if groups == 1 and kernel[1:3] == (1, 1) else _planes, padding=0)
        return Lowering(chosen, chosen)
    if groups == 1 and taps == 1:
        return Lowering(_product, _product)
    if cpu and groups == 1 and (in_tiles := _in_tiles_where_faster(x, kernel, strides, dtype)):
        return in_tiles
    seen = (
        x[0]
        * math.prod(-(-n // stride) for n, stride in zip(x[1:4], strides, strict=True))
        * taps
        * kernel[3]
    )
    if cpu and groups == 1 and taps <= 27 and kernel[3] <= BLOCK and seen * 4 <= CACHED:
        return Lowering(_side_by_side, _side_by_side)
    if groups == 1 and kernel[1:3] == (1, 1):
        return Lowering(_temporal, _shifted_products if cpu else _temporal)
    return Lowering(_planes, _frame_by_frame if cpu and groups == 1 and kernel[3] <= 4 else _planes)


def _in_tiles_where_faster(
    x: tuple[int, ...], kernel: tuple[int, ...], strides: Triple, dtype: Any
) -> Lowering | None:
    """Tiles save products, and cost sums over x and y, and a larger kernel that is made anew each time.

    So they pay where a position has many products, by half the harmonic mean of channels and features, and where there are
    many positions: each product has a row for each tile. The numbers are measured.
    """
    (t, h, w, channels, features), (batch, *positions) = kernel, x[:-1]
    if (
        {t, h, w} - {1, 3} or h != w or dtype in (jnp.bfloat16, jnp.float16)
    ):  # half precision has no digits to spare
        return None
    if h == 1:
        positions = [-(-n // stride) for n, stride in zip(positions, strides, strict=True)]
        strides = (strides[0], 1, 1)
    length, height, width = positions
    over_space = (1, 1) if h == 1 else (4, 1) if features <= BLOCK else (2, 2)
    tiles = (4 if t == 3 else 1, *over_space)
    rows = batch * math.prod(-(-n // tile) for n, tile in zip(positions, tiles, strict=True))
    width_of_products = channels * features / (channels + features)
    enough = (30 if t == 3 else 16) if h == 3 else 100 if length == 4 else 150
    if (
        width_of_products < enough
        or rows < 64
        or strides != (1, 1, 1)
        or length % tiles[0]
        or min(height, width) < h
    ):
        return None
    of_value = of_kernel = _of(_in_tiles, tiles=tiles)
    if t == 1 and over_space == (4, 1):
        of_kernel = _of(_in_tiles, tiles=(1, 4, 4))
        if math.prod(x) * 4 <= 1.5 * CACHED:
            of_value = of_kernel
    return Lowering(of_value, of_kernel)


def video_conv(
    x: Video,
    kernel: Array,
    strides: Triple = (1, 1, 1),
    groups: int = 1,
    axis_name: str | None = None,
) -> Array:
    """y[p] = Σ_tap x[strides · p + tap] W[tap], zeros beyond the borders, as `jax.lax.conv_general_dilated` in 3-D.

    Args:
        x: (B, T, H, W, C).
        kernel: (t, h, w, C / groups, features), t, h and w odd; x is padded by half of them on both sides.
        strides: along (T, H, W).
        groups: output channels of one group see the input channels of that group alone.
        axis_name: under `jax.shard_map` or `jax.pmap`, the mapped axis over whose devices T is split; frames at the borders
            go to the neighbours.

    Returns:
        (B, T / stride, H / stride, W / stride, features), rounded up.

    Raises:
        ValueError: T is split, and the stride does not divide what each device holds.

    >>> import jax.numpy as jnp
    >>> video_conv(jnp.ones((1, 3, 1, 1, 1)), jnp.ones((3, 1, 1, 1, 1))).ravel()
    Array([2., 3., 2.], dtype=float32)
    """
    strides = (int(strides[0]), int(strides[1]), int(strides[2]))
    if axis_name is None:
        return _convolve(x, kernel, strides, groups, False)
    taps = kernel.shape[0]
    halo = local_windows(x.shape[1], taps, strides[0], taps // 2, axis_name)
    return _convolve(with_halo(x, axis_name, *halo), kernel, strides, groups, taps > 1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def _convolve(x: Array, kernel: Array, strides: Triple, groups: int, has_halo: bool) -> Array:
    return _lowered(
        lowering(x.shape, kernel.shape, strides, groups, x.dtype, has_halo).value,
        x,
        kernel,
        strides,
        groups,
    )


@functools.partial(_convolve.defjvp, symbolic_zeros=True)
def _convolve_jvp(
    strides: Triple,
    groups: int,
    has_halo: bool,
    primals: tuple[Array, Array],
    tangents: tuple[Any, Any],
) -> tuple[Array, Array]:
    (x, kernel), (dx, dkernel) = primals, tangents
    chosen, zero = (
        lowering(x.shape, kernel.shape, strides, groups, x.dtype, has_halo),
        jax.custom_derivatives.SymbolicZero,
    )
    y = _convolve(x, kernel, strides, groups, has_halo)
    parts = [] if isinstance(dx, zero) else [_lowered(chosen.value, dx, kernel, strides, groups)]
    parts += (
        []
        if isinstance(dkernel, zero)
        else [_lowered(chosen.by_kernel, x, dkernel, strides, groups)]
    )
    return y, functools.reduce(jnp.add, parts) if parts else jnp.zeros_like(y)


@functools.partial(jax.jit, static_argnums=(0, 3, 4), inline=True)
def _lowered(chosen: Lowered, x: Array, kernel: Array, strides: Triple, groups: int) -> Array:
    """Traced once for all convolutions of the same shapes, types and options, and then a part of what calls it."""
    return chosen(x, kernel, strides, groups)


@functools.cache
def _of(lowered: Callable[..., Array], **options: Any) -> Lowered:
    """With its options, the same object each time: what is traced is found again by it."""
    return functools.partial(lowered, **options)


def _product(x: Array, kernel: Array, strides: Triple, groups: int) -> Array:
    """1×1×1."""
    return _dot(x[:, :: strides[0], :: strides[1], :: strides[2]], kernel[0, 0, 0])


def _side_by_side(x: Array, kernel: Array, strides: Triple, groups: int) -> Array:
    """All taps in the channels, one product."""
    return _dot(
        jnp.concatenate(_taps(x, kernel.shape[:3], strides), axis=-1),
        kernel.reshape(-1, kernel.shape[-1]),
    )


def _temporal(
    x: Array, kernel: Array, strides: Triple, groups: int, padding: int | None = None
) -> Array:
    """t×1×1, a 2-D convolution (t, 1) over (T, H·W); the padding is in time, None is half of the taps."""
    x = x[:, :, :: strides[1], :: strides[2]]
    y = _conv2d(
        x.reshape(*x.shape[:2], -1, x.shape[-1]), kernel[:, :, 0], (strides[0], 1), padding=padding
    )
    return y.reshape(x.shape[0], -1, *x.shape[2:4], kernel.shape[-1])


def _shifted_products(x: Array, kernel: Array, strides: Triple, groups: int) -> Array:
    """t×1×1, one product with all taps, whose parts are shifted and summed."""
    taps, _, _, channels, features = kernel.shape
    x = x[:, :, :: strides[1], :: strides[2]]
    products = _dot(x, jnp.moveaxis(kernel[:, 0, 0], 0, 1).reshape(channels, taps * features))
    shifted = _taps(products, (taps, 1, 1), (strides[0], 1, 1))
    return functools.reduce(
        jnp.add, (part[..., i * features : (i + 1) * features] for i, part in enumerate(shifted))
    )


def _planes(
    x: Array, kernel: Array, strides: Triple, groups: int, padding: int | None = None
) -> Array:
    """A 2-D convolution of every frame, the taps in time in the channels; the padding is in time, None is half of the taps."""
    x, kernel = _time_in_channels(
        x, kernel, strides[0], groups, kernel.shape[0] // 2 if padding is None else padding
    )
    y = _conv2d(x.reshape(-1, *x.shape[2:]), kernel, strides[1:], groups)
    return y.reshape(*x.shape[:2], *y.shape[1:])


def _in_tiles(
    x: Array, kernel: Array, strides: Triple, groups: int, tiles: tuple[int, ...]
) -> Array:
    """Three taps in tiles of so many outputs along (T, H, W); 1 is no tile. Along H and W the stride is 1."""
    if kernel.shape[1:3] == (1, 1) and strides[1:] != (1, 1):
        x, strides = x[:, :, :: strides[1], :: strides[2]], (strides[0], 1, 1)
    for axis, tile in enumerate(tiles):
        if tile > 1:
            others = (*tiles[:axis], 1, *tiles[axis + 1 :])
            along_others = functools.partial(
                _in_tiles, strides=strides, groups=groups, tiles=others
            )
            return tiled(x, kernel, axis, tile, along_others)
    return (_product if kernel.shape[2] == 1 else _joined_rows)(x, kernel, strides, groups)


def _joined_rows(x: Array, kernel: Array, strides: Triple, groups: int) -> Array:
    """1×1×w: rows side by side, zeros between them, so that there is width enough for all cores."""
    rows, width, between = math.prod(x.shape[:3]), x.shape[3], kernel.shape[2] // 2
    joined = next(
        (m for m in range(1, rows) if rows % m == 0 and m * (width + between) >= JOINED), rows
    )
    apart = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, between), (0, 0)))
    y = _conv2d(apart.reshape(rows // joined, 1, -1, x.shape[-1]), kernel[0], (1, 1))
    return y.reshape(*apart.shape[:-1], -1)[:, :, :, :width]


def _frame_by_frame(x: Array, kernel: Array, strides: Triple, groups: int) -> Array:
    """Of each frame, all that the taps in space see, as the columns of a matrix; its products go to several frames of y.

    The transpose by the kernel takes products of a frame's matrix and frames of ȳ, which are contiguous, and makes the
    matrix only when it is wanted.
    """
    batch, length, *size, _ = x.shape
    t, h, w, channels, features = kernel.shape
    stride = strides[0]
    rows, columns = (-(-n // s) for n, s in zip(size, strides[1:], strict=True))
    frames = _phases(x, (h, w), (rows, columns), strides[1:])
    flat = kernel.reshape(t, h * w * channels, features)
    # Frame stride · i + p meets tap k in frame i + (p + t // 2 − k) / stride of y.
    steps = -(-length // stride)
    padding = t // 2 // stride + 1
    y = jnp.zeros((batch, steps + 2 * padding, rows * columns, features), x.dtype)
    for phase in range(stride):
        to = {
            (phase + t // 2 - k) // stride: k
            for k in range(t)
            if (phase + t // 2 - k) % stride == 0
        }
        first, in_order = min(to, default=0), [to[at] for at in sorted(to)]
        count = len(range(phase, length, stride))
        if not in_order or not count:
            continue

        @jax.checkpoint
        def step(
            y: Array,
            i: Array,
            phase: int = phase,
            first: int = first,
            in_order: Any = in_order,
            n: int = count,
        ) -> Any:
            clip, at = i // n, i % n
            frame = lax.dynamic_index_in_dim(
                frames, clip * length + at * stride + phase, keepdims=False
            )
            matrix = jnp.concatenate(
                [
                    frame[r % strides[1], c % strides[2], :, r // strides[1] :, c // strides[2] :][
                        :, :rows, :columns
                    ]
                    for r, c in itertools.product(range(h), range(w))
                ]
            ).reshape(h * w * channels, -1)
            seen = jnp.stack(
                [lax.dot_general(matrix, flat[k], (((0,), (0,)), ((), ()))) for k in in_order]
            )
            return y + lax.dynamic_update_slice(
                jnp.zeros_like(y), seen[None], (clip, at + padding + first, 0, 0)
            ), None

        y, _ = lax.scan(step, y, jnp.arange(batch * count))
    return y[:, padding : padding + steps].reshape(batch, steps, rows, columns, features)


def _phases(
    x: Array, taps: tuple[int, int], out: tuple[int, int], strides: tuple[int, ...]
) -> Array:
    """Frames (B·T, stride, stride, C, rows, columns) of padded x: each tap of a strided kernel sees a slice of them."""
    sizes = [
        -(-(tap + (n - 1) * stride) // stride)
        for tap, n, stride in zip(taps, out, strides, strict=True)
    ]
    around = [
        (tap // 2, size * stride - n - tap // 2, 0)
        for tap, size, stride, n in zip(taps, sizes, strides, x.shape[2:4], strict=True)
    ]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 0), *around, (0, 0, 0)])
    x = x.reshape(-1, sizes[0], strides[0], sizes[1], strides[1], x.shape[-1])
    return x.transpose(0, 2, 4, 5, 1, 3)


def _dot(x: Array, kernel: Array) -> Array:
    return dot_over_positions(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def _taps(x: Array, taps: tuple[int, ...], strides: Triple) -> list[Array]:
    """What each tap of a kernel sees."""
    padded = jnp.pad(x, ((0, 0), *((size // 2, size // 2) for size in taps), (0, 0)))
    axes = tuple(zip(x.shape[1:4], strides, strict=True))
    starts = itertools.product(*map(range, taps))
    return [
        padded[
            :,
            *(
                slice(first, first + length, stride)
                for first, (length, stride) in zip(start, axes, strict=True)
            ),
        ]
        for start in starts
    ]


def _time_in_channels(
    x: Array, kernel: Array, stride: int, groups: int, padding: int
) -> tuple[Array, Array]:
    """The taps in time in the channels; each group keeps its own together."""
    taps, features = kernel.shape[0], kernel.shape[-1]
    if taps == 1:
        return x[:, ::stride], kernel[0]
    zero, length = jnp.zeros((), x.dtype), x.shape[1]
    steps = (length + 2 * padding - taps) // stride
    frames = []
    for k in range(taps):
        before = padding - k
        after = steps * stride + 1 - length - before
        shifted = lax.pad(x, zero, [(0, 0, 0), (before, after, 0), *[(0, 0, 0)] * 3])[:, ::stride]
        frames.append(shifted.reshape(*shifted.shape[:-1], groups, -1))
    x = jnp.stack(frames, axis=-2)
    return x.reshape(*x.shape[:4], -1), jnp.moveaxis(kernel, 0, 2).reshape(
        *kernel.shape[1:3], -1, features
    )


def _conv2d(
    x: Array, kernel: Array, strides: tuple[int, ...], groups: int = 1, padding: int | None = None
) -> Array:
    of_rows, of_columns = (size // 2 for size in kernel.shape[:2])
    of_rows = of_rows if padding is None else padding
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        [(of_rows, of_rows), (of_columns, of_columns)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


class VideoConv(nn.Module):
    """A convolution over (T, H, W), `video_conv`, without a bias: a norm follows.

    Attributes:
        features: output channels.
        kernel_size: taps along (T, H, W), odd; the input is padded by half of them with zeros.
        strides: along (T, H, W).
        groups: output channels of one group see the input channels of that group alone, as in ResNeXt.
        kernel_init: initialiser of the kernel.
        dtype: of the computation; None is that of the input and parameters.
        param_dtype: of the kernel, whose shape is (*kernel_size, C / groups, features).
        axis_name: the mapped axis over whose devices T is split.

    >>> import jax, jax.numpy as jnp
    >>> conv = VideoConv(7, kernel_size=(1, 3, 3), strides=(1, 2, 2))
    >>> conv.init_with_output(jax.random.key(0), jnp.ones((2, 4, 16, 16, 3)))[0].shape
    (2, 4, 8, 8, 7)
    """

    features: int
    kernel_size: Triple = (1, 1, 1)
    strides: Triple = (1, 1, 1)
    groups: int = 1
    kernel_init: Any = nn.initializers.he_normal(in_axis=(0, 1, 2, 3))
    dtype: Any = None
    param_dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Video) -> Array:
        """X (B, T, H, W, C) -> (B, T / stride, H / stride, W / stride, features), rounded up."""
        if not all(size % 2 for size in self.kernel_size):
            raise ValueError(f"kernel_size must be odd along every axis; got {self.kernel_size}.")
        if x.shape[-1] % self.groups or self.features % self.groups:
            raise ValueError(
                f"groups must divide the input's channels and features, {x.shape[-1]} and {self.features}; got {self.groups}."
            )
        shape = (*self.kernel_size, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype)
        return video_conv(
            x, kernel, self.strides, self.groups, None if self.is_initializing() else self.axis_name
        )
