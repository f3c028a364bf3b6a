"""Testing on a list of videos, with one view and with many: what `experiments.kinetics` and `experiments.charades` end with."""

import dataclasses
import hashlib
import json
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments import report
from experiments.recipes import Config, Recipe, build, in_time
from nonlocal_jax import evaluation, files, training
from nonlocal_jax.data import DataError, VideoError, stand_in
from nonlocal_jax.data.annotations import Annotations
from nonlocal_jax.data.clips import TestingClips, cores, normalise, video_labels
from nonlocal_jax.data.pipeline import read_ahead
from nonlocal_jax.training.stop import EXIT_CODE, StopSignals

SINGLE = "1 view (middle clip, {})"
MANY = "{} views ({} clips × {})"
READERS = 16  # videos that are decoded at a time, at most; the frames of each wait in memory


def test(
    config: Config,
    recipe: Recipe,
    kind: stand_in.DataSet,
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
        return activation(
            model.apply(variables, normalise(clips, config.normalisation), train=False)
        )

    def apply(clips: np.ndarray) -> Any:
        return scores_of(variables, training.put({"inputs": clips}, mesh)["inputs"])

    how = combination(config, recipe)
    source = TestingClips(
        videos, in_time(config, recipe), config.clips, config.crops, recipe.test_size
    )
    settings = settings_of(config, recipe, videos, variables)
    folder = output / f"test-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]}"
    with training.Run(folder, settings) as run, StopSignals() as stop:
        stored = evaluation.ScoreFolder(run.folder / "scores", f"{jax.process_index()}")
        mine = [
            i
            for i in range(len(videos))
            if i % jax.process_count() == jax.process_index() and i not in stored
        ]
        bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[found]}"),
            TextColumn("left:"), TimeRemainingColumn(), console=console, speed_estimate_period=600,
        )  # fmt: skip
        with bar:
            task = bar.add_task(f"testing with {at_once} views at once", total=len(mine), found="")
            right = sum(_is_right(scores, videos, video) for video, scores in stored.found.items())
            for video, views in read_ahead(_Reading(source), mine, min(cores(), READERS)):
                if isinstance(views, VideoError):
                    stored.fail(video, str(views))
                else:
                    each = evaluation.score_views(apply, views, at_once)
                    stored.add(
                        video, {"single": each[-1], "many": evaluation.combine(each[:-1], how)}
                    )
                    right += _is_right(stored.found[video], videos, video)
                if len(stored.failures) > config.unreadable * len(videos):
                    stored.write()
                    raise DataError(_too_many(stored.failures, len(videos)))
                bar.update(
                    task,
                    advance=1,
                    found=f"{100 * right / max(len(stored.found), 1):.1f}% right so far",
                )
                if stop.requested:
                    break
        stored.write()
        if stop.requested:
            console.print(
                f"stopped by a signal; {len(stored.found):,} videos are scored, and the same command goes on",
                highlight=False,
            )
            raise SystemExit(EXIT_CODE)
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
    kind: stand_in.DataSet,
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
        files.write_text(run.folder / "results.json", json.dumps(results, indent=1) + "\n")
        if not recipe.multi_label:
            draw_confusion(reports[labels["many"]], run.folder / "confusion.png")
    console.print(evaluation.table(reports), highlight=False)
    if recipe.published:
        console.print(
            f"the paper, many views, %: {' / '.join(map(str, recipe.published))}", highlight=False
        )
    if stored.failures:
        console.print(
            f"{len(stored.failures):,} videos could not be read and are not counted",
            highlight=False,
        )
    console.print(f"classes, confusion and scores: {run.folder}", highlight=False)
    return reports


def _is_right(scores: Mapping[str, np.ndarray], videos: Annotations, video: int) -> bool:
    """Whether the class with the highest score is the video's, or one of its classes."""
    return int(scores["many"].argmax()) in videos.records[video].labels


def _too_many(failures: Mapping[int, str], count: int) -> str:
    return f"{len(failures)} of {count:,} videos cannot be read:\n  " + "\n  ".join(
        failures.values()
    )


def draw_confusion(found: Mapping[str, Any], file: Path) -> None:
    """Truth by answer, each row a share of its videos."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    counts = np.array(found["confusion"])
    names = list(found["classes"])
    side = min(max(4.0, 0.35 * len(names) + 2), 12.0)
    figure, ax = plt.subplots(figsize=(side + 1, side), layout="constrained")
    image = ax.imshow(
        counts / np.maximum(counts.sum(1, keepdims=True), 1), cmap="viridis", vmin=0, vmax=1
    )
    ax.set(
        xlabel="answer",
        ylabel="truth",
        title=f"{found['videos']:,} videos, top-1 {100 * found['top1']['value']:.1f}%",
    )
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
    """SHA-256 of a list, wherever it lies: files in order, by size and place in the folder they share, and their labels."""
    files = [file for record in videos.records for file in (record.frames or (record.path,))]
    shared = os.path.commonpath([file.parent for file in files])
    sha = hashlib.sha256()
    for record in videos.records:
        paths = record.frames or (record.path,)
        names = [os.path.relpath(file, shared) for file in paths]
        size = paths[0].stat().st_size if paths[0].exists() else None
        sha.update(repr((names, size, record.labels, record.actions, record.frame_labels)).encode())
    return sha.hexdigest()


def combination(config: Config, recipe: Recipe) -> evaluation.Combination:
    """Of the scores of a video's views."""
    return config.combine or ("max" if recipe.multi_label else "mean")


def settings_of(
    config: Config, recipe: Recipe, videos: Annotations, variables: Mapping[str, Any]
) -> dict[str, Any]:
    """All that scores depend on."""
    of_recipe = (
        "depth", "kind", "nonlocal_blocks", "instantiation", "axes", "frames", "stride", "test_size", "num_classes",
        "multi_label",
    )  # fmt: skip
    of_config = ("preset", "normalisation", "fps", "sampling", "short", "clips", "crops", "dtype")
    return {
        "weights": digest(variables),
        "videos": digest_of_list(videos),
        "combine": combination(config, recipe),
        **{name: getattr(recipe, name) for name in of_recipe},
        **{name: getattr(config, name) for name in of_config},
    }


def command(kind: str) -> str:
    """What was asked for."""
    return shlex.join(["python", "-m", f"experiments.{kind}", *sys.argv[1:]])
