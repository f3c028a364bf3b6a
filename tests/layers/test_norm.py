"""BatchNorm against Flax's: values, gradients, running statistics, masks, several devices."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nonlocal_jax.layers import BatchNorm

X = jax.random.normal(jax.random.key(0), (4, 3, 5, 7)) * jnp.arange(1, 8.0).reshape(1, 1, 1, 7) + 3
MASK = jnp.arange(5).reshape(1, 1, 5, 1) < 3
VARIABLES = {
    "params": {"scale": jnp.linspace(0.5, 2, 7), "bias": jnp.linspace(-1, 1, 7)},
    "batch_stats": {"mean": jnp.linspace(-2, 3, 7), "var": jnp.linspace(0.3, 4, 7)},
}


def run(norm, running, mask, dtype):
    def loss(params, x):
        y, state = norm.apply(
            {**VARIABLES, "params": params}, x, running, mask=mask, mutable=["batch_stats"]
        )
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), (y, state)

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
        VARIABLES["params"], X.astype(dtype)
    )


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize("fast", [False, True])
def test_equals_flax(running, mask, dtype, tolerance, fast):
    ours = run(BatchNorm(dtype=dtype, use_fast_variance=fast), running, mask, dtype)
    flax = run(nn.BatchNorm(momentum=0.9, epsilon=1e-5, dtype=dtype), running, mask, dtype)
    chex.assert_trees_all_equal_dtypes(ours, flax)
    chex.assert_trees_all_close(ours, flax, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("affine", [True, False])
def test_the_same_variables_as_flax(affine):
    ours, flax = (
        kind(use_running_average=False, use_scale=affine, use_bias=affine).init(
            jax.random.key(0), X
        )
        for kind in (BatchNorm, nn.BatchNorm)
    )
    chex.assert_trees_all_equal(ours, flax)


def test_statistics_over_devices():
    norm = BatchNorm(use_running_average=False, axis_name="devices")
    apply = jax.pmap(
        lambda x: norm.apply(VARIABLES, x, mutable=["batch_stats"]), axis_name="devices"
    )
    y, state = apply(X.reshape(4, 1, *X.shape[1:]))
    whole, expected = BatchNorm(use_running_average=False).apply(
        VARIABLES, X, mutable=["batch_stats"]
    )
    chex.assert_trees_all_close(y.reshape(X.shape), whole, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(jax.tree.map(lambda a: a[0], state), expected, rtol=1e-5)


def test_a_mean_far_from_zero_costs_no_digits():
    x = 1000 + jax.random.normal(jax.random.key(0), (4, 64, 3))
    y, state = BatchNorm(use_running_average=False, momentum=0.0).apply(
        {
            "params": {"scale": jnp.ones(3), "bias": jnp.zeros(3)},
            "batch_stats": {"mean": jnp.zeros(3), "var": jnp.ones(3)},
        },
        x,
        mutable=["batch_stats"],
    )
    chex.assert_trees_all_close(
        state["batch_stats"]["var"], np.var(np.asarray(x, np.float64), (0, 1)), rtol=1e-5
    )
    chex.assert_trees_all_close(jnp.std(y, (0, 1)), jnp.ones(3), rtol=1e-3)


def test_a_constant_channel_gives_its_bias():
    y, _ = BatchNorm(use_running_average=False).init_with_output(
        jax.random.key(0), jnp.full((8, 3), 1e3)
    )
    chex.assert_trees_all_close(y, jnp.zeros((8, 3)), atol=1e-6)


def test_channels_are_last():
    with pytest.raises(ValueError, match="axis must be -1, channels last; got 1"):
        BatchNorm(axis=1, use_running_average=True).init(jax.random.key(0), X)
