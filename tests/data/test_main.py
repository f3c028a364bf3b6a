"""`python -m nonlocal_jax.data` on real files."""

import numpy as np
import pytest

from nonlocal_jax.data import annotations, stand_in, transcode
from nonlocal_jax.data.__main__ import main
from nonlocal_jax.data.video import Video


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    return stand_in.make(folder, "kinetics", numbers={"train": 6, "test": 3})


def test_check(made, capsys):
    assert main(["check", str(made["test"])]) == 0
    assert "3, 3 of them decoded" in capsys.readouterr().out
    assert main(["check", str(made["train"]), "--num-classes", "6"]) == 1
    out = capsys.readouterr().out
    assert "2 videos" in out
    assert "damaged.mp4: no video that can be read" in out
    assert main(["check", str(made["train"]), "--num-classes", "5"]) == 2
    assert "line 6: labels must be from 0 to 4; got 5" in capsys.readouterr().err
    assert main(["check", str(made["train"]), "--sample", "1"]) == 0  # the third


def test_index(made, tmp_path, capsys):
    for record in annotations.read(made["test"]).records:
        folder = tmp_path / f"class {record.labels[0]}"
        folder.mkdir(exist_ok=True)
        (folder / record.path.name).symlink_to(record.path)
    assert main(["index", str(tmp_path)]) == 0
    found = annotations.read(tmp_path / "list.txt", classes=tmp_path / "classes.txt")
    assert [record.path.name for record in found.records] == ["test0000.mp4", "test0001.mp4", "test0002.mp4"]
    assert found.names == ("class 0", "class 1", "class 2")
    assert main(["index", str(tmp_path)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_transcode(made, tmp_path, capsys):
    out = tmp_path / "small"
    command = ["transcode", str(made["train"]), str(out), "--shorter", "32", "--keyframes", "8"]
    assert main(command) == 1
    shown = capsys.readouterr().out
    assert "6 videos in" in shown
    assert "2 could not be copied" in shown
    before, after = annotations.read(made["train"]), annotations.read(out / "train.txt")
    assert [record.labels for record in after.records] == [record.labels for record in before.records[:6]]
    for old, new in zip(before.records[:6], after.records, strict=True):
        with Video(old.path) as one, Video(new.path) as other:
            assert len(one) == len(other)
            np.testing.assert_allclose(one.seconds(np.arange(len(one))), other.seconds(np.arange(len(one))), atol=1e-4)
            shown_large, shown_small = one.read([3])[0], other.read([3])[0]
            assert min(shown_small.shape[:2]) == 32
            assert (shown_large.shape[0] > shown_large.shape[1]) == (shown_small.shape[0] > shown_small.shape[1])
            assert np.abs(shown_large.mean((0, 1)) - shown_small.mean((0, 1))).max() < 4
            assert np.diff(other.timeline.keyframes).max() <= 8 * np.diff(other.timeline.times).max()
    assert not list(out.glob("*.partial"))


def test_transcoding_goes_on_where_it_was(made, tmp_path, monkeypatch):
    out = tmp_path / "small"
    assert main(["transcode", str(made["test"]), str(out), "--shorter", "32"]) == 0
    (out / "test0001.mp4").unlink()
    (out / "test0001.mp4.partial").write_bytes(b"half of it")  # as a kill leaves it
    done, copy = [], transcode.transcode
    monkeypatch.setattr(
        transcode, "transcode", lambda source, target, **options: (done.append(target.name), copy(source, target, **options))
    )
    assert main(["transcode", str(made["test"]), str(out), "--shorter", "32"]) == 0
    assert done == ["test0001.mp4"]
    assert sorted(file.name for file in out.iterdir()) == ["test.txt", "test0000.mp4", "test0001.mp4", "test0002.mp4"]


def test_irregular_times_are_kept(tmp_path):
    times = np.cumsum(np.random.default_rng(0).uniform(0.02, 0.2, 20)).tolist()
    frames = np.random.default_rng(0).integers(0, 255, (20, 32, 48, 3), dtype=np.uint8)
    stand_in.write(tmp_path / "old.mkv", frames, times=times)
    transcode.transcode(tmp_path / "old.mkv", tmp_path / "new.mp4", shorter=16)
    with Video(tmp_path / "new.mp4") as video:
        np.testing.assert_allclose(video.seconds(np.arange(20)), np.subtract(times, times[0]), atol=2e-3)


def test_the_stand_in(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stand_in, "NUMBER", {"train": 2, "test": 1})
    assert main(["stand-in", str(tmp_path), "--kind", "charades"]) == 0
    lists = capsys.readouterr().out.split()
    assert [annotations.read(tmp_path / name, num_classes=6).multi_label for name in ("train.csv", "test.csv")] == [True, True]
    assert lists == [str(tmp_path / "train.csv"), str(tmp_path / "test.csv")]


def test_wrong_arguments(made, tmp_path, capsys):
    assert main(["check", str(tmp_path / "none.txt")]) == 2
    assert "none.txt cannot be read: No such file" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["transcode", str(made["test"]), str(tmp_path), "--crf", "60"])
    assert "shorter must be at least 2" in capsys.readouterr().err
