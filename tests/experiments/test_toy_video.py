"""The demo from end to end on a small budget, and what it says when it cannot run."""

import dataclasses
import functools
import io
import json

import chex
import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
import tyro
from rich.console import Console

from experiments import report, toy_video
from experiments.toy_video import Config
from nonlocal_jax.data.toy_video import Scene, load_scans

SMALL = Config(
    networks=("embedded_gaussian",), pretrain_steps=4, pretrain_batch_size=16, steps=4, batch_size=8,
    evaluate_every=2, test_clips=256,
)  # fmt: skip
QUIET = Console(file=io.StringIO())


@pytest.fixture(scope="module")
def scans():
    return {"train": load_scans("train"), "test": load_scans("test")}


def test_the_demo_leaves_a_table_logs_and_a_picture(tmp_path, capsys):
    output = tmp_path / "new" / "folder"
    rows = toy_video.main(dataclasses.replace(SMALL, output=output))
    assert [row["network"] for row in rows] == ["embedded_gaussian"]
    assert all(len(row["accuracies"]) == 1 and 0 < row["accuracies"][0] < 1 for row in rows)

    for name in ("trunk_single_digit", "embedded_gaussian"):
        folder = output / "same_digit" / f"{name}-0"
        assert [row["step"] for row in report.read_log(folder, "train")] == [1, 2, 3, 4]
        assert [row["count"] for row in report.read_log(folder, "evaluation")] == [256, 256]
        assert report.read(folder)["config"]["network"] == name
    assert json.loads((output / "results.json").read_text())["rows"] == rows
    table = (output / "results.md").read_text()
    assert "| same_digit | C2D, non-local, embedded gaussian | 72,562 |" in table
    picture = matplotlib.image.imread(output / "toy_video.png")
    assert min(picture.shape[:2]) > 500
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 100

    capsys.readouterr()
    assert toy_video.main(dataclasses.replace(SMALL, output=output)) == rows
    assert "resumed at step 4" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"learning_rate must be 0\.002, .*; got 1\.0"):
        toy_video.main(dataclasses.replace(SMALL, output=output, learning_rate=1.0))


def test_several_seeds_are_one_row():
    row = {
        "task": "same_digit",
        "network": "control",
        "kind": "c2d",
        "parameters": 5,
        "flops": 10**6,
        "accuracies": [0.5, 0.52],
    }
    assert toy_video.cells(row)[-1] == "51.0 ± 1.4"


def test_the_test_clips_are_always_the_same(scans):
    first, again, other = (
        toy_video.held_out_clips("same_digit", i, scans, Scene()) for i in (0, 0, 1)
    )
    chex.assert_trees_all_equal(first, again)
    assert not np.array_equal(first.video, other.video)


def test_insert_keeps_the_answer_of_the_trunk(scans):
    """The paper's recipe: a block put into a trained network does not change its answer, nor does inflation on a still."""
    config = dataclasses.replace(SMALL, kind="i3d")
    trunk, inflated = (
        toy_video.build(None, config, "single_digit"),
        toy_video.build("dot_product", config),
    )
    still = jnp.broadcast_to(
        jax.random.normal(jax.random.key(0), (3, 1, 16, 16, 1)), (3, 8, 16, 16, 1)
    )
    image_variables = jax.jit(trunk.init)(jax.random.key(1), still[:, :1])
    image_variables = jax.tree.map(
        lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(2), leaf.shape) ** 2,
        image_variables,
    )
    fresh = jax.jit(inflated.init)(jax.random.key(3), still)
    variables = toy_video.insert(image_variables, fresh)
    chex.assert_trees_all_equal_structs(variables, fresh)
    chex.assert_trees_all_equal(variables["params"]["head"], fresh["params"]["head"])
    chex.assert_trees_all_equal(variables["params"]["block"], fresh["params"]["block"])

    def features(model, variables, clip):
        apply = functools.partial(
            model.apply,
            capture_intermediates=lambda m, _: m.name == "res3",
            mutable=["intermediates"],
        )
        picked = jax.jit(apply)(variables, clip)
        return picked[1]["intermediates"]["res3"]["__call__"][0]

    of_image, of_clip = (
        features(trunk, image_variables, still[:, :1]),
        features(inflated, variables, still),
    )
    # Two inflated layers of three taps: the frames at least two from the border see a whole still.
    chex.assert_trees_all_close(
        of_clip[:, 2:-2],
        jnp.broadcast_to(of_image, (3, 4, *of_image.shape[2:])),
        rtol=1e-3,
        atol=1e-4,
    )


@pytest.mark.parametrize("task", ["same_digit", "moving_pair"])
def test_the_control_has_the_most_parameters_and_flops(task):
    config = SMALL.of_task(task)
    parameters, flops = toy_video.cost("control", config)
    for network in toy_video.INSTANTIATIONS:
        assert all(
            0 < of_block <= most
            for of_block, most in zip(
                toy_video.cost(network, config), (parameters, flops), strict=True
            )
        )


def test_all_is_every_instantiation_and_both_tasks():
    first, second = toy_video.tasks(dataclasses.replace(SMALL, all=True, seeds=5))
    assert (first.task, first.kind, first.seeds, first.scene) == ("same_digit", "c2d", 5, Scene())
    assert first.networks == (
        "control",
        "gaussian",
        "embedded_gaussian",
        "dot_product",
        "concatenation",
    )
    assert (second.task, second.kind, second.seeds, second.scene) == (
        "moving_pair",
        "i3d",
        3,
        Scene(size=20),
    )
    assert second.networks == ("control", "embedded_gaussian")


def test_the_table_replaces_that_of_the_readme_and_nothing_else(tmp_path):
    begin, end = toy_video.README_MARKS
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    toy_video.write_readme(readme, "| new |")
    assert readme.read_text() == f"before\n{begin}\n| new |\n{end}\nafter\n"
    readme.write_text("no marks")
    toy_video.write_readme(readme, "| new |")
    assert readme.read_text() == "no marks"


def test_nan_in_the_scans_stops_before_training(scans, tmp_path):
    spoilt = {name: split._replace(images=split.images * jnp.nan) for name, split in scans.items()}
    with pytest.raises(ValueError, match=r"clips must be finite; got NaN"):
        toy_video.train_all(dataclasses.replace(SMALL, output=tmp_path / "new"), spoilt, QUIET)
    assert not (tmp_path / "new").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(
        SystemExit,
        match=r"error: the loss .*; got (nan|inf) .* at step \d.*or lower the learning rate",
    ):
        toy_video.main(
            dataclasses.replace(SMALL, pretrain_learning_rate=1e38, warmup=0, output=tmp_path)
        )


def test_an_output_that_cannot_be_written_stops_before_training(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(toy_video, "train_all", lambda *_: pytest.fail("it trained"))
    with pytest.raises(
        SystemExit,
        match=r"--output must be a folder that can be written; .*file/runs: Not a directory",
    ):
        toy_video.main(dataclasses.replace(SMALL, output=tmp_path / "file" / "runs"))


def test_a_readme_that_cannot_be_written_stops_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(toy_video, "train_all", lambda *_: pytest.fail("it trained"))
    (tmp_path / "README.md").mkdir()
    with pytest.raises(
        SystemExit, match=r"--readme must be a file that can be read and written; got .*README"
    ):
        toy_video.main(
            dataclasses.replace(
                SMALL, all=True, output=tmp_path / "new", readme=tmp_path / "README.md"
            )
        )


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "caffe2", "networks": ("control", "gaussian")}, "'caffe2' has no 'gaussian'"),
        (
            {"task": "moving_pair", "scene": Scene(size=14)},
            "moving_pair needs size of at least 15.* got 14",
        ),
    ],
)
def test_what_cannot_be_built_stops_before_training(options, message, tmp_path, monkeypatch):
    monkeypatch.setattr(toy_video, "train_all", lambda *_: pytest.fail("it trained"))
    with pytest.raises(SystemExit, match=message):
        toy_video.main(dataclasses.replace(SMALL, output=tmp_path / "new", **options))
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1; got 0"),
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive and finite; got nan"),
        ({"warmup": -5}, "warmup must be at least 0; got -5"),
        ({"networks": ()}, "networks must name at least one of control, gaussian"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Config(**options)


@pytest.mark.parametrize(
    "arguments", [["--stepz", "100"], ["--networks", "transformer"], ["--preset", "torch"]]
)
def test_a_mistyped_flag_is_an_error(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        tyro.cli(Config, args=arguments)
    assert stop.value.code == 2
    assert arguments[0] in capsys.readouterr().err
