"""Fixtures that several files of tests share."""

import contextlib
import io

import pytest

from experiments import kinetics
from nonlocal_jax.data import stand_in

OPTIONS = {
    "steps": 14,
    "batch_size": 4,
    "save_every": 4,
    "evaluate_every": 7,
    "unreadable": 0.2,
    "clips": 2,
}


@pytest.fixture(scope="session")
def lists(tmp_path_factory):
    """Lists of real video files of moving digits, by experiment and split."""
    folder = tmp_path_factory.mktemp("videos")
    counts = {"kinetics": {"train": 16, "test": 6}, "charades": {"train": 8, "test": 6}}
    return {
        kind: stand_in.make(folder / kind, kind, numbers=numbers)
        for kind, numbers in counts.items()
    }


@pytest.fixture(scope="session")
def video_options(lists):
    """Returns the options of a short run of an experiment."""

    def options(kind, **changes):
        files = {"train_list": lists[kind]["train"], "val_list": lists[kind]["test"]}
        return {**OPTIONS, **files, **changes}

    return options


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, video_options):
    """The folder of a finished run of `experiments.kinetics`, and what it printed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        kinetics.main(kinetics.Config(output=folder, **video_options("kinetics")))
    return folder, printed.getvalue()
