"""The dot product without its N×M pairs: a product of three matrices may be taken from the right."""

import jax
import jax.numpy as jnp

from nonlocal_jax.ops.definition import widen
from nonlocal_jax.types import KeyMask, Keys, Queries, Responses, Values


def reassociated(
    theta: Queries, phi: Keys, g: Values, key_mask: KeyMask | None, axis_name: str | None = None
) -> Responses:
    """1/n Σ_j (θ_i·φ_j) g_j = θ_i (1/n Σ_j φ_j g_jᵀ): (N + M)·d·e multiply-adds instead of N·M·(d + e).

    Args:
        theta: (..., N, d).
        phi: (..., M, d), 0 where a key is masked.
        g: (..., M, e), 0 where a key is masked.
        key_mask: (..., M) of bool, of which n are True.
        axis_name: the mapped axis over whose devices the positions are split.

    Returns:
        (..., N, e), float32 or wider.
    """
    pairs = jnp.einsum("...md,...me->...de", widen(phi), widen(g))
    n = jnp.asarray(phi.shape[-2], pairs.dtype)
    if key_mask is not None:
        n = jnp.sum(key_mask, axis=-1, dtype=pairs.dtype)[..., None, None]
    if axis_name is not None:
        pairs, n = jax.lax.psum((pairs, n), axis_name)
    return jnp.einsum("...nd,...de->...ne", widen(theta), pairs / jnp.maximum(n, 1))
