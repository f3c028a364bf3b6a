"""Eq. 1 of the paper, as it is written: y_i = 1/C(x) Σ_j f(x_i, x_j) g(x_j).

This is the oracle. It builds the whole N×M affinity f/C, and every faster implementation must equal it, values and
gradients. Sums and logits are float32 when the inputs are bfloat16 or float16. A key that `key_mask` leaves out
is in neither the sum nor C(x); a query with no key at all has the response 0. On accelerators, how exact the products of
float32 are is JAX's own setting, `jax_default_matmul_precision`; the tests ask for "highest".

Wang, Girshick, Gupta, He: Non-local Neural Networks, CVPR 2018, section 3. θ_i is `theta[..., i, :]`, φ_j is `phi[..., j, :]`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from nonlocal_jax.types import (
    Affinity,
    Array,
    ConcatenationWeights,
    KeyMask,
    Keys,
    Queries,
    Responses,
    Values,
)


def respond(affinity: Affinity, g: Values) -> Responses:
    """Eq. 1: y_i = Σ_j (f/C)_ij g_j."""
    return jnp.einsum("...nm,...me->...ne", affinity, widen(g)).astype(g.dtype)


def gaussian(x: Queries, keys: Keys, key_mask: KeyMask | None) -> Affinity:
    """Eq. 2: f = exp(x_i·x_j), C = Σ_j f."""
    return embedded_gaussian(x, keys, 1.0, key_mask)


def embedded_gaussian(
    theta: Queries, phi: Keys, scale: float | Array, key_mask: KeyMask | None
) -> Affinity:
    """Eq. 3: f = exp(scale · θ_i·φ_j), C = Σ_j f; so f/C is a softmax over the keys."""
    logits = scale * jnp.einsum("...nd,...md->...nm", widen(theta), widen(phi))
    if key_mask is not None:
        logits = jnp.where(key_mask[..., None, :], logits, -jnp.inf)
    # f/C does not change when one number is taken from all logits of a query; with the largest, exp cannot overflow.
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    f = jnp.exp(logits - jnp.where(jnp.isneginf(largest), 0.0, largest))
    c = jnp.sum(f, axis=-1, keepdims=True)
    return f / jnp.where(c == 0.0, 1.0, c)


def dot_product(theta: Queries, phi: Keys, key_mask: KeyMask | None) -> Affinity:
    """Eq. 4: f = θ_i·φ_j, C = N, the number of keys that are summed."""
    f = jnp.einsum("...nd,...md->...nm", widen(theta), widen(phi))
    return _over_number_of_keys(f, key_mask)


def concatenation(
    theta: Queries, phi: Keys, w_f: ConcatenationWeights, key_mask: KeyMask | None
) -> Affinity:
    """Eq. 5: f = ReLU(w_f · [θ_i, φ_j]), C = N. The product splits: w_f · [θ_i, φ_j] = a_i + b_j."""
    a, b = project(theta, phi, w_f)
    f = jax.nn.relu(a[..., :, None] + b[..., None, :])
    return _over_number_of_keys(f, key_mask)


def project(theta: Queries, phi: Keys, w_f: ConcatenationWeights) -> tuple[Array, Array]:
    """The two halves of w_f · [θ_i, φ_j]: a (..., N) and b (..., M)."""
    w_theta, w_phi = jnp.split(widen(w_f), 2)
    return jnp.einsum("...nd,d->...n", widen(theta), w_theta), jnp.einsum(
        "...md,d->...m", widen(phi), w_phi
    )


def _over_number_of_keys(f: Affinity, key_mask: KeyMask | None) -> Affinity:
    if key_mask is None:
        return f / f.shape[-1]
    n = number_of_keys(key_mask, f.dtype)[..., None, None]
    return jnp.where(key_mask[..., None, :], f / n, 0.0)


def number_of_keys(key_mask: KeyMask, dtype: Any) -> Array:
    """How many keys are real; 1 where none is, to divide by."""
    return jnp.maximum(jnp.sum(key_mask, axis=-1, dtype=dtype), 1)


def widen(x: Array) -> Array:
    """Half precision becomes float32; float32 and float64 stay."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
