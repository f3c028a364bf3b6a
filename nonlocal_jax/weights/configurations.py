"""What the training configuration in a file says about its network.

PySlowFast keeps its configuration in each checkpoint as YAML, mmaction2 as Python text. Neither is
executed: of YAML only text, lists and mappings are built, and of Python only literals and calls of
`dict` are understood.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from nonlocal_jax.layers.conventions import INSTANTIATIONS, ClipFormat, Triple
from nonlocal_jax.models.bottleneck import StrideAt
from nonlocal_jax.models.video_tables import CLIP_FORMATS, LONG_CLIPS, STAGES, Places
from nonlocal_jax.types import Instantiation
from nonlocal_jax.weights.literals import Node, parse_python, parse_yaml


@dataclasses.dataclass(frozen=True, kw_only=True)
class Configuration:
    """What a training configuration states. None and {} are for what it does not state.

    Attributes:
        clip: Frames × their stride, if a layout with the same strides has this name.
        other_clip: Frames × their stride, if none has.
        pool2: Whether a pooling in time follows res2.
        instantiation: The pairwise function.
        key_pool: Window of the keys' max pooling.
        use_scale: Whether the logits of the embedded Gaussian are scaled.
        groups: Number of temporal groups of the non-local blocks, by stage, where it is not 1.
        stride_at: The convolution of a residual block that has the stride of its stage.
    """

    clip: ClipFormat | None = None
    other_clip: str | None = None
    pool2: bool | None = None
    instantiation: Instantiation | None = None
    key_pool: Triple | None = None
    use_scale: bool | None = None
    groups: Mapping[str, int] = dataclasses.field(default_factory=dict)
    stride_at: StrideAt | None = None


NOT_STATED = Configuration()
# MODEL.ARCH of PySlowFast, in all of its versions.
HAS_POOL2 = {
    **dict.fromkeys(("c2d", "i3d"), True),
    **dict.fromkeys(("2d", "c2d_nopool", "i3d_nopool"), False),
    **dict.fromkeys(("slow", "slowonly", "slow_c2d", "slow_i3d"), False),
}
SLOWFAST_USUAL = {"SPATIAL_STRIDES": ["1", "2", "2", "2"], "SPATIAL_DILATIONS": ["1"] * 4}
MMACTION2_USUAL = {
    "spatial_strides": ["1", "2", "2", "2"],
    "temporal_strides": ["1"] * 4,
    "strides": ["1", "2", "2", "2"],  # of its networks for images
    "dilations": ["1"] * 4,
    "conv1_stride_s": ["2"],
    "pool1_stride_s": ["2"],
    "with_pool1": ["True"],
}
# Strides in time of conv1 and pool1. None is unknown.
Strides = tuple[int | None, int | None]
STRIDES_AT: dict[str, StrideAt] = {
    **{"True": "conv_a", "true": "conv_a", "False": "conv_b", "false": "conv_b"},  # STRIDE_1X1
    **{"caffe": "conv_a", "pytorch": "conv_b"},  # style of mmaction2
}


def read_configuration(text: str, source: str, kind: str, places: Places) -> Configuration:
    """Reads what a configuration states.

    Args:
        text: Its text; "" if the file has none.
        source: The source whose names the file has.
        kind: Inflation of the kernels, or "image".
        places: The residual blocks that non-local blocks follow, by stage.

    Returns:
        What it states, which is nothing if it cannot be read.

    Raises:
        ValueError: It states what no network here has.

    >>> text = "MODEL: {ARCH: c2d_nopool}"
    >>> read_configuration(text, "slowfast", "c2d", {}).pool2
    False
    """
    if source == "slowfast":
        return _slowfast(Node(parse_yaml(text)), places)
    if source == "mmaction2":
        return _mmaction2(Node(parse_python(text)), kind)
    return NOT_STATED


def _slowfast(config: Node, places: Places) -> Configuration:
    resnet, nonlocal_ = config["RESNET"], config["NONLOCAL"]
    for name, usual in SLOWFAST_USUAL.items():
        _check_usual(f"RESNET.{name}", [stage[0].text for stage in resnet[name]], usual)
    frames, rate = config["DATA"]["NUM_FRAMES"].number, config["DATA"]["SAMPLING_RATE"].number
    stages = [stage for stage in STAGES if places.get(stage)]
    functions: dict[str, Instantiation] = {
        "softmax": "embedded_gaussian",
        "dot_product": "dot_product",
    }
    return Configuration(
        # It has no stride in time before pool2, whatever the clip.
        **_clip(frames, rate, strides=(1, 1)),
        pool2=HAS_POOL2.get(config["MODEL"]["ARCH"].text),
        instantiation=functions.get(nonlocal_["INSTANTIATION"].text),
        key_pool=_slowfast_key_pool(nonlocal_["POOL"], stages),
        groups=_slowfast_groups(nonlocal_["GROUP"], stages),
        stride_at=STRIDES_AT.get(resnet["STRIDE_1X1"].text),
    )


def _slowfast_key_pool(pools: Node, stages: list[str]) -> Triple | None:
    windows = {_triple(pools[STAGES.index(stage)][0]) for stage in stages}
    if len(windows) > 1:
        raise ValueError(
            f"its configuration pools keys differently by stage: NONLOCAL.POOL of "
            f"{' and '.join(stages)} must be the same in the networks here"
        )
    return windows.pop() if windows else None


def _triple(node: Node) -> Triple | None:
    match [part.number for part in node]:
        case [int(t), int(h), int(w)] if min(t, h, w) > 0:
            return t, h, w
    return None


def _slowfast_groups(groups: Node, stages: list[str]) -> dict[str, int]:
    counts = {stage: groups[STAGES.index(stage)][0].number or 1 for stage in stages}
    return {stage: count for stage, count in counts.items() if count > 1}


def _check_usual(name: str, found: list[str], usual: list[str]) -> None:
    """Checks a setting that is the same in all networks here. An empty one is not stated."""
    if found and found != usual:
        raise ValueError(
            f"its configuration has {name} of {', '.join(found):.80}, which must be "
            f"{', '.join(usual)} in the networks here"
        )


def _mmaction2(config: Node, kind: str) -> Configuration:
    backbone = config["model"]["backbone"]
    for name, usual in MMACTION2_USUAL.items():
        _check_usual(name, backbone[name].texts, usual)
    epsilon = backbone["norm_cfg"]["eps"].text
    if epsilon not in ("", "1e-5", "1e-05", "0.00001"):
        raise ValueError(f"its configuration has ε of {epsilon:.40}, which must be 1e-5 here")
    # Whether there is a pool2 by default. To a network for images each frame is an image. C2D is
    # such a network with poolings in time.
    has_pool2 = {"ResNet3d": True, "ResNet3dSlowOnly": False, "C2D": True, "ResNet": False}
    pool2 = has_pool2.get(backbone["type"].text)
    if pool2 is None:
        return NOT_STATED
    strides = _mmaction2_strides(backbone, kind)
    block = backbone["non_local_cfg"]
    modes = {name: name for name in INSTANTIATIONS}
    # What mmcv does by default, where blocks are configured at all.
    mode = block["mode"].text or ("embedded_gaussian" if block.value is not None else "")
    use_scale = block["use_scale"].flag
    is_default_scale = block.value is not None and use_scale is None
    with_pool2 = backbone["with_pool2"].flag
    pool2 = pool2 if with_pool2 is None else with_pool2
    if backbone["type"].text == "ResNet3d" and kind == "c2d" and pool2 and strides == (1, 1):
        raise ValueError(
            "its configuration has a ResNet3d without inflated kernels, whose pool1 is padded; the "
            "C2D of mmaction2 pads none, and no network here does both"
        )
    return Configuration(
        **_mmaction2_clip(config, strides),
        pool2=pool2,
        instantiation=modes.get(mode),  # type: ignore[call-overload]
        use_scale=True if is_default_scale else use_scale,
        stride_at=STRIDES_AT.get(backbone["style"].text or "pytorch"),
    )


def _mmaction2_strides(backbone: Node, kind: str) -> Strides:
    """Returns the strides in time of conv1 and pool1.

    Up to version 0.15, the default of ResNet3d was 2, with a conv1 of 5 frames. Since 0.16 it is 1,
    with a conv1 of 3 frames. So where conv1 has its default, its kernel shows which one that is.
    """
    default: int | None = 1
    if backbone["type"].text == "ResNet3d":
        has_old_default = backbone["conv1_kernel"].value is None and kind.startswith("i3d")
        default = 2 if has_old_default else None
    names = ("conv1_stride_t", "pool1_stride_t")
    conv1, pool1 = (backbone[name].number or default for name in names)
    return conv1, pool1


def _mmaction2_clip(config: Node, strides: Strides) -> dict[str, Any]:
    for name in ("test_pipeline", "val_pipeline", "train_pipeline"):
        for step in config[name]:
            if step["type"].text in ("SampleFrames", "DenseSampleFrames"):
                frames, rate = step["clip_len"].number, step["frame_interval"].number
                return _clip(frames, rate or 1, strides)
    return {}


def _clip(frames: int | None, rate: int | None, strides: Strides) -> dict[str, Any]:
    """Returns the clip format, if its layout has these strides in time in conv1 and pool1."""
    if frames is None or rate is None:
        return {}
    name = f"{frames}x{rate}"
    expected = (2, 2) if name in LONG_CLIPS else (1, 1)
    if name in CLIP_FORMATS and strides == expected:
        return {"clip": name}
    conv1, pool1 = (stride or "1 or 2 (by the version of mmaction2)" for stride in strides)
    return {"other_clip": f"{name} with strides in time of {conv1} in conv1 and {pool1} in pool1"}
