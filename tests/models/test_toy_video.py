"""The toy networks: their temporal reach, the frozen stem, inflation, and their control block."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nonlocal_jax as nl
from nonlocal_jax.layers import VideoConv
from nonlocal_jax.models import LocalBlock, ToyVideoNet

CLIPS = np.random.default_rng(0).standard_normal((2, 8, 8, 8, 1)).astype(np.float32)


def random_variables(net):
    """Random kernels, and norms with scales of 1, so that every residual branch counts.

    NumPy draws them, because compiling `net.init` takes longer than compiling the network.
    """
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        if path[-1].key == "kernel":
            fan_in = np.prod(leaf.shape[:-1])
            return rng.normal(0, np.sqrt(2 / fan_in), leaf.shape).astype(np.float32)
        return np.full(leaf.shape, path[-1].key in ("scale", "var"), np.float32)

    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.asarray(CLIPS))
    return jax.tree_util.tree_map_with_path(fill, shapes)


def test_video_conv_is_he_initialised():
    layer = VideoConv(64, (3, 3, 3))
    x = np.ones((1, 3, 4, 4, 16), np.float32)
    kernel = jax.jit(layer.init)(jax.random.key(0), x)["params"]["kernel"]
    np.testing.assert_allclose(kernel.std(), (2 / (27 * 16)) ** 0.5, rtol=0.02)


@pytest.mark.parametrize(
    ("kind", "block", "reach"),
    [
        ("c2d", None, 0),
        # One frame to each side, so never both digits of `same_digit`, which are three apart.
        ("c2d", LocalBlock(4), 1),
        ("i3d", None, 2),
        ("c2d", nl.layers.nonlocal_block("dot_product", subsample=False), 7),
    ],
)
def test_reach_in_time(kind, block, reach):
    """The gradient of the last features of frame 0 is nonzero in the frames that they depend on."""
    net = ToyVideoNet(3, block, kind)

    @jax.jit
    def gradient(variables, clips):
        def first_frame(clips):
            _, state = net.apply(
                variables,
                clips,
                capture_intermediates=lambda module, _: module.name == "res3",
                mutable=["intermediates"],
            )
            return state["intermediates"]["res3"]["__call__"][0][:, 0].sum()

        return jax.grad(first_frame)(clips)

    magnitudes = np.abs(gradient(random_variables(net), CLIPS)).sum((0, 2, 3, 4))
    assert list(magnitudes > 0) == [frame <= reach for frame in range(8)]


@pytest.mark.parametrize("freeze", [False, True])
def test_a_frozen_stem_has_no_gradient_and_keeps_its_statistics(freeze):
    net = ToyVideoNet(3, freeze_stem=freeze)

    @jax.jit
    def run(variables, clips):
        def loss(params):
            logits, updated = net.apply(
                {**variables, "params": params}, clips, train=True, mutable=["batch_stats"]
            )
            return jnp.sum(jnp.sin(logits)), updated["batch_stats"]

        return jax.grad(loss, has_aux=True)(variables["params"])

    variables = random_variables(net)
    gradient, statistics = run(variables, CLIPS)
    for stem in ("stem1", "stem2", "stem3"):
        assert bool(gradient[stem]["kernel"].any()) is not freeze
        mean = variables["batch_stats"][f"{stem}_norm"]["mean"]
        is_kept = np.array_equal(statistics[f"{stem}_norm"]["mean"], mean)
        assert is_kept is freeze
    assert gradient["head"]["kernel"].any()


@pytest.mark.usefixtures("as_users_see_it")
def test_an_unknown_kind():
    with pytest.raises(ValueError, match=r"kind must be one of 'c2d', 'i3d'; got 'I3D'"):
        jax.eval_shape(ToyVideoNet(2, kind="I3D").init, jax.random.key(0), CLIPS)


def test_inflated_kernels_give_a_static_clip_the_answer_of_its_frame():
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((1, 1, 3, 4)).astype(np.float32)
    image = rng.standard_normal((2, 1, 5, 5, 3)).astype(np.float32)
    clip = np.repeat(image, 7, axis=1)
    flat = image @ kernel[0, 0]
    params = {"params": {"kernel": nl.weights.inflate(jnp.asarray(kernel), 3)}}
    inflated = jax.jit(VideoConv(4, (3, 1, 1)).apply)(params, clip)
    expected = np.repeat(flat, 5, axis=1)
    chex.assert_trees_all_close(inflated[:, 1:-1], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "frames", "message"),
    [
        ((3, 3, 4), 3, r"kernel_2d must have shape \(H, W, C, features\); got \(3, 3, 4\)"),
        ((1, 1, 3, 4), 0, "frames must be at least 1; got 0"),
    ],
)
def test_bad_inflation(shape, frames, message):
    with pytest.raises(ValueError, match=message):
        nl.weights.inflate(jnp.ones(shape), frames)
