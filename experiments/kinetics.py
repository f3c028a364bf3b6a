r"""Kinetics-400 by the paper's protocol; toy videos, which are real H.264 files, offline.

    python -m experiments.kinetics                   # toy_mp4: makes videos, trains, tests
    python -m experiments.kinetics --list-recipes    # every row of the paper's tables, by name
    python -m experiments.kinetics --recipe i3d_nl5_r50_32x2 --train-list TRAIN --val-list VAL \
        --init R50_WEIGHTS
    python -m experiments.kinetics --recipe i3d_nl5_r50_32x2 --val-list VAL --init WEIGHTS \
        --preset caffe2 --test-only

A list has `path label` on each line, or is the official CSV file, or a folder with one subfolder
per class. `python -m nonlocal_jax.data check LIST` checks a list, and `... transcode LIST OUT`
makes small copies that can be read quickly. A run that was stopped continues with the same command,
even in the middle of an epoch or of the test, and gives the same result.

Recipes: 64 consecutive frames, of which every other one is dropped (32×2); shorter side uniform in
[256, 320]; random crops of 224; random flips; SGD with Nesterov's momentum; weight decay 1e-4; 64
clips per step; learning rate 0.01, divided by 10 at 150,000 and at 300,000 of 400,000 steps;
dropout 0.5; BatchNorm is trained. There are two stages: from ImageNet's ResNet (`--init` with
inflated weights of torchvision or timm) to 32 frames, and from those weights to 128 frames
(`*_128x1`) with frozen norms, 16 clips per step and twice as many steps. --batch-size scales the
learning rate up and the number of steps down.

Test: shorter side 256; 10 clips evenly spaced in time, 3 crops of 256×256 each, as in the released
code (`--crops full` is the paper's fully convolutional test); softmax scores averaged. The middle
clip alone is reported as well, because published numbers often mix up the two.

Expected: the paper's numbers are listed by --list-recipes. Not run here, because Kinetics is not
available as files.

Hardware and time: the paper used 8 GPUs. On 2 idle CPU cores of a server toy_mp4 takes 3 minutes,
on a slow or busy machine several times as long, and classifies 60 of 60 held-out videos correctly.
A training step of I3D R50 with 5 blocks on 2 clips of 8×224² takes 3.3 s on those cores
(benchmarks/README.md) for 79 G multiply-adds in the forward pass. At that rate a clip of 32×2, 44
G, takes 1.8 s, and 400,000 steps of 64 clips take a year and a half: use accelerators. --dry-run
counts the operations of a step, and with --topology v5e:16x16 compiles it for a slice of TPUs that
is not at hand.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

from experiments.shared import video_experiment
from experiments.shared.command_line import parse
from experiments.shared.recipes import GROUPS, Recipe
from experiments.shared.recipes import Config as VideoConfig
from nonlocal_jax.path_options import AnyPathOption

IMAGENET = "ImageNet ResNet"
TOY = Recipe(
    "nothing",
    depth=0,
    frames=8,
    stride=2,
    batch_size=16,
    learning_rate=0.05,
    boundaries=(500, 650),
    steps=700,
    size=32,
    shorter=(36, 44),
    test_size=36,
    num_classes=6,
)


def c2d(depth: int, published: tuple[float, ...], blocks: Any = 0, **options: Any) -> Recipe:
    """Returns the recipe of a C2D network with the published top-1 (and top-5) accuracy."""
    return Recipe(IMAGENET, depth, "c2d", blocks, published=published, **options)


def i3d(depth: int, published: tuple[float, ...], blocks: Any = 0) -> Recipe:
    """Returns the recipe of an I3D network with the published top-1 accuracy."""
    return Recipe(IMAGENET, depth, "i3d_3x1x1", blocks, published=published)


# Networks by name: <kind>[_nl<blocks>[_<variant>]]_r<depth>.
NETWORKS = {
    "c2d_r50": c2d(50, (71.8, 89.7)),
    "c2d_r101": c2d(101, (73.1, 91.0)),
    # Table 2a: pairwise functions.
    "c2d_nl1_gaussian_r50": c2d(50, (72.5,), 1, instantiation="gaussian"),
    "c2d_nl1_dot_product_r50": c2d(50, (72.9,), 1, instantiation="dot_product"),
    "c2d_nl1_concatenation_r50": c2d(50, (72.8,), 1, instantiation="concatenation"),
    "c2d_nl1_r50": c2d(50, (72.7,), 1),
    "c2d_nl1_r101": c2d(101, (74.3,), 1),
    # Table 2b: the stage of the block, which stands before the last residual block.
    "c2d_nl1_res2_r50": c2d(50, (72.7,), {"res2": (1,)}),
    "c2d_nl1_res3_r50": c2d(50, (72.9,), {"res3": (2,)}),
    "c2d_nl1_res5_r50": c2d(50, (72.3,), {"res5": (1,)}),
    # Table 2d: sums over space, over time, or over both.
    "c2d_nl5_space_r50": c2d(50, (72.9,), 5, axes="space"),
    "c2d_nl5_space_r101": c2d(101, (74.4,), 5, axes="space"),
    "c2d_nl5_time_r50": c2d(50, (73.1,), 5, axes="time"),
    "c2d_nl5_time_r101": c2d(101, (74.4,), 5, axes="time"),
    "c2d_nl5_r50": c2d(50, (73.8,), 5),
    "c2d_nl5_r101": c2d(101, (75.1,), 5),
    # Table 2c: the number of blocks.
    "c2d_nl10_r50": c2d(50, (74.3,), 10),
    "c2d_nl10_r101": c2d(101, (75.1,), 10),
    # Table 2f: I3D.
    "i3d_r50": i3d(50, (73.3,)),
    "i3d_nl5_r50": i3d(50, (74.9,), 5),
    "i3d_r101": i3d(101, (74.4,)),
    "i3d_nl5_r101": i3d(101, (76.0,), 5),
}
# Table 2g: top-1 accuracy with clips of 128 frames.
PUBLISHED_128 = {
    "c2d_r50": 73.8,
    "i3d_r50": 74.9,
    "i3d_nl5_r50": 76.5,
    "c2d_r101": 75.3,
    "i3d_r101": 76.4,
    "i3d_nl5_r101": 77.7,
}
# PySlowFast's model zoo: networks, and (frames, stride) of its clips.
ZOO_NETWORKS = ("c2d_r50", "c2d_nl5_r50", "i3d_r50", "i3d_nl5_r50")
ZOO_CLIPS = {"8x8": (8, 8), "32x4": (32, 4)}


def recipes() -> dict[str, Recipe]:
    """Returns the recipes by name, <network>_<frames>x<stride>, `toy_mp4` first."""
    named = {"toy_mp4": TOY}
    named |= {f"{network}_32x2": recipe for network, recipe in NETWORKS.items()}
    for network, top1 in PUBLISHED_128.items():
        named[f"{network}_128x1"] = dataclasses.replace(
            NETWORKS[network],
            start=f"{network}_32x2",
            frames=128,
            stride=1,
            batch_size=16,
            learning_rate=0.0025,
            boundaries=(300_000, 600_000),
            steps=800_000,
            frozen_bn=True,
            published=(top1,),
        )
    for network, (clip, (frames, stride)) in itertools.product(ZOO_NETWORKS, ZOO_CLIPS.items()):
        recipe = NETWORKS[network]
        named[f"{network}_{clip}"] = dataclasses.replace(
            recipe, frames=frames, stride=stride, published=()
        )
    return named


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(VideoConfig):
    """Trains and tests video networks on Kinetics-400, or on toy videos that it makes itself."""

    output: AnyPathOption = Path("runs/kinetics")  # Folder of the run.


def main(config: Config) -> dict[str, Any] | None:
    return video_experiment.run(config, recipes(), "kinetics")


if __name__ == "__main__":
    main(parse(Config, GROUPS, "kinetics"))
