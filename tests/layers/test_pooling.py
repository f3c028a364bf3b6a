"""Max pooling against Flax's, values and gradients."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from nonlocal_jax.layers import max_pool, pool_mask, strided_max_pool


@pytest.mark.parametrize(
    ("positions", "window"),
    [
        ((7,), (2,)),
        ((601,), (300,)),
        ((5, 7), (2, 3)),
        ((5, 7, 11), (1, 2, 2)),
        ((4, 6, 2), (2, 3, 2)),
    ],
)
def test_equals_reduce_window(positions, window):
    x = jax.random.normal(jax.random.key(0), (2, *positions, 3))

    def loss(pool):
        return lambda x: jnp.sum(jnp.sin(pool(x)))

    ours, flax = lambda x: max_pool(x, window), lambda x: nn.max_pool(x, window, strides=window)
    chex.assert_trees_all_equal(ours(x), flax(x))
    chex.assert_trees_all_close(jax.grad(loss(ours))(x), jax.grad(loss(flax))(x))


def test_of_several_largest_the_first_has_the_gradient():
    """As PyTorch's; rectified features have many."""
    x = jnp.array([[[0.0, 0, 2], [0, 0, 2], [1, 1, 0], [1, 1, 0]]])[..., None]
    gradient = jax.grad(lambda x: max_pool(x, (2, 2)).sum())(x)
    chex.assert_trees_all_equal(
        gradient[0, ..., 0], jnp.array([[1.0, 0, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]])
    )
    tangent = jax.jvp(lambda x: max_pool(x, (2, 2)), (x,), (jnp.arange(12.0).reshape(x.shape),))[1]
    chex.assert_trees_all_equal(tangent[0, ..., 0], jnp.array([[0.0], [6]]))


def test_a_window_of_padding_alone_is_zero_and_has_no_gradient():
    x = -jnp.ones((1, 4, 1))
    mask = jnp.array([[True, False, False, False]])
    pooled, gradient = jax.value_and_grad(lambda x: max_pool(x, (2,), mask).sum())(x)
    assert pooled == -1.0
    chex.assert_trees_all_equal(gradient[0, :, 0], jnp.array([1.0, 0, 0, 0]))


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize("window", [(2,), (1, 2, 2), (6, 2), (0, 2)])
def test_bad_windows(window):
    with pytest.raises(
        ValueError, match=r"window must have a size from 1 .* each axis of \(5, 7\); got \("
    ):
        max_pool(jnp.ones((2, 5, 7, 3)), window)
    with pytest.raises(ValueError, match=r"window must have a size"):
        pool_mask(jnp.ones((2, 5, 7), bool), window)


@pytest.mark.usefixtures("as_users_see_it")
def test_a_bad_mask():
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 5, 7\).*got \(2, 5\)"):
        max_pool(jnp.ones((2, 5, 7, 3)), (2, 2), jnp.ones((2, 5), bool))


@pytest.mark.parametrize(
    ("window", "strides", "padding"),
    [
        ((1, 3, 3), (1, 2, 2), (0, 1, 1)), ((1, 3, 3), (1, 2, 2), (0, 0, 0)), ((2, 3, 3), (2, 2, 2), (0, 0, 0)),
        ((3, 1, 1), (2, 1, 1), (1, 0, 0)), ((2, 1, 1), (2, 1, 1), (0, 0, 0)), ((1, 1, 1), (2, 2, 2), (0, 0, 0)),
        ((3, 3, 3), (1, 1, 1), (1, 1, 1)), ((2, 2, 2), (3, 3, 3), (1, 0, 1)),
    ],
)  # fmt: skip
def test_strided_equals_reduce_window(window, strides, padding):
    x = (
        jax.random.normal(jax.random.key(0), (2, 5, 7, 10, 3)) - 3
    )  # negative, so that padding must not be 0

    def flax(x):
        return nn.max_pool(x, window, strides, [(n, n) for n in padding])

    def ours(x):
        return strided_max_pool(x, window, strides, padding)

    chex.assert_trees_all_equal(ours(x), flax(x))
    gradients = [jax.grad(lambda x, f=f: jnp.sum(jnp.sin(f(x))))(x) for f in (ours, flax)]
    chex.assert_trees_all_close(*gradients, rtol=1e-6, atol=1e-6)


def test_strided_of_several_largest_the_first_has_the_gradient():
    gradient = jax.grad(lambda x: strided_max_pool(x, (3, 3), (2, 2), (1, 1)).sum())(
        jnp.zeros((1, 3, 3, 1))
    )
    chex.assert_trees_all_equal(gradient[0, ..., 0], jnp.array([[1.0, 1, 0], [1, 1, 0], [0, 0, 0]]))


@pytest.mark.usefixtures("as_users_see_it")
def test_a_strided_window_larger_than_the_map():
    with pytest.raises(
        ValueError, match=r"window must not be larger than the padded map; got 3 for 1 \+ 2·0"
    ):
        strided_max_pool(jnp.ones((1, 4, 1, 2)), (3, 3), (2, 2), (1, 0))
