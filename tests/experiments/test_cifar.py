"""The experiment from end to end: on digits, on files of CIFAR's format, and what it says when it cannot run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
import tyro
from data.test_cifar import make_archive

from experiments import cifar, report
from experiments.cifar import Config

SMALL = Config(
    depth=8, nonlocal_blocks=("res2_0",), steps=4, batch_size=16, evaluate_every=2, save_every=2
)


def test_digits_are_learnt(tmp_path):
    """A smaller network and a shorter run than the default, which reaches 99%."""
    config = dataclasses.replace(
        SMALL,
        steps=100,
        batch_size=64,
        evaluate_every=50,
        save_every=50,
        output=tmp_path,
        precise_bn=5,
    )
    result = cifar.main(config)
    assert result.metrics["accuracy"] > 0.95
    assert result.metrics["count"] == 450
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (
        rows[-1]["residual_ratio/nonlocal_res2_0" if rows[-1]["kind"] == "train" else "accuracy"]
        > 0
    )
    picture = matplotlib.image.imread(tmp_path / "curves.png")
    assert min(picture.shape[:2]) > 300
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["metrics"] == result.metrics
    assert results["data"] == "digits"


def test_the_whole_path_from_the_official_archive(tmp_path):
    archive, _ = make_archive(tmp_path / "data", "cifar10")
    config = dataclasses.replace(
        SMALL, dataset="cifar10", data_dir=tmp_path / "data", archive_sha256=archive.sha256, output=tmp_path / "run", workers=1,
        mixup=0.2, label_smoothing=0.1, average=0.9, schedule="cosine", warmup=1, clip_norm=1.0, accumulate=2,
    )  # fmt: skip
    result = cifar.main(config)
    assert int(result.state.step) == 4
    assert result.metrics["count"] == 7
    assert result.state.params["head"]["kernel"].shape == (64, 10)


def test_augmentation_is_of_the_example_alone():
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3)), jnp.uint8)
    batch = {"inputs": images, "position": jnp.arange(6, dtype=jnp.uint32), "labels": jnp.arange(6)}
    of_input, key = cifar.INPUTS["cifar10"], jax.random.key(0)
    augmented = cifar.prepare(of_input, 0.0, 10, batch, key)["inputs"]
    half = jax.tree.map(lambda x: x[3:], batch)
    np.testing.assert_array_equal(
        cifar.prepare(of_input, 0.0, 10, half, key)["inputs"], augmented[3:]
    )
    plain = cifar.prepare(of_input, 0.0, 10, batch, None)["inputs"]
    np.testing.assert_allclose(plain[..., 0], (images[..., 0] - 125.3) / 63.0, rtol=1e-5)
    padded = np.pad(np.asarray(plain), ((0, 0), (4, 4), (4, 4), (0, 0)))
    mirrored = 0
    for image, source in zip(np.asarray(augmented), padded, strict=True):
        found = [
            flip for flip in (False, True) for y in range(9) for x in range(9)
            if np.array_equal(image[:, ::-1] if flip else image, source[y : y + 32, x : x + 32])
        ]  # fmt: skip
        assert len(found) == 1
        mirrored += found[0]
    assert 0 < mirrored < 6


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
            "error: --archive-sha256 is that of .*which is not there",
        ),
        ({"batch_size": 15}, "error: the batch must split over 4 devices; got 15"),
        ({"average": 2.0}, "error: average must be between 0 and 1"),
    ],
)
def test_what_cannot_be_trained_stops_before(options, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        cifar.main(
            dataclasses.replace(SMALL, output=tmp_path / "new", data_dir=tmp_path, **options)
        )
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"mixup": -1.0}, "mixup must be at least 0"),
        ({"nonlocal_blocks": ("res9_1",)}, "nonlocal_blocks must be like res2_1, .*got 'res9_1'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Config(**options)


def test_a_mistyped_flag_is_an_error(capsys):
    with pytest.raises(SystemExit) as stop:
        tyro.cli(Config, args=["--learning-rat", "1"])
    assert stop.value.code == 2
    assert "--learning-rat" in capsys.readouterr().err


def test_dry_run_prints_and_trains_nothing(tmp_path, capsys):
    assert (
        cifar.main(dataclasses.replace(SMALL, dry_run=True, output=tmp_path / "new", batch_size=16))
        is None
    )
    printed = capsys.readouterr().out
    for words in (
        "nonlocal_res2_0/operation",
        "multiply-adds",
        "queries × 4 keys",
        "data 4 × positions 1",
        "MB beside state",
    ):
        assert words in printed
    assert not (tmp_path / "new").exists()


def finished(folder, seed, accuracy, **config):
    folder.mkdir()
    metrics = {"accuracy": accuracy, "loss": 0.1, "count": 450}
    row = {
        "command": f"train --seed {seed}",
        "hardware": "a device",
        "data": "digits",
        "parameters": 1234,
        "steps": 10,
    }
    (folder / "results.json").write_text(json.dumps({**row, "seconds": 5.0, "metrics": metrics}))
    (folder / "config.json").write_text(
        json.dumps({"seed": seed, "output": str(folder), "depth": 20, **config})
    )
    log = [
        {"step": 1, "kind": "train", "loss": 1.0, "accuracy": 0.1},
        {"step": 10, "kind": "evaluation", **metrics},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    return folder


def test_a_report_groups_seeds(tmp_path):
    runs = [
        finished(tmp_path / f"a{seed}", seed, accuracy) for seed, accuracy in enumerate((0.9, 0.94))
    ]
    runs.append(finished(tmp_path / "b", 0, 0.5, depth=32))
    report.main(report.Config(tuple(runs), tmp_path / "out"))
    table = (tmp_path / "out" / "results.md").read_text()
    assert "| a0 | digits | 1,234 | 2 | 92.00 ± 2.83 | 10 | 5 |" in table
    assert "| b | digits | 1,234 | 1 | 50.00 | 10 | 5 |" in table
    assert "- a1: `train --seed 1`, a device" in table
    assert (tmp_path / "out" / "curves.png").stat().st_size > 5000


def test_a_report_of_what_is_no_run(tmp_path):
    with pytest.raises(SystemExit, match="must be the folder of a finished run"):
        report.main(report.Config((tmp_path,), tmp_path / "out"))
    with pytest.raises(ValueError, match="runs must name at least one folder"):
        report.Config(())
