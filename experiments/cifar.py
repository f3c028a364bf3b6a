"""Residual networks with and without non-local blocks on CIFAR-10 and CIFAR-100, and offline on scanned digits.

    python -m experiments.cifar                                        # digits, offline, 1 minute on 2 CPU cores
    python -m experiments.cifar --dataset cifar10                      # ResNet-20 with a block after res2_1
    python -m experiments.cifar --dataset cifar10 --nonlocal-blocks    # without: the baseline
    python -m experiments.cifar --dataset cifar100 --depth 56 --instantiation dot_product

A run that was stopped goes on with the same command. `--dry-run` says what would be trained, and stops.

Recipe (He, Zhang, Ren, Sun, CVPR 2016, section 4.2): SGD, momentum 0.9 (here Nesterov's), weight decay 1e-4, batches of 128,
64,000 steps, learning rate 0.1, a tenth of it from 32,000 and a hundredth from 48,000; 4 pixels of padding, random crop, flip.

Expected on CIFAR-10 without blocks, by that paper: 91.25% with 20 layers, 92.49% with 32, 93.03% with 56. Not run here on
CIFAR itself. On the digits, which are not CIFAR and much easier: about 99% of the 450 that are held out.

Hardware and time: on 2 CPU cores a step of ResNet-20 on CIFAR's 32×32 images takes 0.4 s (benchmarks/README.md), 64,000 of them
seven hours: CIFAR wants an accelerator.
"""

import dataclasses
import functools
import math
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console

import nonlocal_jax as nl
from experiments import report
from nonlocal_jax import training
from nonlocal_jax.data import DataError, augment, cifar
from nonlocal_jax.data.images import Images, load_digits
from nonlocal_jax.data.pipeline import evaluation_batches, training_batches
from nonlocal_jax.layers.presets import Preset
from nonlocal_jax.models.cifar_resnets import STAGES, CifarResNet
from nonlocal_jax.types import Instantiation

Dataset = Literal["digits", "cifar10", "cifar100"]


@dataclasses.dataclass(frozen=True)
class Input:
    """How the images of one data set become what the network sees, and its recipe's own numbers."""

    mean: tuple[float, ...]  # of each channel, in the units of the files
    std: tuple[float, ...]
    padding: int  # pixels around an image before it is cropped
    flip: bool
    steps: int
    evaluate_every: int


INPUTS: dict[Dataset, Input] = {
    "digits": Input((4.9,), (6.0,), padding=1, flip=False, steps=400, evaluate_every=100),
    "cifar10": Input(
        (125.3, 123.0, 113.9), (63.0, 62.1, 66.7), 4, True, steps=64_000, evaluate_every=2000
    ),
    "cifar100": Input(
        (129.3, 124.1, 112.4), (68.2, 65.4, 70.4), 4, True, steps=64_000, evaluate_every=2000
    ),
}
MAY_DIFFER = (
    "data_dir", "output", "workers", "profile", "save_every", "keep",
    "distributed", "coordinator", "processes", "process_id", "timeout",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """Residual networks with and without non-local blocks on CIFAR, or offline on scanned digits."""

    dataset: Dataset = (
        "digits"  # digits are scikit-learn's 1,797 scans of 8×8 pixels: not CIFAR, and much easier
    )
    data_dir: Path = Path(
        "data"
    )  # folder of the CIFAR archive; it is fetched where there is a network
    archive_sha256: str | None = (
        None  # of an archive of your own in the official format, in place of the official one
    )
    depth: int = 20  # layers, 6n + 2
    nonlocal_blocks: tuple[str, ...] = (
        "res2_1",
    )  # the residual blocks after which a non-local one stands; none for none
    instantiation: Instantiation = "embedded_gaussian"  # the pairwise function
    preset: Preset = "paper"  # conventions of the non-local blocks
    steps: int | None = None  # None is 64,000, and 400 for digits
    batch_size: int = 128  # images, of all devices together
    learning_rate: float = 0.1  # at its peak
    schedule: Literal["step", "cosine"] = (
        "step"  # a tenth at one half and at three quarters, or half a cosine
    )
    warmup: int = 0  # steps of linear warm-up
    weight_decay: float = 1e-4  # not of norms
    decay_biases: bool = True  # whether biases decay, those of norms apart
    clip_norm: float | None = None  # the largest norm of the gradient
    label_smoothing: float = 0.0  # share of each label that all classes get
    mixup: float = 0.0  # α of the Beta distribution; 0 mixes nothing
    average: float | None = (
        None  # what an exponential moving average of the parameters keeps of itself each step
    )
    accumulate: int = 1  # parts of a batch whose gradients are averaged, to save memory
    dtype: Literal["float32", "bfloat16"] = (
        "float32"  # of the computation; parameters and optimiser are float32
    )
    remat: bool = False  # compute residual blocks again in the backward pass, to save memory
    batch_norm: Literal["global", "device"] = (
        "global"  # statistics over the whole batch, or on each device by itself
    )
    precise_bn: int = 0  # batches over which statistics are computed anew before each evaluation
    placement: Literal["replicated", "sharded"] = (
        "replicated"  # of parameters and optimiser on the devices
    )
    seed: int = 0  # of initial values, order and augmentation
    evaluate_every: int | None = None  # steps; None is 2,000, and 100 for digits
    save_every: int = 500  # steps between checkpoints
    keep: int = 2  # of the latest checkpoints, beside the best
    workers: int = 0  # processes that read data; 0 reads in threads
    distributed: bool = False  # one of many processes; TPU pods, SLURM and Open MPI say which, elsewhere the next three do
    coordinator: str | None = None  # host:port of process 0
    processes: int | None = None  # how many
    process_id: int | None = None  # which one this is, from 0
    timeout: int = 120  # seconds to wait for the other processes, at the start and when one gives no sign of life
    profile: int = 0  # steps to profile, into <output>/profile
    dry_run: bool = (
        False  # print model, blocks, parameters, multiply-adds, memory and sharding, and stop
    )
    output: Path = Path("runs/cifar")  # folder of the run

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {self.batch_size}.")
        if not 0 <= self.mixup < math.inf:
            raise ValueError(f"mixup must be at least 0 and finite; got {self.mixup}.")
        self.places()

    def places(self) -> dict[str, tuple[int, ...]]:
        """After which residual blocks of which stage the non-local ones stand."""
        found: dict[str, tuple[int, ...]] = {}
        for place in self.nonlocal_blocks:
            stage, _, i = place.partition("_")
            if stage not in STAGES or not i.isdecimal():
                raise ValueError(
                    f"nonlocal_blocks must be like res2_1, stages {', '.join(STAGES)}; got {place!r}."
                )
            found[stage] = (*found.get(stage, ()), int(i))
        return found


def build(config: Config, num_classes: int) -> CifarResNet:
    """The network."""
    return nl.models.cifar_resnet(
        config.depth, config.places(), num_classes, instantiation=config.instantiation, preset=config.preset,
        remat=config.remat, dtype=jnp.dtype(config.dtype),
    )  # fmt: skip


def make_trainer(config: Config, num_classes: int) -> training.Trainer:
    """Model, optimiser, loss and augmentation."""
    of_input = INPUTS[config.dataset]
    steps = config.steps or of_input.steps
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
    return training.Trainer(
        build(config, num_classes),
        optimiser,
        schedule,
        loss=training.smoothed_cross_entropy(config.label_smoothing)
        if config.label_smoothing
        else training.cross_entropy,
        prepare=functools.partial(prepare, of_input, config.mixup, num_classes),
        accumulate=config.accumulate,
        batch_norm=config.batch_norm,
        average=config.average,
    )


def prepare(
    of_input: Input, mixup: float, num_classes: int, batch: Mapping[str, Any], key: jax.Array | None
) -> Mapping[str, Any]:
    """On the device: normalise; in training, crop, flip and mix first."""
    mean, std = (jnp.array(numbers)[None, None, None] for numbers in (of_input.mean, of_input.std))
    images = (batch["inputs"].astype(jnp.float32) - mean) / std
    if key is not None:
        keys = augment.example_keys(key, batch["position"])
        images = augment.random_crop(images, keys, of_input.padding)
        if of_input.flip:
            images = augment.random_flip(images, jax.vmap(jax.random.fold_in, (0, None))(keys, 1))
    batch = {**batch, "inputs": images}
    return training.mixup(batch, key, mixup, num_classes) if key is not None and mixup else batch


def load(config: Config) -> tuple[Images, Images]:
    """Training and held-out images."""
    if config.dataset == "digits":
        return load_digits("train"), load_digits("test")
    archive = cifar.ARCHIVES[config.dataset]
    if config.archive_sha256 is not None:
        file = config.data_dir / archive.name
        if not file.exists():
            raise DataError(f"--archive-sha256 is that of {file}, which is not there.")
        archive = dataclasses.replace(
            archive, sha256=config.archive_sha256, size=file.stat().st_size
        )
    train, test = (
        cifar.load(config.dataset, split, config.data_dir, archive) for split in ("train", "test")
    )
    return train, test


def main(config: Config) -> training.Result | None:
    """Train, or say what would be trained."""
    console = Console()
    try:
        if config.distributed:
            training.initialize(
                config.coordinator, config.processes, config.process_id, timeout=config.timeout
            )
        train, test = load(config)
        trainer = make_trainer(config, train.num_classes)
        mesh = training.make_mesh()
        rows = training.local_rows(config.batch_size, mesh)
        options = training.Options(
            steps=config.steps or INPUTS[config.dataset].steps,
            evaluate_every=config.evaluate_every or INPUTS[config.dataset].evaluate_every,
            save_every=config.save_every,
            keep=config.keep,
            precise_bn=config.precise_bn,
            profile=config.profile,
            placement=config.placement,
        )
    except DataError as error:
        raise SystemExit(
            f"error: {error} Or train on --dataset digits, which comes with scikit-learn."
        ) from error
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error

    def data(step: int) -> Any:
        return training_batches(
            train,
            config.batch_size,
            seed=config.seed,
            start=step,
            rows=rows,
            workers=config.workers,
        )

    key = jax.random.key(config.seed)
    if config.dry_run:
        shape = (config.batch_size, *train.images.shape[1:])
        print(nl.models.cost(trainer.model, shape), *nl.plan(shape, trainer.model), sep="\n")
        print(training.dry_run(trainer, options, mesh, next(data(0))))
        return None
    settings = {
        name: value for name, value in dataclasses.asdict(config).items() if name != "dry_run"
    }
    command = shlex.join(["python", "-m", "experiments.cifar", *sys.argv[1:]])
    try:
        with training.Run(config.output, settings, MAY_DIFFER) as run:
            evaluation = functools.partial(evaluation_batches, test, config.batch_size, rows=rows)
            result = training.fit(
                trainer, options, run, mesh, data, evaluation, key=key, console=console
            )
            if run.writes:
                name = (
                    "scikit-learn's digits (not CIFAR)"
                    if config.dataset == "digits"
                    else config.dataset
                )
                report.record(run.folder, config.dataset, command, result)
                report.draw_curves(
                    [run.folder], run.folder / "curves.png", title=f"{name}: learning curves"
                )
                console.print(f"curves, log and checkpoints: {config.output}", highlight=False)
    except (
        training.RunError,
        training.CheckpointError,
        training.MismatchError,
        training.NonFiniteError,
    ) as error:
        raise SystemExit(f"error: {error}") from error
    return result


if __name__ == "__main__":
    main(tyro.cli(Config))
