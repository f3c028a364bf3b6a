"""The video convolution: the layer that owns its kernel, and the function that it calls."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from nonlocal_jax import checks
from nonlocal_jax.layers.convolution import cpu, tpu
from nonlocal_jax.layers.convolution.folding import (
    ConvFunction,
    Lowering,
    Triple,
    fold,
    fold_after_halo,
)
from nonlocal_jax.layers.halo import add_halo, local_windows
from nonlocal_jax.layers.initializers import variance_scaling
from nonlocal_jax.layers.paired_columns import pair
from nonlocal_jax.ops.platforms import by_platform
from nonlocal_jax.types import Array, Video


class VideoConv(nn.Module):
    """A convolution over (T, H, W) without a bias, since a norm follows it.

    Attributes:
        features: Number of output channels.
        kernel_size: Taps along (T, H, W), all odd. The input is padded by half of them with zeros.
        strides: Strides along (T, H, W).
        groups: Number of groups. The output channels of a group depend on its input channels only,
            as in ResNeXt.
        kernel_init: Initializer of the kernel.
        dtype: Dtype of the computation. None infers it from the input and the parameters.
        param_dtype: Dtype of the kernel, which has shape (*kernel_size, C / groups, features).
        axis_name: Name of the mapped axis over whose devices T is split.
        paired: Whether the output has its columns in pairs, as in `layers.paired_columns`.

    >>> import jax, jax.numpy as jnp
    >>> conv = VideoConv(7, kernel_size=(1, 3, 3), strides=(1, 2, 2))
    >>> x = jnp.ones((2, 4, 16, 16, 3))
    >>> jax.eval_shape(conv.init_with_output, jax.random.key(0), x)[0].shape
    (2, 4, 8, 8, 7)
    """

    features: int
    kernel_size: Triple = (1, 1, 1)
    strides: Triple = (1, 1, 1)
    groups: int = 1
    kernel_init: Any = variance_scaling(2.0, "fan_in", "truncated_normal")
    dtype: Any = None
    param_dtype: Any = jnp.float32
    axis_name: str | None = None
    paired: bool = False

    @nn.compact
    def __call__(self, x: Video) -> Array:
        """Convolves x (B, T, H, W, C).

        Returns:
            (B, T / stride, H / stride, W / stride, features), rounded up; paired, half the columns
            and twice the features.
        """
        kernel = self.kernel_for(x)
        x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype)
        # Parameters are initialised outside of `shard_map` and `pmap`, where the axis has no name.
        axis_name = None if self.is_initializing() else self.axis_name
        return video_conv(x, kernel, self.strides, self.groups, axis_name, paired=self.paired)

    @nn.nowrap
    def kernel_for(self, x: Video) -> Any:
        """Returns the kernel, which `init` creates. To be called inside `__call__`."""
        if not all(size % 2 for size in self.kernel_size):
            raise ValueError(f"kernel_size must be odd along every axis; got {self.kernel_size}.")
        if self.has_variable("params", "kernel"):
            stored: Array = nn.meta.unbox(self.get_variable("params", "kernel"))
            checks.channels("x", x.shape, stored.shape[-2] * self.groups)
        channels = x.shape[-1]
        if channels % self.groups or self.features % self.groups:
            raise ValueError(
                "groups must divide the input's channels and features, "
                f"{channels} and {self.features}; got {self.groups}."
            )
        shape = (*self.kernel_size, channels // self.groups, self.features)
        return self.param("kernel", self.kernel_init, shape, self.param_dtype)

    @nn.nowrap
    def output_shape(self, x: Video) -> tuple[int, ...]:
        """Returns the shape of the convolution of x."""
        strides = zip(x.shape[1:4], self.strides, strict=True)
        frames, rows, columns = (-(-size // stride) for size, stride in strides)
        if self.paired:
            return x.shape[0], frames, rows, columns // 2, 2 * self.features
        return x.shape[0], frames, rows, columns, self.features


def video_conv(
    x: Video,
    kernel: Array,
    strides: Triple = (1, 1, 1),
    groups: int = 1,
    axis_name: str | None = None,
    platform: str | None = None,
    paired: bool = False,
) -> Array:
    """Computes y[p] = Σ_tap x[strides · p + tap] W[tap], where x is 0 beyond its borders.

    This is `jax.lax.conv_general_dilated` in 3-D, computed as 2-D convolutions and products.

    Args:
        x: (B, T, H, W, C).
        kernel: (t, h, w, C / groups, features), where t, h and w are odd. x is padded by half of
            them on both sides.
        strides: Strides along (T, H, W).
        groups: Number of groups. The output channels of a group depend on its input channels only.
        axis_name: Under `jax.shard_map` or `jax.pmap`, the name of the mapped axis over whose
            devices T is split. Devices exchange the frames at the borders of their parts.
        platform: Platform whose algorithm runs: "cpu", "gpu", "tpu" or "rocm". None is the one that
            the program is lowered for.
        paired: Whether the output has its columns in pairs, as in `layers.paired_columns`.

    Returns:
        (B, T / stride, H / stride, W / stride, features), rounded up; paired, half the columns and
        twice the features.

    Raises:
        ValueError: If T is split and the stride does not divide the frames that each device holds,
            or paired columns are odd in number.

    >>> import jax.numpy as jnp
    >>> video_conv(jnp.ones((1, 3, 1, 1, 1)), jnp.ones((3, 1, 1, 1, 1))).ravel()
    Array([2., 3., 2.], dtype=float32)
    """
    strides = (int(strides[0]), int(strides[1]), int(strides[2]))
    columns = -(-x.shape[3] // strides[2])
    if paired and columns % 2:
        raise ValueError(f"paired columns must be even in number; got {columns}.")
    if axis_name is None:
        return _convolve_jitted(x, kernel, _Options(strides, groups, False, platform, paired))
    taps, *window = kernel.shape[:3]
    if window == [1, 1]:  # positions between the strides need not be exchanged
        x, strides = x[:, :, :: strides[1], :: strides[2]], (strides[0], 1, 1)
    halo = local_windows(x.shape[1], taps, strides[0], taps // 2, axis_name)
    options = _Options(strides, groups, taps > 1, platform, paired)
    return _convolve_jitted(add_halo(x, axis_name, *halo), kernel, options)


def dot_over_positions(
    x: Array,
    kernel: Array,
    dimension_numbers: lax.DotDimensionNumbers,
    platform: str | None = None,
    **options: Any,
) -> Array:
    """Computes the product over channels of an `nn.Dense`, as its `dot_general`.

    This is a 1×1×1 convolution of x (*positions, C) with a kernel (C, features). On CPUs, all
    positions become the rows of one matrix. Elsewhere the position axes stay, because they may be
    sharded.
    """
    return _dot(x, kernel, dimension_numbers, platform, tuple(options.items()))


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _dot(
    x: Array,
    kernel: Array,
    dimension_numbers: lax.DotDimensionNumbers,
    platform: str | None,
    options: tuple[tuple[str, Any], ...],
) -> Array:
    def compute(as_rows: bool, x: Array, kernel: Array) -> Array:
        if as_rows:
            return cpu.dot_over_rows(x, kernel, **dict(options))
        return lax.dot_general(x, kernel, dimension_numbers, **dict(options))

    return by_platform(lambda name: name == "cpu", compute, x, kernel, platform=platform)


class _Options(NamedTuple):
    """Static options of a convolution.

    `platform` is None for the one that is lowered for.
    """

    strides: Triple
    groups: int
    has_halo: bool
    platform: str | None
    paired: bool
    differentiated: bool = False


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _convolve(x: Array, kernel: Array, options: _Options) -> Array:
    return _apply("forward" if options.differentiated else "inference", options, x, kernel)


@functools.partial(_convolve.defjvp, symbolic_zeros=True)
def _convolve_jvp(
    options: _Options, primals: tuple[Array, Array], tangents: tuple[Any, Any]
) -> tuple[Array, Array]:
    """Differentiates x and the kernel by different functions, each the fastest for its gradient."""
    x, kernel = primals
    x_tangent, kernel_tangent = tangents
    y = _convolve(x, kernel, options._replace(differentiated=True))
    # Without symbolic zeros the gradient of the first layer would convolve an array of zeros for
    # its input.
    zero = jax.custom_derivatives.SymbolicZero
    terms = []
    if not isinstance(x_tangent, zero):
        terms.append(_apply("forward", options, x_tangent, kernel))
    if not isinstance(kernel_tangent, zero):
        terms.append(_apply("kernel_gradient", options, x, kernel_tangent))
    return y, functools.reduce(jnp.add, terms) if terms else jnp.zeros_like(y)


# For callers without jit; see `by_platform`.
_convolve_jitted = jax.jit(_convolve, static_argnums=2)


# jit, so that convolutions with equal shapes, dtypes and options are traced once. inline, so that
# XLA still fuses them with what surrounds them.
@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _apply(part: str, options: _Options, x: Array, kernel: Array) -> Array:
    """Computes the convolution by the function that is named `part` in its `Lowering`."""

    def choose(platform: str) -> ConvFunction:
        lowering = _lowering(x, kernel, options, platform)
        function: ConvFunction = getattr(lowering, part)
        return function

    def compute(function: ConvFunction, x: Array, kernel: Array) -> Array:
        return function(x, kernel, options.strides, options.groups)

    return by_platform(choose, compute, x, kernel, platform=options.platform)


def _lowering(x: Array, kernel: Array, options: _Options, platform: str) -> Lowering:
    """Chooses how a convolution is computed. This is the only place that does."""
    lowering = _lowering_of_unpaired(x, kernel, options, platform)
    return Lowering(*map(_to_pairs, lowering)) if options.paired else lowering


def _lowering_of_unpaired(x: Array, kernel: Array, options: _Options, platform: str) -> Lowering:
    groups = options.groups
    if options.has_halo:
        return Lowering.of(fold_after_halo(kernel.shape, groups))
    if platform == "tpu":
        return tpu.choose(x.shape[0], kernel.shape, groups)
    if platform == "cpu" and groups == 1:
        fast = cpu.choose(x.shape, kernel.shape, options.strides, x.dtype)
        if fast is not None:
            return fast
    return Lowering.of(fold(kernel.shape, groups))


@functools.cache  # so that equal functions become equal choices
def _to_pairs(function: ConvFunction) -> ConvFunction:
    if function is tpu.frames_in_lanes:
        return tpu.frames_in_lanes_to_pairs
    return lambda *arguments: pair(function(*arguments))
