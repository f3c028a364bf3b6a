"""Predictions for one video, with weights of a run and with published weights."""

import jax
import numpy as np
import pytest

import nonlocal_jax as nl
from experiments import predict
from nonlocal_jax.data import stand_in


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
    config = predict.Config(
        file=tmp_path / "a.mp4", weights=tmp_path / "weights.safetensors", clip="8x8"
    )
    network = predict.network(config)
    assert (network.sampling.frames, network.sampling.stride, network.size) == (8, 8, 256)
    assert network.colours == "slowfast"
    assert network.variables["params"]["head"]["bias"].shape == (7,)
    assert network.model.nonlocal_blocks == {"res4": (1,)}
