"""The published networks that ours are compared with, live in torch, each with the modules whose outputs are its stages.

Of the peers, the models alone are imported: what else they ask for is stood in for by modules in which every name is an
empty class. The real torchvision comes first, so that the others find it.
"""

import contextlib
import dataclasses
import importlib
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from benchmarks.torch_network import VideoResNet

STAGES = ("pool1", "res2", "pool2", "res3", "res4", "res5")
BLOCKS = {"res3": (1, 3), "res4": (1, 3, 5)}
CLASSES = 11


@dataclasses.dataclass(frozen=True)
class Peer:
    """A network of a peer.

    Attributes:
        network: of which the weights are saved.
        stages: for each of `STAGES`, the module that puts it out.
        logits: from a clip (B, C, T, H, W).
    """

    network: nn.Module
    stages: dict[str, nn.Module]
    logits: Callable[[torch.Tensor], torch.Tensor]


class _Absent(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def _bare(name):
    """A package whose `__init__` does not run."""
    top, *rest = name.split(".")
    module = types.ModuleType(name)
    module.__path__ = [
        str(Path(importlib.machinery.PathFinder.find_spec(top).origin).parent.joinpath(*rest))
    ]
    return module


# torchvision's own wheel of operators is for another build of torch; its models want none of them.
_stand_ins = {
    n: types.ModuleType(n)
    for n in ("torchvision._meta_registrations", "torchvision._autograd_registrations")
}
_fvcore = (
    "fvcore",
    "fvcore.nn",
    "fvcore.nn.distributed",
    "fvcore.nn.squeeze_excitation",
    "fvcore.nn.weight_init",
)
_stand_ins |= {
    n: _Absent(n)
    for n in ("detectron2", "detectron2.layers", *_fvcore, "mmaction.evaluation", "mmaction.utils")
}
for _name in ("c2_msra_fill", "c2_xavier_fill"):
    setattr(
        _stand_ins["fvcore.nn.weight_init"], _name, lambda module: None
    )  # all weights are drawn here
# The wheel of mmaction2 lacks a folder that `mmaction.models` imports.
_models = ("backbones", "data_preprocessors", "heads", "losses", "recognizers")
_stand_ins |= {
    n: _bare(n)
    for n in ("mmaction", "mmaction.models", *(f"mmaction.models.{part}" for part in _models))
}
for _name, _module in _stand_ins.items():
    sys.modules.setdefault(
        _name, _module
    )  # pytest imports this file twice, the second time for its doctests


def load(name):
    """A module of a peer, whose warnings at import are its own business."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("torchvision")
        return importlib.import_module(name)


def slowfast(
    kind="i3d",
    depth=50,
    blocks=BLOCKS,
    instantiation="softmax",
    frames=8,
    groups=None,
    stride_1x1=False,
    head=None,
):
    """PySlowFast's, for crops of 64.

    Args:
        groups: the number of temporal groups of non-local blocks, by stage.
        head: "softmax" leaves it as it is in testing; otherwise its answer is taken before the softmax.
    """
    numbers = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}[depth]
    stages = STAGES[1], *STAGES[3:]
    network = load("slowfast.models.video_model_builder").ResNetModel(
        SimpleNamespace(
            MODEL=SimpleNamespace(
                ARCH=kind, NUM_CLASSES=CLASSES, DROPOUT_RATE=0.0, FC_INIT_STD=0.01
            ),
            DATA=SimpleNamespace(NUM_FRAMES=frames, CROP_SIZE=64, INPUT_CHANNEL_NUM=[3]),
            DETECTION=SimpleNamespace(ENABLE=False),
            RESNET=SimpleNamespace(
                DEPTH=depth,
                NUM_GROUPS=1,
                WIDTH_PER_GROUP=64,
                TRANS_FUNC="bottleneck_transform",
                STRIDE_1X1=stride_1x1,
                INPLACE_RELU=True,
                ZERO_INIT_FINAL_BN=True,
                NUM_BLOCK_TEMP_KERNEL=[[n] for n in numbers],
                SPATIAL_STRIDES=[[1], [2], [2], [2]],
                SPATIAL_DILATIONS=[[1]] * 4,
            ),
            NONLOCAL=SimpleNamespace(
                LOCATION=[[list(blocks.get(stage, ()))] for stage in stages],
                GROUP=[[(groups or {}).get(stage, 1)] for stage in stages],
                POOL=[[[1, 2, 2]]] * 4,
                INSTANTIATION=instantiation,
            ),
        )
    )
    if head is None:
        network.head.act = nn.Identity()
    modules = (network.s1, network.s2, network.pathway0_pool, network.s3, network.s4, network.s5)
    return Peer(network, dict(zip(STAGES, modules, strict=True)), lambda clip: network([clip]))


def pytorchvideo(name="i3d_r50", window=(4, 2, 2)):
    """pytorchvideo's c2d_r50 or i3d_r50, whose head averages the logits of its windows."""
    network = getattr(load("pytorchvideo.models.hub.resnet"), name)(
        model_num_class=CLASSES, head_pool_kernel_size=window, dropout_rate=0.0
    )
    return Peer(network, dict(zip(STAGES, network.blocks[:6], strict=True)), network)


def mmaction2(mode=None, inflate_style="3x1x1"):
    """mmaction2's Recognizer3D, as one of the config files in its wheel says."""
    for name in ("backbones.resnet3d", "heads.i3d_head", "losses.cross_entropy_loss"):
        load(f"mmaction.models.{name}")
    for name in ("recognizers.recognizer3d", "data_preprocessors.data_preprocessor"):
        load(f"mmaction.models.{name}")
    # There is none for the concatenation.
    name = (
        f"-nl-{'dot_product' if mode == 'concatenation' else mode}".replace("_", "-")
        if mode
        else ""
    )
    folder = Path(sys.modules["mmaction"].__path__[0]) / ".mim/configs/recognition/i3d"
    file = folder / f"i3d_imagenet-pretrained-r50{name}_8xb8-32x2x1-100e_kinetics400-rgb.py"
    with warnings.catch_warnings(), contextlib.redirect_stderr(None):
        warnings.simplefilter("ignore")
        config = load("mmengine.config").Config.fromfile(file).model
        config.backbone |= {"pretrained": None, "inflate_style": inflate_style}
        config.cls_head |= {"num_classes": CLASSES, "dropout_ratio": 0.0}
        if mode:
            config.backbone.non_local_cfg.mode = mode
        load("mmengine.registry").init_default_scope("mmaction")
        network = load("mmaction.registry").MODELS.build(config)
    backbone, head = network.backbone, network.cls_head
    modules = (
        backbone.maxpool,
        backbone.layer1,
        backbone.pool2,
        backbone.layer2,
        backbone.layer3,
        backbone.layer4,
    )
    return Peer(network, dict(zip(STAGES, modules, strict=True)), lambda clip: head(backbone(clip)))


def plain(pools=None, eps=1e-5, **options):
    """The network of the benchmark; `pools` replaces pool1 and pool2, `eps` is that of every norm."""
    network = VideoResNet(num_classes=CLASSES, **options)
    if pools:
        network.s1.pathway0_stem.pool_layer, network.pool2 = pools
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.eps = eps
    stages = {
        stage: list(network.get_submodule(f"s{stage[-1]}").children())[-1]
        for stage in STAGES
        if "res" in stage
    }
    return Peer(
        network, {"pool1": network.s1.pathway0_stem, "pool2": network.pool2} | stages, network
    )


def image_resnet50(package):
    """ResNet-50 for images, of torchvision or timm."""
    if package == "timm":
        network = load("timm").create_model("resnet50", num_classes=CLASSES, pretrained=False)
    else:
        network = load("torchvision.models").resnet50(num_classes=CLASSES, weights=None)
    modules = (
        network.maxpool,
        network.layer1,
        nn.Identity(),
        network.layer2,
        network.layer3,
        network.layer4,
    )
    return Peer(network, dict(zip(STAGES, modules, strict=True)), network)
