"""Options that name files keep URLs whole."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import tyro

from experiments import charades, cifar, kinetics, predict, report, toy_video
from nonlocal_jax import remote_paths
from nonlocal_jax.data import __main__ as data_commands
from nonlocal_jax.remote_paths import RemotePath
from nonlocal_jax.weights import __main__ as weight_commands

URL = "memory://bucket/a"
ANY_PATH = [
    (kinetics.Config, [f"--{name}"])
    for name in ("output", "train-list", "val-list", "root", "classes", "init")
]
ANY_PATH += [(experiment.Config, ["--output"]) for experiment in (charades, cifar, toy_video)]
ANY_PATH += [
    (predict.Config, ["video.mp4", "--weights"]),
    (predict.Config, ["--weights", "weights", "--picture", "a.png", "--page", "a.html"]),
    (predict.Config, ["video.mp4", "--weights", "weights", "--classes"]),
    (predict.Config, ["video.mp4", "--weights", "weights", "--picture"]),
    (predict.Config, ["video.mp4", "--weights", "weights", "--page"]),
    (report.Config, ["runs/a"]),
    (report.Config, ["runs/a", "--output"]),
    (data_commands.Check, []),
    (data_commands.Check, ["list.txt", "--root"]),
    (data_commands.Check, ["list.txt", "--classes"]),
    (data_commands.Index, []),
    (data_commands.Index, ["videos", "--out"]),
    (weight_commands.Inspect, ["--file"]),
    (weight_commands.Convert, ["--file", "weights", "--out"]),
]
LOCAL_PATH = [
    (cifar.Config, ["--data-dir"]),
    (toy_video.Config, ["--readme"]),
    (data_commands.Transcode, ["list.txt"]),
    (data_commands.StandIn, []),
]


def values(config):
    for value in (getattr(config, field.name) for field in dataclasses.fields(config)):
        yield from value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize(("config", "words"), ANY_PATH)
def test_a_url_is_kept(config, words):
    parsed = tyro.cli(config, args=[*words, URL])
    assert RemotePath(URL) in list(values(parsed))
    assert f'"{URL}"' in json.dumps(dataclasses.asdict(parsed), default=str)
    local = tyro.cli(config, args=[*words, "runs/b"])
    assert Path("runs/b") in list(values(local))


@pytest.mark.parametrize(("config", "words"), LOCAL_PATH)
def test_a_url_is_refused(config, words, capsys):
    with pytest.raises(SystemExit):
        tyro.cli(config, args=[*words, URL])
    assert f"must be local; got {URL}." in capsys.readouterr().err


def test_a_missing_package_is_reported(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    remote_paths._check_protocol.cache_clear()
    with pytest.raises(SystemExit):
        tyro.cli(kinetics.Config, args=["--output", "gs://bucket"])
    assert "pip install gcsfs." in " ".join(capsys.readouterr().err.split())


def test_a_wrong_url_is_reported(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(kinetics.Config, args=["--output", "nosuch://bucket"])
    assert "such as gs:// or s3://; got nosuch://." in " ".join(capsys.readouterr().err.split())
