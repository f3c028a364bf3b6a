"""The operation as a layer: which positions are summed, how keys are pooled and masked, Eq. 1."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from variables import normal, random_variables

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


def make_input(positions):
    return normal((2, *positions, CHANNELS)) / 2


def run(layer, x, mask=None):
    """The response, the parameters and the sown affinity map."""
    variables = random_variables(layer, x)

    @jax.jit
    def apply(x, mask):
        return layer.apply(variables, x, mask=mask, mutable=["intermediates"])

    y, state = apply(x, mask)
    return y, variables["params"], state["intermediates"]["affinity"][0]


def pool_by_hand(x, window):
    """Max pooling of one clip (*positions, C) in NumPy, a window at a time."""
    sizes = (n // w for n, w in zip(x.shape[:-1], window, strict=True))
    pooled = np.full((*sizes, x.shape[-1]), -np.inf)
    for index in np.ndindex(pooled.shape[:-1]):
        corner = tuple(slice(i * w, i * w + w) for i, w in zip(index, window, strict=True))
        pooled[index] = x[corner].reshape(-1, x.shape[-1]).max(0)
    return pooled


def embed(params, name, x):
    """W x + b in double precision; x itself where the layer has no such embedding."""
    if name not in params:
        return x
    return x @ np.asarray(params[name]["kernel"], np.float64) + np.asarray(params[name]["bias"])


@each_layer
@each_shape
@pytest.mark.parametrize("pool_order", ["after", "before"])
def test_layer_is_equation_1_between_its_embeddings(layer, positions, pool_order):
    x = make_input(positions)
    y, params, affinity = run(layer(pool_order=pool_order, use_bias=True), x)
    window = {1: (2,), 2: (2, 2), 3: (1, 2, 2)}[len(positions)]
    clips = np.asarray(x, np.float64)

    def pooled(name, clip):
        if pool_order == "before":
            return embed(params, name, pool_by_hand(clip, window))
        return pool_by_hand(embed(params, name, clip), window)

    theta = embed(params, "theta", clips)
    theta = theta.reshape(2, -1, theta.shape[-1])
    phi = np.stack([pooled("phi", clip).reshape(-1, theta.shape[-1]) for clip in clips])
    g = np.stack([pooled("g", clip).reshape(-1, CHANNELS // 2) for clip in clips])
    expected, expected_affinity = oracle.nonlocal_operation(
        NAMES[layer], theta, phi, g, params.get("w_f")
    )
    chex.assert_shape(y, (2, *positions, CHANNELS // 2))
    np.testing.assert_allclose(y.reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(affinity, expected_affinity, rtol=1e-4, atol=1e-5)


@each_layer
@pytest.mark.parametrize("axes", ["space", "time"])
def test_space_sees_its_frame_and_time_its_pixel(layer, axes):
    """By gradient: which inputs influence the response at one position."""
    x = np.abs(make_input((3, 5, 7)))
    operation = layer(axes=axes)
    variables = random_variables(operation, x, positive=True)

    @jax.jit
    def influence(x):
        return jax.grad(lambda x: operation.apply(variables, x)[0, 1, 2, 4].sum())(x)

    has_influence = np.abs(influence(x)).sum((0, -1)) > 0  # (T, H, W)
    has_influence[1, 2, 4] = False  # itself
    inside = np.zeros_like(has_influence)
    if axes == "space":
        inside[1] = True
    else:
        inside[:, 2, 4] = True
    assert not has_influence[~inside].any()
    assert has_influence[inside].any()


@each_layer
@pytest.mark.parametrize("axes", ["space", "time"])
def test_axes_equal_the_operation_on_each_frame_or_pixel(layer, axes):
    x = make_input((3, 4, 5))
    operation = layer(axes=axes)
    variables = random_variables(operation, x)

    @jax.jit
    def run_both(x):
        y = operation.apply(variables, x)
        if axes == "space":
            apply = jax.vmap(lambda frame: layer().apply(variables, frame), 1, 1)
            return y, apply(x)
        alone = layer(subsample=False)
        pixels = x.reshape(2, 3, 20, CHANNELS)
        return y, jax.vmap(lambda pixel: alone.apply(variables, pixel), 2, 2)(pixels)

    y, separate = run_both(x)
    chex.assert_trees_all_close(y, separate.reshape(y.shape), rtol=1e-5, atol=1e-6)


@each_layer
@pytest.mark.parametrize("axes", ["spacetime", "time"])
@pytest.mark.parametrize("subsample", [True, (2, 1, 1)])
def test_groups_equal_the_operation_on_each_group(layer, axes, subsample):
    x = make_input((6, 4, 5))
    operation = layer(axes=axes, group_size=2, subsample=subsample)
    variables = random_variables(operation, x)

    @jax.jit
    def run_both(x):
        ungrouped = operation.clone(group_size=None)
        parts = [ungrouped.apply(variables, part) for part in jnp.split(x, 3, axis=1)]
        return operation.apply(variables, x), jnp.concatenate(parts, 1)

    y, separate = run_both(x)
    chex.assert_trees_all_close(y, separate, rtol=1e-5, atol=1e-6)


@each_layer
@each_shape
@pytest.mark.parametrize("pool_order", ["after", "before"])
def test_padding_equals_a_smaller_input(layer, positions, pool_order):
    """Masked positions at the end of every axis, full of NaN: the real ones answer as if alone."""
    # Whole windows, so that pooling drops nothing.
    small = tuple(n - 1 if n < 5 else n // 2 * 2 - 2 for n in positions)
    x = make_input(positions)
    real = np.zeros((2, *positions), bool)
    inside = (slice(None), *(slice(n) for n in small))
    real[inside] = True
    padded = np.where(real[..., None], x, np.float32(np.nan))
    operation = layer(pool_order=pool_order, use_bias=True)
    variables = random_variables(operation, x)

    @jax.jit
    def run_both(variables, padded, x, mask):
        def loss(variables, x, mask):
            y = operation.apply(variables, x, mask=mask)
            return jnp.sum((y if mask is None else y[inside]) ** 2)

        gradient = jax.value_and_grad(loss)
        return gradient(variables, padded, mask), gradient(variables, x[inside], None)

    (value, gradient), (expected, expected_gradient) = run_both(variables, padded, x, real)
    chex.assert_trees_all_close(value, expected, rtol=1e-5)
    chex.assert_trees_all_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


@each_layer
def test_a_half_masked_window_takes_only_its_real_positions(layer):
    x = make_input((4,))
    mask = np.array([[True, True, True, False], [True, True, True, True]])
    operation = layer(pool_order="before")
    variables = random_variables(operation, x)
    apply = jax.jit(lambda x, mask: operation.apply(variables, x, mask=mask))
    y, spoilt, repeated = x.copy(), x.copy(), x.copy()
    spoilt[0, 3] = 99.0
    repeated[0, 3] = x[0, 2]  # the window's largest is now that of its real position
    y = apply(x, mask)
    chex.assert_trees_all_close(apply(spoilt, mask), y)
    expected = apply(repeated, np.ones_like(mask))
    chex.assert_trees_all_close(y[:, :3], expected[:, :3], rtol=1e-5)


@each_layer
def test_the_map_is_sown_only_if_intermediates_are_mutable(layer):
    x = make_input((3, 5, 7))
    shapes = jax.eval_shape(layer().init, jax.random.key(1), x)
    assert set(shapes) == {"params"}
    y, params, affinity = run(layer(axes="space"), x)
    chex.assert_shape(affinity, (2, 3, 35, 6))  # (B, T, H·W, pooled keys of the frame)
    without = jax.jit(layer(axes="space").apply)({"params": params}, x)
    chex.assert_trees_all_close(without, y)


@each_layer
@pytest.mark.parametrize(("channels", "inner"), [(1, 1), (2, 1), (3, 1), (10, 5)])
def test_inner_width_is_half_and_at_least_one(layer, channels, inner):
    x = np.ones((1, 4, channels), np.float32)
    y, _ = jax.eval_shape(layer().init_with_output, jax.random.key(0), x)
    assert y.shape == (1, 4, inner)


@each_layer
def test_dtypes(layer):
    x = make_input((4, 5))
    half = layer(dtype=jnp.bfloat16)
    for operation, dtype in ((half, jnp.float32), (layer(param_dtype=jnp.bfloat16), jnp.bfloat16)):
        shapes = jax.eval_shape(operation.init, jax.random.key(0), x)
        assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(dtype)}
    variables = random_variables(layer(), x)
    y, exact = jax.jit(lambda x: (half.apply(variables, x), layer().apply(variables, x)))(x)
    chex.assert_type(y, jnp.bfloat16)
    chex.assert_trees_all_close(y.astype(jnp.float32), exact, rtol=0.05, atol=0.02)


def test_use_scale_is_the_square_root_of_the_inner_width():
    x = make_input((7,))
    y, params, _ = run(EmbeddedGaussian(use_scale=True, subsample=False), x)
    theta, phi, g = (jnp.asarray(x @ params[name]["kernel"]) for name in ("theta", "phi", "g"))
    expected = ops.embedded_gaussian(theta, phi, g, scale=3**-0.5)
    chex.assert_trees_all_close(y, expected, rtol=1e-5, atol=1e-6)


@each_layer
@pytest.mark.parametrize(
    "options", [{}, {"axes": "space"}, {"axes": "time"}, {"group_size": 3}], ids=str
)
def test_the_sown_map_is_the_one_of_the_response(layer, options):
    """Affinity @ g = y, with the scale, the mask, the axes and the groups of the layer."""
    x = make_input((6, 5, 7))
    scaled = {"use_scale": True} if layer is EmbeddedGaussian else {}
    operation = layer(subsample=False, **scaled, **options)
    variables = random_variables(operation, x)
    mask = np.random.default_rng(3).random(x.shape[:-1]) < 0.6

    @jax.jit
    def run_both(x, mask):
        results = []
        for key_mask in (None, mask):
            y, state = operation.apply(variables, x, mask=key_mask, mutable=["intermediates"])
            results.append((y, state["intermediates"]["affinity"][0]))
        return results

    def rows(a):
        if "axes" not in options:
            return a.reshape(2, *((2,) if options else ()), -1, 3)
        a = a.reshape(2, 6, 35, 3)
        return a if options["axes"] == "space" else a.swapaxes(1, 2)

    g = x @ np.asarray(variables["params"]["g"]["kernel"])
    (y, affinity), (masked_y, masked_affinity) = run_both(x, mask)
    chex.assert_trees_all_close(affinity @ rows(g), rows(y), rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(masked_affinity @ rows(g), rows(masked_y), rtol=1e-4, atol=1e-5)
    hidden = ~rows(np.broadcast_to(mask[..., None], g.shape))[..., :1].swapaxes(-1, -2)
    assert not np.where(hidden, masked_affinity, 0).any()


def test_a_pooled_window_is_real_if_any_of_its_positions_is():
    x = make_input((6,))
    mask = np.arange(6)[None] < np.array([[5], [4]])
    _, _, affinity = run(DotProduct(), x, mask)
    expected = np.array([[True, True, True], [True, True, False]])
    chex.assert_trees_all_equal((np.asarray(affinity) != 0).any(1), expected)


def test_parameters_are_he_initialised():
    """Standard deviation √(2 / fan-in), for the kernels and for w_f, whose fan-in is 2d."""
    params = Concatenation().init(jax.random.key(0), jnp.ones((1, 2, 512)))["params"]
    for name in ("theta", "phi", "g"):
        np.testing.assert_allclose(params[name]["kernel"].std(), (2 / 512) ** 0.5, rtol=0.02)
    np.testing.assert_allclose(params["w_f"].std(), (2 / 512) ** 0.5, rtol=0.1)


VIDEO, IMAGE = np.ones((2, 6, 4, 5, 6), np.float32), np.ones((2, 4, 5, 6), np.float32)
BAD_INPUT = {
    "rank 2": (
        {},
        np.ones((2, 6), np.float32),
        None,
        ValueError,
        r"one, two or three position axes; got shape \(2, 6\)",
    ),
    "rank 6": (
        {},
        np.ones((2, 2, 2, 2, 2, 6), np.float32),
        None,
        ValueError,
        r"one, two or three position axes",
    ),
    "dtype": (
        {},
        np.ones((2, 4, 6), np.int32),
        None,
        TypeError,
        r"x must be floating point; got int",
    ),
    "inner_features": (
        {"inner_features": 0},
        IMAGE,
        None,
        ValueError,
        r"inner_features must be at least 1.*got 0",
    ),
    "axes": (
        {"axes": "channels"},
        VIDEO,
        None,
        ValueError,
        r"axes must be one of 'spacetime', .*got 'channels'",
    ),
    "pool_order": (
        {"pool_order": "never"},
        VIDEO,
        None,
        ValueError,
        r"pool_order must be one of .*got 'never'",
    ),
    "axes of an image": (
        {"axes": "time"},
        IMAGE,
        None,
        ValueError,
        r"x must have \(T, H, W\) positions, rank 5, for axes='time'",
    ),
    "group of an image": (
        {"group_size": 2},
        IMAGE,
        None,
        ValueError,
        r"group_size must be None unless x has \(T, H, W\)",
    ),
    "group size": (
        {"group_size": 4},
        VIDEO,
        None,
        ValueError,
        r"group_size must divide the 6 frames; got 4",
    ),
    "group's window": (
        {"group_size": 3, "subsample": (2, 1, 1)},
        VIDEO,
        None,
        ValueError,
        r"2 frames must divide group_size; got 3",
    ),
    "window too large": (
        {"subsample": (5, 2)},
        IMAGE,
        None,
        ValueError,
        r"window \(5, 2\) must not be larger than the map \(4, 5\)",
    ),
    "default window too large": (
        {},
        np.ones((1, 1, 4, 6), np.float32),
        None,
        ValueError,
        r"window \(2, 2\) must not be larger",
    ),
    "window's rank": ({"subsample": (2,)}, IMAGE, None, ValueError, r"subsample must have 2 sizes"),
    "window of 0": ({"subsample": (0, 2)}, IMAGE, None, ValueError, r"at least 1; got \(0, 2\)"),
    "space's window": (
        {"axes": "space", "subsample": (2, 1, 1)},
        VIDEO,
        None,
        ValueError,
        r"window must be 1 in time",
    ),
    "time's window": (
        {"axes": "time", "subsample": (1, 2, 2)},
        VIDEO,
        None,
        ValueError,
        r"window must be 1 in space",
    ),
    "mask's shape": (
        {},
        IMAGE,
        np.ones((2, 4), bool),
        ValueError,
        r"mask must have shape \(2, 4, 5\).*got \(2, 4\)",
    ),
    "window of another type": (
        {"subsample": 2},
        IMAGE,
        None,
        ValueError,
        r"subsample must be True, False or a size.*got 2",
    ),
    "mask's dtype": (
        {},
        IMAGE,
        np.ones((2, 4, 5), np.float32),
        TypeError,
        r"mask must be an array of bool.*got float32",
    ),
    "mask of another type": (
        {},
        IMAGE,
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
        jax.eval_shape(lambda: DotProduct(**attributes).init(jax.random.key(0), x, mask=mask))


def test_a_layer_is_found_under_its_own_name_in_a_network():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            return DotProduct(name="relation")(x)

    assert set(jax.eval_shape(Network().init, jax.random.key(0), IMAGE)["params"]) == {"relation"}


@each_layer
def test_channels_that_the_parameters_do_not_fit(layer):
    x = jnp.ones((2, 7, 5, 11))
    variables = layer().init(jax.random.key(0), x)
    channels_first = (
        r"11 channels in its last axis; got shape \(2, 11, 7, 5\)\. Axis 1 has 11, .*-1"
    )
    with pytest.raises(ValueError, match=channels_first):
        layer().apply(variables, jnp.moveaxis(x, -1, 1))
    with pytest.raises(ValueError, match=r"11 channels .* got shape \(2, 7, 5, 13\)\.(\n|$)"):
        layer().apply(variables, jnp.ones((2, 7, 5, 13)))


@each_layer
@pytest.mark.parametrize("shape", [(0, 5, 7, 6), (0, 7, 6), (0, 3, 4, 4, 6)])
def test_an_empty_batch(layer, shape):
    x = jnp.ones(shape)
    y, variables = layer().init_with_output(jax.random.key(0), x)
    assert y.shape == (*shape[:-1], shape[-1] // 2)
    for options in [{"axes": "space"}, {"axes": "time"}, {"group_size": 3}]:
        if len(shape) == 5:
            assert layer(**options).apply(variables, x).shape == y.shape


@each_layer
def test_no_channels(layer):
    with pytest.raises(ValueError, match=r"at least one channel; got shape \(2, 5, 7, 0\)"):
        layer().init(jax.random.key(0), jnp.ones((2, 5, 7, 0)))
