"""Testing on a list of videos, with one view and with many."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.shared import results
from experiments.shared.building import build, score_clips
from experiments.shared.command_line import command
from experiments.shared.fingerprints import combination, test_settings
from experiments.shared.recipes import Config, Recipe, clip_sampling
from nonlocal_jax import evaluation, files, training
from nonlocal_jax.data import DataError, VideoError, stand_in
from nonlocal_jax.data.annotations import Annotations
from nonlocal_jax.data.clips import TestingClips, cores, video_labels
from nonlocal_jax.data.pipeline import read_ahead
from nonlocal_jax.files import AnyPath
from nonlocal_jax.training.stop import EXIT_CODE, StopSignals

READERS = 16  # Most videos decoded at the same time. The frames of each wait in memory.


def test(
    config: Config,
    recipe: Recipe,
    kind: stand_in.DataSet,
    output: AnyPath,
    videos: Annotations,
    variables: Mapping[str, Any],
    console: Console,
) -> dict[str, Any]:
    """Tests a network with one view and with many views of each video.

    A test that was stopped continues from the scores that are already stored. With several
    processes, each one scores its share of the videos.

    Args:
        config: Options of the experiment.
        recipe: Recipe whose test is run.
        kind: Name of the experiment.
        output: Folder of the run. The test gets a subfolder.
        videos: Videos to test.
        variables: Weights of the network.
        console: Where progress and results are printed.

    Returns:
        The reports by description of the views. They are also written to results.json.

    Raises:
        DataError: Too many videos cannot be read.
        SystemExit: A signal stopped the test. Its scores are stored.
    """
    settings = test_settings(config, recipe, videos, variables)
    fingerprint = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    with training.Run(output / f"test-{fingerprint}", settings) as run, StopSignals() as stop:
        stored = evaluation.ScoreFolder(run.folder / "scores", f"{jax.process_index()}")
        _check_scores(stored, videos)
        try:
            _score_videos(config, recipe, videos, variables, stored, stop, console)
        finally:
            stored.write()
        if stop.requested:
            console.print(
                f"stopped by a signal with {len(stored.found):,} of {len(videos):,} videos scored; "
                "run the same command to continue"
            )
            raise SystemExit(EXIT_CODE)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("tested")
            stored = evaluation.ScoreFolder(run.folder / "scores", "all")
        reports = _make_reports(config, recipe, videos, stored)
        if run.writes:
            _write_reports(recipe, kind, run.folder, stored, reports)
        _print_reports(recipe, run.folder, stored, reports, console)
        return reports


def _score_videos(
    config: Config,
    recipe: Recipe,
    videos: Annotations,
    variables: Mapping[str, Any],
    stored: evaluation.ScoreFolder,
    stop: StopSignals,
    console: Console,
) -> None:
    """Adds the scores of this process's videos to `stored`, until done or stopped."""
    mesh = training.make_mesh(devices=jax.local_devices())
    batch_size = -(-config.views_at_once // mesh.size) * mesh.size
    apply = _make_apply(config, recipe, videos.num_classes, variables, mesh)
    rule = combination(config, recipe)
    sampling = clip_sampling(config, recipe)
    source = TestingClips(videos, sampling, config.clips, config.crops, recipe.test_size)
    share = range(jax.process_index(), len(videos), jax.process_count())
    pending = [video for video in share if video not in stored]
    correct = sum(_is_correct(scores, videos, video) for video, scores in stored.found.items())
    with _progress_bar(console) as bar:
        task = bar.add_task(f"testing, {batch_size} views per batch", total=len(pending), score="")
        for video, views in read_ahead(_Reader(source), pending, min(cores(), READERS)):
            if isinstance(views, VideoError):
                stored.fail(video, str(views))
            else:
                scores = evaluation.score_views(apply, views, batch_size)
                combined = evaluation.combine(scores[:-1], rule)
                stored.add(video, {"single": scores[-1], "many": combined})
                correct += _is_correct(stored.found[video], videos, video)
            if len(stored.failures) > config.unreadable * len(videos):
                raise DataError(_failure_message(stored.failures, len(videos), config.unreadable))
            percent = 100 * correct / max(len(stored.found), 1)
            bar.update(task, advance=1, score=f"{percent:.1f}% correct so far")
            if stop.requested:
                break


def _check_scores(stored: evaluation.ScoreFolder, videos: Annotations) -> None:
    """Checks that scores that were found are those of these videos, in number and in classes.

    Raises:
        DataError: They are not.
    """
    expected = dict.fromkeys(("single", "many"), (videos.num_classes,))
    for video in stored.found.keys() | stored.failures.keys():
        scores = stored.found.get(video)
        shapes = expected if scores is None else {name: scores[name].shape for name in scores}
        if video >= len(videos) or shapes != expected:
            got = f"{'scores' if video >= len(videos) else shapes} of video {video}"
            raise DataError(
                f"{stored.folder} must hold scores of {len(videos):,} videos, numbered from 0, by "
                f"name and shape {expected}; got {got}. Delete the folder to test again."
            )


def _make_apply(
    config: Config, recipe: Recipe, num_classes: int, variables: Mapping[str, Any], mesh: Any
) -> Callable[[np.ndarray], Any]:
    """Returns the function from clips to scores, compiled once and split over the local devices."""
    model = build(config, recipe, num_classes)

    def apply(clips: np.ndarray) -> Any:
        inputs = training.put({"inputs": clips}, mesh)["inputs"]
        return score_clips(
            model,
            variables,
            inputs,
            normalisation=config.normalisation,
            multi_label=recipe.multi_label,
        )

    return apply


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads the views of a video. Returns the error if the video cannot be read."""

    source: TestingClips

    def __call__(self, video: int) -> Any:
        try:
            return self.source.read(video)
        except VideoError as error:
            return error


def _progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[score]}"),
        TextColumn("left:"),
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=600,
    )


def _view_names(config: Config) -> dict[str, str]:
    """Describes the two ways of testing, for tables and result files."""
    single = "full frame" if config.crops == "full" else "centre crop"
    crops = {"three": "3 crops", "centre": "centre crop", "full": "full frame"}[config.crops]
    views = config.clips * (3 if config.crops == "three" else 1)
    return {
        "single": f"1 view (middle clip, {single})",
        "many": f"{views} views ({config.clips} clips × {crops})",
    }


def _make_reports(
    config: Config, recipe: Recipe, videos: Annotations, stored: evaluation.ScoreFolder
) -> dict[str, Any]:
    """Computes the metrics of the stored scores, with one view and with many."""
    if not stored.found:
        raise DataError("no video could be read:\n  " + "\n  ".join(stored.failures.values()))
    order = sorted(stored.found)
    truth = np.stack([video_labels(videos, videos.records[video]) for video in order])
    reports = {}
    for key, name in _view_names(config).items():
        scores = np.stack([stored.found[video][key] for video in order])
        if recipe.multi_label:
            reports[name] = evaluation.multi_label_report(scores, truth.astype(bool), videos.names)
        else:
            reports[name] = evaluation.single_label_report(scores, truth, videos.names)
    return reports


def _write_reports(
    recipe: Recipe,
    kind: stand_in.DataSet,
    folder: AnyPath,
    stored: evaluation.ScoreFolder,
    reports: dict[str, Any],
) -> None:
    """Writes results.json and, for single-label recipes, a picture of the confusion matrix."""
    record = {
        "command": command(kind),
        "hardware": results.hardware(),
        "published": recipe.published,
        "unreadable": stored.failures,
        "tested_with": reports,
    }
    files.write_text(folder / "results.json", json.dumps(record, indent=1) + "\n")
    if not recipe.multi_label:
        _, multi_view = reports.values()
        results.draw_confusion(multi_view, folder / "confusion.png")


def _print_reports(
    recipe: Recipe,
    folder: AnyPath,
    stored: evaluation.ScoreFolder,
    reports: dict[str, Any],
    console: Console,
) -> None:
    """Prints the metrics next to those of the paper."""
    console.print(evaluation.table(reports))
    if recipe.published:
        published = " / ".join(map(str, recipe.published))
        console.print(f"the paper, many views, %: {published}")
    if stored.failures:
        console.print(f"{len(stored.failures):,} videos could not be read and are not counted")
    console.print(f"classes, confusion and scores: {folder}")


def _is_correct(scores: Mapping[str, np.ndarray], videos: Annotations, video: int) -> bool:
    """Returns whether the highest-scoring class is one of the video's."""
    return int(scores["many"].argmax()) in videos.records[video].labels


def _failure_message(failures: Mapping[int, str], count: int, share: float) -> str:
    reasons = "\n  ".join(failures.values())
    return (
        f"{len(failures):,} of {count:,} videos cannot be read, more than {share:.1%}:\n  {reasons}"
    )
