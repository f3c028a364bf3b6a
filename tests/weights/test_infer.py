"""The network that is inferred from a file is the one that the file was made from."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from weights import samples

import nonlocal_jax as nl
from nonlocal_jax.weights import Checkpoint
from nonlocal_jax.weights.build import (
    Choices,
    OpenQuestionsError,
    build,
    build_any,
    call,
    notes,
    open_questions,
    options,
)
from nonlocal_jax.weights.infer import Architecture, architecture

video_resnet = nl.models.video_resnet
FROZEN = {"frozen_bn": True, "block_options": {"norm": None}}
TWO_STAGES = {"res3": (0, 2), "res5": (2,)}
WIDE = {"groups": 32, "width_per_group": 4}
SHORT = (1, 2, 3, 2)

KNOWN = {
    "clip": "8x8",
    "kind": "c2d",
    "instantiation": "embedded_gaussian",
    "pool2": True,
    "key_pool": (1, 2, 2),
    "use_scale": False,
}

# The names of a file, and the arguments of the network that it was made from. The usual places of
# 5 and 10 blocks exist at depths 50 and 101 only; a short network is enough for everything else.
FILES = [
    ("caffe2", 50, "i3d_3x1x1", 5, "8x8", "caffe2", {}),
    ("caffe2", 101, "i3d_3x1x1", 5, "8x8", "caffe2", {}),
    ("caffe2", 50, "c2d", 10, "8x8", "caffe2", {}),
    ("caffe2", 50, "i3d_3x1x1", 5, "8x8", "caffe2", FROZEN),
    ("caffe2", SHORT, "c2d", 0, "8x8", "caffe2", {"frozen_bn": True}),
    ("slowfast", 101, "i3d_3x1x1", 5, "8x8", "slowfast", {}),
    ("slowfast", 50, "c2d", TWO_STAGES, "8x8", "slowfast", {"num_classes": 157}),
    ("slowfast", SHORT, "i3d_3x1x1", 1, "8x8", "slowfast", WIDE),
    ("slowfast", SHORT, "i3d_3x3x3", 0, "8x8", "slowfast", {}),
    ("mmaction2", 50, "i3d_3x1x1", 5, "32x2", "mmcv", {}),
    ("mmaction2", SHORT, "i3d_3x3x3", 1, "32x2", "mmcv", {"instantiation": "gaussian"}),
    ("mmaction2", SHORT, "i3d_3x1x1", 1, "32x2", "mmcv", {"instantiation": "concatenation"}),
    ("slowfast", SHORT, "c2d", 0, "8x8", "slowfast", {"pool2": False}),
    ("slowfast", SHORT, "c2d", 1, "16x4", "slowfast", {"block_options": {"subsample": (2, 2, 2)}}),
    ("slowfast", SHORT, "i3d_3x1x1", 1, "32x4", "slowfast", {"instantiation": "dot_product"}),
    ("caffe2", SHORT, "c2d", 0, "8x8", "slowfast", {"pool2": False}),
    ("caffe2", 101, "c2d", 5, "8x8", "slowfast", {}),
    ("mmaction2", SHORT, "i3d_3x1x1", 1, "32x2", "mmcv", {"instantiation": "dot_product"}),
    ("mmaction2", SHORT, "c2d", 0, "16x4", "mmcv", {}),
    ("pytorchvideo", SHORT, "i3d_3x1x1", 0, "8x8", "slowfast", {"window_average": "logits"}),
    ("torchvision", SHORT, "c2d", 0, "8x8", "slowfast", {"num_classes": 1000}),
    ("nonlocal_jax", 50, "i3d_3x1x1", 5, "8x8", "paper", {"instantiation": "concatenation"}),
    ("nonlocal_jax", SHORT, "c2d", 1, "8x8", "slowfast", {}),
    ("nonlocal_jax", SHORT, "c2d", 1, "8x8", "mmcv", {"instantiation": "gaussian"}),
    ("nonlocal_jax", SHORT, "c2d", 1, "8x8", "mmcv", {"instantiation": "concatenation"}),
    ("nonlocal_jax", SHORT, "c2d", 1, "8x8", "paper", {"block_options": {"out_bias": True}}),
]


def edited(checkpoint, change):
    """Replaces arrays: `change` maps a name and a shape to a list of new ones."""
    arrays = {}
    for name, array in checkpoint.arrays.items():
        for new_name, shape in change(name, array.shape):
            arrays[new_name] = np.broadcast_to(np.float32(0), shape)
    return dataclasses.replace(checkpoint, arrays=arrays)


def answers(found, **known):
    """Answers every open question with what is known about the network."""
    choices = Choices()
    while questions := open_questions(found, choices):
        name = questions[0].name
        assert getattr(choices, name) is None
        choices = dataclasses.replace(choices, **{name: (KNOWN | known)[name]})
    return choices


def asked(found, choices=None):
    return [question.name for question in open_questions(found, choices or Choices())]


def error_of(checkpoint):
    """Returns the error message for a file of no network, which has one line."""
    with pytest.raises(ValueError, match=r"^weights\.bin") as raised:
        architecture(checkpoint)
    assert len(str(raised.value).splitlines()) == 1
    return str(raised.value)


@pytest.fixture(scope="module")
def caffe2():
    model = samples.network(blocks=samples.BLOCKS, preset="caffe2")
    return samples.checkpoint(model, "caffe2")


@pytest.fixture(scope="module")
def mmaction2():
    model = samples.network(blocks=samples.BLOCKS, preset="mmcv")
    return samples.checkpoint(model, "mmaction2")


@pytest.mark.parametrize(("names", "depth", "kind", "blocks", "clip", "preset", "extra"), FILES)
def test_the_network_of_a_file(names, depth, kind, blocks, clip, preset, extra):
    model = video_resnet(depth, kind, blocks, clip, preset, **extra)
    found = architecture(samples.checkpoint(model, names))
    assert found.source == names
    assert (found.depth, found.kind, found.num_classes) == (depth, kind, model.num_classes)
    assert found.nonlocal_blocks == model.nonlocal_blocks
    expected = {
        "depth": depth,
        "kind": kind,
        "nonlocal_blocks": blocks,
        "clip": clip,
        "preset": preset,
        "num_classes": model.num_classes,
    }
    if blocks:
        expected["instantiation"] = "embedded_gaussian"
    key_pool = extra.get("block_options", {}).get("subsample", (1, 2, 2))
    choices = answers(found, **{**expected, "key_pool": key_pool} | extra)
    assert options(found, choices) == expected | extra
    assert repr(build(found, choices)) == repr(eval(call(found, choices), {"nl": nl}))
    assert repr(build(found, choices)) == repr(model)
    # Without the answers another network is not built, but the arrays of all are the same.
    if asked(found):
        with pytest.raises(OpenQuestionsError, match=r"^weights\.bin does not show") as raised:
            build(found)
        for question in open_questions(found):
            assert str(question) in str(raised.value)
    assert samples.shapes(build_any(found)) == samples.shapes(model)


def test_depths_have_names():
    for depth in (50, 101, 152):
        blocks = video_resnet(depth, "c2d", 0).blocks
        assert Architecture("caffe2", "video_resnet", blocks=blocks).depth == depth


@pytest.mark.parametrize(
    "instantiation", ["gaussian", "embedded_gaussian", "dot_product", "concatenation"]
)
@pytest.mark.parametrize(
    "names", ["nonlocal_jax", "non_local_pytorch", "non_local_pytorch (first version)"]
)
def test_digits(instantiation, names):
    model = nl.models.non_local_pytorch_mnist(instantiation)
    found = architecture(samples.checkpoint(model, names))
    is_open = instantiation in ("embedded_gaussian", "dot_product")
    assert found.instantiation == (None if is_open else instantiation)
    choices = Choices(instantiation=instantiation if is_open else None)
    assert build(found, choices).instantiation == instantiation
    written = "..." if is_open else repr(instantiation)
    assert call(found) == f"nl.models.non_local_pytorch_mnist({written})"
    assert asked(found) == (["instantiation"] if is_open else [])
    if is_open:
        with pytest.raises(OpenQuestionsError, match="embedded_gaussian or dot_product: both"):
            build(found)
    message = r"non_local_pytorch_mnist has no kind to choose; got 'c2d'"
    with pytest.raises(ValueError, match=message):
        build(found, Choices(kind="c2d"))
    with pytest.raises(ValueError, match="has no pool2 to choose; got True"):
        build(found, Choices(pool2=True))
    with pytest.raises(ValueError, match="has no use_scale to choose; got False"):
        build(found, Choices(use_scale=False))


def test_an_image_network():
    model = video_resnet(SHORT, "c2d", 0, preset="caffe2", num_classes=1000)
    image = edited(
        samples.checkpoint(model, "caffe2"),
        lambda name, shape: [(name, shape[:2] + shape[3:] if len(shape) == 5 else shape)],
    )
    found = architecture(image)
    assert (found.kind, found.num_classes) == ("image", 1000)
    assert asked(found) == ["preset", "kind", "clip", "pool2"]
    assert "an image network" in str(open_questions(found)[1])
    assert call(found).startswith("nl.models.video_resnet((1, 2, 3, 2), ..., nonlocal_blocks=0")
    assert build_any(found).conv1_frames == 1
    choices = answers(found, preset="caffe2", kind="i3d_3x3x3")
    assert build(found, choices).conv1_frames == 5


def test_without_a_classifier(caffe2):
    assert architecture(caffe2).num_classes == samples.CLASSES
    headless = edited(caffe2, lambda name, shape: [] if "pred" in name else [(name, shape)])
    found = architecture(headless)
    assert found.num_classes is None
    assert "num_classes" not in options(found, answers(found, preset="caffe2"))
    assert any("no classifier" in note for note in notes(found))


def test_names_of_mmaction2_show_the_pooling(mmaction2, caffe2):
    assert architecture(mmaction2).subsample is True
    unpooled = edited(
        mmaction2, lambda name, shape: [(re.sub(r"\.(phi|g)\.0\.", r".\1.", name), shape)]
    )
    assert architecture(unpooled).subsample is False
    found = architecture(unpooled)
    assert options(found, answers(found))["block_options"] == {"subsample": False}
    assert architecture(caffe2).subsample is None
    with pytest.raises(ValueError, match=r"keys are not pooled; got key_pool=\(1, 2, 2\)"):
        build(found, Choices(key_pool=(1, 2, 2)))
    with pytest.raises(ValueError, match=r"keys are pooled; got key_pool=\(1, 1, 1\)"):
        build(architecture(mmaction2), Choices(key_pool=(1, 1, 1)))


def test_groups_of_frames_for_the_long_clips_of_caffe2(caffe2):
    """Only its networks without a norm in the blocks have them, and only for large maps."""
    released = samples.network(blocks=samples.BLOCKS, preset="caffe2", **FROZEN)
    found = architecture(samples.checkpoint(released, "caffe2"))
    for clip in ("32x4", "128x1"):
        choices = answers(found, preset="caffe2", clip=clip)
        assert options(found, choices)["group_size"] == {"res3": 4}
    assert "group_size" not in options(found, answers(found, preset="caffe2"))
    choices = answers(found, preset="caffe2", clip="32x4")
    assert "group_size" not in options(architecture(caffe2), choices)
    # Whether there are groups depends on the clip, so the call has no value for them before.
    assert "clip=..., " in call(found)
    assert "group_size=..." in call(found)
    assert "group_size" not in call(architecture(caffe2))


def test_choices_close_the_open_questions():
    model = video_resnet(50, "c2d", 5, preset="paper")
    found = architecture(samples.checkpoint(model, "nonlocal_jax"))
    assert asked(found) == ["preset", "clip", "instantiation", "key_pool"]
    choices = Choices(clip="32x2", instantiation="dot_product", preset="mmcv", fold=True)
    assert asked(found, choices) == ["key_pool"]
    choices = dataclasses.replace(choices, key_pool=(1, 2, 2))
    chosen = options(found, choices)
    names = ("clip", "instantiation", "preset", "frozen_bn")
    assert [chosen[name] for name in names] == ["32x2", "dot_product", "mmcv", True]
    assert chosen["block_options"] == {"use_bias": False}  # the preset has one, the file does not


QUESTIONS = [
    ("caffe2", {}, ["preset", "clip", "pool2", "instantiation", "key_pool"]),
    ("caffe2", {"preset": "caffe2"}, ["clip", "instantiation", "key_pool"]),
    ("caffe2", {"preset": "slowfast"}, ["clip", "pool2", "instantiation", "key_pool"]),
    ("slowfast", {"clip": "8x8"}, ["pool2", "instantiation", "key_pool"]),
    ("caffe2", {"preset": "caffe2", "clip": "32x2"}, ["instantiation", "key_pool"]),
    ("mmaction2", {}, ["clip", "pool2", "instantiation", "use_scale"]),
    # All long clips have pool2.
    ("mmaction2", {"clip": "32x2", "instantiation": "dot_product"}, []),
]


@pytest.mark.parametrize(("names", "chosen", "questions"), QUESTIONS)
def test_what_is_asked(names, chosen, questions):
    preset = "mmcv" if names == "mmaction2" else "slowfast"
    model = samples.network(blocks=samples.BLOCKS, preset=preset)
    found = architecture(samples.checkpoint(model, names))
    choices = Choices(**chosen)
    assert asked(found, choices) == questions
    for name in questions:
        block_option = {"key_pool": "subsample"}.get(name, name)
        is_of_blocks = name in ("key_pool", "use_scale")
        written = f"block_options={{'{block_option}': ...}}" if is_of_blocks else f"{name}=..."
        assert written in call(found, choices)
    if questions:
        with pytest.raises(OpenQuestionsError):
            options(found, choices)


@pytest.mark.parametrize(
    ("names", "preset", "source"),
    [
        ("slowfast", None, "slowfast"),
        ("pytorchvideo", None, "pytorchvideo"),
        ("caffe2", "slowfast", "PySlowFast"),
    ],
)
def test_long_clips_of_sources_that_have_none(names, preset, source):
    """Their networks have no stride in time before pool2, whatever the clip."""
    found = architecture(samples.checkpoint(samples.network(preset="slowfast"), names))
    choices = Choices(preset=preset)
    question = next(q for q in open_questions(found, choices) if q.name == "clip")
    assert question.answers == ("8x8", "16x4", "32x4")
    long = dataclasses.replace(choices, clip="32x2")
    assert ("pool2" in asked(found, long)) == (names != "pytorchvideo")
    for function in (options, call, build_any):
        message = rf"clip must be 8x8, 16x4, 32x4 for a file of {source}, .*; got 32x2"
        with pytest.raises(ValueError, match=message):
            function(found, long)


def test_flat_kernels_with_a_time_axis_of_mmaction2():
    """Its ResNet3d without inflation pads pool1, and its C2D, which this preset has, does not."""
    found = architecture(samples.checkpoint(samples.network("c2d", preset="mmcv"), "mmaction2"))
    assert asked(found) == ["preset", "clip", "pool2"]
    short = Choices(clip="8x8", pool2=True)
    [question] = open_questions(found, short)
    assert str(question).startswith("--preset mmcv: its kernels have one frame, as those of ")
    assert not any(build(found, dataclasses.replace(short, preset="mmcv")).layout.pool1.padding)
    # Where both pad pool1, nothing is open.
    for other in (Choices(clip="8x8", pool2=False), Choices(clip="32x2")):
        assert build(found, other).layout.pool1.padding == (0, 1, 1)


def test_no_preset_of_a_source_without_video_networks():
    found = architecture(samples.checkpoint(samples.network(preset="slowfast"), "nonlocal_jax"))
    assert open_questions(found)[0].answers == ("paper", "slowfast", "mmcv", "caffe2")


@pytest.mark.usefixtures("as_users_see_it")
def test_a_call_with_an_open_scale_fails(mmaction2):
    found = architecture(mmaction2)
    others = dataclasses.replace(answers(found), use_scale=None)
    assert asked(found, others) == ["use_scale"]
    with pytest.raises(ValueError, match=r"use_scale must be .*; got Ellipsis"):
        samples.shapes(eval(call(found, others), {"nl": nl}))


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize("name", ["preset", "clip", "pool2", "instantiation", "key_pool"])
def test_a_call_with_an_open_argument_fails(name, caffe2):
    """What is open has no value that the function takes."""
    found = architecture(caffe2)
    others = dataclasses.replace(answers(found, preset="slowfast"), **{name: None})
    assert asked(found, others) == [name]
    with pytest.raises(ValueError, match=r"must be .*; got Ellipsis"):
        samples.shapes(eval(call(found, others), {"nl": nl}))


def test_names_of_pytorchvideo_show_pool2():
    model = samples.network(preset="slowfast")
    found = architecture(samples.checkpoint(model, "pytorchvideo"))
    assert found.pool2 is True
    assert asked(found) == ["clip"]
    with pytest.raises(ValueError, match="pool2 must be True, as the names of pytorchvideo show"):
        build(found, Choices(pool2=False))


def test_the_2d_kernels_of_mmaction2_are_its_c2d():
    model = samples.network("c2d", preset="mmcv")
    flat = edited(
        samples.checkpoint(model, "mmaction2"),
        lambda name, shape: [(name, shape[:2] + shape[3:] if len(shape) == 5 else shape)],
    )
    found = architecture(flat)
    assert found.kind == "image"
    assert asked(found) == ["clip", "pool2"]
    layout = build(found, answers(found)).layout
    assert (layout.conv1_stride, layout.pool1.padding, layout.pool2.window) == (
        1,
        (0, 0, 0),
        (2, 1, 1),
    )
    layout = build(found, answers(found, pool2=False)).layout
    assert (layout.conv1_stride, layout.pool1.padding, layout.pool2) == (1, (0, 1, 1), None)


def test_the_stride_can_be_chosen(caffe2):
    found = architecture(caffe2)
    choices = answers(found, preset="slowfast")
    assert build(found, choices).stride_at == "conv_b"
    choices = dataclasses.replace(choices, stride_at="conv_a")
    assert build(found, choices).stride_at == "conv_a"


def test_notes_say_what_the_conventions_answer(caffe2):
    found = architecture(caffe2)
    both = " ".join(notes(found))
    assert "preset caffe2: ε of BatchNorm is 1.0000001e-05, softmax logits are scaled" in both
    assert "preset slowfast: ε of BatchNorm is 1e-05" in both
    assert "--stride-at conv_a" in both
    [one] = [note for note in notes(found, Choices(preset="mmcv")) if "preset" in note]
    assert "not scaled by d^-0.5, keys are pooled after φ and g" in one


# Files of no network.


def renamed(**words):
    """Replaces each of these words in names; an empty replacement removes the entry."""

    def change(name, shape):
        for old, new in words.items():
            if old in name:
                return [(name.replace(old, new), shape)] if new else []
        return [(name, shape)]

    return change


def reshaped(name, shape):
    return lambda key, old: [(key, shape if key == name else old)]


ODD_FILES = [
    (renamed(res4_1_="res4_2_"), "res4 has a residual block 2 but no 1"),
    (renamed(res5_=""), "it has no res5, so it is none of the networks here"),
    (
        renamed(res3_0_branch2b_w=""),
        "res3_0/conv_b must have a kernel of 4 or 5 axes; it has none",
    ),
    (renamed(nonlocal_conv4_0_="nonlocal_conv4_7_"), "after residual block 7 of res4, which has 2"),
    (
        renamed(nonlocal_conv4_0_theta="", nonlocal_conv4_0_phi=""),
        "some non-local blocks have θ and some do not",
    ),
    (
        renamed(nonlocal_conv4_0_out_b=""),
        "some non-local blocks have a bias of W_z and some do not",
    ),
    (renamed(nonlocal_conv4_0_bn=""), "some non-local blocks have a norm and some do not"),
    (
        renamed(res3_0_branch1_bn_riv=""),
        "conv1_norm has running statistics, but res3_0/shortcut_norm has none",
    ),
    (
        reshaped("conv1_w", (64, 3, 3, 7, 7)),
        "nearest is i3d_3x1x1, but in frames conv1 is 3 where it has 5",
    ),
    (
        reshaped("res3_1_branch2a_w", (8, 512, 3, 1, 1)),
        "nearest is i3d_3x1x1, but in frames res3_1/conv_a is 3 where it has 1",
    ),
    (
        reshaped("res2_0_branch2b_w", (4, 3, 1, 3, 3)),
        "res2_0/conv_b has 4 channels, of which each filter reads 3: that is not a whole number",
    ),
    (
        reshaped("res4_1_branch2c_w", (1000, 16, 1, 1, 1)),
        "res4_1/conv_c has 16 input and 1000 output channels; with 4 channels in 1 groups",
    ),
    (
        reshaped("res2_0_branch2a_w", (4, 64)),
        "res2_0/conv_a must have a kernel of 4 or 5 axes; it has (4, 64)",
    ),
]


@pytest.mark.parametrize(("change", "message"), ODD_FILES)
def test_odd_files(change, message, caffe2):
    assert message in error_of(edited(caffe2, change))


def test_blocks_that_differ_in_their_pooling(mmaction2):
    change = renamed(**{"layer2.1.non_local_block.g.0.": "layer2.1.non_local_block.g."})
    message = "some non-local blocks have a pooling of their keys and some do not"
    assert message in error_of(edited(mmaction2, change))


def test_other_networks():
    arrays = {"params/dense/kernel": np.zeros((2, 3), np.float32)}
    checkpoint = Checkpoint(Path("weights.bin"), "safetensors", arrays, {})
    assert "it has no res2, so it is none of the networks here" in error_of(checkpoint)
