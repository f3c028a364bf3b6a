"""Lists and videos at remote paths are read like local ones."""

import json
import threading

import fsspec
import numpy as np
import pytest
from data.files import FILES, scene

from nonlocal_jax.data import DataError, VideoError, annotations, stand_in
from nonlocal_jax.data.__main__ import main
from nonlocal_jax.data.clips import REMOTE_THREADS, CentreClips, TrainingClips, Watch
from nonlocal_jax.data.decode import container
from nonlocal_jax.data.image_frames import ImageFrames
from nonlocal_jax.data.lists.formats import FRAME_LIST_HEADER
from nonlocal_jax.data.sampling import InSpace, InTime
from nonlocal_jax.data.video import Video
from nonlocal_jax.remote_paths import RemotePath

OFFICIAL = """label,youtube_id,time_start,time_end,split
abseiling,x1,5,15,train
air drumming,y2,0,10,train
"""
LISTS = {
    "list.txt": "a.mp4 3\nb c.mp4 0\n\ninside/d.mp4,2\n",
    "train.csv": OFFICIAL,
    "charades.csv": "id,actions,length\nAB12C,c092 11.10 21.50;c147 2 3.5,30\n",
    "frames.txt": f"{FRAME_LIST_HEADER}\nV 0 0 f/1.jpg 3\nV 0 1 f/2.jpg 4\n",
    "": "",  # the folder itself
}
VIDEOS = (
    "a.mp4",
    "b c.mp4",
    "inside/d.mp4",
    "abseiling/x1_000005_000015.mp4",
    "air_drumming/y2.mp4",
    "AB12C.mp4",
    "f/1.jpg",
    "f/2.jpg",
)


@pytest.fixture
def folder(tmp_path):
    for name in VIDEOS:
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"video")
    for name, text in LISTS.items():
        if name:
            (tmp_path / name).write_text(text)
    return tmp_path


def relative(path, folder):
    """The path in a folder; the name of a video that is a list of frames has none."""
    return str(path if str(path) == "V" else path.relative_to(folder))


@pytest.mark.parametrize("name", LISTS)
def test_every_format(name, folder, copied):
    remote = copied(folder)
    local_list = annotations.read(folder / name)
    remote_list = annotations.read(str(remote / name))
    assert len(remote_list) > 0
    for found, expected in zip(remote_list.records, local_list.records, strict=True):
        assert relative(found.path, remote) == relative(expected.path, folder)
        frames = [relative(frame, folder) for frame in expected.frames]
        assert [relative(frame, remote) for frame in found.frames] == frames
        assert found.frame_labels == expected.frame_labels
        assert (found.labels, found.actions, found.line) == (
            expected.labels,
            expected.actions,
            expected.line,
        )
    assert remote_list.names == local_list.names
    assert remote_list.format == local_list.format


def test_lists_name_files_elsewhere(folder, copied, tmp_path_factory):
    remote = copied(folder)
    text = f"{remote}/a.mp4 0\n{folder}/a.mp4 1\n"
    for place in (tmp_path_factory.mktemp("lists"), remote):
        (place / "mixed.txt").write_text(text)
        paths = [record.path for record in annotations.read(place / "mixed.txt").records]
        assert paths == [remote / "a.mp4", folder / "a.mp4"]
    (folder / "relative.txt").write_text("inside/d.mp4 1\n")
    found = annotations.read(folder / "relative.txt", root=remote)
    assert found.records[0].path == remote / "inside/d.mp4"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("../a.mp4 0", r"line 1: \.\./a.mp4 lies outside the root memory://.*/inside"),
        ("memory://other/d.mp4 0", r"line 1: .* lies outside the root"),
        ("/d.mp4 0", r"line 1: /d.mp4 lies outside the root"),
        ("e.mp4 0", r"line 1: there is no file memory://.*/inside/e.mp4"),
        ("nofolder/e.mp4 0", r"line 1: there is no file memory://.*/inside/nofolder/e.mp4"),
        ("nosuch://a/d.mp4 0", r"line 1: a remote path must start with .*; got nosuch://$"),
        ("d.mp4 0\nd.mp4 0", r"line 2: .*/inside/d.mp4 is on line 1 too"),
    ],
)
def test_wrong_lines(line, message, folder, copied):
    remote = copied(folder)
    (remote / "wrong.txt").write_text(line)
    with pytest.raises(DataError, match=message):
        annotations.read(remote / "wrong.txt", root=remote / "inside")


def test_wrong_lists(remote):
    with pytest.raises(DataError, match=r"memory://.*/no.txt cannot be read: No such file"):
        annotations.read(remote / "no.txt")
    with pytest.raises(OSError, match="no connection"):
        annotations.read("unreachable://bucket/list.txt")
    (remote / "empty/a.txt").write_text("")
    with pytest.raises(DataError, match=r"memory://.*/empty must have a folder for each class"):
        annotations.index(remote / "empty")
    (remote / "classes.txt").write_text("a\na\n")
    with pytest.raises(DataError, match=r"classes.txt must name each class once"):
        annotations.read_classes(str(remote / "classes.txt"))


def test_a_folder_is_listed_once(folder, copied, monkeypatch):
    remote = copied(folder)
    (remote / "long.txt").write_text("".join(f"many/{i}.mp4 0\n" for i in range(50)))
    for i in range(50):
        (remote / f"many/{i}.mp4").write_bytes(b"video")
    requests = []
    for name in ("ls", "info"):
        original = getattr(fsspec.implementations.memory.MemoryFileSystem, name)

        def counted(self, path, *arguments, original=original, **options):
            requests.append(path)
            return original(self, path, *arguments, **options)

        monkeypatch.setattr(fsspec.implementations.memory.MemoryFileSystem, name, counted)
    assert len(annotations.read(remote / "long.txt")) == 50
    assert len(requests) < 10


@pytest.mark.parametrize(
    "name", ["long_gop.mp4", "irregular.mkv", "mpeg4_b_frames.avi", "stream.ts", "hidden.webm"]
)
def test_frames_are_the_same(name, tmp_path, copied):
    FILES[name](tmp_path / name)
    remote = copied(tmp_path)
    with Video(tmp_path / name) as local_video, Video(str(remote / name)) as video:
        assert len(video) == len(local_video)
        assert video.rate == local_video.rate
        count = len(video)
        for indices in ([count - 1], [0, count // 2], np.arange(count)):
            expected = local_video.read(indices)
            np.testing.assert_array_equal(video.read(indices), expected)
        everything = np.arange(count)
        np.testing.assert_array_equal(video.seconds(everything), local_video.seconds(everything))


def test_images(tmp_path, copied):
    for number in range(2):
        FILES["one.mp4"](tmp_path / f"{number}.mp4")
    remote = copied(tmp_path)
    names = ("0.mp4", "1.mp4")
    with ImageFrames([remote / name for name in names]) as frames:
        found = frames.read([1, 0])
    with ImageFrames([tmp_path / name for name in names]) as frames:
        np.testing.assert_array_equal(found, frames.read([1, 0]))


def test_videos_that_cannot_be_read(remote, monkeypatch):
    (remote / "empty.mp4").write_bytes(b"")
    (remote / "text.mp4").write_text("no video")
    messages = {
        remote / "missing.mp4": "there is no such file",
        remote / "empty.mp4": "the file is empty",
        remote / "text.mp4": "not a video that can be read",
        RemotePath("unreachable://a/b.mp4"): "cannot be opened .*no connection",
    }
    for path, message in messages.items():
        with pytest.raises(VideoError, match=rf"{path}: {message}"), Video(path):
            pass
    monkeypatch.setattr(container, "MAX_REMOTE_BYTES", 7)
    with (
        pytest.raises(VideoError, match=r"may have up to 7 bytes; got 8\. Copy it"),
        Video(remote / "text.mp4"),
    ):
        pass


def test_a_remote_video_opens_no_local_file(tmp_path, copied):
    """A playlist that names a local file is refused, whatever its suffix."""
    stand_in.write(tmp_path / "secret.mp4", scene(3, 48, 64))
    for name, text in {
        "list.mp4": f"ffconcat version 1.0\nfile {tmp_path}/secret.mp4\n",
        "list.m3u8": f"#EXTM3U\n#EXTINF:1,\nfile:{tmp_path}/secret.mp4\n#EXT-X-ENDLIST\n",
    }.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(VideoError, match="not a video"), Video(copied(tmp_path) / name):
            pass


def test_clips_of_remote_videos(tmp_path, copied):
    lists = stand_in.make(tmp_path, "kinetics", numbers={"train": 3, "test": 3})
    remote = copied(tmp_path)
    local_videos = annotations.read(lists["test"])
    videos = annotations.read(remote / lists["test"].name)
    clip, crop = InTime(8, 2), InSpace(32, (36, 44))
    readers = (
        lambda videos: TrainingClips(videos, clip, crop, seed=3),
        lambda videos: CentreClips(videos, clip, 32, 36),
    )
    for reader in readers:
        batch, expected = (
            reader(each).read(np.array([2, 0, 1])) for each in (videos, local_videos)
        )
        assert list(batch["failure"]) == ["", "", ""]
        np.testing.assert_array_equal(batch["inputs"], expected["inputs"])
        np.testing.assert_array_equal(batch["labels"], expected["labels"])


def test_remote_videos_are_fetched_by_more_threads_than_cores(tmp_path, copied, monkeypatch):
    """All threads of the readers meet while they fetch, which fewer threads could not."""
    stand_in.write(tmp_path / "a.mp4", scene(4, 48, 64))
    remote = copied(tmp_path)
    count = 2 * REMOTE_THREADS
    meeting = threading.Barrier(count, timeout=60)
    original = RemotePath.read_bytes

    def read_bytes(self, end=None):
        meeting.wait()
        return original(self, end)

    monkeypatch.setattr(RemotePath, "read_bytes", read_bytes)
    videos = annotations.Annotations((annotations.Record(remote / "a.mp4", (0,)),), 1)
    reader = TrainingClips(videos, InTime(2, 1), InSpace(32, (36, 44)), threads=2)
    assert list(reader.read(np.zeros(count, int))["failure"]) == [""] * count


def test_unreadable_videos_are_logged(remote):
    log = remote / "unreadable.jsonl"
    said = []
    for reason, record in (("a", 3), ("b", 5), ("again", 3)):
        watch = Watch(10, 0.5, said.append, log)
        batch = {"record": np.array([record]), "failure": np.array([reason])}
        assert list(watch([batch])) == [{}]
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert rows == [{"record": 3, "failure": "a"}, {"record": 5, "failure": "b"}]
    assert len(said) == 2


def test_commands(tmp_path, copied, remote, capsys):
    lists = stand_in.make(tmp_path / "videos", "kinetics", numbers={"train": 2, "test": 3})
    copied(tmp_path)
    remote_list = str(remote / "videos" / lists["test"].name)
    assert main(["check", remote_list]) == 0
    assert "3, 3 of them decoded" in capsys.readouterr().out
    small = tmp_path / "small"
    assert main(["transcode", remote_list, str(small), "--shorter", "32"]) == 0
    copies = annotations.read(small / lists["test"].name).records
    originals = annotations.read(lists["test"]).records
    assert [record.labels for record in copies] == [record.labels for record in originals]
    with Video(copies[0].path) as copy, Video(originals[0].path) as original:
        assert len(copy) == len(original)
    assert main(["check", f"{remote}/no.txt"]) == 2
    assert f"error: {remote}/no.txt cannot be read" in capsys.readouterr().err
    (remote / "classes/one/a.mp4").write_bytes(b"video")
    (remote / "classes/two/b.mp4").write_bytes(b"video")
    assert main(["index", f"{remote}/classes"]) == 0
    assert (remote / "classes/list.txt").read_text() == "one/a.mp4 0\ntwo/b.mp4 1\n"
    assert (remote / "classes/classes.txt").read_text() == "one\ntwo\n"


def test_csv_lists_are_copied(folder, copied, tmp_path_factory):
    """A list of Kinetics has no file names, so that the list of the copies is the same."""
    remote = copied(folder)
    for name in ("abseiling/x1_000005_000015.mp4", "air_drumming/y2.mp4"):
        stand_in.write(folder / name, scene(4, 48, 64))
    copied(folder)
    out = tmp_path_factory.mktemp("out")
    assert main(["transcode", str(remote / "train.csv"), str(out), "--shorter", "32"]) == 0
    assert (out / "train.csv").read_text() == OFFICIAL
    assert (out / "air_drumming/y2.mp4").is_file()


def test_local_folders_are_not_listed(folder):
    lookup = annotations.Folders(folder, None)
    assert lookup.has(folder / "a.mp4")
    assert not lookup.has(folder / "z.mp4")
    assert lookup.listings == {}
