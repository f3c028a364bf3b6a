"""The demo with a small budget, and errors before training starts."""

import contextlib
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

from experiments import toy_video
from experiments.shared import results, toy_results
from experiments.toy_video import Config
from nonlocal_jax import training
from nonlocal_jax.data.toy_video import Scene, load_scans

SMALL = Config(
    networks=("embedded_gaussian",),
    pretrain_steps=4,
    pretrain_batch_size=16,
    steps=4,
    batch_size=8,
    evaluate_every=2,
    test_clips=256,
)


@pytest.fixture(scope="module")
def scans():
    return {"train": load_scans("train"), "test": load_scans("test")}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Runs the demo once and returns its config and the rows of its table."""
    output = tmp_path_factory.mktemp("demo") / "new" / "folder"
    config = dataclasses.replace(SMALL, output=output)
    with contextlib.redirect_stdout(io.StringIO()):
        return config, toy_video.main(config)


@pytest.mark.networks
def test_the_demo_writes_a_table_logs_and_a_picture(demo):
    config, rows = demo
    assert [row["network"] for row in rows] == ["embedded_gaussian"]
    assert all(len(row["accuracies"]) == 1 and 0 < row["accuracies"][0] < 1 for row in rows)

    for name in ("trunk_single_digit", "embedded_gaussian"):
        folder = config.output / "same_digit" / f"{name}-0"
        assert [row["step"] for row in results.read_log(folder, "train")] == [1, 2, 3, 4]
        assert [row["count"] for row in results.read_log(folder, "evaluation")] == [256, 256]
        assert results.read(folder)["config"]["network"] == name
    assert json.loads((config.output / "results.json").read_text())["rows"] == rows
    table = (config.output / "results.md").read_text()
    assert "| same_digit | C2D, non-local, embedded gaussian | 72,562 |" in table
    picture = matplotlib.image.imread(config.output / "toy_video.png")
    assert min(picture.shape[:2]) > 500
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 100


@pytest.mark.networks
def test_a_finished_demo_is_not_trained_again(demo, scans):
    config, rows = demo
    config = config.specialised("same_digit")
    console = Console(file=io.StringIO())
    trained = toy_video.train_all(config, scans, console)
    assert [run.accuracy for run in trained["embedded_gaussian"]] == rows[0]["accuracies"]
    assert console.file.getvalue().count("resumed at step 4") == 2


@pytest.mark.networks
def test_a_run_is_not_resumed_with_other_options(demo):
    config, _ = demo
    with pytest.raises(SystemExit, match=r"error: .*learning_rate .*0\.002"):
        toy_video.main(dataclasses.replace(config, learning_rate=1.0))


def test_several_seeds_are_one_row():
    row = {
        "task": "same_digit",
        "network": "control",
        "kind": "c2d",
        "parameters": 5,
        "flops": 10**6,
        "accuracies": [0.5, 0.52],
    }
    assert toy_results.cells(row)[-1] == "51.0 ± 1.4"


def test_the_test_clips_are_always_the_same(scans):
    first, second = (toy_video.held_out_clips("same_digit", 0, scans, Scene()) for _ in range(2))
    chex.assert_trees_all_equal(first, second)
    next_batch = toy_video.held_out_clips("same_digit", 1, scans, Scene())
    assert not np.array_equal(first.video, next_batch.video)


def random_variables(model, inputs):
    """Random variables of a model, all positive so that they can be variances."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), inputs)
    return jax.tree.map(lambda leaf: jnp.array(rng.uniform(0.05, 0.5, leaf.shape), "f4"), shapes)


def features(model, variables, clip):
    """The output of res3, the last layer before the head."""
    apply = functools.partial(
        model.apply,
        capture_intermediates=lambda module, _: module.name == "res3",
        mutable=["intermediates"],
    )
    _, state = jax.jit(apply)(variables, clip)
    return state["intermediates"]["res3"]["__call__"][0]


@pytest.mark.networks
def test_insertion_keeps_the_features_of_the_trunk():
    """The paper's recipe: neither inflation nor a new block changes what is computed on a still."""
    config = dataclasses.replace(SMALL, kind="i3d")
    trunk = toy_video.build(None, config, "single_digit")
    network = toy_video.build("dot_product", config)
    image = np.random.default_rng(1).normal(size=(3, 1, 16, 16, 1)).astype("f4")
    clip = np.repeat(image, 8, axis=1)
    image_variables = random_variables(trunk, image)
    fresh = jax.jit(network.init)(jax.random.key(3), clip)
    variables = toy_video.insert(image_variables, fresh)
    chex.assert_trees_all_equal_structs(variables, fresh)
    chex.assert_trees_all_equal(variables["params"]["head"], fresh["params"]["head"])
    chex.assert_trees_all_equal(variables["params"]["block"], fresh["params"]["block"])

    image_features = np.asarray(features(trunk, image_variables, image))
    clip_features = np.asarray(features(network, variables, clip))
    # Two inflated layers have three taps each: frames at least two from the border see only the
    # still.
    expected = np.repeat(image_features, 4, axis=1)
    chex.assert_trees_all_close(clip_features[:, 2:-2], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("task", ["same_digit", "moving_pair"])
def test_the_control_has_the_most_parameters_and_flops(task):
    config = SMALL.specialised(task)
    control = toy_video.cost("control", config)
    for network in toy_video.INSTANTIATIONS:
        parameters, flops = toy_video.cost(network, config)
        assert 0 < parameters <= control[0]
        assert 0 < flops <= control[1]


def test_all_means_every_instantiation_and_both_tasks():
    same, moving = toy_video.task_configs(dataclasses.replace(SMALL, all=True, seeds=5))
    assert (same.task, same.kind, same.seeds, same.scene) == ("same_digit", "c2d", 5, Scene())
    assert same.networks == (
        "control",
        "gaussian",
        "embedded_gaussian",
        "dot_product",
        "concatenation",
    )
    assert (moving.task, moving.kind, moving.seeds) == ("moving_pair", "i3d", 3)
    assert moving.scene == Scene(size=20)
    assert moving.networks == ("control", "embedded_gaussian")


def test_only_the_table_of_the_readme_is_replaced(tmp_path):
    begin, end = toy_results.README_MARKS
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    toy_results.write_readme(readme, "| new |")
    assert readme.read_text() == f"before\n{begin}\n| new |\n{end}\nafter\n"
    readme.write_text("no marks")
    toy_results.write_readme(readme, "| new |")
    assert readme.read_text() == "no marks"


def test_nan_in_the_scans_stops_before_training(scans, tmp_path):
    nan_scans = {
        split: scan._replace(images=scan.images * jnp.nan) for split, scan in scans.items()
    }
    config = dataclasses.replace(SMALL, output=tmp_path / "new")
    with pytest.raises(ValueError, match=r"clips must be finite; got NaN"):
        toy_video.train_all(config, nan_scans, Console(file=io.StringIO()))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("error", [training.NonFiniteError, training.RunError])
def test_errors_of_training_end_the_demo(error, tmp_path, monkeypatch):
    def fail(*_):
        raise error("the loss is nan.")

    monkeypatch.setattr(toy_video, "train_all", fail)
    with pytest.raises(SystemExit, match=r"error: the loss is nan\."):
        toy_video.main(dataclasses.replace(SMALL, output=tmp_path))


@pytest.fixture
def _no_training(monkeypatch):
    monkeypatch.setattr(toy_video, "train_all", lambda *_: pytest.fail("it trained"))


@pytest.mark.usefixtures("_no_training")
def test_an_output_that_cannot_be_written_stops_before_training(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        SystemExit, match=r"--output must be a writable folder; got .*file/runs: Not a directory"
    ):
        toy_video.main(dataclasses.replace(SMALL, output=tmp_path / "file" / "runs"))


@pytest.mark.usefixtures("_no_training")
def test_a_readme_that_cannot_be_written_stops_before_training(tmp_path):
    readme = tmp_path / "README.md"
    readme.mkdir()
    config = dataclasses.replace(SMALL, all=True, output=tmp_path / "new", readme=readme)
    with pytest.raises(
        SystemExit, match=r"--readme must be a readable and writable file; got .*README"
    ):
        toy_video.main(config)


@pytest.mark.usefixtures("as_users_see_it", "_no_training")
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
def test_networks_that_cannot_be_built_stop_before_training(options, message, tmp_path):
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
def test_wrong_values_are_refused(options, message):
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
