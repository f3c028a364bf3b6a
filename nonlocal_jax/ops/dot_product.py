"""The dot product without its N×M pairs: a product of three matrices may be taken from the right."""

import jax.numpy as jnp

from nonlocal_jax.ops.definition import number_of_keys, widen
from nonlocal_jax.types import KeyMask, Keys, Queries, Responses, Values


def reassociated(theta: Queries, phi: Keys, g: Values, key_mask: KeyMask | None) -> Responses:
    """1/n Σ_j (θ_i·φ_j) g_j = θ_i (1/n Σ_j φ_j g_jᵀ): (N + M)·d·e multiply-adds instead of N·M·(d + e).

    Args:
        theta: (..., N, d).
        phi: (..., M, d), 0 where a key is masked.
        g: (..., M, e), 0 where a key is masked.
        key_mask: (..., M) of bool, of which n are True.

    Returns:
        (..., N, e), float32 or wider.
    """
    pairs = jnp.einsum("...md,...me->...de", widen(phi), widen(g))
    n = phi.shape[-2] if key_mask is None else number_of_keys(key_mask, pairs.dtype)[..., None, None]
    return jnp.einsum("...nd,...de->...ne", widen(theta), pairs / n)
