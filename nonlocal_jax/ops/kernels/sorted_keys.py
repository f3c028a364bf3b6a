"""The concatenation without its N×M pairs: sort the keys once, then look up sums of sorted keys.

The projection of a pair splits, w_f · [θ_i, φ_j] = a_i + b_j. With the keys sorted by b in
descending order, ReLU(a_i + b_j) keeps the first k_i of them, those with b_j > −a_i:

    Σ_j ReLU(a_i + b_j) g_j = Σ_{j < k_i} (a_i + b_j) g_j.

The sorted keys are cut into leaves of a few keys, and the leaves into blocks; r is the last b of a
block. For each leaf there are two prefix sums over the keys j of all leaves before it:

    C = Σ_j g_j        F = Σ_j (b_j − r) g_j

They are cumulative sums over blocks, and within blocks one matrix product for all blocks. A query
reads them at the first leaf that it does not keep whole, and adds the keys of that leaf that it
keeps:

    F + (a_i + r) C + Σ_{j in the leaf, j < k_i} (a_i + b_j) g_j.

The weights are differences to a neighbour in the sorted order. Plain prefix sums of b_j g_j would
cancel catastrophically if all b had a large common offset and all a its negative; differences to r
are unaffected by the offset, and smaller than those to the mean of b would be. The result is exact,
in O((N + M) (log M + e)) time and with O((N + M) e / leaf) memory for the prefix sums.

The gradient is the same sum with queries and keys exchanged, Σ_i ReLU(a_i + b_j) ȳ_i for g_j. The
order of the queries matters only through how many keys they keep, so the sort of the keys is reused
and the queries are sorted by the integers k_i. Nothing is scattered.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nonlocal_jax.ops import definition, sharded
from nonlocal_jax.ops.batching import map_samples
from nonlocal_jax.ops.kernels.kernel import Forecast, Kernel, Operands, Sizes
from nonlocal_jax.ops.platforms import PLATFORMS
from nonlocal_jax.ops.sorting import argsort, count_below, ordered_integers, take
from nonlocal_jax.types import Array, Responses


class Settings(NamedTuple):
    """Sizes and loops that are tuned for a platform.

    Attributes:
        leaf: Rows of a leaf. On 2 CPU cores, 2 and 4 are as fast and take more memory; 16 is
            slower.
        block: Leaves of a block.
        sort_bits: Bits of the integers that are sorted. TPUs have no integers of 64 bits.
        lookup_numbers: Numbers of the rows that the gradients of a and b look up at once.
        lookup_seconds: Time of looking up one row, besides its traffic. On a TPU v5e XLA estimates
            7.0 ms for the response of 8 samples of 3136 × 784, which looks up 0.25 million rows.
        sequential: Whether samples are computed one after the other, because batched sorts and
            gathers are slow on CPU.
    """

    leaf: int = 8
    block: int = 32
    sort_bits: int = 64
    lookup_numbers: int = 1 << 26
    lookup_seconds: float = 0.0
    sequential: bool = False


SETTINGS = {
    "cpu": Settings(lookup_numbers=1 << 17, sequential=True),
    "gpu": Settings(),
    "rocm": Settings(),
    "tpu": Settings(sort_bits=32, lookup_seconds=2.7e-8),
}


def respond(operands: Operands, settings: Settings) -> Responses:
    """Computes 1/n Σ_j ReLU(a_i + b_j) g_j, in float32 or wider."""
    a, b = _project(operands)
    return _respond(a, b, definition.widen(operands.g), operands.key_mask, settings)


def respond_split(operands: Operands, settings: Settings, axis_name: str) -> Responses:
    """Computes the same with the projections b, one number a key, gathered instead of the keys."""
    a, b = _project(operands)
    key_mask, b, g = sharded.gather(axis_name, operands.key_mask, b[..., None], operands.g)
    return _respond(a, b[..., 0], definition.widen(g), key_mask, settings)


def _project(operands: Operands) -> tuple[Array, Array]:
    assert operands.w_f is not None
    return definition.project(operands.theta, operands.phi, operands.w_f)


def cost(sizes: Sizes, platform: str) -> Forecast:
    """Forecasts the matrix product of the prefix sums, and the lookups of each row."""
    batch, n, m, e = sizes.batch, sizes.n, sizes.m, sizes.e
    settings = SETTINGS[platform]
    # Multiply-adds for each number of a row: in the prefix sums, and when they are looked up.
    table = 2 * settings.block // settings.leaf + 2
    lookup = settings.leaf + 1
    forward = 2 * batch * e * (table * m + lookup * n)
    backward = 2 * batch * e * (table * (m + n) + 2 * lookup * (n + m))
    samples_at_once = 1 if settings.sequential else max(batch, 1)
    table_bytes = samples_at_once * e * sizes.item_bytes // 2
    temporary = (m * table_bytes, max(n, m) * table_bytes)
    moved = 6 * batch * (n + m) * e * sizes.item_bytes
    # What each pass over samples takes however small the arrays are: sorts and loops are started.
    overhead = 5e-5 * batch / samples_at_once
    lookups = batch * (settings.leaf + 1) * (4 * n + 3 * m)
    seconds = PLATFORMS[platform].seconds(forward + backward, moved) + overhead
    seconds += lookups * settings.lookup_seconds
    return Forecast((forward, backward), temporary, seconds)


def _respond(a: Array, b: Array, g: Array, key_mask: Array | None, settings: Settings) -> Responses:
    """Computes 1/n Σ_j ReLU(a_i + b_j) g_j over the n keys that are not masked.

    If a key's b is NaN or +∞, the definition has no finite response, and all responses of its
    sample are NaN.

    Args:
        a: w_θ · θ_i, (..., N).
        b: w_φ · φ_j, (..., M).
        g: The values (..., M, e), float32 or wider, 0 where a key is masked.
        key_mask: The mask (..., M) of bool, or None.
        settings: Sizes and loops.

    Returns:
        (..., N, e).
    """
    n = jnp.full(b.shape[:-1], b.shape[-1], b.dtype)
    if key_mask is not None:
        n = definition.number_of_keys(key_mask, b.dtype)
        b = jnp.where(key_mask, b, -jnp.inf)  # sorted to the end, and never kept
    # A NaN or +∞ is sorted to one end as well, where it could go unnoticed.
    undefined = jnp.any(jnp.isnan(b) | jnp.isposinf(b), axis=-1, keepdims=True)
    a = jnp.where(undefined, jnp.nan, a)
    batch = g.shape[:-2]
    samples = math.prod(batch)
    a, b, g, n = (x.reshape(samples, *x.shape[len(batch) :]) for x in (a, b, g, n))
    return _sum_of_kept(settings, a, b, g, n).reshape(*batch, a.shape[-1], g.shape[-1])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_of_kept(settings: Settings, a: Array, b: Array, g: Array, n: Array) -> Array:
    """Computes 1/n Σ_j ReLU(a_i + b_j) g_j of a (B, N), b (B, M), g (B, M, e) and n (B,)."""
    y, _ = _sum_of_kept_forward(settings, a, b, g, n)
    return y


def _sum_of_kept_forward(
    settings: Settings, a: Array, b: Array, g: Array, n: Array
) -> tuple[Array, tuple[Any, ...]]:
    samples_at_once = 1 if settings.sequential else a.shape[0]
    y, kept = map_samples(partial(_forward, settings), samples_at_once, a, b, g, n)
    return y, (a, b, g, n, *kept)


def _sum_of_kept_backward(
    settings: Settings, residuals: tuple[Any, ...], dy: Array
) -> tuple[Array, Array, Array, None]:
    samples_at_once = 1 if settings.sequential else dy.shape[0]
    da, db, dg = map_samples(partial(_backward, settings), samples_at_once, *residuals, dy)
    return da, db, dg, None


_sum_of_kept.defvjp(_sum_of_kept_forward, _sum_of_kept_backward)


class _Order(NamedTuple):
    """Rows in the order in which lookups keep them, padded by at least one leaf that is never kept.

    Attributes:
        values: a or b of the rows, (blocks, block, leaf).
        rows: Indices of the rows, (blocks, block, leaf).
    """

    values: Array
    rows: Array


class _PrefixSums(NamedTuple):
    """The sums C and F / n of the module's docstring, before each leaf.

    Attributes:
        r: The last value of each block, (blocks,).
        sums: (block · 2 · blocks, e). For each position of a leaf in its block: C of all blocks,
            then F / n of all blocks.
    """

    r: Array
    sums: Array


class _Lookup(NamedTuple):
    """Where the sums of the first `kept` rows are found, for each query.

    Attributes:
        block: Block of the first leaf that is not kept whole.
        c_row: Row of that leaf's C in `_PrefixSums.sums`.
        f_row: Row of its F / n.
        is_kept: Which rows of that leaf are kept, (queries, leaf − 1). The last row is kept only
            with the whole leaf.
        values: Their values.
        rows: Their indices.
    """

    block: Array
    c_row: Array
    f_row: Array
    is_kept: Array
    values: Array
    rows: Array


def _forward(
    settings: Settings, a: Array, b: Array, g: Array, n: Array
) -> tuple[Array, tuple[Any, ...]]:
    """Returns one sample's sum for a (N,), b (M,) and g (M, e), and its gradient's residuals."""
    keys = argsort(ordered_integers(-b), settings.sort_bits)
    descending = b[keys]
    real_keys = jnp.sum(~jnp.isneginf(b), dtype=jnp.int32)
    kept = jnp.minimum(count_below(-descending, a), real_keys)  # k_i
    order = _make_order(descending, keys, real_keys, settings)
    prefix_sums = _make_prefix_sums(order, g, n, settings)
    return _weighted_sum(order, prefix_sums, g, a, kept, n), (order, prefix_sums, kept, descending)


def _backward(
    settings: Settings,
    a: Array,
    b: Array,
    g: Array,
    n: Array,
    order: _Order,
    g_sums: _PrefixSums,
    kept: Array,
    descending: Array,
    dy: Array,
) -> tuple[Array, Array, Array]:
    """Returns one sample's gradients.

    With S_i the sum of g over the keys that i keeps, and T_j that of ȳ over the queries that keep
    j:

        ā_i = 1/n ȳ_i · S_i    b̄_j = 1/n T_j · g_j    ḡ_j = 1/n Σ_i ReLU(a_i + b_j) ȳ_i
    """
    # Queries that keep the most keys come first. These are integers of few bits, cheaper to sort
    # than a.
    excluded = (b.size - kept).astype(jnp.uint32)
    queries = argsort(excluded, settings.sort_bits, b.size.bit_length())
    # i keeps j if it keeps more keys than there are before j. Keys with equal b are kept together,
    # so the count of larger b stands for all of them.
    larger_keys = count_below(-descending, -b)
    kept_by = count_below(excluded[queries], (b.size - larger_keys).astype(jnp.uint32))
    keeping_queries = jnp.sum(kept > 0, dtype=jnp.int32)
    query_order = _make_order(a[queries], queries, keeping_queries, settings)
    dy_sums = _make_prefix_sums(query_order, dy, n, settings)
    return (
        _dots_with_sums(order, g_sums, g, kept, dy, settings) / n,
        _dots_with_sums(query_order, dy_sums, dy, kept_by, g, settings) / n,
        _weighted_sum(query_order, dy_sums, dy, b, kept_by, n),
    )


def _make_order(values: Array, rows: Array, kept_rows: Array, settings: Settings) -> _Order:
    """Cuts sorted rows into blocks and leaves; rows after the first `kept_rows` are never kept."""
    # Values of rows that are never kept may be infinite, and 0 · ∞ would be NaN in the matrix
    # product; any finite number will do in their place, and the last real one keeps the differences
    # small.
    last = values[jnp.maximum(kept_rows - 1, 0)]
    values = jnp.where(lax.iota(jnp.int32, values.size) < kept_rows, values, last)
    values = jnp.where(jnp.isneginf(values), 0, values)  # if no row is kept, the last one is −∞
    leaf = settings.leaf
    block = min(settings.block, values.size // leaf + 1)
    padding = (0, block * leaf - values.size % (block * leaf))
    values, rows = jnp.pad(values, padding, mode="edge"), jnp.pad(rows, padding)
    return _Order(values.reshape(-1, block, leaf), rows.reshape(-1, block, leaf))


def _make_prefix_sums(order: _Order, x: Array, n: Array, settings: Settings) -> _PrefixSums:
    """Computes the prefix sums of rows x (rows, e) before each leaf."""
    blocks, block, _ = order.rows.shape
    r = order.values[:, -1, -1]
    weights = (order.values - r[:, None, None]) / n
    # (block, leaf, 2, blocks), so that the sums within all blocks are one matrix product. Indices
    # are repeated for C and F rather than features, because XLA on CPU would store repeated
    # features.
    weights = jnp.stack([jnp.ones_like(weights), weights]).transpose(2, 3, 0, 1)
    rows = jnp.stack([order.rows, order.rows]).transpose(2, 3, 0, 1)

    def sum_leaves(weights_and_rows: tuple[Array, Array]) -> Array:
        sums = jnp.zeros((2, blocks, x.shape[1]), x.dtype)
        for weight, row in zip(*weights_and_rows, strict=True):
            sums += weight[..., None] * take(x, row)
        return sums

    # One position of a leaf after the other on CPU, where XLA would fuse the lookups into the
    # matrix product and look up number by number.
    batch_size = None if settings.sequential else block
    leaf_sums = lax.map(sum_leaves, (weights, rows), batch_size=batch_size)
    # Row i of this triangle sums the leaves before leaf i of a block; the last row sums a whole
    # block.
    leaves_before = jnp.tril(jnp.ones((block + 1, block), x.dtype), -1)
    block_sums = jnp.matmul(
        leaves_before, leaf_sums.reshape(block, -1), precision=lax.Precision.HIGHEST
    )
    block_sums = block_sums.reshape(block + 1, 2, blocks, -1)
    c = jnp.cumsum(_shift_down(block_sums[-1, 0]), axis=0)
    # F of a block is relative to its own r, so each step adds (previous r − r) C for the keys so
    # far. The first step's is 0, because C is.
    r_steps = ((_shift_down(r) - r) / n)[:, None]
    f = jnp.cumsum(_shift_down(block_sums[-1, 1]) + r_steps * c, axis=0)
    sums = block_sums[:-1] + jnp.stack([c, f])[None]
    return _PrefixSums(r, sums.reshape(-1, x.shape[1]))


def _shift_down(x: Array) -> Array:
    """Moves each row to the next place; the first row becomes 0."""
    return jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]])


def _look_up(order: _Order, kept: Array) -> _Lookup:
    blocks, block, leaf_size = order.rows.shape
    leaf = kept // leaf_size
    c_row = leaf % block * (2 * blocks) + leaf // block
    values = take(order.values.reshape(-1, leaf_size)[:, :-1], leaf)
    rows = take(order.rows.reshape(-1, leaf_size)[:, :-1], leaf)
    is_kept = lax.iota(jnp.int32, leaf_size - 1)[None] < (kept % leaf_size)[:, None]
    return _Lookup(leaf // block, c_row, c_row + blocks, is_kept, values, rows)


def _weighted_sum(
    order: _Order, prefix_sums: _PrefixSums, x: Array, offsets: Array, kept: Array, n: Array
) -> Array:
    """Computes 1/n times the sum of the first `kept` rows of x, weighted by offset + value."""
    lookup = _look_up(order, kept)
    offsets = jnp.where(kept > 0, offsets, 0)  # −∞ where nothing is kept, and −∞ · 0 is NaN
    weights = jnp.where(lookup.is_kept, (offsets[:, None] + lookup.values) / n, 0)
    y = take(prefix_sums.sums, lookup.f_row)
    c_weights = (offsets + take(prefix_sums.r, lookup.block)) / n
    y += c_weights[:, None] * take(prefix_sums.sums, lookup.c_row)
    return y + _sum_of_leaf(lookup, weights, x)


def _plain_sum(order: _Order, prefix_sums: _PrefixSums, x: Array, kept: Array) -> Array:
    """Computes the sum of the first `kept` rows of x."""
    lookup = _look_up(order, kept)
    y = take(prefix_sums.sums, lookup.c_row)
    return y + _sum_of_leaf(lookup, lookup.is_kept.astype(x.dtype), x)


def _sum_of_leaf(lookup: _Lookup, weights: Array, x: Array) -> Array:
    """Computes the weighted sum of the rows of each query's leaf."""
    # Row by row: XLA on CPU would store the looked-up rows of a batched product.
    columns = zip(weights.T, lookup.rows.T, strict=True)
    return sum(weight[:, None] * take(x, row) for weight, row in columns)


def _dots_with_sums(
    order: _Order, prefix_sums: _PrefixSums, x: Array, kept: Array, z: Array, settings: Settings
) -> Array:
    """Computes the dot product of each row of z with the sum of the first `kept` rows of x.

    A part of the rows at a time, so that few sums are in memory. There are at least two parts:
    without a loop XLA would store the looked-up rows of x to share them with `_weighted_sum`.
    """
    rows, width = z.shape
    part = min(max(settings.lookup_numbers // width, 1), -(-rows // 2))

    def add_part(i: Array | int, dots: Array) -> Array:
        start = jnp.minimum(
            i * part, rows - part
        )  # the last part may overlap with the previous one
        sums = _plain_sum(order, prefix_sums, x, lax.dynamic_slice_in_dim(kept, start, part))
        products = sums * lax.dynamic_slice_in_dim(z, start, part)
        # A product with ones rather than a sum: XLA on CPU fuses lookups into the operand of a
        # matrix product, but not into that of a reduction.
        unit_weights = jnp.ones(width, z.dtype)
        part_dots = jnp.matmul(products, unit_weights, precision=lax.Precision.HIGHEST)
        return lax.dynamic_update_slice_in_dim(dots, part_dots, start, axis=0)

    return lax.fori_loop(0, -(-rows // part), add_part, jnp.zeros(rows, z.dtype))


KERNEL = Kernel(
    name="sorted",
    instantiations=("concatenation",),
    respond=respond,
    cost=cost,
    settings=SETTINGS,
    respond_split=respond_split,
)
