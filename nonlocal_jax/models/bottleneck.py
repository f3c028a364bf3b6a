"""The residual block of the video networks."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn

from nonlocal_jax.layers import VideoConv
from nonlocal_jax.layers.norm import apply_norm
from nonlocal_jax.layers.residual import relu_of_sum
from nonlocal_jax.types import Array, Features

StrideAt = Literal["conv_a", "conv_b"]


class Bottleneck(nn.Module):
    """ReLU(x + 1×1×1 ∘ k×3×3 ∘ t×1×1), with a norm after each convolution and ReLU between them.

    Where the shape changes, x goes through a 1×1×1 convolution and a norm as well.

    Attributes:
        features: Output channels.
        inner_features: Channels of the first two convolutions.
        taps: (t, k), the taps in time of the first and of the second convolution.
        stride: Stride in space of one convolution and of the shortcut.
        stride_at: The convolution that has the stride.
        groups: Groups of the second convolution.
        norm: Makes a norm.
        zero_init: Whether the scale of the last norm starts at 0.
        dtype: Dtype of the computation. If None, it is inferred from the input and the parameters.
        param_dtype: Dtype of the parameters.
        axis_name: Mapped axis over whose devices T is split.
    """

    features: int
    inner_features: int
    taps: tuple[int, int]
    stride: int
    stride_at: StrideAt
    groups: int
    norm: Callable[..., nn.Module]
    zero_init: bool
    dtype: Any
    param_dtype: Any
    axis_name: str | None

    @nn.compact
    def __call__(self, x: Features, train: bool = False) -> Array:
        """Maps x (B, T, H, W, C) to (B, T, H / stride, W / stride, features)."""
        options: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "axis_name": self.axis_name,
        }
        conv: Any = functools.partial(VideoConv, **options)
        norm: Any = functools.partial(apply_norm, self.norm, train=train, **options)
        (t, k), inner = self.taps, self.inner_features
        strides = (1, self.stride, self.stride)
        strides_a = strides if self.stride_at == "conv_a" else (1, 1, 1)
        strides_b = strides if self.stride_at == "conv_b" else (1, 1, 1)

        y = conv(inner, (t, 1, 1), strides_a, name="conv_a")(x)
        y = nn.relu(norm(y, name="norm_a"))
        y = conv(inner, (k, 3, 3), strides_b, self.groups, name="conv_b")(y)
        y = nn.relu(norm(y, name="norm_b"))
        y = conv(self.features, name="conv_c")(y)
        zero_scale = {"scale_init": nn.initializers.zeros} if self.zero_init else {}
        y = norm(y, name="norm_c", **zero_scale)
        if self.stride != 1 or x.shape[-1] != self.features:
            x = conv(self.features, strides=strides, name="shortcut")(x)
            x = norm(x, name="shortcut_norm")
        return relu_of_sum(x, y)
