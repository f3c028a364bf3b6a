"""Video networks whose frames are split over devices equal those on one device."""

import functools

import chex
import compiled
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from nonlocal_jax.layers import BatchNorm, DotProduct, VideoConv
from nonlocal_jax.models import video_resnet

pytestmark = pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices")
SMALL = {
    "depth": (1, 1, 1, 1),
    "nonlocal_blocks": {"res3": (0,)},
    "num_classes": 5,
    "dropout": 0.5,
    "width_per_group": 8,
}


def two_devices():
    return jax.sharding.Mesh(np.array(jax.devices()[:2]), ("positions",))


@pytest.mark.networks
@pytest.mark.parametrize(
    ("kind", "clip", "preset", "train", "options"),
    [
        (
            "i3d_3x1x1",
            "32x2",
            "paper",
            True,
            {"block_options": {"zero_init": False}, "remat": True},
        ),
        (
            "i3d_3x3x3",
            "8x8",
            "caffe2",
            False,
            {"head_window": (1, 1), "instantiation": "dot_product", "frozen_bn": True},
        ),
    ],
)
def test_equals_one_device(kind, clip, preset, train, options):
    """In float64. In float32, rounding flips a ReLU or a maximum, and 3% of a gradient with it."""
    with jax.enable_x64(True):
        check_equal(kind, clip, preset, train, options)


def check_equal(kind, clip, preset, train, options):
    options |= {"kind": kind, "clip": clip, "preset": preset}
    options |= {"dtype": jnp.float64, "param_dtype": jnp.float64}
    make = functools.partial(video_resnet, **SMALL, **options)
    alone, split = make(), make(axis_name="positions")
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 16, 64, 64, 3)))
    shapes = jax.eval_shape(alone.init, jax.random.key(1), x)
    # Parameters are initialised outside the map.
    chex.assert_trees_all_equal(jax.eval_shape(split.init, jax.random.key(1), x), shapes)
    rng = np.random.default_rng(2)

    def fill(path, leaf):
        """Every branch counts, and no logit is large."""
        fan_in = np.prod(leaf.shape[:-1])
        noise = rng.normal(size=leaf.shape) * (fan_in**-0.5 if leaf.ndim > 1 else 0.1)
        return jnp.asarray(noise + (path[-1].key in ("scale", "var")), leaf.dtype)

    variables = jax.tree_util.tree_map_with_path(fill, shapes)

    def gradient(model, variables, x):
        def loss(params, x):
            logits, changed = model.apply(
                {**variables, "params": params},
                x,
                train=train,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(3)},
            )
            return jnp.sum(jnp.sin(logits)), (logits, changed)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(variables["params"], x)

    def gradient_on_device(variables, x):
        """Every device computes the loss, so the gradient is that of their sum."""
        (params_gradient, x_gradient), answers = gradient(split, variables, x)
        params_gradient = jax.lax.pmean(params_gradient, "positions")
        return (params_gradient, x_gradient / jax.lax.axis_size("positions")), answers

    mesh, rows = two_devices(), P(None, "positions")
    specs = {"in_specs": (P(), rows), "out_specs": ((P(), rows), P())}
    sharded = jax.shard_map(gradient_on_device, mesh=mesh, **specs, check_vma=False)
    got = jax.jit(sharded)(variables, x)
    expected = jax.jit(functools.partial(gradient, alone))(variables, x)
    chex.assert_tree_all_finite(expected)
    chex.assert_trees_all_equal_structs(got, expected)
    pairs = ((got[1], expected[1]), *zip(got[0], expected[0], strict=True))
    for split_tree, tree in pairs:
        largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))
        chex.assert_trees_all_close(split_tree, tree, rtol=1e-5, atol=1e-5 * largest)


def needed_numbers(model, variables, x):
    """Returns the numbers of a forward pass that a device exchanges.

    Returns:
        Those of neighbouring frames, those of sums, and the first ones only, those of the images.
    """
    frames, sums = [], []

    def intercept(next_function, arguments, options, context):
        module, (x, *_) = context.module, arguments
        if context.method_name != "__call__":
            return next_function(*arguments, **options)
        if isinstance(module, VideoConv) and module.kernel_size[0] > 1:
            taps, *window = module.kernel_size
            stride, *space = module.strides if window == [1, 1] else (module.strides[0], 1, 1)
            samples, _, height, width, channels = x.shape
            positions = -(-height // space[0]) * -(-width // space[1])
            frames.append((taps - stride) * samples * positions * channels)
        elif isinstance(module, BatchNorm):
            channels = x.shape[-1] // (2 if module.paired else 1)
            sums.append(2 * channels)  # mean and variance
        elif isinstance(module, DotProduct):
            sums.append(len(x) * (x.shape[-1] // 2) ** 2)  # Σ_j φ_j g_jᵀ
        return next_function(*arguments, **options)

    def apply(variables, x):
        return model.apply(variables, x, train=True, mutable=True)

    with nn.intercept_methods(intercept):
        _, state = jax.eval_shape(apply, variables, x)
    (pooled,), (features,) = state["intermediates"]["pool2"], state["intermediates"]["res5"]
    frames.append(pooled.size // pooled.shape[1])  # windows of 3 frames with a stride of 2
    sums.append(len(x) * features.shape[-1])  # mean over all positions
    return sum(frames), sum(sums), frames[0]


def is_bias_of_shortcut(path):
    *_, module, name = (key.key for key in path)
    return (module, name) == ("shortcut_norm", "bias")


@pytest.mark.networks
def test_only_what_is_needed_is_communicated():
    options = {"dropout": 0.0, "instantiation": "dot_product"}
    make = functools.partial(video_resnet, **SMALL | options)
    alone, split = make(), make(axis_name="positions")
    x = jax.ShapeDtypeStruct((3, 8, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(alone.init, jax.random.key(0), x)

    def gradients(variables, x):
        def loss(params):
            logits, updated = split.apply(
                {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
            )
            return jnp.sum(jnp.sin(logits)), updated

        gradient, updated = jax.grad(loss, has_aux=True)(variables["params"])
        return jax.lax.pmean(gradient, "positions"), updated

    mapped = jax.shard_map(
        gradients,
        mesh=two_devices(),
        in_specs=(P(), P(None, "positions")),
        out_specs=P(),
        check_vma=False,
    )
    program = compiled.program(jax.jit(mapped).lower(variables, x))
    numbers = {collective.opcode: collective.bytes / 4 for collective in program.collectives()}
    frames, sums, first = needed_numbers(alone, variables, x)
    leaves = jax.tree.leaves_with_path(variables["params"])
    # The gradients of the biases of a shortcut's norm and of the norm that it is added to are
    # equal, and XLA sums them once.
    params = sum(leaf.size for path, leaf in leaves if not is_bias_of_shortcut(path))
    # The gradients of frames are sent back, except those of the images. Those of sums are summed;
    # those of the mean over positions need not be, because they are equal on all devices.
    assert numbers == {"collective-permute": 2 * frames - first, "all-reduce": 2 * sums + params}


@pytest.mark.usefixtures("as_users_see_it")
def test_frames_that_do_not_split_are_refused():
    model = video_resnet(**SMALL, clip="32x2", axis_name="positions")
    x = jax.ShapeDtypeStruct((1, 12, 64, 64, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    mesh, rows = two_devices(), P(None, "positions")
    apply = jax.shard_map(
        model.apply, mesh=mesh, in_specs=(P(), rows), out_specs=P(), check_vma=False
    )
    with pytest.raises(
        ValueError, match=r"each device of 'positions' must hold a multiple of 8 frames.*got 6"
    ):
        jax.eval_shape(apply, variables, x)
