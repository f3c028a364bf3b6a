"""Eq. 1 with positions split over devices, each of which has some queries, keys and values.

The functions run under `jax.shard_map` (with `check_vma=False`, because loops start from constants)
or `jax.pmap`, and take the name of the mapped axis. The communication between devices:

| operation | what is communicated | memory of each device |
|---|---|---|
| the two Gaussians | keys and values, once | M·(d + e) |
| the same in a ring | keys and values; again with φ̄ and ḡ for gradients | 2 M/P·(d + e) |
| the dot product | Σ_j φ_j g_jᵀ, one sum of d×e | d·e |
| the concatenation | b_j = w_φ·φ_j and values, once | M·(1 + e) |

The two Gaussians take the ring where the keys and values of all devices would be large. It (Liu,
Zaharia, Abbeel, 2023) combines the responses y_p and log-sum-exps λ_p of the P parts:

    λ = log Σ_p exp(λ_p)        y = Σ_p exp(λ_p − λ) y_p

Its gradient sends each part of the keys around the ring again, together with the sums of φ̄ and ḡ
so far.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nonlocal_jax.ops.definition import widen
from nonlocal_jax.types import Array, KeyMask, Keys, Queries, Responses, Values

# Above this size of the keys and values of all devices, they go around a ring instead of being
# gathered.
GATHERED_BYTES = 1 << 28

# (theta, phi, g, scale, mask) -> the responses to one part of the keys and their log-sum-exps.
RespondToPart = Callable[..., tuple[Array, Array]]
# (theta, phi, g, scale, mask, dy, mean, lse) -> the gradients θ̄ / scale, φ̄ / scale and ḡ of that
# part.
DifferentiatePart = Callable[..., tuple[Array, Array, Array]]


def gather(axis_name: str, key_mask: Array | None, *rows: Array) -> tuple[Any, ...]:
    """Returns the mask (..., M) and the rows (..., M, c) of all devices, in the devices' order."""
    mask = None
    if key_mask is not None:
        mask = lax.all_gather(key_mask, axis_name, axis=key_mask.ndim - 1, tiled=True)
    return mask, *(lax.all_gather(x, axis_name, axis=x.ndim - 2, tiled=True) for x in rows)


def takes_ring(phi: Keys, g: Values, axis_name: str, gathered_bytes: int = GATHERED_BYTES) -> bool:
    """Whether the keys and values of all devices are too large to be gathered on each."""
    return bool(lax.axis_size(axis_name) * (phi.nbytes + g.nbytes) > gathered_bytes)


def ring(
    theta: Queries,
    phi: Keys,
    g: Values,
    scale: float | Array,
    key_mask: KeyMask | None,
    axis_name: str,
    respond_to_part: RespondToPart,
    differentiate_part: DifferentiatePart,
) -> Responses:
    """Computes a softmax over the keys of all devices, each device holding one part at a time.

    Args:
        theta: This device's queries (..., N, d).
        phi: This device's keys (..., M, d).
        g: This device's values (..., M, e), 0 where a key is masked.
        scale: Factor of the logits.
        key_mask: This device's mask (..., M) of bool, or None.
        axis_name: Name of the mapped axis.
        respond_to_part: Computes the responses (B, N, e) to one part of the keys, and the
            log-sum-exps (B, N) of their logits.
        differentiate_part: Computes the gradients of one part of the keys.

    Returns:
        (..., N, e), float32 or wider.
    """
    batch = theta.shape[:-2]
    theta, phi, g = (x.reshape(-1, *x.shape[-2:]) for x in (theta, phi, g))
    mask = None if key_mask is None else key_mask.reshape(-1, key_mask.shape[-1])
    scale = jnp.asarray(scale, widen(theta).dtype)
    y = _ring(axis_name, respond_to_part, differentiate_part, theta, phi, g, scale, mask)
    return y.reshape(*batch, *y.shape[1:])


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _ring(
    axis_name: str,
    respond_to_part: RespondToPart,
    differentiate_part: DifferentiatePart,
    theta: Array,
    phi: Array,
    g: Array,
    scale: Array,
    mask: Array | None,
) -> Array:
    y, _ = _forward(axis_name, respond_to_part, differentiate_part, theta, phi, g, scale, mask)
    return y


def _forward(
    axis_name: str,
    respond_to_part: RespondToPart,
    differentiate_part: DifferentiatePart,
    theta: Array,
    phi: Array,
    g: Array,
    scale: Array,
    mask: Array | None,
) -> tuple[Array, tuple[Any, ...]]:
    def respond(part: Any) -> tuple[Array, Array]:
        phi, g, mask = part
        y, lse = respond_to_part(theta, phi, g, scale, mask)
        if mask is None:
            return y, lse
        # A part without keys has weight exp(−∞) = 0.
        return y, jnp.where(mask.any(axis=-1, keepdims=True), lse, -jnp.inf)

    def add_part(_: Any, state: Any) -> Any:
        part, y, lse = state
        part = _send_to_next(part, axis_name)
        part_y, part_lse = respond(part)
        total = jnp.logaddexp(lse, part_lse)
        # Without any key so far, the difference would be −∞ − (−∞), which is NaN.
        finite_total = jnp.where(jnp.isneginf(total), 0, total)
        weight = jnp.exp(lse - finite_total)[..., None]
        part_weight = jnp.exp(part_lse - finite_total)[..., None]
        return part, weight * y + part_weight * part_y, total

    part = (phi, g, mask)
    state = (part, *respond(part))
    _, y, lse = lax.fori_loop(1, lax.axis_size(axis_name), add_part, state)
    return y, (theta, phi, g, scale, mask, y, jnp.where(jnp.isneginf(lse), 0, lse))


def _backward(
    axis_name: str,
    respond_to_part: RespondToPart,
    differentiate_part: DifferentiatePart,
    residuals: tuple[Any, ...],
    dy: Array,
) -> tuple[Array | None, ...]:
    theta, phi, g, scale, mask, y, lse = residuals
    scale = jnp.asarray(scale)  # a NumPy scalar, where it was a constant
    mean = jnp.sum(dy * y, axis=-1)

    def differentiate(part: Any) -> tuple[Array, ...]:
        phi, g, mask = part
        return differentiate_part(theta, phi, g, scale, mask, dy, mean, lse)

    def add_part(_: Any, state: Any) -> Any:
        part, dtheta, *sums = state
        part, sums = _send_to_next((part, sums), axis_name)
        gradients = differentiate(part)
        return part, *jax.tree.map(jnp.add, (dtheta, *sums), gradients)

    part = (phi, g, mask)
    # Keys and values travel in their own dtype, sums of gradients in float32 or wider.
    state = (part, *(gradient.astype(dy.dtype) for gradient in differentiate(part)))
    _, dtheta, *sums = lax.fori_loop(1, lax.axis_size(axis_name), add_part, state)
    # Once more, which returns the sums to the device they belong to.
    dphi, dg = _send_to_next(sums, axis_name)
    dscale = jnp.sum(dtheta * widen(theta))
    dtheta, dphi = scale * dtheta, scale * dphi
    return dtheta.astype(theta.dtype), dphi.astype(phi.dtype), dg.astype(g.dtype), dscale, None


_ring.defvjp(_forward, _backward)


def _send_to_next(part: Any, axis_name: str) -> Any:
    """Sends each device's part to the next device of the ring."""
    devices = lax.axis_size(axis_name)
    steps = [(device, (device + 1) % devices) for device in range(devices)]
    return jax.tree.map(lambda x: lax.ppermute(x, axis_name, steps), part)
