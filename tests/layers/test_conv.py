"""Every convolution against XLA's in three dimensions, values and derivatives."""

import math

import chex
import jax
import jax.numpy as jnp
import pytest

from nonlocal_jax.layers import conv
from nonlocal_jax.layers.conv import VideoConv, lowering, video_conv

POINT, TEMPORAL, SPATIAL, CUBE, STEM, FLAT_STEM = (
    (1, 1, 1),
    (3, 1, 1),
    (1, 3, 3),
    (3, 3, 3),
    (5, 7, 7),
    (1, 7, 7),
)


@pytest.mark.parametrize("machine", ["cpu", "gpu"])
@pytest.mark.parametrize("positions", [(), (5,), (2, 0, 3), (2, 3, 4, 5)])
def test_dot_over_positions_is_the_product_over_channels_with_its_gradients(
    machine, positions, monkeypatch
):
    monkeypatch.setattr(conv, "host_platform", lambda: machine)
    keys = jax.random.split(jax.random.key(0), 4)
    x, dx = (jax.random.normal(key, (*positions, 6)) for key in keys[:2])
    kernel, dkernel = (jax.random.normal(key, (6, 4)) for key in keys[2:])
    dimensions = (((x.ndim - 1,), (0,)), ((), ()))

    def ours(x, kernel):
        return conv.dot_over_positions(x, kernel, dimensions, precision="highest")

    def expected(x, kernel):
        return jnp.einsum("...c,cd->...d", x, kernel, precision="highest")

    y, pull = jax.vjp(ours, x, kernel)
    y_expected, pull_expected = jax.vjp(expected, x, kernel)
    chex.assert_trees_all_close(y, y_expected, rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_close(pull(y), pull_expected(y), rtol=1e-5, atol=1e-5)
    tangents = jax.jvp(ours, (x, kernel), (dx, dkernel))
    chex.assert_trees_all_close(
        tangents, jax.jvp(expected, (x, kernel), (dx, dkernel)), rtol=1e-6, atol=1e-6
    )


def xla(x, kernel, strides, groups=1):
    padding = [(size // 2, size // 2) for size in kernel.shape[:3]]
    names = ("NTHWC", "THWIO", "NTHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=names, feature_group_count=groups
    )


def arrays(kernel, channels, features, groups=1, positions=(5, 7, 11)):
    x = jax.random.normal(jax.random.key(0), (2, *positions, channels))
    return x, jax.random.normal(jax.random.key(1), (*kernel, channels // groups, features))


def derivatives(function, x, kernel):
    """Values, both gradients, and a directional derivative."""
    y, pull = jax.vjp(function, x, kernel)
    return y, pull(jnp.sin(y)), jax.jvp(function, (x, kernel), (jnp.cos(x), jnp.cos(kernel)))[1]


EVERY_WAY = [
    (POINT, 34, 6, 1), (TEMPORAL, 34, 6, 1), (SPATIAL, 3, 6, 1), (SPATIAL, 34, 6, 1), (SPATIAL, 34, 66, 1), (SPATIAL, 6, 9, 3),
    (CUBE, 34, 6, 1), (CUBE, 6, 9, 3), (STEM, 3, 6, 1),
]  # fmt: skip


@pytest.mark.parametrize(
    ("machine", "kernel", "channels", "features", "groups", "strides"),
    [("cpu", *case, strides) for case in EVERY_WAY for strides in ((1, 1, 1), (2, 1, 2))]
    + [("cpu", STEM, 3, 66, 1, (3, 2, 2)), ("cpu", FLAT_STEM, 3, 6, 1, (2, 2, 2))]
    + [("gpu", *case, (1, 2, 2)) for case in EVERY_WAY if case[0] != SPATIAL],
)
def test_equals_xla_in_three_dimensions(
    kernel, channels, features, groups, strides, machine, monkeypatch
):
    monkeypatch.setattr(conv, "host_platform", lambda: machine)
    inputs = arrays(kernel, channels, features, groups)

    @jax.jit
    def both(x, kernel):
        ours = derivatives(lambda *args: video_conv(*args, strides, groups), x, kernel)
        return ours, derivatives(lambda *args: xla(*args, strides, groups), x, kernel)

    chex.assert_trees_all_close(*both(*inputs), rtol=1e-4, atol=1e-3)


IN_TILES = [
    # kernel, channels, features, positions, whether x is small, tiles along (T, H, W) for the value and the kernel's gradient
    (TEMPORAL, 192, 256, (4, 5, 7), True, (4, 1, 1), (4, 1, 1)),
    (TEMPORAL, 320, 320, (8, 5, 7), True, (4, 1, 1), (4, 1, 1)),
    (SPATIAL, 64, 64, (3, 13, 7), True, (1, 4, 4), (1, 4, 4)),
    (SPATIAL, 32, 32, (3, 13, 14), False, (1, 4, 1), (1, 4, 4)),
    (SPATIAL, 66, 66, (3, 13, 7), True, (1, 2, 2), (1, 2, 2)),
    (CUBE, 64, 64, (4, 13, 9), True, (4, 4, 1), (4, 4, 1)),
    (CUBE, 66, 66, (4, 13, 11), True, (4, 2, 2), (4, 2, 2)),
]


@pytest.mark.parametrize(
    ("kernel", "channels", "features", "positions", "small", "of_value", "of_kernel"), IN_TILES
)
def test_tiles_equal_xla_in_three_dimensions(
    kernel, channels, features, positions, small, of_value, of_kernel, monkeypatch
):
    monkeypatch.setattr(conv, "host_platform", lambda: "cpu")
    if not small:
        monkeypatch.setattr(conv, "CACHED", 0)
    x, weights = arrays(kernel, channels, features, positions=positions)
    weights /= math.sqrt(math.prod(kernel) * channels)
    assert [function.keywords["tiles"] for function in lowering(x.shape, weights.shape)] == [
        of_value,
        of_kernel,
    ]

    @jax.jit
    def both(x, weights):
        functions = (
            lambda *args: video_conv(*args, (1, 1, 1)),
            lambda *args: xla(*args, (1, 1, 1)),
        )
        return [derivatives(function, x, weights) for function in functions]

    chex.assert_trees_all_close(*both(x, weights), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("kernel", "channels", "positions", "strides", "dtype"),
    [
        (SPATIAL, 66, (3, 13, 7), (1, 2, 2), jnp.float32),
        (SPATIAL, 66, (3, 13, 7), (1, 1, 1), jnp.bfloat16),
        (SPATIAL, 66, (3, 13, 2), (1, 1, 1), jnp.float32),  # smaller than the kernel
        (SPATIAL, 66, (1, 13, 7), (1, 1, 1), jnp.float32),  # few products
        (TEMPORAL, 320, (6, 5, 7), (1, 1, 1), jnp.float32),  # no whole tiles
        (TEMPORAL, 320, (4, 5, 7), (2, 1, 1), jnp.float32),
        (STEM, 66, (8, 13, 7), (1, 1, 1), jnp.float32),
    ],
)
def test_no_tiles_where_they_do_not_pay(kernel, channels, positions, strides, dtype, monkeypatch):
    monkeypatch.setattr(conv, "host_platform", lambda: "cpu")
    chosen = lowering((2, *positions, channels), (*kernel, channels, channels), strides, 1, dtype)
    assert "_in_tiles" not in map(name, chosen)


def name(function):
    return getattr(function, "func", function).__name__


def test_every_way_to_compute_one_is_taken_on_cpu(monkeypatch):
    monkeypatch.setattr(conv, "host_platform", lambda: "cpu")
    kernels = [
        (*POINT, 34, 6),
        (*SPATIAL, 3, 6),
        (*TEMPORAL, 64, 6),
        (*SPATIAL, 64, 65),
        (*STEM, 3, 64),
        (*SPATIAL, 34, 6),
    ]
    taken = {
        name(function)
        for kernel in kernels
        for function in lowering((2, 8, 28, 28, kernel[3]), kernel)
    }
    assert taken == {
        "_product", "_side_by_side", "_temporal", "_shifted_products", "_planes", "_in_tiles", "_frame_by_frame",
    }  # fmt: skip


@pytest.mark.parametrize("length", [1, 2, 6, 7])
def test_rows_are_joined_whatever_their_number(length, monkeypatch):
    monkeypatch.setattr(conv, "host_platform", lambda: "cpu")
    monkeypatch.setattr(conv, "JOINED", 90)
    x, weights = arrays((1, 1, 3), 5, 6, positions=(length, 5, 9))
    chex.assert_trees_all_close(
        conv._joined_rows(x, weights, (1, 1, 1), 1),
        xla(x, weights, (1, 1, 1)),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize(("kernel", "channels"), [(TEMPORAL, 34), (STEM, 3), (SPATIAL, 34)])
def test_second_derivatives_and_vmap(kernel, channels, monkeypatch):
    monkeypatch.setattr(conv, "host_platform", lambda: "cpu")
    x, weights = arrays(kernel, channels, 4, positions=(3, 4, 5))
    weights /= math.sqrt(math.prod(kernel))

    @jax.jit
    def run(x, weights):
        results = []
        for function in (video_conv, xla):

            def loss(weights, x, function=function):
                return jnp.sum(jnp.sin(function(x, weights, (1, 2, 2))))

            by_both = jax.grad(lambda x: jnp.sum(jnp.cos(jax.grad(loss)(weights, x))))(x)
            by_example = jax.vmap(jax.grad(loss), (None, 0))(weights, x[:, None])
            results.append((by_both, by_example))
        return results

    ours, expected = run(x, weights)
    chex.assert_trees_all_close(ours, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("as_users_see_it")
def test_convolutions_of_one_shape_are_traced_once_however_strides_are_written(monkeypatch):
    monkeypatch.setattr(conv, "host_platform", lambda: "cpu")
    x, weights = arrays(SPATIAL, 5, 5, positions=(2, 5, 7))
    assert lowering(x.shape, weights.shape).value is conv._side_by_side
    traced, side_by_side = [], conv._side_by_side
    monkeypatch.setattr(
        conv, "_side_by_side", lambda *args: traced.append(args) or side_by_side(*args)
    )
    first = video_conv(x, weights, (1, 1, 1))
    chex.assert_trees_all_equal(video_conv(x, weights, [1, 1, 1]), first)
    jax.make_jaxpr(lambda x, weights: video_conv(video_conv(x, weights), weights))(x, weights)
    assert len(traced) == 1

    in_tiles = [lowering((2, 3, 13, 14, 32), (*SPATIAL, 32, 32)) for _ in range(2)]
    assert in_tiles[0] == in_tiles[1]  # the same objects, by which the trace is found
    assert in_tiles[0].value.keywords == {"tiles": (1, 4, 4)}


def test_bfloat16():
    x, weights = arrays(SPATIAL, 34, 6)
    y = VideoConv(6, SPATIAL, dtype=jnp.bfloat16).apply({"params": {"kernel": weights}}, x)
    assert y.dtype == jnp.bfloat16
    expected = xla(x, weights, (1, 1, 1))
    assert jnp.linalg.norm(y - expected) < 1e-2 * jnp.linalg.norm(expected)


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": (1, 2, 2)}, r"kernel_size must be odd along every axis; got \(1, 2, 2\)"),
        ({"groups": 3}, "groups must divide the input's channels and features, 3 and 4; got 3"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        VideoConv(4, **options).init(jax.random.key(0), jnp.ones((1, 3, 4, 4, 3)))
