"""The end of a residual block against ReLU(x + y), bit for bit."""

import chex
import jax
import jax.numpy as jnp
import pytest

from nonlocal_jax.layers.residual import relu_of_sum


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equals_the_relu_of_the_sum(dtype):
    x, branch, cotangent = (
        jax.random.normal(jax.random.key(0), (3, 7, 1000)) * jnp.array([1, 100, 1])[:, None, None]
    )
    branch = branch.at[0].set(-x[0]).at[1, :500].set(0)  # sums of exactly 0, and of x alone
    x, branch, cotangent = (a.astype(dtype) for a in (x, branch, cotangent))

    def run(f):
        y, transpose = jax.vjp(jax.jit(f), x, branch)
        return y, transpose(cotangent), jax.jvp(f, (x, branch), (cotangent, x))[1]

    ours, plain = run(relu_of_sum), run(lambda x, branch: jax.nn.relu(x + branch))
    assert 0.2 < jnp.mean(ours[0] > 0) < 0.8
    chex.assert_trees_all_equal_dtypes(ours, plain)
    chex.assert_trees_all_equal(ours, plain)


@pytest.mark.parametrize(
    ("x", "branch"),
    [(jnp.nan, 1), (1, jnp.nan), (jnp.inf, 1), (1, jnp.inf), (-jnp.inf, 1), (3e38, 3e38)],
)
def test_what_is_not_finite_stays_so(x, branch):
    x, branch = jnp.full((1, 1), x, jnp.float32), jnp.full((1, 1), branch, jnp.float32)
    chex.assert_trees_all_equal(relu_of_sum(x, branch), jax.nn.relu(x + branch))
