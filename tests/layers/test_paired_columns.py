"""A first layer with two columns side by side equals the one with every column by itself."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nonlocal_jax.layers import strided_max_pool, video_conv
from nonlocal_jax.layers.norm import BatchNorm
from nonlocal_jax.layers.paired_columns import max_pool_of_paired, pair, unpair

PLATFORMS = ("cpu", "gpu", "tpu")
CLIP = (2, 5, 6, 12, 3)
close = functools.partial(chex.assert_trees_all_close, rtol=1e-4, atol=1e-4)


def normal(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def value_and_gradients(function, *operands):
    y, transpose = jax.vjp(function, *operands)
    return y, *transpose(jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))


@pytest.mark.parametrize("strides", [(2, 2, 2), (1, 2, 1)])
@pytest.mark.parametrize("kernel_size", [(5, 3, 7), (1, 3, 3)])
@pytest.mark.parametrize("platform", PLATFORMS)
def test_convolution(platform, kernel_size, strides):
    operands = normal(*CLIP), normal(*kernel_size, 3, 4)
    convolve = functools.partial(video_conv, strides=strides, platform=platform)
    paired = functools.partial(convolve, paired=True)
    expected = value_and_gradients(lambda x, kernel: pair(convolve(x, kernel)), *operands)
    close(jax.jit(functools.partial(value_and_gradients, paired))(*operands), expected)


def test_a_tpu_computes_both_columns_by_one_convolution():
    convolve = functools.partial(video_conv, strides=(2, 2, 2), platform="tpu", paired=True)
    text = jax.jit(convolve).lower(normal(*CLIP), normal(5, 7, 7, 3, 4)).as_text()
    assert "stride = [2, 4]" in text
    assert "-> tensor<6x3x3x8xf32>" in text  # 2 · 3 frames, 3 rows, 3 pairs of columns, 2 · 4


@pytest.mark.parametrize("use_fast_variance", [False, True])
def test_batch_norm(use_fast_variance):
    x, gamma, beta = normal(2, 3, 4, 6, 5), normal(5), 1 + normal(5)
    statistics = {"mean": jnp.zeros(5), "var": jnp.ones(5)}

    def train(paired, x, gamma, beta):
        norm = BatchNorm(
            use_running_average=False, use_fast_variance=use_fast_variance, paired=paired
        )
        variables = {"params": {"scale": gamma, "bias": beta}, "batch_stats": statistics}
        return norm.apply(variables, x, mutable=["batch_stats"])

    def paired(x, gamma, beta):
        y, updated = train(True, pair(x), gamma, beta)
        return unpair(y), updated

    def value_and_gradients(function):
        y, transpose, updated = jax.vjp(function, x, gamma, beta, has_aux=True)
        return y, updated, transpose(jnp.sin(y))

    close(value_and_gradients(paired), value_and_gradients(functools.partial(train, False)))


@pytest.mark.usefixtures("as_users_see_it")
def test_batch_norm_of_pairs_takes_no_mask():
    norm = BatchNorm(use_running_average=False, paired=True)
    with pytest.raises(ValueError, match="mask must be None for paired columns"):
        norm.init(jax.random.key(0), jnp.ones((2, 3, 4)), mask=jnp.ones((2, 3, 1), bool))


@pytest.mark.parametrize(
    ("window", "strides", "padding"),
    [
        ((3, 3, 3), (2, 2, 2), (1, 1, 1)),
        ((1, 3, 3), (1, 2, 2), (0, 0, 0)),
        ((2, 2, 2), (2, 2, 2), (0, 0, 0)),
        ((2, 3, 5), (1, 1, 2), (0, 1, 2)),
        ((2, 1, 1), (8, 1, 2), (0, 0, 0)),  # more phases than frames
    ],
)
@pytest.mark.parametrize("platform", PLATFORMS)
def test_max_pool(platform, window, strides, padding):
    x = normal(2, 4, 5, 6, 3) - 3  # negative, so that padding with 0 would be noticed

    def pool(x):
        return strided_max_pool(x, window, strides, padding)

    def pool_of_paired(x):
        return max_pool_of_paired(pair(x), window, strides, padding, platform)

    close(value_and_gradients(pool_of_paired, x), value_and_gradients(pool, x))


@pytest.mark.usefixtures("as_users_see_it")
def test_errors():
    x = jnp.ones((1, 2, 3, 2, 8))
    with pytest.raises(ValueError, match="stride of paired columns must be 2; got 1"):
        max_pool_of_paired(x, (1, 3, 3), (1, 2, 1), (0, 1, 1))
    with pytest.raises(ValueError, match=r"must not be larger than the padded map; got 9 for 4"):
        max_pool_of_paired(x, (1, 1, 9), (1, 1, 2), (0, 0, 1), platform="tpu")
    with pytest.raises(ValueError, match="paired columns must be even in number; got 5"):
        video_conv(jnp.ones((1, 2, 3, 10, 3)), jnp.ones((1, 3, 3, 3, 4)), (1, 1, 2), paired=True)


@pytest.mark.parametrize(("platform", "first"), [("cpu", (0, 1)), ("gpu", (0, 1)), ("tpu", (1, 0))])
def test_on_ties_the_first_row_or_on_tpus_the_first_column_wins(platform, first):
    x = jnp.array([[0.0, 1], [1, 0]]).reshape(1, 1, 2, 2, 1)

    def pooled_sum(x):
        return max_pool_of_paired(pair(x), (1, 2, 2), (1, 2, 2), (0, 0, 0), platform).sum()

    gradient = jax.grad(pooled_sum)(x)[0, 0, ..., 0]
    chex.assert_trees_all_equal(gradient, jnp.zeros((2, 2)).at[first].set(1.0))


@pytest.mark.parametrize("platform", PLATFORMS)
def test_on_ties_one_maximum_has_the_gradient(platform):
    def pooled_sum(x):
        return max_pool_of_paired(pair(x), (1, 3, 3), (1, 2, 2), (0, 1, 1), platform).sum()

    gradient = jax.grad(pooled_sum)(jnp.zeros((1, 1, 4, 4, 1)))
    expected = jnp.array([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    chex.assert_trees_all_equal(gradient[0, 0, ..., 0], expected)
