"""Layers whose positions are split over devices equal those on one device.

Values, statistics and gradients are compared.
"""

import functools

import chex
import compiled
import convolution_oracle
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
ROWS = P(None, "positions")


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def split_over_devices(function, in_specs, out_specs):
    """Maps a function over four devices, each with a part of the first position axis."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("positions",))
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def whole(model, train):
    """The model on one device: z, batch statistics and the residual ratio."""

    def run(variables, x, mask):
        z, updated = model.apply(
            variables, x, mask=mask, train=train, mutable=["batch_stats", "intermediates"]
        )
        ratio = updated["intermediates"]["residual_ratio"][0]
        return z, updated.get("batch_stats", {}), ratio

    return run


def split(model, train):
    """The same on four devices."""

    def run(variables, x, mask):
        in_specs = (P(), ROWS, None if mask is None else ROWS)
        mapped = split_over_devices(whole(model, train), in_specs, (ROWS, P(), P()))
        return mapped(variables, x, mask)

    return run


def assert_close(results, expected, relative_to_largest):
    """Compares trees, since a bias before BatchNorm has a gradient of rounding errors alone."""
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    chex.assert_trees_all_close(results, expected, rtol=1e-5, atol=relative_to_largest * largest)


@pytest.mark.parametrize(
    ("name", "shape", "options", "is_masked"),
    [
        *((name, VIDEO, {}, False) for name in Instantiation.__args__),
        ("embedded_gaussian", VIDEO, {"preset": "caffe2", "norm": None}, True),
        ("embedded_gaussian", VIDEO, {"axes": "space"}, False),
        ("dot_product", VIDEO, {"axes": "time"}, True),
        ("concatenation", VIDEO, {"group_size": 2}, False),
        ("dot_product", IMAGE, {"norm": functools.partial(nn.GroupNorm, num_groups=1)}, False),
        ("concatenation", SEQUENCE, {"norm": None}, True),
    ],
    ids=str,
)
def test_equals_one_device(name, shape, options, is_masked):
    options = {"preset": "paper", "zero_init": False, **options}
    x, cotangent = normal(shape), normal(shape, seed=1)
    mask = np.random.default_rng(2).random(shape[:-1]) < 0.8 if is_masked else None
    block = nl.layers.nonlocal_block(name, **options)
    split_block = nl.layers.nonlocal_block(name, **options, axis_name="positions")
    # Parameters are initialised outside of the mapped function.
    initialize = jax.jit(lambda key, x: (block.init(key, x), split_block.init(key, x)))
    variables, split_variables = initialize(jax.random.key(3), x)
    chex.assert_trees_all_equal(split_variables, variables)

    def gradients(run):
        def loss(params, x, mask):
            z, *updated = run({**variables, "params": params}, x, mask)
            return jnp.sum(z * cotangent), (z, *updated)

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(variables["params"], x, mask)

    results, expected = gradients(split(split_block, True)), gradients(whole(block, True))
    chex.assert_trees_all_equal_structs(results, expected)
    assert_close(results, expected, 1e-5)


@pytest.mark.parametrize(
    ("kernel_size", "channels", "strides", "groups"),
    [
        ((5, 3, 3), 3, (2, 2, 2), 1),  # frames from one device ahead and one behind
        ((7, 1, 1), 6, (1, 2, 2), 1),  # from two, because each holds two frames
        ((3, 3, 3), 6, (1, 1, 1), 2),
        ((1, 3, 3), 6, (2, 1, 1), 1),
    ],
    ids=str,
)
def test_a_convolution_takes_frames_from_its_neighbours(kernel_size, channels, strides, groups):
    x, kernel = convolution_oracle.arrays(kernel_size, channels, 4, groups, (8, 5, 4))

    def convolve(x, kernel):
        return nl.layers.video_conv(x, kernel, strides, groups, "positions")

    @jax.jit
    def run(x, kernel):
        y, transpose = jax.vjp(split_over_devices(convolve, (ROWS, P()), ROWS), x, kernel)
        return y, transpose(jnp.sin(y))

    y = convolution_oracle.convolution(x, kernel, strides, groups)
    gradients = convolution_oracle.gradients(x, kernel, np.sin(y), strides, groups)
    assert_close(run(x, kernel), (y, gradients), 1e-6)


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
    x = normal((2, 8, 5, 6, 3)) - 4  # below 0, which a device without a neighbour receives

    def gradients(axis_name):
        def pool(x):
            return nl.layers.strided_max_pool(x, window, strides, padding, axis_name)

        @jax.jit
        def run(x):
            y, transpose = jax.vjp(split_over_devices(pool, ROWS, ROWS) if axis_name else pool, x)
            return y, transpose(jnp.sin(y))

        return run(x)

    assert_close(gradients("positions"), gradients(None), 1e-6)


def numbers_communicated(function, *operands):
    """Returns the numbers that each kind of collective returns on a device."""
    program = compiled.program(jax.jit(function).lower(*operands))
    return {collective.opcode: collective.bytes / 4 for collective in program.collectives()}


@pytest.mark.parametrize(
    ("kernel_size", "strides", "frames", "positions"),
    [
        ((5, 3, 3), (2, 2, 2), 2 + 1, 6 * 10),
        ((3, 1, 1), (1, 2, 2), 1 + 1, 3 * 5),  # not those that the strides skip
        ((1, 3, 3), (1, 1, 1), 0, 0),
    ],
    ids=str,
)
def test_a_convolution_takes_only_the_frames_at_the_borders(
    kernel_size, strides, frames, positions
):
    x, kernel = jnp.ones((2, 8, 6, 10, 3)), jnp.ones((*kernel_size, 3, 7))

    def convolve(x, kernel):
        return nl.layers.video_conv(x, kernel, strides, axis_name="positions")

    function = split_over_devices(convolve, (ROWS, P()), ROWS)
    numbers = numbers_communicated(function, x, kernel)
    halo = 2 * frames * positions * 3
    assert numbers == ({"collective-permute": halo} if halo else {})


def test_a_pooling_takes_frames_that_are_pooled_in_space():
    def pool(x):
        return nl.layers.strided_max_pool(x, (3, 3, 3), (2, 2, 2), (1, 1, 1), "positions")

    numbers = numbers_communicated(split_over_devices(pool, ROWS, ROWS), jnp.ones((2, 8, 6, 10, 3)))
    assert numbers == {"collective-permute": 2 * 1 * 3 * 5 * 3}


def test_a_block_communicates_only_what_its_operation_and_its_norm_need():
    samples, *_, channels = VIDEO
    block = nl.layers.nonlocal_block("dot_product", axis_name="positions")
    x = jnp.ones(VIDEO)
    variables = jax.eval_shape(block.init, jax.random.key(0), x)

    def apply(variables, x):
        return block.apply(variables, x, train=True, mutable=["batch_stats"])

    function = split_over_devices(apply, (P(), ROWS), (ROWS, P()))

    def gradients(variables, x, cotangent):
        def train(params, x):
            return function({**variables, "params": params}, x)

        z, pull_back, updated = jax.vjp(train, variables["params"], x, has_aux=True)
        return z, updated, pull_back(cotangent)

    matrix = samples * (channels // 2) ** 2  # Σ_j φ_j g_jᵀ
    statistics = 2 * channels  # mean and variance, or the sums of their gradients
    params = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    forward = matrix + statistics
    assert numbers_communicated(function, variables, x) == {"all-reduce": forward}
    numbers = numbers_communicated(gradients, variables, x, x)
    assert numbers == {"all-reduce": 2 * forward + params}


def strided_conv(x):
    kernel = np.ones((3, 1, 1, 2, 2), np.float32)
    return nl.layers.video_conv(x, kernel, (4, 1, 1), 1, "positions")


def unpadded_pool(x):
    return nl.layers.strided_max_pool(x, (3, 1, 1), (1, 1, 1), (0, 0, 0), "positions")


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize(
    ("operation", "stride", "padding"), [(strided_conv, 4, 1), (unpadded_pool, 1, 0)]
)
def test_windows_that_do_not_split_are_refused(operation, stride, padding):
    x = jax.ShapeDtypeStruct((2, 8, 3, 3, 2), jnp.float32)
    message = (
        r"'positions' must be a multiple of the stride.*"
        rf"got 2 positions, window 3, stride {stride}, padding {padding}"
    )
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(split_over_devices(operation, ROWS, ROWS), x)


def pair_of_blocks(**options):
    """A block on one device, and the same one over devices."""
    return [
        nl.layers.nonlocal_block("dot_product", **options, axis_name=axis_name)
        for axis_name in (None, "positions")
    ]


def test_a_device_with_nothing_but_padding():
    """Its keys and positions are ignored, also in the statistics of BatchNorm."""
    x = normal(VIDEO)
    mask = np.ones(VIDEO[:-1], bool)
    mask[:, 2:4] = False  # the frames of the second device
    block, split_block = pair_of_blocks(zero_init=False)
    variables = jax.jit(block.init)(jax.random.key(3), x)
    results = jax.jit(split(split_block, True))(variables, x, mask)
    expected = jax.jit(whole(block, True))(variables, x, mask)
    chex.assert_trees_all_close(results, expected, rtol=1e-5, atol=1e-5)


def test_a_window_across_devices_is_refused():
    block, split_block = pair_of_blocks(subsample=(2, 1, 1))
    x = jax.ShapeDtypeStruct((1, 12, 4, 4, 5), jnp.float32)  # three frames on each device
    variables = jax.eval_shape(block.init, jax.random.key(0), x)
    message = r"window \(2, 1, 1\) must divide the part .* of 'positions' holds; got 3"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(split(split_block, False), variables, x, None)


def test_group_norm_with_a_mask_is_refused():
    block, split_block = pair_of_blocks(norm=functools.partial(nn.GroupNorm, num_groups=1))
    x = jax.ShapeDtypeStruct(VIDEO, jnp.float32)
    mask = jax.ShapeDtypeStruct(VIDEO[:-1], bool)
    variables = jax.eval_shape(block.init, jax.random.key(0), x)
    with pytest.raises(ValueError, match="GroupNorm must have no mask where positions are split"):
        jax.eval_shape(split(split_block, False), variables, x, mask)
