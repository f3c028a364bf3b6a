"""CIFAR and digits: a training run, files in CIFAR's format, and errors before training starts."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
import tyro
from data.test_cifar import make_archive

from experiments import cifar
from experiments.cifar import Config

SMALL = Config(
    depth=8, nonlocal_blocks=("res2_0",), steps=4, batch_size=8, evaluate_every=4, save_every=4
)
# A smaller network and a shorter run than the default, which reaches 99%.
DIGITS = dataclasses.replace(
    SMALL, steps=60, batch_size=64, evaluate_every=60, save_every=60, precise_bn=2
)


@pytest.mark.networks
def test_learns_digits(tmp_path):
    result = cifar.main(dataclasses.replace(DIGITS, output=tmp_path))
    assert result.metrics["accuracy"] > 0.9
    assert result.metrics["count"] == 450
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    last = max((row for row in rows if row["kind"] == "train"), key=lambda row: row["step"])
    assert last["residual_ratio/nonlocal_res2_0"] > 0
    picture = matplotlib.image.imread(tmp_path / "curves.png")
    assert min(picture.shape[:2]) > 300
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["metrics"] == result.metrics
    assert record["data"] == "digits"


@pytest.mark.networks
@pytest.mark.processes
def test_trains_on_the_official_archive_format(tmp_path):
    archive, _ = make_archive(tmp_path / "data", "cifar10")
    config = dataclasses.replace(
        SMALL,
        dataset="cifar10",
        data_dir=tmp_path / "data",
        archive_sha256=archive.sha256,
        output=tmp_path / "run",
        workers=1,
        mixup=0.2,
        label_smoothing=0.1,
        average=0.9,
        schedule="cosine",
        warmup=1,
        clip_norm=1.0,
        accumulate=2,
    )
    result = cifar.main(config)
    assert int(result.state.step) == 4
    assert result.metrics["count"] == 7
    assert result.state.params["head"]["kernel"].shape == (64, 10)


def test_augmentation_depends_on_the_example_alone():
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)
    batch = {
        "inputs": jnp.asarray(images),
        "position": jnp.arange(6, dtype=jnp.uint32),
        "labels": jnp.arange(6),
    }
    recipe, key = cifar.RECIPES["cifar10"], jax.random.key(0)
    augmented = cifar.prepare(recipe, 0.0, 10, batch, key)["inputs"]
    half = jax.tree.map(lambda x: x[3:], batch)
    half_augmented = cifar.prepare(recipe, 0.0, 10, half, key)["inputs"]
    np.testing.assert_array_equal(half_augmented, augmented[3:])
    plain = cifar.prepare(recipe, 0.0, 10, batch, None)["inputs"]
    expected = (images[..., 0].astype("f4") - np.float32(125.3)) / np.float32(63.0)
    np.testing.assert_allclose(plain[..., 0], expected, rtol=1e-5)
    padded = np.pad(np.asarray(plain), ((0, 0), (4, 4), (4, 4), (0, 0)))
    flips = 0
    for image, source in zip(np.asarray(augmented), padded, strict=True):
        orientations = {False: image, True: image[:, ::-1]}
        matches = [
            flip
            for flip, oriented in orientations.items()
            for y in range(9)
            for x in range(9)
            if np.array_equal(oriented, source[y : y + 32, x : x + 32])
        ]
        assert len(matches) == 1
        flips += matches[0]
    assert 0 < flips < 6


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nonlocal_blocks": ("res2_7",)}, "error: res2 has residual blocks 0 to 0; got 7"),
        ({"depth": 21}, "error: depth must be 6n"),
        ({"preset": "caffe2", "instantiation": "gaussian"}, "'caffe2' has no 'gaussian'"),
        ({"learning_rate": -1.0}, "error: peak must be positive"),
        (
            {"archive_sha256": "0", "dataset": "cifar10"},
            "error: --archive-sha256 must be that of .*, which does not exist",
        ),
        ({"batch_size": 15}, "error: the batch must split over 4 devices; got 15"),
        ({"average": 2.0}, "error: average must be between 0 and 1"),
    ],
)
def test_wrong_options_stop_before_training(options, message, tmp_path):
    output = tmp_path / "new"
    with pytest.raises(SystemExit, match=message):
        cifar.main(dataclasses.replace(SMALL, output=output, data_dir=tmp_path, **options))
    assert not output.exists()


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"mixup": -1.0}, "mixup must be at least 0"),
        ({"nonlocal_blocks": ("res9_1",)}, "nonlocal_blocks must be like res2_1, .*got 'res9_1'"),
    ],
)
def test_wrong_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Config(**options)


def test_a_mistyped_flag_is_an_error(capsys):
    with pytest.raises(SystemExit) as stop:
        tyro.cli(Config, args=["--learning-rat", "1"])
    assert stop.value.code == 2
    assert "--learning-rat" in capsys.readouterr().err


@pytest.mark.networks
def test_dry_run_describes_without_training(tmp_path, capsys):
    output = tmp_path / "new"
    config = dataclasses.replace(DIGITS, dry_run=True, output=output)
    assert cifar.main(config) is None
    printed = capsys.readouterr().out
    for words in (
        "nonlocal_res2_0/operation",
        "multiply-adds",
        "queries × 4 keys",
        "data 4 × positions 1",
        "MB in addition to state",
    ):
        assert words in printed
    assert not output.exists()
