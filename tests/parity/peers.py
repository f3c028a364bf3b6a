"""The published networks in torch, each with the modules whose outputs are its stages.

Only the models of the peers are imported. Whatever else they import is replaced by modules in which
every name is an empty class. The real torchvision is imported first, so that the peers find it.

Most comparisons use networks of five residual blocks, `SHORT`, of the same kinds as in an R50: with
and without a convolution in the shortcut, with and without inflation, with and without a non-local
block after them.
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

from benchmarks import torch_network

STAGES = ("pool1", "res2", "pool2", "res3", "res4", "res5")
# Residual blocks of res2 to res5, and the places of five non-local blocks, or two in SHORT.
R50, R101, SHORT = (3, 4, 6, 3), (3, 4, 23, 3), (1, 2, 1, 1)
FIVE_BLOCKS = {"res3": (1, 3), "res4": (1, 3, 5)}
PLACES = {R50: FIVE_BLOCKS, R101: FIVE_BLOCKS, SHORT: {"res3": (1,), "res4": (0,)}}
CLASSES = 11


@dataclasses.dataclass(frozen=True)
class Peer:
    """A network of a peer.

    Attributes:
        network: The module whose weights are saved.
        stages: For each of `STAGES`, the module that outputs it.
        logits: From a clip (B, C, T, H, W) to the logits.
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
    """Makes a package whose `__init__` is not executed."""
    top, *parts = name.split(".")
    module = types.ModuleType(name)
    module.__path__ = [
        str(Path(importlib.machinery.PathFinder.find_spec(top).origin).parent.joinpath(*parts))
    ]
    return module


# The operators in torchvision's wheel are for another build of torch. Its models need none.
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
    # Initialisation does nothing, because `compare.randomise` draws all weights.
    setattr(_stand_ins["fvcore.nn.weight_init"], _name, lambda module: None)
# The wheel of mmaction2 1.2.0 lacks a folder that `mmaction.models` imports.
_models = ("backbones", "data_preprocessors", "heads", "losses", "recognizers")
_stand_ins |= {
    n: _bare(n)
    for n in ("mmaction", "mmaction.models", *(f"mmaction.models.{part}" for part in _models))
}
for _name, _module in _stand_ins.items():
    # pytest imports this file twice, the second time for its doctests.
    sys.modules.setdefault(_name, _module)


def load(name):
    """Imports a module of a peer without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("torchvision")
        return importlib.import_module(name)


def slowfast(
    kind="i3d",
    blocks=SHORT,
    places=None,
    instantiation="softmax",
    frames=8,
    groups=None,
    stride_1x1=False,
    head=None,
):
    """Builds a network of PySlowFast, for crops of 64.

    Args:
        kind: "i3d" or "c2d".
        blocks: Residual blocks of res2 to res5.
        places: For each stage, the residual blocks that a non-local block follows, or None.
        instantiation: The pairwise function.
        frames: Frames of a clip.
        groups: Number of temporal groups of the non-local blocks, by stage.
        stride_1x1: Whether the stride of a stage is in its 1×1 convolution.
        head: "softmax" keeps the softmax of the head in testing; None removes it.
    """
    stages = STAGES[1], *STAGES[3:]
    places = PLACES[blocks] if places is None else places
    builder = load("slowfast.models.video_model_builder")
    builder._MODEL_STAGE_DEPTH[blocks] = blocks
    network = builder.ResNetModel(
        SimpleNamespace(
            MODEL=SimpleNamespace(
                ARCH=kind, NUM_CLASSES=CLASSES, DROPOUT_RATE=0.0, FC_INIT_STD=0.01
            ),
            DATA=SimpleNamespace(NUM_FRAMES=frames, CROP_SIZE=64, INPUT_CHANNEL_NUM=[3]),
            DETECTION=SimpleNamespace(ENABLE=False),
            RESNET=SimpleNamespace(
                DEPTH=blocks,
                NUM_GROUPS=1,
                WIDTH_PER_GROUP=64,
                TRANS_FUNC="bottleneck_transform",
                STRIDE_1X1=stride_1x1,
                INPLACE_RELU=True,
                ZERO_INIT_FINAL_BN=True,
                NUM_BLOCK_TEMP_KERNEL=[[n] for n in blocks],
                SPATIAL_STRIDES=[[1], [2], [2], [2]],
                SPATIAL_DILATIONS=[[1]] * 4,
            ),
            NONLOCAL=SimpleNamespace(
                LOCATION=[[list(places.get(stage, ()))] for stage in stages],
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


def pytorchvideo(name="i3d_r50", window=(4, 2, 2), blocks=SHORT):
    """Builds c2d_r50 or i3d_r50 of pytorchvideo, whose head averages the logits of its windows."""
    load("pytorchvideo.models.resnet")._MODEL_STAGE_DEPTH[blocks] = blocks
    network = getattr(load("pytorchvideo.models.hub.resnet"), name)(
        model_depth=blocks,
        model_num_class=CLASSES,
        head_pool_kernel_size=window,
        dropout_rate=0.0,
    )
    return Peer(network, dict(zip(STAGES, network.blocks[:6], strict=True)), network)


def mmaction2(mode=None, inflate_style="3x1x1", blocks=SHORT):
    """Builds Recognizer3D of mmaction2 from one of the configurations in its wheel."""
    for name in ("backbones.resnet3d", "heads.i3d_head", "losses.cross_entropy_loss"):
        load(f"mmaction.models.{name}")
    for name in ("recognizers.recognizer3d", "data_preprocessors.data_preprocessor"):
        load(f"mmaction.models.{name}")
    # The wheel has no configuration for the concatenation.
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
        config.backbone |= {"pretrained": None, "inflate_style": inflate_style, "depth": blocks}
        backbone_class = sys.modules["mmaction.models.backbones.resnet3d"].ResNet3d
        backbone_class.arch_settings[blocks] = (backbone_class.arch_settings[50][0], blocks)
        stages = zip(STAGES[1:2] + STAGES[3:], config.backbone.inflate, blocks, strict=True)
        inflate, non_local = [], []
        for stage, pattern, count in stages:
            inflate.append(tuple(pattern[:count]))
            non_local.append(tuple(int(i in PLACES[blocks].get(stage, ())) for i in range(count)))
        config.backbone.inflate = tuple(inflate)
        if mode:
            config.backbone.non_local = tuple(non_local)
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


def plain(pools=None, eps=1e-5, blocks=SHORT, places=None, **options):
    """Builds the network of the benchmark.

    Args:
        pools: Replacements of pool1 and pool2.
        eps: ε of every norm.
        blocks: Residual blocks of res2 to res5.
        places: For each stage, the residual blocks that a non-local block follows, or None.
        **options: Options of the network.
    """
    torch_network.BLOCKS[blocks] = blocks
    places = PLACES[blocks] if places is None else places
    options |= {"depth": blocks, "nonlocal_blocks": places}
    network = torch_network.VideoResNet(num_classes=CLASSES, **options)
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


def image_resnet(package, blocks=R50):
    """Builds the ResNet for images of torchvision or timm."""
    module = load(f"{package}.models.resnet")
    network = module.ResNet(module.Bottleneck, list(blocks), num_classes=CLASSES)
    modules = (
        network.maxpool,
        network.layer1,
        nn.Identity(),
        network.layer2,
        network.layer3,
        network.layer4,
    )
    return Peer(network, dict(zip(STAGES, modules, strict=True)), network)
