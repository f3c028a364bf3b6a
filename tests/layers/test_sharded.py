"""Layers whose positions are split over devices equal those on one, values, statistics and gradients."""

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
        return model.apply(
            variables, x, mask=mask, train=train, mutable=["batch_stats", "intermediates"]
        )

    def run(variables, x, mask):
        specs = (P(), rows, None if mask is None else rows)
        out = (rows, {"batch_stats": P(), "intermediates": P()})

        def local(*args):
            z, changed = apply(*args)
            ratio = changed["intermediates"]["residual_ratio"][0]
            return z, {"batch_stats": changed.get("batch_stats", {}), "intermediates": ratio}

        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)(
            variables, x, mask
        )

    return run


def whole(model, train):
    def run(variables, x, mask):
        z, changed = model.apply(
            variables, x, mask=mask, train=train, mutable=["batch_stats", "intermediates"]
        )
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
    chex.assert_trees_all_equal(
        jax.jit(shared.init)(jax.random.key(3), x), variables
    )  # outside the map

    def both(run):
        def loss(params, x):
            z, rest = run({**variables, "params": params}, x, mask)
            return jnp.sum(z * cotangent), (z, rest)

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(variables["params"], x)

    got, expected = both(split(shared, True)), both(whole(alone, True))
    chex.assert_trees_all_equal_structs(got, expected)
    largest = max(
        float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected)
    )  # a bias before BatchNorm has no gradient
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-5 * largest)


def assert_equal_with_gradients(apply, x, *parameters, parts=4):
    """`apply` of x, parameters and the name of an axis, x split over devices, against the same on one."""
    mesh, rows = (
        jax.sharding.Mesh(np.array(jax.devices()[:parts]), ("positions",)),
        P(None, "positions"),
    )
    specs = (rows, *[P()] * len(parameters))
    split = jax.shard_map(
        lambda *args: apply(*args, "positions"),
        mesh=mesh,
        in_specs=specs,
        out_specs=rows,
        check_vma=False,
    )

    def both(run):
        y, transpose = jax.vjp(run, x, *parameters)
        return y, transpose(jax.random.normal(jax.random.key(9), y.shape))

    got, expected = (
        jax.jit(both, static_argnums=0)(run) for run in (split, lambda *args: apply(*args, None))
    )
    chex.assert_trees_all_equal_shapes(got, expected)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6 * largest)


@pytest.mark.parametrize(
    ("kernel", "strides", "groups"),
    [
        ((5, 3, 3, 3, 4), (2, 2, 2), 1),  # frames from one device ahead, and behind
        ((7, 1, 1, 6, 4), (1, 2, 2), 1),  # from two, where each holds two
        ((3, 3, 3, 3, 4), (1, 1, 1), 2),
        ((1, 3, 3, 6, 4), (2, 1, 1), 1),
    ],
    ids=str,
)
def test_a_convolution_takes_frames_from_its_neighbours(kernel, strides, groups):
    x = jax.random.normal(jax.random.key(0), (2, 8, 5, 4, kernel[3] * groups))
    w = jax.random.normal(jax.random.key(1), kernel)
    assert_equal_with_gradients(
        lambda x, w, axis_name: nl.layers.video_conv(x, w, strides, groups, axis_name), x, w
    )


@pytest.mark.parametrize(
    ("window", "strides", "padding"),
    [
        ((2, 1, 1), (2, 1, 1), (0, 0, 0)),
        ((3, 1, 1), (2, 1, 1), (1, 0, 0)),
        ((3, 3, 3), (2, 2, 2), (1, 1, 1)),
        ((1, 3, 3), (2, 2, 2), (0, 1, 1)),
        ((5, 1, 1), (1, 1, 1), (2, 0, 0)),
        ((6, 3, 3), (2, 2, 2), (2, 1, 1)),
    ],
    ids=str,
)
def test_a_pooling_takes_frames_from_its_neighbours(window, strides, padding):
    x = (
        jax.random.normal(jax.random.key(0), (2, 8, 5, 6, 3)) - 4
    )  # below 0, which is what a device without a neighbour receives
    assert_equal_with_gradients(
        lambda x, axis_name: nl.layers.strided_max_pool(x, window, strides, padding, axis_name), x
    )


@pytest.mark.usefixtures("as_users_see_it")
def test_windows_that_do_not_split_are_refused():
    message = r"'positions' must be a multiple of the stride.*got 2 positions, window 3, stride {}, padding {}"
    x, w = jnp.ones((2, 8, 3, 3, 2)), jnp.ones((3, 1, 1, 2, 2))
    with pytest.raises(ValueError, match=message.format(4, 1)):
        assert_equal_with_gradients(
            lambda x, w, axis_name: nl.layers.video_conv(x, w, (4, 1, 1), axis_name=axis_name), x, w
        )
    with pytest.raises(ValueError, match=message.format(1, 0)):
        assert_equal_with_gradients(
            lambda x, name: nl.layers.strided_max_pool(x, (3, 1, 1), (1, 1, 1), (0, 0, 0), name), x
        )


def test_a_device_of_nothing_but_padding():
    """Its keys do not count, nor do its positions in the statistics of BatchNorm."""
    x = jax.random.normal(jax.random.key(0), VIDEO)
    mask = jnp.ones(VIDEO[:-1], bool).at[:, 2:4].set(False)  # the second device's frames
    alone, shared = (
        nl.layers.nonlocal_block("dot_product", zero_init=False, **o)
        for o in ({}, {"axis_name": "positions"})
    )
    variables = jax.jit(alone.init)(jax.random.key(3), x)
    got, expected = (
        jax.jit(run)(variables, x, mask) for run in (split(shared, True), whole(alone, True))
    )
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_window_across_devices_is_refused():
    block = nl.layers.nonlocal_block("dot_product", subsample=(2, 1, 1), axis_name="positions")
    x = jnp.ones((1, 12, 4, 4, 5))  # three frames on each device
    variables = jax.eval_shape(
        nl.layers.nonlocal_block("dot_product", subsample=(2, 1, 1)).init, jax.random.key(0), x
    )
    with pytest.raises(
        ValueError, match=r"window \(2, 1, 1\) must divide the part .* of 'positions' holds; got 3"
    ):
        jax.eval_shape(split(block, False), variables, x, None)


def test_group_norm_with_a_mask_is_refused():
    norm = functools.partial(nn.GroupNorm, num_groups=1)
    alone, shared = (
        nl.layers.nonlocal_block("dot_product", norm=norm, **o)
        for o in ({}, {"axis_name": "positions"})
    )
    x = jnp.ones(VIDEO)
    variables = jax.eval_shape(alone.init, jax.random.key(0), x)
    with pytest.raises(ValueError, match="GroupNorm must have no mask where positions are split"):
        jax.eval_shape(split(shared, False), variables, x, jnp.ones(VIDEO[:-1], bool))
