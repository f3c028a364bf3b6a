"""ResNet-20 for CIFAR in plain torch, as a process that trains on request.

Written from He, Zhang, Ren, Sun (CVPR 2016), section 4.2, with shortcuts of option A. To a line
`FORMAT WARM STEPS` it answers with the seconds that STEPS steps took, after WARM untimed ones.
"""

import itertools
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class BasicBlock(nn.Module):
    """ReLU(x + 3×3 ∘ 3×3), with BN after each convolution.

    Where the shape changes, x is strided and padded with zero channels.
    """

    def __init__(self, channels: int, features: int, stride: int) -> None:
        super().__init__()
        self.conv_a = nn.Conv2d(channels, features, 3, stride, 1, bias=False)
        self.norm_a = nn.BatchNorm2d(features)
        self.conv_b = nn.Conv2d(features, features, 3, 1, 1, bias=False)
        self.norm_b = nn.BatchNorm2d(features)
        self.stride, self.new_channels = stride, features - channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Computes features of the same shape, or of the shape of the next stage."""
        y = self.norm_b(self.conv_b(torch.relu(self.norm_a(self.conv_a(x)))))
        if self.new_channels:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return torch.relu(x + y)


class ResNet20(nn.Module):
    """Three stages of three blocks, of 16, 32 and 64 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(16)
        widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
        blocks = [BasicBlock(a, b, 1 if a == b else 2) for a, b in itertools.pairwise(widths)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Computes logits (B, 10) of images (B, 3, 32, 32)."""
        x = self.blocks(torch.relu(self.norm1(self.conv1(x))))
        return self.head(x.mean((2, 3)))


class Training:
    """A network in one memory format, and its optimiser."""

    def __init__(self, memory_format: torch.memory_format, batch_size: int) -> None:
        torch.manual_seed(0)
        self.model = ResNet20().to(memory_format=memory_format)
        self.optimiser = torch.optim.SGD(
            self.model.parameters(), 0.01, momentum=0.9, nesterov=True, weight_decay=1e-4
        )
        self.images = torch.randn(batch_size, 3, 32, 32).contiguous(memory_format=memory_format)
        self.labels = torch.arange(batch_size) % 10
        self.steps(2)

    def steps(self, count: int) -> float:
        """Trains for `count` steps. Returns the seconds."""
        begun = time.perf_counter()
        for _ in range(count):
            loss = F.cross_entropy(self.model(self.images), self.labels)
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()
        return time.perf_counter() - begun


def main(batch_size: int) -> None:
    """Answers requests until stdin ends."""
    trainings = {
        name: Training(memory_format, batch_size) for name, memory_format in FORMATS.items()
    }
    print("ready", flush=True)
    for line in sys.stdin:
        name, warm, count = line.split()
        trainings[name].steps(int(warm))
        print(trainings[name].steps(int(count)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
