"""Training on lists of videos, and testing: what `python -m experiments.kinetics` and `.charades` run."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import nonlocal_jax as nl
from experiments import report
from experiments.multi_view import command, digest_of_list, test
from experiments.recipes import (
    Batch,
    Config,
    Recipe,
    build,
    in_time,
    make_trainer,
    recipe_table,
    scaled,
)
from nonlocal_jax import training
from nonlocal_jax.data import DataError, annotations, stand_in
from nonlocal_jax.data.annotations import Annotations
from nonlocal_jax.data.clips import CentreClips, TrainingClips, Watch, cores
from nonlocal_jax.data.pipeline import evaluation_batches, training_batches
from nonlocal_jax.data.sampling import InSpace
from nonlocal_jax.weights.loading import load_with_report

MAY_DIFFER = (
    "train_list", "val_list", "root", "classes", "output", "workers", "save_every", "keep", "unreadable", "clips", "crops",
    "combine", "views_at_once", "test_only", "distributed", "coordinator", "processes", "process_id", "timeout",
)  # fmt: skip


def read_lists(
    config: Config, recipe: Recipe, kind: stand_in.DataSet, folder: Path
) -> tuple[Annotations, Annotations]:
    """Training and testing videos; the stand-in is made where the recipe is for it."""
    train_list, val_list, classes = config.train_list, config.val_list, config.classes
    if not recipe.depth and train_list is None and val_list is None:
        made = stand_in.make(folder / "videos", kind, threads=cores())
        train_list, val_list, classes = (
            made["train"],
            made["test"],
            folder / "videos" / "classes.txt",
        )
    if config.test_only:
        train_list = val_list
    if train_list is None or val_list is None:
        raise DataError(
            "--train-list and --val-list must name lists of videos; --recipe toy_mp4 alone makes its own."
        )
    read = functools.partial(
        annotations.read,
        num_classes=recipe.num_classes,
        root=config.root,
        classes=classes,
        leave_out=config.leave_out,
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
    example = (
        None
        if recipe.depth
        else jax.ShapeDtypeStruct((1, recipe.frames, recipe.size, recipe.size, 3), jnp.float32)
    )
    parts: tuple[Any, ...] = ("classifier", "nonlocal", "statistics")
    if recipe.frozen_bn:  # norms that stay as they are, and what was trained with them
        parts = ("classifier",)
    if config.test_only:
        parts = ()
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
    config: Config,
    recipe: Recipe,
    kind: stand_in.DataSet,
    output: Path,
    lists: tuple[Annotations, Annotations],
    console: Console,
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
        warn_if_zero="residual_ratio",
        placement=config.placement,
    )
    threads = max(cores() // config.workers, 1) if config.workers else None
    clip, part = in_time(config, recipe), InSpace(recipe.size, recipe.shorter, config.inverse)
    source = TrainingClips(train_list, clip, part, seed=config.seed, threads=threads)
    middle = CentreClips(val_list, clip, recipe.size, recipe.shorter[0], threads=threads)

    settings = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if name not in ("dry_run", "list_recipes")
    }
    settings |= {"train_videos": digest_of_list(train_list), "val_videos": digest_of_list(val_list)}
    model = build(config, recipe, train_list.num_classes)
    variables = initial(config, model, recipe)
    with training.Run(output, settings, MAY_DIFFER) as run:
        say = functools.partial(console.print, highlight=False)
        watch_training, watch_testing = (
            Watch(
                len(videos),
                config.unreadable,
                say,
                run.folder / f"unreadable-{split}-{jax.process_index()}.jsonl",
            )
            for split, videos in zip(("train", "val"), lists, strict=True)
        )

        def data(step: int) -> Iterator[Batch]:
            return watch_training(
                training_batches(
                    source,
                    recipe.batch_size,
                    seed=config.seed,
                    start=step,
                    rows=rows,
                    workers=config.workers,
                )
            )

        def evaluate() -> Iterator[Batch]:
            return watch_testing(
                evaluation_batches(middle, recipe.batch_size, rows=rows, workers=config.workers)
            )

        result = training.fit(
            trainer,
            options,
            run,
            mesh,
            data,
            evaluate,
            key=jax.random.key(config.seed),
            variables=variables,
            console=console,
        )
        trained = training.fetch(result.state.variables, mesh)
        if run.writes:
            nl.weights.save(run.folder / "weights.safetensors", trained)
            report.record(
                run.folder, f"{kind}: {config.train_list or 'moving digits'}", command(kind), result
            )
            if not recipe.multi_label:
                report.draw_curves(
                    [run.folder], run.folder / "curves.png", title=f"{kind}: learning curves"
                )
    return trained


def dry_run(config: Config, recipe: Recipe) -> str:
    """What would be trained, on clips of zeros."""
    recipe = scaled(config, recipe)
    trainer, mesh = make_trainer(config, recipe, recipe.num_classes), training.make_mesh()
    rows = len(training.local_rows(recipe.batch_size, mesh))
    shape = (rows, recipe.frames, recipe.size, recipe.size, 3)
    labels = (
        np.zeros((rows, recipe.num_classes), np.float32)
        if recipe.multi_label
        else np.zeros(rows, np.int32)
    )
    batch = {
        "inputs": np.zeros(shape, np.uint8),
        "labels": labels,
        "position": np.arange(rows, dtype=np.uint32),
    }
    options = training.Options(recipe.steps, placement=config.placement)
    model = build(config, recipe, recipe.num_classes)
    lines = [str(nl.models.cost(model, shape)), *map(str, nl.plan(shape, model))]
    return "\n".join([*lines, training.dry_run(trainer, options, mesh, batch)])


def run(
    config: Config, recipes: Mapping[str, Recipe], name: str, kind: stand_in.DataSet, output: Path
) -> dict[str, Any] | None:
    """One recipe, from its lists to its results."""
    console = Console()
    if config.list_recipes:
        print(recipe_table(recipes))
        return None
    if name not in recipes:
        raise SystemExit(f"error: --recipe must be one of {', '.join(recipes)}; got {name!r}.")
    recipe = dataclasses.replace(
        recipes[name], num_classes=config.num_classes or recipes[name].num_classes
    )
    try:
        if config.distributed:
            training.initialize(
                config.coordinator, config.processes, config.process_id, timeout=config.timeout
            )
        if config.dry_run:
            print(dry_run(config, recipe))
            return None
        if config.init is not None and not config.init.exists():
            raise DataError(f"--init must name a file of weights; there is no {config.init}.")
        if config.init is None and recipe.frozen_bn:
            raise DataError(
                f"{name} keeps the norms of what it starts from: --init must name weights of {recipe.start}."
            )
        if config.init is None and recipe.depth:
            console.print(
                f"without --init all weights are random at first; the paper starts from {recipe.start}"
            )
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
    except (
        training.RunError,
        training.CheckpointError,
        training.MismatchError,
        training.NonFiniteError,
    ) as error:
        raise SystemExit(f"error: {error}") from error
