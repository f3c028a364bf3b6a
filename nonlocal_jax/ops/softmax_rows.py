"""The softmax of `kernels/streaming.py` on accelerators: whole rows of the affinity of all samples.

A part of the queries at a time, so that few rows are in memory. There is no loop over samples,
because the batch may be split over devices: each would compute all samples (XLA cannot split such a
loop). With the keys whole, a row needs no running maximum, and XLA:TPU fuses the exponential into
the products on both sides. The gradient needs no maximum, since it is given λ, so it can take parts
of the keys instead.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nonlocal_jax.ops.definition import widen
from nonlocal_jax.ops.products import product
from nonlocal_jax.types import Array

# Columns of ones in a product that sums rows. XLA turns a product with one column into a reduction.
ONES = 8
Queries = tuple[Array, Array, Array, Array]  # θ, ȳ, the means of ȳ·g, λ
Keys = tuple[Array, Array, Array | None]  # φ, g, mask
# Results of parts, and sums over parts.
Parts = tuple[tuple[Array, ...], tuple[Array, ...]]


class Rows(NamedTuple):
    """Computes a softmax over the keys for a part of the queries at a time.

    Attributes:
        numbers: Largest number of entries of one sample that are computed at once.
        sums_by_product: Whether the sums over keys are products with ones. On a TPU v5e that takes
            0.02 ms instead of 0.24 of a forward pass of 0.38 (8 samples of 3136 × 784): the
            exponential is fused into the product.
        least: Number of queries that are computed at once however many keys there are.
        gradient_least: The same for the gradients, of queries or keys. Default: `least`.
        alignment: Number of which the queries that are computed at once are a multiple. A float32
            tile of a TPU has 8 rows; tensor cores read 16 bytes, 8 numbers in half precision.
        leaves_small: Whether an affinity for which parts save no memory is left to the definition.
    """

    numbers: int
    sums_by_product: bool = False
    least: int = 128
    gradient_least: int | None = None
    alignment: int = 8
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

    def tile_bytes(self, batch: int, n: int, m: int, channels: int, item_bytes: int) -> int:
        """Returns the bytes of the entries that are computed at once."""
        return batch * self.queries_at_once(n, m) * m * item_bytes

    def queries_at_once(self, n: int, m: int) -> int:
        """Returns how many of n queries are computed at once with m keys, or the reverse.

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

        def for_queries(queries: tuple[Array]) -> Parts:
            return self._respond(*queries, phi, g, scale, mask, dtype), ()

        part = self.queries_at_once(theta.shape[1], phi.shape[1])
        (y, lse), _ = _by_parts(for_queries, (theta,), part)
        return y, lse

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
        """Returns θ̄ / scale, φ̄ / scale and ḡ, given ȳ, the means Σ_j p_ij ȳ_i·g_j and λ.

        Takes a part of the keys at a time, or of the queries if there are more queries than keys.
        Parts of the keys add to one array in float32, θ̄, and parts of the queries to φ̄ and ḡ.
        """
        n, m = theta.shape[1], phi.shape[1]
        rows = self._replace(least=self.gradient_least or self.least)
        part = rows.queries_at_once(max(n, m), min(n, m))
        queries = theta, dy, mean, lse
        if n > m:

            def for_queries(queries: Queries) -> Parts:
                dtheta, dphi, dg = _differentiate(queries, (phi, g, mask), scale)
                return (dtheta,), (dphi, dg)

            # Queries of zeros, with a ȳ of zeros, add nothing to the gradients.
            (dtheta,), (dphi, dg) = _by_parts(for_queries, queries, part)
            return dtheta, dphi, dg

        def for_keys(keys: Keys) -> Parts:
            dtheta, dphi, dg = _differentiate(queries, keys, scale)
            return (dphi, dg), (dtheta,)

        if mask is None and m % part:  # exp(−λ_i), the weight of a padded key, may overflow
            mask = jnp.ones(phi.shape[:2], bool)
        (dphi, dg), (dtheta,) = _by_parts(for_keys, (phi, g, mask), part)
        return dtheta, dphi, dg

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


def _differentiate(queries: Queries, keys: Keys, scale: Array) -> tuple[Array, Array, Array]:
    """Returns what the pairs of some queries and keys add to θ̄ / scale, φ̄ / scale and ḡ."""
    (theta, dy, mean, lse), (phi, g, mask) = queries, keys
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


def _by_parts(function: Callable[[Any], Parts], arrays: Any, size: int) -> Parts:
    """Calls a function with parts of arrays along axis 1, the last one padded with zeros.

    Args:
        function: Returns results for the positions of a part, and terms of sums over all parts.
        arrays: Tuple of arrays (B, N, ...), and perhaps None at its end.
        size: Number of positions in a part.

    Returns:
        The results for all positions, and the sums.
    """
    n = arrays[0].shape[1]
    if size >= n:
        return function(arrays)
    steps = -(-n // size)
    arrays = jax.tree.map(lambda x: _pad(x, steps * size - n), arrays)

    def compute(i: Array | int) -> Parts:
        return function(
            jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, i * size, size, axis=1), arrays)
        )

    def add_part(i: Array, state: Parts) -> Parts:
        (results, sums), (part, terms) = state, compute(i)
        results = jax.tree.map(
            lambda x, new: lax.dynamic_update_slice_in_dim(x, new, i * size, axis=1), results, part
        )
        return results, jax.tree.map(jnp.add, sums, terms)

    results, sums = jax.eval_shape(compute, 0)
    whole = tuple(jnp.zeros((x.shape[0], steps * size, *x.shape[2:]), x.dtype) for x in results)
    state = whole, tuple(jnp.zeros(x.shape, x.dtype) for x in sums)
    results, sums = lax.fori_loop(0, steps, add_part, state)
    return tuple(x[:, :n] for x in results), sums


def _pad(x: Array, positions: int) -> Array:
    return jnp.pad(x, [(0, 0), (0, positions)] + [(0, 0)] * (x.ndim - 2))
