"""Configurations in a file answer what its arrays leave open, and nothing of them is executed."""

import contextlib
import dataclasses
import re
import time
from pathlib import Path

import numpy as np
import pytest
from weights import forge, samples

from nonlocal_jax.weights import read
from nonlocal_jax.weights.build import Choices, build, call, notes, open_questions, options
from nonlocal_jax.weights.configurations import NOT_STATED, read_configuration
from nonlocal_jax.weights.contradictions import warn_of_contradictions
from nonlocal_jax.weights.infer import architecture
from nonlocal_jax.weights.literals import MAX_CHARACTERS, parse_python
from nonlocal_jax.weights.loading import load_checkpoint

PLACES = {"res3": (1,), "res4": (0,)}


def slowfast(**changes):
    """Writes a configuration as PySlowFast does, in YAML of blocks with sorted keys."""
    values = {
        "frames": 8,
        "rate": 8,
        "arch": "i3d",
        "function": "softmax",
        "pool": (1, 2, 2),
        "stride_1x1": "false",
        "groups": 1,
        "dilation": 1,
    } | changes
    t, h, w = values["pool"]
    pools = f"  - - - {t}\n      - {h}\n      - {w}\n" * 4
    groups = f"  - - {values['groups']}\n" * 4
    return (
        "BN:\n  FREEZE: false\n  NORM_TYPE: batchnorm\n  NUM_SPLITS: 1\n"
        "DATA:\n  CROP_SIZE: 224\n  MEAN:\n  - 0.45\n  - 0.45\n  - 0.45\n"
        f"  NUM_FRAMES: {values['frames']}\n  PATH_PREFIX: ''\n"
        f"  SAMPLING_RATE: {values['rate']}\n"
        f"MODEL:\n  ARCH: {values['arch']}\n  DROPOUT_RATE: 0.5\n  MODEL_NAME: ResNet\n\n"
        f"NONLOCAL:\n  GROUP:\n{groups}  INSTANTIATION: {values['function']}\n"
        f"  LOCATION:\n  - - []\n  - - - 1\n  - - - 0\n  - - []\n  POOL:\n{pools}"
        "RESNET:\n  DEPTH: 50\n  NUM_BLOCK_TEMP_KERNEL:\n  - - 3\n  - - 4\n  - - 6\n  - - 3\n"
        f"  SPATIAL_DILATIONS:\n  - - 1\n  - - 1\n  - - 1\n  - - {values['dilation']}\n"
        "  SPATIAL_STRIDES:\n  - - 1\n  - - 2\n  - - 2\n  - - 2\n"
        f"  STRIDE_1X1: {values['stride_1x1']}\n  TRANS_FUNC: bottleneck_transform\n"
    )


def mmaction2(
    backbone="",
    block="mode='dot_product', sub_sample=True, use_scale=False",
    step="",
    conv1="conv1_kernel=(5, 7, 7),",
):
    """Writes a configuration as mmaction2 does, in Python, by the formatter of mmengine."""
    return (
        "auto_scale_lr = dict(base_batch_size=64, enable=False)\n"
        "default_hooks = dict(\n    checkpoint=dict(interval=5, type='CheckpointHook'))\n"
        "launcher = 'none'\nload_from = None\n"
        "model = dict(\n    type='Recognizer3D',\n    backbone=dict(\n"
        f"        type='ResNet3d', depth=50, {conv1} conv_cfg=dict(type='Conv3d'), {backbone}\n"
        "        norm_eval=False, pretrained2d=True,\n"
        f"        non_local_cfg=dict({block}),\n"
        "        inflate=((1, 1, 1), (1, 0, 1, 0), (1, 0), (0, 1, 0))),\n"
        "    cls_head=dict(average_clips='prob', num_classes=7, type='I3DHead'))\n"
        "data_root = 'data/kinetics400'  # a folder\n"
        "optim_wrapper = dict(\n    clip_grad=dict(max_norm=40, norm_type=2),\n"
        "    paramwise_cfg=dict(custom_keys=dict({'backbone.conv1': dict(lr_mult=0.1)})))\n"
        "train_pipeline = [\n    dict(type='DecordInit'),\n"
        "    dict(type='SampleFrames', clip_len=32, frame_interval=2, num_clips=1)]\n"
        f"{step}"
    )


LONG = "conv1_stride_t=2, pool1_stride_t=2,"


def checkpoint(model, names, text):
    return dataclasses.replace(samples.checkpoint(model, names), configuration=text)


STATED = [
    (slowfast(), {}, {}),
    (slowfast(function="dot_product"), {"instantiation": "dot_product"}, {}),
    (slowfast(pool=(2, 2, 2)), {"block_options": {"subsample": (2, 2, 2)}}, {}),
    (slowfast(pool=(1, 1, 1)), {"block_options": {"subsample": False}}, {}),
    (slowfast(arch="slow_i3d"), {"pool2": False}, {}),
    (slowfast(arch="c2d_nopool"), {"pool2": False}, {}),
    (
        slowfast(arch="i3d_nopool", frames=16, rate=4, groups=2),
        {"clip": "16x4", "pool2": False},
        {"res3": 8, "res4": 8},
    ),
    (slowfast(frames=32, rate=4), {"clip": "32x4"}, {}),
    (slowfast(stride_1x1="true"), {"stride_at": "conv_a"}, {}),
    (slowfast(frames=16, rate=4, groups=2), {"clip": "16x4"}, {"res3": 4, "res4": 4}),
]


@pytest.mark.parametrize(("text", "extra", "groups"), STATED)
def test_slowfast(text, extra, groups):
    found = architecture(checkpoint(samples.network(blocks=samples.BLOCKS), "slowfast", text))
    assert open_questions(found) == []
    expected = {"clip": "8x8", "instantiation": "embedded_gaussian"} | extra
    chosen = options(found)
    for name in ("clip", "instantiation", "pool2", "stride_at", "block_options"):
        assert chosen.get(name) == expected.get(name), name
    assert chosen.get("group_size", {}) == groups
    model = build(found)
    assert model.make_block("res3").operation.group_size == groups.get("res3")


def test_choices_come_before_the_configuration():
    found = architecture(checkpoint(samples.network(blocks=samples.BLOCKS), "slowfast", slowfast()))
    choices = Choices(clip="32x4", pool2=False, instantiation="dot_product", key_pool=(2, 2, 2))
    chosen = options(found, choices)
    assert (chosen["clip"], chosen["pool2"], chosen["instantiation"]) == (
        "32x4",
        False,
        "dot_product",
    )
    assert chosen["block_options"] == {"subsample": (2, 2, 2)}


def test_a_clip_that_no_layout_has_stays_open():
    """PySlowFast has no strides in time before pool2, other than what 32x2 stands for here."""
    text = slowfast(frames=32, rate=2)
    found = architecture(checkpoint(samples.network(), "slowfast", text))
    [question] = open_questions(found)
    assert question.name == "clip"
    expected = "its configuration has 32x2 with strides in time of 1 in conv1 and 1 in pool1"
    assert expected in str(question)


MM_STATED = [
    (mmaction2(LONG), {"clip": "32x2", "instantiation": "dot_product"}),
    (mmaction2(LONG, "mode='embedded_gaussian', use_scale=False"), {"clip": "32x2"}),
    (
        mmaction2(LONG, "mode='embedded_gaussian'"),
        {"clip": "32x2", "block_options": {"use_scale": True}},
    ),
    (
        mmaction2(LONG + "style='caffe',"),
        {"clip": "32x2", "instantiation": "dot_product", "stride_at": "conv_a"},
    ),
    (
        mmaction2(
            "conv1_stride_t=1, pool1_stride_t=1, with_pool2=False,",
            step="test_pipeline = [dict(type='SampleFrames', clip_len=8, frame_interval=8)]\n",
        ),
        {"clip": "8x8", "instantiation": "dot_product", "pool2": False},
    ),
    (
        mmaction2(
            "conv1_stride_t=1, pool1_stride_t=1,",
            step="val_pipeline = [dict(type='DenseSampleFrames', clip_len=16, frame_interval=4)]\n",
        ),
        {"clip": "16x4", "instantiation": "dot_product"},
    ),
    # An I3D whose conv1 has its default was trained up to version 0.15, whose strides were 2.
    (mmaction2(conv1=""), {"clip": "32x2", "instantiation": "dot_product"}),
]


@pytest.mark.parametrize(("text", "extra"), MM_STATED)
def test_mmaction2(text, extra):
    model = samples.network(blocks=samples.BLOCKS, preset="mmcv")
    found = architecture(checkpoint(model, "mmaction2", text))
    assert open_questions(found) == []
    chosen = options(found)
    expected = {"instantiation": "embedded_gaussian"} | extra
    for name in ("clip", "instantiation", "pool2", "stride_at", "block_options"):
        assert chosen.get(name) == expected.get(name), name


def test_strides_that_depend_on_the_version_of_mmaction2():
    model = samples.network(blocks=samples.BLOCKS, preset="mmcv")
    for backbone, first, second in (
        ("", "1 or 2", "1 or 2"),
        ("conv1_stride_t=1,", "1", "1 or 2"),
    ):
        found = architecture(checkpoint(model, "mmaction2", mmaction2(backbone)))
        [question] = open_questions(found)
        assert question.name == "clip"
        expected = (
            rf"has 32x2 with strides in time of {first}\b.* in conv1 and {second}\b.* in pool1"
        )
        assert re.search(expected, str(question))


def test_a_clip_of_dense_sampling_that_no_layout_has():
    step = "test_pipeline = [dict(type='DenseSampleFrames', clip_len=7, frame_interval=3)]\n"
    model = samples.network(blocks=samples.BLOCKS, preset="mmcv")
    found = architecture(checkpoint(model, "mmaction2", mmaction2(LONG, step=step)))
    assert "7x3 with strides in time of 2 in conv1 and 2 in pool1" in str(open_questions(found)[0])


@pytest.mark.parametrize("text", ["", mmaction2(conv1="")])
def test_the_scale_of_mmaction2_is_asked_where_nothing_states_it(text):
    model = samples.network(blocks=samples.BLOCKS, preset="mmcv")
    found = architecture(checkpoint(model, "mmaction2", text))
    others = Choices(clip="32x2", instantiation="embedded_gaussian")
    if text:
        assert open_questions(found, others) == []
        return
    [question] = open_questions(found, others)
    assert question.name == "use_scale"
    assert "block_options={'use_scale': ...}" in call(found, others)
    assert not any("softmax logits" in note for note in notes(found, others))
    for use_scale, expected in ((True, {"use_scale": True}), (False, None)):
        choices = dataclasses.replace(others, use_scale=use_scale)
        assert options(found, choices).get("block_options") == expected
        scaled = "are scaled" if use_scale else "are not scaled"
        assert any(f"softmax logits {scaled}" in note for note in notes(found, choices))
    assert open_questions(found, Choices(clip="32x2", instantiation="dot_product")) == []
    with pytest.raises(ValueError, match="only the embedded Gaussian has use_scale to choose"):
        options(found, Choices(clip="32x2", instantiation="dot_product", use_scale=True))


def test_choices_of_the_scale_come_before_the_configuration():
    text = mmaction2(LONG, "mode='embedded_gaussian', use_scale=False")
    model = samples.network(blocks=samples.BLOCKS, preset="mmcv")
    found = architecture(checkpoint(model, "mmaction2", text))
    assert "block_options" not in options(found)
    assert options(found, Choices(use_scale=True))["block_options"] == {"use_scale": True}


def test_temporal_groups_follow_the_choices():
    text = slowfast(groups=2, arch="none of PySlowFast")
    blocks = {"res2": (0,), **samples.BLOCKS}
    found = architecture(checkpoint(samples.network(blocks=blocks), "slowfast", text))
    assert [question.name for question in open_questions(found)] == ["pool2"]
    assert "group_size=..., " in call(found)
    for pool2, clip, sizes in (
        (True, None, (4, 2, 2)),
        (False, None, (4, 4, 4)),
        (True, "16x4", (8, 4, 4)),
    ):
        chosen = options(found, Choices(pool2=pool2, clip=clip))
        assert tuple(chosen["group_size"][stage] for stage in ("res2", "res3", "res4")) == sizes
    # A choice also comes before what the configuration states about pool2.
    found = architecture(checkpoint(samples.network(blocks=blocks), "slowfast", slowfast(groups=2)))
    assert options(found)["group_size"]["res3"] == 2
    assert options(found, Choices(pool2=False))["group_size"]["res3"] == 4


@pytest.mark.parametrize(
    ("kind", "backbone", "layout"),
    [
        ("C2D", "", ((0, 0, 0), True)),
        ("ResNet", "", ((0, 1, 1), False)),
    ],
)
def test_networks_for_images_of_mmaction2(kind, backbone, layout):
    text = f"model = dict(backbone=dict(type='{kind}', depth=50))\n"
    text += "val_pipeline = [dict(type='SampleFrames', clip_len=8, frame_interval=8)]"
    found = architecture(checkpoint(samples.network("c2d", preset="mmcv"), "mmaction2", text))
    model = build(found)
    padding, has_pool2 = layout
    assert (model.layout.pool1.padding, model.layout.pool2 is not None) == (padding, has_pool2)


UNSUPPORTED = [
    ("slowfast", slowfast(dilation=2), r"SPATIAL_DILATIONS of 1, 1, 1, 2, which must"),
    ("mmaction2", mmaction2("dilations=(1, 1, 1, 2),"), "dilations of 1, 1, 1, 2"),
    ("mmaction2", mmaction2("temporal_strides=(1, 1, 1, 2),"), "temporal_strides of 1, 1, 1, 2"),
    ("mmaction2", mmaction2("strides=(1, 2, 2, 1),"), "strides of 1, 2, 2, 1, which must be 1, 2"),
    ("mmaction2", mmaction2("conv1_stride_s=1,"), "conv1_stride_s of 1, which must be 2"),
    ("mmaction2", mmaction2("pool1_stride_s=1,"), "pool1_stride_s of 1, which must be 2"),
    ("mmaction2", mmaction2("with_pool1=False,"), "with_pool1 of False, which must be True"),
    ("mmaction2", mmaction2("norm_cfg=dict(type='BN3d', eps=0.001),"), "ε of 0.001"),
    ("mmaction2", mmaction2(LONG, "mode='gaussian'"), "has the pairwise function gaussian, whose"),
]


@pytest.mark.parametrize(("names", "text", "message"), UNSUPPORTED)
def test_what_no_network_here_has(names, text, message):
    preset = "mmcv" if names == "mmaction2" else "slowfast"
    model = samples.network(blocks=samples.BLOCKS, preset=preset)
    with pytest.raises(ValueError, match=rf"^weights\.bin, named as in {names}: .*{message}"):
        architecture(checkpoint(model, names, text))


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ("slowfast", f"RESNET: {{SPATIAL_STRIDES: [[{'1' * 9000}]]}}"),
        ("mmaction2", mmaction2(f"dilations=({'1, ' * 9000}),")),
        ("mmaction2", mmaction2(f"norm_cfg=dict(eps='{'9' * 9000}'),")),
    ],
)
def test_errors_repeat_only_the_start_of_a_setting(names, text):
    with pytest.raises(ValueError, match="its configuration has ") as raised:
        read_configuration(text, names, "i3d_3x1x1", PLACES)
    assert len(str(raised.value)) < 300


def test_pools_that_differ_by_stage():
    text = "NONLOCAL: {POOL: [[[1, 2, 2]], [[1, 2, 2]], [[2, 2, 2]], [[1, 2, 2]]]}"
    with pytest.raises(ValueError, match="pools keys differently by stage"):
        read_configuration(text, "slowfast", "c2d", PLACES)
    # Pools of stages without blocks do not matter.
    stated = read_configuration(text, "slowfast", "c2d", {"res4": (0,)})
    assert stated.key_pool == (2, 2, 2)


HOSTILE = [
    ("slowfast", "!!python/object/apply:os.system ['touch {path}']"),
    ("slowfast", "MODEL: !!python/name:os.system"),
    ("slowfast", "[" * 50_000),
    ("slowfast", "{a: " * 20_000),
    ("slowfast", "- " * 40_000),
    ("slowfast", "a: &a [1, 1]\nb: &b [*a, *a]\nMODEL: {<<: [*b, *b], ARCH: *b}"),
    ("slowfast", "&a [*a]"),
    ("slowfast", "MODEL: &m {ARCH: *m}"),
    ("slowfast", "MODEL: [1, 2]\nDATA: 7\nNONLOCAL:\n  POOL: {a: b}\n  GROUP: x\nRESNET: null"),
    ("slowfast", "DATA: {NUM_FRAMES: 99999999999999999999, SAMPLING_RATE: -3}"),
    ("slowfast", "x" * (MAX_CHARACTERS + 1)),
    ("slowfast", "\x00\x1b[2J"),
    ("mmaction2", "import os\nos.system('touch {path}')"),
    ("mmaction2", "model = __import__('os').system('touch {path}')"),
    ("mmaction2", "model = dict(a=lambda: 1)"),
    ("mmaction2", "model = " + "(" * 90_000),
    ("mmaction2", "model = " + "dict(a=" * 10_000),
    ("mmaction2", "model = " + "-" * 90_000 + "1"),
    ("mmaction2", "model = " + "1+" * 40_000 + "1"),
    ("mmaction2", "'" + r"\'" * 49_000),
    ("mmaction2", '"' * 99_000),
    ("mmaction2", "model = dict(backbone=dict(type=('ResNet3d',), conv1_stride_t='x'"),
    ("mmaction2", "model = (dict(backbone=3))\ntest_pipeline = 5"),
    ("mmaction2", "test_pipeline = [3, dict(type='SampleFrames', clip_len=[], frame_interval={})]"),
    ("mmaction2", "x = " + "0" * 90_000),
    ("mmaction2", ""),
]


@pytest.mark.parametrize(("names", "text"), HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_configurations_state_nothing(names, text, tmp_path):
    start = time.monotonic()
    stated = read_configuration(
        text.replace("{path}", str(tmp_path / "touched")), names, "i3d_3x1x1", PLACES
    )
    assert stated in (NOT_STATED, read_configuration("model = dict()", names, "c2d", PLACES))
    assert time.monotonic() - start < 20
    assert not list(tmp_path.iterdir())


def test_literals_of_python():
    text = "a = dict(b=(1, -2.5e-3), c=['x' 'y', None], d=True)\ne = {'f': ('g'), 'h': ()}  # i"
    assert parse_python(text) == {
        "a": {"b": ["1", "-2.5e-3"], "c": ["xy", None], "d": "True"},
        "e": {"f": "g", "h": []},
    }
    for end in (")", ",)"):
        text = "a = dict({'b.c': 1, 'd': dict({})}" + end
        assert parse_python(text) == {"a": {"b.c": "1", "d": {}}}
    for odd in (
        "a = dict({'b': 1}",
        "a = dict({'b': 1}, c=2)",
        "a = b",
        "a.b = 1",
        "a = f(1)",
        "a = dict(1)",
        "a = [1 2]",
        "a = (1",
        "a =",
    ):
        assert parse_python(odd) is None, odd


@pytest.mark.parametrize(
    "place",
    [
        {"cfg": forge.text("MODEL: 1")},
        {"meta": forge.mapping({"cfg": forge.text("MODEL: 1")})},
        {"meta": forge.mapping({"epoch": forge.number(1), "config": forge.text("MODEL: 1")})},
    ],
)
def test_where_a_file_has_its_configuration(place, tmp_path):
    arrays = {"conv1.weight": np.ones((2, 3), np.float32)}
    state, contents = forge.state_dict(arrays)
    path = tmp_path / "checkpoint.pyth"
    entries = forge.mapping({"model_state": state} | place)
    path.write_bytes(forge.zipped(entries, contents))
    assert read(path).configuration == "MODEL: 1"
    path.write_bytes(forge.zipped(state, contents))
    assert read(path).configuration == ""


SCALED = mmaction2(LONG, "mode='embedded_gaussian', sub_sample=True")
CONTRADICTIONS = [
    ("slowfast", slowfast(), {}, None),
    ("slowfast", slowfast(frames=32, rate=4), {}, None),
    (
        "slowfast",
        slowfast(),
        {"instantiation": "dot_product"},
        "'dot_product' instead of 'embedded_gaussian'",
    ),
    (
        "slowfast",
        slowfast(function="dot_product"),
        {},
        "'embedded_gaussian' instead of 'dot_product'",
    ),
    ("slowfast", slowfast(arch="i3d_nopool"), {}, "pool2=True instead of False"),
    ("slowfast", slowfast(), {"pool2": False}, "pool2=False instead of True"),
    ("slowfast", slowfast(pool=(2, 2, 2)), {}, r"key_pool=\(1, 2, 2\) instead of \(2, 2, 2\)"),
    (
        "slowfast",
        slowfast(),
        {"block_options": {"subsample": False}},
        r"key_pool=\(1, 1, 1\) instead of",
    ),
    ("slowfast", slowfast(stride_1x1="true"), {}, "stride_at='conv_b' instead of 'conv_a'"),
    ("slowfast", slowfast(dilation=2), {}, "SPATIAL_DILATIONS .* computes something else"),
    ("slowfast", slowfast(groups=2), {}, "group_size={'res3': None} instead of {'res3': 2}"),
    ("slowfast", slowfast(groups=2), {"group_size": 2}, None),
    ("mmaction2", SCALED, {}, "use_scale=False instead of True, which the configuration in"),
    ("mmaction2", SCALED, {"block_options": {"use_scale": True}}, None),
    # Without a configuration, by the names.
    ("mmaction2", "", {}, None),
    (
        "mmaction2",
        "",
        {"block_options": {"subsample": False}},
        r"subsample=False instead of True, which the names in weights\.bin show",
    ),
    (
        "pytorchvideo",
        "",
        {"pool2": False},
        r"pool2=False instead of True, which the names in weights\.bin show",
    ),
    ("pytorchvideo", "", {}, None),
]


@pytest.mark.parametrize(("names", "text", "options", "message"), CONTRADICTIONS)
def test_a_network_that_contradicts_the_file(names, text, options, message):
    """There is a warning. The network is still loaded, since it is what was asked for."""
    preset = "mmcv" if names == "mmaction2" else "slowfast"
    blocks = None if names == "pytorchvideo" else {"res3": (0,)}
    file = checkpoint(samples.tiny_network(blocks=blocks, preset=preset), names, text)
    expectation = (
        contextlib.nullcontext() if message is None else pytest.warns(UserWarning, match=message)
    )
    with expectation:
        warn_of_contradictions(file, samples.tiny_network(blocks=blocks, preset=preset, **options))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("C2D_NOPOOL_8x8_R50.pkl", {}, "pool2=True instead of False"),
        ("C2D_NOPOOL_8x8_R50.pkl", {"pool2": False}, None),
        ("another.pkl", {}, None),
        ("I3D_8x8_R50.pkl", {"pool2": False}, "pool2=False instead of True"),
    ],
)
def test_a_network_that_a_published_file_of_this_name_does_not_have(name, options, message):
    model = samples.tiny_network("c2d", **options)
    file = dataclasses.replace(samples.checkpoint(model, "caffe2"), path=Path("folder", name))
    expectation = contextlib.nullcontext()
    if message is not None:
        origin = f"PySlowFast's published file has, by whose name folder/{name} is called"
        expectation = pytest.warns(UserWarning, match=f"{message}, which {origin}")
    with expectation:
        warn_of_contradictions(file, model)


def test_loading_warns_of_contradictions():
    model = samples.tiny_network(blocks={"res3": (0,)})
    file = checkpoint(model, "slowfast", slowfast(arch="i3d_nopool"))
    with pytest.warns(UserWarning, match="pool2=True instead of False") as caught:
        load_checkpoint(file, model)
    assert len(caught) == 1
