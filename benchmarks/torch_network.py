"""The paper's video networks in plain torch, for the benchmark and as the reference of the tests.

Written from the paper's Table 1 and the conventions of PySlowFast. The parameters have PySlowFast's
names, so its published weights load into this module directly. Channels come first: (B, C, T, H,
W).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
# Which residual blocks of an I3D have kernels inflated in time.
INFLATED = {
    "res2": lambda i: True,
    "res3": lambda i: i % 2 == 0,
    "res4": lambda i: i % 2 == 0,
    "res5": lambda i: i % 2 == 1,
}


class Stem(nn.Module):
    """Convolution 5×7×7 (I3D) or 1×7×7 (C2D), BN, ReLU, max pooling."""

    def __init__(self, frames: int, stride: int, pool: int, pool_padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(
            3, 64, (frames, 7, 7), (stride, 2, 2), (frames // 2, 3, 3), bias=False
        )
        self.bn = nn.BatchNorm3d(64)
        self.pool_layer = nn.MaxPool3d((pool, 3, 3), (pool, 2, 2), (0, pool_padding, pool_padding))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Computes the output of pool1."""
        return self.pool_layer(torch.relu(self.bn(self.conv(x))))


class Branch(nn.Module):
    """t×1×1, 1×k×k (or 1×1×1, t×3×3), 1×1×1; BN after each, ReLU between."""

    def __init__(
        self,
        channels: int,
        inner: int,
        features: int,
        taps: tuple[int, int],
        stride: int,
        groups: int,
    ) -> None:
        super().__init__()
        a, b = taps
        self.a = nn.Conv3d(channels, inner, (a, 1, 1), 1, (a // 2, 0, 0), bias=False)
        self.a_bn = nn.BatchNorm3d(inner)
        self.b = nn.Conv3d(
            inner, inner, (b, 3, 3), (1, stride, stride), (b // 2, 1, 1), groups=groups, bias=False
        )
        self.b_bn = nn.BatchNorm3d(inner)
        self.c = nn.Conv3d(inner, features, 1, bias=False)
        self.c_bn = nn.BatchNorm3d(features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Computes the residual."""
        x = torch.relu(self.a_bn(self.a(x)))
        return self.c_bn(self.c(torch.relu(self.b_bn(self.b(x)))))


class ResidualBlock(nn.Module):
    """ReLU of the sum of branch and shortcut."""

    def __init__(
        self,
        channels: int,
        inner: int,
        features: int,
        taps: tuple[int, int],
        stride: int,
        groups: int,
    ) -> None:
        super().__init__()
        if channels != features or stride != 1:
            self.branch1 = nn.Conv3d(channels, features, 1, (1, stride, stride), bias=False)
            self.branch1_bn = nn.BatchNorm3d(features)
        self.branch2 = Branch(channels, inner, features, taps, stride, groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Computes features of the same shape, or of the shape of the next stage."""
        shortcut = self.branch1_bn(self.branch1(x)) if hasattr(self, "branch1") else x
        return torch.relu(shortcut + self.branch2(x))


class NonLocal(nn.Module):
    """The non-local block, whose keys and values are pooled by 1×2×2.

    Its pairs are explicit, or with `sdpa` those of scaled_dot_product_attention.
    """

    def __init__(self, channels: int, instantiation: str, sdpa: bool = False) -> None:
        super().__init__()
        self.instantiation = instantiation
        self.sdpa = sdpa
        inner = channels // 2
        for name in ("theta", "phi", "g"):
            self.add_module(f"conv_{name}", nn.Conv3d(channels, inner, 1))
        self.conv_out = nn.Conv3d(inner, channels, 1)
        self.bn = nn.BatchNorm3d(channels)
        self.pool = nn.MaxPool3d((1, 2, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Computes x plus the normalised response."""
        keys = self.pool(x)
        theta, phi, g = (
            self.get_submodule(f"conv_{n}")(a).flatten(2)
            for n, a in (("theta", x), ("phi", keys), ("g", keys))
        )
        if self.sdpa:
            # (B, 1, N, d), with the same scale as below by default
            heads = (a.transpose(1, 2)[:, None] for a in (theta, phi, g))
            y = functional.scaled_dot_product_attention(*heads)[:, 0].transpose(1, 2)
            return x + self.bn(self.conv_out(y.unflatten(2, x.shape[2:])))
        pairs = theta.transpose(1, 2) @ phi
        if self.instantiation == "embedded_gaussian":
            pairs = torch.softmax(pairs * theta.shape[1] ** -0.5, -1)
        else:
            pairs = pairs / pairs.shape[-1]
        y = (g @ pairs.transpose(1, 2)).unflatten(2, x.shape[2:])
        return x + self.bn(self.conv_out(y))


class Head(nn.Module):
    """Average over all positions, then a linear classifier."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.projection = nn.Linear(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Computes logits."""
        return self.projection(x.mean((2, 3, 4)))


class VideoResNet(nn.Module):
    """C2D or I3D, with non-local blocks after the given residual blocks.

    The arguments are those of `nonlocal_jax.models.video_resnet`. `pool_padding` is 1 in PySlowFast
    and 0 in Caffe2. `sdpa` is that of `NonLocal`, for the embedded Gaussian.
    """

    def __init__(
        self,
        depth: int = 50,
        kind: str = "i3d_3x1x1",
        clip: str = "8x8",
        nonlocal_blocks: Mapping[str, Sequence[int]] | None = None,
        instantiation: str = "embedded_gaussian",
        num_classes: int = 400,
        pool_padding: int = 1,
        width: int = 64,
        groups: int = 1,
        sdpa: bool = False,
    ) -> None:
        super().__init__()
        first = 2 if clip == "32x2" else 1
        self.s1 = nn.Module()
        self.s1.pathway0_stem = Stem(1 if kind == "c2d" else 5, first, first, pool_padding)
        self.pool2 = nn.MaxPool3d((2, 1, 1))
        channels, inner, features = 64, width, 256
        for stage, blocks in enumerate(BLOCKS[depth], 2):
            s, name = nn.Module(), f"res{stage}"
            for i in range(blocks):
                t = 3 if kind != "c2d" and INFLATED[name](i) else 1
                taps = (1, t) if kind == "i3d_3x3x3" else (t, 1)
                stride = 2 if i == 0 and stage > 2 else 1
                s.add_module(
                    f"pathway0_res{i}",
                    ResidualBlock(channels, inner, features, taps, stride, groups),
                )
                channels = features
                if i in (nonlocal_blocks or {}).get(name, ()):
                    s.add_module(f"pathway0_nonlocal{i}", NonLocal(channels, instantiation, sdpa))
            self.add_module(f"s{stage}", s)
            inner, features = 2 * inner, 2 * features
        self.head = Head(channels, num_classes)

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        """Computes logits of clips."""
        return self.stages(clip)["logits"]

    def stages(self, clip: torch.Tensor) -> dict[str, Any]:
        """Computes the features of every stage, and the logits."""
        x = self.s1.pathway0_stem(clip)
        features = {"pool1": x}
        for stage in (2, 3, 4, 5):
            for module in self.get_submodule(f"s{stage}").children():
                x = module(x)
            features[f"res{stage}"] = x
            x = self.pool2(x) if stage == 2 else x
        return features | {"logits": self.head(x)}
