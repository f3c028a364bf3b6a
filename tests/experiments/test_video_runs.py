"""Kinetics and Charades on real files: killed, stopped and resumed runs, and wrong input."""

import contextlib
import json
import os
import re
import signal
import socket
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations
from rich.console import Console
from safetensors.numpy import load_file
from sklearn.metrics import average_precision_score
from training import processes

import nonlocal_jax as nl
from experiments import charades, kinetics
from experiments.shared import building, multi_view, recipes
from nonlocal_jax import evaluation
from nonlocal_jax.data import DataError, VideoError, annotations
from nonlocal_jax.data.clips import TestingClips, normalise


def outcome(folder):
    """Weights, log without times, and results of the test of a finished run."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("seconds", None)
    (tested,) = folder.glob("test-*")
    results = json.loads((tested / "results.json").read_text())
    arrays = load_file(folder / "weights.safetensors")
    weights = {name: array.tobytes() for name, array in arrays.items()}
    return weights, rows, results["tested_with"]


def stored_scores(folder):
    """The scores that a test stored, which are one file if one process ran it."""
    (part,) = folder.glob("test-*/scores/*.npz")
    with np.load(part) as stored:
        return dict(stored)


def start(kind, folder, options, *arguments, **settings):
    """Starts an experiment in a process."""
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())
    return processes.start(flags, folder, *arguments, module=f"experiments.{kind}", **settings)


@pytest.mark.networks
def test_what_a_run_prints_and_writes(finished_run):
    folder, printed = finished_run
    assert "18 videos to train with" in printed
    for name in ("damaged.mp4", "sound.mp4"):
        assert name in (folder / "unreadable-train-0.jsonl").read_text()
    assert "1 view (middle clip, centre crop)" in printed
    assert "6 views (2 clips × 3 crops)" in printed
    _, rows, tested = outcome(folder)
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 15))
    assert [row["count"] for row in rows if row["kind"] == "evaluation"] == [6, 6]
    assert [report["videos"] for report in tested.values()] == [6, 6]
    written = {file.name for file in folder.glob("test-*/*")} - {".lock"}
    assert written == {"config.json", "results.json", "confusion.png", "scores"}


@pytest.mark.networks
def test_scores_are_the_mean_over_views(finished_run, lists):
    """One video, view by view."""
    folder, _ = finished_run
    recipe = kinetics.recipes()["toy_mp4"]
    config = kinetics.Config(clips=2)
    model = building.build(config, recipe, 6)
    example = jax.ShapeDtypeStruct((1, 8, 32, 32, 3), jnp.float32)
    variables = nl.weights.load(folder / "weights.safetensors", model, example=example)
    videos = annotations.read(lists["kinetics"]["test"], num_classes=6)
    sampling = recipes.clip_sampling(config, recipe)
    views = np.stack(list(TestingClips(videos, sampling, 2, "three", 36).read(5)))

    @jax.jit
    def score(view):
        return jax.nn.softmax(model.apply(variables, normalise(view[None])))[0]

    scores = np.stack([score(view) for view in views])
    stored = stored_scores(folder)
    row = stored["videos"].tolist().index(5)
    np.testing.assert_allclose(stored["many"][row], scores[:-1].mean(0), atol=1e-5)
    np.testing.assert_allclose(stored["single"][row], scores[-1], atol=1e-5)


def last_step(folder):
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


@contextlib.contextmanager
def terminated_when(condition):
    """Sends SIGTERM to this process as soon as a condition holds."""
    # Without this handler, a signal that comes too late would end the tests.
    previous = signal.signal(signal.SIGTERM, lambda *_: None)
    finished = threading.Event()

    def watch():
        while not finished.wait(0.002):
            if condition():
                os.kill(os.getpid(), signal.SIGTERM)
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()
        signal.signal(signal.SIGTERM, previous)


@pytest.mark.networks
@pytest.mark.processes
def test_killed_in_an_epoch_and_stopped_in_the_test(
    finished_run, video_options, tmp_path, capsys, monkeypatch
):
    """A killed process, a stopped one and a third one together give what one run gives."""
    folder, (undisturbed, _) = tmp_path / "run", finished_run
    options = video_options("kinetics")
    # The process must compute what this one does, bit for bit.
    monkeypatch.setenv("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    process = start("kinetics", folder, options, devices=jax.device_count(), killed=True)
    deadline = time.monotonic() + processes.PATIENCE
    # 18 videos, 4 per step: step 9 is within an epoch and follows a save.
    while last_step(folder) < 9:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert last_step(folder) < 14

    config = kinetics.Config(output=folder, **options)
    # The scores folder is made after signals are handled.
    with (
        terminated_when(lambda: list(folder.glob("test-*/scores"))),
        pytest.raises(SystemExit) as stopped,
    ):
        kinetics.main(config)
    assert stopped.value.code == 75
    assert re.search(r"resumed at step (4|8|12)\b", capsys.readouterr().out)
    assert not list(folder.glob("test-*/results.json"))

    kinetics.main(config)
    assert "resumed at step 14" in capsys.readouterr().out
    assert outcome(folder) == outcome(undisturbed)


@pytest.mark.networks
@pytest.mark.processes
def test_two_processes(video_options, tmp_path):
    """Parameters are split over both processes, both test videos, and one of them writes."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    folder = tmp_path / "run"
    options = video_options("kinetics", steps=5, evaluate_every=5, processes=2)
    options |= {"coordinator": f"127.0.0.1:{port}", "placement": "sharded"}
    started = [
        start("kinetics", folder, options, "--distributed", "--process-id", str(i))
        for i in range(2)
    ]
    for process in started:
        processes.finish(process)
    _, rows, tested = outcome(folder)
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 6))
    arrays = load_file(folder / "weights.safetensors").values()
    assert all(np.isfinite(array).all() for array in arrays)
    assert [report["videos"] for report in tested.values()] == [6, 6]
    parts = sorted(file.name for file in folder.glob("test-*/scores/*.npz"))
    assert parts == ["00000000-00000004-by-0.npz", "00000001-00000005-by-1.npz"]


@pytest.mark.networks
def test_charades_reports_map(tmp_path, lists, video_options, capsys):
    folder = tmp_path / "run"
    options = video_options("charades", steps=2, evaluate_every=2)
    charades.main(charades.Config(output=folder, **options))
    assert "mAP, %" in capsys.readouterr().out
    truth = np.zeros((6, 6), bool)
    videos = annotations.read(lists["charades"]["test"], num_classes=6)
    for i, record in enumerate(videos.records):
        truth[i, list(record.labels)] = True
    stored = stored_scores(folder)
    assert stored["videos"].tolist() == list(range(6))
    (results,) = folder.glob("test-*/results.json")
    reports = json.loads(results.read_text())["tested_with"].values()
    present = truth.any(0)
    for name, report in zip(("single", "many"), reports, strict=True):
        expected = average_precision_score(
            truth[:, present], stored[name][:, present], average="macro"
        )
        assert report["mAP"]["value"] == pytest.approx(expected)


WRONG = {
    "frozen norms without weights": (
        kinetics,
        {"list": "kinetics", "recipe": "i3d_r50_128x1"},
        "i3d_r50_128x1 does not train its norms, so --init must name weights of i3d_r50_32x2",
    ),
    "unknown recipe": (
        kinetics,
        {"recipe": "i3d"},
        "--recipe must be one of toy_mp4, c2d_r50_32x2",
    ),
    "no lists": (
        kinetics,
        {"recipe": "i3d_r50_32x2"},
        "--train-list and --val-list must name lists of videos",
    ),
    "missing weights": (
        kinetics,
        {"init": "none.pth"},
        "--init must name a file of weights; there is no none.pth",
    ),
    "single-label list": (
        charades,
        {"list": "kinetics"},
        "must be a list with any number of classes per video",
    ),
    "a file without weights": (
        kinetics,
        {"list": "kinetics", "recipe": "i3d_r50_32x2", "batch_size": 4, "init": __file__},
        "test_video_runs.py",
    ),
    "a batch that devices cannot share": (
        kinetics,
        {"list": "kinetics", "batch_size": 6},
        "must split over 4 devices; got 6",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input(name, lists, tmp_path, monkeypatch):
    module, options, message = WRONG[name]
    monkeypatch.chdir(tmp_path)
    options = dict(options)
    if kind := options.pop("list", None):
        options |= {"train_list": lists[kind]["train"], "val_list": lists[kind]["test"]}
    if "init" in options:
        options["init"] = type(tmp_path)(options["init"])
    with pytest.raises(SystemExit, match=message):
        module.main(module.Config(output=tmp_path / "run", **options))


@pytest.mark.networks
def test_too_many_unreadable_videos(video_options, tmp_path):
    options = video_options("kinetics", steps=20, batch_size=8, unreadable=0.01)
    message = r"(?s)[12] of 18 videos cannot be read, more than 1\.0%:\n.*(damaged|sound)\.mp4"
    with pytest.raises(SystemExit, match=message):
        kinetics.main(kinetics.Config(output=tmp_path / "run", **options))


@pytest.mark.networks
def test_a_second_test_compiles_nothing(tmp_path, finished_run, video_options):
    weights = finished_run[0] / "weights.safetensors"
    options = {**video_options("kinetics"), "test_only": True, "init": weights}
    for name in ("first", "second"):
        with compilations() as names:
            kinetics.main(kinetics.Config(output=tmp_path / name, **options))
    assert names == []


def test_a_test_fails_on_too_many_unreadable_videos(tmp_path, video_options, monkeypatch):
    def unreadable(self, video):
        raise VideoError(f"{video}.mp4: it is damaged.")

    config = kinetics.Config(**video_options("kinetics"))
    recipe = kinetics.recipes()["toy_mp4"]
    videos = annotations.read(config.val_list, num_classes=6)
    monkeypatch.setattr(TestingClips, "read", unreadable)
    with pytest.raises(DataError, match=r"2 of 6 videos cannot be read, more than 20\.0%:\n  0"):
        multi_view.test(config, recipe, "kinetics", tmp_path, videos, {}, Console(quiet=True))


@pytest.mark.parametrize(
    ("video", "scores", "got"),
    [
        (6, {"single": np.zeros(6), "many": np.zeros(6)}, "scores"),
        (0, {"single": np.zeros(5), "many": np.zeros(5)}, "{'single': (5,), 'many': (5,)}"),
        (0, {"single": np.zeros(6)}, "{'single': (6,)}"),
    ],
)
def test_scores_of_another_test_are_not_used(video, scores, got, lists, tmp_path):
    videos = annotations.read(lists["kinetics"]["test"], num_classes=6)
    stored = evaluation.ScoreFolder(tmp_path)
    stored.add(video, scores)
    with pytest.raises(
        DataError,
        match=rf"hold scores of 6 videos.*; got {re.escape(got)} of video {video}\. Delete",
    ):
        multi_view._check_scores(stored, videos)
    fitting = evaluation.ScoreFolder(tmp_path / "fitting")
    fitting.add(5, {"single": np.zeros(6), "many": np.zeros(6)})
    fitting.fail(4, "it is damaged")
    multi_view._check_scores(fitting, videos)
    fitting.fail(6, "it is damaged")
    with pytest.raises(DataError, match="got scores of video 6"):
        multi_view._check_scores(fitting, videos)
