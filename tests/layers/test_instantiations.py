"""The operation as a layer:

which positions meet, how keys are pooled and masked, and that it is Eq. 1 between them.
"""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from nonlocal_jax import ops
from nonlocal_jax.layers import Concatenation, DotProduct, EmbeddedGaussian, Gaussian

LAYERS = (Gaussian, EmbeddedGaussian, DotProduct, Concatenation)
NAMES = {
    Gaussian: "gaussian",
    EmbeddedGaussian: "embedded_gaussian",
    DotProduct: "dot_product",
    Concatenation: "concatenation",
}
CHANNELS = 6
SHAPES = {"sequence": (7,), "image": (5, 7), "video": (3, 5, 7)}  # odd, prime, distinct

each_layer = pytest.mark.parametrize("layer", LAYERS)
each_shape = pytest.mark.parametrize("positions", SHAPES.values(), ids=SHAPES.keys())


def make_input(positions, batch=2, seed=0):
    return jax.random.normal(jax.random.key(seed), (batch, *positions, CHANNELS)) / 2


def run(layer, x, mask=None, seed=1):
    """The response, the parameters and the sown affinity map."""
    variables = jax.jit(layer.init)(jax.random.key(seed), x)
    y, state = jax.jit(lambda v, x: layer.apply(v, x, mask=mask, mutable=["intermediates"]))(
        variables, x
    )
    return y, variables["params"], state["intermediates"]["affinity"][0]


def pool_by_hand(x, window):
    """Max pooling of one clip (*positions, C) in NumPy, a window at a time."""
    pooled = np.full(
        (*(n // w for n, w in zip(x.shape[:-1], window, strict=True)), x.shape[-1]), -np.inf
    )
    for out in np.ndindex(pooled.shape[:-1]):
        corner = tuple(slice(o * w, o * w + w) for o, w in zip(out, window, strict=True))
        pooled[out] = np.asarray(x)[corner].reshape(-1, x.shape[-1]).max(0)
    return pooled


@each_layer
@each_shape
@pytest.mark.parametrize("pool_order", ["after", "before"])
def test_layer_is_equation_1_between_its_embeddings(layer, positions, pool_order):
    x = make_input(positions)
    y, params, affinity = run(layer(pool_order=pool_order, use_bias=True), x)
    window = {1: (2,), 2: (2, 2), 3: (1, 2, 2)}[len(positions)]

    def embed(name, x):
        return (
            x @ np.asarray(params[name]["kernel"], np.float64) + np.asarray(params[name]["bias"])
            if name in params
            else x
        )

    def pooled(name, clip):
        clip = np.asarray(clip, np.float64)
        return (
            embed(name, pool_by_hand(clip, window))
            if pool_order == "before"
            else pool_by_hand(embed(name, clip), window)
        )

    theta = embed("theta", np.asarray(x, np.float64)).reshape(2, np.prod(positions), -1)
    phi, g = (
        np.stack(
            [pooled(name, clip).reshape(-1, theta.shape[-1] if name == "phi" else 3) for clip in x]
        )
        for name in ("phi", "g")
    )
    expected, expected_affinity = oracle.nonlocal_operation(
        NAMES[layer], theta, phi, g, params.get("w_f")
    )
    chex.assert_shape(y, (2, *positions, CHANNELS // 2))
    np.testing.assert_allclose(y.reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(affinity, expected_affinity, rtol=1e-4, atol=1e-5)


@each_layer
@pytest.mark.parametrize("axes", ["space", "time"])
def test_space_sees_its_frame_and_time_its_pixel(layer, axes):
    """By gradient: which inputs reach the response at one position."""
    x = jnp.abs(make_input((3, 5, 7)))
    operation = layer(
        axes=axes, kernel_init=jax.nn.initializers.uniform()
    )  # no ReLU of the concatenation is off
    variables = operation.init(jax.random.key(1), x)
    reach = jax.grad(lambda x: operation.apply(variables, x)[0, 1, 2, 4].sum())(x)
    reached = np.abs(reach).sum((0, -1)) > 0  # (T, H, W)
    reached[1, 2, 4] = False  # itself
    inside = np.zeros_like(reached)
    if axes == "space":
        inside[1] = True
    else:
        inside[:, 2, 4] = True
    assert not reached[~inside].any()
    assert reached[inside].any()


@each_layer
@pytest.mark.parametrize("axes", ["space", "time"])
def test_axes_equal_the_operation_on_each_frame_or_pixel(layer, axes):
    x = make_input((3, 4, 5))
    operation = layer(axes=axes)
    variables = operation.init(jax.random.key(1), x)
    y = operation.apply(variables, x)
    if axes == "space":
        separate = jax.vmap(lambda frame: layer().apply(variables, frame), in_axes=1, out_axes=1)(x)
    else:
        pixels = x.reshape(2, 3, 20, CHANNELS)
        separate = jax.vmap(
            lambda p: layer(subsample=False).apply(variables, p), in_axes=2, out_axes=2
        )(pixels)
    chex.assert_trees_all_close(y, separate.reshape(y.shape), rtol=1e-5, atol=1e-6)


@each_layer
@pytest.mark.parametrize("axes", ["spacetime", "time"])
@pytest.mark.parametrize("subsample", [True, (2, 1, 1)])
def test_groups_equal_the_operation_on_each_group(layer, axes, subsample):
    x = make_input((6, 4, 5))
    operation = layer(axes=axes, group_size=2, subsample=subsample)
    variables = operation.init(jax.random.key(1), x)
    parts = [
        operation.clone(group_size=None).apply(variables, part) for part in jnp.split(x, 3, axis=1)
    ]
    chex.assert_trees_all_close(
        operation.apply(variables, x), jnp.concatenate(parts, 1), rtol=1e-5, atol=1e-6
    )


@each_layer
@each_shape
@pytest.mark.parametrize("pool_order", ["after", "before"])
def test_padding_equals_a_smaller_input(layer, positions, pool_order):
    """Masked positions at the end of every axis, full of NaN:

    the real ones answer as if they were alone.
    """
    small = tuple(
        n - 1 if n < 5 else n // 2 * 2 - 2 for n in positions
    )  # whole windows, so that pooling drops nothing
    x = make_input(positions)
    real = np.zeros((2, *positions), bool)
    inside = (slice(None), *(slice(n) for n in small))
    real[inside] = True
    padded = jnp.where(real[..., None], x, jnp.nan)
    operation = layer(pool_order=pool_order, use_bias=True)
    variables = operation.init(jax.random.key(1), x)

    def loss(variables, x, mask):
        y = operation.apply(variables, x, mask=mask)
        return jnp.sum((y if mask is None else y[inside]) ** 2)

    value, gradient = jax.value_and_grad(loss)(variables, padded, jnp.asarray(real))
    expected, expected_gradient = jax.value_and_grad(loss)(variables, x[inside], None)
    chex.assert_trees_all_close(value, expected, rtol=1e-5)
    chex.assert_trees_all_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


@each_layer
def test_a_half_masked_window_takes_only_its_real_positions(layer):
    x = make_input((4,))
    mask = jnp.array([[True, True, True, False], [True, True, True, True]])
    operation = layer(pool_order="before")
    variables = operation.init(jax.random.key(1), x)
    spoilt = x.at[0, 3].set(99.0)
    chex.assert_trees_all_close(
        operation.apply(variables, spoilt, mask=mask), operation.apply(variables, x, mask=mask)
    )
    repeated = x.at[0, 3].set(x[0, 2])  # the window's largest is now that of its real position
    chex.assert_trees_all_close(
        operation.apply(variables, x, mask=mask)[:, :3],
        operation.apply(variables, repeated)[:, :3],
        rtol=1e-5,
    )


@each_layer
def test_the_map_is_sown_only_when_asked_for(layer):
    x = make_input((3, 5, 7))
    variables = layer().init(jax.random.key(1), x)
    assert set(variables) == {"params"}
    y, params, affinity = run(layer(axes="space"), x)
    chex.assert_shape(affinity, (2, 3, 35, 6))  # (B, T, H·W, pooled keys of the frame)
    chex.assert_trees_all_close(layer(axes="space").apply({"params": params}, x), y)


@each_layer
@pytest.mark.parametrize(("channels", "inner"), [(1, 1), (2, 1), (3, 1), (10, 5)])
def test_inner_width_is_half_and_at_least_one(layer, channels, inner):
    y, _ = layer().init_with_output(jax.random.key(0), jnp.ones((1, 4, channels)))
    chex.assert_shape(y, (1, 4, inner))


@each_layer
def test_dtypes(layer):
    x = make_input((4, 5))
    y, variables = layer(dtype=jnp.bfloat16).init_with_output(jax.random.key(0), x)
    chex.assert_type(y, jnp.bfloat16)
    chex.assert_type(jax.tree.leaves(variables), jnp.float32)
    _, variables = layer(param_dtype=jnp.bfloat16).init_with_output(jax.random.key(0), x)
    chex.assert_type(jax.tree.leaves(variables), jnp.bfloat16)
    exact = layer().apply(layer().init(jax.random.key(0), x), x)
    chex.assert_trees_all_close(y.astype(jnp.float32), exact, rtol=0.05, atol=0.02)


def test_use_scale_is_the_square_root_of_the_inner_width():
    x = make_input((7,))
    y, params, _ = run(EmbeddedGaussian(use_scale=True, subsample=False), x)
    theta, phi, g = (x @ params[name]["kernel"] for name in ("theta", "phi", "g"))
    chex.assert_trees_all_close(
        y, ops.embedded_gaussian(theta, phi, g, scale=3**-0.5), rtol=1e-5, atol=1e-6
    )


@each_layer
@pytest.mark.parametrize(
    "options", [{}, {"axes": "space"}, {"axes": "time"}, {"group_size": 3}], ids=str
)
@pytest.mark.parametrize("masked", [False, True])
def test_the_sown_map_is_the_one_of_the_response(layer, options, masked):
    """Affinity @ g = y, with the scale, the mask, the axes and the groups of the layer."""
    x = make_input((6, 5, 7))
    scaled = {"use_scale": True} if layer is EmbeddedGaussian else {}
    mask = jax.random.bernoulli(jax.random.key(3), 0.6, x.shape[:-1]) if masked else None
    y, params, affinity = run(layer(subsample=False, **scaled, **options), x, mask)
    g = x @ params["g"]["kernel"]

    def rows(a):
        if "axes" not in options:
            return a.reshape(2, *((2,) if options else ()), -1, 3)
        a = a.reshape(2, 6, 35, 3)
        return a if options["axes"] == "space" else a.swapaxes(1, 2)

    chex.assert_trees_all_close(affinity @ rows(g), rows(y), rtol=1e-4, atol=1e-5)
    if masked:
        hidden = ~rows(jnp.broadcast_to(mask[..., None], g.shape))[..., :1].swapaxes(-1, -2)
        assert not jnp.where(hidden, affinity, 0).any()


def test_a_pooled_window_is_real_if_any_of_its_positions_is():
    x = make_input((6,))
    mask = jnp.arange(6)[None] < jnp.array([[5], [4]])
    _, _, affinity = run(DotProduct(), x, mask)
    chex.assert_trees_all_equal(
        (affinity != 0).any(1), jnp.array([[True, True, True], [True, True, False]])
    )


def test_parameters_are_he_initialised():
    """Standard deviation √(2 / fan-in), for the kernels and for w_f, whose fan-in is 2d."""
    params = Concatenation().init(jax.random.key(0), jnp.ones((1, 2, 512)))["params"]
    for name in ("theta", "phi", "g"):
        np.testing.assert_allclose(params[name]["kernel"].std(), (2 / 512) ** 0.5, rtol=0.02)
    np.testing.assert_allclose(params["w_f"].std(), (2 / 512) ** 0.5, rtol=0.1)


video, image = jnp.ones((2, 6, 4, 5, 6)), jnp.ones((2, 4, 5, 6))
BAD_INPUT = {
    "rank 2": (
        {},
        jnp.ones((2, 6)),
        None,
        ValueError,
        r"one, two or three position axes; got shape \(2, 6\)",
    ),
    "rank 6": (
        {},
        jnp.ones((2, 2, 2, 2, 2, 6)),
        None,
        ValueError,
        r"one, two or three position axes",
    ),
    "dtype": ({}, jnp.ones((2, 4, 6), int), None, TypeError, r"x must be floating point; got int"),
    "inner_features": (
        {"inner_features": 0},
        image,
        None,
        ValueError,
        r"inner_features must be at least 1.*got 0",
    ),
    "axes": (
        {"axes": "channels"},
        video,
        None,
        ValueError,
        r"axes must be one of 'spacetime', .*got 'channels'",
    ),
    "pool_order": (
        {"pool_order": "never"},
        video,
        None,
        ValueError,
        r"pool_order must be one of .*got 'never'",
    ),
    "axes of an image": (
        {"axes": "time"},
        image,
        None,
        ValueError,
        r"axes='time' wants \(T, H, W\)",
    ),
    "group of an image": (
        {"group_size": 2},
        image,
        None,
        ValueError,
        r"group_size wants \(T, H, W\)",
    ),
    "group size": (
        {"group_size": 4},
        video,
        None,
        ValueError,
        r"group_size must divide the 6 frames; got 4",
    ),
    "group's window": (
        {"group_size": 3, "subsample": (2, 1, 1)},
        video,
        None,
        ValueError,
        r"2 frames must divide group_size 3",
    ),
    "window too large": (
        {"subsample": (5, 2)},
        image,
        None,
        ValueError,
        r"window \(5, 2\) must not be larger than the map \(4, 5\)",
    ),
    "default window too large": (
        {},
        jnp.ones((1, 1, 4, 6)),
        None,
        ValueError,
        r"window \(2, 2\) must not be larger",
    ),
    "window's rank": ({"subsample": (2,)}, image, None, ValueError, r"subsample must have 2 sizes"),
    "window of 0": ({"subsample": (0, 2)}, image, None, ValueError, r"at least 1; got \(0, 2\)"),
    "space's window": (
        {"axes": "space", "subsample": (2, 1, 1)},
        video,
        None,
        ValueError,
        r"window must be 1 in time",
    ),
    "time's window": (
        {"axes": "time", "subsample": (1, 2, 2)},
        video,
        None,
        ValueError,
        r"window must be 1 in space",
    ),
    "mask's shape": (
        {},
        image,
        jnp.ones((2, 4), bool),
        ValueError,
        r"mask must have shape \(2, 4, 5\).*got \(2, 4\)",
    ),
    "window no window": (
        {"subsample": 2},
        image,
        None,
        ValueError,
        r"subsample must be True, False or a size.*got 2",
    ),
    "mask's dtype": (
        {},
        image,
        jnp.ones((2, 4, 5)),
        TypeError,
        r"mask must be an array of bool.*got float32",
    ),
    "mask no array": (
        {},
        image,
        [[True]],
        TypeError,
        r"mask must be an array of bool.*got <class 'list'>",
    ),
}


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize(
    ("attributes", "x", "mask", "error", "message"), BAD_INPUT.values(), ids=BAD_INPUT.keys()
)
def test_bad_input_names_what_was_expected_and_what_came(attributes, x, mask, error, message):
    with pytest.raises(error, match=message):
        DotProduct(**attributes).init(jax.random.key(0), x, mask=mask)


def test_a_layer_is_found_under_its_own_name_in_a_network():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            return DotProduct(name="relate")(x)

    assert set(Network().init(jax.random.key(0), image)["params"]) == {"relate"}
