"""The video networks: sizes, what influences what, options, and errors before any long work."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variables import normal, random_variables

import nonlocal_jax as nl
from nonlocal_jax.models import cost, video_resnet

SMALL = {
    "depth": (1, 2, 2, 1),
    "kind": "c2d",
    "nonlocal_blocks": {"res3": (0,)},
    "num_classes": 3,
    "preset": "slowfast",
}
CLIP = normal((2, 8, 33, 34, 3))


def small(**options):
    return video_resnet(**SMALL | options)


@functools.cache
def variables_of_small():
    model = small()
    return random_variables(model, model.example)


@functools.cache
def answer_of_small():
    """Logits of the small network and the output of its stages."""
    apply = jax.jit(lambda clip: small().apply(variables_of_small(), clip, mutable="intermediates"))
    logits, state = apply(CLIP)
    return logits, state["intermediates"]


@pytest.mark.parametrize(
    ("clip", "group_size"), [("8x8", {"res3": 3}), ("32x2", {"res3": 5, "res4": 4}), ("8x8", 80)]
)
def test_the_example_makes_whole_groups(clip, group_size):
    model = small(clip=clip, group_size=group_size, nonlocal_blocks={"res3": (0,), "res4": (0,)})
    assert model.example.shape[1] >= 64
    assert model.example.shape[1] % model.stride_in_time == 0
    jax.eval_shape(model.init, jax.random.key(0), model.example)


@pytest.mark.parametrize(
    ("preset", "clip", "stride"), [("paper", "8x8", 2), ("caffe2", "32x2", 8), ("mmcv", "128x1", 8)]
)
def test_how_frames_are_strided(preset, clip, stride):
    assert video_resnet(preset=preset, clip=clip).stride_in_time == stride


def stages(model, shape):
    variables = jax.eval_shape(model.init, jax.random.key(0), model.example)
    clip = jax.ShapeDtypeStruct((1, *shape, 3), jnp.float32)
    apply = functools.partial(model.apply, mutable=["intermediates"])
    _, state = jax.eval_shape(apply, variables, clip)
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
    sizes = stages(video_resnet((1, 1, 1, 1), nonlocal_blocks=0, clip=clip, preset=preset), shape)
    assert (sizes["pool1"], sizes["res2"], sizes["pool2"], sizes["res3"]) == (
        pool1,
        res2,
        (res3[0], *res2[1:]),
        res3,
    )
    t, h, w, _ = res3
    assert (sizes["res4"], sizes["res5"]) == ((t, h // 2, w // 2, 1024), (t, h // 4, w // 4, 2048))


@pytest.mark.parametrize("preset", ["slowfast", "mmcv"])
@pytest.mark.parametrize("clip", ["8x8", "16x4"])
def test_sizes_without_pool2(preset, clip):
    options = {"kind": "c2d", "nonlocal_blocks": 0, "clip": clip, "preset": preset}
    model = video_resnet((1, 1, 1, 1), pool2=False, **options)
    sizes = stages(model, (8, 224, 224))
    assert "pool2" not in sizes
    assert model.stride_in_time == 1
    assert (sizes["pool1"], sizes["res2"]) == ((8, 56, 56, 64), (8, 56, 56, 256))
    assert (sizes["res3"], sizes["res5"]) == ((8, 28, 28, 512), (8, 7, 7, 2048))
    assert stages(video_resnet((1, 1, 1, 1), **options), (8, 224, 224))["res3"][0] == 4


def test_without_pool2_frames_stay_apart():
    """A C2D without pool2 averages the logits of single frames."""
    model = small(pool2=False, nonlocal_blocks=0)
    variables = random_variables(model, model.example)
    apply = jax.jit(functools.partial(model.apply, variables))
    logits = apply(CLIP[:, :1].repeat(8, axis=1))
    np.testing.assert_allclose(logits, apply(CLIP[:, :1]), rtol=1e-4, atol=1e-4)
    mean = np.mean([apply(CLIP[:, i : i + 1]) for i in range(8)], axis=0)
    np.testing.assert_allclose(apply(CLIP), mean, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize(
    ("preset", "clip", "pool2"),
    [("paper", "8x8", False), ("caffe2", "8x8", False), ("slowfast", "32x2", False)],
)
def test_layouts_that_no_source_has(preset, clip, pool2):
    message = r"pool2 must be True for clip=.*'slowfast' and 'mmcv' have one for clips of 8x8, 16x4"
    with pytest.raises(ValueError, match=message):
        video_resnet(preset=preset, clip=clip, pool2=pool2)
    with pytest.raises(ValueError, match=r"pool2 must be one of True, False; got 'no'"):
        video_resnet(preset=preset, clip=clip, pool2="no")


def test_the_c2d_of_mmaction2_pads_no_pooling():
    options = {"clip": "8x8", "preset": "mmcv"}
    sizes = [
        stages(video_resnet((1, 1, 1, 1), kind, 0, **options), (8, 224, 224))["pool1"]
        for kind in ("c2d", "i3d_3x1x1")
    ]
    assert sizes == [(8, 55, 55, 64), (8, 56, 56, 64)]


@pytest.mark.parametrize(
    ("depth", "kind", "parameters"),
    [
        (50, "c2d", 24_327_632), (50, "i3d_3x1x1", 28_043_472), (50, "i3d_3x3x3", 33_433_808),
        (101, "c2d", 43_319_760), (101, "i3d_3x1x1", 51_754_192), (101, "i3d_3x3x3", 63_042_768),
        (152, "c2d", 58_963_408),
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
    expected = {f"nonlocal_{stage}_{i}" for stage, indices in places.items() for i in indices}
    assert {name for name in params if name.startswith("nonlocal")} == expected


def influence_of_frames(model, clip, stage):
    """For each frame of the clip, how much frame 0 of a stage's output depends on it."""
    variables = random_variables(model, model.example)

    def first_frame(clip):
        _, state = model.apply(variables, clip, mutable=["intermediates"])
        return state["intermediates"][stage][0][:, 0].sum()

    return np.abs(jax.jit(jax.grad(first_frame))(clip)).sum((0, 2, 3, 4))


@pytest.mark.networks
@pytest.mark.parametrize(("kind", "reach"), [("c2d", 0), ("i3d_3x1x1", 4), ("i3d_3x3x3", 4)])
def test_how_far_in_time_a_frame_sees(kind, reach):
    """res2 of frame 0: conv1 of 5 taps sees 2 frames on, res2's two blocks of 3 taps 1 each."""
    model = small(kind=kind, nonlocal_blocks=0, depth=(2, 1, 1, 1))
    influence = influence_of_frames(model, CLIP[:, :, :17, :17], "res2")
    has_influence = influence > 1e-6 * influence.max()  # terms that cancel leave rounding errors
    assert list(has_influence) == [t <= reach for t in range(8)]


@pytest.mark.networks
@pytest.mark.parametrize(
    ("axes", "group_size"), [("spacetime", None), ("space", None), ("time", None), ("spacetime", 2)]
)
def test_blocks_have_their_axes_and_groups(axes, group_size):
    """res3 of frame 0, of the 4 after pool2, which joins two frames."""
    model = small(
        depth=(1, 1, 1, 1),
        block_options={"axes": axes, "subsample": False},
        group_size=group_size and {"res3": group_size},
    )
    influence = influence_of_frames(model, CLIP[:, :, :17, :17], "res3")
    reach = 2 * group_size if group_size else {"space": 2, "time": 8, "spacetime": 8}[axes]
    assert list(influence > 0) == [t < reach for t in range(8)]


@pytest.mark.networks
def test_new_blocks_do_not_change_the_answer():
    model, plain = small(), small(nonlocal_blocks=0)
    variables = random_variables(plain, plain.example)
    block = model.make_block("res3")
    features = jax.ShapeDtypeStruct((1, 4, 4, 4, 512), jnp.float32)
    new_block = jax.jit(block.init)(jax.random.key(1), features)
    merged = {
        name: {**variables[name], "nonlocal_res3_0": new_block[name]}
        for name in ("params", "batch_stats")
    }
    shapes = jax.eval_shape(model.init, jax.random.key(0), model.example)
    chex.assert_trees_all_equal_shapes(merged, shapes)
    expected = jax.jit(plain.apply)(variables, CLIP)
    logits = jax.jit(model.apply)(merged, CLIP)
    chex.assert_trees_all_close(logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "scale"), [({}, 0), ({"preset": "paper"}, 1), ({"zero_init_residual": False}, 1)]
)
def test_residual_branches_start_at_zero_where_the_source_has_them_so(options, scale):
    model = small(**options, nonlocal_blocks=0, depth=(1, 1, 1, 1))

    @jax.jit
    def scales(key):
        params = model.init(key, jnp.ones((1, 2, 17, 17, 3)))["params"]
        return [params["res3_0"][norm]["scale"] for norm in ("norm_c", "norm_a")]

    last, first = scales(jax.random.key(0))
    assert set(np.unique(last)) == {scale}
    assert set(np.unique(first)) == {1}


@pytest.mark.networks
def test_a_frozen_network_gives_the_same_answer():
    frozen = small(frozen_bn=True)
    folded = nl.layers.freeze_batch_norm(variables_of_small())
    shapes = jax.eval_shape(frozen.init, jax.random.key(0), frozen.example)
    assert jax.tree.structure(folded) == jax.tree.structure(shapes)
    expected, _ = answer_of_small()
    logits = jax.jit(frozen.apply)(folded, CLIP)
    chex.assert_trees_all_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.networks
@pytest.mark.parametrize("remat", [True, jax.checkpoint_policies.dots_saveable])
def test_remat_changes_memory_only(remat):
    options = {"dropout": 0.0, "depth": (1, 2, 1, 1)}
    model = small(**options)
    variables = random_variables(model, model.example)

    def compile_step(model):
        def loss(params):
            inputs = {**variables, "params": params}
            clip = jnp.asarray(CLIP)
            logits, _ = model.apply(inputs, clip, train=True, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(logits))

        lowered = jax.jit(jax.grad(loss)).lower(variables["params"])
        gradient = lowered.compile()(variables["params"])
        return lowered.as_text().count("stablehlo.convolution"), gradient

    convolutions, expected = compile_step(model)
    more_convolutions, gradient = compile_step(small(**options, remat=remat))
    assert more_convolutions > convolutions  # some are recomputed
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    chex.assert_trees_all_close(gradient, expected, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.networks
def test_dropout_only_in_training():
    model, variables = small(dropout=0.9), variables_of_small()
    expected, _ = answer_of_small()  # with another share
    logits = jax.jit(model.apply)(variables, CLIP)
    chex.assert_trees_all_close(logits, expected, rtol=1e-4, atol=1e-5)

    @jax.jit
    def train(key):
        options = {"train": True, "mutable": ["batch_stats"]}
        return model.apply(variables, jnp.asarray(CLIP), rngs={"dropout": key}, **options)[0]

    assert not np.array_equal(train(jax.random.key(0)), train(jax.random.key(1)))


@pytest.mark.networks
def test_bfloat16_is_near_float32():
    model, variables = small(dtype=jnp.bfloat16), variables_of_small()
    expected, _ = answer_of_small()
    half = jax.jit(model.apply)(variables, CLIP)
    assert half.dtype == jnp.float32
    assert jnp.linalg.norm(half - expected) < 0.05 * jnp.linalg.norm(expected)
    apply = functools.partial(model.apply, mutable=["intermediates"])
    _, state = jax.eval_shape(apply, variables, CLIP)
    assert state["intermediates"]["res5"][0].dtype == jnp.bfloat16


def test_blocks_have_the_dtypes_of_the_network():
    clip = jax.ShapeDtypeStruct((1, 8, 33, 34, 3), jnp.float32)

    def inner_dtypes(**options):
        """Returns the dtypes of the parameters of a block, and of its queries and values."""
        dtypes = []
        with nl.layers.tap(lambda call: dtypes.extend((call.theta.dtype, call.g.dtype))):
            variables = jax.eval_shape(small(**options).init, jax.random.key(0), clip)
        (name,) = (name for name in variables["params"] if name.startswith("nonlocal"))
        leaves = jax.tree.leaves(variables["params"][name])
        return {leaf.dtype.name for leaf in leaves}, {dtype.name for dtype in dtypes}

    assert inner_dtypes() == ({"float32"}, {"float32"})
    assert inner_dtypes(dtype=jnp.bfloat16) == ({"float32"}, {"bfloat16"})
    halves = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    assert inner_dtypes(**halves) == ({"bfloat16"}, {"bfloat16"})
    overridden = {"block_options": {"dtype": jnp.float32}}
    assert inner_dtypes(dtype=jnp.bfloat16, **overridden) == ({"float32"}, {"float32"})


@pytest.mark.parametrize("kind", ["i3d_3x1x1", "c2d"])
def test_strict_promotion_in_half_precision(kind):
    model = nl.models.video_resnet((1, 1, 2, 1), kind, 1, num_classes=7, dtype=jnp.bfloat16)
    clip = jax.ShapeDtypeStruct((1, 8, 32, 32, 3), jnp.bfloat16)

    def loss(params, variables, clip):
        variables = {**variables, "params": params}
        options = {
            "train": True,
            "mutable": ["batch_stats"],
            "rngs": {"dropout": jax.random.key(0)},
        }
        return model.apply(variables, clip, **options)[0].sum()

    with jax.numpy_dtype_promotion("strict"):
        variables = jax.eval_shape(model.init, jax.random.key(0), clip)
        jax.eval_shape(model.apply, variables, clip)
        jax.eval_shape(jax.grad(loss), variables["params"], variables, clip)


@pytest.mark.networks
def test_the_head_slides_over_larger_maps():
    """res5 of 33×34 pixels is 2×2; windows of 1×2 are two, one above the other."""
    variables = variables_of_small()
    expected, intermediates = answer_of_small()
    features = intermediates["res5"][0]
    assert features.shape[2:4] == (2, 2)
    head = jax.tree.map(np.asarray, variables["params"]["head"])
    windows = np.asarray(features).mean((1, 3)) @ head["kernel"] + head["bias"]  # (B, 2, classes)

    sliding = small(head_window=(1, 2)), small(head_window=(1, 2), window_average="logits")
    whole = small(head_window=(7, 7)), small(head_window=None)

    @jax.jit
    def answers(clip):
        """One program, in which XLA merges the networks before their heads."""
        return [model.apply(variables, clip) for model in (*sliding, *whole)]

    softmax, logits, *averages = answers(CLIP)
    mean_softmax = jax.nn.softmax(windows).mean(1)
    chex.assert_trees_all_close(jnp.exp(softmax), mean_softmax, rtol=1e-4, atol=1e-6)
    for average in (logits, *averages, expected):
        chex.assert_trees_all_close(average, windows.mean(1), rtol=1e-4, atol=1e-5)


def test_resnext_by_data():
    options = {"preset": "slowfast", "groups": 32, "width_per_group": 8, "num_classes": 1000}
    model = video_resnet((3, 1, 1, 1), "c2d", 0, **options)
    params = jax.eval_shape(model.init, jax.random.key(0), model.example)["params"]
    assert params["res2_0"]["conv_b"]["kernel"].shape == (1, 3, 3, 8, 256)
    resnext101 = cost(video_resnet(101, "c2d", 0, **options), (1, 2, 224, 224, 3))
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
        (
            (2, 3, 8, 33, 34),
            "slowfast",
            "8x8",
            r"got \(2, 3, 8, 33, 34\)\. Axis 1 has 3, .*: pass jnp.moveaxis\(clip, 1, -1\)",
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
    model, x = small(preset=preset, clip=clip), jax.ShapeDtypeStruct(shape, jnp.float32)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), x)


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
        ({"clip": "16x8"}, "clip must be one of .*'32x2', '128x1'; got '16x8'"),
        ({"preset": "torch"}, "preset must be one of .*; got 'torch'"),
        ({"nonlocal_blocks": 3}, "nonlocal_blocks must be one of 0, 1, 5, 10; got 3"),
        (
            {"nonlocal_blocks": 5},
            r"at least 2 .* in res3 and 3 in res4 for 5 non-local blocks; got \(1, 2, 2, 1\)",
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
            "nonlocal_blocks must name residual blocks 0 to 1 of res4; got 2",
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


def paired_training_step(columns):
    """Returns a training step of clips with some columns, its parameters, and its program."""
    model = small(kind="i3d_3x1x1", depth=(1, 1, 1, 1), nonlocal_blocks=0, dropout=0.0)
    clip = jnp.asarray(normal((2, 4, 32, columns, 3)))
    variables = random_variables(model, model.example)

    def step(params):
        def loss(params):
            inputs = {**variables, "params": params}
            logits, updated = model.apply(inputs, clip, train=True, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(logits)), updated

        return jax.value_and_grad(loss, has_aux=True)(params)

    return step, variables["params"], str(jax.make_jaxpr(step)(variables["params"]))


@pytest.mark.networks
def test_training_with_paired_columns_changes_nothing(monkeypatch):
    step, params, program = paired_training_step(columns=32)
    assert "f32[2,4,16,8,128]" in program
    found = jax.jit(step)(params)
    monkeypatch.setattr(nl.models.VideoResNet, "_can_pair_columns", lambda self, clip: False)
    expected = jax.jit(lambda params: step(params))(params)
    chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=1e-4)


def test_an_odd_number_of_columns_after_conv1_makes_no_pairs():
    _, _, program = paired_training_step(columns=30)
    assert "f32[2,4,16,15,64]" in program
