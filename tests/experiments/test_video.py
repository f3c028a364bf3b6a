"""Kinetics and Charades on real files, in real processes that are killed and resumed."""

import dataclasses
import functools
import json
import signal
import socket
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from sklearn.metrics import average_precision_score
from training import processes
from training.processes import PATIENCE, finish

import nonlocal_jax as nl
from experiments import charades, kinetics, multi_view, predict, recipes, video
from nonlocal_jax import training
from nonlocal_jax.data import annotations, stand_in
from nonlocal_jax.data.clips import TestingClips, normalise

OPTIONS = "--steps 14 --batch-size 4 --save-every 4 --evaluate-every 7 --unreadable 0.2 --clips 2"


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    return {
        kind: stand_in.make(folder / kind, kind, numbers={"train": 16, "test": 6})
        for kind in ("kinetics", "charades")
    }


def start(kind, folder, lists, *options):
    more = (
        *options,
        "--train-list",
        str(lists[kind]["train"]),
        "--val-list",
        str(lists[kind]["test"]),
    )
    return processes.start(OPTIONS, folder, *more, module=f"experiments.{kind}")


def outcome(folder):
    """Weights, log without times, and what the test found."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("seconds", None)
    (tested,) = folder.glob("test-*")
    results = json.loads((tested / "results.json").read_text())
    weights = {
        name: array.tobytes() for name, array in load_file(folder / "weights.safetensors").items()
    }
    return weights, rows, results["tested_with"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, lists):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, finish(start("kinetics", folder, lists))


def wait_for(condition, process):
    begun = time.monotonic()
    while process.poll() is None and not condition():
        assert time.monotonic() - begun < PATIENCE
        time.sleep(0.002)
    assert process.poll() is None, "it was over before it could be killed"


def last_step(folder):
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def test_predict(whole, lists, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, _ = whole
    names = lists["kinetics"]["test"].with_name("classes.txt")
    file = lists["kinetics"]["test"].with_name("test0003.mp4")
    options = {
        "weights": folder / "weights.safetensors",
        "recipe": "toy_mp4",
        "classes": names,
        "clips": 2,
    }
    best = predict.main(
        predict.Config(
            file=file, picture=tmp_path / "looked.png", page=tmp_path / "looked.html", **options
        )
    )
    assert {name for name, _ in best} < set(stand_in.CLASSES)
    assert [score for _, score in best] == sorted((score for _, score in best), reverse=True)
    assert (tmp_path / "looked.png").stat().st_size > 10_000
    assert f"test0003.mp4: {best[0][0]}" in (tmp_path / "looked.html").read_text()
    assert "6 views" in capsys.readouterr().out
    for wrong, message in (
        ({"file": tmp_path / "none.mp4"}, "none.mp4: there is no such file"),
        ({"weights": tmp_path / "none.pth"}, "none.pth"),
        ({"recipe": "i3d"}, "--recipe must be one of toy_mp4, "),
        ({"classes": file}, "must be a list in UTF-8"),
        (
            {"classes": lists["kinetics"]["train"]},
            "must name the 6 classes of the network; it names 18",
        ),
        (
            {"picture": tmp_path / "none" / "looked.png"},
            "--picture must lie in a folder that is there",
        ),
        ({"page": tmp_path / "none" / "looked.html"}, "--page must lie in a folder that is there"),
        ({"picture": tmp_path / "looked.mp3"}, r"looked\.mp3: Format 'mp3' is not supported"),
    ):
        with pytest.raises(SystemExit, match=message):
            predict.main(predict.Config(**{"file": file, **options, **wrong}))


def test_what_a_run_says(whole):
    folder, printed = whole
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


def test_the_scores_are_those_of_the_views(whole, lists):
    """One video by hand: every view by itself, softmax, mean."""
    folder, _ = whole
    recipe = kinetics.recipes()["toy_mp4"]
    config = kinetics.Config(clips=2)
    model = recipes.build(config, recipe, 6)
    variables = nl.weights.load(
        folder / "weights.safetensors",
        model,
        example=jax.ShapeDtypeStruct((1, 8, 32, 32, 3), jnp.float32),
    )
    videos = annotations.read(lists["kinetics"]["test"], num_classes=6)
    views = list(TestingClips(videos, recipes.in_time(config, recipe), 2, "three", 36).read(5))
    scores = [jax.nn.softmax(model.apply(variables, normalise(view[None])))[0] for view in views]
    (part,) = folder.glob("test-*/scores/*.npz")
    with np.load(part) as stored:
        row = stored["videos"].tolist().index(5)
        np.testing.assert_allclose(stored["many"][row], np.mean(scores[:-1], 0), atol=1e-5)
        np.testing.assert_allclose(stored["single"][row], scores[-1], atol=1e-5)


def test_killed_within_an_epoch_and_within_the_test(whole, tmp_path, lists):
    folder, (undisturbed, _) = tmp_path / "run", whole
    process = start("kinetics", folder, lists)
    wait_for(
        lambda: last_step(folder) >= 9, process
    )  # 18 videos, 4 a step: within an epoch, a step after a save
    process.send_signal(signal.SIGKILL)
    process.communicate()
    process = start("kinetics", folder, lists)
    wait_for(lambda: list(folder.glob("test-*/config.json")), process)
    process.send_signal(signal.SIGTERM)
    finish(process, code=75)
    assert not list(folder.glob("test-*/results.json"))
    assert "resumed at step 14" in finish(start("kinetics", folder, lists))
    assert outcome(folder) == outcome(undisturbed)


def test_two_processes(lists, tmp_path):
    """Parameters split over both, videos tested by both; one writes."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    joint = (
        "--distributed",
        "--coordinator",
        f"127.0.0.1:{port}",
        "--processes",
        "2",
        "--placement",
        "sharded",
    )
    folder = tmp_path / "run"
    started = [start("kinetics", folder, lists, *joint, "--process-id", str(i)) for i in range(2)]
    for process in started:
        finish(process)
    _, rows, tested = outcome(folder)
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 15))
    assert all(
        np.isfinite(array).all() for array in load_file(folder / "weights.safetensors").values()
    )
    assert [report["videos"] for report in tested.values()] == [6, 6]
    parts = sorted(file.name for file in folder.glob("test-*/scores/*.npz"))
    assert parts == ["00000000-00000004-by-0.npz", "00000001-00000005-by-1.npz"]


def test_scores_are_found_again_by_all_they_depend_on(lists):
    """Another network, other clips, another place of a file: other scores."""
    recipe, config = kinetics.recipes()["toy_mp4"], kinetics.Config()
    videos, variables = (
        annotations.read(lists["kinetics"]["test"], num_classes=6),
        {"x": np.arange(3.0)},
    )
    usual = multi_view.settings_of(config, recipe, videos, variables)
    assert json.loads(json.dumps(usual)) == multi_view.settings_of(
        config, recipe, videos, variables
    )
    one, two, *rest = videos.records
    changes = [
        (config, recipe, videos, {"x": np.arange(3.0) + 1}),
        (dataclasses.replace(config, preset="slowfast"), recipe, videos, variables),
        (dataclasses.replace(config, sampling="slowfast"), recipe, videos, variables),
        (dataclasses.replace(config, short="hold"), recipe, videos, variables),
        (dataclasses.replace(config, combine="max"), recipe, videos, variables),
        (config, dataclasses.replace(recipe, stride=3), videos, variables),
        (config, dataclasses.replace(recipe, axes="space"), videos, variables),
        (config, recipe, dataclasses.replace(videos, records=(two, one, *rest)), variables),
        (
            config,
            recipe,
            dataclasses.replace(
                videos, records=(dataclasses.replace(one, labels=(5,)), two, *rest)
            ),
            variables,
        ),
    ]
    assert all(multi_view.settings_of(*change) != usual for change in changes)


def test_lists_are_told_apart_by_their_files_wherever_they_lie(tmp_path):
    def digest(folder, names, **more):
        records = tuple(
            annotations.Record(folder / name, (i,), **more) for i, name in enumerate(names)
        )
        return multi_view.digest_of_list(annotations.Annotations(records, 2))

    names = ["a/1.mp4", "b/1.mp4"]
    assert digest(tmp_path, names) == digest(tmp_path / "elsewhere", names)
    assert digest(tmp_path, names) != digest(tmp_path, names[::-1])
    frames = (tmp_path / "1.jpg", tmp_path / "2.jpg")
    of_frames = [
        digest(tmp_path, ["v"], frames=chosen, frame_labels=labels)
        for chosen in (frames, frames[::-1])
        for labels in (((0,), ()), ((), (0,)))
    ]
    assert len(set(of_frames)) == 4
    found = []
    for folder, content in (
        ("large", b"12345"),
        ("small", b"123"),
        ("moved", b"123"),
    ):  # copies of another size
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "v.mp4").write_bytes(content)
        found.append(digest(tmp_path / folder, ["v.mp4"]))
    assert found[0] != found[1] == found[2]


def test_published_networks_tell_themselves(tmp_path):
    """Weights of a network of PySlowFast's names: frames, blocks and classes come from the file."""
    model = nl.models.video_resnet(
        (1, 2, 2, 1), "i3d_3x1x1", {"res4": (1,)}, preset="slowfast", num_classes=7
    )
    variables = jax.tree.map(
        lambda x: np.zeros(x.shape, x.dtype),
        jax.eval_shape(model.init, jax.random.key(0), model.example),
    )
    nl.weights.save(tmp_path / "weights.safetensors", variables, "slowfast")
    config = predict.Config(
        file=tmp_path / "a.mp4", weights=tmp_path / "weights.safetensors", clip="8x8"
    )
    built, loaded, in_time, size, colours = predict.network(config)
    assert (in_time.frames, in_time.stride, size, colours) == (8, 8, 256, "caffe2")
    assert loaded["params"]["head"]["bias"].shape == (7,)
    assert built.nonlocal_blocks == {"res4": (1,)}


TABLE = {  # of the paper: name, places of blocks, published top-1
    "c2d_r50_32x2": ({}, 71.8),
    "c2d_nl1_gaussian_r50_32x2": ({"res4": (4,)}, 72.5),
    "c2d_nl1_r50_32x2": ({"res4": (4,)}, 72.7),
    "c2d_nl1_dot_product_r50_32x2": ({"res4": (4,)}, 72.9),
    "c2d_nl1_concatenation_r50_32x2": ({"res4": (4,)}, 72.8),
    "c2d_nl1_res2_r50_32x2": ({"res2": (1,)}, 72.7),
    "c2d_nl1_res3_r50_32x2": ({"res3": (2,)}, 72.9),
    "c2d_nl1_res5_r50_32x2": ({"res5": (1,)}, 72.3),
    "c2d_nl5_space_r101_32x2": ({"res3": (1, 3), "res4": (6, 13, 20)}, 74.4),
    "c2d_nl10_r50_32x2": ({"res3": (0, 1, 2, 3), "res4": (0, 1, 2, 3, 4, 5)}, 74.3),
    "i3d_nl5_r50_32x2": ({"res3": (1, 3), "res4": (1, 3, 5)}, 74.9),
    "i3d_nl5_r101_128x1": ({"res3": (1, 3), "res4": (6, 13, 20)}, 77.7),
}


@pytest.mark.parametrize("name", TABLE)
def test_recipes_are_the_rows_of_the_paper(name):
    recipe, (places, top1) = kinetics.recipes()[name], TABLE[name]
    model = recipes.build(kinetics.Config(), recipe, 400)
    assert dict(model.nonlocal_blocks) == places
    assert recipe.published[0] == top1
    assert (
        model.blocks
        == {"r50": (3, 4, 6, 3), "r101": (3, 4, 23, 3)}[
            next(part for part in name.split("_") if part in ("r50", "r101"))
        ]
    )
    assert (model.conv1_frames == 1) == name.startswith("c2d")
    assert (recipe.frames, recipe.stride) == ((128, 1) if name.endswith("128x1") else (32, 2))
    if "_nl" in name:
        operation = model.make_block("res4").operation
        axes = "space" if "space" in name else "spacetime"
        kind = next(
            (n for n in ("gaussian", "dot_product", "concatenation") if n in name),
            "embedded_gaussian",
        )
        assert (operation.axes, type(operation).__name__.lower()) == (axes, kind.replace("_", ""))


def test_schedules():
    long = kinetics.recipes()["i3d_nl5_r50_128x1"]
    assert (long.learning_rate, long.batch_size, long.frozen_bn) == (0.0025, 16, True)
    last = charades.recipes()["i3d_nl5_r101_128x1"]
    assert (last.learning_rate, last.steps, last.boundaries, last.size, last.test_size) == (
        0.00125,
        200_000,
        (75_000, 150_000),
        288,
        320,
    )
    assert (last.num_classes, last.multi_label, last.frozen_bn, last.published) == (
        157,
        True,
        True,
        (37.5,),
    )
    usual = kinetics.recipes()["i3d_r50_32x2"]
    for batch_size, rate, steps, boundaries in (
        (64, 0.01, 400_000, (150_000, 300_000)),
        (512, 0.08, 50_000, (18_750, 37_500)),
        (8, 0.00125, 3_200_000, (1_200_000, 2_400_000)),
    ):
        found = recipes.scaled(kinetics.Config(batch_size=batch_size), usual)
        assert (found.learning_rate, found.steps, found.boundaries) == (
            pytest.approx(rate),
            steps,
            boundaries,
        )
    assert (
        recipes.scaled(
            kinetics.Config(batch_size=128, learning_rate=0.5, steps=8), usual
        ).learning_rate
        == 0.5
    )


def test_frozen_norms_stay_as_they_are():
    recipe = dataclasses.replace(kinetics.recipes()["i3d_r50_128x1"], depth=0)
    optimiser = recipes.make_trainer(kinetics.Config(), recipe, 6).optimiser
    params = {
        "conv": {"kernel": jnp.ones(3), "bias": jnp.ones(3)},
        "norm": {"scale": jnp.ones(3), "bias": jnp.ones(3)},
    }
    updates, _ = optimiser.update(params, optimiser.init(params), params)
    assert [float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(updates)] == [
        True,
        True,
        False,
        False,
    ]


def test_losses_of_many_labels():
    logits, labels = jnp.array([[2.0, -1.0], [0.0, 3.0]]), jnp.array([[1.0, 0.0], [1.0, 1.0]])
    p = 1 / (1 + np.exp(-np.asarray(logits)))
    expected = -(labels * np.log(p) + (1 - labels) * np.log(1 - p)).mean(1)
    np.testing.assert_allclose(recipes.sigmoid_cross_entropy(logits, labels), expected, rtol=1e-6)
    assert recipes.hit(logits, labels)["hit_at_1"].tolist() == [1.0, 1.0]
    assert recipes.hit(-logits, labels)["hit_at_1"].tolist() == [0.0, 1.0]


WRONG = {
    "norms that are not to change": (
        kinetics,
        {"list": "kinetics", "recipe": "i3d_r50_128x1"},
        "i3d_r50_128x1 keeps the norms of what it starts from: --init must name weights of i3d_r50_32x2",
    ),
    "no such recipe": (
        kinetics,
        {"recipe": "i3d"},
        "--recipe must be one of toy_mp4, c2d_r50_32x2",
    ),
    "no lists": (
        kinetics,
        {"recipe": "i3d_r50_32x2"},
        "--train-list and --val-list must name lists of videos",
    ),
    "no weights": (
        kinetics,
        {"init": "none.pth"},
        "--init must name a file of weights; there is no none.pth",
    ),
    "another kind of list": (
        charades,
        {"list": "kinetics"},
        "must be a list with any number of classes a video",
    ),
    "weights that are none": (
        kinetics,
        {"list": "kinetics", "recipe": "i3d_r50_32x2", "batch_size": 4, "init": __file__},
        "test_video.py",
    ),
    "batch and devices": (
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


def test_frozen_norms_start_from_a_network_with_blocks(tmp_path):
    """What a recipe does not train anew must be in its weights."""
    config, recipe = (
        kinetics.Config(init=tmp_path / "weights.safetensors"),
        kinetics.recipes()["i3d_nl5_r50_32x2"],
    )
    small = functools.partial(nl.models.video_resnet, (1, 1, 1, 1), "c2d", num_classes=6)
    without = small({})
    shapes = jax.eval_shape(without.init, jax.random.key(0), without.example)
    nl.weights.save(config.init, jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes))
    model = small({"res4": (0,)})
    assert "nonlocal_res4_0" in video.initial(config, model, recipe)["params"]
    with pytest.raises(ValueError, match=r"params/nonlocal_res4_0/.* is not in the file"):
        video.initial(config, model, dataclasses.replace(recipe, frozen_bn=True))


def test_wrong_settings():
    with pytest.raises(ValueError, match="steps must be at least 1; got 0"):
        kinetics.Config(steps=0)
    with pytest.raises(ValueError, match=r"unreadable must be a share from 0 to 1; got 1\.5"):
        kinetics.Config(unreadable=1.5)
    with pytest.raises(ValueError, match="--test-only wants the weights to test"):
        kinetics.Config(test_only=True)


def test_too_many_unreadable_videos(lists, tmp_path):
    options = {
        "train_list": lists["kinetics"]["train"],
        "val_list": lists["kinetics"]["test"],
        "steps": 20,
        "batch_size": 8,
    }
    with pytest.raises(
        SystemExit,
        match=r"(?s)[12] of 18 videos cannot be read, more than 1\.0%:\n.*(damaged|sound)\.mp4",
    ):
        kinetics.main(kinetics.Config(output=tmp_path / "run", **options))


def test_tables_and_dry_runs(capsys, monkeypatch):
    kinetics.main(kinetics.Config(list_recipes=True))
    assert (
        "| i3d_nl5_r50_32x2 | ImageNet ResNet | 64 of 32×2 | 400,000 | 74.9 |"
        in capsys.readouterr().out
    )
    compiled = []  # the step, which takes a while, and is tested elsewhere
    monkeypatch.setattr(
        training, "dry_run", lambda *arguments: compiled.append(arguments) or "compiled"
    )
    charades.main(charades.Config(dry_run=True, batch_size=8))
    out = capsys.readouterr().out
    assert "block" in out
    assert "compiled" in out
    (_, options, _, batch), = compiled  # fmt: skip
    assert (options.steps, batch["inputs"].shape, batch["labels"].shape) == (
        1400,
        (8, 8, 32, 32, 3),
        (8, 6),
    )


def test_charades_gives_map(tmp_path, lists):
    folder = tmp_path / "run"
    printed = finish(start("charades", folder, lists))
    assert "mAP, %" in printed
    (part,), (results,) = folder.glob("test-*/scores/*.npz"), folder.glob("test-*/results.json")
    truth = np.zeros((6, 6), bool)
    for i, record in enumerate(annotations.read(lists["charades"]["test"], num_classes=6).records):
        truth[i, list(record.labels)] = True
    with np.load(part) as stored:
        assert stored["videos"].tolist() == list(range(6))
        for name, report in zip(
            ("single", "many"), json.loads(results.read_text())["tested_with"].values(), strict=True
        ):
            has = truth.any(0)
            theirs = average_precision_score(truth[:, has], stored[name][:, has], average="macro")
            assert report["mAP"]["value"] == pytest.approx(theirs)
