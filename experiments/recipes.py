"""What Kinetics and Charades have in common: recipes and options as data, and the network and trainer they ask for."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

import nonlocal_jax as nl
from nonlocal_jax import training
from nonlocal_jax.data import augment
from nonlocal_jax.data.clips import normalise
from nonlocal_jax.data.sampling import Crops, InTime, SamplingRule, ShortVideoRule
from nonlocal_jax.evaluation import Combination
from nonlocal_jax.layers.presets import Preset
from nonlocal_jax.models.toy_video import ToyVideoNet
from nonlocal_jax.models.video_tables import Inflation as Kind
from nonlocal_jax.types import Instantiation

Batch = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A network, how it is trained, and what the paper measured.

    Attributes:
        start: the weights that it starts from, in words; with --init.
        depth, kind, nonlocal_blocks, instantiation, axes: as of `video_resnet`; depth 0 is the small network for toy videos.
        frames, stride: of a clip.
        batch_size: clips of a step, all devices together, that the next three are for.
        learning_rate: at first.
        boundaries: steps at which it is divided by 10.
        steps: in all.
        frozen_bn: whether norms are affine maps that do not change.
        size: rows and columns of the crops to train with.
        shorter: least and greatest length of the shorter side before.
        test_size: rows and columns of the crops to test with.
        num_classes: of the data set.
        multi_label: whether a video has any number of classes.
        published: what the paper reports, percent: top-1 and top-5, or mAP.
    """

    start: str
    depth: int = 50
    kind: Kind = "i3d_3x1x1"
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
class Config:
    """What both have on the command line."""

    train_list: Path | None = (
        None  # list of the videos to train with, or folder of class-name folders
    )
    val_list: Path | None = None  # list of the videos to test with
    root: Path | None = (
        None  # folder that paths in the lists are relative to, and must lie in; else that of each list
    )
    classes: Path | None = (
        None  # file of the names of the classes, one a line, in the order of their numbers
    )
    leave_out: bool = (
        False  # leave out videos that are missing or named twice, in place of stopping
    )
    unreadable: float = 0.01  # share of the videos that may turn out unreadable; the run stops above it, and names them
    init: Path | None = None  # weights to start from, of any source that nonlocal_jax.weights reads
    preset: Preset = "paper"  # conventions of the blocks and poolings; those of the source of the weights, if they are not ours
    normalisation: Literal["caffe2", "slowfast", "mmcv"] = (
        "caffe2"  # of colours; mean 114.75 and deviation 57.375 of 255
    )
    fps: float | None = (
        None  # frames a second that the stride counts in, as PySlowFast's 30; None counts those of each file
    )
    sampling: SamplingRule = "consecutive"  # a clip's frames are so many apart; or as PySlowFast spreads them, for its weights
    short: ShortVideoRule = (
        "loop"  # of a video shorter than a clip, start again; or hold its last frame, as PySlowFast
    )
    inverse: bool = False  # scale the shorter side so that 1 / length is uniform, as PySlowFast
    num_classes: int | None = None  # of the data set; None is the recipe's
    batch_size: int | None = None  # clips of a step, of all devices together; None is the recipe's
    learning_rate: float | None = (
        None  # at first; None is the recipe's, times batch size / the recipe's batch size
    )
    steps: int | None = (
        None  # None is the recipe's, times the recipe's batch size / batch size, so as many epochs
    )
    accumulate: int = 1  # parts of a batch whose gradients are averaged, to save memory
    batch_norm: Literal["global", "device"] = (
        "device"  # statistics on each device, as the paper's, or over the whole batch
    )
    precise_bn: int = 0  # batches over which statistics are computed anew before each evaluation
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation
    remat: bool = False  # compute residual blocks again in the backward pass, to save memory
    placement: Literal["replicated", "sharded"] = (
        "replicated"  # of parameters and optimiser on the devices
    )
    seed: int = 0  # of initial values, order, clips and crops
    evaluate_every: int | None = None  # steps; None is a twentieth of them
    save_every: int | None = (
        None  # steps between checkpoints; None is a twentieth of them, and at most 1,000
    )
    keep: int = 2  # of the latest checkpoints, beside the best
    workers: int = 0  # processes that decode; 0 decodes in threads of this one
    clips: int = 10  # of each video in testing, evenly in time
    crops: Crops = (
        "three"  # of each clip in testing: three, the centre, or the full frame, as the paper
    )
    combine: Combination | None = (
        None  # of the scores of all views; None is the mean for one class a video, else the largest
    )
    views_at_once: int = 8  # clips of a batch in testing
    test_only: bool = False  # no training: test the weights of --init
    distributed: bool = False  # one of many processes; TPU pods, SLURM and Open MPI say which, elsewhere the next three do
    coordinator: str | None = None  # host:port of process 0
    processes: int | None = None  # how many
    process_id: int | None = None  # which one this is, from 0
    timeout: int = 120  # seconds to wait for the other processes
    dry_run: bool = (
        False  # print model, blocks, parameters, multiply-adds, memory and sharding, and stop
    )
    list_recipes: bool = False  # print the recipes, and stop

    def __post_init__(self) -> None:
        for name in (
            "num_classes",
            "batch_size",
            "steps",
            "evaluate_every",
            "save_every",
            "clips",
            "views_at_once",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if not 0 <= self.unreadable <= 1:
            raise ValueError(f"unreadable must be a share from 0 to 1; got {self.unreadable}.")
        if self.test_only and self.init is None:
            raise ValueError("--test-only wants the weights to test: --init FILE.")


def in_time(config: Config, recipe: Recipe) -> InTime:
    """Which frames are a clip."""
    return InTime(recipe.frames, recipe.stride, config.fps, config.sampling, config.short)


def scaled(config: Config, recipe: Recipe) -> Recipe:
    """The recipe for another batch size: the learning rate grows with it, and the number of steps shrinks.

    Source: Goyal et al., Accurate, Large Minibatch SGD (2017), section 2.1.
    """
    factor = (config.batch_size or recipe.batch_size) / recipe.batch_size
    steps = config.steps or max(round(recipe.steps / factor), 1)
    return dataclasses.replace(
        recipe,
        batch_size=config.batch_size or recipe.batch_size,
        learning_rate=recipe.learning_rate * factor
        if config.learning_rate is None
        else config.learning_rate,
        boundaries=tuple(
            max(round(boundary * steps / recipe.steps), i + 1)
            for i, boundary in enumerate(recipe.boundaries)
        ),
        steps=steps,
    )


def build(config: Config, recipe: Recipe, num_classes: int) -> Any:
    """The network."""
    dtype = jnp.dtype(config.dtype)
    if not recipe.depth:
        block = nl.layers.nonlocal_block(
            recipe.instantiation, config.preset, subsample=True, dtype=dtype
        )
        return ToyVideoNet(num_classes, block, "i3d")
    options: dict[str, Any] = (
        {"group_size": {"res3": 4}} if config.preset == "caffe2" and recipe.frames == 128 else {}
    )
    clip: Any = f"{recipe.frames}x{recipe.stride}"
    return nl.models.video_resnet(
        recipe.depth, recipe.kind, recipe.nonlocal_blocks, clip, config.preset, num_classes,
        instantiation=recipe.instantiation, block_options={"axes": recipe.axes}, frozen_bn=recipe.frozen_bn,
        window_average="logits" if recipe.multi_label else "softmax", remat=config.remat, dtype=dtype, **options,
    )  # fmt: skip


def make_trainer(config: Config, recipe: Recipe, num_classes: int) -> training.Trainer:
    """Model, optimiser, loss and what is done on the device."""
    schedule = training.step_schedule(recipe.learning_rate, recipe.boundaries)
    optimiser = training.sgd(schedule, weight_decay=1e-4)
    if recipe.frozen_bn:
        optimiser = optax.chain(
            optimiser, optax.masked(optax.set_to_zero(), training.is_norm_parameter)
        )
    loss = training.classification(
        build(config, recipe, num_classes),
        loss=sigmoid_cross_entropy if recipe.multi_label else training.cross_entropy,
        metrics=hit if recipe.multi_label else training.accuracy,
        observe=nl.layers.residual_ratios,
    )
    return training.Trainer(
        loss,
        optimiser,
        schedule,
        prepare=functools.partial(prepare, config.normalisation),
        accumulate=config.accumulate,
        batch_norm=config.batch_norm,
    )


def prepare(normalisation: Preset, batch: Batch, key: jax.Array | None) -> Batch:
    """On the device: in training, flip; then normalise."""
    inputs = batch["inputs"]
    if key is not None:
        inputs = augment.random_flip(inputs, augment.example_keys(key, batch["position"]))
    return {**batch, "inputs": normalise(inputs, normalisation)}


def sigmoid_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Of each example: the mean over classes."""
    return optax.sigmoid_binary_cross_entropy(logits, labels).mean(-1)


def hit(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """Of each example, whether it has the class with the largest logit."""
    return {"hit_at_1": jnp.take_along_axis(labels, logits.argmax(-1)[:, None], -1)[:, 0]}


def recipe_table(recipes: Mapping[str, Recipe]) -> str:
    """Markdown: a row for each recipe."""
    lines = ["| recipe | starts from | clips | steps | published, % |", "|---|---|---|--:|---|"]
    for name, recipe in recipes.items():
        numbers = " / ".join(map(str, recipe.published))
        clips = f"{recipe.batch_size} of {recipe.frames}×{recipe.stride}"
        lines.append(f"| {name} | {recipe.start} | {clips} | {recipe.steps:,} | {numbers} |")
    return "\n".join(lines)
