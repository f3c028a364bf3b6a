"""Batch normalisation as the references have it, and the affine map that it becomes when it is frozen."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nonlocal_jax.ops.definition import widen
from nonlocal_jax.types import Array, Features


class BatchNorm(nn.BatchNorm):
    """Flax's, with the references' constants, written so that its gradient keeps one array.

    y = x · s + (β − mean · s) with s = γ / √(var + ε), where Flax has (x − mean) · s + β: of the two only the second keeps
    x − mean beside x for the gradient. A training step of I3D R50 with five blocks, 2 clips of 8×224×224, needed 1.24 GB of
    temporaries this way, with Flax's 1.75 GB, both with direct convolutions.

    Attributes:
        momentum: what running statistics keep of themselves at each step; PyTorch writes the same 0.9 as 0.1.
        epsilon: ε.
        use_fast_variance: whether the variance is E[x²] − mean², which is quick and loses as many digits as mean² has more
            than the variance; otherwise it is E[(x − mean)²], as in PyTorch. What comes out of a softmax over many
            positions varies little around its mean.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.array([[1.0], [3.0]])
    >>> y, _ = BatchNorm(use_running_average=False).init_with_output(jax.random.key(0), x)
    >>> y.round(3)
    Array([[-1.],
           [ 1.]], dtype=float32)
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    use_fast_variance: bool = False

    @nn.compact
    def __call__(
        self, x: Features, use_running_average: bool | None = None, *, mask: Any = None
    ) -> Features:
        """Normalise each channel.

        Args:
            x: (..., C).
            use_running_average: whether the running statistics are used, not those of this batch.
            mask: of bool, the shape of x or broadcast to it: False does not count.

        Raises:
            ValueError: an axis other than the last.
        """
        if self.axis != -1:
            raise ValueError(f"axis must be -1, channels last; got {self.axis}.")
        running = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        channels = (x.shape[-1],)
        mean = self.variable("batch_stats", "mean", lambda: jnp.zeros(channels, jnp.float32))
        var = self.variable("batch_stats", "var", lambda: jnp.ones(channels, jnp.float32))
        if running:
            m, v = mean.value, var.value
        else:
            m, v = self._statistics(x, mask)
            if not self.is_initializing():
                mean.value = self.momentum * mean.value + (1 - self.momentum) * m
                var.value = self.momentum * var.value + (1 - self.momentum) * v
        scale = jax.lax.rsqrt(v + self.epsilon)
        if self.use_scale:
            scale = scale * self.param("scale", self.scale_init, channels, self.param_dtype).astype(
                jnp.float32
            )
        shift = -m * scale
        if self.use_bias:
            shift = shift + self.param("bias", self.bias_init, channels, self.param_dtype).astype(
                jnp.float32
            )
        outer = range(x.ndim - 1)
        y = widen(x) * jnp.expand_dims(scale, outer) + jnp.expand_dims(shift, outer)
        return y.astype(self.dtype or jnp.result_type(x.dtype, self.param_dtype))

    def _statistics(self, x: Array, mask: Array | None) -> tuple[Array, Array]:
        """Mean and biased variance of each channel, over all devices of `axis_name`."""
        x = widen(x)
        over = tuple(range(x.ndim - 1))

        def mean(a: Array) -> Array:
            if self.axis_name is None or self.is_initializing():
                return jnp.mean(a, over, where=mask)
            across = {"axis_name": self.axis_name, "axis_index_groups": self.axis_index_groups}
            if mask is None:
                return jax.lax.pmean(jnp.mean(a, over), **across)
            real = jnp.broadcast_to(mask, a.shape)  # more of it on some devices than on others
            return jax.lax.psum(jnp.sum(a, over, where=real), **across) / jax.lax.psum(
                jnp.sum(real, over), **across
            )

        m = mean(x)
        if self.use_fast_variance:
            return m, jnp.maximum(mean(jax.lax.square(x)) - jax.lax.square(m), 0)
        return m, mean(jax.lax.square(x - jnp.expand_dims(m, over)))


class Affine(nn.Module):
    """x · scale + bias, by channel: batch normalisation whose statistics no longer change (`freeze_batch_norm`).

    Attributes:
        scale_init: initialiser of `scale`.
        bias_init: initialiser of `bias`.
        dtype: of the computation; None is that of the input and parameters.
        param_dtype: of the parameters.

    >>> import jax, jax.numpy as jnp
    >>> Affine().init_with_output(jax.random.key(0), jnp.ones((1, 2)))[0]
    Array([[1., 1.]], dtype=float32)
    """

    scale_init: Any = nn.initializers.ones
    bias_init: Any = nn.initializers.zeros
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Features) -> Features:
        """Scale and shift each channel of x (B, *positions, C)."""
        scale = self.param("scale", self.scale_init, (x.shape[-1],), self.param_dtype)
        bias = self.param("bias", self.bias_init, (x.shape[-1],), self.param_dtype)
        x, scale, bias = nn.dtypes.promote_dtype(x, scale, bias, dtype=self.dtype)
        outer = range(x.ndim - 1)
        return x * jnp.expand_dims(scale, outer) + jnp.expand_dims(bias, outer)


def across_devices(norm: Callable[..., nn.Module], axis_name: str | None) -> dict[str, Any]:
    """Options for a norm whose positions are split over the devices of a mapped axis, so that its statistics are of all.

    A norm that names axes of its own (`functools.partial(BatchNorm, axis_name=...)`) keeps them.
    """
    kind = norm.func if isinstance(norm, functools.partial) else norm
    if axis_name is None or not (
        isinstance(kind, type) and issubclass(kind, nn.BatchNorm | nn.GroupNorm)
    ):
        return {}
    return {"axis_name": getattr(norm, "keywords", {}).get("axis_name", axis_name)}


def fold_batch_norm(scale: Any, bias: Any, mean: Any, var: Any, epsilon: float) -> tuple[Any, Any]:
    """Folds a BatchNorm with fixed statistics into one affine map.

    scale' = γ / √(var + ε), bias' = β − mean · scale'.

    Args:
        scale: γ (C,), or 1.0 for a norm without one.
        bias: β (C,), or 0.0 for a norm without one.
        mean: Running mean (C,).
        var: Running variance (C,).
        epsilon: ε of the BatchNorm.

    Returns:
        Scale and bias (C,), NumPy arrays if `var` is one, otherwise JAX arrays.

    >>> scale, bias = fold_batch_norm(6.0, 1.0, np.array([1.0]), np.array([4.0]), 0.0)
    >>> scale.tolist(), bias.tolist()
    ([3.0], [-2.0])
    """
    if isinstance(var, np.ndarray):
        folded = scale / np.sqrt(var + epsilon)
    else:
        folded = jax.lax.rsqrt(var + epsilon) * scale  # as in `BatchNorm`, to the last bit
    return folded, bias - mean * folded


def freeze_batch_norm(variables: Mapping[str, Any], epsilon: float = 1e-5) -> dict[str, Any]:
    """Variables of the same network with `Affine` in place of every trained BatchNorm: the same answers at test time.

    scale = γ / √(var + ε), bias = β − mean · scale.

    Args:
        variables: with "params" and "batch_stats".
        epsilon: ε of the BatchNorms.

    Returns:
        variables without "batch_stats". The input is not changed.

    Raises:
        ValueError: there are no batch statistics to fold.

    Source: section 4.1 of the paper, which trains 128-frame networks with BN frozen.

    >>> import jax.numpy as jnp
    >>> one = jnp.ones(1)
    >>> norm = {"params": {"n": {"scale": 6 * one, "bias": one}}, "batch_stats": {"n": {"mean": one, "var": 4 * one}}}
    >>> freeze_batch_norm(norm, epsilon=0.0)
    {'params': {'n': {'bias': Array([-2.], dtype=float32), 'scale': Array([3.], dtype=float32)}}}
    """
    if not variables.get("batch_stats"):
        raise ValueError(
            f"variables must hold batch_stats to fold; got the collections {sorted(variables)}."
        )

    def fold(params: Any, statistics: Any) -> Any:
        if "mean" in statistics and not isinstance(statistics["mean"], Mapping):
            scale: Array = jax.lax.rsqrt(statistics["var"] + epsilon) * params.get("scale", 1.0)
            return {"bias": params.get("bias", 0.0) - statistics["mean"] * scale, "scale": scale}
        return {
            **params,
            **{name: fold(params.get(name, {}), inner) for name, inner in statistics.items()},
        }

    rest = {
        name: collection
        for name, collection in variables.items()
        if name not in ("params", "batch_stats")
    }
    return {"params": fold(variables["params"], variables["batch_stats"]), **rest}
