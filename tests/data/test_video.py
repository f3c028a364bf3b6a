"""Frames equal PyAV's own decode of the whole file bit for bit, and few others are decoded."""

import functools
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from data.files import FILES, IRREGULAR, encode, remux, replace_content, scene
from PIL import Image

from nonlocal_jax.data import VideoError, stand_in
from nonlocal_jax.data.decode import seeking
from nonlocal_jax.data.video import Video, Window

QUICK = {"preset": "ultrafast", "g": "40"}
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


def video_file(folder, name):
    """Makes a file when the first test needs it."""
    file = folder / name
    if not file.exists():
        FILES[name](file)
    return file


def decode_all(file):
    """Decodes a file by PyAV, from the first packet to the last, and rotates its frames."""
    with av.open(str(file)) as container:
        return [
            np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
            for frame in container.decode(video=0)
        ]


@pytest.mark.parametrize("name", FILES)
def test_frames_equal_a_whole_decode(folder, name):
    file = video_file(folder, name)
    frames = decode_all(file)
    for threads in (1, 0):
        with Video(file, threads=threads) as video:
            assert len(video) == len(frames)
            for start in (0, len(frames) // 3, len(frames) - 1):  # strided; the last one wraps
                indices = (start + 2 * np.arange(5)) % len(frames)
                expected = np.stack([frames[i] for i in indices])
                np.testing.assert_array_equal(video.read(indices), expected)
            shuffled = RNG.permutation(len(frames))
            expected = np.stack([frames[i] for i in shuffled])
            np.testing.assert_array_equal(video.read(shuffled), expected)


# Files without keyframes or without times that can be trusted.
DECODED_FROM_THE_START = (
    ".avi",
    ".mpg",
    "refresh.mp4",
    "refresh.mkv",
    "timed_as_decoded.mp4",
    "timed_as_decoded.mkv",
)


@pytest.mark.parametrize(
    "name", [name for name in FILES if not name.endswith(DECODED_FROM_THE_START)]
)
def test_files_with_keyframes_and_times_are_not_decoded_from_the_start(folder, name, monkeypatch):
    calls, timelines = [], []
    decode_in_order, use_slower_timeline = seeking.decode_in_order, Video._use_slower_timeline

    def record_decoding(container, timeline, indices):
        calls.append(indices)
        return decode_in_order(container, timeline, indices)

    def record_timeline(video):
        timelines.append(name)
        use_slower_timeline(video)

    monkeypatch.setattr(seeking, "decode_in_order", record_decoding)
    monkeypatch.setattr(Video, "_use_slower_timeline", record_timeline)
    for start in range(3):
        with Video(video_file(folder, name)) as video:
            video.read((start + np.arange(0, 30, 3)) % len(video))
            video.read([(len(video) - 1 - start) % len(video)])
    assert not calls
    assert timelines == ([name] * 3 if name == "shown_late.mp4" else [])


def test_only_needed_frames_are_decoded(folder, monkeypatch):
    """Decoding goes from the keyframe before the first requested frame to the last requested one.

    Frames that no other is predicted from are skipped.
    """
    file = video_file(folder, "irregular.mkv")  # a keyframe every 10 frames
    decoded, decode_from_keyframe = [], seeking.decode_from_keyframe

    def record(*arguments):
        for frame in decode_from_keyframe(*arguments):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(seeking, "decode_from_keyframe", record)
    with Video(file) as video:
        times, keyframes = video.timeline.times, video.timeline.keyframes
        key = times.index(keyframes[4])
        assert keyframes[3] < times[key] < times[key + 7] < keyframes[5]
        video.read([key + 1, key + 3, key + 5])
    assert set(decoded) >= {times[key + 1], times[key + 3], times[key + 5]}
    assert min(decoded) >= times[key]
    assert max(decoded) <= times[key + 7]
    assert len(decoded) == len(set(decoded)) < 8


def test_each_frame_is_decoded_once_for_many_clips(folder):
    file, decoded = video_file(folder, "open_gop.mp4"), []

    class CountingVideo(Video):
        def decode(self, indices):
            for index, frame in super().decode(indices):
                decoded.append(index)
                yield index, frame

    with CountingVideo(file) as video:
        clips = np.stack([start + 2 * np.arange(8) for start in (0, 5, 10, 44)])
        frames = video.read(clips.ravel())
    assert sorted(decoded) == sorted(set(clips.ravel().tolist()))
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
    file = video_file(folder, name)
    frames = np.stack(decode_all(file))
    height, width = frames.shape[1:3]
    size = (height - 20, width - 16)
    window = Window(8, 4, *size, size)  # at even distances from all sides
    with Video(file) as video:
        part = video.read([3, 1], lambda *shape: window if shape == (height, width) else None)
    expected = frames[[3, 1], 8 : height - 12, 4 : width - 12]
    if name == "ten_bit.mp4":  # at the border, colours are interpolated from inside the window
        part, expected = part[:, 2:-2, 2:-2], expected[:, 2:-2, 2:-2]
    np.testing.assert_array_equal(part, expected)


def test_only_the_window_is_scaled(tmp_path):
    """Of four quarters in different colours, the window shows one and the edges of two."""
    quarters = np.zeros((3, 64, 96, 3), np.uint8)
    for i, (row, column) in enumerate(((0, 0), (0, 48), (32, 0), (32, 48))):
        quarters[:, row : row + 32, column : column + 48] = 60 * (i + 1)
    stand_in.write(tmp_path / "quarters.mp4", quarters, rotation=90, options={"crf": "1"})
    shown = np.rot90(quarters, 1, (1, 2))  # (96, 64)
    with Video(tmp_path / "quarters.mp4") as video:
        large = video.read([1], lambda h, w: Window(4, 4, 60, 24, (180, 72)))[0]
    assert large.shape == (180, 72, 3)
    for row, column in ((20, 36), (100, 36), (125, 36), (150, 36), (170, 60)):
        expected = shown[1, 4 + row // 3, 4 + column // 3].astype(int)
        assert np.abs(large[row, column].astype(int) - expected).max() <= 3


def test_rate_and_times(folder):
    with Video(video_file(folder, "long_gop.mp4")) as video:
        assert video.rate == 25
        np.testing.assert_allclose(video.seconds(np.array([0, 10])), [0, 0.4])
    for name in ("irregular.mp4", "irregular.mkv"):
        with Video(video_file(folder, name)) as video:
            expected = np.subtract(IRREGULAR, IRREGULAR[0])
            np.testing.assert_allclose(video.seconds(np.arange(50)), expected, atol=2e-3)
    with Video(video_file(folder, "b_frames.avi")) as video:
        np.testing.assert_allclose(video.seconds(np.array([5])), [0.2])


# Not `resource.getrusage`, whose peak is at least that of the parent process.
PEAK = """
import sys
from pathlib import Path
from nonlocal_jax.data.video import Video
for file in sys.argv[1:]:
    with Video(Path(file)) as video:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        video.read(range(len(video) - 16, len(video), 2))
        assert sum(1 for _ in video.decode(range(len(video)))) == len(video)
    status = Path("/proc/self/status").read_text()
    print(len(video), status.partition("VmHWM:")[2].split()[0])
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read as on Linux"
)
@pytest.mark.processes
def test_memory_does_not_grow_with_the_length(tmp_path):
    """The process reads and decodes 40 frames, and then 600, which would take 44 MB."""
    files = [tmp_path / "short.mp4", tmp_path / "long.mp4"]
    stand_in.write(files[0], scene(40, 192, 256), options=QUICK)
    repeated = tmp_path / "repeated.ffconcat"
    repeated.write_text("ffconcat version 1.0\n" + 15 * "file short.mp4\n")
    remux(repeated, files[1])
    process = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, files)], check=True, capture_output=True, text=True
    )
    (short_count, short), (long_count, long) = (
        map(int, line.split()) for line in process.stdout.splitlines()
    )  # frames, KiB
    assert (short_count, long_count) == (40, 600)
    assert long - short < 20 * 1024


BAD = {
    "missing.mp4": (None, "there is no such file"),
    "empty.mp4": (b"", "the file is empty"),
    "text.mp4": (b"this is no video, it only says so\n" * 30, "not a video that can be read"),
    "playlist.mp4": (b"ffconcat version 1.0\nfile other.ts\n", "not a video that can be read"),
    "stream.m3u8": (
        b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.ts\n#EXT-X-ENDLIST\n",
        "not a video that can be read",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_are_not_videos(tmp_path, name):
    content, message = BAD[name]
    stand_in.write(tmp_path / "other.ts", scene(5, 48, 64))  # what the playlists point to
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(VideoError, match=f"{name}: {message}"), Video(tmp_path / name):
        pass


def test_sound_without_video(tmp_path):
    file = tmp_path / "sound.mp4"
    stand_in.write_sound(file)
    with pytest.raises(VideoError, match="no video stream, only audio"), Video(file):
        pass


def test_sound_with_a_cover(tmp_path):
    file = tmp_path / "song.mp4"
    with av.open(str(file), "w") as container:
        sound = container.add_stream("aac", rate=8000, layout="mono")
        cover = container.add_stream("mjpeg", rate=25)
        cover.width, cover.height, cover.pix_fmt = 96, 80, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        silence = np.zeros((1, 8000), np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        frame.sample_rate = 8000
        picture = av.VideoFrame.from_ndarray(scene(1, 80, 96)[0], format="rgb24")
        container.mux(cover.encode(picture))
        for part in (frame, None):
            container.mux(sound.encode(part))
    with pytest.raises(VideoError, match="no video stream, only a cover, audio"), Video(file):
        pass


def test_a_title_that_is_not_utf8(tmp_path):
    file = tmp_path / "title.mkv"
    with av.open(str(file), "w") as container:
        container.metadata["title"] = "a very long title"
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = 16
        container.mux(stream.encode(av.VideoFrame(16, 16, "yuv420p")))
        container.mux(stream.encode())
    content = file.read_bytes()
    assert b"a very long title" in content
    title = b"\xff\xfe very long title"[:17]
    file.write_bytes(content.replace(b"a very long title", title))
    with Video(file) as video:
        assert video.read([0]).shape == (1, 16, 16, 3)


def test_a_stream_without_frames(tmp_path):
    with av.open(str(tmp_path / "none.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = 16
        container.start_encoding()
    with pytest.raises(VideoError, match=r"none\.mkv: "), Video(tmp_path / "none.mkv") as video:
        len(video)


def test_a_file_that_was_cut_off(folder, tmp_path):
    content = video_file(folder, "open_gop.mp4").read_bytes()
    start = tmp_path / "start.mp4"
    start.write_bytes(content[: len(content) // 2])  # without its index, which is at the end
    with pytest.raises(VideoError, match="not a video that can be read"), Video(start):
        pass
    stand_in.write(tmp_path / "long.ts", scene(60, 48, 64), options={"g": "10"})
    with Video(tmp_path / "long.ts") as video:
        count = len(video)
    (tmp_path / "cut.ts").write_bytes((tmp_path / "long.ts").read_bytes()[:20_000])
    frames = decode_all(tmp_path / "cut.ts")
    with Video(tmp_path / "cut.ts") as video:  # what remains can be read
        assert len(video) < count
        np.testing.assert_array_equal(video.read([0, 3]), np.stack([frames[0], frames[3]]))


def test_frames_that_the_index_has_and_the_file_lacks(tmp_path):
    stand_in.write(tmp_path / "fast.mp4", scene(60, 48, 64), options={"g": "10"})
    remux(tmp_path / "fast.mp4", tmp_path / "front.mp4", options={"movflags": "+faststart"})
    content = (tmp_path / "front.mp4").read_bytes()
    (tmp_path / "front.mp4").write_bytes(content[: 2 * len(content) // 3])
    with Video(tmp_path / "front.mp4") as video:
        assert len(video) == 60
        video.read([0, 5])
        with pytest.raises(VideoError, match=r"frame \d+ of 60 cannot be decoded"):
            video.read([0, 59])


def test_a_packet_without_a_frame(tmp_path):
    """MPEG-4 has pictures that are not coded, which shows only when such a frame is requested."""
    encode(tmp_path / "whole.mkv", scene(20, 48, 64), "mpeg4", options={"g": "12"})

    def change(number, packet):
        content = bytes(packet)
        uncoded = content[:5] + bytes([content[5] & 0xDF]) + content[6:]  # the bit `vop_coded`
        return packet if number != 7 else replace_content(packet, uncoded)

    hollow = tmp_path / "hollow.mkv"
    remux(tmp_path / "whole.mkv", hollow, change)
    frames = decode_all(hollow)
    assert len(frames) == 19
    with Video(hollow) as video:
        assert len(video) == 20
        np.testing.assert_array_equal(video.read([7, 15]), np.stack([frames[7], frames[15]]))
        assert len(video) == 19
    message = "has 19 frames that can be decoded, not 20"
    with Video(hollow) as video, pytest.raises(VideoError, match=message):
        video.read(range(20))


def test_frames_that_do_not_exist(folder):
    with Video(video_file(folder, "one.mp4")) as video:
        for indices in ([1], [-1, 0]):
            with pytest.raises(IndexError, match="has frames 0 to 0; got"):
                video.read(indices)
        with pytest.raises(IndexError, match="at least one frame"):
            video.read([])
        with pytest.raises(ValueError, match="must lie inside the frame of 48×64 pixels"):
            video.read([0], lambda h, w: Window(0, 8, h, w, (8, 8)))


def test_8k_frames_can_be_scaled(tmp_path):
    large = np.zeros((1, 4320, 7680, 3), np.uint8)
    large[:, :, 3840:] = 200
    stand_in.write(tmp_path / "8k.mp4", large, options={"preset": "ultrafast"})
    with Video(tmp_path / "8k.mp4") as video:
        small = video.read([0], lambda h, w: Window(0, 0, h, w, (27, 48)))
    assert small.shape == (1, 27, 48, 3)
    assert small[0, :, :20].max() < 5
    assert small[0, :, 28:].min() > 190


def test_frames_that_are_too_large(folder):
    video = Video(video_file(folder, "one.mp4"), max_frame_pixels=48 * 64 - 1)
    with pytest.raises(VideoError, match="at most 3,071 pixels; they have 64×48"), video:
        pass


def test_a_small_frame_scaled_to_a_large_one(tmp_path):
    encode(tmp_path / "line.mkv", np.zeros((1, 1, 4096, 3), np.uint8), "ffv1", "bgr0")
    with Video(tmp_path / "line.mkv") as video:
        assert video.read([0]).shape == (1, 1, 4096, 3)
        with pytest.raises(VideoError, match="at most 67,108,864 pixels; they have 256×1048576"):
            video.read([0], lambda h, w: Window(0, 0, h, w, (256 * h, 256 * w)))


def test_results_that_are_too_large(folder):
    with Video(video_file(folder, "long_gop.mp4"), max_read_bytes=8 * 48 * 64 * 3) as video:
        assert len(video.read(range(8))) == 8
        with pytest.raises(VideoError, match=r"9 frames of \(48, 64\) take over 73,728 bytes"):
            video.read(range(9))


def scaled_window(size, height, width):
    return Window(0, 0, height, width, size)


def test_scaled_frames_are_close_to_scaled_rgb(folder):
    """The reference converts to RGB first, and scales by Pillow's bilinear filter."""
    with Video(video_file(folder, "long_gop.mp4")) as video:
        full = Image.fromarray(video.read([5])[0])
        for size in ((96, 128), (35, 61)):
            scaled = video.read([5], functools.partial(scaled_window, size))[0]
            reference = np.asarray(full.resize(size[::-1], Image.Resampling.BILINEAR))
            assert np.abs(scaled.astype(int) - reference).mean() < 2.5


def test_names_that_are_too_long(tmp_path):
    video = Video(tmp_path / (300 * "a" + ".mp4"))
    with pytest.raises(VideoError, match=r"cannot be opened .*too long"), video:
        pass
