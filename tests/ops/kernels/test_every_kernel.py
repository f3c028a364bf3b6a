"""What every fast kernel must do: equal the definition, also where it works in several parts."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.operands import (
    assert_equal_to_dense,
    make_operands,
    registered,
    respond,
    row_of_platform,
    sorted_row,
    streaming_row,
    value_and_gradients,
)

from nonlocal_jax.ops.kernels import reassociated, sorted_keys, streaming
from nonlocal_jax.ops.softmax_rows import Rows
from nonlocal_jax.ops.softmax_tiles import Tiles

BATCH, N, M, D, E = 3, 41, 29, 5, 34

# Tiles, leaves and blocks so small that all loops run and everything is padded at a test's sizes.
VARIANTS = (
    streaming_row("streaming_small", Tiles(rows=32, columns=16, numbers=1, stored_bytes=0)),
    streaming_row("streaming_recomputed", Tiles(stored_bytes=0)),
    streaming_row("streaming_small_rows", Rows(numbers=1, least=16)),
    streaming_row("streaming_small_sums", Rows(numbers=1, sums_by_product=True, least=16)),
    row_of_platform(streaming.KERNEL, "gpu"),
    row_of_platform(streaming.KERNEL, "tpu"),
    sorted_row("sorted_small", leaf=2, block=3, lookup_numbers=7 * E),
    row_of_platform(sorted_keys.KERNEL, "gpu"),
    row_of_platform(sorted_keys.KERNEL, "tpu"),
    row_of_platform(reassociated.KERNEL, "gpu"),
)

FAST = [
    ("embedded_gaussian", "streaming"),
    ("dot_product", "reassociated"),
    ("concatenation", "sorted"),
]
parametrize_kernel = pytest.mark.parametrize(
    ("instantiation", "implementation"),
    [
        *FAST,
        ("embedded_gaussian", "streaming_recomputed"),
        ("embedded_gaussian", "streaming_gpu"),
        ("embedded_gaussian", "streaming_tpu"),
        ("dot_product", "reassociated_gpu"),
        ("concatenation", "sorted_gpu"),
        ("concatenation", "sorted_tpu"),
    ],
)
parametrize_parts = pytest.mark.parametrize(
    ("instantiation", "implementation"),
    [
        ("embedded_gaussian", "streaming_small"),
        ("embedded_gaussian", "streaming_small_rows"),
        ("embedded_gaussian", "streaming_small_sums"),
        ("dot_product", "reassociated"),
        ("concatenation", "sorted_small"),
    ],
)

make_operands = functools.partial(make_operands, d=D, e=E)


@pytest.fixture(scope="module", autouse=True)
def variants():
    with registered(*VARIANTS):
        yield


@parametrize_parts
@pytest.mark.parametrize(
    ("n", "m", "masked"), [(N, M, False), (M, N, True), (32, 16, False), (1, 2, False)]
)
def test_equal_to_dense_in_many_parts(instantiation, implementation, n, m, masked):
    mask = jnp.asarray(np.random.default_rng(5).random((BATCH, m)) < 0.6) if masked else None
    operands = make_operands(n, m, batch=(BATCH,))
    assert_equal_to_dense(instantiation, implementation, operands, mask)


@pytest.mark.gpu
@parametrize_kernel
def test_equal_to_dense_at_the_sizes_of_a_network(instantiation, implementation):
    """Several tiles and blocks of the sizes that are used."""
    operands = make_operands(1100, 300, d=16, e=48, batch=(2,))
    operands |= {"w_f": jnp.linspace(-1, 1, 32) / 4, "theta": operands["theta"] / 4}
    assert_equal_to_dense(instantiation, implementation, operands)


@parametrize_parts
def test_without_a_batch_and_under_vmap(instantiation, implementation):
    operands = make_operands(N, M, batch=(BATCH,))
    function = functools.partial(respond, instantiation, implementation)
    axes = {name: None if name == "w_f" else 0 for name in operands}
    y = jax.jit(jax.vmap(function, in_axes=(axes,)))(operands)
    chex.assert_trees_all_close(y, function(operands), rtol=1e-5, atol=1e-6)
    empty_batch = jax.eval_shape(lambda: make_operands(N, M, batch=(0,)))
    chex.assert_shape(jax.eval_shape(function, empty_batch), (0, N, E))


def relative_error(y, expected):
    return np.linalg.norm(np.asarray(y, np.float64) - expected) / np.linalg.norm(expected)


@pytest.mark.gpu
@parametrize_kernel
@pytest.mark.parametrize(("dtype", "factor"), [(jnp.float32, 2.0), (jnp.bfloat16, 1.5)])
def test_errors_against_float64_are_those_of_dense(instantiation, implementation, dtype, factor):
    if implementation == "streaming_tpu" and dtype == jnp.float32:
        factor = 2.5  # CPUs sum a product's terms one after the other, and a sum's pairwise
    operands = make_operands(2500, 1300, d=8, e=16, batch=(), dtype=dtype)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), operands)
        expected = jax.tree.map(np.asarray, value_and_gradients(instantiation, "dense", wide))
    fast = value_and_gradients(instantiation, implementation, operands)
    dense = value_and_gradients(instantiation, "dense", operands)
    for name in ("y", "theta", "phi", "g"):
        limit = factor * relative_error(dense[name], expected[name]) + 1e-7
        assert relative_error(fast[name], expected[name]) <= limit, name


def test_values_in_float32_are_not_rounded():
    """Of a dot product on a GPU, also where θ and φ are in half precision."""
    operands = make_operands(N, M, batch=(BATCH,))
    operands |= {name: operands[name].astype(jnp.bfloat16) for name in ("theta", "phi")}
    fast, dense = (respond("dot_product", name, operands) for name in ("reassociated_gpu", "dense"))
    chex.assert_type(fast, jnp.float32)
    assert relative_error(fast, np.asarray(dense, np.float64)) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize(("instantiation", "implementation"), FAST)
def test_memory_grows_with_positions_rather_than_pairs(instantiation, implementation):
    """At 4,096 × 4,096 the affinity would be 64 MiB; even the gradient stays far below."""
    operands = jax.eval_shape(lambda: make_operands(4096, 4096, d=16, e=16, batch=(1,)))
    compiled = value_and_gradients.lower(instantiation, implementation, operands).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 24 << 20
