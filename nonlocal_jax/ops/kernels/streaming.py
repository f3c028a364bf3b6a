"""The two Gaussians, f = exp(scale · θ_i·φ_j), C = Σ_j f, tile by tile, without the N×M affinity.

A query keeps the running maximum m_i of its logits, the sum l_i of exp(logit − m_i), and the sum
o_i of exp(logit − m_i) g_j. A new tile of keys rescales l and o by exp(old m − new m), and at the
end y_i = o_i / l_i. The gradient keeps θ, φ, g, y and the log-sum-exp λ_i = m_i + log l_i, and
recomputes each tile:

    p_ij = exp(logit_ij − λ_i)                  s_ij = p_ij (ȳ_i·g_j − ȳ_i·y_i)
    ḡ_j = Σ_i p_ij ȳ_i    θ̄_i = scale Σ_j s_ij φ_j    φ̄_j = scale Σ_i s_ij θ_i
    scale' = Σ_ij s_ij θ_i·φ_j

(Milakov and Gimelshein 2018; Dao et al. 2022.) It takes any N, M, d and e, and memory for
O((N + M)(d + e)) numbers and one tile. On CPU, an affinity of a few megabytes is stored for the
gradient instead.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from nonlocal_jax.ops import sharded
from nonlocal_jax.ops.batching import map_samples
from nonlocal_jax.ops.definition import widen
from nonlocal_jax.ops.kernels.kernel import Forecast, Kernel, Operands, Sizes
from nonlocal_jax.ops.platforms import PLATFORMS
from nonlocal_jax.types import Array, Responses

T = TypeVar("T")
Index = Array | int
Sums = tuple[Array, Array, Array]  # m, l and o of the queries of a tile
Gradients = tuple[Array, Array, Array]  # θ̄ / scale, φ̄ / scale and ḡ, or those of a tile


class Limits(NamedTuple):
    """Sizes that decide how an affinity is cut into tiles.

    Attributes:
        tile_rows: Largest number of queries, and of keys, of a tile.
        tile_numbers: Largest number of entries in the tiles of all samples that are computed at
            once.
        stored_bytes: Largest affinity that is stored for the gradient instead of recomputed.
    """

    tile_rows: int
    tile_numbers: int
    stored_bytes: int


LIMITS = {
    # On 2 cores, tiles of 700 to 1,600 rows took the same time; 256 and 3,000 were slower.
    "cpu": Limits(tile_rows=1024, tile_numbers=1 << 20, stored_bytes=16 << 20),
    "gpu": Limits(tile_rows=2048, tile_numbers=1 << 26, stored_bytes=0),
    "tpu": Limits(tile_rows=2048, tile_numbers=1 << 26, stored_bytes=0),
}


class Tiling(NamedTuple):
    """How an affinity (B, N, M) is computed: `samples` at once, in tiles of `queries` × `keys`."""

    samples: int
    queries: int
    keys: int


def respond(operands: Operands, platform: str, limits: Limits | None = None) -> Responses:
    """Computes a softmax over the keys tile by tile, in float32 or wider.

    Args:
        operands: The operands of one of the two Gaussians.
        platform: Selects the limits.
        limits: Limits to use instead of the platform's.
    """
    theta, phi, g = (
        widen(x).reshape(-1, *x.shape[-2:]) for x in (operands.theta, operands.phi, operands.g)
    )
    mask = operands.key_mask
    if mask is not None:
        mask = mask.reshape(-1, mask.shape[-1])
    scale = jnp.asarray(operands.scale, theta.dtype)
    y = _respond(limits or LIMITS[platform], theta, phi, g, scale, mask)
    return y.reshape(*operands.theta.shape[:-1], g.shape[-1])


def respond_split(
    operands: Operands,
    platform: str,
    axis_name: str,
    gathered_bytes: int = sharded.GATHERED_BYTES,
) -> Responses:
    """Gathers the keys of all devices, or sends them around a ring if they are too large."""
    _, theta, phi, g, key_mask, scale, _ = operands
    if not sharded.takes_ring(phi, g, axis_name, gathered_bytes):
        return respond(operands.gather_keys(axis_name), platform)
    limits = LIMITS[platform]
    return sharded.ring(
        theta,
        phi,
        g,
        scale,
        key_mask,
        axis_name,
        respond_to_part=partial(respond_in_tiles, limits),
        differentiate_part=partial(differentiate_in_tiles, limits),
    )


def cost(sizes: Sizes, platform: str) -> Forecast:
    """Forecasts the products over all pairs; the gradient may compute the logits once more."""
    _, batch, n, m, d, e, _, _ = sizes
    pairs, item_bytes, limits = sizes.pairs, sizes.item_bytes, LIMITS[platform]
    stored = stores_affinity(pairs * item_bytes, limits)
    products_of_keys = 3 if stored else 4
    flops = (2 * pairs * (d + e), 2 * pairs * (products_of_keys * d + 3 * e))
    tiles = tiling(batch, n, m, limits)
    tile_bytes = tiles.samples * tiles.queries * tiles.keys * item_bytes
    rows_bytes = batch * (n * (d + e) + m * (d + e)) * item_bytes
    affinity_bytes = 2 * (pairs * item_bytes if stored else tile_bytes)
    temporary = (tile_bytes + batch * n * item_bytes, affinity_bytes + rows_bytes)
    return Forecast(flops, temporary, PLATFORMS[platform].seconds(sum(flops), moved=0))


def stores_affinity(affinity_bytes: int, limits: Limits) -> bool:
    """Whether the affinity is stored for the gradient; recomputing it costs about 10% more time."""
    return affinity_bytes <= limits.stored_bytes


def tiling(batch: int, n: int, m: int, limits: Limits) -> Tiling:
    """Returns tiles of nearly equal size, so that little is padded.

    >>> tiling(8, 12544, 3136, LIMITS["cpu"])
    Tiling(samples=1, queries=896, keys=784)
    """
    queries, keys = (_tile_size(size, limits.tile_rows) for size in (n, m))
    max_samples = max(limits.tile_numbers // (queries * keys), 1)
    # An equal number of samples in each step, so that no step of the loop is a shorter one.
    divisors = [size for size in range(1, min(batch, max_samples) + 1) if batch % size == 0]
    return Tiling(max(divisors, default=1), queries, keys)


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


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _respond(
    limits: Limits, theta: Array, phi: Array, g: Array, scale: Array, mask: Array | None
) -> Array:
    y, _ = respond_in_tiles(limits, theta, phi, g, scale, mask)
    return y


def _forward(
    limits: Limits, theta: Array, phi: Array, g: Array, scale: Array, mask: Array | None
) -> tuple[Array, tuple[Any, ...]]:
    if stores_affinity(_affinity_bytes(theta, phi), limits):
        function = partial(_respond_and_store, scale=scale)
        y, *stored = map_samples(function, 1, theta, phi, g, mask)
    else:
        y, *stored = respond_in_tiles(limits, theta, phi, g, scale, mask)
    return y, (theta, phi, g, scale, mask, y, *stored)


def _backward(limits: Limits, residuals: tuple[Any, ...], dy: Array) -> tuple[Array | None, ...]:
    theta, phi, g, scale, mask, y, *stored = residuals
    mean = jnp.sum(dy * y, axis=-1)  # Σ_j p_ij ȳ_i·g_j, since Σ_j p_ij g_j = y_i
    if stores_affinity(_affinity_bytes(theta, phi), limits):
        gradients = map_samples(_differentiate_stored, 1, theta, phi, g, dy, mean, *stored)
    else:
        gradients = differentiate_in_tiles(limits, theta, phi, g, scale, mask, dy, mean, *stored)
    dtheta, dphi, dg = gradients
    return scale * dtheta, scale * dphi, dg, jnp.sum(dtheta * theta), None


_respond.defvjp(_forward, _backward)


def _affinity_bytes(theta: Array, phi: Array) -> int:
    batch, n, _ = theta.shape
    return int(batch * n * phi.shape[1] * theta.dtype.itemsize)


def respond_in_tiles(
    limits: Limits, theta: Array, phi: Array, g: Array, scale: Array, mask: Array | None
) -> tuple[Array, Array]:
    """Returns the responses (B, N, e) and λ (B, N); both are 0 for a query without keys."""
    tiles = tiling(theta.shape[0], theta.shape[1], phi.shape[1], limits)
    function = partial(_respond_sample, scale=scale, tiles=tiles)
    return map_samples(function, tiles.samples, theta, phi, g, mask)


def differentiate_in_tiles(
    limits: Limits,
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
    tiles = tiling(theta.shape[0], theta.shape[1], phi.shape[1], limits)
    function = partial(_differentiate_sample, scale=scale, tiles=tiles)
    return map_samples(function, tiles.samples, theta, phi, g, mask, dy, mean, lse)


def _respond_sample(
    theta: Array, phi: Array, g: Array, mask: Array | None, scale: Array, tiles: Tiling
) -> tuple[Array, Array]:
    """Returns the response (N, e) and λ (N,) of one sample."""
    n = theta.shape[0]
    theta = _pad_rows(theta, tiles.queries)
    phi, g, mask = _pad_keys(phi, g, mask, tiles.keys)

    def respond_tile(i: Index, results: tuple[Array, Array]) -> tuple[Array, Array]:
        queries = _rows(theta, i, tiles.queries)

        def add_keys(j: Index, sums: Sums) -> Sums:
            max_logit, total, weighted = sums
            keys, values, real = _rows_of_all((phi, g, mask), j, tiles.keys)
            logits = scale * queries @ keys.T
            if real is not None:
                logits = jnp.where(real[None], logits, -jnp.inf)
            new_max = jnp.maximum(max_logit, jnp.max(logits, axis=-1))
            f = jnp.exp(logits - _finite(new_max)[:, None])
            # The sums so far are relative to the old maximum; exp(−∞) = 0 before the first key.
            rescale = jnp.exp(max_logit - _finite(new_max))
            weighted = weighted * rescale[:, None] + f @ values
            return new_max, total * rescale + jnp.sum(f, axis=-1), weighted

        zeros = jnp.zeros(tiles.queries, theta.dtype)
        sums = (zeros - jnp.inf, zeros, jnp.zeros((tiles.queries, g.shape[1]), g.dtype))
        max_logit, total, weighted = _loop(phi.shape[0] // tiles.keys, add_keys, sums)
        total = jnp.where(total == 0, 1, total)  # a query without keys has the response 0 / 1
        y, lse = results
        y = _set_rows(y, weighted / total[:, None], i * tiles.queries)
        lse = _set_rows(lse, _finite(max_logit) + jnp.log(total), i * tiles.queries)
        return y, lse

    y = jnp.zeros((theta.shape[0], g.shape[1]), g.dtype)
    lse = jnp.zeros(theta.shape[0], theta.dtype)
    y, lse = _loop(theta.shape[0] // tiles.queries, respond_tile, (y, lse))
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

    Tiles are (keys, queries): the products that add to φ̄ and ḡ then read them without a transpose.
    """
    n, m = theta.shape[0], phi.shape[0]
    theta, dy, lse, mean = (_pad_rows(x, tiles.queries) for x in (theta, dy, lse, mean))
    phi, g, mask = _pad_keys(phi, g, mask, tiles.keys)

    def differentiate_tile(j: Index, gradients: Gradients) -> Gradients:
        dtheta, dphi, dg = gradients
        keys, values, real = _rows_of_all((phi, g, mask), j, tiles.keys)

        def add_queries(i: Index, gradients: Gradients) -> Gradients:
            dtheta, dkeys, dvalues = gradients
            queries, dy_rows, lse_rows, mean_rows = _rows_of_all(
                (theta, dy, lse, mean), i, tiles.queries
            )
            p = jnp.exp(scale * (keys @ queries.T) - lse_rows[None])
            if real is not None:
                p = jnp.where(real[:, None], p, 0)
            s = p * (values @ dy_rows.T - mean_rows[None])
            dqueries = _rows(dtheta, i, tiles.queries) + s.T @ keys
            dtheta = _set_rows(dtheta, dqueries, i * tiles.queries)
            return dtheta, dkeys + s @ queries, dvalues + p @ dy_rows

        gradients = (dtheta, jnp.zeros_like(keys), jnp.zeros_like(values))
        dtheta, dkeys, dvalues = _loop(theta.shape[0] // tiles.queries, add_queries, gradients)
        dphi = _set_rows(dphi, dkeys, j * tiles.keys)
        dg = _set_rows(dg, dvalues, j * tiles.keys)
        return dtheta, dphi, dg

    zeros = (jnp.zeros_like(theta), jnp.zeros_like(phi), jnp.zeros_like(g))
    dtheta, dphi, dg = _loop(phi.shape[0] // tiles.keys, differentiate_tile, zeros)
    return dtheta[:n], dphi[:m], dg[:m]


def _respond_and_store(
    theta: Array, phi: Array, g: Array, mask: Array | None, scale: Array
) -> tuple[Array, Array, Array]:
    """Returns the response (N, e) of one sample, and for its gradient exp(logit − m) and l.

    exp(logit − m) is (M, N), and its sums l are (N,).
    """
    logits = phi @ (scale * theta).T
    if mask is not None:
        logits = jnp.where(mask[:, None], logits, -jnp.inf)
    f = jnp.exp(logits - _finite(jnp.max(logits, axis=0, keepdims=True)))
    total = jnp.sum(f, axis=0)
    total = jnp.where(total == 0, 1, total)  # a query without keys has the response 0 / 1
    return (f.T @ g) / total[:, None], f, total


def _differentiate_stored(
    theta: Array, phi: Array, g: Array, dy: Array, mean: Array, f: Array, total: Array
) -> Gradients:
    """Returns what `_differentiate_sample` does, from the stored affinity.

    p_ij = f_ij / l_i. The N rows of ȳ are divided by l instead of the N×M entries of f.
    """
    dy = dy / total[:, None]
    s = f * (g @ dy.T - (mean / total)[None])
    return s.T @ phi, s @ theta, f @ dy


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


def _finite(max_logit: Array) -> Array:
    """Replaces −∞, the maximum before the first key, by 0, because −∞ − (−∞) would be NaN."""
    return jnp.where(jnp.isneginf(max_logit), 0, max_logit)


KERNEL = Kernel(
    name="streaming",
    instantiations=("gaussian", "embedded_gaussian"),
    respond=respond,
    cost=cost,
    respond_split=respond_split,
)
