"""The MNIST network of Non-local_pytorch in torch, with the module names of both its versions.

It is not on PyPI, so it is written from its description: 3×3 convolutions with BN, ReLU and 2×2
pooling to 32, 64 and 128 channels, a non-local block after the first two, and two dense layers.
"""

import torch
from torch import nn


class Block(nn.Module):
    """A block with pooling after φ and g. The keys of the Gaussian are the pooled x."""

    def __init__(self, channels, instantiation):
        super().__init__()
        self.instantiation, inner = instantiation, channels // 2
        self.g = nn.Sequential(nn.Conv2d(channels, inner, 1), nn.MaxPool2d(2))
        self.W = nn.Sequential(nn.Conv2d(inner, channels, 1), nn.BatchNorm2d(channels))
        if instantiation == "gaussian":
            self.phi = nn.MaxPool2d(2)
        else:
            self.theta = nn.Conv2d(channels, inner, 1)
            self.phi = nn.Sequential(nn.Conv2d(channels, inner, 1), nn.MaxPool2d(2))
        if instantiation == "concatenation":
            self.concat_project = nn.Sequential(nn.Conv2d(2 * inner, 1, 1, bias=False), nn.ReLU())

    def forward(self, x):
        queries = (x if self.instantiation == "gaussian" else self.theta(x)).flatten(2)
        keys, values = self.phi(x).flatten(2), self.g(x).flatten(2)
        if self.instantiation == "concatenation":
            n, m = queries.shape[2], keys.shape[2]
            pairs = torch.cat(
                [queries[..., None].expand(-1, -1, n, m), keys[:, :, None].expand(-1, -1, n, m)], 1
            )
            f = self.concat_project(pairs)[:, 0]
        else:
            f = queries.transpose(1, 2) @ keys
        self.map = f.softmax(-1) if "gaussian" in self.instantiation else f / f.shape[-1]
        return x + self.W((values @ self.map.transpose(1, 2)).unflatten(2, x.shape[2:]))


class Mnist(nn.Module):
    """The network for (B, 1, 28, 28). The first version was one sequence of all layers."""

    def __init__(self, instantiation, first=False):
        super().__init__()
        layers = [
            nn.Sequential(
                nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)
            )
            for i, o in ((1, 32), (32, 64), (64, 128))
        ]
        # A list registers no modules.
        blocks = self.blocks = [Block(32, instantiation), Block(64, instantiation)]
        if first:
            self.convs = nn.Sequential(*layers[0], blocks[0], *layers[1], blocks[1], *layers[2])
        else:
            self.conv_1, self.nl_1, self.conv_2, self.nl_2, self.conv_3 = (
                layers[0],
                blocks[0],
                layers[1],
                blocks[1],
                layers[2],
            )
        self.fc = nn.Sequential(
            nn.Linear(128 * 3 * 3, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, 10)
        )
        self.layers = [layers[0], blocks[0], layers[1], blocks[1], layers[2]]

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.fc(x.flatten(1))
