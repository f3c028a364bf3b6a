"""The two Gaussians in tiles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.operands import assert_equal_to_dense, call, make_operands, registered, streaming_row

from nonlocal_jax.ops.kernels import streaming
from nonlocal_jax.ops.softmax_rows import Rows
from nonlocal_jax.ops.softmax_tiles import Tiles

BATCH, N, M, D, E = 3, 41, 29, 11, 7  # keys wider than values, as in a Gaussian block
AFFINITY_BYTES = BATCH * N * M * 4
VARIANTS = (
    streaming_row("storing", Tiles(rows=16, numbers=1, stored_bytes=AFFINITY_BYTES)),
    streaming_row("recomputing", Tiles(rows=16, numbers=1, stored_bytes=AFFINITY_BYTES - 1)),
    streaming_row("rows", Rows(numbers=1, least=16)),
)


@pytest.fixture(scope="module", autouse=True)
def variants():
    with registered(*VARIANTS):
        yield


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("implementation", ["storing", "recomputing", "rows"])
def test_equal_to_dense_whether_or_not_the_affinity_is_stored(implementation, masked):
    operands = make_operands(N, M, D, E, (BATCH,))
    operands["theta"] /= 2
    mask = jnp.ones((BATCH, M), bool).at[0, 3:].set(False).at[1].set(False) if masked else None
    assert_equal_to_dense("gaussian", implementation, operands, mask)


def test_an_affinity_is_stored_up_to_the_limit():
    operands = jax.eval_shape(lambda: make_operands(N, M, D, E, (BATCH,)))

    def residual_shapes(implementation):
        def pull_back(operands):
            return jax.vjp(lambda x: call("gaussian", implementation, x), operands)[1]

        return [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(pull_back, operands))]

    assert (BATCH, M, N) in residual_shapes("storing")
    assert (BATCH, M, N) not in residual_shapes("recomputing")


def test_the_default_limit_on_cpu_stores_a_few_megabytes():
    settings = streaming.SETTINGS
    assert settings["cpu"].stores_affinity(16 << 20)
    assert not settings["cpu"].stores_affinity((16 << 20) + 1)
    assert not settings["gpu"].stores_affinity(1)


def test_scale_has_a_gradient():
    operands = make_operands(N, M, D, E, (BATCH,))

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(scale, implementation):
        def loss(scale):
            return jnp.sum(
                jnp.sin(call("embedded_gaussian", implementation, operands, scale=scale))
            )

        return jax.grad(loss)(scale)

    expected = gradient(jnp.float32(0.3), "dense")
    for implementation in ("storing", "recomputing", "rows"):
        got = gradient(jnp.float32(0.3), implementation)
        np.testing.assert_allclose(got, expected, rtol=1e-4)
