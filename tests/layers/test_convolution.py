"""Video convolutions equal the sum over their taps, with all derivatives, on every platform."""

import functools

import chex
import convolution_oracle as oracle
import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from nonlocal_jax.compiler.programs import Program
from nonlocal_jax.layers import video_conv
from nonlocal_jax.layers.convolution import VideoConv, cpu, dot_over_positions
from nonlocal_jax.layers.convolution.folding import (
    Lowering,
    fold,
    frame_convolution,
    pointwise_product,
    temporal_convolution,
)

POINT, TEMPORAL, SPATIAL, CUBE = (1, 1, 1), (3, 1, 1), (1, 3, 3), (3, 3, 3)
FIRST = (5, 3, 3)  # like the 5×7×7 of a first layer, with fewer taps to compile


def xla(x, kernel, strides, groups=1):
    """XLA's own convolution in three dimensions."""
    padding = [(size // 2, size // 2) for size in kernel.shape[:3]]
    names = ("NTHWC", "THWIO", "NTHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=names, feature_group_count=groups
    )


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("positions", [(), (5,), (2, 0, 3), (2, 3, 4, 5)])
def test_dot_over_positions_is_the_product_over_channels(platform, positions):
    rng = np.random.default_rng(0)
    x, cotangent = (rng.standard_normal((*positions, n)).astype(np.float32) for n in (7, 5))
    kernel = rng.standard_normal((7, 5)).astype(np.float32)

    @jax.jit
    def run(x, kernel):
        dimensions = (((x.ndim - 1,), (0,)), ((), ()))

        def product(x, kernel):
            return dot_over_positions(x, kernel, dimensions, platform, precision="highest")

        y, transpose = jax.vjp(product, x, kernel)
        return y, *transpose(cotangent)

    kernel_gradient = x.reshape(-1, 7).T @ cotangent.reshape(-1, 5)
    expected = x @ kernel, cotangent @ kernel.T, kernel_gradient
    chex.assert_trees_all_close(run(x, kernel), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kernel_size", "groups", "function"),
    [
        (POINT, 1, pointwise_product),
        (TEMPORAL, 1, temporal_convolution),
        (SPATIAL, 1, frame_convolution),
        (CUBE, 1, frame_convolution),
        (POINT, 3, frame_convolution),
        (TEMPORAL, 3, frame_convolution),
    ],
)
def test_the_folded_form_depends_on_the_kernel(kernel_size, groups, function):
    assert fold((*kernel_size, 6, 9), groups) is function


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("platform", "kernel_size", "channels", "groups", "strides"),
    [
        ("cpu", FIRST, 3, 1, (1, 2, 2)),  # x and the kernel are differentiated by different forms
        ("cpu", CUBE, 6, 3, (2, 1, 2)),
        ("gpu", POINT, 6, 1, (2, 1, 2)),
        ("gpu", TEMPORAL, 6, 1, (1, 2, 2)),
        ("gpu", TEMPORAL, 6, 3, (1, 1, 1)),
        ("gpu", CUBE, 6, 1, (2, 1, 2)),
        ("tpu", FIRST, 3, 1, (2, 2, 2)),  # frames in the lanes
        ("tpu", FIRST, 3, 1, (1, 2, 1)),
        ("tpu", TEMPORAL, 6, 1, (2, 1, 2)),  # columns as the batch
        ("tpu", TEMPORAL, 6, 3, (1, 1, 1)),
        ("tpu", CUBE, 6, 3, (1, 2, 1)),
    ],
)
def test_equals_the_sum_over_taps_with_its_derivatives(
    platform, kernel_size, channels, groups, strides
):
    x, kernel = oracle.arrays(kernel_size, channels, 9, groups)
    x_tangent, kernel_tangent = np.cos(x), np.cos(kernel)

    @jax.jit
    def run(x, kernel):
        def convolve(x, kernel):
            return video_conv(x, kernel, strides, groups, platform=platform)

        y, transpose = jax.vjp(convolve, x, kernel)
        tangent = jax.jvp(convolve, (x, kernel), (x_tangent, kernel_tangent))[1]
        return convolve(x, kernel), y, transpose(jnp.sin(y)), tangent

    y = oracle.convolution(x, kernel, strides, groups)
    tangent = oracle.convolution(x_tangent, kernel, strides, groups)
    tangent += oracle.convolution(x, kernel_tangent, strides, groups)
    expected = y, y, oracle.gradients(x, kernel, np.sin(y), strides, groups), tangent
    chex.assert_trees_all_close(run(x, kernel), expected, rtol=1e-4, atol=1e-3)


# Kernels that a CPU differentiates by another form than it computes y.
@pytest.mark.parametrize(("kernel_size", "channels"), [(TEMPORAL, 70), (FIRST, 3)])
def test_second_derivatives_and_vmap(kernel_size, channels):
    x, kernel = oracle.arrays(kernel_size, channels, 4, positions=(3, 4, 5))

    def derivatives(convolve, x, kernel):
        def loss(kernel, x):
            return jnp.sum(jnp.sin(convolve(x, kernel, (1, 2, 2))))

        def gradient_sum(x):
            return jnp.sum(jnp.cos(jax.grad(loss)(kernel, x)))

        return jax.grad(gradient_sum)(x), jax.vmap(jax.grad(loss), (None, 0))(kernel, x[:, None])

    @jax.jit
    def run(x, kernel):
        return [derivatives(convolve, x, kernel) for convolve in (video_conv, xla)]

    assert cpu.choose(x.shape, kernel.shape, (1, 2, 2), x.dtype)
    chex.assert_trees_all_close(*run(x, kernel), rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("as_users_see_it")
def test_equal_convolutions_are_traced_once_however_strides_are_written(monkeypatch):
    x, kernel = oracle.arrays(SPATIAL, 5, 5, positions=(2, 5, 7))
    traces = []

    def counted(*args):
        traces.append(args)
        return frame_convolution(*args)

    monkeypatch.setattr(cpu, "choose", lambda *args: Lowering.of(counted))
    first = jax.make_jaxpr(lambda x, kernel: video_conv(x, kernel, (1, 1, 1), platform="cpu"))
    second = jax.make_jaxpr(
        lambda x, kernel: video_conv(
            video_conv(x, kernel, [1, 1, 1], platform="cpu"), kernel, platform="cpu"
        )
    )
    first(x, kernel)
    second(x, kernel)
    assert len(traces) == 1


def test_a_tpu_infers_many_clips_with_the_convolution_of_xla():
    x, kernel = oracle.arrays(CUBE, 6, 9, positions=(3, 4, 5))
    clips = jnp.concatenate([x] * 8)[:8]

    @jax.jit
    def run(clips, kernel):
        convolve = functools.partial(video_conv, platform="tpu")
        return convolve(clips, kernel, (2, 1, 1)), xla(clips, kernel, (2, 1, 1))

    chex.assert_trees_all_close(*run(clips, kernel), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("kernel_size", "channels"), [(TEMPORAL, 6), (FIRST, 3)])
def test_a_tpu_gathers_no_clips(kernel_size, channels, dtype):
    x, kernel = (
        jnp.asarray(array, dtype)
        for array in oracle.arrays(kernel_size, channels, 9, positions=(4, 5, 7))
    )
    clips = jnp.concatenate([x] * 4)[:4]
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    clips = jax.device_put(clips, jax.NamedSharding(mesh, jax.P("data")))
    kernel = jax.device_put(kernel, jax.NamedSharding(mesh, jax.P()))

    def loss(clips, kernel):
        return jnp.sum(jnp.sin(video_conv(clips, kernel, (2, 1, 1), platform="tpu")))

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(clips, kernel).compile()
    collectives = Program(gradients.as_text()).collectives()
    assert {collective.opcode for collective in collectives} == {"all-reduce"}
    # Sums of the kernel's gradient, which XLA on CPU widens to float32, and none of activations.
    assert sum(collective.bytes for collective in collectives) <= 4 * kernel.size


def test_a_tpu_moves_frames_in_bfloat16_exactly():
    x, kernel = oracle.arrays(FIRST, 3, 3, positions=(4, 5, 7))
    x = jnp.asarray(x, jnp.bfloat16)
    # A kernel that copies each position.
    kernel = (
        jnp.zeros_like(kernel, jnp.bfloat16)
        .at[tuple(n // 2 for n in FIRST)]
        .set(jnp.eye(3, dtype=jnp.bfloat16))
    )
    y = jax.jit(functools.partial(video_conv, platform="tpu"))(x, kernel)
    chex.assert_trees_all_equal(y, x)


@pytest.mark.usefixtures("as_users_see_it")  # a symbolic number is no int
def test_a_tpu_takes_any_number_of_clips():
    x, kernel = oracle.arrays(TEMPORAL, 6, 9, positions=(4, 5, 7))
    shape = jax.export.symbolic_shape("b, 4, 5, 7, 6")
    convolve = jax.jit(lambda x, kernel: video_conv(x, kernel, (2, 1, 1), platform="tpu"))
    clips = jax.ShapeDtypeStruct(shape, jnp.float32)
    exported = jax.export.export(convolve)(clips, jax.ShapeDtypeStruct(kernel.shape, jnp.float32))
    expected = oracle.convolution(x, kernel, (2, 1, 1))
    chex.assert_trees_all_close(exported.call(x, kernel), expected, rtol=1e-4, atol=1e-4)


def test_bfloat16():
    x, kernel = oracle.arrays(SPATIAL, 34, 6)
    layer = VideoConv(6, SPATIAL, dtype=jnp.bfloat16)
    y = jax.jit(layer.apply)({"params": {"kernel": kernel}}, x)
    assert y.dtype == jnp.bfloat16
    expected = oracle.convolution(x, kernel)
    assert np.linalg.norm(np.asarray(y, np.float64) - expected) < 1e-2 * np.linalg.norm(expected)


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": (1, 2, 2)}, r"kernel_size must be odd along every axis; got \(1, 2, 2\)"),
        ({"groups": 3}, "groups must divide the input's channels and features, 3 and 4; got 3"),
    ],
)
def test_bad_options(options, message):
    x = jax.ShapeDtypeStruct((1, 3, 4, 4, 3), jnp.float32)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(VideoConv(4, **options).init, jax.random.key(0), x)


@pytest.mark.parametrize("groups", [1, 2])
def test_channels_that_the_kernel_does_not_fit(groups):
    convolution, x = VideoConv(4, (3, 3, 3), groups=groups), jnp.ones((2, 3, 5, 7, 6))
    variables = convolution.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"x must have 6 channels .* Axis 1 has 6, as in PyTorch"):
        convolution.apply(variables, jnp.moveaxis(x, -1, 1))
    with pytest.raises(ValueError, match=r"got shape \(2, 3, 5, 7, 8\)\.(\n|$)"):
        convolution.apply(variables, jnp.ones((2, 3, 5, 7, 8)))


def test_a_kernel_with_metadata():
    init = nn.with_partitioning(nn.initializers.he_normal(), (None, None, None, None, "model"))
    convolution, x = VideoConv(4, (3, 3, 3), kernel_init=init), jnp.ones((2, 3, 5, 7, 6))
    boxed = convolution.init(jax.random.key(0), x)
    y = convolution.apply(boxed, x)
    np.testing.assert_array_equal(y, convolution.apply(nn.meta.unbox(boxed), x))
