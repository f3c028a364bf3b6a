"""The concatenation without its N×M pairs: sort the keys once, then look up sums of sorted keys.

The projection of a pair splits, w_f · [θ_i, φ_j] = a_i + b_j. So ReLU(a_i + b_j) keeps, of the keys sorted by b from the
largest, the first k_i, those with b_j > −a_i, and

    Σ_j ReLU(a_i + b_j) g_j = Σ_{j < k_i} (a_i + b_j) g_j.

The sorted keys are cut into leaves of a few keys, and the leaves into blocks; r is the last b of a block. Before each leaf,

    C = Σ_j g_j        F = Σ_j (b_j − r) g_j        over the keys j of all leaves before it

are running sums: over blocks, and within each block, where they are one matrix product for all blocks. A query reads them
at the first leaf that it does not keep whole, and adds the keys of that leaf which it keeps:

    F + (a_i + r) C + Σ_{j in the leaf, j < k_i} (a_i + b_j) g_j.

The weights are differences to a neighbour in the order, so adding a number to every b and taking it from every a changes
nothing, and nothing large cancels: this is what centring b would give, and more. Exact, in O((N + M) (log M + e)) time, and
O((N + M) e / LEAF) memory for the running sums.

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
from nonlocal_jax.ops.samples import over_samples
from nonlocal_jax.types import Array

T = TypeVar("T")

LEAF = 8  # rows; on CPU 2 and 4 are as fast with more memory, 16 is slower
BLOCK = 32  # leaves
PACKED = {
    "cpu": 64,
    "gpu": 64,
    "tpu": 32,
}  # bits of the integers that are sorted; a TPU has none of 64
AT_ONCE = {
    "cpu": 1 << 17,
    "gpu": 1 << 26,
    "tpu": 1 << 26,
}  # numbers of the rows that `_dots` looks up


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


def _sum_of_kept_backward(
    residuals: tuple[Any, ...], dy: Array
) -> tuple[Array, Array, Array, None]:
    return *_each(_backward, *residuals, dy), None


_sum_of_kept.defvjp(_sum_of_kept_forward, _sum_of_kept_backward)


def _each(function: Callable[..., T], *batch: Any) -> T:
    """`function` of each sample: one after the other on CPU, where batched sorts and gathers are slow, else all at once."""
    return over_samples(function, 1 if backend() == "cpu" else batch[0].shape[0], *batch)


def _forward(a: Array, b: Array, g: Array, n: Array) -> tuple[Array, tuple[Any, ...]]:
    """One sample's sum for (N,), (M,) and (M, e), and what its gradient needs beside them."""
    keys = _argsort(_in_order_of_floats(-b))
    descending = b[keys]
    real = jnp.sum(~jnp.isneginf(b), dtype=jnp.int32)
    kept = jnp.minimum(_count_below(-descending, a), real)  # k_i
    order = _order(descending, keys, real)
    return _weighted(order, _tables(order, g, n), g, a, kept, n), (order, kept, descending)


def _backward(
    a: Array,
    b: Array,
    g: Array,
    n: Array,
    order: "_Order",
    kept: Array,
    descending: Array,
    dy: Array,
) -> tuple[Array, Array, Array]:
    """One sample's gradients. With S_i the sum of g over the keys that i keeps, and T_j that of ȳ over the queries that keep j:

    ā_i = 1/n ȳ_i · S_i, b̄_j = 1/n T_j · g_j, ḡ_j = 1/n Σ_i ReLU(a_i + b_j) ȳ_i.
    """
    left_out = (b.size - kept).astype(jnp.uint32)
    queries = _argsort(left_out, b.size.bit_length())
    # i keeps j if more keys than those before j are kept; keys of one b are kept together.
    before = _count_below(-descending, -b)
    kept_by = _count_below(left_out[queries], (b.size - before).astype(jnp.uint32))
    order_of_queries = _order(a[queries], queries, jnp.sum(kept > 0, dtype=jnp.int32))
    tables, tables_of_dy = _tables(order, g, n), _tables(order_of_queries, dy, n)
    return (
        _dots(order, tables, g, kept, dy) / n,
        _dots(order_of_queries, tables_of_dy, dy, kept_by, g) / n,
        _weighted(order_of_queries, tables_of_dy, dy, b, kept_by, n),
    )


class _Order(NamedTuple):
    """Rows in the order in which lookups keep them, and at least one leaf of nothing after them."""

    values: Array  # (blocks, block, leaf) of a or b
    rows: Array  # (blocks, block, leaf), which rows these are


class _Tables(NamedTuple):
    """The names are those at the top of the file."""

    r: Array  # (blocks,)
    sums: (
        Array  # (block · 2 · blocks, e): for each place of a block, C and then F / n of all blocks
    )


def _order(values: Array, rows: Array, real: Array) -> _Order:
    """What follows the first `real` values is never kept, so it may be any finite number: the last real one."""
    values = jnp.where(
        lax.iota(jnp.int32, values.size) < real, values, values[jnp.maximum(real - 1, 0)]
    )
    values = jnp.where(jnp.isneginf(values), 0, values)  # where none is real
    block = min(BLOCK, values.size // LEAF + 1)
    padding = (0, block * LEAF - values.size % (block * LEAF))
    values, rows = jnp.pad(values, padding, mode="edge"), jnp.pad(rows, padding)
    return _Order(values.reshape(-1, block, LEAF), rows.reshape(-1, block, LEAF))


def _tables(order: _Order, x: Array, n: Array) -> _Tables:
    blocks, block, _ = order.rows.shape
    r = order.values[:, -1, -1]
    weights = (order.values - r[:, None, None]) / n
    # (block, leaf, 2, blocks), so that the sums within all blocks are one matrix product. The rows are repeated and not their
    # features, because XLA on CPU would store these before it adds them.
    weights = jnp.stack([jnp.ones_like(weights), weights]).transpose(2, 3, 0, 1)
    rows = jnp.stack([order.rows, order.rows]).transpose(2, 3, 0, 1)

    def sum_leaves(weights_and_rows: tuple[Array, Array]) -> Array:
        leaves = jnp.zeros((2, blocks, x.shape[1]), x.dtype)
        for weight, row in zip(*weights_and_rows, strict=True):
            leaves += weight[..., None] * _take(x, row)
        return leaves

    # One place after the other on CPU, where a fusion into the matrix product would look up number by number.
    leaves = lax.map(sum_leaves, (weights, rows), batch_size=None if backend() == "cpu" else block)
    before = jnp.tril(jnp.ones((block + 1, block), x.dtype), -1)  # the last row sums a whole block
    within = jnp.matmul(before, leaves.reshape(block, -1), precision=lax.Precision.HIGHEST)
    within = within.reshape(block + 1, 2, blocks, -1)
    c = jnp.cumsum(_shift(within[-1, 0]), axis=0)
    f = jnp.cumsum(
        _shift(within[-1, 1]) + ((_shift(r) - r) / n)[:, None] * c, axis=0
    )  # c is 0 in the first block
    return _Tables(r, (within[:-1] + jnp.stack([c, f])[None]).reshape(-1, x.shape[1]))


def _shift(x: Array) -> Array:
    """Each row the one before it, the first 0."""
    return jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]])


class _Places(NamedTuple):
    """Where the sums of the first `kept` rows are found."""

    block: Array  # of the first leaf that is not kept whole
    c: Array  # its rows of `_Tables.sums`
    f: Array
    rest: tuple[
        tuple[Array, Array, Array], ...
    ]  # that leaf's rows: whether it is kept, its value, which row it is


def _find(order: _Order, kept: Array) -> _Places:
    blocks, block, _ = order.rows.shape
    leaf = kept // LEAF
    c = leaf % block * (2 * blocks) + leaf // block
    values, rows = order.values.reshape(-1, LEAF), order.rows.reshape(-1, LEAF)
    rest = (
        (place < kept % LEAF, _take(values[:, place], leaf), _take(rows[:, place], leaf))
        for place in range(LEAF - 1)
    )
    return _Places(leaf // block, c, c + blocks, tuple(rest))


def _weighted(
    order: _Order, tables: _Tables, x: Array, offsets: Array, kept: Array, n: Array
) -> Array:
    """1/n times the sum of the first `kept` rows of x, each times offset + its value."""
    places = _find(order, kept)
    offsets = jnp.where(kept > 0, offsets, 0)  # which may be infinite where nothing is kept
    y = _take(tables.sums, places.f)
    y += ((offsets + _take(tables.r, places.block)) / n)[:, None] * _take(tables.sums, places.c)
    for is_kept, value, row in places.rest:
        y += jnp.where(is_kept, (offsets + value) / n, 0)[:, None] * _take(x, row)
    return y


def _plain(order: _Order, tables: _Tables, x: Array, kept: Array) -> Array:
    """The sum of the first `kept` rows of x."""
    places = _find(order, kept)
    y = _take(tables.sums, places.c)
    for is_kept, _, row in places.rest:
        y += is_kept.astype(x.dtype)[:, None] * _take(x, row)
    return y


def _dots(order: _Order, tables: _Tables, x: Array, kept: Array, z: Array) -> Array:
    """The products of each row of z with the sum of the first `kept` rows of x, some rows at a time, so as to store few.

    Two parts at least: outside a loop XLA would store the rows of x, to share them with `_weighted`.
    """
    rows, width = z.shape
    size = min(max(AT_ONCE[backend()] // width, 1), -(-rows // 2))

    def add(i: Array | int, dots: Array) -> Array:
        start = jnp.minimum(i * size, rows - size)  # the last part may overlap the one before
        sums = _plain(order, tables, x, lax.dynamic_slice_in_dim(kept, start, size))
        # XLA on CPU fuses lookups with what a matrix product reads, but not with what a sum reads.
        products = sums * lax.dynamic_slice_in_dim(z, start, size)
        some = jnp.matmul(products, jnp.ones(width, z.dtype), precision=lax.Precision.HIGHEST)
        return lax.dynamic_update_slice_in_dim(dots, some, start, axis=0)

    return lax.fori_loop(0, -(-rows // size), add, jnp.zeros(rows, z.dtype))


def _take(x: Array, rows: Array) -> Array:
    return x.at[rows].get(mode="promise_in_bounds")


def _count_below(ascending: Array, x: Array) -> Array:
    """How many of `ascending` are less than each x."""
    return jnp.searchsorted(ascending, x, side="left").astype(jnp.int32)


def _in_order_of_floats(x: Array) -> Array:
    """Unsigned integers in the order of x."""
    width = 8 * x.dtype.itemsize
    bits = lax.bitcast_convert_type(x, jnp.dtype(f"uint{width}"))
    sign = bits.dtype.type(1 << (width - 1))
    return jnp.where(bits < sign, bits | sign, ~bits)


def _argsort(x: Array, width: int | None = None) -> Array:
    """The rows of unsigned integers of `width` bits in ascending order, those of one value in their own.

    A value and its row packed into one integer: XLA sorts these several times faster than pairs, and than floats. What
    does not fit beside the row is sorted digit by digit, from the last.
    """
    packed = PACKED[backend()]
    row_bits = max((x.size - 1).bit_length(), 1)
    with jax.enable_x64(True):
        of_row = jnp.dtype(f"uint{packed}").type((1 << row_bits) - 1)
        rows = places = lax.iota(of_row.dtype, x.size)
        for shift in range(0, width or 8 * x.dtype.itemsize, packed - row_bits):
            digit = (_take(x, rows) >> shift).astype(of_row.dtype) << row_bits
            rows = _take(rows, lax.sort(digit | places, is_stable=False) & of_row)
        return rows.astype(jnp.int32)
