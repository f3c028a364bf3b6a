"""A whole video experiment, from the lists of videos to the results of the test."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from experiments.shared.building import build
from experiments.shared.command_line import TRAINING_ERRORS, PlainConsole, choose, connect, exit_on
from experiments.shared.multi_view import test
from experiments.shared.recipes import Config, Recipe, recipe_table
from experiments.shared.video_training import dry_run, initial, train
from nonlocal_jax.data import DataError, annotations, stand_in
from nonlocal_jax.data.annotations import Annotations
from nonlocal_jax.data.clips import cores
from nonlocal_jax.files import AnyPath
from nonlocal_jax.remote_paths import RemotePath


def run(
    config: Config, recipes: Mapping[str, Recipe], kind: stand_in.DataSet
) -> dict[str, Any] | None:
    """Trains and tests one recipe.

    Args:
        config: Options of the experiment.
        recipes: All recipes by name.
        kind: Name of the experiment.

    Returns:
        The reports of the test, or None for --list-recipes and --dry-run.

    Raises:
        SystemExit: The options or the data are wrong, or training failed.
    """
    if config.list_recipes:
        print(recipe_table(recipes))
        return None
    with exit_on(ValueError):
        name = choose("--recipe", config.recipe, recipes)
    recipe, output = recipes[name], config.output
    recipe = dataclasses.replace(recipe, num_classes=config.num_classes or recipe.num_classes)
    console = PlainConsole()
    with exit_on(DataError, ValueError, OSError, ImportError, *TRAINING_ERRORS):
        connect(config)
        if config.dry_run:
            dry_run(config, recipe)
            return None
        _check_initial_weights(config, recipe, name, console)
        lists = read_lists(config, recipe, kind, output)
        for videos, purpose in zip(lists, ("train with", "test with"), strict=True):
            skipped = f", {len(videos.left_out):,} lines left out" if videos.left_out else ""
            console.print(f"{len(videos):,} videos to {purpose}{skipped}")
        if config.test_only:
            variables = initial(config, build(config, recipe, lists[1].num_classes), recipe)
            assert variables is not None
        else:
            variables = train(config, recipe, kind, output, lists, console)
        return test(config, recipe, kind, output, lists[1], variables, console)


def _check_initial_weights(config: Config, recipe: Recipe, name: str, console: Console) -> None:
    """Checks that --init names a file if the recipe cannot do without, and warns if it should."""
    if config.init is not None:
        if not config.init.exists():
            raise DataError(f"--init must name a file of weights; there is no {config.init}.")
    elif recipe.frozen_bn:
        raise DataError(
            f"{name} does not train its norms, so --init must name weights of {recipe.start}; "
            "got none."
        )
    elif recipe.depth:
        console.print(
            f"training from random weights because --init is not set; "
            f"the paper starts from {recipe.start}"
        )


def read_lists(
    config: Config, recipe: Recipe, kind: stand_in.DataSet, folder: AnyPath
) -> tuple[Annotations, Annotations]:
    """Reads the lists of training and test videos.

    The recipe for toy videos makes its own videos if no lists are given.

    Args:
        config: Options of the experiment.
        recipe: Recipe that the lists are for.
        kind: Name of the experiment.
        folder: Folder of the run, in which videos are made.

    Raises:
        DataError: A list is missing, wrong, or of the other kind; or videos would be made in a
            remote folder.
    """
    train_list, val_list, classes = config.train_list, config.val_list, config.classes
    if not recipe.depth and train_list is None and val_list is None:
        if isinstance(folder, RemotePath):
            raise DataError(
                "--output must be a local folder where the recipe makes its own videos; "
                f"got {folder}. Or pass --train-list and --val-list."
            )
        lists = stand_in.make(folder / "videos", kind, threads=cores())
        train_list, val_list = lists["train"], lists["test"]
        classes = folder / "videos" / "classes.txt"
    if config.test_only:
        train_list = val_list
    if train_list is None or val_list is None:
        raise DataError(
            "--train-list and --val-list must name lists of videos; "
            "only --recipe toy_mp4 makes its own."
        )
    read = functools.partial(
        annotations.read,
        num_classes=recipe.num_classes,
        root=config.root,
        classes=classes,
        leave_out=config.leave_out,
    )
    train_videos, val_videos = read(train_list), read(val_list)
    for videos, file in ((train_videos, train_list), (val_videos, val_list)):
        if videos.multi_label != recipe.multi_label:
            labels = "any number of classes" if recipe.multi_label else "one class"
            raise DataError(f"{file} must be a list with {labels} per video for this recipe.")
    return train_videos, val_videos
