"""Do two digits, far apart in space and time, belong together? With a non-local block a network can tell.

    python -m experiments.toy_video                   # control and embedded Gaussian on `same_digit`, the demo
    python -m experiments.toy_video --all --seeds 5   # every instantiation, and the table of the README

Why the control cannot: averaged over all positions, features that each depend on one digit give the linear classifier
a sum u(first) + u(second). Cross-entropy is convex in u and the classes are drawn alike, so the best u is the same for
every class, and the answer is chance.

A run that was stopped goes on with the same command, and what is finished is not trained again.

Recipe, the same for every network: the trunk learns single scanned digits (for `moving_pair` then single moving ones);
a block is inserted, right before the last residual block, and is the identity; the stem is frozen and all the rest is
trained on clips. Adam, warm-up and cosine decay.

Hardware and time: 2 CPU cores, 3 minutes for the demo, about an hour for `--all --seeds 5`. Expected on `same_digit`,
on scans held out from training: about 95% with the embedded Gaussian, 50% for the control.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import shlex
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.table import Table

import nonlocal_jax as nl
from experiments import report
from experiments.report import hardware
from nonlocal_jax import files, training
from nonlocal_jax.data.toy_video import (
    Clips,
    Scans,
    Scene,
    Task,
    load_scans,
    make_clips,
    num_classes,
)
from nonlocal_jax.models.toy_video import LocalBlock, ToyVideoNet, TrunkKind
from nonlocal_jax.types import Instantiation

Network = Literal["control"] | Instantiation
INSTANTIATIONS: tuple[Instantiation, ...] = get_args(Instantiation)
NETWORKS: tuple[Network, ...] = ("control", *INSTANTIATIONS)
EVALUATION_BATCH = 256
SAVE_EVERY = 400  # steps
TEST_KEY = 2018  # seed of the test clips, the same for every network and seed
PRETRAINING: dict[Task, tuple[Task, ...]] = {
    "same_digit": ("single_digit",),
    "moving_pair": ("single_digit", "moving_digit"),
}
OF_ALL_RUNS = (
    "networks",
    "seeds",
    "all",
    "test_clips",
    "output",
    "readme",
)  # what one run's own results do not depend on
README_MARKS = ("<!-- toy_video: begin -->", "<!-- toy_video: end -->")


@dataclasses.dataclass(frozen=True)
class Config:
    """Toy videos of scanned digits: networks with a non-local block against the same network without."""

    task: Literal["same_digit", "moving_pair"] = "same_digit"  # what is asked of a clip
    networks: tuple[Network, ...] = (
        "control",
        "embedded_gaussian",
    )  # the control has a residual block in place of a non-local one
    kind: TrunkKind | None = None  # c2d or i3d; None is c2d for same_digit, i3d for moving_pair
    preset: Literal["paper", "caffe2", "slowfast", "non_local_pytorch", "mmcv"] = (
        "paper"  # conventions of the non-local block
    )
    seeds: int = 1  # runs of each network, seeds 0, 1, ...
    all: bool = False  # every instantiation on same_digit, and control and embedded Gaussian on moving_pair (3 seeds)
    scene: Scene = dataclasses.field(
        default_factory=Scene
    )  # how clips look; moving_pair's own default is 20 pixels of size
    pretrain_steps: int = 1500  # steps of the trunk on single digits
    pretrain_batch_size: int = 128  # images
    pretrain_learning_rate: float = 4e-3  # of Adam, at its peak
    steps: int = 1200  # steps on clips
    batch_size: int = 32  # clips
    learning_rate: float = 2e-3  # of Adam, at its peak
    warmup: int = 100  # steps of linear warm-up
    evaluate_every: int = (
        200  # steps between two points of the learning curve, each of 1,024 test clips at most
    )
    test_clips: int = 4096  # of the final accuracy
    output: Path = Path(
        "runs/toy_video"
    )  # folder of results.json, results.md, toy_video.png, and of each run's own
    readme: Path = Path(
        "README.md"
    )  # with --all: the file whose results table is written, where it has the marks for it

    def __post_init__(self) -> None:
        for name in (
            "seeds", "pretrain_steps", "pretrain_batch_size", "steps", "batch_size", "evaluate_every", "test_clips",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if self.warmup < 0:
            raise ValueError(f"warmup must be at least 0; got {self.warmup}.")
        for name in ("pretrain_learning_rate", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite; got {getattr(self, name)}.")
        if not self.networks:
            raise ValueError(f"networks must name at least one of {', '.join(NETWORKS)}; got none.")

    def of_task(self, task: Literal["same_digit", "moving_pair"]) -> "Config":
        """The same recipe for one task, its defaults filled in."""
        moving = task == "moving_pair"
        scene = Scene(size=20) if moving and self.scene == Scene() else self.scene
        return dataclasses.replace(
            self, task=task, kind=self.kind or ("i3d" if moving else "c2d"), scene=scene
        )


class Result(NamedTuple):
    """One network, trained with one seed."""

    accuracy: float
    curve: list[tuple[int, float]]  # step, accuracy on test clips
    seconds: float
    variables: dict[str, Any]


def build(network: Network | None, config: Config, task: Task | None = None) -> ToyVideoNet:
    """The network for a task, the config's own by default; None has no block, as in pre-training."""
    task = task or config.task
    block: Any = None
    if network == "control":
        block = LocalBlock(
            28 if config.task == "moving_pair" else 24
        )  # so that its `cost` is the largest
    elif (
        network is not None
    ):  # on maps of 4×4 positions there is nothing to win by subsampling the keys
        block = nl.layers.nonlocal_block(network, config.preset, subsample=False)
    image = task == "single_digit"
    return ToyVideoNet(
        num_classes(task), block, "c2d" if image else config.kind or "c2d", freeze_stem=not image
    )


_make_clips = jax.jit(make_clips, static_argnums=(0, 3, 4))


def held_out_clips(task: Task, number: int, scans: dict[str, Scans], scene: Scene) -> Clips:
    """A batch of those that every network and seed is tested with."""
    key = jax.random.fold_in(jax.random.key(TEST_KEY), number)
    return jax.device_get(_make_clips(task, key, scans["test"], EVALUATION_BATCH, scene))


def make_trainer(
    network: Network | None, config: Config, task: Task
) -> tuple[training.Trainer, int, int]:
    """What a step does, how many there are, and of how many clips."""
    steps, batch_size, peak = config.steps, config.batch_size, config.learning_rate
    if task == "single_digit":
        steps, batch_size, peak = (
            config.pretrain_steps,
            config.pretrain_batch_size,
            config.pretrain_learning_rate,
        )
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, min(config.warmup, steps // 2), steps)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    loss = training.classification(build(network, config, task), observe=nl.layers.residual_ratios)
    return training.Trainer(loss, optimiser, schedule), steps, batch_size


def train(
    name: str,
    network: Network | None,
    task: Task,
    seed: int,
    start: Any,
    config: Config,
    scans: dict[str, Scans],
    console: Console,
) -> Result:
    """Train one network from `start`, where it has the leaves, else from the initial values."""
    trainer, steps, batch_size = make_trainer(network, config, task)
    mesh = training.make_mesh()
    key = jax.random.key(seed)

    def data(step: int) -> Iterator[dict[str, Any]]:
        for i in itertools.count(step):
            of_step = jax.random.fold_in(jax.random.fold_in(key, 2), i)
            clips = jax.device_get(
                _make_clips(task, of_step, scans["train"], batch_size, config.scene)
            )
            yield {"inputs": clips.video, "labels": clips.labels}

    def test(clips: int) -> Iterator[dict[str, Any]]:
        """The first test clips, rounded up to whole batches."""
        for i in range(-(-clips // EVALUATION_BATCH)):
            found = held_out_clips(task, i, scans, config.scene)
            yield {
                "inputs": found.video,
                "labels": found.labels,
                "mask": np.ones(EVALUATION_BATCH, bool),
            }

    first = next(data(0))["inputs"]
    if not np.isfinite(first).all():
        raise ValueError(
            "the clips must be finite; got NaN or infinity. Look at the scans and at --scene."
        )
    model = build(network, config, task)
    variables = jax.jit(model.init)(jax.random.fold_in(key, 1), first[:1])
    if start is not None:
        variables = insert(start, variables)
    options = training.Options(
        steps,
        evaluate_every=min(config.evaluate_every, steps),
        save_every=SAVE_EVERY,
        keep=1,
        best=None,
        warn_if_zero="residual_ratio",
    )
    own = {
        name: value for name, value in dataclasses.asdict(config).items() if name not in OF_ALL_RUNS
    }
    console.print(f"{name}, seed {seed}", highlight=False)
    with training.Run(
        config.output / config.task / f"{name}-{seed}", {**own, "network": name, "seed": seed}
    ) as run:
        evaluation = functools.partial(test, min(1024, config.test_clips))
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
        report.record(run.folder, task, command(), result)
        curve = [
            (row["step"], row["accuracy"]) for row in report.read_log(run.folder, "evaluation")
        ]
    sums = training.sum_of_evaluations(trainer, mesh)(
        result.state.variables, ((batch,) for batch in test(config.test_clips))
    )
    return Result(
        float(sums["accuracy"] / sums["count"]), curve, result.seconds, result.state.variables
    )


def insert(trained: Any, fresh: Any) -> Any:
    """The fresh variables with every trained leaf put in: image kernels inflated, the head and new blocks left as they are."""
    if not isinstance(fresh, dict):
        if trained.ndim == 5 and trained.shape != fresh.shape:
            return nl.weights.inflate(trained[0], len(fresh))
        return trained
    return {
        name: insert(trained[name], leaf) if name in trained and name != "head" else leaf
        for name, leaf in fresh.items()
    }


def train_all(
    config: Config, scans: dict[str, Scans], console: Console
) -> dict[Network, list[Result]]:
    """Every network of one task with every seed."""
    trunks: list[Any] = [None] * config.seeds
    for task in PRETRAINING[config.task]:
        name = f"trunk_{task}"
        trunks = [
            train(name, None, task, i, trunk, config, scans, console).variables
            for i, trunk in enumerate(trunks)
        ]
    return {
        network: [
            train(network, network, config.task, i, trunk, config, scans, console)
            for i, trunk in enumerate(trunks)
        ]
        for network in config.networks
    }


def cost(network: Network, config: Config) -> tuple[int, int]:
    """Parameters, and floating-point operations of one clip as XLA counts them for CPUs (it does not for every device)."""
    model = build(network, config)
    clip = jax.ShapeDtypeStruct(
        (1, config.scene.frames, config.scene.size, config.scene.size, 1), jnp.float32
    )
    variables = jax.eval_shape(model.init, jax.random.key(0), clip)
    with jax.default_device(jax.devices("cpu")[0]):
        counted: Any = jax.jit(model.apply).lower(variables, clip).cost_analysis()
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"])), int(counted["flops"])


def summarise(config: Config, results: dict[Network, list[Result]]) -> list[dict[str, Any]]:
    """A row for each network: its size, its arithmetic and its accuracies."""
    rows = []
    for network, runs in results.items():
        model, variables = build(network, config), runs[0].variables
        clip = jnp.zeros((1, config.scene.frames, config.scene.size, config.scene.size, 1))
        nl.describe(model, variables, clip, expected=0 if network == "control" else 1)
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


def cells(row: dict[str, Any]) -> list[str]:
    """One row of the table, as text."""
    mean = statistics.mean(row["accuracies"])
    spread = (
        f" ± {100 * statistics.stdev(row['accuracies']):.1f}" if len(row["accuracies"]) > 1 else ""
    )
    name = row["network"].replace("_", " ")
    name = f"{row['kind'].upper()}, " + (
        "residual block (control)" if name == "control" else f"non-local, {name}"
    )
    return [
        row["task"],
        name,
        f"{row['parameters']:,}",
        f"{row['flops'] / 1e6:.1f} M",
        f"{100 * mean:.1f}{spread}",
    ]


HEADER = ("task", "network", "parameters", "FLOPs a clip", "test accuracy, %")


def markdown(rows: list[dict[str, Any]], command: str) -> str:
    """The results table of the README."""
    lines = ["| " + " | ".join(HEADER) + " |", "|---|---|--:|--:|--:|"]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    seeds = ", ".join(
        f"{task}: {n}" for task, n in {row["task"]: len(row["accuracies"]) for row in rows}.items()
    )
    lines += [
        "",
        f"Mean ± standard deviation over seeds ({seeds}); chance is 50. `{command}`, {hardware()}.",
    ]
    return "\n".join(lines)


def draw(
    config: Config, results: dict[Network, list[Result]], scans: dict[str, Scans], file: Path
) -> None:
    """Learning curves, and where a position on a digit looks in a few test clips."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    nonlocal_networks = [network for network in results if network != "control"]
    shown = 3 if nonlocal_networks else 0
    figure = plt.figure(figsize=(11, 3.5 + 2.1 * shown), layout="constrained")
    top, *below = figure.subfigures(
        1 + shown, 1, height_ratios=[3.5] + [2.1] * shown, squeeze=False
    )[:, 0]
    ax = top.subplots()
    for network, runs in results.items():
        steps = [step for step, _ in runs[0].curve]
        accuracies = np.array([[accuracy for _, accuracy in run.curve] for run in runs])
        style = {"color": "0.45", "linestyle": "--"} if network == "control" else {}
        ax.plot(steps, accuracies.mean(0), marker="o", label=network.replace("_", " "), **style)
    ax.axhline(0.5, color="0.7", linewidth=1, zorder=0)
    ax.set(
        xlabel="step",
        ylabel="accuracy on test clips",
        ylim=(0.4, 1.02),
        title=f"{config.task}: learning curves",
    )
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    if nonlocal_networks:
        chosen = max(nonlocal_networks, key=lambda network: results[network][0].accuracy)
        draw_arrows(below, config, chosen, results[chosen][0], scans)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_arrows(
    rows: list[Any], config: Config, network: Network, result: Result, scans: dict[str, Scans]
) -> None:
    """From a position on the first digit to its 20 highest-weighted ones, in the first test clips of each class in turn."""
    clips = held_out_clips(config.task, 0, scans, config.scene)
    of_class = [np.nonzero(clips.labels == label)[0] for label in (0, 1)]
    chosen = np.array([of_class[i % 2][i // 2] for i in range(len(rows))])
    clips = jax.tree.map(lambda x: x[chosen], clips)
    model = build(network, config)
    answers = jax.jit(model.apply)(result.variables, clips.video).argmax(-1)
    block = nl.visualize.affinities(model, result.variables, clips.video)["block"]
    paper = 1 - clips.video.clip(0, 1)  # ink is black
    words = ["different", "same"]
    for i, (row, label, answer, places) in enumerate(
        zip(rows, clips.labels, answers, clips.places, strict=True)
    ):
        row.suptitle(f"truth: {words[int(label)]}, answer: {words[int(answer)]}", fontsize=10)
        query = nl.visualize.from_pixels(block, places[0])  # in the middle of the first digit
        nl.visualize.arrows(
            block, paper, query, sample=i, axes=list(row.subplots(1, block.queries[0]))
        )


def prepare(config: Config) -> None:
    """All that can fail fails here, before any long work starts; then the output folder is there."""
    import matplotlib  # noqa: F401

    try:
        for size in (config.pretrain_batch_size, config.batch_size, EVALUATION_BATCH):
            training.local_rows(size, training.make_mesh())
        for one in tasks(config):
            clips = jax.eval_shape(
                lambda key, one=one: make_clips(one.task, key, load_scans("test"), 2, one.scene),
                jax.random.key(0),
            )
            for network in one.networks:
                jax.eval_shape(build(network, one).init, jax.random.key(0), clips.video)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    try:
        config.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(
            f"error: --output must be a folder that can be written; {config.output}: {error.strerror}."
        ) from error
    if (
        config.all
        and config.readme.exists()
        and not (config.readme.is_file() and os.access(config.readme, os.R_OK | os.W_OK))
    ):
        raise SystemExit(
            f"error: --readme must be a file that can be read and written; got {config.readme}."
        )


def tasks(config: Config) -> Iterator[Config]:
    """What is run: one task, or with --all both."""
    if not config.all:
        yield config.of_task(config.task)
        return
    yield dataclasses.replace(config.of_task("same_digit"), networks=NETWORKS)
    moving = dataclasses.replace(
        config.of_task("moving_pair"), networks=("control", "embedded_gaussian")
    )
    yield dataclasses.replace(moving, seeds=min(config.seeds, 3))


def command() -> str:
    """What was asked for."""
    return shlex.join(["python", "-m", "experiments.toy_video", *sys.argv[1:]])


def main(config: Config) -> list[dict[str, Any]]:
    """Run it; return the rows of the table."""
    prepare(config)
    scans: dict[str, Scans] = {"train": load_scans("train"), "test": load_scans("test")}
    console = Console()
    rows: list[dict[str, Any]] = []
    for one in tasks(config):
        try:
            results = train_all(one, scans, console)
        except (
            training.RunError,
            training.CheckpointError,
            training.MismatchError,
            training.NonFiniteError,
        ) as error:
            raise SystemExit(f"error: {error}") from error
        rows += summarise(one, results)
        record = {"command": command(), "hardware": hardware(), "rows": rows}
        files.write_text(config.output / "results.json", json.dumps(record, indent=2) + "\n")
        picture = config.output / (
            "toy_video.png" if one.task == "same_digit" or not config.all else "moving_pair.png"
        )
        draw(one, results, scans, picture)

    table = Table(*HEADER, title="accuracy on clips of scans held out from training")
    for row in rows:
        table.add_row(*cells(row))
    console.print(table)
    (config.output / "results.md").write_text(markdown(rows, command()) + "\n")
    if config.all:
        write_readme(config.readme, markdown(rows, command()))
    console.print(f"picture, table and logs: {config.output}")
    return rows


def write_readme(readme: Path, table: str) -> None:
    """Put the table between its marks, if the file has them."""
    begin, end = README_MARKS
    text = readme.read_text() if readme.is_file() else ""
    if begin in text and end in text:
        before, after = text.split(begin)[0], text.split(end)[1]
        readme.write_text(f"{before}{begin}\n{table}\n{end}{after}")


if __name__ == "__main__":
    main(tyro.cli(Config))
