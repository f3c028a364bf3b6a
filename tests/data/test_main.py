"""`python -m nonlocal_jax.data` on real files."""

import av
import numpy as np
import pytest

from nonlocal_jax.data import annotations, stand_in, transcode
from nonlocal_jax.data.__main__ import main
from nonlocal_jax.data.convert import Window
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
    assert [record.path.name for record in found.records] == [
        "test0000.mp4",
        "test0001.mp4",
        "test0002.mp4",
    ]
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
    assert [record.labels for record in after.records] == [
        record.labels for record in before.records[:6]
    ]
    for old, new in zip(before.records[:6], after.records, strict=True):
        with Video(old.path) as one, Video(new.path) as other:
            assert len(one) == len(other)
            np.testing.assert_allclose(
                one.seconds(np.arange(len(one))), other.seconds(np.arange(len(one))), atol=1e-4
            )
            shown_large, shown_small = one.read([3])[0], other.read([3])[0]
            assert min(shown_small.shape[:2]) == 32
            assert (shown_large.shape[0] > shown_large.shape[1]) == (
                shown_small.shape[0] > shown_small.shape[1]
            )
            assert np.abs(shown_large.mean((0, 1)) - shown_small.mean((0, 1))).max() < 4
            assert (
                np.diff(other.timeline.keyframes).max() <= 8 * np.diff(other.timeline.times).max()
            )
    assert not list(out.glob("*.partial"))


def test_transcoding_goes_on_where_it_was(made, tmp_path, monkeypatch):
    out = tmp_path / "small"
    assert main(["transcode", str(made["test"]), str(out), "--shorter", "32"]) == 0
    (out / "test0001.mp4").unlink()
    (out / "test0001.mp4.partial").write_bytes(b"half of it")  # as a kill leaves it
    done, copy = [], transcode.transcode
    monkeypatch.setattr(
        transcode,
        "transcode",
        lambda source, target, **options: (
            done.append(target.name),
            copy(source, target, **options),
        ),
    )
    assert main(["transcode", str(made["test"]), str(out), "--shorter", "32"]) == 0
    assert done == ["test0001.mp4"]
    assert sorted(file.name for file in out.iterdir()) == [
        "test.txt",
        "test0000.mp4",
        "test0001.mp4",
        "test0002.mp4",
    ]


def test_copies_replace_nothing(made, tmp_path, capsys):
    """Neither their list, nor what they are of, nor each other."""
    before = {file.name: file.read_bytes() for file in made["test"].parent.iterdir()}
    assert main(["transcode", str(made["test"]), str(made["test"].parent)]) == 2
    assert "would be replaced by a copy; name another folder" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in made["test"].parent.iterdir()} == before
    for suffix in ("mp4", "mkv"):
        stand_in.write(tmp_path / f"a.{suffix}", np.zeros((3, 16, 16, 3), np.uint8))
    (tmp_path / "list.txt").write_text("a.mp4 0\na.mkv 1\n")
    assert main(["transcode", str(tmp_path / "list.txt"), str(tmp_path / "small")]) == 2
    assert "a.mp4 and" in capsys.readouterr().err


def test_copies_lie_as_their_originals_do(made, tmp_path, monkeypatch):
    """Also where list or root have `..` in them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lists").mkdir()
    (tmp_path / "videos").mkdir()
    stand_in.write(tmp_path / "videos" / "a.mkv", np.zeros((3, 16, 16, 3), np.uint8))
    (tmp_path / "lists" / "list.txt").write_text("../videos/a.mkv 0\n")
    (tmp_path / "lists" / "charades").write_text("id,actions,length\na,c001 0.00 1.00,2.0\n")
    assert (
        main(["transcode", "lists/list.txt", "small", "--root", "lists/..", "--shorter", "16"]) == 2
    )  # outside
    (tmp_path / "lists" / "list.txt").write_text("videos/a.mkv 0\n")
    assert (
        main(["transcode", "lists/list.txt", "small", "--root", "lists/..", "--shorter", "16"]) == 0
    )
    assert (tmp_path / "small" / "list.txt").read_text() == "videos/a.mp4 0\n"
    assert (tmp_path / "small" / "videos" / "a.mp4").is_file()
    (tmp_path / "small" / "videos" / "a.mp4").rename(tmp_path / "videos" / "a.mp4")
    assert (
        main(
            ["transcode", "lists/charades", "other", "--root", "lists/../videos", "--shorter", "16"]
        )
        == 0
    )
    assert annotations.read(tmp_path / "other" / "charades").records[0].actions == (
        annotations.Action(1, 0.0, 1.0),
    )


@pytest.mark.parametrize(
    ("pixels", "options"), [("yuvj420p", {}), ("yuv420p", {"x264-params": "fullrange=on"})]
)
def test_colours_are_kept_whatever_their_range(tmp_path, pixels, options):
    ramp = np.broadcast_to(np.linspace(0, 255, 64).astype(np.uint8)[:, None], (5, 32, 64, 3))
    with av.open(str(tmp_path / "full.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "1", **options})
        stream.width, stream.height, stream.pix_fmt = 64, 32, pixels
        stream.codec_context.color_range = 2
        for frame in ramp:
            full = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(full.reformat(format=pixels, dst_color_range=2)))
        container.mux(stream.encode())
    transcode.transcode(tmp_path / "full.mkv", tmp_path / "small.mp4", shorter=32, crf=1)
    for name in ("full.mkv", "small.mp4"):
        with Video(tmp_path / name) as video:
            assert np.abs(video.read([2])[0].astype(int) - ramp[2]).max() <= 6
            part = video.read(
                [2], lambda height, width: Window(0, 0, height, width // 2, (height, width // 2))
            )[0]
            assert np.abs(part.astype(int) - ramp[2, :, :32]).max() <= 6


@pytest.mark.parametrize("shorter", [64, 32])
def test_interlaced_files_stay_interlaced(tmp_path, shorter):
    """A vertical edge that moves quickly lies elsewhere in each field; and its colour with it."""
    frames = np.zeros((12, 64, 96, 3), np.uint8)
    for t, frame in enumerate(frames):
        for field in (0, 1):
            frame[field::2, : (14 * t + 7 * field) % 96] = (220, 40, 20)
    options = {"flags": "+ildct+ilme", "x264-params": "tff=1", "crf": "1"}
    stand_in.write(tmp_path / "fields.mp4", frames, options=options)
    transcode.transcode(tmp_path / "fields.mp4", tmp_path / "new.mp4", shorter=shorter, crf=1)
    with Video(tmp_path / "fields.mp4") as one, Video(tmp_path / "new.mp4") as other:
        whole, copy = one.read(range(12)).astype(int), other.read(range(12)).astype(int)
        assert next(other.decode([3]))[1].interlaced_frame
    if shorter == 64:
        assert np.abs(whole - copy).mean() < 2
    for field in (0, 1):
        assert np.abs(whole[:, field::2].mean((1, 2)) - copy[:, field::2].mean((1, 2))).max() < 3


def test_files_that_do_not_tell_times(tmp_path):
    """Frames that become brighter stay in their order."""
    frames = np.broadcast_to(
        np.arange(40, 220, 6, dtype=np.uint8)[:, None, None, None], (30, 32, 48, 3)
    )
    noise = np.random.default_rng(0).integers(0, 30, frames.shape, dtype=np.uint8)
    options = {
        "x264-params": "bframes=2:b-adapt=0:scenecut=0:weightp=0"
    }  # of which AVI tells when they are decoded
    stand_in.write(tmp_path / "b_frames.avi", frames + noise, rate=20, options=options)
    transcode.transcode(tmp_path / "b_frames.avi", tmp_path / "new.mp4", shorter=32)
    with Video(tmp_path / "new.mp4") as video:
        np.testing.assert_allclose(video.seconds(np.arange(30)), np.arange(30) / 20, atol=1e-3)
        assert (np.diff(video.read(range(30)).mean((1, 2, 3))) > 0).all()


def test_irregular_times_are_kept(tmp_path):
    times = np.cumsum(np.random.default_rng(0).uniform(0.02, 0.2, 20)).tolist()
    frames = np.random.default_rng(0).integers(0, 255, (20, 32, 48, 3), dtype=np.uint8)
    stand_in.write(tmp_path / "old.mkv", frames, times=times)
    transcode.transcode(tmp_path / "old.mkv", tmp_path / "new.mp4", shorter=16)
    with Video(tmp_path / "new.mp4") as video:
        np.testing.assert_allclose(
            video.seconds(np.arange(20)), np.subtract(times, times[0]), atol=2e-3
        )


def test_the_stand_in(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stand_in, "NUMBER", {"train": 2, "test": 1})
    assert main(["stand-in", str(tmp_path), "--kind", "charades"]) == 0
    lists = capsys.readouterr().out.split()
    assert [
        annotations.read(tmp_path / name, num_classes=6).multi_label
        for name in ("train.csv", "test.csv")
    ] == [True, True]
    assert lists == [str(tmp_path / "train.csv"), str(tmp_path / "test.csv")]


def test_wrong_arguments(made, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["check", str(made["test"]), "--sample", "-1"])
    assert "sample must be at least 1; got -1" in capsys.readouterr().err
    assert main(["check", str(tmp_path / "none.txt")]) == 2
    assert "none.txt cannot be read: No such file" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["transcode", str(made["test"]), str(tmp_path), "--crf", "60"])
    assert "shorter must be at least 2" in capsys.readouterr().err
