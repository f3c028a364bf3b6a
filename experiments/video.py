"""What Kinetics and Charades have in common: recipes as data, training on lists of videos, testing with many views.

Run by `python -m experiments.kinetics` and `python -m experiments.charades`.
"""

import dataclasses
import functools
import hashlib
import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import nonlocal_jax as nl
from experiments import report
from nonlocal_jax import evaluation, training
from nonlocal_jax.data import DataError, annotations, augment, stand_in
from nonlocal_jax.data.annotations import Annotations
from nonlocal_jax.data.clips import CentreClips, TestingClips, TrainingClips, Watch, cores, normalise, video_labels
from nonlocal_jax.data.pipeline import evaluation_batches, read_ahead, training_batches
from nonlocal_jax.data.sampling import Crops, InSpace, InTime
from nonlocal_jax.data.video import VideoError
from nonlocal_jax.layers.block import Preset
from nonlocal_jax.models.toy_video import ToyVideoNet
from nonlocal_jax.models.video_resnet import Kind
from nonlocal_jax.training.stop import SAVED, StopSignals
from nonlocal_jax.types import Instantiation
from nonlocal_jax.weights.load import load_with_report

Batch = Mapping[str, Any]
SINGLE = "1 view (middle clip, {})"
MANY = "{} views ({} clips × {})"
MAY_DIFFER = (
    "train_list", "val_list", "root", "classes", "output", "workers", "save_every", "keep", "unreadable", "clips", "crops",
    "views_at_once", "test_only", "distributed", "coordinator", "processes", "process_id", "timeout",
)  # fmt: skip


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

    @property
    def in_time(self) -> InTime:
        """Which frames are a clip."""
        return InTime(self.frames, self.stride)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What both have on the command line."""

    train_list: Path | None = None  # list of the videos to train with, or folder of class-name folders
    val_list: Path | None = None  # list of the videos to test with
    root: Path | None = None  # folder that paths in the lists are relative to, and must lie in; else that of each list
    classes: Path | None = None  # file of the names of the classes, one a line, in the order of their numbers
    leave_out: bool = False  # leave out videos that are missing or named twice, in place of stopping
    unreadable: float = 0.01  # share of the videos that may turn out unreadable; the run stops above it, and names them
    init: Path | None = None  # weights to start from, of any source that nonlocal_jax.weights reads
    preset: Preset = "paper"  # conventions of the blocks and poolings; those of the source of the weights, if they are not ours
    normalisation: Literal["caffe2", "slowfast", "mmcv"] = "caffe2"  # of colours; mean 114.75 and deviation 57.375 of 255
    fps: float | None = None  # frames a second that the stride counts in, as PySlowFast's 30; None counts those of each file
    inverse: bool = False  # scale the shorter side so that 1 / length is uniform, as PySlowFast
    batch_size: int | None = None  # clips of a step, of all devices together; None is the recipe's
    learning_rate: float | None = None  # at first; None is the recipe's, times batch size / the recipe's batch size
    steps: int | None = None  # None is the recipe's, times the recipe's batch size / batch size, so as many epochs
    accumulate: int = 1  # parts of a batch whose gradients are averaged, to save memory
    batch_norm: Literal["global", "device"] = "device"  # statistics on each device, as the paper's, or over the whole batch
    precise_bn: int = 0  # batches over which statistics are computed anew before each evaluation
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation
    remat: bool = False  # compute residual blocks again in the backward pass, to save memory
    placement: Literal["replicated", "sharded"] = "replicated"  # of parameters and optimiser on the devices
    seed: int = 0  # of initial values, order, clips and crops
    evaluate_every: int | None = None  # steps; None is a twentieth of them
    save_every: int | None = None  # steps between checkpoints; None is a twentieth of them, and at most 1,000
    keep: int = 2  # of the latest checkpoints, beside the best
    workers: int = 0  # processes that decode; 0 decodes in threads of this one
    clips: int = 10  # of each video in testing, evenly in time
    crops: Crops = "three"  # of each clip in testing: three, the centre, or the full frame, as the paper
    views_at_once: int = 8  # clips of a batch in testing
    test_only: bool = False  # no training: test the weights of --init
    distributed: bool = False  # one of many processes; TPU pods, SLURM and Open MPI say which, elsewhere the next three do
    coordinator: str | None = None  # host:port of process 0
    processes: int | None = None  # how many
    process_id: int | None = None  # which one this is, from 0
    timeout: int = 120  # seconds to wait for the other processes
    dry_run: bool = False  # print model, blocks, parameters, multiply-adds, memory and sharding, and stop
    list_recipes: bool = False  # print the recipes, and stop

    def __post_init__(self) -> None:
        for name in ("batch_size", "steps", "evaluate_every", "save_every", "clips", "views_at_once"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if not 0 <= self.unreadable <= 1:
            raise ValueError(f"unreadable must be a share from 0 to 1; got {self.unreadable}.")
        if self.test_only and self.init is None:
            raise ValueError("--test-only wants the weights to test: --init FILE.")


def scaled(config: Config, recipe: Recipe) -> Recipe:
    """The recipe for another batch size: the learning rate grows with it, and the number of steps shrinks.

    Source: Goyal et al., Accurate, Large Minibatch SGD (2017), section 2.1.
    """
    factor = (config.batch_size or recipe.batch_size) / recipe.batch_size
    steps = config.steps or max(round(recipe.steps / factor), 1)
    return dataclasses.replace(
        recipe,
        batch_size=config.batch_size or recipe.batch_size,
        learning_rate=recipe.learning_rate * factor if config.learning_rate is None else config.learning_rate,
        boundaries=tuple(max(round(boundary * steps / recipe.steps), i + 1) for i, boundary in enumerate(recipe.boundaries)),
        steps=steps,
    )


def build(config: Config, recipe: Recipe, num_classes: int) -> Any:
    """The network."""
    dtype = jnp.dtype(config.dtype)
    if not recipe.depth:
        block = nl.layers.nonlocal_block(recipe.instantiation, config.preset, subsample=True, dtype=dtype)
        return ToyVideoNet(num_classes, block, "i3d")
    options: dict[str, Any] = {"group_size": {"res3": 4}} if config.preset == "caffe2" and recipe.frames == 128 else {}
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
        optimiser = optax.chain(optimiser, optax.masked(optax.set_to_zero(), _of_norms))
    return training.Trainer(
        build(config, recipe, num_classes),
        optimiser,
        schedule,
        loss=sigmoid_cross_entropy if recipe.multi_label else training.cross_entropy,
        metrics=hit if recipe.multi_label else training.accuracy,
        prepare=functools.partial(prepare, config.normalisation),
        accumulate=config.accumulate,
        batch_norm=config.batch_norm,
    )


def _of_norms(params: Any) -> Any:
    """True for what belongs to a norm, which is what has a `scale`."""
    return {
        name: _of_norms(leaf) if isinstance(leaf, Mapping) else "scale" in params and name in ("scale", "bias")
        for name, leaf in params.items()
    }


def prepare(normalisation: str, batch: Batch, key: jax.Array | None) -> Batch:
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


def read_lists(config: Config, recipe: Recipe, kind: stand_in.Kind, folder: Path) -> tuple[Annotations, Annotations]:
    """Training and testing videos; the stand-in is made where the recipe is for it."""
    train_list, val_list, classes = config.train_list, config.val_list, config.classes
    if not recipe.depth and train_list is None and val_list is None:
        made = stand_in.make(folder / "videos", kind, threads=cores())
        train_list, val_list, classes = made["train"], made["test"], folder / "videos" / "classes.txt"
    if config.test_only:
        train_list = val_list
    if train_list is None or val_list is None:
        raise DataError("--train-list and --val-list must name lists of videos; --recipe toy_mp4 alone makes its own.")
    read = functools.partial(
        annotations.read, num_classes=recipe.num_classes, root=config.root, classes=classes, leave_out=config.leave_out
    )
    train, val = read(train_list), read(val_list)
    for found, file in ((train, train_list), (val, val_list)):
        if found.multi_label != recipe.multi_label:
            wanted = "any number of classes a video" if recipe.multi_label else "one class a video"
            raise DataError(f"{file} must be a list with {wanted}, for this recipe.")
    return train, val


def initial(config: Config, model: Any, recipe: Recipe) -> Mapping[str, Any] | None:
    """The weights of --init; what they cannot have stays as it is initialised."""
    if config.init is None:
        return None
    example = None if recipe.depth else jax.ShapeDtypeStruct((1, recipe.frames, recipe.size, recipe.size, 3), jnp.float32)
    parts: tuple[Any, ...] = () if config.test_only else ("classifier", "nonlocal", "statistics")
    variables, loaded = load_with_report(
        config.init,
        model,
        initialise=parts,
        inflate_flat=not config.test_only,
        example=example,
        rng=jax.random.key(config.seed),
    )
    Console().print(f"{config.init}: {loaded.summary}", highlight=False)
    return variables


def train(
    config: Config, recipe: Recipe, kind: stand_in.Kind, output: Path, lists: tuple[Annotations, Annotations], console: Console
) -> Mapping[str, Any]:
    """Train, from where the run was; gives the variables."""
    recipe, (train_list, val_list) = scaled(config, recipe), lists
    trainer = make_trainer(config, recipe, train_list.num_classes)
    mesh = training.make_mesh()
    rows = training.local_rows(recipe.batch_size, mesh)
    twentieth = max(recipe.steps // 20, 1)
    options = training.Options(
        steps=recipe.steps,
        evaluate_every=config.evaluate_every or twentieth,
        save_every=config.save_every or min(twentieth, 1000),
        keep=config.keep,
        best="hit_at_1" if recipe.multi_label else "accuracy",
        precise_bn=config.precise_bn,
        placement=config.placement,
    )
    in_time = dataclasses.replace(recipe.in_time, fps=config.fps)
    threads = max(cores() // config.workers, 1) if config.workers else None
    source = TrainingClips(
        train_list, in_time, InSpace(recipe.size, recipe.shorter, config.inverse), seed=config.seed, threads=threads
    )
    middle = CentreClips(val_list, in_time, recipe.size, recipe.shorter[0], threads=threads)

    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("dry_run", "list_recipes")}
    settings |= {"train_videos": digest_of_list(train_list), "val_videos": digest_of_list(val_list)}
    variables = initial(config, trainer.model, recipe)
    with training.Run(output, settings, MAY_DIFFER) as run:

        def say(line: str) -> None:
            console.print(line, highlight=False)
            with (run.folder / "unreadable.txt").open("a") as out:
                out.write(line + "\n")

        watch_training, watch_testing = (Watch(len(videos), config.unreadable, say) for videos in lists)

        def data(step: int) -> Iterator[Batch]:
            return watch_training(
                training_batches(source, recipe.batch_size, seed=config.seed, start=step, rows=rows, workers=config.workers)
            )

        def evaluate() -> Iterator[Batch]:
            return watch_testing(evaluation_batches(middle, recipe.batch_size, rows=rows, workers=config.workers))

        result = training.fit(
            trainer, options, run, mesh, data, evaluate, key=jax.random.key(config.seed), variables=variables, console=console
        )
        trained = jax.device_get(result.state.variables)
        if run.writes:
            nl.weights.save(run.folder / "weights.safetensors", trained)
            report.record(run.folder, f"{kind}: {config.train_list or 'moving digits'}", command(kind), result)
            if not recipe.multi_label:
                report.draw_curves([run.folder], run.folder / "curves.png", title=f"{kind}: learning curves")
    return trained


def test(
    config: Config,
    recipe: Recipe,
    kind: stand_in.Kind,
    output: Path,
    videos: Annotations,
    variables: Mapping[str, Any],
    console: Console,
) -> dict[str, Any]:
    """Test with one view and with many; goes on where it was. Gives the reports, which are in results.json too."""
    model = build(config, recipe, videos.num_classes)
    mesh = training.make_mesh(devices=jax.local_devices())
    at_once = -(-config.views_at_once // mesh.size) * mesh.size
    activation = jax.nn.sigmoid if recipe.multi_label else jax.nn.softmax

    @jax.jit
    def scores_of(variables: Any, clips: Any) -> Any:
        return activation(model.apply(variables, normalise(clips, config.normalisation), train=False))

    def apply(clips: np.ndarray) -> Any:
        return scores_of(variables, training.put({"inputs": clips}, mesh)["inputs"])

    how: evaluation.Combination = "max" if recipe.multi_label else "mean"
    source = TestingClips(
        videos, dataclasses.replace(recipe.in_time, fps=config.fps), config.clips, config.crops, recipe.test_size
    )
    settings = {
        "weights": digest(variables), "videos": digest_of_list(videos), "clips": config.clips, "crops": config.crops,
        "size": recipe.test_size, "normalisation": config.normalisation, "fps": config.fps, "dtype": config.dtype, "how": how,
    }  # fmt: skip
    folder = output / f"test-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]}"
    with training.Run(folder, settings) as run, StopSignals() as stop:
        stored = evaluation.ScoreFolder(run.folder / "scores", f"{jax.process_index()}")
        mine = [i for i in range(len(videos)) if i % jax.process_count() == jax.process_index() and i not in stored]
        bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[found]}"),
            TextColumn("left:"), TimeRemainingColumn(), console=console, speed_estimate_period=600,
        )  # fmt: skip
        with bar:
            task = bar.add_task(f"testing with {at_once} views at once", total=len(mine), found="")
            right = sum(_is_right(scores, videos, video) for video, scores in stored.found.items())
            for video, views in read_ahead(_Reading(source), mine):
                if isinstance(views, VideoError):
                    stored.fail(video, str(views))
                else:
                    each = evaluation.score_views(apply, views, at_once)
                    stored.add(video, {"single": each[-1], "many": evaluation.combine(each[:-1], how)})
                    right += _is_right(stored.found[video], videos, video)
                if len(stored.failures) > config.unreadable * len(videos):
                    stored.write()
                    raise DataError(_too_many(stored.failures, len(videos)))
                bar.update(task, advance=1, found=f"{100 * right / max(len(stored.found), 1):.1f}% right so far")
                if stop.requested:
                    break
        stored.write()
        if stop.requested:
            console.print(
                f"stopped by a signal; {len(stored.found):,} videos are scored, and the same command goes on", highlight=False
            )
            raise SystemExit(SAVED)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("tested")
            stored = evaluation.ScoreFolder(run.folder / "scores", "all")
        return _reported(config, recipe, kind, run, videos, stored, console)


@dataclasses.dataclass(frozen=True)
class _Reading:
    """The views of a video, or why there are none."""

    source: TestingClips

    def __call__(self, video: int) -> Any:
        try:
            return self.source.read(video)
        except VideoError as error:
            return error


def _reported(
    config: Config,
    recipe: Recipe,
    kind: stand_in.Kind,
    run: training.Run,
    videos: Annotations,
    stored: evaluation.ScoreFolder,
    console: Console,
) -> dict[str, Any]:
    if not stored.found:
        raise DataError("no video could be read:\n  " + "\n  ".join(stored.failures.values()))
    order = sorted(stored.found)
    truth = np.stack([video_labels(videos, videos.records[video]) for video in order])
    part = "full frame" if config.crops == "full" else "centre crop"
    each = {"three": "3 crops", "centre": "centre crop", "full": "full frame"}[config.crops]
    views = config.clips * (3 if config.crops == "three" else 1)
    labels = {"single": SINGLE.format(part), "many": MANY.format(views, config.clips, each)}
    reports = {}
    for name, label in labels.items():
        scores = np.stack([stored.found[video][name] for video in order])
        if recipe.multi_label:
            reports[label] = evaluation.multi_label_report(scores, truth.astype(bool), videos.names)
        else:
            reports[label] = evaluation.single_label_report(scores, truth, videos.names)
    results = {
        "command": command(kind),
        "hardware": report.hardware(),
        "published": recipe.published,
        "unreadable": stored.failures,
        "tested_with": reports,
    }
    if run.writes:
        training.write_whole(run.folder / "results.json", json.dumps(results, indent=1) + "\n")
        if not recipe.multi_label:
            draw_confusion(reports[labels["many"]], run.folder / "confusion.png")
    console.print(evaluation.table(reports), highlight=False)
    if recipe.published:
        console.print(f"the paper, many views, %: {' / '.join(map(str, recipe.published))}", highlight=False)
    if stored.failures:
        console.print(f"{len(stored.failures):,} videos could not be read and are not counted", highlight=False)
    console.print(f"classes, confusion and scores: {run.folder}", highlight=False)
    return reports


def _is_right(scores: Mapping[str, np.ndarray], videos: Annotations, video: int) -> bool:
    """Whether the class with the highest score is the video's, or one of its classes."""
    return int(scores["many"].argmax()) in videos.records[video].labels


def _too_many(failures: Mapping[int, str], count: int) -> str:
    return f"{len(failures)} of {count:,} videos cannot be read:\n  " + "\n  ".join(failures.values())


def draw_confusion(found: Mapping[str, Any], file: Path) -> None:
    """Truth by answer, each row a share of its videos."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    counts = np.array(found["confusion"])
    names = list(found["classes"])
    side = min(max(4.0, 0.35 * len(names) + 2), 12.0)
    figure, ax = plt.subplots(figsize=(side + 1, side), layout="constrained")
    image = ax.imshow(counts / np.maximum(counts.sum(1, keepdims=True), 1), cmap="viridis", vmin=0, vmax=1)
    ax.set(xlabel="answer", ylabel="truth", title=f"{found['videos']:,} videos, top-1 {100 * found['top1']['value']:.1f}%")
    if len(names) <= 40:
        ax.set_xticks(range(len(names)), names, rotation=90)
        ax.set_yticks(range(len(names)), names)
    figure.colorbar(image, label="share of the videos of a class")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def digest(tree: Any) -> str:
    """SHA-256 of all arrays of a tree, with their names."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        sha.update(jax.tree_util.keystr(path).encode())
        sha.update(np.ascontiguousarray(leaf).tobytes())
    return sha.hexdigest()


def digest_of_list(videos: Annotations) -> str:
    """SHA-256 of what is in a list, wherever it lies: names and labels in their order."""
    text = "\n".join(f"{record.path.name} {record.labels} {record.actions}" for record in videos.records)
    return hashlib.sha256(text.encode()).hexdigest()


def command(kind: str) -> str:
    """What was asked for."""
    return shlex.join(["python", "-m", f"experiments.{kind}", *sys.argv[1:]])


def dry_run(config: Config, recipe: Recipe) -> str:
    """What would be trained, on clips of zeros."""
    recipe = scaled(config, recipe)
    trainer, mesh = make_trainer(config, recipe, recipe.num_classes), training.make_mesh()
    rows = len(training.local_rows(recipe.batch_size, mesh))
    shape = (rows, recipe.frames, recipe.size, recipe.size, 3)
    labels = np.zeros((rows, recipe.num_classes), np.float32) if recipe.multi_label else np.zeros(rows, np.int32)
    batch = {"inputs": np.zeros(shape, np.uint8), "labels": labels, "position": np.arange(rows, dtype=np.uint32)}
    options = training.Options(recipe.steps, placement=config.placement)
    lines = [str(nl.models.cost(trainer.model, shape)), *map(str, nl.plan(shape, trainer.model))]
    return "\n".join([*lines, training.dry_run(trainer, options, mesh, batch)])


def recipe_table(recipes: Mapping[str, Recipe]) -> str:
    """Markdown: a row for each recipe."""
    lines = ["| recipe | starts from | clips | steps | published, % |", "|---|---|---|--:|---|"]
    for name, recipe in recipes.items():
        numbers = " / ".join(map(str, recipe.published))
        clips = f"{recipe.batch_size} of {recipe.frames}×{recipe.stride}"
        lines.append(f"| {name} | {recipe.start} | {clips} | {recipe.steps:,} | {numbers} |")
    return "\n".join(lines)


def run(config: Config, recipes: Mapping[str, Recipe], name: str, kind: stand_in.Kind, output: Path) -> dict[str, Any] | None:
    """One recipe, from its lists to its results."""
    console = Console()
    if config.list_recipes:
        print(recipe_table(recipes))
        return None
    if name not in recipes:
        raise SystemExit(f"error: --recipe must be one of {', '.join(recipes)}; got {name!r}.")
    recipe = recipes[name]
    try:
        if config.distributed:
            training.initialize(config.coordinator, config.processes, config.process_id, timeout=config.timeout)
        if config.dry_run:
            print(dry_run(config, recipe))
            return None
        if config.init is not None and not config.init.exists():
            raise DataError(f"--init must name a file of weights; there is no {config.init}.")
        lists = read_lists(config, recipe, kind, output)
        for found, what in zip(lists, ("to train with", "to test with"), strict=True):
            left_out = f", {len(found.left_out):,} lines left out" if found.left_out else ""
            console.print(f"{len(found):,} videos {what}{left_out}", highlight=False)
        if config.test_only:
            variables = initial(config, build(config, recipe, lists[1].num_classes), recipe)
            assert variables is not None
        else:
            variables = train(config, recipe, kind, output, lists, console)
        return test(config, recipe, kind, output, lists[1], variables, console)
    except (DataError, ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    except (training.RunError, training.CheckpointError, training.MismatchError, training.NonFiniteError) as error:
        raise SystemExit(f"error: {error}") from error
