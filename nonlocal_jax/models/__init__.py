"""Networks: stacks of layers."""

from nonlocal_jax.models.cifar_resnets import CifarResNet, cifar_resnet
from nonlocal_jax.models.costs import Cost, LayerCost, cost
from nonlocal_jax.models.mnist import NonLocalMnist, non_local_pytorch_mnist
from nonlocal_jax.models.toy_video import LocalBlock, ToyVideoNet
from nonlocal_jax.models.video_resnets import VideoResNet, video_resnet

__all__ = [
    "CifarResNet",
    "Cost",
    "LayerCost",
    "LocalBlock",
    "NonLocalMnist",
    "ToyVideoNet",
    "VideoResNet",
    "cifar_resnet",
    "cost",
    "non_local_pytorch_mnist",
    "video_resnet",
]
