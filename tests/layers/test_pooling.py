"""Max pooling equals Flax's in values and gradients, and gives ties to the first maximum."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nonlocal_jax.layers import max_pool, pool_mask, strided_max_pool


def normal(shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def assert_equal_with_gradients(x, pool, reference):
    def derivatives(function, x):
        y, transpose = jax.vjp(function, x)
        return y, transpose(jnp.sin(y))

    @jax.jit
    def run(x):
        return derivatives(pool, x), derivatives(reference, x)

    (y, gradient), (expected_y, expected_gradient) = run(x)
    chex.assert_trees_all_equal(y, expected_y)
    chex.assert_trees_all_close(gradient, expected_gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("positions", "window"),
    [
        ((7,), (2,)),
        ((601,), (300,)),  # more places than a byte can count
        ((5, 7), (2, 3)),
        ((5, 7, 11), (1, 2, 2)),
        ((4, 6, 2), (2, 3, 2)),
    ],
)
def test_equals_reduce_window(positions, window):
    assert_equal_with_gradients(
        normal((2, *positions, 3)),
        lambda x: max_pool(x, window),
        lambda x: nn.max_pool(x, window, strides=window),
    )


@pytest.mark.parametrize(
    ("positions", "window"), [((7,), (2,)), ((5, 7, 11), (1, 2, 2)), ((4, 6, 2), (2, 3, 2))]
)
def test_on_tpus_equals_reduce_window(positions, window):
    assert_equal_with_gradients(
        normal((2, *positions, 3)),
        lambda x: max_pool(x, window, platform="tpu"),
        lambda x: nn.max_pool(x, window, strides=window),
    )


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_on_ties_the_first_maximum_has_the_gradient(platform):
    """As in PyTorch. Rectified features have many ties."""

    def pool(x):
        return max_pool(x, (2, 2), platform=platform)

    x = jnp.array([[[0.0, 0, 2], [0, 0, 2], [1, 1, 0], [1, 1, 0]]])[..., None]
    gradient = jax.grad(lambda x: pool(x).sum())(x)
    expected = jnp.array([[1.0, 0, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]])
    chex.assert_trees_all_equal(gradient[0, ..., 0], expected)
    direction = jnp.arange(12.0).reshape(x.shape)
    tangent = jax.jvp(pool, (x,), (direction,))[1]
    chex.assert_trees_all_equal(tangent[0, ..., 0], jnp.array([[0.0], [6]]))


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_window_of_padding_is_zero_and_has_no_gradient(platform):
    def pooled_sum(x):
        return max_pool(x, (2,), mask, platform).sum()

    x = -jnp.ones((1, 4, 1))
    mask = jnp.array([[True, False, False, False]])
    pooled, gradient = jax.value_and_grad(pooled_sum)(x)
    assert pooled == -1.0
    chex.assert_trees_all_equal(gradient[0, :, 0], jnp.array([1.0, 0, 0, 0]))


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize("window", [(2,), (1, 2, 2), (6, 2), (0, 2)])
def test_bad_windows(window):
    message = r"window must have a size from 1 .* each axis of \(5, 7\); got \("
    with pytest.raises(ValueError, match=message):
        max_pool(jnp.ones((2, 5, 7, 3)), window)
    with pytest.raises(ValueError, match=message):
        pool_mask(jnp.ones((2, 5, 7), bool), window)


@pytest.mark.usefixtures("as_users_see_it")
def test_a_bad_mask():
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 5, 7\).*got \(2, 5\)"):
        max_pool(jnp.ones((2, 5, 7, 3)), (2, 2), jnp.ones((2, 5), bool))


@pytest.mark.parametrize(
    ("window", "strides", "padding"),
    [
        ((1, 3, 3), (1, 2, 2), (0, 1, 1)),
        ((1, 3, 3), (1, 2, 2), (0, 0, 0)),
        ((2, 3, 3), (2, 2, 2), (0, 0, 0)),
        ((3, 1, 1), (2, 1, 1), (1, 0, 0)),
        ((2, 1, 1), (2, 1, 1), (0, 0, 0)),
        ((1, 1, 1), (2, 2, 2), (0, 0, 0)),
        ((3, 3, 3), (1, 1, 1), (1, 1, 1)),
        ((2, 2, 2), (3, 3, 3), (1, 0, 1)),
        ((2, 1, 1), (8, 1, 1), (0, 0, 0)),  # a stride beyond the map
    ],
)
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_strided_equals_reduce_window(platform, window, strides, padding):
    x = normal((2, 5, 7, 10, 3)) - 3  # negative, so that padding with 0 would be noticed
    assert_equal_with_gradients(
        x,
        lambda x: strided_max_pool(x, window, strides, padding, platform=platform),
        lambda x: nn.max_pool(x, window, strides, [(n, n) for n in padding]),
    )


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_strided_on_ties_the_first_maximum_has_the_gradient(platform):
    def pooled_sum(x):
        return strided_max_pool(x, (3, 3), (2, 2), (1, 1), platform=platform).sum()

    gradient = jax.grad(pooled_sum)(jnp.zeros((1, 3, 3, 1)))
    expected = jnp.array([[1.0, 1, 0], [1, 1, 0], [0, 0, 0]])
    chex.assert_trees_all_equal(gradient[0, ..., 0], expected)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_strided_in_time_on_ties_the_first_frame_has_the_gradient(platform):
    def pool(x):
        return strided_max_pool(x, (3, 1, 1), (2, 1, 1), (1, 0, 0), platform=platform)

    x = jnp.array([1.0, 1, 2, 2, 0]).reshape(1, 5, 1, 1, 1)
    gradient = jax.grad(lambda x: pool(x).sum())(x)
    chex.assert_trees_all_equal(gradient.ravel(), jnp.array([1.0, 0, 1, 1, 0]))
    tangent = jax.jvp(pool, (x,), (jnp.arange(5.0).reshape(x.shape),))[1]
    chex.assert_trees_all_equal(tangent.ravel(), jnp.array([0.0, 2, 3]))


def test_strided_on_ties_across_rows_and_columns_the_first_row_wins():
    """Also where the first maximum is in a later column than the other one."""
    x = jnp.array([[[0.0, 1, 0], [1, 0, 0], [0, 0, 0]]])[..., None]
    gradient = jax.grad(lambda x: strided_max_pool(x, (3, 3), (1, 1), (0, 0)).sum())(x)
    expected = jnp.array([[0.0, 1, 0], [0, 0, 0], [0, 0, 0]])
    chex.assert_trees_all_equal(gradient[0, ..., 0], expected)


@pytest.mark.usefixtures("as_users_see_it")
def test_a_strided_window_larger_than_the_map():
    message = r"window must not be larger than the padded map; got 3 for 1 \+ 2·0"
    with pytest.raises(ValueError, match=message):
        strided_max_pool(jnp.ones((1, 4, 1, 2)), (3, 3), (2, 2), (1, 0))
