"""The published files whose networks this library has, and the answers that they leave open.

Facts are those of the authors' pages. The page of the documentation, docs/published_weights.md, is
this table, with what `inspect` says about a file of each layout.
"""

import dataclasses
from typing import Any

from nonlocal_jax.weights.questions import Choices

CAFFE2 = "video-nonlocal-net"
SLOWFAST = "PySlowFast"
PYTORCHVIDEO = "pytorchvideo"
MMACTION2 = "mmaction2"

# By family, the page that has the file's link and its accuracy.
PAGES = {
    CAFFE2: "https://github.com/facebookresearch/video-nonlocal-net/blob/main/README.md",
    SLOWFAST: "https://github.com/facebookresearch/SlowFast/blob/main/MODEL_ZOO.md",
    PYTORCHVIDEO: (
        "https://github.com/facebookresearch/pytorchvideo/blob/main/docs/source/model_zoo.md"
    ),
    MMACTION2: "https://github.com/open-mmlab/mmaction2/tree/main/configs/recognition",
}


@dataclasses.dataclass(frozen=True)
class PublishedFile:
    """One file.

    Attributes:
        family: The project of its authors.
        link: Where the authors publish it.
        top_1: Its accuracy on Kinetics-400 by their page, in percent, with 30 views.
        names: The naming table of its arrays.
        network: Arguments of `video_resnet` that its arrays show.
        choices: Answers to what its arrays leave open.
        is_flat: Whether its kernels have no time axis.
    """

    family: str
    link: str
    top_1: str
    names: str
    network: dict[str, Any]
    choices: Choices
    is_flat: bool = False

    @property
    def name(self) -> str:
        """Name of the file."""
        return self.link.rpartition("/")[2]


def flags(choices: Choices) -> str:
    """Writes choices as options of the command line.

    >>> flags(Choices(clip="8x8", key_pool=(1, 2, 2)))
    '--clip 8x8 --key-pool 1 2 2'
    """
    words = []
    for field in dataclasses.fields(choices):
        value = getattr(choices, field.name)
        if value != field.default:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{field.name.replace('_', '-')}", *map(str, values)]
    return " ".join(words)


def published_file(file_name: str) -> PublishedFile | None:
    """Returns the published file of this name, if there is one."""
    return next((file for file in PUBLISHED_FILES if file.name == file_name), None)


def hint(file_name: str) -> str:
    """Returns the answers for a published file of this name as a sentence; "" if there is none."""
    file = published_file(file_name)
    if file is None:
        return ""
    return f"If it is {file.family}'s {file.name}, as its name says, pass: {flags(file.choices)}"


KEYS = (1, 2, 2)
C2D: dict[str, Any] = {"depth": 50, "kind": "c2d", "nonlocal_blocks": 0}
C2D_NL = C2D | {"nonlocal_blocks": 5}
I3D: dict[str, Any] = {"depth": 50, "kind": "i3d_3x1x1", "nonlocal_blocks": 0}
I3D_NL = I3D | {"nonlocal_blocks": 5}
FROZEN: dict[str, Any] = {"frozen_bn": True}
FROZEN_NL: dict[str, Any] = {"frozen_bn": True, "block_options": {"norm": None}}


def _caffe2(name: str, top_1: str, clip: Any, network: dict[str, Any]) -> PublishedFile:
    choices = Choices(preset="caffe2", clip=clip)
    if network["nonlocal_blocks"]:
        choices = dataclasses.replace(choices, instantiation="embedded_gaussian", key_pool=KEYS)
    link = f"https://dl.fbaipublicfiles.com/video-nonlocal/{name}.pkl"
    return PublishedFile(CAFFE2, link, top_1, "caffe2", network, choices)


def _slowfast(name: str, top_1: str, network: dict[str, Any], **answers: Any) -> PublishedFile:
    choices = Choices(preset="slowfast", clip="8x8", **answers)
    link = f"https://dl.fbaipublicfiles.com/pyslowfast/model_zoo/kinetics400/{name}.pkl"
    return PublishedFile(SLOWFAST, link, top_1, "caffe2", network, choices)


def _pytorchvideo(name: str, top_1: str, network: dict[str, Any]) -> PublishedFile:
    link = f"https://dl.fbaipublicfiles.com/pytorchvideo/model_zoo/kinetics/{name}.pyth"
    options = network | {"window_average": "logits"}
    choices = Choices(clip="8x8")
    return PublishedFile(PYTORCHVIDEO, link, top_1, "pytorchvideo", options, choices)


def _mmaction2(
    folder: str, date: str, top_1: str, network: dict[str, Any], **answers: Any
) -> PublishedFile:
    """Makes a row, given the name of the configuration and the suffix of the file."""
    kind = folder[:3]
    link = f"https://download.openmmlab.com/mmaction/v1.0/recognition/{kind}/{folder}/{folder}"
    choices = Choices(**answers)
    is_flat = kind == "c2d"
    return PublishedFile(
        MMACTION2, f"{link}_{date}.pth", top_1, "mmaction2", network, choices, is_flat
    )


_I3D_FILE = "i3d_imagenet-pretrained-r50{}-32x2x1-100e_kinetics400-rgb"
_C2D_FILE = "c2d_{}-{}x1-100e_kinetics400-rgb"

PUBLISHED_FILES: tuple[PublishedFile, ...] = (
    _caffe2("c2d_baseline_32x2_IN_pretrain_400k", "72.0", "32x2", C2D),
    _caffe2("c2d_nonlocal_32x2_IN_pretrain_400k", "73.9", "32x2", C2D_NL),
    _caffe2("i3d_baseline_32x2_IN_pretrain_400k", "73.6", "32x2", I3D),
    _caffe2("i3d_nonlocal_32x2_IN_pretrain_400k", "74.9", "32x2", I3D_NL),
    _caffe2("i3d_baseline_128x1_I3D_pretrain_400k", "75.2", "128x1", I3D | FROZEN),
    _caffe2("i3d_nonlocal_128x1_I3D_pretrain_400k", "76.5", "128x1", I3D_NL | FROZEN_NL),
    _caffe2("c2d_baseline_8x8_IN_pretrain_400k", "71.9", "8x8", C2D),
    _caffe2("c2d_nonlocal_8x8_IN_pretrain_400k", "74.4", "8x8", C2D_NL),
    _caffe2("i3d_baseline_8x8_IN_pretrain_400k", "73.4", "8x8", I3D),
    _caffe2("i3d_nonlocal_8x8_IN_pretrain_400k", "74.7", "8x8", I3D_NL),
    _caffe2("i3d_baseline_32x4_I3D_pretrain_400k", "75.5", "32x4", I3D | FROZEN),
    _caffe2("i3d_nonlocal_32x4_I3D_pretrain_400k", "76.5", "32x4", I3D_NL | FROZEN_NL),
    _caffe2("i3d_baseline_8x8_IN_pretrain_300k", "73.2", "8x8", I3D),
    _caffe2("i3d_baseline_8x8_IN_pretrain_600k_4gpu", "73.0", "8x8", I3D),
    _caffe2("i3d_baseline_8x8_IN_pretrain_300k_4gpu", "72.0", "8x8", I3D),
    _slowfast("C2D_NOPOOL_8x8_R50", "67.2", C2D, pool2=False),
    _slowfast("I3D_8x8_R50", "73.5", I3D, pool2=True),
    _slowfast(
        "I3D_NLN_8x8_R50",
        "74.0",
        I3D_NL,
        pool2=True,
        instantiation="embedded_gaussian",
        key_pool=KEYS,
    ),
    _pytorchvideo("C2D_8x8_R50", "71.46", C2D),
    _pytorchvideo("I3D_8x8_R50", "73.27", I3D),
    _mmaction2(
        _I3D_FILE.format("-nl-dot-product_8xb8"),
        "20220812-8e1f2148",
        "74.80",
        I3D_NL,
        clip="32x2",
        instantiation="dot_product",
    ),
    _mmaction2(
        _I3D_FILE.format("-nl-embedded-gaussian_8xb8"),
        "20220812-afd8f562",
        "74.73",
        I3D_NL,
        clip="32x2",
        instantiation="embedded_gaussian",
        use_scale=False,
    ),
    _mmaction2(
        _I3D_FILE.format("-nl-gaussian_8xb8"),
        "20220812-0c5cbf5a",
        "73.97",
        I3D_NL | {"instantiation": "gaussian"},
        clip="32x2",
    ),
    _mmaction2(_I3D_FILE.format("_8xb8"), "20220812-e213c223", "73.47", I3D, clip="32x2"),
    _mmaction2(_I3D_FILE.format("_8xb8-dense"), "20220812-9f46003f", "73.77", I3D, clip="32x2"),
    _mmaction2(
        _C2D_FILE.format("r50-in1k-pre-nopool_8xb32", "8x8"),
        "20221027-e0227b22",
        "73.44",
        C2D,
        clip="8x8",
        pool2=False,
    ),
    _mmaction2(
        _C2D_FILE.format("r101-in1k-pre-nopool_8xb32", "8x8"),
        "20221027-557bd8bc",
        "74.97",
        C2D | {"depth": 101},
        clip="8x8",
        pool2=False,
    ),
    _mmaction2(
        _C2D_FILE.format("r50-in1k-pre_8xb32", "8x8"),
        "20221027-3ca304fa",
        "73.89",
        C2D,
        clip="8x8",
        pool2=True,
    ),
    _mmaction2(
        _C2D_FILE.format("r50-in1k-pre_8xb32", "16x4"),
        "20221027-5f382a43",
        "74.97",
        C2D,
        clip="16x4",
        pool2=True,
    ),
)
