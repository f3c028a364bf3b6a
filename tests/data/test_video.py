"""Frames by their number equal PyAV's own decode of the whole file, bit for bit, and no more is decoded than is needed."""

import functools
import subprocess
import sys

import av
import numpy as np
import pytest
from data.files import FILES, IRREGULAR, other_codec, remux, scene, with_content
from PIL import Image

from nonlocal_jax.data import VideoError, convert, stand_in
from nonlocal_jax.data import video as module
from nonlocal_jax.data.convert import Window
from nonlocal_jax.data.video import Video

QUICK = {"preset": "ultrafast", "g": "40"}
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


def made(folder, name):
    file = folder / name
    if not file.exists():
        FILES[name](file)
    return file


def decoded(file):
    """By PyAV, from the first packet to the last, turned as the file asks."""
    with av.open(str(file)) as container:
        return [
            np.rot90(f.to_ndarray(format="rgb24"), round(f.rotation / 90))
            for f in container.decode(video=0)
        ]


@pytest.mark.parametrize("name", FILES)
def test_frames_equal_a_whole_decode(folder, name):
    file = made(folder, name)
    frames = decoded(file)
    for threads in (1, 0):
        with Video(file, threads=threads) as video:
            assert len(video) == len(frames)
            for start in (0, len(frames) // 3, len(frames) - 1):  # strided, looped at the end
                indices = (start + 2 * np.arange(5)) % len(frames)
                np.testing.assert_array_equal(
                    video.read(indices), np.stack([frames[i] for i in indices])
                )
            shuffled = RNG.permutation(len(frames))
            np.testing.assert_array_equal(
                video.read(shuffled), np.stack([frames[i] for i in shuffled])
            )


UNTIMELY = (
    ".avi",
    ".mpg",
    "refresh.mp4",
    "refresh.mkv",
    "timed_as_decoded.mp4",
    "timed_as_decoded.mkv",
)


@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith(UNTIMELY)])
def test_files_with_keyframes_and_times_are_not_decoded_from_the_start(folder, name, monkeypatch):
    from_the_start, in_order = [], Video._in_order
    monkeypatch.setattr(
        Video,
        "_in_order",
        lambda video, wanted: from_the_start.append(wanted) or in_order(video, wanted),
    )
    wrong, wrong_times = [], Video._wrong_times
    monkeypatch.setattr(
        Video, "_wrong_times", lambda video: wrong.append(name) or wrong_times(video)
    )
    for start in range(3):
        with Video(made(folder, name)) as video:
            video.read((start + np.arange(0, 30, 3)) % len(video))
            video.read([(len(video) - 1 - start) % len(video)])
    assert not from_the_start
    assert wrong == ([name] * 3 if name == "shown_late.mp4" else [])


def test_only_what_is_needed_is_decoded(folder):
    """From the keyframe before the first wanted frame, without the frames that no other is predicted from, to the last one."""
    file = made(folder, "irregular.mkv")  # a keyframe every 10 frames
    seen = []

    class Counting(Video):
        def _decode_from(self, *arguments):
            for frame in super()._decode_from(*arguments):
                seen.append(frame.pts)
                yield frame

    with Counting(file) as video:
        times, keyframes = video.timeline.times, video.timeline.keyframes
        key = times.index(keyframes[4])
        assert keyframes[3] < times[key] < times[key + 7] < keyframes[5]
        video.read([key + 1, key + 3, key + 5])
        assert set(seen) >= {times[key + 1], times[key + 3], times[key + 5]}
        assert min(seen) >= times[key]
        assert max(seen) <= times[key + 7]
        assert len(seen) == len(set(seen)) < 8


def test_each_frame_is_decoded_once_for_many_clips(folder):
    file, seen = made(folder, "open_gop.mp4"), []

    class Counting(Video):
        def decode(self, indices):
            for index, frame in super().decode(indices):
                seen.append(index)
                yield index, frame

    with Counting(file) as video:
        clips = np.stack([start + 2 * np.arange(8) for start in (0, 5, 10, 44)])
        frames = video.read(clips.ravel())
    assert sorted(seen) == sorted(set(clips.ravel().tolist()))
    assert len(frames) == clips.size


@pytest.mark.parametrize(
    "name",
    [
        "long_gop.mp4",
        "odd.mp4",
        "turned.mp4",
        "turned_back.mp4",
        "upside_down.mp4",
        "interlaced.mp4",
        "ten_bit.mp4",
    ],
)
def test_a_window_is_a_part_of_the_frame_as_it_is_shown(folder, name):
    frames = np.stack(decoded(made(folder, name)))
    height, width = frames.shape[1:3]
    window = Window(
        8, 4, height - 20, width - 16, (height - 20, width - 16)
    )  # on both axes even from either end
    with Video(made(folder, name)) as video:
        part = video.read([3, 1], lambda *size: window if size == (height, width) else None)
    whole = frames[[3, 1], 8 : height - 12, 4 : width - 12]
    if (
        name == "ten_bit.mp4"
    ):  # colours at the border of the window are interpolated with what is inside
        part, whole = part[:, 2:-2, 2:-2], whole[:, 2:-2, 2:-2]
    np.testing.assert_array_equal(part, whole)


def test_scaling_is_of_the_window_alone(tmp_path):
    """Of four quarters, one colour each, the window sees one and the edges of two."""
    quarters = np.zeros((3, 64, 96, 3), np.uint8)
    for i, (rows, columns) in enumerate(((0, 0), (0, 48), (32, 0), (32, 48))):
        quarters[:, rows : rows + 32, columns : columns + 48] = 60 * (i + 1)
    stand_in.write(tmp_path / "quarters.mp4", quarters, rotation=90, options={"crf": "1"})
    shown = np.rot90(quarters, 1, (1, 2))  # (96, 64)
    with Video(tmp_path / "quarters.mp4") as video:
        large = video.read([1], lambda h, w: Window(4, 4, 60, 24, (180, 72)))[0]
    assert large.shape == (180, 72, 3)
    for row, column in ((20, 36), (100, 36), (125, 36), (150, 36), (170, 60)):
        expected = shown[1, 4 + row // 3, 4 + column // 3].astype(int)
        assert np.abs(large[row, column].astype(int) - expected).max() <= 3


def test_rate_and_times(folder):
    with Video(made(folder, "long_gop.mp4")) as video:
        assert video.rate == 25
        np.testing.assert_allclose(video.seconds(np.array([0, 10])), [0, 0.4])
    for name in ("irregular.mp4", "irregular.mkv"):
        with Video(made(folder, name)) as video:
            np.testing.assert_allclose(
                video.seconds(np.arange(50)), np.subtract(IRREGULAR, IRREGULAR[0]), atol=2e-3
            )
    with Video(made(folder, "b_frames.avi")) as video:
        np.testing.assert_allclose(video.seconds(np.array([5])), [0.2])


PEAK = """
import resource, sys
from pathlib import Path
from nonlocal_jax.data.video import Video
for file in sys.argv[1:]:
    with Video(Path(file)) as video:
        video.read(range(len(video) - 16, len(video), 2))
        sum(1 for _ in video.decode(range(len(video))))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_length(tmp_path):
    """Of the whole process: 40 frames, read and decoded, and then 1,000, which would take 74 MB."""
    frames = scene(40, 192, 256)
    files = [tmp_path / "short.mp4", tmp_path / "long.mp4"]
    for file, times in zip(files, (1, 25), strict=True):
        stand_in.write(
            file,
            np.broadcast_to(frames, (times, *frames.shape)).reshape(-1, *frames.shape[1:]),
            options=QUICK,
        )
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, files)], check=True, capture_output=True, text=True
    )
    short, long = map(int, done.stdout.split())  # KiB
    assert long - short < 20 * 1024


BAD = {
    "missing.mp4": (None, "there is no such file"),
    "empty.mp4": (b"", "the file is empty"),
    "text.mp4": (b"this is no video, it only says so\n" * 30, "no video that can be read"),
    "playlist.mp4": (b"ffconcat version 1.0\nfile other.ts\n", "no video that can be read"),
    "stream.m3u8": (
        b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.ts\n#EXT-X-ENDLIST\n",
        "no video that can be read",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_video(tmp_path, name):
    content, message = BAD[name]
    stand_in.write(tmp_path / "other.ts", scene(5, 48, 64))  # that a playlist would lead to
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(VideoError, match=f"{name}: {message}"), Video(tmp_path / name):
        pass


def test_sound_alone(tmp_path):
    stand_in.write_sound(tmp_path / "sound.mp4")
    with (
        pytest.raises(VideoError, match="no video stream, only audio"),
        Video(tmp_path / "sound.mp4"),
    ):
        pass


def test_a_sound_with_a_cover(tmp_path):
    with av.open(str(tmp_path / "song.mp4"), "w") as container:
        sound = container.add_stream("aac", rate=8000, layout="mono")
        cover = container.add_stream("mjpeg", rate=25)
        cover.width, cover.height, cover.pix_fmt = 96, 80, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 8000), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 8000
        container.mux(cover.encode(av.VideoFrame.from_ndarray(scene(1, 80, 96)[0], format="rgb24")))
        for part in (frame, None):
            container.mux(sound.encode(part))
    with (
        pytest.raises(VideoError, match="no video stream, only a cover, audio"),
        Video(tmp_path / "song.mp4"),
    ):
        pass


def test_a_title_that_is_not_utf8(tmp_path):
    with av.open(str(tmp_path / "title.mkv"), "w") as container:
        container.metadata["title"] = "a very long title"
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = 16
        container.mux(stream.encode(av.VideoFrame(16, 16, "yuv420p")))
        container.mux(stream.encode())
    content = (tmp_path / "title.mkv").read_bytes()
    assert b"a very long title" in content
    (tmp_path / "title.mkv").write_bytes(
        content.replace(b"a very long title", b"\xff\xfe very long title"[:17])
    )
    with Video(tmp_path / "title.mkv") as video:
        assert video.read([0]).shape == (1, 16, 16, 3)


def test_no_frames(tmp_path):
    with av.open(str(tmp_path / "none.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = 16
        container.start_encoding()
    with pytest.raises(VideoError, match=r"none\.mkv: "), Video(tmp_path / "none.mkv") as video:
        len(video)


def test_a_file_that_was_cut_off(folder, tmp_path):
    whole = made(folder, "open_gop.mp4").read_bytes()
    (tmp_path / "start.mp4").write_bytes(whole[: len(whole) // 2])  # without its index
    with (
        pytest.raises(VideoError, match="no video that can be read"),
        Video(tmp_path / "start.mp4"),
    ):
        pass
    stand_in.write(tmp_path / "long.ts", scene(60, 48, 64), options={"g": "10"})
    with Video(tmp_path / "long.ts") as video:
        count = len(video)
    (tmp_path / "cut.ts").write_bytes((tmp_path / "long.ts").read_bytes()[:20_000])
    frames = decoded(tmp_path / "cut.ts")
    with Video(tmp_path / "cut.ts") as video:  # what there is can be read
        assert len(video) < count
        np.testing.assert_array_equal(video.read([0, 3]), np.stack([frames[0], frames[3]]))


def test_frames_that_the_index_promises_and_the_file_lacks(tmp_path):
    stand_in.write(tmp_path / "fast.mp4", scene(60, 48, 64), options={"g": "10"})
    remux(tmp_path / "fast.mp4", tmp_path / "front.mp4", options={"movflags": "+faststart"})
    whole = (tmp_path / "front.mp4").read_bytes()
    (tmp_path / "front.mp4").write_bytes(whole[: 2 * len(whole) // 3])
    with Video(tmp_path / "front.mp4") as video:
        assert len(video) == 60
        video.read([0, 5])
        with pytest.raises(VideoError, match=r"frame \d+ of 60 cannot be decoded"):
            video.read([0, 59])


def test_a_packet_without_a_frame(tmp_path):
    """MPEG-4 knows pictures that are not coded; that nothing comes of one is seen when it is asked for."""
    other_codec(tmp_path / "whole.mkv", scene(20, 48, 64), "mpeg4", options={"g": "12"})

    def change(number, packet):
        content = bytes(packet)
        uncoded = content[:5] + bytes([content[5] & 0xDF]) + content[6:]  # the bit `vop_coded`
        return packet if number != 7 else with_content(packet, uncoded)

    remux(tmp_path / "whole.mkv", tmp_path / "hollow.mkv", change)
    frames = decoded(tmp_path / "hollow.mkv")
    assert len(frames) == 19
    with Video(tmp_path / "hollow.mkv") as video:
        assert len(video) == 20
        np.testing.assert_array_equal(video.read([7, 15]), np.stack([frames[7], frames[15]]))
        assert len(video) == 19
    with (
        Video(tmp_path / "hollow.mkv") as video,
        pytest.raises(VideoError, match="has 19 frames that can be decoded, not 20"),
    ):
        video.read(range(20))


def test_frames_outside(folder):
    with Video(made(folder, "one.mp4")) as video:
        for indices in ([1], [-1, 0]):
            with pytest.raises(IndexError, match="has frames 0 to 0; got"):
                video.read(indices)
        with pytest.raises(IndexError, match="at least one frame"):
            video.read([])
        with pytest.raises(ValueError, match="must lie inside the frame of 48×64 pixels"):
            video.read([0], lambda h, w: Window(0, 8, h, w, (8, 8)))


def test_8k_frames_are_scaled_as_they_come(tmp_path):
    large = np.zeros((2, 4320, 7680, 3), np.uint8)
    large[:, :, 3840:] = 200
    stand_in.write(tmp_path / "8k.mp4", large, options={"preset": "ultrafast"})
    with Video(tmp_path / "8k.mp4") as video:
        small = video.read([1], lambda h, w: Window(0, 0, h, w, (27, 48)))
    assert small.shape == (1, 27, 48, 3)
    assert small[0, :, :20].max() < 5
    assert small[0, :, 28:].min() > 190


def test_frames_that_are_too_large(folder, monkeypatch):
    monkeypatch.setattr(convert, "LARGEST", 48 * 64 - 1)
    with (
        pytest.raises(VideoError, match="at most 3,071 pixels; they have 64×48"),
        Video(made(folder, "one.mp4")),
    ):
        pass


def test_a_line_of_pixels_would_become_too_large(tmp_path):
    other_codec(tmp_path / "line.mkv", np.zeros((1, 1, 4096, 3), np.uint8), "ffv1", "bgr0")
    with Video(tmp_path / "line.mkv") as video:
        assert video.read([0]).shape == (1, 1, 4096, 3)
        with pytest.raises(VideoError, match="at most 67,108,864 pixels; they have 256×1048576"):
            video.read([0], lambda h, w: Window(0, 0, h, w, (256 * h, 256 * w)))


def test_more_than_memory_should_hold(folder, monkeypatch):
    monkeypatch.setattr(module, "MOST", 8 * 48 * 64 * 3)
    with Video(made(folder, "long_gop.mp4")) as video:
        assert len(video.read(range(8))) == 8
        with pytest.raises(VideoError, match=r"9 frames of \(48, 64\) take over 73,728 bytes"):
            video.read(range(9))


def test_scaled_frames_are_near_to_scaled_colours(folder):
    """To those that are RGB before they are scaled, by Pillow's bilinear filter."""
    with Video(made(folder, "long_gop.mp4")) as video:
        whole = video.read([5])[0]
        for size in ((96, 128), (35, 61)):
            ours = video.read(
                [5], functools.partial(lambda size, h, w: Window(0, 0, h, w, size), size)
            )[0]
            theirs = np.asarray(
                Image.fromarray(whole).resize(size[::-1], Image.Resampling.BILINEAR)
            )
            assert np.abs(ours.astype(int) - theirs).mean() < 2.5


def test_names_that_cannot_be(tmp_path):
    with (
        pytest.raises(VideoError, match=r"cannot be opened .*too long"),
        Video(tmp_path / (300 * "a" + ".mp4")),
    ):
        pass
