"""The softmax of `kernels/streaming.py` on accelerators: whole rows of the affinity of all samples.

A part of the queries at a time, so that few rows are in memory. There is no loop over samples,
because the batch may be split over devices: each would compute all samples (XLA cannot split such a
loop). With the keys whole, a row needs no running maximum, and XLA:TPU fuses the exponential into
the products on both sides.
"""

import itertools
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from nonlocal_jax.ops.definition import widen
from nonlocal_jax.ops.products import product
from nonlocal_jax.types import Array

# Columns of ones in a product that sums rows. XLA turns a product with one column into a reduction.
ONES = 8


class Rows(NamedTuple):
    """Computes a softmax over the keys for a part of the queries at a time.

    Attributes:
        numbers: Largest number of entries of one sample that are computed at once.
        sums_by_product: Whether the sums over keys are products with ones. On a TPU v5e that takes
            0.02 ms instead of 0.24 of a forward pass of 0.38 (8 samples of 3136 × 784): the
            exponential is fused into the product.
        least: Number of queries that are computed at once however many keys there are.
        alignment: Number of which the queries that are computed at once are a multiple.
        leaves_small: Whether an affinity for which parts save no memory is left to the definition.
    """

    numbers: int
    sums_by_product: bool = False
    least: int = 128
    alignment: int = 16
    leaves_small: bool = False

    def leaves_to_definition(self, n: int, m: int, channels: int) -> bool:
        """Whether the definition computes an affinity of n queries and m keys.

        It does where the affinity is at most two parts, or small beside the operands: the sums of
        gradients over parts, in float32, would then take more memory than the affinity.

        Args:
            n: Number of queries of a sample.
            m: Number of keys of a sample.
            channels: Channels of a key and of a value together.

        >>> rows = Rows(numbers=1 << 19, leaves_small=True)
        >>> rows.leaves_to_definition(784, 196, 1024), rows.leaves_to_definition(3136, 784, 512)
        (True, False)
        """
        if not self.leaves_small:
            return False
        small = max(2 * self.numbers, (n + m) * channels // 2)
        return n * m <= small or self.queries_at_once(n, m) == n

    def stores_affinity(self, affinity_bytes: int) -> bool:
        """The affinity is never stored: reading it costs more than computing it again."""
        return False

    def tile_bytes(self, batch: int, n: int, m: int, item_bytes: int) -> int:
        """Returns the bytes of the entries that are computed at once."""
        return batch * self.queries_at_once(n, m) * m * item_bytes

    def queries_at_once(self, n: int, m: int) -> int:
        """Returns how many of n queries are computed at once.

        It is a divisor of n if possible, and a multiple of 128, which fills the lanes of a TPU and
        the tiles of a GPU's products, or else of `alignment`.

        >>> Rows(numbers=7 << 19).queries_at_once(12544, 12544)
        256
        """
        most = max(self.numbers // m, self.least)
        if n <= most:
            return n
        fewest = -(-n // most)
        for multiple, parts in itertools.product((128, self.alignment), range(fewest, 2 * fewest)):
            if n % (multiple * parts) == 0:
                return n // parts
        return -(-n // (self.alignment * fewest)) * self.alignment

    def respond(
        self, theta: Array, phi: Array, g: Array, scale: Array, mask: Array | None, dtype: Any
    ) -> tuple[Array, Array]:
        """Returns the responses (B, N, e) and λ (B, N); both are 0 for a query without keys."""
        respond = partial(self._respond, phi=phi, g=g, scale=scale, mask=mask, dtype=dtype)
        n = theta.shape[1]
        part = self.queries_at_once(n, phi.shape[1])
        if part == n:
            return respond(theta)
        theta = _pad_queries(theta, part)
        y = jnp.zeros((*theta.shape[:2], g.shape[-1]), dtype)
        lse = jnp.zeros(theta.shape[:2], jnp.promote_types(theta.dtype, jnp.float32))

        def add_part(i: Array, results: tuple[Array, Array]) -> tuple[Array, Array]:
            parts = respond(_part(theta, i, part))
            y, lse = (_set_part(*pair, i * part) for pair in zip(results, parts, strict=True))
            return y, lse

        y, lse = lax.fori_loop(0, theta.shape[1] // part, add_part, (y, lse))
        return y[:, :n], lse[:, :n]

    def differentiate(
        self,
        theta: Array,
        phi: Array,
        g: Array,
        scale: Array,
        mask: Array | None,
        dy: Array,
        mean: Array,
        lse: Array,
    ) -> tuple[Array, Array, Array]:
        """Returns θ̄ / scale, φ̄ / scale and ḡ, given ȳ, the means Σ_j p_ij ȳ_i·g_j and λ."""
        differentiate = partial(_differentiate, phi=phi, g=g, scale=scale, mask=mask)
        n = theta.shape[1]
        part = self.queries_at_once(n, phi.shape[1])
        if part == n:
            return differentiate(theta, dy, mean, lse)
        # Queries of zeros, with a ȳ of zeros, add nothing to the gradients.
        queries = [_pad_queries(x, part) for x in (theta, dy, mean, lse)]

        def add_part(i: Array, gradients: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dtheta, dphi, dg = gradients
            part_dtheta, part_dphi, part_dg = differentiate(*(_part(x, i, part) for x in queries))
            return _set_part(dtheta, part_dtheta, i * part), dphi + part_dphi, dg + part_dg

        dtype = jnp.promote_types(theta.dtype, jnp.float32)
        zeros = (jnp.zeros(x.shape, dtype) for x in (queries[0], phi, g))
        steps = queries[0].shape[1] // part
        dtheta, dphi, dg = lax.fori_loop(0, steps, add_part, tuple(zeros))
        return dtheta[:, :n], dphi, dg

    def _respond(
        self,
        theta: Array,
        phi: Array,
        g: Array,
        scale: Array,
        mask: Array | None,
        dtype: Any,
    ) -> tuple[Array, Array]:
        logits = scale * product("bnd,bmd->bnm", theta, phi)
        if mask is not None:
            logits = jnp.where(mask[:, None], logits, -jnp.inf)
        largest = jnp.max(logits, axis=-1, keepdims=True)
        largest = jnp.where(jnp.isneginf(largest), 0, largest)  # a query without keys
        f = jnp.exp(logits - largest).astype(g.dtype)
        if self.sums_by_product:
            ones = jnp.ones((g.shape[1], ONES), g.dtype)
            total = product("bnm,mo->bno", f, ones)[..., :1]
        else:
            total = jnp.sum(f, axis=-1, keepdims=True, dtype=logits.dtype)
        total = jnp.where(total == 0, 1, total)
        y = product("bnm,bme->bne", f, g) / total
        return y.astype(dtype), (largest + jnp.log(total))[..., 0]


def _differentiate(
    theta: Array,
    dy: Array,
    mean: Array,
    lse: Array,
    phi: Array,
    g: Array,
    scale: Array,
    mask: Array | None,
) -> tuple[Array, Array, Array]:
    """Returns θ̄ / scale of some queries, and what they add to φ̄ / scale and ḡ."""
    p = jnp.exp(scale * product("bnd,bmd->bnm", theta, phi) - lse[..., None])
    if mask is not None:
        p = jnp.where(mask[:, None], p, 0)
    s = p * (product("bne,bme->bnm", dy, g) - mean[..., None])
    # θ̄ sums terms of both signs that nearly cancel, so their factors stay wide.
    dtheta = jnp.einsum("bnm,bmd->bnd", s, widen(phi))
    p, s = p.astype(g.dtype), s.astype(theta.dtype)
    return (
        dtheta,
        product("bnm,bnd->bmd", s, theta),
        product("bnm,bne->bme", p, dy),
    )


def _part(x: Array, i: Array, size: int) -> Array:
    return lax.dynamic_slice_in_dim(x, i * size, size, axis=1)


def _set_part(x: Array, part: Array, start: Array) -> Array:
    return lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), start, axis=1)


def _pad_queries(x: Array, multiple: int) -> Array:
    """Appends queries of zeros up to a multiple."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % multiple)] + [(0, 0)] * (x.ndim - 2))
