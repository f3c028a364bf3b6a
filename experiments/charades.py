r"""Charades, 157 classes with any number per video, by the paper's protocol; toy videos offline.

    python -m experiments.charades      # toy_mp4: makes videos, trains, tests with 30 views
    python -m experiments.charades --recipe i3d_nl5_r101_128x1 --train-list Charades_v1_train.csv \
        --root Charades_v1_480 --val-list Charades_v1_test.csv --init KINETICS_128_WEIGHTS

Lists are the official CSV files, whose column `actions` tells when each class is visible, or frame
lists of PySlowFast. A training clip has the classes that are visible between its first and its last
frame. A test video has all of its classes.

Recipe: start from the 128-frame Kinetics model with frozen norms; 128 consecutive frames; a sigmoid
per class and the mean of their cross-entropies; 16 clips per step; learning rate 0.00125, divided
by 10 every 75,000 of 200,000 steps; crops of 288. The range of shorter sides, [288, 360], is this
project's choice. Test: shorter side 320, 10 clips × 3 crops, the maximum score of each class; mAP
as the official script computes it.

Expected: the paper reports 35.5 mAP for I3D R101 and 37.5 with 5 non-local blocks. Not run here,
because the Charades licence must be requested.

Hardware and time: the paper used 8 GPUs. toy_mp4 takes 3 minutes on 2 idle CPU cores of a server,
several times as long on a slow or busy machine, and reaches 99 mAP.
"""

import dataclasses
from pathlib import Path
from typing import Any

from experiments import kinetics
from experiments.shared import video_experiment
from experiments.shared.command_line import parse
from experiments.shared.recipes import GROUPS, Recipe
from experiments.shared.recipes import Config as VideoConfig
from nonlocal_jax.path_options import AnyPathOption

# The mean over 6 classes makes gradients small, hence the large learning rate.
TOY = dataclasses.replace(kinetics.TOY, learning_rate=0.2, multi_label=True)
PUBLISHED_MAP = {"i3d_r101": 35.5, "i3d_nl5_r101": 37.5}


def recipes() -> dict[str, Recipe]:
    """Returns the recipes by name, `toy_mp4` first."""
    kinetics_recipes = kinetics.recipes()
    named = {"toy_mp4": TOY}
    for network, published in PUBLISHED_MAP.items():
        name = f"{network}_128x1"
        named[name] = dataclasses.replace(
            kinetics_recipes[name],
            start=f"Kinetics {name}",
            learning_rate=0.00125,
            boundaries=(75_000, 150_000),
            steps=200_000,
            size=288,
            shorter=(288, 360),
            test_size=320,
            num_classes=157,
            multi_label=True,
            published=(published,),
        )
    return named


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(VideoConfig):
    """Trains and tests video networks on Charades, or on toy videos that it makes itself."""

    output: AnyPathOption = Path("runs/charades")  # Folder of the run.


def main(config: Config) -> dict[str, Any] | None:
    return video_experiment.run(config, recipes(), "charades")


if __name__ == "__main__":
    main(parse(Config, GROUPS, "charades"))
