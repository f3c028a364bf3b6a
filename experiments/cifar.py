"""Residual networks with and without non-local blocks on CIFAR; scanned digits offline.

    python -m experiments.cifar                                      # digits, offline
    python -m experiments.cifar --dataset cifar10                    # ResNet-20, block after res2_1
    python -m experiments.cifar --dataset cifar10 --nonlocal-blocks  # the baseline without blocks
    python -m experiments.cifar --dataset cifar100 --depth 56 --instantiation dot_product

A run that was stopped continues with the same command. `--dry-run` prints what would be trained,
and with `--topology v5e:4x4` what a step needs on a slice of TPUs that is not at hand.

Recipe (He, Zhang, Ren, Sun, CVPR 2016, section 4.2): SGD with momentum 0.9 (here Nesterov's),
weight decay 1e-4, batches of 128, 64,000 steps, learning rate 0.1, divided by 10 at 32,000 and at
48,000 steps; 4 pixels of padding, random crops and flips.

Expected on CIFAR-10 without blocks, according to that paper: 91.25% with 20 layers, 92.49% with 32,
93.03% with 56. Not run here on CIFAR itself. On the digits, which are much easier than CIFAR: about
99% of the 450 held-out digits.

Hardware and time: on 2 idle CPU cores of a server the digits take a minute; on a slow or busy
machine, several times as long. A step of ResNet-20 on CIFAR's 32×32 images takes 0.7 s on 2
cores of an Intel Xeon (benchmarks/README.md) and 64,000 steps take 12 hours: use an accelerator for
CIFAR.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

import nonlocal_jax as nl
from experiments.shared import previews, results
from experiments.shared.command_line import (
    TRAINING_ERRORS,
    PlainConsole,
    ProcessOptions,
    command,
    connect,
    exit_on,
    parse,
    settings,
)
from nonlocal_jax import checks, training
from nonlocal_jax.data import DataError, augment, cifar
from nonlocal_jax.data.images import Images, load_digits
from nonlocal_jax.data.pipeline import evaluation_batches, training_batches
from nonlocal_jax.files import AnyPath
from nonlocal_jax.layers.presets import Preset
from nonlocal_jax.models.cifar_resnets import STAGES, CifarResNet
from nonlocal_jax.path_options import AnyPathOption, LocalPathOption
from nonlocal_jax.types import Instantiation

Dataset = Literal["digits", "cifar10", "cifar100"]


@dataclasses.dataclass(frozen=True)
class DatasetRecipe:
    """How the images of a data set are prepared, and how long it is trained on.

    Attributes:
        mean: Mean of each channel, in the units of the files.
        std: Standard deviation of each channel.
        padding: Pixels added on each side before cropping.
        flip: Whether images are flipped at random.
        steps: Number of steps.
        evaluate_every: Steps between evaluations.
        shape: Rows, columns and channels of an image.
        num_classes: Number of classes.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int = 4
    flip: bool = True
    steps: int = 64_000
    evaluate_every: int = 2000
    shape: tuple[int, int, int] = (32, 32, 3)
    num_classes: int = 10


RECIPES: dict[Dataset, DatasetRecipe] = {
    "digits": DatasetRecipe(
        (4.9,), (6.0,), padding=1, flip=False, steps=400, evaluate_every=100, shape=(8, 8, 1)
    ),
    "cifar10": DatasetRecipe((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
    "cifar100": DatasetRecipe((129.3, 124.1, 112.4), (68.2, 65.4, 70.4), num_classes=100),
}
# Options that may change between two starts of a run.
RESUMABLE_WITH = (
    "data_dir",
    "output",
    "workers",
    "profile",
    "save_every",
    "keep",
    "distributed",
    "coordinator",
    "processes",
    "process_id",
    "timeout",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MainOptions:
    """What to train, on which data, and where the results go."""

    # Data set. "digits" are scikit-learn's 1,797 scans of 8×8 pixels, much easier than CIFAR.
    dataset: Dataset = "digits"
    depth: int = 20  # Number of layers, 6n + 2.
    # Residual blocks that a non-local block follows. Pass no value for the baseline.
    nonlocal_blocks: tuple[str, ...] = ("res2_1",)
    instantiation: Instantiation = "embedded_gaussian"  # Pairwise function.
    output: AnyPathOption = Path("runs/cifar")  # Folder of the run.
    # Print the model, its blocks, parameters, multiply-adds, memory and sharding, then stop. No
    # data is needed.
    dry_run: bool = False
    # With --dry-run: compile for this slice of TPUs, such as v5e:4x4, which need not be at hand.
    topology: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where the images are, and how they are read."""

    # Local folder of the CIFAR archive, which is downloaded if missing.
    data_dir: LocalPathOption = Path("data")
    # SHA-256 of an archive of your own in the official format, to use instead of the official one.
    archive_sha256: str | None = None
    workers: int = 0  # Processes that read data. 0 reads in threads of the main process.


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """What the network computes, and how precisely."""

    preset: Preset = "paper"  # Source whose conventions the non-local blocks follow.
    dtype: Literal["float32", "bfloat16"] = "float32"  # Precision of the computation.
    remat: bool = False  # Recompute residual blocks in the backward pass to save memory.


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How the network is trained."""

    steps: int | None = None  # Number of steps. Defaults to 64,000, or 400 for digits.
    batch_size: int = 128  # Images per step, over all devices.
    learning_rate: float = 0.1  # Peak learning rate.
    # Schedule: "step" divides the learning rate by 10 after one half and three quarters of all
    # steps, "cosine" decays it along half a cosine.
    schedule: Literal["step", "cosine"] = "step"
    warmup: int = 0  # Steps of linear warm-up.
    weight_decay: float = 1e-4  # Weight decay. Norms are excluded.
    decay_biases: bool = True  # Apply weight decay to biases, except those of norms.
    clip_norm: float | None = None  # Largest global norm of the gradient. None does not clip.
    label_smoothing: float = 0.0  # Share of each label that is spread over all classes.
    mixup: float = 0.0  # Parameter α of mixup's Beta distribution. 0 disables mixup.
    average: float | None = None  # Decay of an exponential moving average of the parameters.
    accumulate: int = 1  # Parts into which a batch is split to save memory; gradients are averaged.
    # Whether BatchNorm computes statistics over the whole batch or on each device.
    batch_norm: Literal["global", "device"] = "global"
    precise_bn: int = 0  # Batches over which BatchNorm statistics are recomputed before evaluating.
    # Whether each device holds all parameters and the whole optimiser state, or a shard of them.
    placement: Literal["replicated", "sharded"] = "replicated"
    seed: int = 0  # Seed of initial values, order and augmentation.
    # Steps between evaluations. Defaults to 2,000, or 100 for digits.
    evaluate_every: int | None = None
    save_every: int = 500  # Steps between checkpoints.
    keep: int = 2  # Number of recent checkpoints to keep, in addition to the best one.
    profile: int = 0  # Number of steps to profile, into <output>/profile.


# Groups of options by title, as --help shows them.
GROUPS: dict[str, type] = {
    "": MainOptions,
    "data": DataOptions,
    "network": NetworkOptions,
    "training": TrainingOptions,
    "many processes": ProcessOptions,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(MainOptions, DataOptions, NetworkOptions, TrainingOptions, ProcessOptions):
    """Trains ResNets with and without non-local blocks on CIFAR, or offline on scanned digits."""

    def __post_init__(self) -> None:
        checks.at_least("batch_size", self.batch_size, 1)
        previews.check(self.dry_run, self.topology)
        if not 0 <= self.mixup < math.inf:
            raise ValueError(f"mixup must be at least 0 and finite; got {self.mixup}.")
        self.places()

    def places(self) -> dict[str, tuple[int, ...]]:
        """Returns the residual blocks that a non-local block follows, by stage."""
        places: dict[str, tuple[int, ...]] = {}
        for name in self.nonlocal_blocks:
            stage, _, index = name.partition("_")
            if stage not in STAGES or not index.isdecimal():
                raise ValueError(
                    f"nonlocal_blocks must be like res2_1, with stages {', '.join(STAGES)}; "
                    f"got {name!r}."
                )
            places[stage] = (*places.get(stage, ()), int(index))
        return places


def build(config: Config, num_classes: int) -> CifarResNet:
    """Builds the network."""
    return nl.models.cifar_resnet(
        config.depth,
        config.places(),
        num_classes,
        instantiation=config.instantiation,
        preset=config.preset,
        remat=config.remat,
        dtype=jnp.dtype(config.dtype),
    )


def make_trainer(config: Config, num_classes: int) -> training.Trainer:
    """Builds the network with its optimiser, loss and input preparation."""
    recipe = RECIPES[config.dataset]
    steps = config.steps or recipe.steps
    if config.schedule == "cosine":
        schedule = training.cosine_schedule(config.learning_rate, steps, warmup=config.warmup)
    else:
        schedule = training.step_schedule(
            config.learning_rate, (steps // 2, 3 * steps // 4), warmup=config.warmup
        )
    optimiser = training.sgd(
        schedule,
        weight_decay=config.weight_decay,
        decay_biases=config.decay_biases,
        clip_norm=config.clip_norm,
    )
    cross_entropy = (
        training.smoothed_cross_entropy(config.label_smoothing)
        if config.label_smoothing
        else training.cross_entropy
    )
    loss = training.classification(
        build(config, num_classes), loss=cross_entropy, observe=nl.layers.residual_ratios
    )
    return training.Trainer(
        loss,
        optimiser,
        schedule,
        prepare=functools.partial(prepare, recipe, config.mixup, num_classes),
        accumulate=config.accumulate,
        batch_norm=config.batch_norm,
        average=config.average,
    )


def prepare(
    recipe: DatasetRecipe,
    mixup: float,
    num_classes: int,
    batch: Mapping[str, Any],
    key: jax.Array | None,
) -> Mapping[str, Any]:
    """Normalises images, and in training crops, flips and mixes them. Runs on the device.

    Args:
        recipe: Normalisation and augmentation of the data set.
        mixup: Parameter α of mixup. 0 disables it.
        num_classes: Number of classes.
        batch: Images (B, H, W, C) as "inputs", their "labels", and their "position" in the order of
            training, which selects their random numbers.
        key: Random key of the step, or None in evaluation.

    Returns:
        The batch with prepared "inputs". Mixup turns "labels" into probabilities.
    """
    mean, std = (jnp.array(numbers)[None, None, None] for numbers in (recipe.mean, recipe.std))
    images = (batch["inputs"].astype(jnp.float32) - mean) / std
    if key is None:
        return {**batch, "inputs": images}
    keys = augment.example_keys(key, batch["position"])
    images = augment.random_crop(images, keys, recipe.padding)
    if recipe.flip:
        images = augment.random_flip(images, jax.vmap(jax.random.fold_in, (0, None))(keys, 1))
    batch = {**batch, "inputs": images}
    return training.mixup(batch, key, mixup, num_classes) if mixup else batch


def load(config: Config) -> tuple[Images, Images]:
    """Loads the training images and the held-out images."""
    if config.dataset == "digits":
        return load_digits("train"), load_digits("test")
    archive = cifar.ARCHIVES[config.dataset]
    if config.archive_sha256 is not None:
        file = config.data_dir / archive.name
        if not file.exists():
            raise DataError(f"--archive-sha256 must be that of {file}, which does not exist.")
        archive = dataclasses.replace(
            archive, sha256=config.archive_sha256, size=file.stat().st_size
        )
    train = cifar.load(config.dataset, "train", config.data_dir, archive)
    test = cifar.load(config.dataset, "test", config.data_dir, archive)
    return train, test


def loop_options(config: Config) -> training.Options:
    """Returns the options of the training loop."""
    recipe = RECIPES[config.dataset]
    return training.Options(
        steps=config.steps or recipe.steps,
        evaluate_every=config.evaluate_every or recipe.evaluate_every,
        save_every=config.save_every,
        keep=config.keep,
        precise_bn=config.precise_bn,
        warn_if_zero="residual_ratio",
        profile=config.profile,
        placement=config.placement,
    )


def dry_run(config: Config) -> None:
    """Prints what would be trained and what a step needs. No images are read."""
    recipe = RECIPES[config.dataset]
    labels = (config.batch_size,)
    batch = {
        "inputs": jax.ShapeDtypeStruct((*labels, *recipe.shape), jnp.uint8),
        "labels": jax.ShapeDtypeStruct(labels, jnp.int32),
        "position": jax.ShapeDtypeStruct(labels, jnp.uint32),
    }
    previews.preview(
        make_trainer(config, recipe.num_classes),
        loop_options(config),
        previews.make_mesh(config.topology),
        build(config, recipe.num_classes),
        batch,
    )


def main(config: Config) -> training.Result | None:
    """Trains a network, or describes what would be trained."""
    hint = " Or train on --dataset digits, which comes with scikit-learn."
    with (
        exit_on(ValueError, ImportError, training.DistributedError),
        exit_on(DataError, hint=hint),
    ):
        connect(config)
        if config.dry_run:
            dry_run(config)
            return None
        mesh = training.make_mesh()
        train, test = load(config)
        trainer = make_trainer(config, train.num_classes)
        options = loop_options(config)
        rows = training.local_rows(config.batch_size, mesh)

    def data(step: int) -> Iterator[Mapping[str, Any]]:
        return training_batches(
            train,
            config.batch_size,
            seed=config.seed,
            start=step,
            rows=rows,
            workers=config.workers,
        )

    def evaluation() -> Iterator[Mapping[str, Any]]:
        return evaluation_batches(test, config.batch_size, rows=rows)

    run_settings = settings(config, excluded=("dry_run", "topology"))
    console, key = PlainConsole(), jax.random.key(config.seed)
    with (
        exit_on(ImportError, *TRAINING_ERRORS),
        training.Run(config.output, run_settings, RESUMABLE_WITH) as run,
    ):
        result = training.fit(
            trainer, options, run, mesh, data, evaluation, key=key, console=console
        )
        if run.writes:
            report(config, run.folder, result)
            console.print(f"curves, log and checkpoints: {config.output}")
    return result


def report(config: Config, folder: AnyPath, result: training.Result) -> None:
    """Writes the results and the learning curves of a finished run."""
    name = "scikit-learn's digits (not CIFAR)" if config.dataset == "digits" else config.dataset
    results.record(folder, config.dataset, command("cifar"), result)
    results.draw_curves([folder], folder / "curves.png", title=f"{name}: learning curves")


if __name__ == "__main__":
    main(parse(Config, GROUPS, "cifar"))
