"""The toy networks: what reaches what, the frozen stem, inflation, and a control that is no smaller than the block."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nonlocal_jax as nl
from nonlocal_jax.layers.convolution import VideoConv
from nonlocal_jax.models import LocalBlock, ToyVideoNet

CLIPS = jax.random.normal(jax.random.key(0), (2, 8, 16, 16, 1))


def awake(variables):
    """Every zero-initialised scale at 1, so that every residual branch counts."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.ones_like(leaf) if path[-1].key == "scale" else leaf, variables
    )


def test_video_conv_is_he_initialised():
    kernel = VideoConv(64, (3, 3, 3)).init(jax.random.key(0), jnp.ones((1, 3, 4, 4, 16)))["params"][
        "kernel"
    ]
    np.testing.assert_allclose(kernel.std(), (2 / (27 * 16)) ** 0.5, rtol=0.02)


@pytest.mark.parametrize(
    ("kind", "block", "reach"),
    [
        ("c2d", None, 0),
        (
            "c2d",
            LocalBlock(4),
            1,
        ),  # one frame to each side: never both digits of `same_digit`, at least three apart
        ("i3d", None, 2),
        ("c2d", nl.layers.nonlocal_block("dot_product", subsample=False), 7),
    ],
)
def test_how_far_in_time_a_position_sees(kind, block, reach):
    """By gradient of the last features of frame 0, taken by a head that looks at nothing else."""
    net = ToyVideoNet(3, block, kind)
    variables = awake(net.init(jax.random.key(1), CLIPS))

    def first_frame(clips):
        _, state = net.apply(
            variables,
            clips,
            capture_intermediates=lambda m, _: m.name == "res3",
            mutable=["intermediates"],
        )
        return state["intermediates"]["res3"]["__call__"][0][:, 0].sum()

    seen = np.abs(jax.jit(jax.grad(first_frame))(CLIPS)).sum((0, 2, 3, 4)) > 0
    assert list(seen) == [t <= reach for t in range(8)]


def test_a_frozen_stem_has_no_gradient_and_keeps_its_statistics():
    for freeze in (False, True):
        net = ToyVideoNet(3, freeze_stem=freeze)
        variables = net.init(jax.random.key(1), CLIPS)

        @jax.jit
        def loss(params, net=net, variables=variables):
            logits, updated = net.apply(
                {**variables, "params": params}, CLIPS, train=True, mutable=["batch_stats"]
            )
            return jnp.sum(jnp.sin(logits)), updated["batch_stats"]

        gradient, statistics = jax.grad(loss, has_aux=True)(variables["params"])
        for stem in ("stem1", "stem2", "stem3"):
            assert bool(gradient[stem]["kernel"].any()) is not freeze
            same = np.array_equal(
                statistics[f"{stem}_norm"]["mean"], variables["batch_stats"][f"{stem}_norm"]["mean"]
            )
            assert same is freeze
        assert gradient["head"]["kernel"].any()


@pytest.mark.usefixtures("as_users_see_it")
def test_an_unknown_kind():
    with pytest.raises(ValueError, match=r"kind must be one of 'c2d', 'i3d'; got 'I3D'"):
        ToyVideoNet(2, kind="I3D").init(jax.random.key(0), CLIPS)


def test_inflated_kernels_give_a_static_clip_the_answer_of_its_frame():
    kernel = jax.random.normal(jax.random.key(0), (1, 1, 3, 4))
    image = jax.random.normal(jax.random.key(1), (2, 1, 5, 5, 3))
    clip = jnp.repeat(image, 7, axis=1)
    flat = VideoConv(4, (1, 1, 1)).apply({"params": {"kernel": kernel[None]}}, image)
    inflated = VideoConv(4, (3, 1, 1)).apply(
        {"params": {"kernel": nl.weights.inflate(kernel, 3)}}, clip
    )
    chex.assert_trees_all_close(
        inflated[:, 1:-1], jnp.repeat(flat, 5, axis=1), rtol=1e-4, atol=1e-6
    )


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
