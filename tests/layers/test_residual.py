"""The end of a residual block equals ReLU(x + branch), bit for bit."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nonlocal_jax.layers.residual import relu_of_sum


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equals_the_relu_of_the_sum(dtype):
    arrays = np.random.default_rng(0).standard_normal((3, 3, 7, 1000))
    x, branch, cotangent = arrays * np.array([1, 100, 1])[:, None, None]
    branch[0] = -x[0]  # sums of exactly 0
    branch[1, :500] = 0  # x alone
    x, branch, cotangent = (jnp.asarray(array, dtype) for array in (x, branch, cotangent))

    def derivatives(function):
        y, transpose = jax.vjp(function, x, branch)
        return y, transpose(cotangent), jax.jvp(function, (x, branch), (cotangent, x))[1]

    fused = jax.jit(lambda: derivatives(lambda *pair: relu_of_sum(*pair, platform="cpu")))()
    plain = jax.jit(lambda: derivatives(lambda x, branch: jax.nn.relu(x + branch)))()
    assert 0.2 < jnp.mean(fused[0] > 0) < 0.8
    chex.assert_trees_all_equal_dtypes(fused, plain)
    chex.assert_trees_all_equal(fused, plain)


def test_values_that_are_not_finite_stay_so():
    inf, nan = np.inf, np.nan
    x = jnp.array([[nan, 1, inf, 1, -inf, 3e38]], jnp.float32)
    branch = jnp.array([[1, nan, 1, inf, 1, 3e38]], jnp.float32)
    y = relu_of_sum(x, branch, platform="cpu")
    chex.assert_trees_all_equal(y, jax.nn.relu(x + branch))
