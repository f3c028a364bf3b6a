"""How much residual blocks add to their inputs: computed and sown by them, collected from there."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nonlocal_jax.types import Array, Features, PositionMask, Scalar

RESIDUAL_RATIO = "residual_ratio"  # the name under which blocks sow ‖W_z y‖ / ‖x‖


def sow_residual_ratio(
    module: nn.Module,
    residual: Features,
    x: Features,
    mask: PositionMask | None = None,
    axis_name: str | None = None,
) -> None:
    """Sows ‖residual‖ / ‖x‖ of a residual block as the intermediate "residual_ratio".

    `describe` and training logs show it. Nothing is computed unless "intermediates" is mutable.

    Args:
        module: The block, usually `self`.
        residual: (B, *positions, C), what the block adds to its input.
        x: (B, *positions, C), its input.
        mask: (B, *positions) of bool, False where x is padding.
        axis_name: Mapped axis over whose devices positions are split.
    """
    if module.is_mutable_collection("intermediates") and not module.is_initializing():
        ratio = residual_ratio(residual, x, mask, axis_name)
        module.sow("intermediates", RESIDUAL_RATIO, ratio)


def residual_ratio(
    residual: Features,
    x: Features,
    mask: PositionMask | None = None,
    axis_name: str | None = None,
) -> Scalar:
    """Computes ‖residual‖ / ‖x‖ over the real positions: 0 while a block is the identity.

    Args:
        residual: (B, *positions, C), W_z y after its norm; 0 where x is padding.
        x: (B, *positions, C), the block's input.
        mask: (B, *positions) of bool, False where x is padding.
        axis_name: Mapped axis over whose devices positions are split.
    """
    x = x if mask is None else jnp.where(mask[..., None], x, 0)
    squares = [jnp.sum(jnp.square(a.astype(jnp.float32))) for a in (residual, x)]
    if axis_name is not None:
        squares = jax.lax.psum(squares, axis_name)
    residual_norm, input_norm = map(jnp.sqrt, squares)
    return residual_norm / jnp.where(input_norm == 0, 1, input_norm)


def residual_ratios(intermediates: Mapping[str, Any]) -> dict[str, Array]:
    """Collects the residual ratio ‖W_z y‖ / ‖x‖ of every non-local block.

    A block that is still the identity has ratio 0. A block that ran several times has the mean.

    Args:
        intermediates: The "intermediates" collection, which `model.apply` returns if it is mutable.

    Returns:
        {"residual_ratio/<path of the block>": scalar}.

    >>> residual_ratios({"res2": {"nonlocal": {"residual_ratio": (jnp.array(0.25),)}}})
    {'residual_ratio/res2/nonlocal': Array(0.25, dtype=float32)}
    """
    return _collect(intermediates, RESIDUAL_RATIO)


def _collect(collection: Mapping[str, Any], prefix: str) -> dict[str, Array]:
    ratios: dict[str, Array] = {}
    for name, value in collection.items():
        if name == RESIDUAL_RATIO:
            runs = [jnp.mean(ratio) for ratio in value]
            ratios[prefix] = jnp.mean(jnp.stack(runs))
        elif isinstance(value, Mapping):
            ratios |= _collect(value, f"{prefix}/{name}")
    return ratios
