"""The frame rate of a video is its average, whatever rate the file states."""

import numpy as np
import pytest
from data.files import encode, remux, scene
from PIL import Image

from nonlocal_jax.data.__main__ import main
from nonlocal_jax.data.video import Video


def write_rate(file, times, rate=1000):
    codec = "libvpx" if file.suffix == ".webm" else "libx264"
    options = {"deadline": "realtime"} if file.suffix == ".webm" else {"g": "10"}
    encode(file, scene(len(times), 16, 16), codec, options=options, rate=rate, times=times)


@pytest.mark.parametrize("suffix", ["webm", "mkv", "mp4", "flv"])
@pytest.mark.parametrize("start", [0.0, 7.3])
@pytest.mark.parametrize("rate", [30, 1000])
def test_the_rate_is_the_average_one(tmp_path, suffix, start, rate):
    """Whatever rate the file states: of this kind are recordings of browsers and phones."""
    file = tmp_path / f"a.{suffix}"
    gaps = np.random.default_rng(0).uniform(0.01, 0.056, 60)
    gaps[30:33] = 0.5, 0.01, 0.01
    times = np.round(start + np.cumsum(gaps), 3)
    write_rate(file, times, rate)
    with Video(file) as video:
        assert video.rate == pytest.approx(59 / (times[-1] - times[0]), rel=1e-9)
        np.testing.assert_allclose(video.seconds(np.arange(60)), times - times[0], atol=1e-9)
        video.read([40, 3])
        assert video.rate == pytest.approx(59 / (times[-1] - times[0]), rel=1e-9)


@pytest.mark.parametrize("suffix", ["webm", "mkv", "mp4", "flv"])
@pytest.mark.parametrize("rate", [24, 30, 60])
def test_a_stated_rate_is_more_exact_than_rounded_times(tmp_path, suffix, rate):
    file = tmp_path / f"a.{suffix}"
    write_rate(file, np.arange(50) / rate, rate)
    with Video(file) as video:
        assert video.rate == rate


def test_the_rate_with_equal_times(tmp_path):
    times = np.round(np.cumsum(np.random.default_rng(0).uniform(0.01, 0.056, 40)), 3)
    write_rate(tmp_path / "whole.webm", times)

    def change(number, packet):
        packet.pts = packet.dts = packet.pts - (number == 20) * round(1000 * np.diff(times)[19])
        return packet

    remux(tmp_path / "whole.webm", tmp_path / "equal.webm", change)
    with Video(tmp_path / "equal.webm") as video:
        assert len(video) == 40
        assert video.timeline.times is None
        assert video.rate == pytest.approx(39 / (times[-1] - times[0]), rel=1e-9)
        assert video.seconds(np.array([39]))[0] == pytest.approx(times[-1] - times[0])


@pytest.mark.parametrize("name", ["one.mp4", "one.mkv", "one.webm", "one.jpg"])
def test_the_rate_of_a_single_frame(tmp_path, name):
    if name == "one.jpg":
        Image.fromarray(scene(1, 16, 16)[0]).save(tmp_path / name)
    else:
        write_rate(tmp_path / name, [0.0], 25)
    with Video(tmp_path / name) as video:
        assert len(video) == 1
        assert video.rate == 25
        assert video.seconds(np.array([0])) == 0


def test_seconds_that_check_prints(tmp_path, capsys):
    times = np.round(np.cumsum(np.random.default_rng(0).uniform(0.01, 0.056, 60)), 3)
    write_rate(tmp_path / "a.webm", times)
    (tmp_path / "list.txt").write_text("a.webm 0\n")
    assert main(["check", str(tmp_path / "list.txt")]) == 0
    output = capsys.readouterr().out
    assert "30.16" in output
    assert "2.0 to 2.0" in output
