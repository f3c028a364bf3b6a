"""Receptive fields are those that gradients measure, index by index, and what cannot be followed says why."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nonlocal_jax as nl
from nonlocal_jax.layers import NonLocalBlock
from nonlocal_jax.layers.convolution import cpu
from nonlocal_jax.models.toy_video import ToyVideoNet
from nonlocal_jax.visualize import GeometryError, affinities, to_pixels
from nonlocal_jax.visualize.geometry import pixels_of
from nonlocal_jax.visualize.tracing import geometries


@pytest.fixture(autouse=True)
def without_tiles(monkeypatch):
    """Convolutions in tiles leave rounding errors beyond the receptive field, which gradients would show."""
    monkeypatch.setattr(cpu, "choose", lambda *args: None)


def measured(model, variables, shape, block):
    """First and last input index with a gradient, along each axis, for every position on the diagonal of the block's map.

    All weights are positive and each output is a mean, so that no gradient vanishes by chance. Inputs grow along each axis, or
    shrink, so that max poolings pass on the gradient of the last position of a window, or of the first. Other blocks are left
    out.
    """

    def positive(path, leaf):
        if path[-1].key == "kernel":
            kernel = np.random.default_rng(0).uniform(0.5, 1.5, leaf.shape).astype(np.float32)
            return kernel / kernel.sum(axis=tuple(range(leaf.ndim - 1)), keepdims=True)
        return np.full(leaf.shape, path[-1].key in ("scale", "var"), np.float32)

    variables = jax.tree_util.tree_map_with_path(positive, variables)
    where = np.indices(shape[1:-1]).astype(np.float32)
    exponents = np.stack(
        [np.tensordot(way, where, 1) for way in itertools.product((0.4, -0.4), repeat=len(where))]
    )
    x = jnp.exp(exponents - exponents.min())  # from 1 on: tinier ones would be slow
    x = jnp.broadcast_to(x[..., None], (*x.shape, shape[-1]))

    def features(x):
        found = {}

        def keep(call, args, kwargs, context):
            if not isinstance(context.module, NonLocalBlock):
                return call(*args, **kwargs)
            found["/".join(context.module.path)] = args[0]
            return (args[0], None) if kwargs.get("return_map") else args[0]

        with nn.intercept_methods(keep):
            model.apply(variables, x)
        return found[block]

    grid = jax.eval_shape(features, x).shape[1:-1]

    @jax.jit  # what comes after the block is never computed
    def seen(position):
        out, back = jax.vjp(features, x)
        (gradient,) = back(
            jnp.broadcast_to(
                jnp.zeros(grid).at[tuple(position)].set(1.0)[None, ..., None], out.shape
            )
        )
        return (gradient != 0).any(axis=(0, -1))

    positions = np.array([[min(i, n - 1) for n in grid] for i in range(max(grid))])
    fields = []
    for position in positions:
        mask = np.asarray(seen(position))
        others = [tuple(j for j in range(mask.ndim) if j != i) for i in range(mask.ndim)]
        fields.append([np.nonzero(mask.any(axis=axes))[0][[0, -1]] for axes in others])
    return positions, np.array(fields)


def check(model, shape, block):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(1), x)
    geometry = geometries(model.apply, variables, x)[block]
    positions, fields = measured(model, variables, shape, block)
    seen = pixels_of(geometry, positions)
    np.testing.assert_array_equal(np.stack([seen.first, seen.last], axis=-1), fields)
    return geometry


# Sizes that leave rows and columns over in the poolings, all different.
@pytest.mark.parametrize(
    ("kind", "preset", "clip", "shape", "block"),
    [
        ("i3d_3x1x1", "paper", "8x8", (1, 7, 75, 52, 3), "nonlocal_res4_1"),
        ("i3d_3x1x1", "caffe2", "32x2", (1, 21, 45, 38, 3), "nonlocal_res3_0"),
        ("i3d_3x3x3", "slowfast", "32x2", (1, 18, 47, 34, 3), "nonlocal_res4_1"),
        ("c2d", "mmcv", "32x2", (1, 17, 43, 36, 3), "nonlocal_res3_0"),
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
    rows = check(model, (1, 8, 64, 48, 3), "nonlocal_res4_4").fields[1]
    # conv1 and pool1; then a 3×3 in every residual block, 3 at stride 4 and the first of res3, 3 at 8 and the first of res4, 4 at 16.
    assert (rows.stride, rows.size) == (16, 11 + 2 * (4 * 4 + 4 * 8 + 4 * 16))


def test_the_small_networks():
    block = nl.layers.nonlocal_block("embedded_gaussian", subsample=False)
    check(ToyVideoNet(2, block, "i3d"), (1, 5, 18, 23, 1), "block")
    check(nl.models.non_local_pytorch_mnist(), (1, 28, 28, 1), "nonlocal2")
    images = nl.models.cifar_resnet(14, {"res2": (1,), "res3": (0,)})
    x = jnp.ones((1, 32, 32, 3))
    maps = affinities(images, jax.jit(images.init)(jax.random.key(0), x), x)
    assert [one.geometry().fields[0] for one in maps.values()] == [
        None,
        None,
    ]  # the axis of its one frame
    assert to_pixels(maps["nonlocal_res3_0"], (0, 4, 1)).centre.tolist() == [16, 4]


class Own(nn.Module):
    """What people build: several kinds of windows, a shortcut, frames in the batch, a gate by means, axes that change places."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (1, 3, 3), strides=(1, 2, 2), padding="VALID")(x))
        x = nn.max_pool(x, (1, 3, 3), (1, 2, 2), padding="SAME")
        frames = x.reshape(-1, *x.shape[2:])
        frames = nn.gelu(nn.Conv(5, (3, 3), kernel_dilation=2)(frames))
        frames = nn.avg_pool(frames, (2, 2), (1, 1))
        y = frames.reshape(*x.shape[:2], *frames.shape[1:])
        y = y + nn.Conv(5, (3, 1, 1))(x)[:, :, :-1, 1:]
        y = jnp.concatenate([y, jnp.flip(y, axis=-1)], axis=-1)
        y = y * nn.sigmoid(nn.Dense(10)(y.mean(axis=(1, 2, 3), keepdims=True)))
        y = jnp.transpose(y, (0, 1, 3, 2, 4))
        return nl.layers.nonlocal_block("dot_product", subsample=False, name="block")(y)


def test_what_sees_padding_alone_sees_nothing():
    class Padded(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nl.layers.nonlocal_block("dot_product", name="block")(
                nn.Conv(4, (1, 1), padding=2)(x)
            )

    x = jnp.ones((1, 5, 6, 2))
    one = affinities(Padded(), Padded().init(jax.random.key(0), x), x)["block"]
    seen = to_pixels(one, [(0, 0), (2, 9), (2, 3), (8, 8)])
    assert seen.first.tolist() == [[0, 0], [0, 5], [0, 1], [4, 5]]
    assert seen.last.tolist() == [[-1, -1], [0, 4], [0, 1], [3, 4]]


def test_frames_in_the_batch_are_images():
    class Images(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nl.layers.nonlocal_block("dot_product", name="block")(
                x.reshape(-1, *x.shape[2:])
            )

    x = jnp.ones((1, 3, 6, 8, 4))
    one = affinities(Images(), Images().init(jax.random.key(0), x), x)["block"]
    assert one.batch == 3
    with pytest.raises(
        GeometryError,
        match=r"frames are folded into the batch: .* give the model one frame at a time",
    ):
        one.geometry()


def test_networks_of_ones_own():
    """The gate, which sees all, is left out."""
    x = jnp.ones((1, 3, 31, 26, 2))
    (one,) = affinities(Own(), jax.jit(Own().init)(jax.random.key(0), x), x).values()
    t, columns, rows = one.geometry().fields
    assert [field.axis for field in (t, columns, rows)] == [0, 2, 1]
    assert [field.stride for field in (t, columns, rows)] == [1, 4, 4]
    # conv 3, pooling 3 at stride 2, dilated conv 5 and mean of 2 at stride 4
    assert [field.size for field in (t, columns, rows)] == [
        3,
        3 + 2 * 2 + 4 * 4 + 4,
        3 + 2 * 2 + 4 * 4 + 4,
    ]
    seen = to_pixels(one, (1, 2, 3))
    # The pooling pads its 15 rows by 1 before, its 12 columns behind alone; the dilated convolution pads both by 2.
    assert seen.first.tolist() == [0, 3 * 4 - 2 - 2 * 4, 2 * 4 - 2 * 4]


def test_keys_see_as_many_windows_as_are_pooled():
    x = jnp.ones((1, 4, 12, 20, 3))
    model = nn.Sequential(
        [nl.layers.VideoConv(4, (1, 3, 3), (1, 2, 2)), nl.layers.nonlocal_block("dot_product")]
    )
    (one,) = affinities(model, model.init(jax.random.key(0), x), x).values()
    seen = to_pixels(one, [(0, 0, 0), (3, 2, 4)], of="keys")
    assert seen.first.tolist() == [[0, 0, 0], [3, 7, 15]]
    assert seen.last.tolist() == [[0, 3, 3], [3, 11, 19]]
    assert seen.centre.tolist() == [[0, 1, 1], [3, 9, 17]]


class Before(nn.Module):
    """A block after any function."""

    function: object

    @nn.compact
    def __call__(self, x):
        return nl.layers.nonlocal_block("dot_product", subsample=False, name="block")(
            self.function(x)
        )


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda x: x.reshape(1, -1, x.shape[-1]),
            "block: receptive fields cannot be followed through a reshape that merges",
        ),
        (
            lambda x: jax.image.resize(x, (1, 7, 9, 3), "bilinear"),
            r"the axes of a map of \(7, 9\) must each run along an axis of",
        ),
        (lambda x: x[:, ::-1], "followed through rev along an axis of positions"),
        (lambda x: jnp.cumsum(x, axis=1), "followed through cumsum along an axis of positions"),
        (
            lambda x: x[:, :3, :3] + nn.max_pool(x, (2, 2), (2, 2))[:, :3, :3],
            "maps whose strides differ",
        ),
        (
            lambda x: nn.ConvTranspose(3, (3, 3), strides=(2, 2))(x),
            "followed through a transposed convolution",
        ),
    ],
)
def test_what_cannot_be_followed_says_why(function, message):
    """Maps are there all the same."""
    x = jax.random.normal(jax.random.key(0), (1, 6, 8, 3))
    model = Before(function)
    (one,) = affinities(model, model.init(jax.random.key(0), x), x).values()
    assert np.isfinite(one.rows((0,) * len(one.queries))).all()
    with pytest.raises(GeometryError, match=message):
        to_pixels(one, (0,) * len(one.queries))


@pytest.mark.usefixtures("as_users_see_it")
def test_bad_positions():
    x = jnp.ones((1, 6, 8, 3))
    model = Before(lambda x: x)
    (one,) = affinities(model, model.init(jax.random.key(0), x), x).values()
    with pytest.raises(
        IndexError, match=r"positions must lie inside the map \(6, 8\); got \(0, 8\)"
    ):
        to_pixels(one, [(0, 0), (0, 8)])
    with pytest.raises(
        ValueError,
        match=r"positions must be integers, \(\.\.\., 2\) for a map of \(6, 8\); got int64 of shape \(3,\)",
    ):
        to_pixels(one, (0, 0, 0))
    with pytest.raises(ValueError, match="of must be 'queries' or 'keys'; got 'values'"):
        to_pixels(one, (0, 0), of="values")


def test_nothing_is_computed():
    """Shapes are enough, of a network that would not fit."""
    model = nl.models.video_resnet(152, "i3d_3x3x3", 1, num_classes=3)
    variables = jax.eval_shape(model.init, jax.random.key(0), model.example)
    (found,) = geometries(
        model.apply, variables, jax.ShapeDtypeStruct((64, 128, 320, 320, 3), jnp.float32)
    ).values()
    assert found.grid == (64, 20, 20)
