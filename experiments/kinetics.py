"""Kinetics-400 by the paper's protocol, and offline on real H.264 files of moving digits.

    python -m experiments.kinetics                                   # toy_mp4: makes the files, trains, tests with 30 views
    python -m experiments.kinetics --list-recipes                    # every row of the paper's tables, by name
    python -m experiments.kinetics --recipe i3d_nl5_r50_32x2 --train-list TRAIN --val-list VAL --init R50_WEIGHTS
    python -m experiments.kinetics --recipe i3d_nl5_r50_32x2 --val-list VAL --init WEIGHTS --preset caffe2 --test-only

Lists are `path label` a line, the official CSV, or a folder of class-name folders. `python -m nonlocal_jax.data check LIST`
looks through one, `... transcode LIST OUT` makes small copies that clips are quickly read from. A run that was stopped goes on
with the same command, in the middle of an epoch or of the test, with the same result.

Recipes: 64 consecutive frames, every other one dropped (32×2); shorter side uniform in [256, 320]; random crops of 224, flip;
SGD with Nesterov's momentum, weight decay 1e-4, 64 clips a step, learning rate 0.01, a tenth of it from 150,000 and a
hundredth from 300,000 of 400,000 steps; dropout 0.5; BatchNorm trained. Two stages: ImageNet's ResNet (`--init` of torchvision
or timm, inflated) to 32 frames; those weights to 128 frames (`*_128x1`), norms frozen, 16 clips a step, twice as many
steps. With another --batch-size the learning rate grows and the number of steps shrinks in proportion.

Test: the shorter side 256, 10 clips evenly in time, 3 crops of 256×256 of each, as the released code (`--crops full` is the
paper's fully convolutional test), softmax averaged; and beside it the middle clip alone, with which it is often confused.

Expected accuracy: what the paper measured, in `--list-recipes`. Not run here: Kinetics is not public as files.

Hardware and time: the paper's runs took 8 GPUs. On 2 CPU cores toy_mp4 takes 3 minutes and gets 60 of 60 held-out videos right.
A training step of I3D R50 with 5 blocks on 2 clips of 8×224² takes 3.3 s there (benchmarks/README.md), 79 G multiply-adds
forward. At that rate a clip of 32×2, 44 G, takes 1.8 s, and 400,000 steps of 64 of them a year and a half: take accelerators.
`--dry-run` counts the operations of a step.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import tyro

from experiments import video
from experiments.recipes import Config as Shared
from experiments.recipes import Recipe

IMAGENET = "ImageNet ResNet"
TOY = Recipe(
    "nothing", 0, frames=8, stride=2, batch_size=16, learning_rate=0.05, boundaries=(500, 650), steps=700,
    size=32, shorter=(36, 44), test_size=36, num_classes=6,
)  # fmt: skip
ZOO = {"8x8": (8, 8), "32x4": (32, 4)}


def recipes() -> dict[str, Recipe]:
    """By name: <kind>[_nl<blocks>[_<variant>]]_r<depth>_<frames>x<stride>."""
    found = {"toy_mp4": TOY}

    def add(
        kind: str,
        depth: int,
        published: tuple[float, ...],
        blocks: int = 0,
        variant: str = "",
        **options: Any,
    ) -> None:
        name = "_".join(
            filter(None, (kind, f"nl{blocks}" if blocks else "", variant, f"r{depth}", "32x2"))
        )
        options = {"nonlocal_blocks": blocks, **options}
        network: Any = {"kind": "c2d" if kind == "c2d" else "i3d_3x1x1", "depth": depth, **options}
        found[name] = Recipe(IMAGENET, published=published, **network)

    add("c2d", 50, (71.8, 89.7))
    add("c2d", 101, (73.1, 91.0))
    for instantiation, top1 in (("gaussian", 72.5), ("dot_product", 72.9), ("concatenation", 72.8)):
        add("c2d", 50, (top1,), 1, instantiation, instantiation=instantiation)
    add("c2d", 50, (72.7,), 1)
    add("c2d", 101, (74.3,), 1)
    for stage, last, top1 in (("res2", 1, 72.7), ("res3", 2, 72.9), ("res5", 1, 72.3)):
        add("c2d", 50, (top1,), 1, stage, nonlocal_blocks={stage: (last,)})
    for axes, of_r50, of_r101 in (
        ("space", 72.9, 74.4),
        ("time", 73.1, 74.4),
        ("spacetime", 73.8, 75.1),
    ):
        for depth, top1 in ((50, of_r50), (101, of_r101)):
            add("c2d", depth, (top1,), 5, "" if axes == "spacetime" else axes, axes=axes)
    add("c2d", 50, (74.3,), 10)
    add("c2d", 101, (75.1,), 10)
    for depth, plain, with_blocks in ((50, 73.3, 74.9), (101, 74.4, 76.0)):
        add("i3d", depth, (plain,))
        add("i3d", depth, (with_blocks,), 5)
    longer = {
        "c2d_r50": 73.8, "i3d_r50": 74.9, "i3d_nl5_r50": 76.5, "c2d_r101": 75.3, "i3d_r101": 76.4, "i3d_nl5_r101": 77.7,
    }  # fmt: skip
    for name, top1 in longer.items():
        found[f"{name}_128x1"] = dataclasses.replace(
            found[f"{name}_32x2"], start=f"{name}_32x2", frames=128, stride=1, batch_size=16, learning_rate=0.0025,
            boundaries=(300_000, 600_000), steps=800_000, frozen_bn=True, published=(top1,),
        )  # fmt: skip
    for name, (clip, (frames, stride)) in itertools.product(
        ("c2d_r50", "c2d_nl5_r50", "i3d_r50", "i3d_nl5_r50"), ZOO.items()
    ):
        found[f"{name}_{clip}"] = dataclasses.replace(
            found[f"{name}_32x2"], frames=frames, stride=stride, published=()
        )
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Shared):
    """Kinetics-400, or offline real files of moving digits."""

    recipe: str = "toy_mp4"  # --list-recipes names them
    output: Path = Path("runs/kinetics")  # folder of the run


def main(config: Config) -> dict[str, Any] | None:
    """Train and test; the reports of the test."""
    return video.run(config, recipes(), config.recipe, "kinetics", config.output)


if __name__ == "__main__":
    main(tyro.cli(Config))
