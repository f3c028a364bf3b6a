"""Damaged videos and damaged logs of them are read, or raise `VideoError` with the file's name."""

import json

import numpy as np
import pytest
from damage.mutation import outcomes
from data.files import encode, scene, set_display_matrix

from nonlocal_jax.data import VideoError, stand_in
from nonlocal_jax.data.annotations import Annotations, Record
from nonlocal_jax.data.clips import CentreClips, TestingClips, Watch
from nonlocal_jax.data.sampling import InTime
from nonlocal_jax.data.transcode import transcode
from nonlocal_jax.data.video import Video, Window


def write_mirrored(file):
    stand_in.write(file, scene(12, 32, 48), options={"g": "5", "bf": "2"})
    set_display_matrix(file, (0, 1, 1, 0))


VIDEOS = {
    "a.mp4": write_mirrored,
    "a.webm": lambda f: encode(
        f,
        scene(12, 32, 48),
        "libvpx",
        options={"g": "5", "deadline": "realtime"},
        rate=1000,
        times=np.cumsum(np.arange(12)) / 100,
    ),
    "a.mkv": lambda f: encode(f, scene(12, 32, 48), "mpeg4", options={"g": "5"}),
    "a.avi": lambda f: encode(f, scene(12, 32, 48), "mpeg4", options={"g": "5", "bf": "2"}),
    "a.ts": lambda f: encode(f, scene(12, 32, 48), "mpeg2video", options={"g": "5", "bf": "2"}),
}


def read_frames(path):
    """Reads a file in every way that the library offers."""
    with Video(path) as video:
        count = len(video)
        seconds = video.seconds(np.arange(count))
        assert np.isfinite(seconds).all()
        assert 0 < video.rate < np.inf
        video.read([count - 1, 0, count // 2])
        video.read([count // 3], lambda h, w: Window(0, 0, h, w, (16, 16)))


def read_clips(path):
    videos = Annotations((Record(path, (0,)),), 1)
    in_time = InTime(4, 2, fps=10.0)
    failure = CentreClips(videos, in_time, 8, 8, threads=1).read(np.array([0]))["failure"][0]
    assert not failure or path.name in failure
    for view in TestingClips(videos, in_time, clips=2, size=16).read(0):
        assert view.shape == (4, 16, 16, 3)


def copy_video(path):
    transcode(path, path.with_name("copy.mp4"), shorter=16)
    with Video(path.with_name("copy.mp4")) as video:
        video.read(range(len(video)))


@pytest.fixture(scope="module", params=VIDEOS)
def undamaged(request, tmp_path_factory):
    """The name of a video and its content."""
    file = tmp_path_factory.mktemp("whole") / request.param
    VIDEOS[request.param](file)
    return request.param, file.read_bytes()


@pytest.mark.parametrize("read", [read_frames, read_clips, copy_video])
def test_damaged_videos(tmp_path, mutated_files, undamaged, read):
    name, data = undamaged
    found = outcomes(read, tmp_path / name, data, mutated_files // 10, (VideoError,))
    print(name, read.__name__, dict(found))
    assert found["read"]


def test_damaged_logs_of_unreadable_videos(tmp_path, mutated_files):
    rows = [{"record": i, "failure": f"video{i}.mp4: the file is empty."} for i in (3, 7, 8)]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()

    def read(path):
        """Reads a log, adds to it, and reads it again."""
        first = Watch(10, 1.0, str, path).failed
        assert all(0 <= record < 10 for record in first)
        watch = Watch(10, 1.0, str, path)
        batch = {"record": np.array([5]), "failure": np.array(["video5.mp4: new"])}
        list(watch([batch]))
        assert Watch(10, 1.0, str, path).failed == {**first, 5: first.get(5, "video5.mp4: new")}

    found = outcomes(read, tmp_path / "unreadable-train-0.jsonl", data, mutated_files, ())
    print(dict(found))
    assert found["read"] == mutated_files
