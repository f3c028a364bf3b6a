"""Batch normalisation as the references have it, and the affine map that it becomes when it is frozen."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nonlocal_jax.types import Array, Features

# Running statistics keep 0.9 of themselves at each step; PyTorch writes the same as momentum 0.1.
BatchNorm = functools.partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)


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
        raise ValueError(f"variables must hold batch_stats to fold; got the collections {sorted(variables)}.")

    def fold(params: Any, statistics: Any) -> Any:
        if "mean" in statistics and not isinstance(statistics["mean"], Mapping):
            scale: Array = jax.lax.rsqrt(statistics["var"] + epsilon) * params.get("scale", 1.0)
            return {"bias": params.get("bias", 0.0) - statistics["mean"] * scale, "scale": scale}
        return {**params, **{name: fold(params.get(name, {}), inner) for name, inner in statistics.items()}}

    rest = {name: collection for name, collection in variables.items() if name not in ("params", "batch_stats")}
    return {"params": fold(variables["params"], variables["batch_stats"]), **rest}
