"""The concatenation without its N×M pairs: sort the keys once, then look up sums of sorted keys.

The projection of a pair splits, w_f · [θ_i, φ_j] = a_i + b_j. So ReLU(a_i + b_j) keeps, of the keys sorted by b from the
largest, the first k_i, those with b_j > −a_i, and

    Σ_j ReLU(a_i + b_j) g_j = Σ_{j < k_i} (a_i + b_j) g_j.

The sorted keys are cut into blocks; r_q is the last b of block q. If the last key that i keeps lies in block q, the sum is

    F_q + P1_i + (a_i + r_q) (C_q + P0_i)

    C_q = Σ_{j in blocks before q} g_j                 P0_i = Σ_{j in block q, j < k_i} g_j
    F_q = Σ_{j in blocks before q} (b_j − r_q) g_j     P1_i = Σ_{j in block q, j < k_i} (b_j − r_q) g_j

C and F are running sums over blocks, P0 and P1 over the keys of each block. The weights are differences to a neighbour in the
order, so adding a number to every b and taking it from every a changes nothing, and nothing large cancels: this is what
centring b would give, and more. Exact, in O((N + M) log M + (N + M) e) time and O((N + M) e) memory.

The gradient is the same sum with queries and keys exchanged, Σ_i ReLU(a_i + b_j) ȳ_i for g_j. Only which keys a query keeps
matters for its order, so the sort of the keys serves again: the queries are sorted by the integers k_i. Nothing is scattered.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from nonlocal_jax.ops.definition import number_of_keys
from nonlocal_jax.ops.machine import backend
from nonlocal_jax.types import Array

T = TypeVar("T")

BLOCK = {"cpu": 32, "gpu": 128, "tpu": 128}  # rows of one block; on CPU 16 to 64 measured alike
TABLE_BYTES = {"cpu": 8 << 20, "gpu": 256 << 20, "tpu": 256 << 20}  # of P0; more channels than fit are done in turns


def respond(a: Array, b: Array, g: Array, key_mask: Array | None) -> Array:
    """1/n Σ_j ReLU(a_i + b_j) g_j over the n keys that `key_mask` leaves.

    Where a key's b is NaN or infinite, the definition has no finite response, and all responses of its sample are NaN.

    Args:
        a: (..., N), w_θ · θ_i.
        b: (..., M), w_φ · φ_j.
        g: (..., M, e), float32 or wider, 0 where a key is masked.
        key_mask: (..., M) of bool.

    Returns:
        (..., N, e).
    """
    n = jnp.full(b.shape[:-1], b.shape[-1], b.dtype)
    if key_mask is not None:
        n = number_of_keys(key_mask, b.dtype)
        b = jnp.where(key_mask, b, -jnp.inf)
    undefined = jnp.any(jnp.isnan(b) | jnp.isposinf(b), axis=-1, keepdims=True)
    a = jnp.where(undefined, jnp.nan, a)
    batch = g.shape[:-2]
    flat = (x.reshape(math.prod(batch), *x.shape[len(batch) :]) for x in (a, b, g, n))
    return _sum_of_kept(*flat).reshape(*batch, a.shape[-1], g.shape[-1])


@jax.custom_vjp
def _sum_of_kept(a: Array, b: Array, g: Array, n: Array) -> Array:
    """1/n Σ_j ReLU(a_i + b_j) g_j for a (B, N), b (B, M), g (B, M, e) and n (B,)."""
    return _sum_of_kept_forward(a, b, g, n)[0]


def _sum_of_kept_forward(a: Array, b: Array, g: Array, n: Array) -> tuple[Array, tuple[Any, ...]]:
    y, kept = _each(_forward, a, b, g, n)
    return y, (a, b, g, n, *kept)


def _sum_of_kept_backward(residuals: tuple[Any, ...], dy: Array) -> tuple[Array, Array, Array, None]:
    return *_each(_backward, *residuals, dy), None


_sum_of_kept.defvjp(_sum_of_kept_forward, _sum_of_kept_backward)


def _each(function: Callable[..., T], *batch: Any) -> T:
    """`function` of each sample: at once, or on CPU, where batched sorts and gathers are slow, one after the other."""
    if batch[0].shape[0] == 1:
        return jax.tree.map(lambda x: x[None], function(*jax.tree.map(lambda x: x[0], batch)))
    if backend() == "cpu":
        return lax.map(lambda sample: function(*sample), batch)
    return jax.vmap(function)(*batch)


def _forward(a: Array, b: Array, g: Array, n: Array) -> tuple[Array, tuple[Any, ...]]:
    """One sample's sum for (N,), (M,) and (M, e), and what its gradient needs beside them."""
    negative, keys = lax.sort((-b, lax.iota(jnp.int32, b.size)), num_keys=1)
    real = jnp.sum(~jnp.isneginf(b), dtype=jnp.int32)
    kept = jnp.minimum(_count_below(negative, a), real)  # k_i
    order = _order(-negative, keys, real)

    def turn(channels: Channels, y: Array) -> Array:
        return channels.write(y, _weighted(_tables(order, channels.read(g), n), a, kept))

    y = _in_turns(turn, jnp.zeros((a.size, g.shape[1]), g.dtype), rows=b.size)
    return y, (kept, negative, order)


def _backward(
    a: Array, b: Array, g: Array, n: Array, kept: Array, negative: Array, order: "_Order", dy: Array
) -> tuple[Array, Array, Array]:
    """One sample's gradients. With S_i the sum of g over the keys that i keeps, and T_j that of ȳ over the queries that keep j:

    ā_i = 1/n ȳ_i · S_i, b̄_j = 1/n T_j · g_j, ḡ_j = 1/n Σ_i ReLU(a_i + b_j) ȳ_i.
    """
    left_out, queries = _sort_small(b.size - kept, largest=b.size)
    # i keeps j if more keys than those before j are kept; keys of one b are kept together.
    kept_by = _count_below(left_out, b.size - _count_below(negative, -b))
    order_of_queries = _order(a[queries], queries, jnp.sum(kept > 0))

    def turn(channels: Channels, gradients: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        da, db, dg = gradients
        of_g, of_dy = channels.read(g), channels.read(dy)
        tables = _tables(order_of_queries, of_dy, n)
        return (
            da + jnp.sum(_plain(_tables(order, of_g, n), kept) * of_dy, axis=-1),
            db + jnp.sum(_plain(tables, kept_by) * of_g, axis=-1),
            channels.write(dg, _weighted(tables, b, kept_by)),
        )

    da, db, dg = _in_turns(turn, (jnp.zeros_like(a), jnp.zeros_like(b), jnp.zeros_like(g)), rows=max(a.size, b.size))
    return da / n, db / n, dg


class _Order(NamedTuple):
    """Rows in the order in which lookups keep them, cut into blocks."""

    values: Array  # (blocks, block) of a or b
    rows: Array  # (blocks, block), which rows these are


class _Tables(NamedTuple):
    """Running sums over rows in order; the names are those at the top of the file. F and P1 are divided by n."""

    n: Array
    r: Array  # (blocks,)
    c: Array  # (blocks, e)
    f: Array  # (blocks, e)
    p0: Array  # (block, blocks, e), up to each place of a block, itself included
    p1: Array  # (block, blocks, e)


def _order(values: Array, rows: Array, real: Array) -> _Order:
    """What follows the first `real` values is never kept, so it may be any finite number: the last real one."""
    values = jnp.where(lax.iota(jnp.int32, values.size) < real, values, values[jnp.maximum(real - 1, 0)])
    values = jnp.where(jnp.isneginf(values), 0, values)  # where none is real
    block = min(BLOCK[backend()], values.size)
    padding = (0, -values.size % block)
    return _Order(jnp.pad(values, padding, mode="edge").reshape(-1, block), jnp.pad(rows, padding).reshape(-1, block))


def _tables(order: _Order, x: Array, n: Array) -> _Tables:
    block = order.values.shape[1]
    r = order.values[:, -1]
    in_order = _take(x, order.rows.T)  # (block, blocks, e), so that the sums of all blocks are one matrix product
    weighted = ((order.values - r[:, None]) / n).T[..., None] * in_order
    up_to = jnp.tril(jnp.ones((block, block), x.dtype))
    p0, p1 = (
        jnp.matmul(up_to, y.reshape(block, -1), precision=lax.Precision.HIGHEST).reshape(y.shape) for y in (in_order, weighted)
    )
    c = jnp.cumsum(_before(p0[-1]), axis=0)
    f = jnp.cumsum(_before(p1[-1]) + ((_before(r) - r) / n)[:, None] * c, axis=0)  # c is 0 in the first block
    return _Tables(n, r, c, f, p0, p1)


def _before(x: Array) -> Array:
    """Each row the one before it, the first 0."""
    return jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]])


def _plain(tables: _Tables, kept: Array) -> Array:
    """The sum of the first `kept` rows: C + P0."""
    block, place = _place(tables, kept)
    return jnp.where(kept[:, None] > 0, _take(tables.c, block) + _take(_flat(tables.p0), place), 0)


def _weighted(tables: _Tables, x: Array, kept: Array) -> Array:
    """1/n times the sum of the first `kept` rows, each times x + its value: F + P1 + 1/n (x + r) (C + P0)."""
    block, place = _place(tables, kept)
    plain = _take(tables.c, block) + _take(_flat(tables.p0), place)
    y = _take(tables.f, block) + _take(_flat(tables.p1), place) + ((x + _take(tables.r, block)) / tables.n)[:, None] * plain
    return jnp.where(kept[:, None] > 0, y, 0)


def _place(tables: _Tables, kept: Array) -> tuple[Array, Array]:
    """The block of the last kept row, and its row in the tables of places."""
    block, blocks, _ = tables.p0.shape
    last = jnp.maximum(kept - 1, 0)
    return last // block, last % block * blocks + last // block


def _flat(p: Array) -> Array:
    return p.reshape(-1, p.shape[-1])


def _take(x: Array, rows: Array) -> Array:
    return x.at[rows].get(mode="promise_in_bounds")


def _count_below(ascending: Array, x: Array) -> Array:
    """How many of `ascending` are less than each x."""
    return jnp.searchsorted(ascending, x, side="left").astype(jnp.int32)


def _sort_small(x: Array, largest: int) -> tuple[Array, Array]:
    """Sorted integers from 0 to `largest`, and which rows they are."""
    rows = lax.iota(jnp.int32, x.size)
    if (largest + 1) * x.size > jnp.iinfo(jnp.int32).max:
        in_order, rows = lax.sort((x, rows), num_keys=1)
        return in_order, rows
    packed = lax.sort(x * x.size + rows)  # one integer a row sorts several times faster than a pair
    return packed // x.size, packed % x.size


class Channels(NamedTuple):
    """Some neighbouring channels."""

    first: Array | int
    number: int

    def read(self, x: Array) -> Array:
        return lax.dynamic_slice_in_dim(x, self.first, self.number, axis=1)

    def write(self, x: Array, part: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(x, part, self.first, axis=1)


def _in_turns(turn: Callable[[Channels, T], T], result: T, rows: int) -> T:
    """`turn` for all channels at once or, where tables of so many rows would be large, for a part of them at a time."""
    last = jax.tree.leaves(result)[-1]
    channels = last.shape[-1]
    number = channels_at_once(rows, channels, last.dtype.itemsize, backend())
    if number == channels:
        return turn(Channels(0, channels), result)
    return lax.fori_loop(0, channels // number, lambda i, result: turn(Channels(i * number, number), result), result)


def channels_at_once(rows: int, channels: int, itemsize: int, machine: str) -> int:
    """How many channels of a table of `rows` are made at once.

    >>> channels_at_once(3136, 256, 4, "cpu"), channels_at_once(200704, 256, 4, "cpu")
    (256, 16)
    """
    while channels % 2 == 0 and channels > 16 and channels * rows * itemsize > TABLE_BYTES[machine]:
        channels //= 2
    return channels
