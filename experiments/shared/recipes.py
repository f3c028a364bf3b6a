"""Recipes and options of the video experiments, Kinetics and Charades, as data."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from experiments.shared import previews
from experiments.shared.command_line import ProcessOptions
from nonlocal_jax import checks
from nonlocal_jax.data.sampling import Crops, InTime, SamplingRule, ShortVideoRule
from nonlocal_jax.evaluation import Combination
from nonlocal_jax.layers.presets import Preset
from nonlocal_jax.models.video_tables import Inflation
from nonlocal_jax.path_options import AnyPathOption
from nonlocal_jax.types import Instantiation


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A network, the way it is trained, and what the paper measured.

    `depth`, `kind`, `nonlocal_blocks`, `instantiation` and `axes` are arguments of `video_resnet`.

    Attributes:
        start: Name of the weights that training starts from. They are passed with --init.
        depth: Number of layers of the network. 0 stands for the small network for toy videos.
        kind: How the network convolves over time.
        nonlocal_blocks: Number of non-local blocks, or their places by stage.
        instantiation: Pairwise function of the blocks.
        axes: Axes that the blocks sum over.
        frames: Number of frames of a clip.
        stride: Distance between two frames of a clip.
        batch_size: Clips per step, over all devices. The next three fields are for this size.
        learning_rate: Initial learning rate.
        boundaries: Steps at which the learning rate is divided by 10.
        steps: Number of steps.
        frozen_bn: Whether BatchNorms are replaced by fixed affine maps.
        size: Rows and columns of the training crops.
        shorter: Range of lengths that the shorter side is scaled to before cropping.
        test_size: Rows and columns of the test crops.
        num_classes: Number of classes of the data set.
        multi_label: Whether a video can have any number of classes.
        published: Results of the paper in percent: top-1 and top-5 accuracy, or mAP.
    """

    start: str
    depth: int = 50
    kind: Inflation = "i3d_3x1x1"
    nonlocal_blocks: int | Mapping[str, tuple[int, ...]] = 0
    instantiation: Instantiation = "embedded_gaussian"
    axes: Literal["spacetime", "space", "time"] = "spacetime"
    frames: int = 32
    stride: int = 2
    batch_size: int = 64
    learning_rate: float = 0.01
    boundaries: tuple[int, ...] = (150_000, 300_000)
    steps: int = 400_000
    frozen_bn: bool = False
    size: int = 224
    shorter: tuple[int, int] = (256, 320)
    test_size: int = 256
    num_classes: int = 400
    multi_label: bool = False
    published: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MainOptions:
    """What to run, on which data, and where its results go."""

    recipe: str = "toy_mp4"  # Name of the recipe. --list-recipes prints all.
    # List of training videos, or a folder with one subfolder per class.
    train_list: AnyPathOption | None = None
    val_list: AnyPathOption | None = None  # List of test videos, in the same formats.
    # Weights to start from, in any format nonlocal_jax.weights reads.
    init: AnyPathOption | None = None
    test_only: bool = False  # Skip training and test the weights of --init.
    output: AnyPathOption = Path("runs")  # Folder of the run.
    list_recipes: bool = False  # Print the table of recipes, then stop.
    # Print the model, its blocks, parameters, multiply-adds, memory and sharding, then stop. No
    # videos are needed.
    dry_run: bool = False
    # With --dry-run: compile for this slice of TPUs, such as v5e:4x4, which need not be at hand.
    topology: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How lists and videos are read."""

    # Folder that contains the videos and that paths in the lists are relative to. None is the
    # folder of each list.
    root: AnyPathOption | None = None
    # File with the class names, one per line, in the order of their numbers.
    classes: AnyPathOption | None = None
    num_classes: int | None = None  # Number of classes. Defaults to the recipe's.
    # Skip videos that are missing or listed twice, instead of stopping with an error.
    leave_out: bool = False
    # Share of the videos that may be unreadable. Above it the run stops and names them.
    unreadable: float = 0.01
    # Source whose mean and standard deviation normalise the colours: 114.75 and 57.375 of 255 for
    # caffe2 and slowfast, those of ImageNet for mmcv.
    normalisation: Literal["caffe2", "slowfast", "mmcv"] = "caffe2"
    # Frames per second at which the stride is counted, 30 in PySlowFast. None counts the frames
    # of the file.
    fps: float | None = None
    # How frames are sampled: "consecutive" takes them at a fixed stride, "slowfast" spreads them
    # over the clip as PySlowFast does.
    sampling: SamplingRule = "consecutive"
    # How a video shorter than a clip is extended: "loop" repeats it, "hold" repeats its last
    # frame as PySlowFast does.
    short: ShortVideoRule = "loop"
    # Scale the shorter side so that 1 / length is uniformly distributed, as PySlowFast does.
    inverse: bool = False
    workers: int = 0  # Processes that decode videos. 0 decodes in threads of the main process.


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """What the network computes, and how precisely."""

    # Conventions of the non-local blocks and the poolings. Choose those of the source of the
    # weights.
    preset: Preset = "paper"
    dtype: Literal["float32", "bfloat16"] = "float32"  # Precision of the computation.
    remat: bool = False  # Recompute residual blocks in the backward pass to save memory.


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How the network is trained."""

    batch_size: int | None = None  # Clips per step, over all devices. Defaults to the recipe's.
    # Initial learning rate. Defaults to the recipe's, scaled in proportion to the batch size.
    learning_rate: float | None = None
    # Number of steps. Defaults to the recipe's, scaled so that the number of epochs stays the same.
    steps: int | None = None
    accumulate: int = 1  # Parts into which a batch is split to save memory; gradients are averaged.
    # Whether BatchNorm computes statistics on each device, as the paper does, or over the whole
    # batch.
    batch_norm: Literal["global", "device"] = "device"
    precise_bn: int = 0  # Batches over which BatchNorm statistics are recomputed before evaluating.
    # Whether each device holds all parameters and the whole optimiser state, or a shard of them.
    placement: Literal["replicated", "sharded"] = "replicated"
    seed: int = 0  # Seed of initial values, order, clips and crops.
    # Steps between evaluations. Defaults to a twentieth of all steps.
    evaluate_every: int | None = None
    # Steps between checkpoints. Defaults to a twentieth of all steps, but at most 1,000.
    save_every: int | None = None
    keep: int = 2  # Number of recent checkpoints to keep, in addition to the best one.


@dataclasses.dataclass(frozen=True, kw_only=True)
class TestingOptions:
    """How the network is tested."""

    __test__ = False  # pytest takes classes of this name for tests

    clips: int = 10  # Test clips per video, evenly spaced in time.
    # Test crops per clip: three, the centre one, or the full frame as in the paper.
    crops: Crops = "three"
    # How the scores of all views are combined. None is the mean for single-label recipes and the
    # maximum for multi-label ones.
    combine: Combination | None = None
    views_at_once: int = 8  # Number of views per test batch.


# Groups of options by title, as --help shows them.
GROUPS: dict[str, type] = {
    "": MainOptions,
    "data": DataOptions,
    "network": NetworkOptions,
    "training": TrainingOptions,
    "testing": TestingOptions,
    "many processes": ProcessOptions,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(
    MainOptions, DataOptions, NetworkOptions, TrainingOptions, TestingOptions, ProcessOptions
):
    """Options of `experiments.kinetics` and `experiments.charades`."""

    def __post_init__(self) -> None:
        optional = ("num_classes", "batch_size", "steps", "evaluate_every", "save_every")
        for name in (*optional, "clips", "views_at_once"):
            if getattr(self, name) is not None:
                checks.at_least(name, getattr(self, name), 1)
        previews.check(self.dry_run, self.topology)
        if not 0 <= self.unreadable <= 1:
            raise ValueError(f"unreadable must be a share from 0 to 1; got {self.unreadable}.")
        if self.test_only and self.init is None:
            raise ValueError(
                "--test-only must come with weights to test; got none. Pass them with --init FILE."
            )


def clip_sampling(config: Config, recipe: Recipe) -> InTime:
    """Returns the rule by which the frames of a clip are chosen."""
    return InTime(recipe.frames, recipe.stride, config.fps, config.sampling, config.short)


def scaled(config: Config, recipe: Recipe) -> Recipe:
    """Adapts a recipe to another batch size.

    The learning rate grows with the batch size, and the number of steps shrinks.

    Source: Goyal et al., Accurate, Large Minibatch SGD (2017), section 2.1.
    """
    batch_size = config.batch_size or recipe.batch_size
    factor = batch_size / recipe.batch_size
    steps = config.steps or max(round(recipe.steps / factor), 1)
    learning_rate = config.learning_rate
    if learning_rate is None:
        learning_rate = recipe.learning_rate * factor
    # Boundaries must be distinct and positive, even in very short runs.
    boundaries = tuple(
        max(round(boundary * steps / recipe.steps), i + 1)
        for i, boundary in enumerate(recipe.boundaries)
    )
    return dataclasses.replace(
        recipe,
        batch_size=batch_size,
        learning_rate=learning_rate,
        boundaries=boundaries,
        steps=steps,
    )


def recipe_table(recipes: Mapping[str, Recipe]) -> str:
    """Returns a Markdown table with one row per recipe."""
    lines = ["| recipe | starts from | clips | steps | published, % |", "|---|---|---|--:|---|"]
    for name, recipe in recipes.items():
        published = " / ".join(map(str, recipe.published))
        clips = f"{recipe.batch_size} of {recipe.frames}×{recipe.stride}"
        lines.append(f"| {name} | {recipe.start} | {clips} | {recipe.steps:,} | {published} |")
    return "\n".join(lines)
