"""The two Gaussians, f = exp(scale · θ_i·φ_j), C = Σ_j f, without storing the N×M affinity.

"streaming" goes over the affinity tile by tile. With the running maximum m_i of the logits, and the sums l_i of
exp(logit − m_i) and o_i of exp(logit − m_i) g_j, a new tile rescales l and o by exp(old m − new m); at the end
y_i = o_i / l_i. The gradient keeps (θ, φ, g, y, log-sum-exp λ_i = m_i + log l_i) and makes each tile again:

    p_ij = exp(logit_ij − λ_i)                  s_ij = p_ij (ȳ_i·g_j − ȳ_i·y_i)
    ḡ_j = Σ_i p_ij ȳ_i    θ̄_i = scale Σ_j s_ij φ_j    φ̄_j = scale Σ_i s_ij θ_i    scale' = Σ_ij s_ij θ_i·φ_j

(Milakov and Gimelshein 2018; Dao et al. 2022). Any N, M, d and e; memory O((N + M)(d + e)) and one tile. On CPU, an affinity
of a few megabytes is kept for the gradient instead.

"cudnn" is the same algorithm in one kernel of NVIDIA's, for half precision on NVIDIA GPUs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from nonlocal_jax.ops.definition import widen
from nonlocal_jax.ops.machine import backend
from nonlocal_jax.ops.samples import over_samples
from nonlocal_jax.types import Array, KeyMask, Keys, Queries, Responses, Values

T = TypeVar("T")
Index = Array | int
# Rows and columns of a tile at most; on CPU 700 to 1,600 measured alike, 256 and 3,000 slower.
TILE = {"cpu": 1024, "gpu": 2048, "tpu": 2048}
TILE_NUMBERS = {
    "cpu": 1 << 20,
    "gpu": 1 << 26,
    "tpu": 1 << 26,
}  # of the tiles of all samples that are done at once
KEPT_BYTES = {"cpu": 16 << 20, "gpu": 0, "tpu": 0}


class Tiling(NamedTuple):
    """How the affinity (B, N, M) is cut: `samples` at once, tiles of `queries` × `keys`."""

    samples: int
    queries: int
    keys: int


def keeps(affinity: int, machine: str) -> bool:
    """Whether an affinity of so many bytes is kept for the gradient: making it again takes a tenth more time."""
    return affinity <= KEPT_BYTES[machine]


def tiling(batch: int, n: int, m: int, machine: str) -> Tiling:
    """The tiles of "streaming": of nearly equal size, so that little is padded.

    >>> tiling(8, 12544, 3136, "cpu")
    Tiling(samples=1, queries=896, keys=784)
    """
    queries, keys = (_even_part(size, TILE[machine]) for size in (n, m))
    at_once = max(TILE_NUMBERS[machine] // (queries * keys), 1)
    samples = max(
        (size for size in range(1, min(batch, at_once) + 1) if batch % size == 0), default=1
    )
    return Tiling(samples, queries, keys)


def _even_part(size: int, largest: int) -> int:
    """`size` cut into equal parts of at most `largest`, multiples of 8 unless there is but one: without padding if possible."""
    fewest = -(-size // largest)
    if fewest == 1:
        return size
    exact = (size // parts for parts in range(fewest, 2 * fewest) if size % (8 * parts) == 0)
    return next(exact, -(-size // (fewest * 8)) * 8)


def streaming(
    theta: Queries, phi: Keys, g: Values, scale: float | Array, key_mask: KeyMask | None
) -> Responses:
    """Softmax over the keys, tile by tile.

    Args:
        theta: (..., N, d).
        phi: (..., M, d).
        g: (..., M, e), 0 where a key is masked.
        scale: multiplies the logits.
        key_mask: (..., M) of bool.

    Returns:
        (..., N, e), float32 or wider.
    """
    batch = theta.shape[:-2]
    theta, phi, g = (widen(x).reshape(-1, *x.shape[-2:]) for x in (theta, phi, g))
    mask = None if key_mask is None else key_mask.reshape(-1, key_mask.shape[-1])
    return _streaming(theta, phi, g, jnp.asarray(scale, theta.dtype), mask).reshape(
        *batch, *theta.shape[1:-1], g.shape[-1]
    )


@jax.custom_vjp
def _streaming(theta: Array, phi: Array, g: Array, scale: Array, mask: Array | None) -> Array:
    return in_tiles(theta, phi, g, scale, mask)[0]


def _forward(
    theta: Array, phi: Array, g: Array, scale: Array, mask: Array | None
) -> tuple[Array, tuple[Any, ...]]:
    if _keeps(theta, phi):
        y, *kept = over_samples(partial(_respond_keeping, scale=scale), 1, theta, phi, g, mask)
    else:
        y, *kept = in_tiles(theta, phi, g, scale, mask)
    return y, (theta, phi, g, scale, mask, y, *kept)


def in_tiles(
    theta: Array, phi: Array, g: Array, scale: Array, mask: Array | None
) -> tuple[Array, Array]:
    """The responses (B, N, e) and λ (B, N); for a query without keys both are 0."""
    tiles = tiling(theta.shape[0], theta.shape[1], phi.shape[1], backend())
    return over_samples(
        partial(_respond, scale=scale, tiles=tiles), tiles.samples, theta, phi, g, mask
    )


def differentiate(
    theta: Array,
    phi: Array,
    g: Array,
    scale: Array,
    mask: Array | None,
    dy: Array,
    mean: Array,
    lse: Array,
) -> tuple[Array, Array, Array]:
    """θ̄ / scale, φ̄ / scale and ḡ, given ȳ, Σ_j p_ij ȳ_i·g_j and λ."""
    tiles = tiling(theta.shape[0], theta.shape[1], phi.shape[1], backend())
    of_sample = partial(_differentiate, scale=scale, tiles=tiles)
    return over_samples(of_sample, tiles.samples, theta, phi, g, mask, dy, mean, lse)


def _keeps(theta: Array, phi: Array) -> bool:
    return keeps(theta.shape[0] * theta.shape[1] * phi.shape[1] * theta.dtype.itemsize, backend())


def _backward(residuals: tuple[Any, ...], dy: Array) -> tuple[Array | None, ...]:
    theta, phi, g, scale, mask, y, *kept = residuals
    mean = jnp.sum(dy * y, axis=-1)  # Σ_j p_ij ȳ_i·g_j
    if _keeps(theta, phi):
        dtheta, dphi, dg = over_samples(_differentiate_kept, 1, theta, phi, g, dy, mean, *kept)
    else:
        dtheta, dphi, dg = differentiate(theta, phi, g, scale, mask, dy, mean, *kept)
    return scale * dtheta, scale * dphi, dg, jnp.sum(dtheta * theta), None


_streaming.defvjp(_forward, _backward)


def _respond(
    theta: Array, phi: Array, g: Array, mask: Array | None, scale: Array, tiles: Tiling
) -> tuple[Array, Array]:
    """The response (N, e) and λ (N,) of one sample."""
    n = theta.shape[0]
    theta, (phi, g, mask) = _pad(theta, tiles.queries), _pad_keys(phi, g, mask, tiles.keys)
    unseen = jnp.zeros(tiles.queries, theta.dtype)

    def of_queries(i: Index, out: tuple[Array, Array]) -> tuple[Array, Array]:
        queries = _part(theta, i, tiles.queries)

        def add_keys(j: Index, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            largest, total, weighted = state
            keys, values, real = _parts((phi, g, mask), j, tiles.keys)
            logits = scale * queries @ keys.T
            if real is not None:
                logits = jnp.where(real[None], logits, -jnp.inf)
            new = jnp.maximum(largest, jnp.max(logits, axis=-1))
            f = jnp.exp(logits - _finite(new)[:, None])
            rescale = jnp.exp(largest - _finite(new))
            weighted = weighted * rescale[:, None] + f @ values
            return new, total * rescale + jnp.sum(f, axis=-1), weighted

        state = (unseen - jnp.inf, unseen, jnp.zeros((tiles.queries, g.shape[1]), g.dtype))
        largest, total, weighted = _loop(phi.shape[0] // tiles.keys, add_keys, state)
        total = jnp.where(total == 0, 1, total)  # a query without keys
        y, lse = out
        return (
            _write(y, weighted / total[:, None], i * tiles.queries),
            _write(lse, _finite(largest) + jnp.log(total), i * tiles.queries),
        )

    out = (jnp.zeros((theta.shape[0], g.shape[1]), g.dtype), jnp.zeros(theta.shape[0], theta.dtype))
    y, lse = _loop(theta.shape[0] // tiles.queries, of_queries, out)
    return y[:n], lse[:n]


def _differentiate(
    theta: Array,
    phi: Array,
    g: Array,
    mask: Array | None,
    dy: Array,
    mean: Array,
    lse: Array,
    scale: Array,
    tiles: Tiling,
) -> tuple[Array, Array, Array]:
    """θ̄ / scale, φ̄ / scale and ḡ of one sample. Tiles are (keys, queries), so that the two products which add to φ̄ and
    ḡ take them as they lie in memory.
    """
    n, m = theta.shape[0], phi.shape[0]
    theta, dy, lse, mean = (_pad(x, tiles.queries) for x in (theta, dy, lse, mean))
    phi, g, mask = _pad_keys(phi, g, mask, tiles.keys)

    def of_keys(j: Index, gradients: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        dtheta, dphi, dg = gradients
        keys, values, real = _parts((phi, g, mask), j, tiles.keys)

        def add_queries(i: Index, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dtheta, dkeys, dvalues = state
            queries, dys, lses, means = _parts((theta, dy, lse, mean), i, tiles.queries)
            p = jnp.exp(scale * (keys @ queries.T) - lses[None])
            if real is not None:
                p = jnp.where(real[:, None], p, 0)
            s = p * (values @ dys.T - means[None])
            dqueries = _part(dtheta, i, tiles.queries) + s.T @ keys
            dkeys, dvalues = dkeys + s @ queries, dvalues + p @ dys
            return _write(dtheta, dqueries, i * tiles.queries), dkeys, dvalues

        state = (dtheta, jnp.zeros_like(keys), jnp.zeros_like(values))
        dtheta, dkeys, dvalues = _loop(theta.shape[0] // tiles.queries, add_queries, state)
        return dtheta, _write(dphi, dkeys, j * tiles.keys), _write(dg, dvalues, j * tiles.keys)

    zeros = (jnp.zeros_like(theta), jnp.zeros_like(phi), jnp.zeros_like(g))
    dtheta, dphi, dg = _loop(phi.shape[0] // tiles.keys, of_keys, zeros)
    return dtheta[:n], dphi[:m], dg[:m]


def _respond_keeping(
    theta: Array, phi: Array, g: Array, mask: Array | None, scale: Array
) -> tuple[Array, Array, Array]:
    """The response (N, e), and for the gradient exp(logit − m) (M, N) and its sums l (N,)."""
    logits = phi @ (scale * theta).T
    if mask is not None:
        logits = jnp.where(mask[:, None], logits, -jnp.inf)
    f = jnp.exp(logits - _finite(jnp.max(logits, axis=0, keepdims=True)))
    total = jnp.sum(f, axis=0)
    total = jnp.where(total == 0, 1, total)  # a query without keys
    return (f.T @ g) / total[:, None], f, total


def _differentiate_kept(
    theta: Array, phi: Array, g: Array, dy: Array, mean: Array, f: Array, total: Array
) -> tuple[Array, Array, Array]:
    """As `_differentiate`, with p_ij = f_ij / l_i, whose division falls to the rows of ȳ."""
    dy = dy / total[:, None]
    s = f * (g @ dy.T - (mean / total)[None])
    return s.T @ phi, s @ theta, f @ dy


def _loop(steps: int, body: Callable[[Index, T], T], state: T) -> T:
    return body(0, state) if steps == 1 else lax.fori_loop(0, steps, body, state)


def _part(x: Array, i: Index, size: int) -> Array:
    return lax.dynamic_slice_in_dim(x, i * size, size)


def _parts(xs: tuple[Array | None, ...], i: Index, size: int) -> tuple[Any, ...]:
    return tuple(None if x is None else _part(x, i, size) for x in xs)


def _write(x: Array, part: Array, start: Index) -> Array:
    return lax.dynamic_update_slice_in_dim(x, part, start, axis=0)


def _pad(x: Array, multiple: int) -> Array:
    """Zeros after the rows."""
    return jnp.pad(x, [(0, -x.shape[0] % multiple)] + [(0, 0)] * (x.ndim - 1))


def _pad_keys(
    phi: Array, g: Array, mask: Array | None, multiple: int
) -> tuple[Array, Array, Array | None]:
    if phi.shape[0] % multiple and mask is None:
        mask = jnp.ones(phi.shape[0], bool)
    return _pad(phi, multiple), _pad(g, multiple), None if mask is None else _pad(mask, multiple)


def _finite(largest: Array) -> Array:
    """0 where there was no key yet."""
    return jnp.where(jnp.isneginf(largest), 0, largest)


def cudnn(
    theta: Queries, phi: Keys, g: Values, scale: float | Array, key_mask: KeyMask | None
) -> Responses:
    """Softmax over the keys in NVIDIA's kernel; what it can serve is `cost.cudnn_refusal`'s to say.

    A mask becomes a bias (..., N, M), so memory is linear only without one.

    Args:
        theta: (..., N, d), float16 or bfloat16.
        phi: (..., M, d).
        g: (..., M, d).
        scale: multiplies the logits.
        key_mask: (..., M) of bool.

    Returns:
        (..., N, d) in the dtype of the input.
    """
    batch = theta.shape[:-2]
    if not isinstance(scale, int | float):  # cuDNN's own is a constant
        theta, scale = (widen(theta) * scale).astype(theta.dtype), 1.0
    queries, keys, values = (
        x.reshape(-1, x.shape[-2], 1, x.shape[-1]) for x in (theta, phi, g)
    )  # one head
    mask = None
    if key_mask is not None:
        shape = (queries.shape[0], 1, queries.shape[1], keys.shape[1])
        mask = jnp.broadcast_to(key_mask.reshape(shape[0], 1, 1, shape[-1]), shape)
    y = jax.nn.dot_product_attention(
        queries, keys, values, mask=mask, scale=scale, implementation="cudnn"
    )
    y = y.reshape(*batch, *y.shape[1:2], y.shape[-1])
    return (
        y if key_mask is None else jnp.where(key_mask.any(axis=-1)[..., None, None], y, 0)
    )  # a query without keys
