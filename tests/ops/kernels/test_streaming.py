"""The two Gaussians in tiles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.operands import assert_equal_to_dense, call, make_operands, registered, streaming_row

from nonlocal_jax.ops.kernels import dense, streaming
from nonlocal_jax.ops.kernels.kernel import Sizes
from nonlocal_jax.ops.softmax_rows import Rows
from nonlocal_jax.ops.softmax_tiles import Tiles

BATCH, N, M, D, E = 3, 41, 29, 11, 7  # keys wider than values, as in a Gaussian block
AFFINITY_BYTES = BATCH * N * M * 4
VARIANTS = (
    streaming_row("storing", Tiles(rows=32, columns=16, numbers=1, stored_bytes=AFFINITY_BYTES)),
    streaming_row(
        "recomputing", Tiles(rows=32, columns=16, numbers=1, stored_bytes=AFFINITY_BYTES - 1)
    ),
    streaming_row("rows", Rows(numbers=1, least=16, alignment=16)),
    streaming_row("rows_of_8", Rows(numbers=1, least=8)),
    streaming_row("wider_gradients", Rows(numbers=1, least=8, gradient_least=24)),
    streaming_row("left_to_definition", Rows(numbers=N * M, leaves_small=True)),
)


@pytest.fixture(scope="module", autouse=True)
def variants():
    with registered(*VARIANTS):
        yield


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "implementation",
    ["storing", "recomputing", "rows", "rows_of_8", "wider_gradients", "left_to_definition"],
)
@pytest.mark.parametrize(("n", "m"), [(N, M), (M, N)])
def test_equal_to_dense_whether_or_not_the_affinity_is_stored(n, m, implementation, masked):
    operands = make_operands(n, m, D, E, (BATCH,))
    operands["theta"] /= 2
    mask = jnp.ones((BATCH, m), bool).at[0, 3:].set(False).at[1].set(False) if masked else None
    assert_equal_to_dense("gaussian", implementation, operands, mask)


@pytest.mark.parametrize(
    ("n", "m", "forward", "gradient"), [(N, M, (8, M), (24, M)), (M, N, (8, N), (M, 24))]
)
def test_a_gradient_takes_parts_of_the_longer_axis(n, m, forward, gradient):
    operands = make_operands(n, m, D, E, (BATCH,))

    def loss(operands):
        return call("gaussian", "wider_gradients", operands).sum()

    assert f"f32[{BATCH},{forward[0]},{forward[1]}]" in str(jax.make_jaxpr(loss)(operands))
    text = str(jax.make_jaxpr(jax.grad(loss))(operands))
    assert f"f32[{BATCH},{gradient[0]},{gradient[1]}]" in text
    assert f"f32[{BATCH},{n},{m}]" not in text


def test_padded_keys_add_nothing():
    """To gradients of queries whose logits are so low that exp(−λ) overflows."""
    operands = make_operands(3, 20, D, E, (BATCH,))
    operands["theta"] = 4 + operands["theta"]
    operands["phi"] = operands["phi"] - 4
    assert_equal_to_dense("gaussian", "rows_of_8", operands)


def test_an_affinity_is_stored_up_to_the_limit():
    operands = jax.eval_shape(lambda: make_operands(N, M, D, E, (BATCH,)))

    def residual_shapes(implementation):
        def pull_back(operands):
            return jax.vjp(lambda x: call("gaussian", implementation, x), operands)[1]

        return [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(pull_back, operands))]

    assert (BATCH, M, N) in residual_shapes("storing")
    assert (BATCH, M, N) not in residual_shapes("recomputing")
    assert (BATCH, N, M) not in residual_shapes("left_to_definition")
    assert (BATCH, N, M) in residual_shapes("dense")


def test_the_default_limit_on_cpu_stores_a_few_megabytes():
    settings = streaming.SETTINGS
    assert settings["cpu"].stores_affinity(16 << 20)
    assert not settings["cpu"].stores_affinity((16 << 20) + 1)
    assert not settings["gpu"].stores_affinity(1)


@pytest.mark.parametrize(
    ("n", "m", "channels", "left"),
    [
        (784, 196, 1024, True),
        (1024, 1024, 128, True),  # in two parts
        (128, 40000, 512, True),  # at once
        (3136, 784, 512, False),
        (12544, 12544, 512, False),
        (12544, 96, 512, True),  # the responses are larger than the affinity
    ],
)
def test_gpus_leave_small_affinities_to_the_definition(n, m, channels, left):
    assert streaming.SETTINGS["gpu"].leaves_to_definition(n, m, channels) == left
    for platform in ("cpu", "tpu"):
        assert not streaming.SETTINGS[platform].leaves_to_definition(n, m, channels)


@pytest.mark.parametrize(
    ("alignment", "n", "m", "expected"),
    [
        (8, 4200, 4200, 120),
        (16, 4200, 4200, 128),  # 16 does not divide 4200, so it is padded
        (8, 3136, 784, 448),
        (8, 12544, 12544, 128),
        (8, 37, 12544, 37),
        (8, 1201, 1201, 408),
    ],
)
def test_queries_at_once(alignment, n, m, expected):
    assert Rows(numbers=1 << 19, alignment=alignment).queries_at_once(n, m) == expected


def test_the_forecast_is_the_definitions_where_it_computes():
    small = Sizes("gaussian", 8, 784, 196, 512, 512, jnp.bfloat16, masked=False)
    large = small._replace(n=12544, m=12544)
    assert streaming.cost(small, "gpu") == dense.cost(small, "gpu")
    assert streaming.cost(large, "gpu").temporary[1] < dense.cost(large, "gpu").temporary[1] / 4


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
    for implementation in ("storing", "recomputing", "rows", "left_to_definition"):
        got = gradient(jnp.float32(0.3), implementation)
        np.testing.assert_allclose(got, expected, rtol=1e-4)
