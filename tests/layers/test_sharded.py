"""A block whose positions are split over devices equals the block on one, values, statistics and gradients."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import nonlocal_jax as nl
from nonlocal_jax.types import Instantiation

pytestmark = pytest.mark.skipif(len(jax.devices()) < 4, reason="four devices are absent")
VIDEO, IMAGE, SEQUENCE = (2, 8, 4, 6, 5), (2, 16, 6, 5), (2, 24, 5)


def split(model, train):
    """The model on (data, positions) = (1, 4) devices, the first position axis split."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("positions",))
    rows = P(None, "positions")

    def apply(variables, x, mask):
        return model.apply(variables, x, mask=mask, train=train, mutable=["batch_stats", "intermediates"])

    def run(variables, x, mask):
        specs = (P(), rows, None if mask is None else rows)
        out = (rows, {"batch_stats": P(), "intermediates": P()})

        def local(*args):
            z, changed = apply(*args)
            ratio = changed["intermediates"]["residual_ratio"][0]
            return z, {"batch_stats": changed.get("batch_stats", {}), "intermediates": ratio}

        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)(variables, x, mask)

    return run


def whole(model, train):
    def run(variables, x, mask):
        z, changed = model.apply(variables, x, mask=mask, train=train, mutable=["batch_stats", "intermediates"])
        ratio = changed["intermediates"]["residual_ratio"][0]
        return z, {"batch_stats": changed.get("batch_stats", {}), "intermediates": ratio}

    return run


CASES = [
    *((name, VIDEO, {}, False) for name in Instantiation.__args__),
    ("embedded_gaussian", VIDEO, {"preset": "caffe2", "norm": None}, True),
    ("embedded_gaussian", VIDEO, {"axes": "space"}, False),
    ("dot_product", VIDEO, {"axes": "time"}, True),
    ("concatenation", VIDEO, {"group_size": 2}, False),
    ("dot_product", IMAGE, {"norm": functools.partial(nn.GroupNorm, num_groups=1)}, False),
    ("concatenation", SEQUENCE, {"norm": None}, True),
]


@pytest.mark.parametrize(("name", "shape", "options", "masked"), CASES, ids=str)
def test_equals_one_device(name, shape, options, masked):
    options = {"preset": "paper", "zero_init": False, **options}
    x, cotangent = (jax.random.normal(jax.random.key(i), shape) for i in range(2))
    mask = jax.random.bernoulli(jax.random.key(2), 0.8, shape[:-1]) if masked else None
    alone = nl.layers.nonlocal_block(name, **options)
    variables = jax.jit(alone.init)(jax.random.key(3), x)
    shared = nl.layers.nonlocal_block(name, **options, axis_name="positions")
    chex.assert_trees_all_equal(jax.jit(shared.init)(jax.random.key(3), x), variables)  # outside the map

    def both(run):
        def loss(params, x):
            z, rest = run({**variables, "params": params}, x, mask)
            return jnp.sum(z * cotangent), (z, rest)

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(variables["params"], x)

    got, expected = both(split(shared, True)), both(whole(alone, True))
    chex.assert_trees_all_equal_structs(got, expected)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))  # a bias before BatchNorm has no gradient
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-5 * largest)


def test_a_device_of_nothing_but_padding():
    """Its keys do not count, nor do its positions in the statistics of BatchNorm."""
    x = jax.random.normal(jax.random.key(0), VIDEO)
    mask = jnp.ones(VIDEO[:-1], bool).at[:, 2:4].set(False)  # the second device's frames
    alone, shared = (nl.layers.nonlocal_block("dot_product", zero_init=False, **o) for o in ({}, {"axis_name": "positions"}))
    variables = jax.jit(alone.init)(jax.random.key(3), x)
    got, expected = (jax.jit(run)(variables, x, mask) for run in (split(shared, True), whole(alone, True)))
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_window_across_devices_is_refused():
    block = nl.layers.nonlocal_block("dot_product", subsample=(2, 1, 1), axis_name="positions")
    x = jnp.ones((1, 12, 4, 4, 5))  # three frames on each device
    variables = jax.eval_shape(nl.layers.nonlocal_block("dot_product", subsample=(2, 1, 1)).init, jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"window \(2, 1, 1\) must divide the part .* of 'positions' holds; got 3"):
        jax.eval_shape(split(block, False), variables, x, None)


def test_group_norm_with_a_mask_is_refused():
    norm = functools.partial(nn.GroupNorm, num_groups=1)
    alone, shared = (nl.layers.nonlocal_block("dot_product", norm=norm, **o) for o in ({}, {"axis_name": "positions"}))
    x = jnp.ones(VIDEO)
    variables = jax.eval_shape(alone.init, jax.random.key(0), x)
    with pytest.raises(ValueError, match="GroupNorm must have no mask where positions are split"):
        jax.eval_shape(split(shared, False), variables, x, jnp.ones(VIDEO[:-1], bool))
