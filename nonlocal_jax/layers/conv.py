"""Video convolutions computed as the matrix products and 2-D convolutions that they are."""

import functools
import itertools
import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from nonlocal_jax.ops.machine import backend
from nonlocal_jax.types import Array, Video

Triple = tuple[int, int, int]
Lowering = Literal["product", "taps", "temporal", "planes"]


def dot_over_positions(x: Array, kernel: Array, dimension_numbers: lax.DotDimensionNumbers, **options: Any) -> Array:
    """The `dot_general` of an `nn.Dense` over channels: a 1×1×1 convolution of x (*positions, C), kernel (C, features).

    On CPU all positions are the rows of one matrix: from several position axes XLA makes a transposed copy of ȳ for the
    gradient of the kernel, with whatever computes ȳ done again for it. A training step of an embedded-Gaussian block at
    3136/784 takes 9% less time this way, of a dot-product block at 12544/12544 14%. Elsewhere the axes stay, since they
    may be sharded.
    """
    if backend() != "cpu":
        return lax.dot_general(x, kernel, dimension_numbers, **options)
    rows = lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), **options)
    return rows.reshape(*x.shape[:-1], kernel.shape[-1])


def lowering(kernel: tuple[int, ...], groups: int = 1) -> Lowering:
    """How a kernel (t, h, w, C / groups, features) is computed. The one place that chooses.

    - "product": 1×1×1, one matrix product.
    - "taps": all taps side by side in the channels, one matrix product. XLA's convolution is slower at small widths and,
      on CPU, runs on one thread inside `jax.lax.scan`.
    - "temporal": t×1×1, a 2-D convolution (t, 1) over (T, H·W).
    - "planes": a 2-D convolution of every frame, the taps in time side by side in the channels.
    """
    taps = math.prod(kernel[:3])
    if groups == 1 and taps == 1:
        return "product"
    if groups == 1 and taps <= 27 and kernel[3] <= 32:
        return "taps"
    return "temporal" if groups == 1 and kernel[1:3] == (1, 1) else "planes"


def video_conv(x: Video, kernel: Array, strides: Triple = (1, 1, 1), groups: int = 1) -> Array:
    """y[p] = Σ_tap x[strides · p + tap] W[tap], zeros beyond the borders, as `jax.lax.conv_general_dilated` in 3-D.

    Args:
        x: (B, T, H, W, C).
        kernel: (t, h, w, C / groups, features), t, h and w odd; x is padded by half of them on both sides.
        strides: along (T, H, W).
        groups: output channels of one group see the input channels of that group alone.

    Returns:
        (B, T / stride, H / stride, W / stride, features), rounded up.

    >>> import jax.numpy as jnp
    >>> video_conv(jnp.ones((1, 3, 1, 1, 1)), jnp.ones((3, 1, 1, 1, 1))).ravel()
    Array([2., 3., 2.], dtype=float32)
    """
    match lowering(kernel.shape, groups):
        case "product":
            x = x[:, :: strides[0], :: strides[1], :: strides[2]]
            return dot_over_positions(x, kernel[0, 0, 0], (((x.ndim - 1,), (0,)), ((), ())))
        case "taps":
            x = jnp.concatenate(_taps(x, kernel.shape[:3], strides), axis=-1)
            return dot_over_positions(x, kernel.reshape(-1, kernel.shape[-1]), (((x.ndim - 1,), (0,)), ((), ())))
        case "temporal":
            return _temporal(x[:, :, :: strides[1], :: strides[2]], kernel[:, 0, 0], strides[0])
        case _:
            return _planes(x, kernel, strides, groups)


def _taps(x: Array, taps: tuple[int, ...], strides: Triple) -> list[Array]:
    """What each tap of a kernel sees."""
    padded = jnp.pad(x, ((0, 0), *((size // 2, size // 2) for size in taps), (0, 0)))
    axes = tuple(zip(x.shape[1:4], strides, strict=True))
    starts = itertools.product(*map(range, taps))
    return [
        padded[:, *(slice(first, first + length, stride) for first, (length, stride) in zip(start, axes, strict=True))]
        for start in starts
    ]


def _planes(x: Array, kernel: Array, strides: Triple, groups: int) -> Array:
    taps, features = kernel.shape[0], kernel.shape[-1]
    frames = _taps(x, (taps, 1, 1), (strides[0], 1, 1))
    if groups == 1:
        x, kernel = jnp.concatenate(frames, axis=-1), jnp.concatenate(list(kernel), axis=2)
    else:  # each group keeps its taps together
        x = jnp.stack([frame.reshape(*frame.shape[:-1], groups, -1) for frame in frames], axis=-2)
        x = x.reshape(*x.shape[:4], -1)
        kernel = jnp.moveaxis(kernel, 0, 2).reshape(*kernel.shape[1:3], -1, features)
    y = _conv2d(x.reshape(-1, *x.shape[2:]), kernel, strides[1:], groups)
    return y.reshape(*x.shape[:2], *y.shape[1:])


def _conv2d(x: Array, kernel: Array, strides: tuple[int, int], groups: int = 1) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        [(size // 2, size // 2) for size in kernel.shape[:2]],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _temporal(x: Array, kernel: Array, stride: int) -> Array:
    """Kernel (t, C, features) over the frames of x."""
    rows = x.reshape(*x.shape[:2], -1, x.shape[-1])
    y = _conv2d(rows, kernel[:, None], (stride, 1))
    return y.reshape(x.shape[0], -1, *x.shape[2:4], kernel.shape[-1])


@functools.partial(_temporal.defjvp, symbolic_zeros=True)
def _temporal_jvp(stride: int, primals: tuple[Array, Array], tangents: tuple[Any, Any]) -> tuple[Array, Array]:
    """Linear in both. By the kernel, y is written as a product with all taps at once, then shifted and summed: the gradient
    of the kernel is one product then, where XLA's convolution on CPU takes four times as long.
    """
    (x, kernel), (dx, dkernel) = primals, tangents
    y = _temporal(x, kernel, stride)
    parts = []
    if not isinstance(dx, jax.custom_derivatives.SymbolicZero):
        parts.append(_temporal(dx, kernel, stride))
    if not isinstance(dkernel, jax.custom_derivatives.SymbolicZero):
        parts.append(_products_then_shifts(x, dkernel, stride))
    return y, functools.reduce(jnp.add, parts, jnp.zeros_like(y))


def _products_then_shifts(x: Array, kernel: Array, stride: int) -> Array:
    taps, channels, features = kernel.shape
    products = dot_over_positions(
        x, jnp.moveaxis(kernel, 0, 1).reshape(channels, taps * features), (((x.ndim - 1,), (0,)), ((), ()))
    )
    shifted = _taps(products, (taps, 1, 1), (stride, 1, 1))
    return functools.reduce(jnp.add, (part[..., i * features : (i + 1) * features] for i, part in enumerate(shifted)))


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
        return video_conv(x, kernel, self.strides, self.groups)
