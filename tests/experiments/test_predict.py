"""Predictions for one video, with weights of a run and with published weights."""

import types
from pathlib import Path

import jax
import numpy as np
import pytest
from compilations import compilations

import nonlocal_jax as nl
from experiments import predict
from experiments.shared import results
from nonlocal_jax.data import DataError, kinetics_400, stand_in


@pytest.fixture(scope="module")
def video(lists):
    return lists["kinetics"]["test"].with_name("test0003.mp4")


@pytest.fixture(scope="module")
def options(finished_run, lists, video):
    folder, _ = finished_run
    return {
        "file": video,
        "weights": folder / "weights.safetensors",
        "recipe": "toy_mp4",
        "classes": lists["kinetics"]["test"].with_name("classes.txt"),
        "clips": 2,
    }


@pytest.mark.networks
def test_predict(options, tmp_path, capsys):
    files = {"picture": tmp_path / "looked.png", "page": tmp_path / "looked.html"}
    best = predict.main(predict.Config(**options, **files))
    names, scores = zip(*best, strict=True)
    assert set(names) < set(stand_in.CLASSES)
    assert list(scores) == sorted(scores, reverse=True)
    assert (tmp_path / "looked.png").stat().st_size > 10_000
    assert f"test0003.mp4: {names[0]}" in (tmp_path / "looked.html").read_text()
    assert "6 views" in capsys.readouterr().out


@pytest.mark.networks
def test_a_second_prediction_compiles_nothing(options, tmp_path):
    config = predict.Config(**options, picture=tmp_path / "looked.png")
    best = predict.main(config)
    with compilations() as names:
        assert predict.main(config) == best
    assert names == []


@pytest.mark.networks
def test_predict_remote_files(options, remote):
    expected = predict.main(
        predict.Config(**options, picture=options["weights"].with_name("a.png"))
    )
    for name in ("file", "weights", "classes"):
        (remote / options[name].name).upload(options[name])
        options = {**options, name: remote / options[name].name}
    files = {"picture": remote / "new/looked.png", "page": remote / "new/looked.html"}
    assert predict.main(predict.Config(**options, **files)) == expected
    assert (remote / "new/looked.png").read_bytes().startswith(b"\x89PNG")
    assert f"test0003.mp4: {expected[0][0]}" in (remote / "new/looked.html").read_text()
    missing = {**options, "weights": remote / "none.pth"}
    with pytest.raises(SystemExit, match=rf"error: {remote}/none.pth: No such file or directory\."):
        predict.main(predict.Config(**missing, **files))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "i3d"}, "--recipe must be one of toy_mp4, "),
        ({"picture": "none/looked.png"}, "--picture must be in an existing folder"),
        ({"picture": "looked.mp3"}, r"--picture must end in .*\.png.*; got looked\.mp3"),
        ({"page": "none/looked.html"}, "--page must be in an existing folder"),
        ({"weights": "none.pth"}, r"none\.pth"),
    ],
)
def test_wrong_options(changes, message, video, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"file": video, "weights": video, "recipe": "toy_mp4", **changes}
    paths = {
        name: type(tmp_path)(options[name])
        for name in ("weights", "picture", "page")
        if name in options
    }
    with pytest.raises(SystemExit, match=message):
        predict.main(predict.Config(**{**options, **paths}))


@pytest.mark.networks
def test_wrong_files(options, lists, video, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for changes, message in (
        ({"file": tmp_path / "none.mp4"}, "none.mp4: there is no such file"),
        ({"classes": video}, "must be a text file in UTF-8"),
        (
            {"classes": lists["kinetics"]["train"]},
            "must name the 6 classes of the network; got 18 names",
        ),
    ):
        with pytest.raises(SystemExit, match=message):
            predict.main(predict.Config(**{**options, **changes}))


@pytest.mark.parametrize("error", [OSError, ValueError])
def test_a_picture_that_cannot_be_written(error, tmp_path, monkeypatch):
    def fail(*_):
        raise error("the disk is full")

    monkeypatch.setattr(nl.visualize, "affinities", lambda *_, **__: {"block": None})
    monkeypatch.setattr(predict, "draw", fail)
    config = predict.Config(file=tmp_path / "a.mp4", weights=tmp_path)
    network = predict.Network(None, {}, None, 8, "paper")
    clip = np.zeros((1, 8, 8, 3), np.uint8)
    picture = tmp_path / "looked.png"
    with pytest.raises(SystemExit, match=r"error: cannot write .*looked\.png: the disk is full"):
        predict.show_attention(config, network, clip, picture, ("a", 0.5), predict.Console())


def test_published_weights_tell_their_network(tmp_path):
    """Frames, blocks and classes are inferred from a file with PySlowFast's names."""
    model = nl.models.video_resnet(
        (1, 2, 2, 1), "i3d_3x1x1", {"res4": (1,)}, preset="slowfast", num_classes=7
    )
    shapes = jax.eval_shape(model.init, jax.random.key(0), model.example)
    variables = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    nl.weights.save(tmp_path / "weights.safetensors", variables, "slowfast")
    options = {"file": tmp_path / "a.mp4", "weights": tmp_path / "weights.safetensors"}
    answers = {"pool2": True, "instantiation": "embedded_gaussian", "key_pool": (1, 2, 2)}
    with pytest.raises(ValueError, match=r"weights\.safetensors does not show (.|\n)*--clip 8x8, "):
        predict.network(predict.Config(**options, **answers))
    with pytest.raises(SystemExit, match=r"--instantiation embedded_gaussian or dot_product: "):
        predict.main(predict.Config(**options, clip="8x8"))
    network = predict.network(predict.Config(**options, **answers, clip="8x8"))
    assert (network.sampling.frames, network.sampling.stride, network.size) == (8, 8, 256)
    assert network.colours == "slowfast"
    assert network.variables["params"]["head"]["bias"].shape == (7,)
    assert network.model.nonlocal_blocks == {"res4": (1,)}


def test_names_of_kinetics_400(tmp_path):
    paths = {"file": tmp_path / "a.mp4", "weights": tmp_path / "b.pkl"}
    names = predict.class_names(predict.Config(**paths), 400)
    assert names == kinetics_400.CLASSES
    assert (len(set(names)), names[0], names[136], names[399]) == (
        400,
        "abseiling",
        "garbage collecting",
        "zumba",
    )
    assert list(names) == sorted(names)
    assert {"riding or walking with horse", "massaging person's head"} < set(names)
    assert predict.class_names(predict.Config(**paths), 399) == ()
    assert predict.class_names(predict.Config(**paths, data="charades"), 400) == ()
    own = tmp_path / "classes.txt"
    own.write_text("up\ndown\n")
    config = predict.Config(**paths, classes=own)
    assert predict.class_names(config, 2) == ("up", "down")
    with pytest.raises(DataError, match=r"classes\.txt must name the 400 classes .*; got 2 names"):
        predict.class_names(config, 400)


@pytest.mark.parametrize(
    ("classes", "names", "line"),
    [
        (None, kinetics_400.CLASSES, "class names: Kinetics-400"),
        ("own.txt", kinetics_400.CLASSES, "class names: own.txt"),
        (None, (), "class numbers; --classes takes their names"),
    ],
)
def test_the_source_of_the_names_is_printed(classes, names, line, tmp_path, monkeypatch, capsys):
    clip = np.zeros((1, 8, 8, 3), np.uint8)
    network = predict.Network(types.SimpleNamespace(num_classes=400), {}, None, 8, "paper")
    monkeypatch.setattr(predict, "load", lambda *_: (network, [clip, clip], names))
    monkeypatch.setattr(predict, "predict", lambda *_: np.linspace(1, 0, 400))
    monkeypatch.setattr(predict, "show_attention", lambda *_: None)
    classes = classes and Path(classes)
    best = predict.main(predict.Config(file=tmp_path / "a.mp4", weights=tmp_path, classes=classes))
    assert best[0][0] == (names[0] if names else "0")
    assert line in capsys.readouterr().out.splitlines()


def test_names_are_printed_as_they_are(tmp_path, monkeypatch, capsys):
    names = ("[/x]", "[red]dot[/red]", "a\x1b[2Jb", ":car:", "走る")
    clip = np.zeros((1, 8, 8, 3), np.uint8)
    network = predict.Network(types.SimpleNamespace(num_classes=5), {}, None, 8, "paper")
    monkeypatch.setattr(predict, "load", lambda *_: (network, [clip, clip], names))
    monkeypatch.setattr(predict, "predict", lambda *_: np.linspace(1, 0, 5))
    monkeypatch.setattr(nl.visualize, "affinities", lambda *_, **__: {"block": None})
    monkeypatch.setattr(predict, "draw", lambda *_: None)
    file = tmp_path / "clip [dQw4w9WgXcQ].mp4"
    picture = tmp_path / "[bold].png"
    best = predict.main(predict.Config(file=file, weights=tmp_path, picture=picture))
    assert [name for name, _ in best] == list(names)
    printed = capsys.readouterr().out.replace("\n", "")  # long lines are wrapped
    for text in ("[dQw4w9WgXcQ].mp4", "[/x]", "[red]dot[/red]", "a\\x1b[2Jb", ":car:", "走る"):
        assert text in printed
    assert "[bold].png" in printed
    assert "\x1b" not in printed


@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
def test_the_rows_of_the_picture_line_up(tmp_path, monkeypatch):
    block = nl.layers.nonlocal_block("dot_product")
    clip = jax.random.uniform(jax.random.key(0), (1, 3, 4, 6, 3))
    maps = nl.visualize.affinities(block, block.init(jax.random.key(1), clip), clip)
    figures = []
    monkeypatch.setattr(results, "save_figure", lambda figure, _: figures.append(figure))
    title = "$x_2[/x] \x1b[2J, 0.50"
    predict.draw(np.asarray(clip[0]), *maps.values(), tmp_path / "a.png", title)
    (figure,) = figures
    figure.draw_without_rendering()
    top, bottom = ([ax for ax in part.axes if ax.images] for part in figure.subfigs)
    assert len(top) == len(bottom) == 3
    for above, below in zip(top, bottom, strict=True):
        extents = [ax.get_window_extent() for ax in (above, below)]
        np.testing.assert_allclose(extents[0].intervalx, extents[1].intervalx, atol=0.5)
        assert extents[0].y0 > extents[1].y1
    assert figure.get_suptitle() == "$x_2[/x] \\x1b[2J, 0.50"


def test_errors_are_printed_without_control_characters(tmp_path, monkeypatch):
    def fail(*_):
        raise FileNotFoundError(2, "No such file or directory", "a\x1b[2J.pkl")

    monkeypatch.setattr(predict, "network", fail)
    config = predict.Config(file=tmp_path / "a.mp4", weights=tmp_path / "b.pkl")
    with pytest.raises(SystemExit, match=r"^error: a\\x1b\[2J\.pkl: No such file or directory\.$"):
        predict.load(config, tmp_path / "a.png")
