"""How much the non-local blocks of a network add, read from what they sow while it runs."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from nonlocal_jax.types import Array

RESIDUAL_RATIO = "residual_ratio"  # the name under which `NonLocalBlock` sows ‖W_z y‖ / ‖x‖


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
