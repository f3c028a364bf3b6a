r"""Charades, 157 classes of which a video has any number, by the paper's protocol; offline on real files of moving digits.

    python -m experiments.charades                                  # toy_mp4: makes the files, trains, tests with 30 views
    python -m experiments.charades --recipe i3d_nl5_r101_128x1 --train-list Charades_v1_train.csv --root Charades_v1_480 \
        --val-list Charades_v1_test.csv --init KINETICS_128_WEIGHTS

Lists are the official CSV, whose column `actions` says when each class is seen, or frame lists of PySlowFast. A clip to train
with has the classes that are seen between its first and its last frame; a video to test with has all of its own.

Recipe: from the 128-frame Kinetics model, norms frozen; 128 consecutive frames; a sigmoid for each class and the mean of their
cross-entropies; 16 clips a step, learning rate 0.00125, a tenth of it every 75,000 of 200,000 steps; crops of 288, whose
shorter side before, [288, 360], is this project's choice. Test: the shorter side 320, 10 clips × 3 crops, of each class the
largest score; mAP as the official script counts it.

Expected, by the paper: mAP 35.5 for I3D R101 and 37.5 with 5 blocks. Not run here: Charades has a licence to be asked for.
Hardware and time: the paper's runs took 8 GPUs; toy_mp4 takes 3 minutes on 2 CPU cores and gets a mAP of 99.
"""

import dataclasses
from pathlib import Path
from typing import Any

import tyro

from experiments import kinetics, video
from experiments.recipes import Config as Shared
from experiments.recipes import Recipe

TOY = dataclasses.replace(
    kinetics.TOY, learning_rate=0.2, multi_label=True
)  # the mean over 6 classes has small gradients


def recipes() -> dict[str, Recipe]:
    """By name."""
    found = {"toy_mp4": TOY}
    for name, published in (("i3d_r101", 35.5), ("i3d_nl5_r101", 37.5)):
        of_kinetics = kinetics.recipes()[f"{name}_128x1"]
        found[f"{name}_128x1"] = dataclasses.replace(
            of_kinetics, start=f"Kinetics {name}_128x1", learning_rate=0.00125, boundaries=(75_000, 150_000), steps=200_000,
            size=288, shorter=(288, 360), test_size=320, num_classes=157, multi_label=True, published=(published,),
        )  # fmt: skip
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Shared):
    """Charades, or offline real files of moving digits."""

    recipe: str = "toy_mp4"  # --list-recipes names them
    output: Path = Path("runs/charades")  # folder of the run


def main(config: Config) -> dict[str, Any] | None:
    """Train and test; the reports of the test."""
    return video.run(config, recipes(), config.recipe, "charades", config.output)


if __name__ == "__main__":
    main(tyro.cli(Config))
