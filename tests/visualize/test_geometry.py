"""Receptive fields equal those that NaNs measure, index by index; obstacles are named."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from visualize.networks import random_variables

import nonlocal_jax as nl
from nonlocal_jax.layers import NonLocalBlock, VideoConv
from nonlocal_jax.models.toy_video import ToyVideoNet
from nonlocal_jax.visualize import GeometryError, affinities, to_pixels
from nonlocal_jax.visualize.geometry import pixels_of
from nonlocal_jax.visualize.tracing import geometries


def geometry_of(model, shape, block="block"):
    """Returns the geometry of a block from shapes alone."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    return geometries(model.apply, variables, x)[block]


def reached_by_nan(model, shape, block):
    """Returns, for each axis, which input indices (rows) reach which indices of the block's input.

    Each clip of a batch is NaN at one index of one axis and 1 elsewhere; every output that depends
    on such an input becomes NaN, whatever the weights. Other blocks are left out.
    """

    def plain(call, args, kwargs, context):
        module = context.module
        if isinstance(module, VideoConv):
            # The tiles of the fast CPU forms would spread a NaN over a whole tile.
            kernel = module.variables["params"]["kernel"]
            padding = [(size // 2, size // 2) for size in module.kernel_size]
            layouts = ("NDHWC", "DHWIO", "NDHWC")
            options = {"dimension_numbers": layouts, "feature_group_count": module.groups}
            return jax.lax.conv_general_dilated(args[0], kernel, module.strides, padding, **options)
        if isinstance(module, NonLocalBlock):
            found["/".join(module.path)] = args[0]
            return (args[0], None) if kwargs.get("return_map") else args[0]
        return call(*args, **kwargs)

    found = {}
    size = shape[1:-1]
    clips = np.ones((sum(size), *size, shape[-1]), np.float32)
    slabs = [(axis, index) for axis, length in enumerate(size) for index in range(length)]
    for clip, (axis, index) in zip(clips, slabs, strict=True):
        clip[(slice(None),) * axis + (index,)] = np.nan
    variables = random_variables(model, jax.ShapeDtypeStruct(shape, jnp.float32))

    @jax.jit  # what comes after the block is never computed
    def reached(clips):
        with nn.intercept_methods(plain):
            model.apply(variables, clips)
        return jnp.isnan(found[block]).any(axis=-1)

    masks = np.asarray(reached(clips))
    starts = np.cumsum([0, *size])
    reach = []
    for axis, length in enumerate(size):
        others = tuple(1 + i for i in range(len(size)) if i != axis)
        reach.append(masks[starts[axis] : starts[axis] + length].any(axis=others))
    return reach


def check(model, shape, block):
    geometry = geometry_of(model, shape, block)
    for field, reach in zip(geometry.fields, reached_by_nan(model, shape, block), strict=True):
        length = len(reach)
        np.testing.assert_array_equal(field.first, reach.argmax(axis=0))
        np.testing.assert_array_equal(field.last, length - 1 - reach[::-1].argmax(axis=0))


# Sizes that leave rows and columns over in the poolings, all different.
@pytest.mark.networks
@pytest.mark.parametrize(
    ("kind", "preset", "clip", "shape", "block"),
    [
        ("i3d_3x1x1", "paper", "8x8", (1, 5, 45, 38, 3), "nonlocal_res4_1"),
        ("i3d_3x1x1", "caffe2", "32x2", (1, 13, 31, 26, 3), "nonlocal_res3_0"),
        ("i3d_3x3x3", "slowfast", "32x2", (1, 10, 31, 26, 3), "nonlocal_res4_1"),
        ("c2d", "mmcv", "32x2", (1, 9, 27, 22, 3), "nonlocal_res3_0"),
    ],
)
def test_video_resnets(kind, preset, clip, shape, block):
    blocks = {"res3": (0,), "res4": (1,)}
    model = nl.models.video_resnet(
        (1, 1, 2, 1), kind, blocks, clip=clip, preset=preset, num_classes=3, width_per_group=4
    )
    check(model, shape, block)


def test_the_whole_resnet_50():
    model = nl.models.video_resnet(
        50, "i3d_3x1x1", 1, preset="slowfast", num_classes=3, width_per_group=4
    )
    rows = geometry_of(model, (1, 8, 64, 48, 3), "nonlocal_res4_4").fields[1]
    # The stem has size 11. A 3×3 convolution in every residual block follows: 3 at stride 4 and the
    # first of res3, 3 at stride 8 and the first of res4, 4 at stride 16.
    assert (rows.stride, rows.size) == (16, 11 + 2 * (4 * 4 + 4 * 8 + 4 * 16))


def test_small_networks():
    block = nl.layers.nonlocal_block("embedded_gaussian", subsample=False)
    check(ToyVideoNet(2, block, "i3d"), (1, 5, 18, 23, 1), "block")
    check(nl.models.non_local_pytorch_mnist(), (1, 28, 28, 1), "nonlocal2")


def test_an_image_network_has_a_time_axis_of_size_1():
    images = nl.models.cifar_resnet(14, {"res2": (1,), "res3": (0,)})
    found = [
        geometry_of(images, (1, 32, 32, 3), name) for name in ("nonlocal_res2_1", "nonlocal_res3_0")
    ]
    assert [geometry.fields[0] for geometry in found] == [None, None]
    assert pixels_of(found[1], (0, 4, 1)).centre.tolist() == [16, 4]


class ManyLayers(nn.Module):
    """Windows of several types, a causal shortcut, frames in the batch, a gate of means, swapped
    axes.
    """

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (1, 3, 3), strides=(1, 2, 2), padding="VALID")(x))
        x = nn.max_pool(x, (1, 3, 3), (1, 2, 2), padding="SAME")
        frames = x.reshape(-1, *x.shape[2:])
        frames = nn.gelu(nn.Conv(5, (3, 3), kernel_dilation=2)(frames))
        frames = nn.avg_pool(frames, (2, 2), (1, 1))
        y = frames.reshape(*x.shape[:2], *frames.shape[1:])
        past = jnp.pad(x, ((0, 0), (2, 0), (0, 0), (0, 0), (0, 0)))
        y = y + nn.Conv(5, (3, 1, 1), padding="VALID")(past)[:, :, :-1, 1:]
        y = jnp.concatenate([y, jnp.flip(y, axis=-1)], axis=-1)
        y = y * nn.sigmoid(nn.Dense(10)(y.mean(axis=(1, 2, 3), keepdims=True)))
        y = jnp.transpose(y, (0, 1, 3, 2, 4))
        return nl.layers.nonlocal_block("dot_product", subsample=False, name="block")(y)


def test_networks_written_by_users():
    """The gate, which depends on all positions, is left out."""
    geometry = geometry_of(ManyLayers(), (1, 3, 31, 26, 2))
    assert [field.axis for field in geometry.fields] == [0, 2, 1]
    assert [field.stride for field in geometry.fields] == [1, 4, 4]
    # Convolution of 3; pooling of 3 at stride 2; dilated convolution of 5, mean of 2 at stride 4.
    size = 3 + 2 * 2 + 4 * 4 + 4
    assert [field.size for field in geometry.fields] == [3, size, size]
    # The pooling pads its 15 rows by 1 on both sides, its 12 columns only at the end; the dilated
    # convolution pads both by 2.
    first = pixels_of(geometry, (1, 2, 3)).first
    assert first.tolist() == [0, 3 * 4 - 2 - 2 * 4, 2 * 4 - 2 * 4]


class BlockAfter(nn.Module):
    """A block after any function."""

    function: object

    @nn.compact
    def __call__(self, x):
        block = nl.layers.nonlocal_block("dot_product", subsample=False, name="block")
        return block(self.function(x))


def test_a_position_of_padding_depends_on_nothing():
    pad = BlockAfter(lambda x: jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0))))
    pixels = pixels_of(geometry_of(pad, (1, 5, 6, 2)), [(0, 0), (2, 9), (2, 3), (8, 8)])
    assert pixels.first.tolist() == [[0, 0], [0, 5], [0, 1], [4, 5]]
    assert pixels.last.tolist() == [[-1, -1], [0, 4], [0, 1], [3, 4]]


def test_keys_depend_on_all_positions_that_are_pooled():
    strided = nl.layers.VideoConv(4, (1, 3, 3), (1, 2, 2))
    model = nn.Sequential([strided, nl.layers.nonlocal_block("dot_product")])
    x = np.ones((1, 4, 12, 20, 3), np.float32)
    (affinity,) = affinities(model, random_variables(model, x), x).values()
    pixels = to_pixels(affinity, [(0, 0, 0), (3, 2, 4)], of="keys")
    assert pixels.first.tolist() == [[0, 0, 0], [3, 7, 15]]
    assert pixels.last.tolist() == [[0, 3, 3], [3, 11, 19]]
    assert pixels.centre.tolist() == [[0, 1, 1], [3, 9, 17]]


OBSTACLES = {
    "merged": (
        lambda x: x.reshape(1, -1, x.shape[-1]),
        "receptive fields cannot be followed through a reshape that merges",
    ),
    "resized": (
        lambda x: jax.image.resize(x, (1, 7, 9, 3), "bilinear"),
        r"each axis of the map \(7, 9\) must correspond to an axis of the input",
    ),
    "reversed": (lambda x: x[:, ::-1], "followed through rev along an axis of positions"),
    "summed": (
        lambda x: jnp.cumsum(x, axis=1),
        "followed through cumsum along an axis of positions",
    ),
    "strides": (
        lambda x: x[:, :3, :3] + nn.max_pool(x, (2, 2), (2, 2))[:, :3, :3],
        "maps whose strides differ",
    ),
    "transposed": (
        lambda x: nn.ConvTranspose(3, (3, 3), strides=(2, 2))(x),
        "followed through a transposed convolution",
    ),
    "frames": (
        lambda x: x.reshape(-1, *x.shape[2:]),
        "frames are folded into the batch, .* pass one frame at a time",
    ),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_an_obstacle_is_named(obstacle):
    function, message = OBSTACLES[obstacle]
    shape = (1, 2, 4, 5, 3) if obstacle == "frames" else (1, 6, 8, 3)
    error = geometry_of(BlockAfter(function), shape)
    assert isinstance(error, GeometryError)
    with pytest.raises(GeometryError, match=message):
        raise error


def test_a_block_behind_an_obstacle_has_a_map():
    x = np.random.default_rng(0).normal(size=(1, 3, 6, 8, 3)).astype(np.float32)
    model = BlockAfter(lambda x: x.reshape(-1, *x.shape[2:]))
    affinity = affinities(model, random_variables(model, x), x)["block"]
    assert affinity.batch == 3
    assert np.isfinite(affinity.rows((0, 0))).all()
    with pytest.raises(GeometryError, match="block: frames are folded into the batch"):
        to_pixels(affinity, (0, 0))


@pytest.mark.usefixtures("as_users_see_it")
def test_bad_positions():
    x = np.ones((1, 6, 8, 3), np.float32)
    model = BlockAfter(lambda x: x)
    (affinity,) = affinities(model, random_variables(model, x), x).values()
    with pytest.raises(
        IndexError, match=r"positions must lie inside the map \(6, 8\); got \(0, 8\)"
    ):
        to_pixels(affinity, [(0, 0), (0, 8)])
    with pytest.raises(
        ValueError,
        match=r"positions must be integers of shape \(\.\.\., 2\) for a map of size \(6, 8\); got "
        r"int64 of shape \(3,\)",
    ):
        to_pixels(affinity, (0, 0, 0))
    with pytest.raises(ValueError, match="of must be one of 'queries', 'keys'; got 'values'"):
        to_pixels(affinity, (0, 0), of="values")


def test_nothing_is_computed():
    """Shapes are enough, even for clips that would not fit into memory."""
    model = nl.models.video_resnet((1, 1, 1, 1), "i3d_3x3x3", {"res4": (0,)}, num_classes=3)
    geometry = geometry_of(model, (64, 128, 320, 320, 3), "nonlocal_res4_0")
    assert geometry.grid == (64, 20, 20)
