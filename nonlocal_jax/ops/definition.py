"""Eq. 1 as the paper writes it: y_i = 1/C(x) Σ_j f(x_i, x_j) g(x_j).

This module is the oracle. It builds the whole N×M affinity f/C, and every faster implementation
must equal it in values and gradients. Logits and sums are float32 when the inputs are bfloat16 or
float16. A key that `key_mask` excludes is in neither the sum nor C(x). A query without any key has
the response 0. On accelerators, the precision of float32 products is JAX's own setting,
`jax_default_matmul_precision`; the tests set it to "highest".

Wang, Girshick, Gupta, He: Non-local Neural Networks, CVPR 2018, section 3. θ_i is
`theta[..., i, :]` and φ_j is `phi[..., j, :]`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from nonlocal_jax.types import (
    Affinity,
    AffinityToAll,
    Array,
    ConcatenationWeights,
    Instantiation,
    KeyMask,
    Keys,
    Queries,
    Responses,
    Values,
)


def respond(affinity: Affinity | AffinityToAll, g: Values) -> Responses:
    """Eq. 1: y_i = Σ_j (f/C)_ij g_j."""
    return jnp.einsum("...nm,...me->...ne", affinity, widen(g)).astype(g.dtype)


def affinity(
    instantiation: Instantiation,
    theta: Queries,
    phi: Keys,
    key_mask: KeyMask | None,
    scale: float | Array,
    w_f: ConcatenationWeights | None,
) -> Affinity | AffinityToAll:
    """Computes f/C of any of the four pairwise functions."""
    match instantiation:
        case "gaussian":
            return gaussian(theta, phi, key_mask)
        case "embedded_gaussian":
            return embedded_gaussian(theta, phi, scale, key_mask)
        case "dot_product":
            return dot_product(theta, phi, key_mask)
        case "concatenation":
            assert w_f is not None
            return concatenation(theta, phi, w_f, key_mask)


def gaussian(x: Queries, keys: Keys, key_mask: KeyMask | None) -> Affinity:
    """Eq. 2: f = exp(x_i·x_j), C = Σ_j f."""
    return embedded_gaussian(x, keys, 1.0, key_mask)


def embedded_gaussian(
    theta: Queries, phi: Keys, scale: float | Array, key_mask: KeyMask | None
) -> Affinity:
    """Eq. 3: f = exp(scale · θ_i·φ_j), C = Σ_j f, so f/C is a softmax over the keys."""
    logits = scale * jnp.einsum("...nd,...md->...nm", widen(theta), widen(phi))
    if key_mask is not None:
        logits = jnp.where(key_mask[..., None, :], logits, -jnp.inf)
    # f/C stays the same when a constant is subtracted from all logits of a query. With the largest
    # logit as the constant, exp cannot overflow.
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    f = jnp.exp(logits - jnp.where(jnp.isneginf(largest), 0.0, largest))
    c = jnp.sum(f, axis=-1, keepdims=True)
    return f / jnp.where(c == 0.0, 1.0, c)


def dot_product(theta: Queries, phi: Keys, key_mask: KeyMask | None) -> Affinity:
    """Eq. 4: f = θ_i·φ_j, C = N, the number of keys that are summed."""
    f = jnp.einsum("...nd,...md->...nm", widen(theta), widen(phi))
    return _divide_by_key_count(f, key_mask)


def concatenation(
    theta: Queries, phi: Keys, w_f: ConcatenationWeights, key_mask: KeyMask | None
) -> Affinity:
    """Eq. 5: f = ReLU(w_f · [θ_i, φ_j]), C = N. The product splits into a sum, a_i + b_j."""
    return concatenation_of_projections(*project(theta, phi, w_f), key_mask)


def concatenation_of_projections(a: Array, b: Array, key_mask: KeyMask | None) -> Affinity:
    """Eq. 5 from the results of `project`: f = ReLU(a_i + b_j)."""
    f = jax.nn.relu(a[..., :, None] + b[..., None, :])
    return _divide_by_key_count(f, key_mask)


def project(theta: Queries, phi: Keys, w_f: ConcatenationWeights) -> tuple[Array, Array]:
    """Returns the two parts of w_f · [θ_i, φ_j]: a (..., N) and b (..., M)."""
    w_theta, w_phi = jnp.split(widen(w_f), 2)
    a = jnp.einsum("...nd,d->...n", widen(theta), w_theta)
    b = jnp.einsum("...md,d->...m", widen(phi), w_phi)
    return a, b


def _divide_by_key_count(f: Affinity, key_mask: KeyMask | None) -> Affinity:
    if key_mask is None:
        return f / f.shape[-1]
    n = number_of_keys(key_mask, f.dtype)[..., None, None]
    return jnp.where(key_mask[..., None, :], f / n, 0.0)


def number_of_keys(key_mask: KeyMask, dtype: Any) -> Array:
    """Counts the keys that are not masked; 1 if all are masked, so that it can be divided by."""
    return jnp.maximum(jnp.sum(key_mask, axis=-1, dtype=dtype), 1)


def widen(x: Array) -> Array:
    """Converts half precision to float32; float32 and float64 stay as they are."""
    return x.astype(wide_dtype(x.dtype))


def wide_dtype(dtype: Any) -> jnp.dtype:
    """Returns float32 for integers and half precision, and any other dtype as it is.

    Unlike `jnp.promote_types`, it does not depend on JAX's promotion rules, which may be strict.
    """
    is_wide = jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits >= 32
    return jnp.dtype(dtype) if is_wide else jnp.dtype(jnp.float32)
