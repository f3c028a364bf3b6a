"""How much residual blocks add to their inputs: computed and sown by them, collected from there."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nonlocal_jax.types import Array, Features, PositionMask, Scalar

RESIDUAL_RATIO = "residual_ratio"  # the name under which blocks sow ‖W_z y‖ / ‖x‖
Listener = Callable[[nn.Module, Scalar], None]
_listener: contextvars.ContextVar[Listener | None] = contextvars.ContextVar(
    "residual_ratio_listener", default=None
)


@contextlib.contextmanager
def report_residual_ratios(listener: Listener) -> Iterator[None]:
    """Context manager that reports the residual ratio of every block that runs to a listener.

    In an NNX model, what a Linen block sows stays inside its `ToNNX`.

    Args:
        listener: Called with the block and ‖W_z y‖ / ‖x‖.
    """
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def sow_residual_ratio(
    module: nn.Module,
    residual: Features,
    x: Features,
    mask: PositionMask | None = None,
    axis_name: str | None = None,
) -> None:
    """Sows ‖residual‖ / ‖x‖ of a residual block as the intermediate "residual_ratio".

    `describe` and training logs show it. Nothing is computed unless "intermediates" is mutable, or
    `describe` asks for it.

    Args:
        module: The block, usually `self`.
        residual: (B, *positions, C), what the block adds to its input.
        x: (B, *positions, C), its input.
        mask: (B, *positions) of bool, False where x is padding.
        axis_name: Mapped axis over whose devices positions are split.
    """
    listener = _listener.get()
    is_sown = module.is_mutable_collection("intermediates")
    if module.is_initializing() or not (is_sown or listener):
        return
    ratio = residual_ratio(residual, x, mask, axis_name)
    if is_sown:
        module.sow("intermediates", RESIDUAL_RATIO, ratio)
    if listener is not None:
        listener(module, ratio)


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
