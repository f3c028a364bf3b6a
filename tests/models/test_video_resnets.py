"""The video networks: sizes, what reaches what, options, and errors before any long work."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nonlocal_jax as nl
from nonlocal_jax.models import cost, video_resnet

SMALL = {
    "depth": (1, 2, 2, 1),
    "nonlocal_blocks": {"res3": (0,)},
    "num_classes": 3,
    "preset": "slowfast",
}
CLIP = jax.random.normal(jax.random.key(0), (2, 8, 33, 34, 3))


def small(**options):
    return video_resnet(**SMALL | options)


def random(model):
    """Returns variables with which every branch and block contributes to the output."""
    draw = np.random.default_rng(0)

    def leaf(path, like):
        name = path[-1].key
        if name == "kernel":
            return jnp.asarray(
                draw.standard_normal(like.shape) * (2 / np.prod(like.shape[:-1])) ** 0.5,
                jnp.float32,
            )
        low, high = (0.4, 0.9) if name in ("scale", "var") else (-0.2, 0.2)
        return jnp.asarray(draw.uniform(low, high, like.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(
        leaf, jax.eval_shape(model.init, jax.random.key(0), model.example)
    )


@pytest.mark.parametrize(
    ("clip", "group_size"), [("8x8", {"res3": 3}), ("32x2", {"res3": 5, "res4": 4}), ("8x8", 80)]
)
def test_the_example_makes_whole_groups(clip, group_size):
    model = small(clip=clip, group_size=group_size, nonlocal_blocks={"res3": (0,), "res4": (0,)})
    assert model.example.shape[1] >= 64
    jax.eval_shape(model.init, jax.random.key(0), model.example)


def run(model, variables, clip=CLIP):
    return jax.jit(model.apply)(variables, clip)


def stages(model, shape):
    variables = jax.eval_shape(model.init, jax.random.key(0), model.example)
    clip = jax.ShapeDtypeStruct((1, *shape, 3), jnp.float32)
    _, state = jax.eval_shape(
        lambda v, x: model.apply(v, x, mutable=["intermediates"]), variables, clip
    )
    return {
        name: value[0].shape[1:]
        for name, value in state["intermediates"].items()
        if isinstance(value, tuple)
    }


@pytest.mark.parametrize(
    ("preset", "clip", "shape", "pool1", "res2", "res3"),
    [
        ("paper", "32x2", (32, 224, 224), (8, 56, 56, 64), (8, 56, 56, 256), (4, 28, 28, 512)),
        ("caffe2", "32x2", (32, 224, 224), (8, 55, 55, 64), (8, 55, 55, 256), (4, 28, 28, 512)),
        ("caffe2", "8x8", (8, 224, 224), (8, 55, 55, 64), (8, 55, 55, 256), (4, 28, 28, 512)),
        (
            "caffe2",
            "128x1",
            (128, 224, 224),
            (32, 55, 55, 64),
            (32, 55, 55, 256),
            (16, 28, 28, 512),
        ),
        ("slowfast", "8x8", (8, 256, 320), (8, 64, 80, 64), (8, 64, 80, 256), (4, 32, 40, 512)),
        (
            "slowfast",
            "32x4",
            (32, 224, 224),
            (32, 56, 56, 64),
            (32, 56, 56, 256),
            (16, 28, 28, 512),
        ),
        ("mmcv", "32x2", (32, 224, 224), (8, 56, 56, 64), (8, 56, 56, 256), (4, 28, 28, 512)),
    ],
)
def test_sizes_of_the_layouts(preset, clip, shape, pool1, res2, res3):
    found = stages(video_resnet(50, nonlocal_blocks=0, clip=clip, preset=preset), shape)
    assert (found["pool1"], found["res2"], found["pool2"], found["res3"]) == (
        pool1,
        res2,
        (res3[0], *res2[1:]),
        res3,
    )
    t, h, w, _ = res3
    assert (found["res4"], found["res5"]) == ((t, h // 2, w // 2, 1024), (t, h // 4, w // 4, 2048))


@pytest.mark.parametrize(
    ("depth", "kind", "parameters"),
    [
        (50, "c2d", 24_327_632), (50, "i3d_3x1x1", 28_043_472), (50, "i3d_3x3x3", 33_433_808),
        (101, "c2d", 43_319_760), (101, "i3d_3x1x1", 51_754_192), (101, "i3d_3x3x3", 63_042_768),
    ],
)  # fmt: skip
def test_parameters_are_those_of_the_published_networks(depth, kind, parameters):
    model = video_resnet(depth, kind, 0, preset="slowfast")
    variables = jax.eval_shape(model.init, jax.random.key(0), model.example)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == parameters


@pytest.mark.parametrize(
    ("depth", "count", "preset", "places"),
    [
        (50, 0, "paper", {}),
        (50, 1, "paper", {"res4": (4,)}),
        (101, 1, "paper", {"res4": (21,)}),
        (50, 5, "paper", {"res3": (1, 3), "res4": (1, 3, 5)}),
        (101, 5, "caffe2", {"res3": (1, 3), "res4": (6, 13, 20)}),
        (101, 5, "slowfast", {"res3": (1, 3), "res4": (1, 3, 5)}),
        (50, 10, "paper", {"res3": (0, 1, 2, 3), "res4": (0, 1, 2, 3, 4, 5)}),
        (50, {"res2": (0, 2), "res5": (1,), "res3": ()}, "paper", {"res2": (0, 2), "res5": (1,)}),
    ],
)
def test_where_the_blocks_are(depth, count, preset, places):
    model = video_resnet(depth, nonlocal_blocks=count, preset=preset)
    assert dict(model.nonlocal_blocks) == places
    assert hash(model) == hash(model.clone())
    params = jax.eval_shape(model.init, jax.random.key(0), model.example)["params"]
    expected = {f"nonlocal_{stage}_{i}" for stage, at in places.items() for i in at}
    assert {name for name in params if name.startswith("nonlocal")} == expected


@pytest.mark.parametrize(("kind", "reach"), [("c2d", 0), ("i3d_3x1x1", 4), ("i3d_3x3x3", 4)])
def test_how_far_in_time_a_frame_sees(kind, reach):
    """By the gradient of res2 at frame 0: 5 taps of conv1 reach 2 frames, 3 taps of a block 1."""
    model = small(kind=kind, nonlocal_blocks=0, depth=(2, 1, 1, 1))
    variables = random(model)

    def first(clip):
        return model.apply(variables, clip, mutable=["intermediates"])[1]["intermediates"]["res2"][
            0
        ][:, 0].sum()

    effect = np.abs(jax.jit(jax.grad(first))(CLIP)).sum((0, 2, 3, 4))
    seen = effect > 1e-6 * effect.max()  # what cancels in tiles leaves rounding errors
    assert list(seen) == [t <= reach for t in range(8)]


@pytest.mark.parametrize(
    ("axes", "group_size"), [("spacetime", None), ("space", None), ("time", None), ("spacetime", 2)]
)
def test_blocks_have_their_axes_and_groups(axes, group_size):
    model = small(
        kind="c2d",
        block_options={"axes": axes, "subsample": False},
        group_size=group_size and {"res3": group_size},
    )
    variables = random(model)

    def first(clip):  # frame 0 of 4 after the block of res3
        return model.apply(variables, clip, mutable=["intermediates"])[1]["intermediates"]["res3"][
            0
        ][:, 0].sum()

    seen = np.abs(jax.jit(jax.grad(first))(CLIP)).sum((0, 2, 3, 4)) > 0
    reach = (
        {"space": 2, "time": 8, "spacetime": 8}[axes] if group_size is None else 2 * group_size
    )  # pool2 joins two
    assert list(seen) == [t < reach for t in range(8)]


def test_new_blocks_do_not_change_the_answer():
    plain = small(nonlocal_blocks=0)
    variables, with_blocks = random(plain), jax.jit(small().init)(jax.random.key(1), CLIP)
    merged = {name: {**with_blocks[name], **variables[name]} for name in ("params", "batch_stats")}
    chex.assert_trees_all_close(run(small(), merged), run(plain, variables), rtol=1e-5, atol=1e-6)
    assert len(nl.describe(small(), merged, CLIP, expected=1)) == 1


def test_residual_branches_start_at_zero_where_the_source_has_them_so():
    for options, scale in (({}, 0), ({"preset": "paper"}, 1), ({"zero_init_residual": False}, 1)):
        model = small(**options, kind="c2d", nonlocal_blocks=0, depth=(1, 1, 1, 1))
        params = jax.jit(model.init)(jax.random.key(0), CLIP)["params"]
        assert set(np.unique(params["res3_0"]["norm_c"]["scale"])) == {scale}
        assert set(np.unique(params["res3_0"]["norm_a"]["scale"])) == {1}


def test_a_frozen_network_gives_the_same_answer():
    model, frozen = small(), small(frozen_bn=True)
    variables = random(model)
    folded = nl.layers.freeze_batch_norm(variables)
    assert jax.tree.structure(folded) == jax.tree.structure(random(frozen))
    chex.assert_trees_all_close(run(frozen, folded), run(model, variables), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("remat", [True, jax.checkpoint_policies.dots_saveable])
def test_remat_changes_memory_only(remat):
    def step(model):
        def loss(params):
            logits, _ = model.apply(
                {**variables, "params": params}, CLIP, train=True, mutable=["batch_stats"]
            )
            return jnp.sum(jnp.sin(logits))

        lowered = jax.jit(jax.grad(loss)).lower(variables["params"])
        return lowered.as_text().count("stablehlo.convolution"), lowered.compile()(
            variables["params"]
        )

    variables = random(small())
    (fewer, kept), (more, again) = step(small(dropout=0.0)), step(small(dropout=0.0, remat=remat))
    assert more > fewer  # something is computed again
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(kept))
    chex.assert_trees_all_close(again, kept, rtol=1e-3, atol=1e-4 * scale)


def test_dropout_only_in_training():
    model = small(dropout=0.9)
    variables = random(model)
    chex.assert_trees_all_equal(run(model, variables), run(small(dropout=0.0), variables))

    @jax.jit
    def train(key):
        return model.apply(
            variables, CLIP, train=True, mutable=["batch_stats"], rngs={"dropout": key}
        )[0]

    assert not np.array_equal(train(jax.random.key(0)), train(jax.random.key(1)))


def test_bfloat16_is_near_float32():
    variables = random(small())
    expected, half = run(small(), variables), run(small(dtype=jnp.bfloat16), variables)
    assert half.dtype == jnp.float32
    assert jnp.linalg.norm(half - expected) < 0.05 * jnp.linalg.norm(expected)
    state = jax.eval_shape(
        lambda v: small(dtype=jnp.bfloat16).apply(v, CLIP, mutable=["intermediates"])[1], variables
    )
    assert state["intermediates"]["res5"][0].dtype == jnp.bfloat16


def test_the_head_slides_over_larger_maps():
    """res5 of 33×34 pixels is 2×2; windows of 1×2 are two, one above the other."""
    variables = random(small())
    state = jax.jit(lambda v, x: small().apply(v, x, mutable=["intermediates"]))(variables, CLIP)[1]
    features = state["intermediates"]["res5"][0]
    assert features.shape[2:4] == (2, 2)
    head = variables["params"]["head"]
    windows = features.mean((1, 3)) @ head["kernel"] + head["bias"].reshape(
        1, 1, -1
    )  # (B, 2, classes)
    softmax = run(small(head_window=(1, 2)), variables)
    chex.assert_trees_all_close(
        jnp.exp(softmax), jax.nn.softmax(windows).mean(1), rtol=1e-4, atol=1e-6
    )
    logits = run(small(head_window=(1, 2), window_average="logits"), variables)
    chex.assert_trees_all_close(logits, windows.mean(1), rtol=1e-4, atol=1e-5)
    for whole in ((7, 7), None):
        chex.assert_trees_all_close(
            run(small(head_window=whole), variables), windows.mean(1), rtol=1e-4, atol=1e-5
        )


def test_resnext_by_data():
    model = video_resnet(
        (3, 8, 36, 3), "c2d", 0, preset="slowfast", groups=32, width_per_group=8, num_classes=1000
    )
    params = jax.eval_shape(model.init, jax.random.key(0), model.example)["params"]
    assert params["res2_0"]["conv_b"]["kernel"].shape == (1, 3, 3, 8, 256)
    resnext101 = cost(
        video_resnet(
            101, "c2d", 0, preset="slowfast", groups=32, width_per_group=8, num_classes=1000
        ),
        (1, 2, 224, 224, 3),
    )
    assert resnext101.parameters == 88_791_336  # ResNeXt-101 32×8d, as its image network


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize(
    ("shape", "preset", "clip", "message"),
    [
        (
            (2, 8, 33, 34, 1),
            "slowfast",
            "8x8",
            r"three colour channels last; got \(2, 8, 33, 34, 1\)",
        ),
        (
            (2, 8, 33, 34, 4),
            "slowfast",
            "8x8",
            r"three colour channels last; got \(2, 8, 33, 34, 4\)",
        ),
        ((8, 33, 34, 3), "slowfast", "8x8", r"shape \(B, T, H, W, 3\).*got \(8, 33, 34, 3\)"),
        ((2, 1, 33, 34, 3), "slowfast", "8x8", "at least 2 frames of 1×1 pixels.*got 1 of 33×34"),
        ((2, 8, 4, 34, 3), "caffe2", "8x8", "at least 2 frames of 5×5 pixels.*got 8 of 4×34"),
        ((2, 6, 33, 34, 3), "caffe2", "32x2", "at least 7 frames of 5×5 pixels.*got 6 of 33×34"),
        (
            (2, 8, 8, 8, 3),
            "slowfast",
            "8x8",
            r"subsampling window \(1, 2, 2\) must not be larger than the map \(4, 1, 1\)",
        ),
    ],
)
def test_bad_clips(shape, preset, clip, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(small(preset=preset, clip=clip).init, jax.random.key(0), jnp.ones(shape))


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 34}, "depth must be one of 50, 101, 152; got 34"),
        (
            {"depth": (1, 0, 1, 1)},
            r"residual blocks of res2 to res5, each at least 1; got \(1, 0, 1, 1\)",
        ),
        ({"kind": "i3d"}, "kind must be one of 'c2d', 'i3d_3x1x1', 'i3d_3x3x3'; got 'i3d'"),
        ({"clip": "16x4"}, "clip must be one of .*'32x2', '128x1'; got '16x4'"),
        ({"preset": "torch"}, "preset must be one of .*; got 'torch'"),
        ({"nonlocal_blocks": 3}, "nonlocal_blocks must be one of 0, 1, 5, 10; got 3"),
        (
            {"nonlocal_blocks": 5},
            r"5 blocks want 2 residual blocks in res3 and 3 in res4; got \(1, 2, 2, 1\)",
        ),
        (
            {"nonlocal_blocks": 1, "depth": (1, 1, 1, 1)},
            "right before the last residual block of res4, which has 1",
        ),
        (
            {"nonlocal_blocks": {"res1": (0,)}},
            "a stage of nonlocal_blocks must be one of .*; got 'res1'",
        ),
        (
            {"nonlocal_blocks": {"res4": (0, 2)}},
            "res4 has residual blocks 0 to 1; got 2 in nonlocal_blocks",
        ),
        ({"instantiation": "softmax"}, "instantiation must be one of .*; got 'softmax'"),
        ({"instantiation": "gaussian"}, "preset 'slowfast' has no 'gaussian'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


@pytest.mark.parametrize(
    ("options", "name"), [({"droput": 0.1}, "droput"), ({"block_options": {"pool": 1}}, "pool")]
)
def test_unknown_options(options, name):
    with pytest.raises(TypeError, match=name):
        small(**options)
