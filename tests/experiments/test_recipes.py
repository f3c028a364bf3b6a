"""Recipes against the paper's tables, what they build, and what a test's scores depend on."""

import dataclasses
import functools
import importlib.util
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nonlocal_jax as nl
from experiments import charades, cifar, kinetics, toy_video
from experiments.shared import building, fingerprints, previews, recipes, video_training
from nonlocal_jax import training
from nonlocal_jax.data import annotations

# Rows of the paper: name, places of the blocks, published top-1 accuracy.
TABLE = {
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
    model = building.build(kinetics.Config(), recipe, 400)
    assert dict(model.nonlocal_blocks) == places
    assert recipe.published[0] == top1
    assert model.blocks == ((3, 4, 23, 3) if "_r101_" in name else (3, 4, 6, 3))
    assert (model.conv1_frames == 1) == name.startswith("c2d")
    assert (recipe.frames, recipe.stride) == ((128, 1) if name.endswith("128x1") else (32, 2))
    if "_nl" in name:
        operation = model.make_block("res4").operation
        assert operation.axes == ("space" if "space" in name else "spacetime")
        variants = ("gaussian", "dot_product", "concatenation")
        named = [variant for variant in variants if f"_{variant}_" in name]
        (instantiation,) = named or ["embedded_gaussian"]
        assert type(operation).__name__.lower() == instantiation.replace("_", "")


def test_schedules_of_long_clips_and_charades():
    long = kinetics.recipes()["i3d_nl5_r50_128x1"]
    assert (long.learning_rate, long.batch_size, long.frozen_bn) == (0.0025, 16, True)
    recipe = charades.recipes()["i3d_nl5_r101_128x1"]
    assert (recipe.learning_rate, recipe.steps) == (0.00125, 200_000)
    assert recipe.boundaries == (75_000, 150_000)
    assert (recipe.size, recipe.test_size) == (288, 320)
    assert (recipe.num_classes, recipe.multi_label, recipe.frozen_bn) == (157, True, True)
    assert recipe.published == (37.5,)


@pytest.mark.parametrize(
    ("batch_size", "learning_rate", "steps", "boundaries"),
    [
        (64, 0.01, 400_000, (150_000, 300_000)),
        (512, 0.08, 50_000, (18_750, 37_500)),
        (8, 0.00125, 3_200_000, (1_200_000, 2_400_000)),
    ],
)
def test_schedules_scale_with_the_batch_size(batch_size, learning_rate, steps, boundaries):
    recipe = kinetics.recipes()["i3d_r50_32x2"]
    scaled = recipes.scaled(kinetics.Config(batch_size=batch_size), recipe)
    assert scaled.learning_rate == pytest.approx(learning_rate)
    assert (scaled.steps, scaled.boundaries) == (steps, boundaries)


def test_a_given_learning_rate_is_not_scaled():
    config = kinetics.Config(batch_size=128, learning_rate=0.5, steps=8)
    recipe = kinetics.recipes()["i3d_r50_32x2"]
    assert recipes.scaled(config, recipe).learning_rate == 0.5


def test_frozen_norms_are_not_updated():
    recipe = dataclasses.replace(kinetics.recipes()["i3d_r50_128x1"], depth=0)
    optimiser = building.make_trainer(kinetics.Config(), recipe, 6).optimiser
    params = {
        "conv": {"kernel": jnp.ones(3), "bias": jnp.ones(3)},
        "norm": {"scale": jnp.ones(3), "bias": jnp.ones(3)},
    }
    updates, _ = optimiser.update(params, optimiser.init(params), params)
    updated = [float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(updates)]
    assert updated == [True, True, False, False]


def test_losses_of_several_labels():
    logits, labels = np.array([[2.0, -1.0], [0.0, 3.0]]), np.array([[1.0, 0.0], [1.0, 1.0]])
    p = 1 / (1 + np.exp(-logits))
    expected = -(labels * np.log(p) + (1 - labels) * np.log(1 - p)).mean(1)
    loss = building.sigmoid_cross_entropy(jnp.array(logits), jnp.array(labels))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert building.hit(jnp.array(logits), jnp.array(labels))["hit_at_1"].tolist() == [1.0, 1.0]
    assert building.hit(jnp.array(-logits), jnp.array(labels))["hit_at_1"].tolist() == [0.0, 1.0]


def test_frozen_norms_need_weights_of_a_network_with_blocks(tmp_path):
    """What a recipe does not initialise must be in its weights."""
    config = kinetics.Config(init=tmp_path / "weights.safetensors")
    recipe = kinetics.recipes()["i3d_nl5_r50_32x2"]
    small = functools.partial(nl.models.video_resnet, (1, 1, 1, 1), "c2d", num_classes=6)
    plain = small({})
    shapes = jax.eval_shape(plain.init, jax.random.key(0), plain.example)
    nl.weights.save(config.init, jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes))
    model = small({"res4": (0,)})
    assert "nonlocal_res4_0" in video_training.initial(config, model, recipe)["params"]
    frozen = dataclasses.replace(recipe, frozen_bn=True)
    with pytest.raises(ValueError, match=r"params/nonlocal_res4_0/.* is not in the file"):
        video_training.initial(config, model, frozen)


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="steps must be at least 1; got 0"):
        kinetics.Config(steps=0)
    with pytest.raises(ValueError, match=r"unreadable must be a share from 0 to 1; got 1\.5"):
        kinetics.Config(unreadable=1.5)
    with pytest.raises(ValueError, match="--test-only must come with weights to test; got none"):
        kinetics.Config(test_only=True)


def test_list_of_recipes(capsys):
    kinetics.main(kinetics.Config(list_recipes=True))
    row = "| i3d_nl5_r50_32x2 | ImageNet ResNet | 64 of 32×2 | 400,000 | 74.9 |"
    assert row in capsys.readouterr().out


@pytest.fixture
def dry_runs(monkeypatch):
    """Replaces the training step's dry run, which is tested with the training package."""
    calls = []

    def dry_run(*arguments):
        calls.append(arguments)
        yield "compiled"

    monkeypatch.setattr(training, "dry_run", dry_run)
    return calls


def test_dry_run(capsys, dry_runs):
    charades.main(charades.Config(dry_run=True, batch_size=8))
    printed = capsys.readouterr().out
    assert "block" in printed
    assert "compiled" in printed
    ((_, options, _, batch),) = dry_runs
    assert options.steps == 1400
    assert batch["inputs"].shape == (8, 8, 32, 32, 3)
    assert batch["labels"].shape == (8, 6)


def test_dry_run_takes_a_batch_that_splits(capsys, dry_runs, monkeypatch):
    devices = np.resize(jax.devices(), (24, 1))
    mesh = types.SimpleNamespace(size=24, shape={"data": 24, "positions": 1}, devices=devices)
    monkeypatch.setattr(training, "make_mesh", lambda devices: mesh)
    kinetics.main(kinetics.Config(dry_run=True))
    assert "16 clips cannot be split over 24 devices: 48 are taken" in capsys.readouterr().out
    ((_, options, _, batch),) = dry_runs
    assert batch["inputs"].shape[0] == 48
    assert options.steps == 700 * 16 // 48


@pytest.mark.parametrize(
    ("dataset", "shape", "num_classes"),
    [("digits", (8, 8, 1), 10), ("cifar10", (32, 32, 3), 10), ("cifar100", (32, 32, 3), 100)],
)
def test_dry_run_of_images_needs_no_data(dataset, shape, num_classes, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(cifar, "load", lambda *_: pytest.fail("it read data"))
    monkeypatch.setattr(previews, "preview", lambda *arguments: calls.append(arguments))
    config = cifar.Config(dry_run=True, dataset=dataset, data_dir=tmp_path, batch_size=12)
    assert cifar.main(config) is None
    ((_, _, _, model, batch),) = calls
    assert batch["inputs"].shape == (12, *shape)
    assert batch["inputs"].dtype == np.uint8
    assert model.num_classes == num_classes
    assert list(tmp_path.iterdir()) == []


def test_dry_runs_describe_the_data_that_is_read():
    train, _ = cifar.load(cifar.Config())
    recipe = cifar.RECIPES["digits"]
    assert (train.images.shape[1:], train.num_classes) == (recipe.shape, recipe.num_classes)


def test_dry_run_of_toy_videos_needs_no_scans(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(toy_video, "load_scans", lambda *_: pytest.fail("it read scans"))
    monkeypatch.setattr(previews, "preview", lambda *arguments: calls.append(arguments))
    assert toy_video.main(toy_video.Config(dry_run=True, batch_size=7, all=True)) == []
    assert len(calls) == len(toy_video.NETWORKS) + 2
    assert {call[4]["inputs"].shape for call in calls} == {(7, 8, 16, 16, 1), (7, 8, 20, 20, 1)}
    assert {call[4]["labels"].shape for call in calls} == {(7,)}
    assert "same_digit, control" in capsys.readouterr().out


def test_topology_without_a_dry_run():
    for config in (kinetics.Config, cifar.Config, toy_video.Config):
        with pytest.raises(ValueError, match="--topology must come with --dry-run; got v5e:2x2"):
            config(topology="v5e:2x2")


def test_dry_run_without_libtpu(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "libtpu" else find_spec(name)
    )
    with pytest.raises(SystemExit, match=r"for v5e:2x2 requires libtpu, .*: pip install 'jax\[tpu"):
        kinetics.main(kinetics.Config(dry_run=True, topology="v5e:2x2"))


def test_scores_are_stored_by_everything_they_depend_on(lists):
    """Another network, other clips or another order of the videos give other settings."""
    recipe, config = kinetics.recipes()["toy_mp4"], kinetics.Config()
    videos = annotations.read(lists["kinetics"]["test"], num_classes=6)
    variables = {"x": np.arange(3.0)}
    usual = fingerprints.test_settings(config, recipe, videos, variables)
    assert json.loads(json.dumps(usual)) == usual
    first, second, *records = videos.records
    swapped = dataclasses.replace(videos, records=(second, first, *records))
    relabelled = dataclasses.replace(first, labels=(5,))
    relabelled = dataclasses.replace(videos, records=(relabelled, second, *records))
    configs = [
        dataclasses.replace(config, preset="slowfast"),
        dataclasses.replace(config, sampling="slowfast"),
        dataclasses.replace(config, short="hold"),
        dataclasses.replace(config, combine="max"),
    ]
    changes = [
        (config, recipe, videos, {"x": np.arange(3.0) + 1}),
        *((changed, recipe, videos, variables) for changed in configs),
        (config, dataclasses.replace(recipe, stride=3), videos, variables),
        (config, dataclasses.replace(recipe, axes="space"), videos, variables),
        (config, recipe, swapped, variables),
        (config, recipe, relabelled, variables),
    ]
    assert all(fingerprints.test_settings(*change) != usual for change in changes)


def digest(folder, names, **fields):
    records = tuple(
        annotations.Record(folder / name, (i,), **fields) for i, name in enumerate(names)
    )
    return fingerprints.digest_of_list(annotations.Annotations(records, 2))


def test_the_digest_of_a_list_does_not_depend_on_its_folder(tmp_path):
    names = ["a/1.mp4", "b/1.mp4"]
    assert digest(tmp_path, names) == digest(tmp_path / "elsewhere", names)
    assert digest(tmp_path, names) != digest(tmp_path, names[::-1])


def test_the_digest_of_a_list_depends_on_frames_and_their_labels(tmp_path):
    frames = (tmp_path / "1.jpg", tmp_path / "2.jpg")
    digests = {
        digest(tmp_path, ["v"], frames=order, frame_labels=labels)
        for order in (frames, frames[::-1])
        for labels in (((0,), ()), ((), (0,)))
    }
    assert len(digests) == 4


def test_the_digest_of_a_list_depends_on_the_size_of_files(tmp_path):
    digests = []
    for folder, content in (("large", b"12345"), ("small", b"123"), ("moved", b"123")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "v.mp4").write_bytes(content)
        digests.append(digest(tmp_path / folder, ["v.mp4"]))
    assert digests[0] != digests[1] == digests[2]
