"""BatchNorm against Flax's: values, gradients, running statistics, masks, several devices."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variables import normal

import nonlocal_jax as nl
from nonlocal_jax.layers import BatchNorm, fold_batch_norm

X = normal((4, 3, 5, 7)) * np.arange(1, 8, dtype=np.float32) + 3
MASK = np.arange(5).reshape(1, 1, 5, 1) < 3
VARIABLES = {
    "params": {
        "scale": np.linspace(0.5, 2, 7, dtype=np.float32),
        "bias": np.linspace(-1, 1, 7, dtype=np.float32),
    },
    "batch_stats": {
        "mean": np.linspace(-2, 3, 7, dtype=np.float32),
        "var": np.linspace(0.3, 4, 7, dtype=np.float32),
    },
}


@functools.cache
def steps(norm):
    """Values, gradients and statistics, running or not, masked or not, in one program."""

    def run(params, x, running, mask):
        def loss(params, x):
            variables = {**VARIABLES, "params": params}
            y, state = norm.apply(variables, x, running, mask=mask, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(y.astype(jnp.float32))), (y, state)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)

    @jax.jit
    def run_all(params, x):
        cases = [(running, mask) for running in (False, True) for mask in (None, jnp.asarray(MASK))]
        return [run(params, x, running, mask) for running, mask in cases]

    return run_all(VARIABLES["params"], jnp.asarray(X, norm.dtype))


@pytest.mark.parametrize("case", range(4), ids=["batch", "masked", "running", "running masked"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize("fast", [False, True])
def test_equals_flax(case, dtype, tolerance, fast):
    ours = steps(BatchNorm(dtype=dtype, use_fast_variance=fast))[case]
    flax = steps(nn.BatchNorm(momentum=0.9, epsilon=1e-5, dtype=dtype))[case]
    chex.assert_trees_all_equal_dtypes(ours, flax)
    chex.assert_trees_all_close(ours, flax, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("affine", [True, False])
def test_the_same_variables_as_flax(affine):
    ours, flax = (
        norm(use_running_average=False, use_scale=affine, use_bias=affine).init(
            jax.random.key(0), jnp.asarray(X)
        )
        for norm in (BatchNorm, nn.BatchNorm)
    )
    chex.assert_trees_all_equal(ours, flax)


def test_statistics_over_devices():
    norm = BatchNorm(use_running_average=False, axis_name="devices")
    apply = jax.pmap(
        lambda x: norm.apply(VARIABLES, x, mutable=["batch_stats"]), axis_name="devices"
    )
    y, state = apply(X.reshape(4, 1, *X.shape[1:]))
    alone = BatchNorm(use_running_average=False)
    whole, expected = alone.apply(VARIABLES, jnp.asarray(X), mutable=["batch_stats"])
    chex.assert_trees_all_close(y.reshape(X.shape), whole, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(jax.tree.map(lambda a: a[0], state), expected, rtol=1e-5)


def test_a_mean_far_from_zero_costs_no_digits():
    x = jnp.asarray(1000 + normal((4, 64, 3)))
    variables = {
        "params": {"scale": jnp.ones(3), "bias": jnp.zeros(3)},
        "batch_stats": {"mean": jnp.zeros(3), "var": jnp.ones(3)},
    }
    norm = BatchNorm(use_running_average=False, momentum=0.0)
    y, state = norm.apply(variables, x, mutable=["batch_stats"])
    expected = np.var(np.asarray(x, np.float64), (0, 1))
    chex.assert_trees_all_close(state["batch_stats"]["var"], expected, rtol=1e-5)
    chex.assert_trees_all_close(jnp.std(y, (0, 1)), jnp.ones(3), rtol=1e-3)


def test_a_constant_channel_gives_its_bias():
    norm = BatchNorm(use_running_average=False)
    y, _ = norm.init_with_output(jax.random.key(0), jnp.full((8, 3), 1e3))
    chex.assert_trees_all_close(y, jnp.zeros((8, 3)), atol=1e-6)


def test_channels_are_last():
    with pytest.raises(ValueError, match="axis must be -1, channels last; got 1"):
        BatchNorm(axis=1, use_running_average=True).init(jax.random.key(0), jnp.asarray(X))


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_folding_equals_the_norm_and_keeps_the_kind_of_array(convert):
    params, statistics = (jax.tree.map(convert, VARIABLES[n]) for n in ("params", "batch_stats"))
    scale, bias = fold_batch_norm(**params, **statistics, epsilon=1e-5)
    assert isinstance(scale, type(convert(0.0)))
    assert scale.dtype == bias.dtype == jnp.float32
    y = BatchNorm(use_running_average=True).apply(VARIABLES, jnp.asarray(X))
    np.testing.assert_allclose(X * np.asarray(scale) + np.asarray(bias), y, rtol=1e-5, atol=1e-5)


class TestTrainingWithoutMutable:
    """A call in training that could not update the running statistics names what to pass."""

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nl.layers.nonlocal_block("dot_product", name="nonlocal")(x, train=train)

    def test_in_a_network(self):
        x = jnp.asarray(X)
        variables = self.Network().init(jax.random.key(0), x, train=False)
        expected = r'nonlocal/out_norm updates .*pass mutable=\["batch_stats"\] to apply'
        with pytest.raises(ValueError, match=expected):
            self.Network().apply(variables, x, train=True)
        with pytest.raises(ValueError, match=expected):
            self.Network().apply(variables, x, train=True, mutable=["intermediates"])
        self.Network().apply(variables, x, train=True, mutable=["batch_stats"])
        self.Network().apply(variables, x, train=True, mutable=True)
        self.Network().init(jax.random.key(0), x, train=True)

    def test_alone(self):
        with pytest.raises(ValueError, match="the norm updates its running statistics"):
            BatchNorm(use_running_average=False).apply(VARIABLES, jnp.asarray(X))
