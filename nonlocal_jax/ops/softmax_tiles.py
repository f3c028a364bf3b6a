"""The softmax of `kernels/streaming.py` on CPU: in tiles, a few samples at a time.

A query keeps the running maximum m_i of its logits, the sum l_i of exp(logit − m_i), and the sum
o_i of exp(logit − m_i) g_j. A new tile of keys rescales l and o by exp(old m − new m), and at the
end y_i = o_i / l_i.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
from jax import lax

from nonlocal_jax.ops.batching import map_samples
from nonlocal_jax.ops.definition import widen
from nonlocal_jax.types import Array

T = TypeVar("T")
Index = Array | int
Sums = tuple[Array, Array, Array]  # m, l and o of the queries of a tile
Gradients = tuple[Array, Array, Array]  # θ̄ / scale, φ̄ / scale and ḡ, or those of a tile


class Tiling(NamedTuple):
    """How an affinity is computed: `samples` at once, in tiles of `rows` × `columns`."""

    samples: int
    rows: int
    columns: int


class Tiles(NamedTuple):
    """Cuts the affinity into tiles.

    The rows of a tile are queries in the response, and keys in the gradient, whose products then
    read the tile as it lies in memory. With few channels, exponentials take most of the time, and
    they are faster while the tile fits the cache of a core. If a key and its value together have
    fewer than 256 channels, tiles therefore have at most 512 columns; with fewer than 128, they
    have at most 256, and half as many rows.

    Attributes:
        rows: Largest number of rows of a tile.
        columns: Largest number of columns. Long, narrow tiles are faster than square ones.
        numbers: Largest number of entries in the tiles of all samples that are computed at once.
        stored_bytes: Largest affinity that is stored for the gradient instead of recomputed.
    """

    rows: int = 2304
    columns: int = 800
    numbers: int = 1 << 18
    stored_bytes: int = 16 << 20

    def leaves_to_definition(self, n: int, m: int, channels: int) -> bool:
        """The tiles compute every affinity: on CPU they are faster than the definition."""
        return False

    def stores_affinity(self, affinity_bytes: int) -> bool:
        """Whether the gradient stores the affinity; recomputing it costs about 10% more time."""
        return affinity_bytes <= self.stored_bytes

    def tile_bytes(self, batch: int, n: int, m: int, channels: int, item_bytes: int) -> int:
        """Returns the bytes of the tiles that are computed at once."""
        samples, rows, columns = tiling(batch, n, m, channels, self)
        return samples * rows * columns * item_bytes

    def respond(
        self, theta: Array, phi: Array, g: Array, scale: Array, mask: Array | None, dtype: Any
    ) -> tuple[Array, Array]:
        """Returns the responses (B, N, e) and λ (B, N); both are 0 for a query without keys."""
        theta, phi, g = map(widen, (theta, phi, g))
        (batch, n, d), (m, e) = theta.shape, g.shape[1:]
        tiles = tiling(batch, n, m, d + e, self)
        function = partial(_respond_sample, scale=scale, tiles=tiles)
        y, lse = map_samples(function, tiles.samples, theta, phi, g, mask)
        return y.astype(dtype), lse

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
    ) -> Gradients:
        """Returns θ̄ / scale, φ̄ / scale and ḡ, given ȳ, the means Σ_j p_ij ȳ_i·g_j and λ."""
        theta, phi, g, dy = map(widen, (theta, phi, g, dy))
        (batch, n, d), (m, e) = theta.shape, g.shape[1:]
        tiles = tiling(batch, m, n, d + e, self)
        function = partial(_differentiate_sample, scale=scale, tiles=tiles)
        return map_samples(function, tiles.samples, theta, phi, g, mask, dy, mean, lse)


def respond_and_store(
    theta: Array, phi: Array, g: Array, scale: Array, mask: Array | None
) -> tuple[Array, Array, Array]:
    """Returns the responses (B, N, e), and exp(logit − m) and l for `differentiate_stored`."""
    theta, phi, g = map(widen, (theta, phi, g))
    return map_samples(partial(_respond_and_store, scale=scale), 1, theta, phi, g, mask)


def differentiate_stored(
    theta: Array, phi: Array, g: Array, dy: Array, mean: Array, f: Array, total: Array
) -> Gradients:
    """Returns what `Tiles.differentiate` does, from the stored affinity."""
    theta, phi, g, dy = map(widen, (theta, phi, g, dy))
    return map_samples(_differentiate_stored, 1, theta, phi, g, dy, mean, f, total)


def tiling(batch: Any, n: int, m: int, channels: int, form: Tiles) -> Tiling:
    """Returns tiles of nearly equal size, so that little is padded.

    Args:
        batch: Number of samples.
        n: Number of rows of the affinity.
        m: Number of its columns.
        channels: Channels of a key and a value together.
        form: The limits.

    >>> tiling(8, 12544, 3136, 512, Tiles()), tiling(8, 784, 196, 64, Tiles())
    (Tiling(samples=1, rows=1792, columns=784), Tiling(samples=1, rows=784, columns=196))
    """
    max_rows, max_columns = form.rows, form.columns
    if channels < 128:
        max_rows, max_columns = max_rows // 2, min(max_columns, 256)
    elif channels < 256:
        max_columns = min(max_columns, 512)
    rows, columns = _tile_size(n, max_rows), _tile_size(m, max_columns)
    if not isinstance(batch, int):  # a symbolic one, which `map_samples` does not loop over
        return Tiling(1, rows, columns)
    max_samples = max(form.numbers // (rows * columns), 1)
    # An equal number of samples in each step, so that no step of the loop is a shorter one.
    divisors = [size for size in range(1, min(batch, max_samples) + 1) if batch % size == 0]
    return Tiling(max(divisors, default=1), rows, columns)


def _tile_size(size: int, max_size: int) -> int:
    """Divides `size` rows into equal tiles of at most `max_size` rows, without padding if possible.

    If there are several tiles, their size is a multiple of 8.
    """
    min_tiles = -(-size // max_size)
    if min_tiles == 1:
        return size
    for tiles in range(min_tiles, 2 * min_tiles):
        if size % (8 * tiles) == 0:
            return size // tiles
    return -(-size // (min_tiles * 8)) * 8


def _respond_sample(
    theta: Array, phi: Array, g: Array, mask: Array | None, scale: Array, tiles: Tiling
) -> tuple[Array, Array]:
    """Returns the response (N, e) and λ (N,) of one sample."""
    n = theta.shape[0]
    theta = _pad_rows(theta, tiles.rows)
    phi, g, mask = _pad_keys(phi, g, mask, tiles.columns)
    phi = _with_bias(phi, mask)

    def respond_tile(i: Index, results: tuple[Array, Array]) -> tuple[Array, Array]:
        queries = _with_ones(scale * _rows(theta, i, tiles.rows), mask)

        def add_keys(j: Index, sums: Sums) -> Sums:
            max_logit, total, weighted = sums
            keys, values = _rows_of_all((phi, g), j, tiles.columns)
            logits = queries @ keys.T
            new_max = jnp.maximum(max_logit, jnp.max(logits, axis=-1))
            f = jnp.exp(logits - _finite(new_max)[:, None])
            # The sums so far are relative to the old maximum; exp(−∞) = 0 before the first key.
            rescale = jnp.exp(max_logit - _finite(new_max))
            weighted = weighted * rescale[:, None] + f @ values
            return new_max, total * rescale + jnp.sum(f, axis=-1), weighted

        zeros = jnp.zeros(tiles.rows, theta.dtype)
        sums = (zeros - jnp.inf, zeros, jnp.zeros((tiles.rows, g.shape[1]), g.dtype))
        max_logit, total, weighted = _loop(phi.shape[0] // tiles.columns, add_keys, sums)
        total = jnp.where(total == 0, 1, total)  # a query without keys has the response 0 / 1
        y, lse = results
        y = _set_rows(y, weighted / total[:, None], i * tiles.rows)
        lse = _set_rows(lse, _finite(max_logit) + jnp.log(total), i * tiles.rows)
        return y, lse

    y = jnp.zeros((theta.shape[0], g.shape[1]), g.dtype)
    lse = jnp.zeros(theta.shape[0], theta.dtype)
    y, lse = _loop(theta.shape[0] // tiles.rows, respond_tile, (y, lse))
    return y[:n], lse[:n]


def _differentiate_sample(
    theta: Array,
    phi: Array,
    g: Array,
    mask: Array | None,
    dy: Array,
    mean: Array,
    lse: Array,
    scale: Array,
    tiles: Tiling,
) -> Gradients:
    """Returns θ̄ / scale, φ̄ / scale and ḡ of one sample.

    Tiles are (keys, queries) and θ̄ is summed as (d, N), so that no product has a transposed tile as
    its left factor. With few channels, XLA:CPU takes up to six times as long for those.
    """
    n, m = theta.shape[0], phi.shape[0]
    theta, dy, lse, mean = (_pad_rows(x, tiles.columns) for x in (theta, dy, lse, mean))
    phi, g, mask = _pad_keys(phi, g, mask, tiles.rows)

    def differentiate_tile(j: Index, gradients: Gradients) -> Gradients:
        dtheta, dphi, dg = gradients
        keys, values, real = _rows_of_all((phi, g, mask), j, tiles.rows)
        keys_t = keys.T

        def add_queries(i: Index, gradients: Gradients) -> Gradients:
            dtheta, dkeys, dvalues = gradients
            queries, dy_rows, lse_rows, mean_rows = _rows_of_all(
                (theta, dy, lse, mean), i, tiles.columns
            )
            p = jnp.exp(scale * (keys @ queries.T) - lse_rows[None])
            if real is not None:
                p = jnp.where(real[:, None], p, 0)
            s = p * (values @ dy_rows.T - mean_rows[None])
            start = i * tiles.columns
            dqueries = lax.dynamic_slice_in_dim(dtheta, start, tiles.columns, axis=1)
            dqueries += keys_t @ s
            dtheta = lax.dynamic_update_slice_in_dim(dtheta, dqueries, start, axis=1)
            return dtheta, dkeys + s @ queries, dvalues + p @ dy_rows

        gradients = (dtheta, jnp.zeros_like(keys), jnp.zeros_like(values))
        dtheta, dkeys, dvalues = _loop(theta.shape[0] // tiles.columns, add_queries, gradients)
        dphi = _set_rows(dphi, dkeys, j * tiles.rows)
        dg = _set_rows(dg, dvalues, j * tiles.rows)
        return dtheta, dphi, dg

    zeros = (jnp.zeros_like(theta.T), jnp.zeros_like(phi), jnp.zeros_like(g))
    dtheta, dphi, dg = _loop(phi.shape[0] // tiles.rows, differentiate_tile, zeros)
    return dtheta.T[:n], dphi[:m], dg[:m]


def _respond_and_store(
    theta: Array, phi: Array, g: Array, mask: Array | None, scale: Array
) -> tuple[Array, Array, Array]:
    """Returns the response (N, e) of one sample, and for its gradient exp(logit − m) and l.

    exp(logit − m) is (M, N), and its sums l are (N,).
    """
    logits = _with_bias(phi, mask) @ _with_ones(scale * theta, mask).T
    f = jnp.exp(logits - _finite(jnp.max(logits, axis=0, keepdims=True)))
    total = jnp.sum(f, axis=0)
    total = jnp.where(total == 0, 1, total)  # a query without keys has the response 0 / 1
    return (g.T @ f).T / total[:, None], f, total


def _differentiate_stored(
    theta: Array, phi: Array, g: Array, dy: Array, mean: Array, f: Array, total: Array
) -> Gradients:
    """Returns what `_differentiate_sample` does, from the stored affinity.

    p_ij = f_ij / l_i. The N rows of ȳ are divided by l instead of the N×M entries of f.
    """
    dy = dy / total[:, None]
    s = f * (g @ dy.T - (mean / total)[None])
    return (phi.T @ s).T, s @ theta, f @ dy


def _loop(steps: int, body: Callable[[Index, T], T], state: T) -> T:
    return body(0, state) if steps == 1 else lax.fori_loop(0, steps, body, state)


def _rows(x: Array, tile: Index, size: int) -> Array:
    return lax.dynamic_slice_in_dim(x, tile * size, size)


def _rows_of_all(arrays: tuple[Array | None, ...], tile: Index, size: int) -> tuple[Any, ...]:
    return tuple(None if x is None else _rows(x, tile, size) for x in arrays)


def _set_rows(x: Array, rows: Array, start: Index) -> Array:
    return lax.dynamic_update_slice_in_dim(x, rows, start, axis=0)


def _pad_rows(x: Array, multiple: int) -> Array:
    """Appends rows of zeros up to a multiple."""
    return jnp.pad(x, [(0, -x.shape[0] % multiple)] + [(0, 0)] * (x.ndim - 1))


def _pad_keys(
    phi: Array, g: Array, mask: Array | None, multiple: int
) -> tuple[Array, Array, Array | None]:
    if phi.shape[0] % multiple and mask is None:
        # A key of zeros has the logit 0, not −∞, so padded keys must be masked.
        mask = jnp.ones(phi.shape[0], bool)
    padded_mask = None if mask is None else _pad_rows(mask, multiple)
    return _pad_rows(phi, multiple), _pad_rows(g, multiple), padded_mask


def _with_bias(phi: Array, mask: Array | None) -> Array:
    """Appends a column to φ that adds −∞ to the logits of masked keys, and 0 to the others.

    XLA:CPU would otherwise write the masked logits to memory and read them again.
    """
    if mask is None:
        return phi
    real = mask[:, None]
    bias = jnp.where(real, 0, -jnp.inf).astype(phi.dtype)
    return jnp.concatenate([jnp.where(real, phi, 0), bias], axis=1)


def _with_ones(theta: Array, mask: Array | None) -> Array:
    """Appends the factor of the column of `_with_bias` to θ."""
    if mask is None:
        return theta
    return jnp.concatenate([theta, jnp.ones_like(theta[:, :1])], axis=1)


def _finite(max_logit: Array) -> Array:
    """Replaces −∞, the maximum before the first key, by 0, because −∞ − (−∞) would be NaN."""
    return jnp.where(jnp.isneginf(max_logit), 0, max_logit)
