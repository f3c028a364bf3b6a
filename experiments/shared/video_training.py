"""Training on a list of videos."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

import nonlocal_jax as nl
from experiments.shared import previews, results
from experiments.shared.building import Batch, build, make_trainer
from experiments.shared.command_line import PlainConsole, command, settings
from experiments.shared.fingerprints import digest_of_list
from experiments.shared.recipes import Config, Recipe, clip_sampling, scaled
from nonlocal_jax import training
from nonlocal_jax.data import stand_in
from nonlocal_jax.data.annotations import Annotations
from nonlocal_jax.data.clips import CentreClips, TrainingClips, Watch, cores
from nonlocal_jax.data.pipeline import evaluation_batches, training_batches
from nonlocal_jax.data.sampling import InSpace
from nonlocal_jax.files import AnyPath
from nonlocal_jax.weights.loading import load_with_report

# Options that may change between two starts of a run.
RESUMABLE_WITH = (
    "train_list",
    "val_list",
    "root",
    "classes",
    "output",
    "workers",
    "save_every",
    "keep",
    "unreadable",
    "clips",
    "crops",
    "combine",
    "views_at_once",
    "test_only",
    "distributed",
    "coordinator",
    "processes",
    "process_id",
    "timeout",
)


def initial(config: Config, model: Any, recipe: Recipe) -> Mapping[str, Any] | None:
    """Loads the weights of --init.

    Args:
        config: Options of the experiment.
        model: Network of the recipe.
        recipe: Decides which variables may be missing from the file. Those are initialised.

    Returns:
        The variables of the model, or None without --init.
    """
    if config.init is None:
        return None
    if config.test_only:
        initialised: tuple[Any, ...] = ()
    elif recipe.frozen_bn:
        # Norms that do not change must come from the same training as the convolutions before them.
        initialised = ("classifier",)
    else:
        initialised = ("classifier", "nonlocal", "statistics")
    example = None
    if not recipe.depth:
        shape = (1, recipe.frames, recipe.size, recipe.size, 3)
        example = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables, report = load_with_report(
        config.init,
        model,
        initialise=initialised,
        inflate_flat=not config.test_only,
        example=example,
        rng=jax.random.key(config.seed),
    )
    PlainConsole().print(f"{config.init}: {report.summary}")
    return variables


def train(
    config: Config,
    recipe: Recipe,
    kind: stand_in.DataSet,
    output: AnyPath,
    lists: tuple[Annotations, Annotations],
    console: Console,
) -> Mapping[str, Any]:
    """Trains a network, or continues the run in `output`.

    Args:
        config: Options of the experiment.
        recipe: What to train, before it is scaled to the batch size.
        kind: Name of the experiment.
        output: Folder of the run.
        lists: Training videos and test videos.
        console: Where progress is printed.

    Returns:
        The trained variables, as NumPy arrays.
    """
    recipe = scaled(config, recipe)
    num_classes = lists[0].num_classes
    trainer = make_trainer(config, recipe, num_classes)
    mesh = training.make_mesh()
    rows = training.local_rows(recipe.batch_size, mesh)
    options = _loop_options(config, recipe)
    variables = initial(config, build(config, recipe, num_classes), recipe)
    with training.Run(output, _run_settings(config, lists), RESUMABLE_WITH) as run:
        data, evaluation = _pipelines(config, recipe, lists, rows, run.folder, console)
        result = training.fit(
            trainer,
            options,
            run,
            mesh,
            data,
            evaluation,
            key=jax.random.key(config.seed),
            variables=variables,
            console=console,
        )
        trained = training.fetch(result.state.variables, mesh)
        if run.writes:
            nl.weights.save(run.folder / "weights.safetensors", trained)
            data_name = f"{kind}: {config.train_list or 'moving digits'}"
            results.record(run.folder, data_name, command(kind), result)
            if not recipe.multi_label:
                curves = run.folder / "curves.png"
                results.draw_curves([run.folder], curves, title=f"{kind}: learning curves")
    return trained


def _loop_options(config: Config, recipe: Recipe) -> training.Options:
    twentieth = max(recipe.steps // 20, 1)
    return training.Options(
        steps=recipe.steps,
        evaluate_every=config.evaluate_every or twentieth,
        save_every=config.save_every or min(twentieth, 1000),
        keep=config.keep,
        best="hit_at_1" if recipe.multi_label else "accuracy",
        precise_bn=config.precise_bn,
        warn_if_zero="residual_ratio",
        placement=config.placement,
    )


def _run_settings(config: Config, lists: tuple[Annotations, Annotations]) -> dict[str, Any]:
    """Returns what must not change when a run is resumed. The lists may move, but not change."""
    train_videos, val_videos = map(digest_of_list, lists)
    return {
        **settings(config, excluded=("dry_run", "topology", "list_recipes")),
        "train_videos": train_videos,
        "val_videos": val_videos,
    }


def _pipelines(
    config: Config,
    recipe: Recipe,
    lists: tuple[Annotations, Annotations],
    rows: Any,
    folder: AnyPath,
    console: Console,
) -> tuple[Callable[[int], Iterator[Batch]], Callable[[], Iterator[Batch]]]:
    """Makes the batches of training, from any step on, and those of evaluation.

    Both count the videos that cannot be read and log them in the folder of the run.
    """
    train_videos, val_videos = lists
    # With worker processes, the cores are shared among them.
    threads = max(cores() // config.workers, 1) if config.workers else None
    clip = clip_sampling(config, recipe)
    crop = InSpace(recipe.size, recipe.shorter, config.inverse)
    source = TrainingClips(train_videos, clip, crop, seed=config.seed, threads=threads)
    centres = CentreClips(val_videos, clip, recipe.size, recipe.shorter[0], threads=threads)

    def watch(split: str, videos: Annotations) -> Watch:
        log = folder / f"unreadable-{split}-{jax.process_index()}.jsonl"
        return Watch(len(videos), config.unreadable, console.print, log)

    watch_training, watch_testing = watch("train", train_videos), watch("val", val_videos)

    def data(step: int) -> Iterator[Batch]:
        batches = training_batches(
            source,
            recipe.batch_size,
            seed=config.seed,
            start=step,
            rows=rows,
            workers=config.workers,
        )
        return watch_training(batches)

    def evaluation() -> Iterator[Batch]:
        batches = evaluation_batches(centres, recipe.batch_size, rows=rows, workers=config.workers)
        return watch_testing(batches)

    return data, evaluation


def dry_run(config: Config, recipe: Recipe) -> None:
    """Prints what training a recipe would need, without running it.

    Without --batch-size, the batch is the least multiple of the recipe's that splits over the
    devices.

    Args:
        config: Options of the experiment.
        recipe: What to train, before it is scaled to the batch size.

    Raises:
        ImportError, ValueError: As `previews.make_mesh` and `preview` do.
    """
    mesh = previews.make_mesh(config.topology)
    clips = math.lcm(recipe.batch_size, mesh.shape["data"])
    if config.batch_size is None and clips != recipe.batch_size:
        print(
            f"the batch of {recipe.batch_size} clips cannot be split over {mesh.size} devices: "
            f"{clips} are taken. --batch-size sets another."
        )
        config = dataclasses.replace(config, batch_size=clips)
    recipe = scaled(config, recipe)
    clips = recipe.batch_size
    labels = jax.ShapeDtypeStruct((clips,), jnp.int32)
    if recipe.multi_label:
        labels = jax.ShapeDtypeStruct((clips, recipe.num_classes), jnp.float32)
    batch = {
        "inputs": jax.ShapeDtypeStruct((clips, recipe.frames, *2 * [recipe.size], 3), jnp.uint8),
        "labels": labels,
        "position": jax.ShapeDtypeStruct((clips,), jnp.uint32),
    }
    previews.preview(
        make_trainer(config, recipe, recipe.num_classes),
        training.Options(recipe.steps, placement=config.placement),
        mesh,
        build(config, recipe, recipe.num_classes),
        batch,
    )
