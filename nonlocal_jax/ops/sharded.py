"""Eq. 1 with positions split over devices: each holds some queries, and as many of the keys and values.

To be called under `jax.shard_map` (with `check_vma=False`: loops begin with constants) or `jax.pmap`, with the name of the
mapped axis. What crosses between devices:

| operation | what crosses | memory of each device |
|---|---|---|
| the two Gaussians | keys and values, once | M·(d + e) |
| where that would be large: a ring | keys and values, part by part; then their gradients too | 2 M/P·(d + e) |
| the dot product | Σ_j φ_j g_jᵀ, one sum of d×e | d·e |
| the concatenation | b_j = w_φ·φ_j and values, once | M·(1 + e) |

The ring (Liu, Zaharia, Abbeel, 2023) combines the responses y_p and log-sum-exps λ_p of the P parts,

    λ = log Σ_p exp(λ_p)        y = Σ_p exp(λ_p − λ) y_p

and its gradient sends each part of the keys around again, with what it has gathered of φ̄ and ḡ.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nonlocal_jax.ops import softmax
from nonlocal_jax.ops.definition import widen
from nonlocal_jax.types import Array, KeyMask, Keys, Queries, Responses, Values

GATHERED_BYTES = (
    1 << 28
)  # of the keys and values of all devices, beyond which they go around instead


def gather(axis_name: str, key_mask: Array | None, *rows: Array) -> tuple[Any, ...]:
    """The mask (..., M) and the rows (..., M, c) of all devices, in their order."""
    mask = (
        None
        if key_mask is None
        else lax.all_gather(key_mask, axis_name, axis=key_mask.ndim - 1, tiled=True)
    )
    return mask, *(lax.all_gather(x, axis_name, axis=x.ndim - 2, tiled=True) for x in rows)


def takes_ring(phi: Keys, g: Values, axis_name: str) -> bool:
    """Whether keys and values go around instead of being gathered."""
    return bool(lax.axis_size(axis_name) * (phi.nbytes + g.nbytes) > GATHERED_BYTES)


def ring(
    theta: Queries,
    phi: Keys,
    g: Values,
    scale: float | Array,
    key_mask: KeyMask | None,
    axis_name: str,
) -> Responses:
    """Softmax over the keys of all devices, of which each holds one part at a time.

    Args:
        theta: (..., N, d), this device's.
        phi: (..., M, d), this device's.
        g: (..., M, e), this device's, 0 where a key is masked.
        scale: multiplies the logits.
        key_mask: (..., M) of bool, this device's.
        axis_name: of the mapped axis.

    Returns:
        (..., N, e), float32 or wider.
    """
    batch = theta.shape[:-2]
    theta, phi, g = (widen(x).reshape(-1, *x.shape[-2:]) for x in (theta, phi, g))
    mask = (
        jnp.ones(phi.shape[:-1], bool)
        if key_mask is None
        else key_mask.reshape(-1, key_mask.shape[-1])
    )
    y = _ring(axis_name, theta, phi, g, jnp.asarray(scale, theta.dtype), mask)
    return y.reshape(*batch, *y.shape[1:])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(axis_name: str, theta: Array, phi: Array, g: Array, scale: Array, mask: Array) -> Array:
    return _forward(axis_name, theta, phi, g, scale, mask)[0]


def _forward(
    axis_name: str, theta: Array, phi: Array, g: Array, scale: Array, mask: Array
) -> tuple[Array, tuple[Array, ...]]:
    def of_part(part: Any) -> tuple[Array, Array]:
        phi, g, mask = part
        y, lse = softmax.in_tiles(theta, phi, g, scale, mask)
        return y, jnp.where(mask.any(axis=-1, keepdims=True), lse, -jnp.inf)

    def add(_: Any, state: Any) -> Any:
        part, y, lse = state
        part = _pass_on(part, axis_name)
        more, lse_of_part = of_part(part)
        total = jnp.logaddexp(lse, lse_of_part)
        weights = (
            jnp.exp(x - jnp.where(jnp.isneginf(total), 0, total))[..., None]
            for x in (lse, lse_of_part)
        )
        y = sum(weight * x for weight, x in zip(weights, (y, more), strict=True))
        return part, y, total

    part = (phi, g, mask)
    _, y, lse = lax.fori_loop(1, lax.axis_size(axis_name), add, (part, *of_part(part)))
    return y, (theta, phi, g, scale, mask, y, jnp.where(jnp.isneginf(lse), 0, lse))


def _backward(axis_name: str, residuals: tuple[Array, ...], dy: Array) -> tuple[Array | None, ...]:
    theta, phi, g, scale, mask, y, lse = residuals
    mean = jnp.sum(dy * y, axis=-1)

    def add(_: Any, state: Any) -> Any:
        (phi, g, mask, dphi, dg), dtheta = state
        of_part = softmax.differentiate(theta, phi, g, scale, mask, dy, mean, lse)
        dtheta, dphi, dg = (
            total + more for total, more in zip((dtheta, dphi, dg), of_part, strict=True)
        )
        return _pass_on(
            (phi, g, mask, dphi, dg), axis_name
        ), dtheta  # after the last part, all are home again

    part = (phi, g, mask, jnp.zeros_like(phi), jnp.zeros_like(g))
    (_, _, _, dphi, dg), dtheta = lax.fori_loop(
        0, lax.axis_size(axis_name), add, (part, jnp.zeros_like(theta))
    )
    return scale * dtheta, scale * dphi, dg, jnp.sum(dtheta * theta), None


_ring.defvjp(_forward, _backward)


def _pass_on(part: Any, axis_name: str) -> Any:
    """Each device's part to the next one."""
    size = lax.axis_size(axis_name)
    return jax.tree.map(
        lambda x: lax.ppermute(x, axis_name, [(i, (i + 1) % size) for i in range(size)]), part
    )
