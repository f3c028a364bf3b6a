"""`python -m nonlocal_jax.data` on video files."""

import itertools

import av
import numpy as np
import pytest

from nonlocal_jax.data import annotations, stand_in, transcode
from nonlocal_jax.data.__main__ import main
from nonlocal_jax.data.video import Video, Window
from nonlocal_jax.terminal import printable


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    return stand_in.make(folder, "kinetics", numbers={"train": 6, "test": 3})


def test_check(lists, capsys):
    assert main(["check", str(lists["test"])]) == 0
    assert "3, 3 of them decoded" in capsys.readouterr().out
    assert main(["check", str(lists["train"]), "--num-classes", "6"]) == 1
    output = capsys.readouterr().out
    assert "2 videos" in output
    assert "damaged.mp4: not a video that can be read" in output
    assert main(["check", str(lists["train"]), "--num-classes", "5"]) == 2
    assert "line 6: labels must be from 0 to 4; got 5" in capsys.readouterr().err
    assert main(["check", str(lists["train"]), "--sample", "1"]) == 0  # a readable one is chosen


def test_index(lists, tmp_path, capsys):
    for record in annotations.read(lists["test"]).records:
        folder = tmp_path / f"class {record.labels[0]}"
        folder.mkdir(exist_ok=True)
        (folder / record.path.name).symlink_to(record.path)
    assert main(["index", str(tmp_path)]) == 0
    videos = annotations.read(tmp_path / "list.txt", classes=tmp_path / "classes.txt")
    names = [record.path.name for record in videos.records]
    assert names == ["test0000.mp4", "test0001.mp4", "test0002.mp4"]
    assert videos.names == ("class 0", "class 1", "class 2")
    assert main(["index", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_transcode(lists, tmp_path, capsys):
    folder = tmp_path / "small"
    options = ["--shorter", "32", "--keyframes", "8"]
    assert main(["transcode", str(lists["train"]), str(folder), *options]) == 1
    output = capsys.readouterr().out
    assert "6 videos in" in output
    assert "2 could not be copied" in output
    originals = annotations.read(lists["train"]).records[:6]
    copies = annotations.read(folder / "train.txt").records
    assert [copy.labels for copy in copies] == [original.labels for original in originals]
    for original, copy in zip(originals, copies, strict=True):
        with Video(original.path) as large, Video(copy.path) as small:
            assert len(large) == len(small)
            indices = np.arange(len(large))
            np.testing.assert_allclose(large.seconds(indices), small.seconds(indices), atol=1e-4)
            large_frame, small_frame = large.read([3])[0], small.read([3])[0]
            assert min(small_frame.shape[:2]) == 32
            is_portrait = large_frame.shape[0] > large_frame.shape[1]
            assert is_portrait == (small_frame.shape[0] > small_frame.shape[1])
            assert np.abs(large_frame.mean((0, 1)) - small_frame.mean((0, 1))).max() < 4
            longest_step = np.diff(small.timeline.times).max()
            assert np.diff(small.timeline.keyframes).max() <= 8 * longest_step
    assert not list(folder.glob(".*"))


def test_transcoding_can_be_resumed(lists, tmp_path):
    folder = tmp_path / "small"
    command = ["transcode", str(lists["test"]), str(folder), "--shorter", "32"]
    assert main(command) == 0
    versions = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.mp4")}
    (folder / "test0001.mp4").unlink()
    (folder / ".test0001.mp4.0a1b2c3d.partial").write_bytes(b"half")  # left by a killed process
    assert main(command) == 0
    names = ["test.txt", "test0000.mp4", "test0001.mp4", "test0002.mp4"]
    assert sorted(file.name for file in folder.iterdir()) == names
    changed = [name for name in versions if (folder / name).stat().st_mtime_ns != versions[name]]
    assert changed == ["test0001.mp4"]


def test_copies_replace_neither_lists_nor_originals_nor_each_other(lists, tmp_path, capsys):
    folder = lists["test"].parent
    contents = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert main(["transcode", str(lists["test"]), str(folder)]) == 2
    assert "would be replaced by a copy; choose another folder" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == contents
    for suffix in ("mp4", "mkv"):
        stand_in.write(tmp_path / f"a.{suffix}", np.zeros((3, 16, 16, 3), np.uint8))
    (tmp_path / "list.txt").write_text("a.mp4 0\na.mkv 1\n")
    assert main(["transcode", str(tmp_path / "list.txt"), str(tmp_path / "small")]) == 2
    assert "would have the same copy" in capsys.readouterr().err


def test_copies_keep_their_relative_paths(tmp_path, monkeypatch):
    """Also if the list or the root has `..` in its path."""
    monkeypatch.chdir(tmp_path)
    lists, videos = tmp_path / "lists", tmp_path / "videos"
    lists.mkdir()
    videos.mkdir()
    stand_in.write(videos / "a.mkv", np.zeros((3, 16, 16, 3), np.uint8))
    command = ["transcode", "lists/list.txt", "small", "--root", "lists/..", "--shorter", "16"]
    (lists / "list.txt").write_text("../videos/a.mkv 0\n")
    assert main(command) == 2  # outside of the root
    (lists / "list.txt").write_text("videos/a.mkv 0\n")
    assert main(command) == 0
    assert (tmp_path / "small" / "list.txt").read_text() == "videos/a.mp4 0\n"
    assert (tmp_path / "small" / "videos" / "a.mp4").is_file()
    (tmp_path / "small" / "videos" / "a.mp4").rename(videos / "a.mp4")
    (lists / "charades").write_text("id,actions,length\na,c001 0.00 1.00,2.0\n")
    options = ["--root", "lists/../videos", "--shorter", "16"]
    assert main(["transcode", "lists/charades", "copies", *options]) == 0
    (record,) = annotations.read(tmp_path / "copies" / "charades").records
    assert record.actions == (annotations.Action(1, 0.0, 1.0),)


@pytest.mark.parametrize(
    ("pixels", "options"), [("yuvj420p", {}), ("yuv420p", {"x264-params": "fullrange=on"})]
)
def test_colours_are_kept_in_full_and_limited_range(tmp_path, pixels, options):
    ramp = np.linspace(0, 255, 64).astype(np.uint8)[:, None]
    frames = np.broadcast_to(ramp, (5, 32, 64, 3))
    with av.open(str(tmp_path / "full.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "1", **options})
        stream.width, stream.height, stream.pix_fmt = 64, 32, pixels
        stream.codec_context.color_range = 2
        for pixels_of_frame in frames:
            rgb = np.ascontiguousarray(pixels_of_frame)
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            container.mux(stream.encode(frame.reformat(format=pixels, dst_color_range=2)))
        container.mux(stream.encode())
    transcode.transcode(tmp_path / "full.mkv", tmp_path / "small.mp4", shorter=32, crf=1)
    for name in ("full.mkv", "small.mp4"):
        with Video(tmp_path / name) as video:
            whole = video.read([2])[0]
            half = video.read([2], lambda h, w: Window(0, 0, h, w // 2, (h, w // 2)))[0]
        assert np.abs(whole.astype(int) - frames[2]).max() <= 6
        assert np.abs(half.astype(int) - frames[2, :, :32]).max() <= 6


@pytest.mark.parametrize("shorter", [64, 32])
def test_interlaced_files_stay_interlaced(tmp_path, shorter):
    """A fast vertical edge is at another place in each field, and so are its colours."""
    frames = np.zeros((12, 64, 96, 3), np.uint8)
    for t, field in itertools.product(range(len(frames)), (0, 1)):
        frames[t, field::2, : (14 * t + 7 * field) % 96] = (220, 40, 20)
    options = {"flags": "+ildct+ilme", "x264-params": "tff=1", "crf": "1"}
    stand_in.write(tmp_path / "fields.mp4", frames, options=options)
    transcode.transcode(tmp_path / "fields.mp4", tmp_path / "new.mp4", shorter=shorter, crf=1)
    with Video(tmp_path / "fields.mp4") as source, Video(tmp_path / "new.mp4") as target:
        original, copy = source.read(range(12)).astype(int), target.read(range(12)).astype(int)
        assert next(target.decode([3]))[1].interlaced_frame
    if shorter == 64:
        assert np.abs(original - copy).mean() < 2
    for field in (0, 1):
        original_mean, copy_mean = (v[:, field::2].mean((1, 2)) for v in (original, copy))
        assert np.abs(original_mean - copy_mean).max() < 3


def test_copies_of_files_without_display_times(tmp_path):
    """Frames that become brighter keep their order. AVI has only their decoding times."""
    brightness = np.arange(40, 220, 6, dtype=np.uint8)[:, None, None, None]
    frames = np.broadcast_to(brightness, (30, 32, 48, 3))
    noise = np.random.default_rng(0).integers(0, 30, frames.shape, dtype=np.uint8)
    options = {"x264-params": "bframes=2:b-adapt=0:scenecut=0:weightp=0"}
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
        expected = np.subtract(times, times[0])
        np.testing.assert_allclose(video.seconds(np.arange(20)), expected, atol=2e-3)


def test_the_stand_in(tmp_path, capsys):
    options = ["--kind", "charades", "--train", "2", "--test", "1"]
    assert main(["stand-in", str(tmp_path), *options]) == 0
    files = [tmp_path / "train.csv", tmp_path / "test.csv"]
    assert capsys.readouterr().out.split() == [str(file) for file in files]
    videos = [annotations.read(file, num_classes=6) for file in files]
    assert [split.multi_label for split in videos] == [True, True]
    assert [len(split) for split in videos] == [2 + 2, 1]  # with a damaged file and one of sound


def test_wrong_arguments(lists, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["check", str(lists["test"]), "--sample", "-1"])
    assert "sample must be at least 1; got -1" in capsys.readouterr().err
    assert main(["check", str(tmp_path / "none.txt")]) == 2
    assert "none.txt cannot be read: No such file" in capsys.readouterr().err
    for option, value, message in (
        ("--crf", "60", "crf must be from 0 to 51; got 60"),
        ("--shorter", "1", "shorter must be at least 2; got 1"),
        ("--keyframes", "0", "keyframes must be at least 1; got 0"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["transcode", str(lists["test"]), str(tmp_path), option, value])
        assert message in capsys.readouterr().err


NAMES = ("[dQw4w9WgXcQ]", "[red]a", "[\u202egnp]", "\x1b[2J\x1b]0;title\x07", "\x9b2J")


@pytest.mark.parametrize("name", NAMES)
def test_names_are_shown_as_they_are(name, tmp_path, monkeypatch, capsys):
    """Neither the markup of rich nor control characters have an effect."""
    monkeypatch.chdir(tmp_path)
    shown = printable(name)
    (tmp_path / name / "class").mkdir(parents=True)
    (tmp_path / name / "class" / f"{name}.mp4").write_bytes(b"no video")
    (tmp_path / name / "empty").mkdir()
    (tmp_path / "lists").mkdir()

    def run(*words):
        code = main(words)
        captured = capsys.readouterr()
        output = captured.out + captured.err
        assert output.replace("\n", "").isprintable()
        return code, output

    code, output = run("index", name, "--out", f"lists/{name}.txt")
    assert code == 0
    assert f": lists/{shown}.txt, " in output
    assert f"relative to {shown}; read the list with --root {shown}\n" in output
    assert f"{shown}/empty has no video" in output
    for words in ((name,), (f"lists/{name}.txt", "--root", name)):
        code, output = run("check", *words)
        assert code == 1
        assert f"{printable(words[0])} " in output  # the title of the table
        assert f"{shown}/class/{shown}.mp4: not a video" in output
    code, output = run("index", name, "--out", f"lists/{name}.txt")
    assert code == 2
    assert f"error: lists/{shown}.txt exists already" in output
    code, output = run("check", f"lists/{name}.txt")
    assert code == 2
    assert f"there is no file {tmp_path}/lists/class/{shown}.mp4" in output
    assert run("check", f"{name}/none.txt")[1].startswith(f"error: {shown}/none.txt cannot be read")


@pytest.mark.parametrize("name", ["[/x]", "[/]", "[bold", "\\[a]"])
def test_markup_that_rich_cannot_read(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)  # "[/x]" is a file in a folder
    stand_in.write(tmp_path / "a.mp4", np.zeros((3, 16, 16, 3), np.uint8))
    (tmp_path / f"{name}.txt").write_text(f"{tmp_path}/a.mp4 0\n")
    assert main(["check", f"{name}.txt"]) == 0
    assert f"{name}.txt" in capsys.readouterr().out
    assert main(["transcode", f"{name}.txt", f"{name} small", "--shorter", "16"]) == 0
    assert f"1 videos in {name} small" in capsys.readouterr().out
