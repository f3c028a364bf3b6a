"""Shows a task that a small network can solve only with a non-local block.

    python -m experiments.toy_video                  # the demo: control, embedded Gaussian
    python -m experiments.toy_video --all --seeds 5  # all networks, the table of the README

The task `same_digit` asks whether two digits, far apart in space and time, are of one class. The
control network cannot answer: averaged over all positions, features that each depend on one digit
give the linear classifier a sum u(first) + u(second). Cross-entropy is convex in u and all classes
are equally likely, so the best u is the same for every class, and the accuracy is at chance.

A run that was stopped continues with the same command, and finished networks are not trained again.

Recipe, the same for every network: the trunk learns single scanned digits (for `moving_pair` then
single moving digits); a block, which is the identity at first, is inserted before the last residual
block; the stem is frozen and everything else is trained on clips. Adam with warm-up and cosine
decay.

Hardware and time: on 2 idle CPU cores of a server, 3 minutes for the demo and about an hour for
`--all --seeds 5`; on a slow or busy machine, several times as long. `make demo` installs 1.6 GB of
packages before that, which takes minutes more.
Expected on `same_digit`, on scans held out from training: about 95% with the embedded Gaussian, 50%
for the control.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import nonlocal_jax as nl
from experiments.shared import previews, results, toy_results
from experiments.shared.command_line import (
    TRAINING_ERRORS,
    PlainConsole,
    command,
    exit_on,
    parse,
    settings,
)
from experiments.shared.toy_results import Example, TrainedNetwork
from nonlocal_jax import checks, files, training
from nonlocal_jax.data.toy_video import (
    CLASSES,
    SIDE,
    Clips,
    Scans,
    Scene,
    Task,
    load_scans,
    make_clips,
    num_classes,
)
from nonlocal_jax.layers.presets import Preset
from nonlocal_jax.models.toy_video import LocalBlock, ToyVideoNet, TrunkKind
from nonlocal_jax.path_options import AnyPathOption, LocalPathOption
from nonlocal_jax.types import Instantiation

Network = Literal["control"] | Instantiation
INSTANTIATIONS: tuple[Instantiation, ...] = get_args(Instantiation)
NETWORKS: tuple[Network, ...] = ("control", *INSTANTIATIONS)
EVALUATION_BATCH = 256  # Test clips per batch.
CURVE_CLIPS = 1024  # Test clips per point of a learning curve, at most.
SAVE_EVERY = 400  # Steps between checkpoints.
TEST_SEED = 2018  # Seed of the test clips, the same for every network.
EXAMPLES = 3  # Test clips in the picture.
PRETRAINING: dict[Task, tuple[Task, ...]] = {
    "same_digit": ("single_digit",),
    "moving_pair": ("single_digit", "moving_digit"),
}
# Options that do not change how a single network is trained.
SHARED_OPTIONS = (
    "networks",
    "seeds",
    "all",
    "test_clips",
    "output",
    "readme",
    "dry_run",
    "topology",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MainOptions:
    """Which networks to train on which task, and where the results go."""

    task: Literal["same_digit", "moving_pair"] = "same_digit"  # Question about each clip.
    # Networks to train. "control" has a residual block in place of the non-local one.
    networks: tuple[Network, ...] = ("control", "embedded_gaussian")
    seeds: int = 1  # Runs of each network, with seeds 0, 1, ...
    # Train every instantiation on same_digit, and the control and the embedded Gaussian on
    # moving_pair with at most 3 seeds.
    all: bool = False
    # Folder for results.json, results.md, toy_video.png, and a subfolder for each run.
    output: AnyPathOption = Path("runs/toy_video")
    # With --all: file in which the results table is updated between its two marks.
    readme: LocalPathOption = Path("README.md")
    # Print the networks, their blocks, parameters, multiply-adds, memory and sharding, then stop.
    # No scans are needed.
    dry_run: bool = False
    # With --dry-run: compile for this slice of TPUs, such as v5e:2x2, which need not be at hand.
    topology: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """What the networks compute."""

    # Trunk of the network. Defaults to c2d for same_digit and i3d for moving_pair.
    kind: TrunkKind | None = None
    preset: Preset = "paper"  # Source whose conventions the non-local block follows.


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How the networks are trained."""

    pretrain_steps: int = 1500  # Steps of the trunk on single digits.
    pretrain_batch_size: int = 128  # Images per step on single digits.
    pretrain_learning_rate: float = 4e-3  # Peak learning rate on single digits.
    steps: int = 1200  # Steps on clips.
    batch_size: int = 32  # Clips per step.
    learning_rate: float = 2e-3  # Peak learning rate on clips.
    warmup: int = 100  # Steps of linear warm-up.


@dataclasses.dataclass(frozen=True, kw_only=True)
class TestingOptions:
    """How the networks are tested."""

    __test__ = False  # pytest takes classes of this name for tests

    # Steps between points of the learning curve, which use up to 1,024 test clips.
    evaluate_every: int = 200
    test_clips: int = 4096  # Test clips for the final accuracy.


# Groups of options by title, as --help shows them.
GROUPS: dict[str, type] = {
    "": MainOptions,
    "scene": Scene,
    "network": NetworkOptions,
    "training": TrainingOptions,
    "testing": TestingOptions,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(MainOptions, NetworkOptions, TrainingOptions, TestingOptions):
    """Trains small networks on toy videos of digits, with and without a non-local block."""

    # Appearance of the clips. moving_pair uses a size of 20 by default.
    scene: Scene = dataclasses.field(default_factory=Scene)

    def __post_init__(self) -> None:
        previews.check(self.dry_run, self.topology)
        checks.at_least("seeds", self.seeds, 1)
        checks.at_least("pretrain_steps", self.pretrain_steps, 1)
        checks.at_least("pretrain_batch_size", self.pretrain_batch_size, 1)
        checks.at_least("steps", self.steps, 1)
        checks.at_least("batch_size", self.batch_size, 1)
        checks.at_least("evaluate_every", self.evaluate_every, 1)
        checks.at_least("test_clips", self.test_clips, 1)
        checks.at_least("warmup", self.warmup, 0)
        for name in ("pretrain_learning_rate", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite; got {getattr(self, name)}.")
        if not self.networks:
            raise ValueError(f"networks must name at least one of {', '.join(NETWORKS)}; got none.")

    def specialised(self, task: Literal["same_digit", "moving_pair"]) -> "Config":
        """Returns the config for one task, with the task's own defaults filled in."""
        moving = task == "moving_pair"
        scene = Scene(size=20) if moving and self.scene == Scene() else self.scene
        kind = self.kind or ("i3d" if moving else "c2d")
        return dataclasses.replace(self, task=task, kind=kind, scene=scene)


def build(network: Network | None, config: Config, task: Task | None = None) -> ToyVideoNet:
    """Builds a network.

    Args:
        network: The block to insert. None inserts no block, as in pre-training.
        config: Kind of the trunk, and conventions of the block.
        task: The task to classify. Defaults to the task of `config`.
    """
    task = task or config.task
    block: Any = None
    if network == "control":
        # Wide enough that the control has more parameters and FLOPs than the non-local networks.
        block = LocalBlock(28 if config.task == "moving_pair" else 24)
    elif network is not None:
        # On maps of 4×4 positions there is nothing to gain from subsampling the keys.
        block = nl.layers.nonlocal_block(network, config.preset, subsample=False)
    image = task == "single_digit"
    kind = "c2d" if image else config.kind or "c2d"
    return ToyVideoNet(num_classes(task), block, kind, freeze_stem=not image)


_make_clips = jax.jit(make_clips, static_argnums=(0, 3, 4))


def held_out_clips(task: Task, number: int, scans: dict[str, Scans], scene: Scene) -> Clips:
    """Makes a batch of the test clips, which are the same for every network and seed."""
    key = jax.random.fold_in(jax.random.key(TEST_SEED), number)
    return jax.device_get(_make_clips(task, key, scans["test"], EVALUATION_BATCH, scene))


def training_batches(
    task: Task, scans: Scans, batch_size: int, scene: Scene, key: jax.Array, step: int
) -> Iterator[dict[str, Any]]:
    """Makes the training batches from `step` on. A step's clips depend on the key and the step."""
    for i in itertools.count(step):
        step_key = jax.random.fold_in(jax.random.fold_in(key, 2), i)
        clips = jax.device_get(_make_clips(task, step_key, scans, batch_size, scene))
        yield {"inputs": clips.video, "labels": clips.labels}


def test_batches(
    task: Task, scans: dict[str, Scans], scene: Scene, clips: int
) -> Iterator[dict[str, Any]]:
    """Makes the first test clips, rounded up to whole batches."""
    for i in range(math.ceil(clips / EVALUATION_BATCH)):
        batch = held_out_clips(task, i, scans, scene)
        mask = np.ones(EVALUATION_BATCH, bool)
        yield {"inputs": batch.video, "labels": batch.labels, "mask": mask}


def make_trainer(
    network: Network | None, config: Config, task: Task
) -> tuple[training.Trainer, int, int]:
    """Returns the trainer of a network, its number of steps, and its batch size."""
    steps, batch_size, peak = config.steps, config.batch_size, config.learning_rate
    if task == "single_digit":
        steps = config.pretrain_steps
        batch_size = config.pretrain_batch_size
        peak = config.pretrain_learning_rate
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, min(config.warmup, steps // 2), steps)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    loss = training.classification(build(network, config, task), observe=nl.layers.residual_ratios)
    return training.Trainer(loss, optimiser, schedule), steps, batch_size


def initial_variables(model: ToyVideoNet, clips: np.ndarray, key: jax.Array, start: Any) -> Any:
    """Initialises a network, and inserts the trained variables of `start` unless it is None.

    Raises:
        ValueError: The clips are not finite.
    """
    if not np.isfinite(clips).all():
        raise ValueError(
            "the clips must be finite; got NaN or infinity. Look at the scans and at --scene."
        )
    variables = jax.jit(model.init)(jax.random.fold_in(key, 1), clips[:1])
    return variables if start is None else insert(start, variables)


def insert(trained: Any, fresh: Any) -> Any:
    """Replaces fresh variables by trained ones, except the head and new blocks.

    Kernels of images are inflated where the fresh ones have taps in time.
    """
    if not isinstance(fresh, dict):
        if trained.ndim == 5 and trained.shape != fresh.shape:
            return nl.weights.inflate(trained[0], len(fresh))
        return trained
    return {
        name: insert(trained[name], leaf) if name in trained and name != "head" else leaf
        for name, leaf in fresh.items()
    }


def train(
    name: str,
    network: Network | None,
    task: Task,
    seed: int,
    start: Any,
    config: Config,
    scans: dict[str, Scans],
    console: Console,
) -> TrainedNetwork:
    """Trains one network with one seed, or continues its run.

    Args:
        name: Name of the run's folder.
        network: The block of the network, or None.
        task: The task to train on.
        seed: Seed of initial values and clips.
        start: Trained variables to start from, or None.
        config: Options of the experiment.
        scans: Scanned digits for training and test.
        console: Where progress is printed.
    """
    trainer, steps, batch_size = make_trainer(network, config, task)
    mesh = training.make_mesh()
    key = jax.random.key(seed)
    data = functools.partial(training_batches, task, scans["train"], batch_size, config.scene, key)
    test = functools.partial(test_batches, task, scans, config.scene)
    model = build(network, config, task)
    variables = initial_variables(model, next(data(0))["inputs"], key, start)
    options = training.Options(
        steps,
        evaluate_every=min(config.evaluate_every, steps),
        save_every=SAVE_EVERY,
        keep=1,
        best=None,
        warn_if_zero="residual_ratio",
    )
    run_settings = {**settings(config, SHARED_OPTIONS), "network": name, "seed": seed}
    console.print(f"{name}, seed {seed}")
    with training.Run(config.output / config.task / f"{name}-{seed}", run_settings) as run:
        evaluation = functools.partial(test, min(CURVE_CLIPS, config.test_clips))
        result = training.fit(
            trainer,
            options,
            run,
            mesh,
            data,
            evaluation,
            key=key,
            variables=variables,
            console=console,
        )
        results.record(run.folder, task, command("toy_video"), result)
        log = results.read_log(run.folder, "evaluation")
    curve = [(row["step"], row["accuracy"]) for row in log]
    batches = ((batch,) for batch in test(config.test_clips))
    sums = training.sum_of_evaluations(trainer, mesh)(result.state.variables, batches)
    accuracy = float(sums["accuracy"] / sums["count"])
    return TrainedNetwork(accuracy, curve, result.seconds, result.state.variables)


def train_all(
    config: Config, scans: dict[str, Scans], console: Console
) -> dict[Network, list[TrainedNetwork]]:
    """Trains every network of one task with every seed, each from the trunk of its seed."""
    trunks: list[Any] = [None] * config.seeds
    for task in PRETRAINING[config.task]:
        trunks = [
            train(f"trunk_{task}", None, task, seed, trunk, config, scans, console).variables
            for seed, trunk in enumerate(trunks)
        ]
    return {
        network: [
            train(network, network, config.task, seed, trunk, config, scans, console)
            for seed, trunk in enumerate(trunks)
        ]
        for network in config.networks
    }


def cost(network: Network, config: Config) -> tuple[int, int]:
    """Counts the parameters of a network, and the FLOPs of one clip.

    FLOPs are those that XLA counts for CPUs, because it does not count them on every device.
    """
    model = build(network, config)
    shape = (1, config.scene.frames, config.scene.size, config.scene.size, 1)
    clip = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), clip)
    with jax.default_device(jax.devices("cpu")[0]):
        analysis: Any = jax.jit(model.apply).lower(variables, clip).cost_analysis()
    parameters = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    return parameters, int(analysis["flops"])


def summarise(config: Config, trained: dict[Network, list[TrainedNetwork]]) -> list[dict[str, Any]]:
    """Returns one row per network, with its size, its FLOPs and its accuracies."""
    clip = jnp.zeros((1, config.scene.frames, config.scene.size, config.scene.size, 1))
    rows = []
    for network, runs in trained.items():
        blocks = 0 if network == "control" else 1
        nl.describe(build(network, config), runs[0].variables, clip, expected=blocks)
        parameters, flops = cost(network, config)
        rows.append(
            {
                "task": config.task,
                "network": network,
                "kind": config.kind,
                "parameters": parameters,
                "flops": flops,
                "accuracies": [run.accuracy for run in runs],
                "seconds": [round(run.seconds, 1) for run in runs],
            }
        )
    return rows


def examples(
    config: Config, trained: dict[Network, list[TrainedNetwork]], scans: dict[str, Scans]
) -> list[Example]:
    """Returns the best non-local network's answers and weights on the first test clips."""
    candidates = [network for network in trained if network != "control"]
    if not candidates:
        return []
    best = max(candidates, key=lambda network: trained[network][0].accuracy)
    variables = trained[best][0].variables
    clips = held_out_clips(config.task, 0, scans, config.scene)
    class_indices = [np.nonzero(clips.labels == label)[0] for label in (0, 1)]
    # The classes take turns.
    chosen = np.array([class_indices[i % 2][i // 2] for i in range(EXAMPLES)])
    clips = jax.tree.map(lambda x: x[chosen], clips)
    model = build(best, config)
    predictions = jax.jit(model.apply)(variables, clips.video).argmax(-1)
    block = nl.visualize.affinities(model, variables, clips.video)["block"]
    return [
        Example(
            clips.video, block, i, int(clips.labels[i]), int(predictions[i]), clips.places[i, 0]
        )
        for i in range(EXAMPLES)
    ]


def check(config: Config) -> None:
    """Finds errors before any long work starts, then creates the output folder.

    Raises:
        SystemExit: A network cannot be built, a batch cannot be split over the devices, or a file
            cannot be written.
    """
    with exit_on(ValueError, ImportError):
        scans = load_scans("test")
        for size in (config.pretrain_batch_size, config.batch_size, EVALUATION_BATCH):
            training.local_rows(size, training.make_mesh())
        for task_config in task_configs(config):
            make = functools.partial(
                make_clips, task_config.task, scans=scans, batch_size=2, scene=task_config.scene
            )
            clips = jax.eval_shape(make, jax.random.key(0))
            for network in task_config.networks:
                model = build(network, task_config)
                jax.eval_shape(model.init, jax.random.key(0), clips.video)
    try:
        config.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(
            f"error: --output must be a writable folder; got {config.output}: {error.strerror}."
        ) from error
    readme = config.readme
    writable = readme.is_file() and os.access(readme, os.R_OK | os.W_OK)
    if config.all and readme.exists() and not writable:
        raise SystemExit(f"error: --readme must be a readable and writable file; got {readme}.")


def task_configs(config: Config) -> Iterator[Config]:
    """Yields the config of the task, or with --all those of both tasks."""
    if not config.all:
        yield config.specialised(config.task)
        return
    yield dataclasses.replace(config.specialised("same_digit"), networks=NETWORKS)
    moving = config.specialised("moving_pair")
    networks: tuple[Network, ...] = ("control", "embedded_gaussian")
    yield dataclasses.replace(moving, networks=networks, seeds=min(config.seeds, 3))


def dry_run(config: Config) -> None:
    """Prints what training each network on clips would need, without training it."""
    with exit_on(ValueError, ImportError):
        mesh = previews.make_mesh(config.topology)
        scans = jax.eval_shape(
            lambda: Scans(jnp.zeros((CLASSES, 1, SIDE, SIDE)), jnp.zeros(CLASSES, jnp.int32))
        )
        for task_config in task_configs(config):
            task = task_config.task
            for network in task_config.networks:
                trainer, steps, batch_size = make_trainer(network, task_config, task)
                make = functools.partial(
                    make_clips, task, batch_size=batch_size, scene=task_config.scene
                )
                clips = jax.eval_shape(make, jax.random.key(0), scans)
                batch = {"inputs": clips.video, "labels": clips.labels}
                print(f"{task}, {network}")
                model = build(network, task_config)
                previews.preview(trainer, training.Options(steps), mesh, model, batch)


def main(config: Config) -> list[dict[str, Any]]:
    """Trains all networks, and writes the table and the pictures.

    Returns:
        The rows of the table; none for --dry-run.
    """
    if config.dry_run:
        dry_run(config)
        return []
    check(config)
    scans: dict[str, Scans] = {"train": load_scans("train"), "test": load_scans("test")}
    console = PlainConsole()
    rows: list[dict[str, Any]] = []
    for task_config in task_configs(config):
        with exit_on(ImportError, *TRAINING_ERRORS):
            trained = train_all(task_config, scans, console)
        rows += summarise(task_config, trained)
        record = {
            "command": command("toy_video"),
            "hardware": results.hardware(),
            "rows": rows,
        }
        files.write_text(config.output / "results.json", json.dumps(record, indent=2) + "\n")
        moving = config.all and task_config.task == "moving_pair"
        picture = config.output / ("moving_pair.png" if moving else "toy_video.png")
        curves = {network: [run.curve for run in runs] for network, runs in trained.items()}
        toy_results.draw(task_config.task, curves, examples(task_config, trained, scans), picture)

    table = Table(*toy_results.HEADER, title="accuracy on clips of scans held out from training")
    for row in rows:
        table.add_row(*toy_results.cells(row))
    console.print(table)
    markdown = toy_results.markdown(rows, command("toy_video"))
    (config.output / "results.md").write_text(markdown + "\n")
    if config.all:
        toy_results.write_readme(config.readme, markdown)
    console.print(f"picture, table and logs: {config.output}")
    return rows


if __name__ == "__main__":
    main(parse(Config, GROUPS, "toy_video"))
