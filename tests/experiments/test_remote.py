"""Experiments whose lists, weights and results are at remote paths."""

import json

import pytest

from experiments import kinetics, report
from experiments.shared.fingerprints import digest_of_list
from nonlocal_jax.data import annotations
from nonlocal_jax.remote_paths import RemotePath


def test_a_list_has_the_same_digest_wherever_it_lies(lists, copied):
    """Otherwise a run could not be resumed after its videos were moved to a bucket."""
    local_list = lists["kinetics"]["test"]
    remote = copied(local_list.parent)
    digest = digest_of_list(annotations.read(local_list))
    assert digest_of_list(annotations.read(remote / local_list.name)) == digest
    mixed = remote / "mixed.txt"
    mixed.write_text(f"{remote}/test0000.mp4 0\n{local_list.parent}/test0001.mp4 0\n")
    assert digest_of_list(annotations.read(mixed)) != digest
    moved = annotations.read(remote / local_list.name)
    moved.records[2].path.write_bytes(b"other content")
    assert digest_of_list(moved) != digest


def test_a_report_of_remote_runs(finished_run, copied, remote):
    local_run, _ = finished_run
    copied(local_run)
    report.main(report.Config(runs=(remote, local_run), output=remote / "report"))
    assert (remote / "report/results.md").read_text().count("| kinetics: ") == 1  # the same recipe
    assert (remote / "report/curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match=rf"error: {remote}/no must be the folder of a finished"):
        report.main(report.Config(runs=(remote / "no",)))


@pytest.mark.networks
def test_a_test_of_remote_weights_and_videos(finished_run, lists, video_options, copied, remote):
    local_run, _ = finished_run
    copied(lists["kinetics"]["test"].parent)
    (remote / "weights.safetensors").upload(local_run / "weights.safetensors")
    options = video_options("kinetics", val_list=remote / lists["kinetics"]["test"].name)
    config = kinetics.Config(
        output=remote / "run", init=remote / "weights.safetensors", test_only=True, **options
    )
    kinetics.main(config)
    (folder,) = (remote / "run").glob("test-*")
    (local_folder,) = local_run.glob("test-*")
    assert folder.name == local_folder.name  # of the same weights and videos
    tested, expected = (
        json.loads((path / "results.json").read_text())["tested_with"]
        for path in (folder, local_folder)
    )
    assert tested == expected
    assert (folder / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_videos_are_not_made_in_a_remote_folder(remote):
    with pytest.raises(SystemExit, match=rf"--output must be a local folder .*; got {remote}\."):
        kinetics.main(kinetics.Config(output=remote))


def test_a_run_where_no_checkpoint_can_be_written(video_options, remote):
    with pytest.raises(
        SystemExit, match=r"error: checkpoints must be in a local directory or at gs"
    ):
        kinetics.main(kinetics.Config(output=remote, **video_options("kinetics")))


def test_missing_weights(video_options, remote):
    config = kinetics.Config(output=remote, init=remote / "no.pkl", **video_options("kinetics"))
    with pytest.raises(SystemExit, match=rf"--init must name a file of weights; .* no {remote}/no"):
        kinetics.main(config)
    config = kinetics.Config(init=RemotePath("unreachable://bucket/a.pkl"))
    with pytest.raises(SystemExit, match=r"error: .*no connection"):
        kinetics.main(config)
