"""From a file's arrays alone, the network that it is of: the same that it was made of."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from weights import samples

import nonlocal_jax as nl
from nonlocal_jax.weights import Checkpoint
from nonlocal_jax.weights.build import Choices, build, call, open_questions, options
from nonlocal_jax.weights.infer import architecture

video_resnet = nl.models.video_resnet
FROZEN = {"frozen_bn": True, "block_options": {"norm": None}}
IN_RES3_AND_RES5 = {"res3": (0, 2), "res5": (2,)}
WIDE = {"groups": 32, "width_per_group": 4}

# The names of a file, and the arguments of the network that it is of.
FILES = [
    ("caffe2", 50, "i3d_3x1x1", 5, "8x8", "caffe2", {}),
    ("caffe2", 101, "i3d_3x1x1", 5, "8x8", "caffe2", {}),
    ("caffe2", 50, "c2d", 10, "8x8", "caffe2", {}),
    ("caffe2", 50, "i3d_3x1x1", 5, "8x8", "caffe2", FROZEN),
    ("caffe2", 50, "c2d", 0, "8x8", "caffe2", {"frozen_bn": True}),
    ("slowfast", 101, "i3d_3x1x1", 5, "8x8", "slowfast", {}),
    ("slowfast", 50, "c2d", IN_RES3_AND_RES5, "8x8", "slowfast", {"num_classes": 157}),
    ("slowfast", 152, "i3d_3x1x1", 1, "8x8", "slowfast", WIDE),
    ("slowfast", (1, 2, 3, 2), "i3d_3x3x3", 0, "8x8", "slowfast", {}),
    ("mmaction2", 50, "i3d_3x1x1", 5, "32x2", "mmcv", {}),
    ("mmaction2", 50, "i3d_3x3x3", 5, "32x2", "mmcv", {"instantiation": "gaussian"}),
    ("mmaction2", 50, "i3d_3x1x1", 5, "32x2", "mmcv", {"instantiation": "concatenation"}),
    ("pytorchvideo", 50, "i3d_3x1x1", 0, "8x8", "slowfast", {"window_average": "logits"}),
    ("torchvision", 101, "c2d", 0, "8x8", "slowfast", {"num_classes": 1000}),
    ("nonlocal_jax", 50, "i3d_3x1x1", 5, "8x8", "paper", {"instantiation": "concatenation"}),
    ("nonlocal_jax", 50, "c2d", 1, "8x8", "slowfast", {}),
    ("nonlocal_jax", 50, "c2d", 1, "8x8", "mmcv", {"instantiation": "gaussian"}),
    ("nonlocal_jax", 50, "c2d", 1, "8x8", "mmcv", {"instantiation": "concatenation"}),
    ("nonlocal_jax", 50, "c2d", 1, "8x8", "paper", {"block_options": {"out_bias": True}}),
]


def edited(checkpoint, change):
    """With other arrays: `change` gives those of a name and its shape, or none."""
    arrays = {}
    for name, array in checkpoint.arrays.items():
        for new_name, shape in change(name, array.shape):
            arrays[new_name] = np.broadcast_to(np.float32(0), shape)
    return dataclasses.replace(checkpoint, arrays=arrays)


def error_of(checkpoint):
    with pytest.raises(ValueError, match=r"^weights\.bin") as raised:
        architecture(checkpoint)
    assert len(str(raised.value).splitlines()) == 1
    return str(raised.value)


@pytest.mark.parametrize(("names", "depth", "kind", "blocks", "clip", "preset", "more"), FILES)
def test_the_network_of_a_file(names, depth, kind, blocks, clip, preset, more):
    model = video_resnet(depth, kind, blocks, clip, preset, **more)
    found = architecture(samples.checkpoint(model, names))
    assert found.source == names
    assert (found.depth, found.kind, found.num_classes) == (depth, kind, model.num_classes)
    assert found.nonlocal_blocks == model.nonlocal_blocks
    arguments = {
        "depth": depth,
        "kind": kind,
        "nonlocal_blocks": blocks,
        "clip": clip,
        "preset": preset,
    }
    expected = {
        **arguments,
        "num_classes": model.num_classes,
        **({"instantiation": "embedded_gaussian"} if blocks else {}),
        **more,
    }
    assert options(found) == expected
    assert repr(build(found)) == repr(eval(call(found), {"nl": nl})) == repr(model)


@pytest.mark.parametrize(
    "instantiation", ["gaussian", "embedded_gaussian", "dot_product", "concatenation"]
)
@pytest.mark.parametrize(
    "names", ["nonlocal_jax", "non_local_pytorch", "non_local_pytorch (first version)"]
)
def test_digits(instantiation, names):
    found = architecture(
        samples.checkpoint(nl.models.non_local_pytorch_mnist(instantiation), names)
    )
    open_to_choice = instantiation in ("embedded_gaussian", "dot_product")
    assert found.instantiation == (None if open_to_choice else instantiation)
    assert (
        build(found, Choices(instantiation=instantiation if open_to_choice else None)).instantiation
        == instantiation
    )
    assert (
        call(found)
        == f"nl.models.non_local_pytorch_mnist('{'embedded_gaussian' if open_to_choice else instantiation}')"
    )
    assert len(open_questions(found)) == open_to_choice
    with pytest.raises(
        ValueError, match=r"non_local_pytorch_mnist has no kind to choose; got 'c2d'"
    ):
        build(found, Choices(kind="c2d"))


def test_an_image_network():
    image = edited(
        samples.checkpoint(video_resnet(50, "c2d", 0, preset="caffe2", num_classes=1000), "caffe2"),
        lambda name, shape: [(name, shape[:2] + shape[3:] if len(shape) == 5 else shape)],
    )
    found = architecture(image)
    assert (found.kind, found.num_classes) == ("image", 1000)
    assert any("an image network" in question for question in open_questions(found))
    assert options(found)["kind"] == "c2d"
    assert build(found, Choices(kind="i3d_3x3x3")).conv1_frames == 5


def test_without_a_classifier():
    found = architecture(samples.checkpoint(samples.network(), "caffe2"))
    assert found.num_classes == samples.CLASSES
    no_head = edited(
        samples.checkpoint(samples.network(), "caffe2"),
        lambda name, shape: [] if "pred" in name else [(name, shape)],
    )
    found = architecture(no_head)
    assert found.num_classes is None
    assert "num_classes" not in options(found)
    assert any("no classifier" in question for question in open_questions(found))


def test_pooling_shows_in_the_names_of_mmaction2():
    checkpoint = samples.checkpoint(
        samples.network(blocks=samples.BLOCKS, preset="mmcv"), "mmaction2"
    )
    assert architecture(checkpoint).subsample is True
    plain = edited(
        checkpoint, lambda name, shape: [(re.sub(r"\.(phi|g)\.0\.", r".\1.", name), shape)]
    )
    assert architecture(plain).subsample is False
    assert options(architecture(plain))["block_options"] == {"subsample": False}
    assert (
        architecture(
            samples.checkpoint(samples.network(blocks=samples.BLOCKS), "slowfast")
        ).subsample
        is None
    )


def test_groups_of_frames_of_the_long_clips_of_caffe2():
    """Only its networks without a norm in the blocks have them, and only on long maps."""
    released = samples.network(blocks=samples.BLOCKS, preset="caffe2", **FROZEN)
    found = architecture(samples.checkpoint(released, "caffe2"))
    for clip in ("32x4", "128x1"):
        assert options(found, Choices(clip=clip))["group_size"] == {"res3": 4}
    assert "group_size" not in options(found)
    trained = architecture(
        samples.checkpoint(samples.network(blocks=samples.BLOCKS, preset="caffe2"), "caffe2")
    )
    assert "group_size" not in options(trained, Choices(clip="32x4"))


def test_what_is_chosen_is_no_open_question():
    found = architecture(
        samples.checkpoint(video_resnet(50, "c2d", 5, preset="paper"), "nonlocal_jax")
    )
    assert [question.partition(":")[0] for question in open_questions(found)] == [
        "pairwise function",
        "clip",
        "preset",
    ]
    choices = Choices(clip="32x2", instantiation="dot_product", preset="mmcv", fold=True)
    assert open_questions(found, choices) == []
    chosen = options(found, choices)
    assert (chosen["clip"], chosen["instantiation"], chosen["preset"], chosen["frozen_bn"]) == (
        "32x2",
        "dot_product",
        "mmcv",
        True,
    )
    assert chosen["block_options"] == {"use_bias": False}  # the preset has one, the file does not


# Odd files.


def renamed(**words):
    """Every name in which one of these occurs gets another in its place, or goes."""

    def change(name, shape):
        for old, new in words.items():
            if old in name:
                return [(name.replace(old, new), shape)] if new else []
        return [(name, shape)]

    return change


def reshaped(name, shape):
    return lambda key, old: [(key, shape if key == name else old)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed(res4_1_="res4_2_"), "res4 has a residual block 2 but no 1"),
        (renamed(res5_=""), "it has no res5, so it is none of the networks here"),
        (renamed(res3_0_branch2b_w=""), "res3_0/conv_b must have a kernel of 4 or 5 axes; it has none"),
        (renamed(nonlocal_conv4_0_="nonlocal_conv4_7_"), "after residual block 7 of res4, which has 2"),
        (renamed(nonlocal_conv4_0_theta="", nonlocal_conv4_0_phi=""), "some non-local blocks have θ and some do not"),
        (renamed(nonlocal_conv4_0_out_b=""), "some non-local blocks have a bias of W_z and some do not"),
        (renamed(nonlocal_conv4_0_bn=""), "some non-local blocks have a norm and some do not"),
        (renamed(res3_0_branch1_bn_riv=""), "conv1_norm has running statistics, but res3_0/shortcut_norm has none"),
        (reshaped("conv1_w", (64, 3, 3, 7, 7)), "nearest is i3d_3x1x1, but in frames conv1 is 3 where it has 5"),
        (reshaped("res3_1_branch2a_w", (8, 512, 3, 1, 1)), "nearest is i3d_3x1x1, but in frames res3_1/conv_a is 3 where it has 1"),
        (reshaped("res2_0_branch2b_w", (4, 3, 1, 3, 3)), "res2_0/conv_b has 4 channels, of which each sees 3: that is no number"),
        (reshaped("res4_1_branch2c_w", (1000, 16, 1, 1, 1)), "res4_1/conv_c has 16 channels in and 1000 out; a network whose"),
        (reshaped("res2_0_branch2a_w", (4, 64)), "res2_0/conv_a must have a kernel of 4 or 5 axes; it has (4, 64)"),
    ],
)  # fmt: skip
def test_odd_files(change, message):
    checkpoint = samples.checkpoint(
        samples.network(blocks=samples.BLOCKS, preset="caffe2"), "caffe2"
    )
    assert message in error_of(edited(checkpoint, change))


def test_blocks_that_differ_in_their_pooling():
    checkpoint = samples.checkpoint(
        samples.network(blocks=samples.BLOCKS, preset="mmcv"), "mmaction2"
    )
    mixed = edited(
        checkpoint, renamed(**{"layer2.1.non_local_block.g.0.": "layer2.1.non_local_block.g."})
    )
    assert "some non-local blocks have a pooling of their keys and some do not" in error_of(mixed)


def test_other_networks():
    checkpoint = Checkpoint(
        Path("weights.bin"),
        "safetensors",
        {"params/dense/kernel": np.zeros((2, 3), np.float32)},
        {},
    )
    assert "it has no res2, so it is none of the networks here" in error_of(checkpoint)
