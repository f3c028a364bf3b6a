"""Frames and windows equal the rules of the sources, which are written out here again."""

import numpy as np
import pytest

from nonlocal_jax.data.sampling import InSpace, InTime, crops, whole
from nonlocal_jax.layers.presets import PRESETS


def test_consecutive_frames_cover_every_start_equally():
    starts = [InTime(4, 2).clip(10, 30.0, share)[0] for share in np.linspace(0, 0.9999, 400)]
    assert np.bincount(starts).tolist() == [100, 100, 100, 100]
    for share in (0.0, 0.4, 1.0):
        np.testing.assert_array_equal(np.diff(InTime(4, 2).clip(10, 30.0, share)), 2)


def slowfast(count, fps, frames, rate, share, target=30.0):
    """PySlowFast's rule for Kinetics: frames evenly spaced over a span inside the video."""
    span = rate * frames / target * fps
    start = share * max(count - span, 0)
    return np.clip(np.linspace(start, start + span - 1, frames), 0, count - 1).astype(int)


@pytest.mark.parametrize("count", [300, 70, 63, 20, 1])
@pytest.mark.parametrize("fps", [30.0, 25.0, 59.94])
def test_rule_of_pyslowfast(count, fps):
    for share in (0.0, 0.3, 0.999):
        clip = InTime.from_preset(8, 8, "slowfast", fps=30.0).clip(count, fps, share)
        np.testing.assert_array_equal(clip, slowfast(count, fps, 8, 8, share))


@pytest.mark.parametrize("preset", PRESETS)
def test_sampling_of_a_preset_is_that_of_its_source(preset):
    is_slowfast = preset == "slowfast"
    expected = InTime(4, 2, None, *(("slowfast", "hold") if is_slowfast else ()))
    assert InTime.from_preset(4, 2, preset) == expected


def test_short_videos_loop_or_hold():
    np.testing.assert_array_equal(InTime(6, 1).clip(4, 30.0, 0.9), [0, 1, 2, 3, 0, 1])
    np.testing.assert_array_equal(InTime(6, 1, short="hold").clip(4, 30.0, 0.9), [0, 1, 2, 3, 3, 3])
    np.testing.assert_array_equal(InTime(3, 5).clip(1, 30.0, 0.5), [0, 0, 0])


def test_stride_in_seconds():
    np.testing.assert_array_equal(InTime(4, 2, fps=30.0).clip(100, 60.0, 0.0), [0, 4, 8, 12])
    np.testing.assert_array_equal(InTime(4, 2, fps=30.0).clip(100, 15.0, 0.0), [0, 1, 2, 3])


def test_stride_in_seconds_of_a_varying_rate():
    """Frames are those shown at each time, by hand. Three of four gaps are short."""
    times = np.cumsum([0, 0.1, 0.1, 0.1, 0.7, 0.1, 0.1, 0.1, 0.7])  # to 2.0; 4 a second on average
    in_time = InTime(4, 1, fps=5.0)
    np.testing.assert_array_equal(in_time.clip(9, 4.0, 0.0, times), [0, 2, 3, 3])
    np.testing.assert_array_equal(in_time.clip(9, 4.0, 1.0, times), [7, 7, 7, 8])  # from 1.5
    np.testing.assert_array_equal(in_time.clips(9, 4.0, 2, times), [[0, 2, 3, 3], [7, 7, 7, 8]])
    # Without fps, frames are counted whatever their times.
    np.testing.assert_array_equal(InTime(4, 1).clip(9, 4.0, 0.0, times), [0, 1, 2, 3])


@pytest.mark.parametrize("rule", ["consecutive", "slowfast"])
@pytest.mark.parametrize("short", ["loop", "hold"])
def test_varying_rates_give_frames_of_the_video(rule, short):
    generator = np.random.default_rng(0)
    for count in (1, 2, 3, 20, 300):
        times = np.cumsum(generator.exponential(0.04, count))
        times -= times[0]
        rate = (count - 1) / times[-1] if count > 1 else 25.0
        for fps in (0.5, 30.0, 100.0):
            indices = InTime(8, 3, fps, rule, short).clips(count, rate, 5, times)
            assert indices.min() >= 0
            assert indices.max() < count
            assert short == "loop" or (np.diff(indices) >= 0).all()


@pytest.mark.parametrize("rate", [24.0, 25.0, 30000 / 1001, 30.0, 59.94])
@pytest.mark.parametrize("rule", ["consecutive", "slowfast"])
def test_times_in_milliseconds_are_those_of_a_constant_rate(rate, rule):
    """Matroska rounds times, which must not change the frames."""
    times = np.round(np.arange(200) / rate, 3)
    for fps in (10.0, 25.0, 30.0, 60.0):
        in_time = InTime(8, 2, fps, rule)
        expected = in_time.clips(200, rate, 7)
        np.testing.assert_array_equal(in_time.clips(200, rate, 7, times), expected)


def test_rounding_of_a_varying_rate_does_not_repeat_frames():
    """Each frame but one is shown for 1/30 s, in milliseconds."""
    exact = np.delete(np.arange(60) / 30, 50)
    times = np.round(exact, 3)
    clip = InTime(20, 2, fps=30.0).clip(59, 58 / times[-1], 0.0, times)
    np.testing.assert_array_equal(clip, np.arange(0, 40, 2))


def test_test_clips_reach_from_the_start_to_the_end():
    clips = InTime(32, 2).clips(300, 30.0, 10)
    assert clips.shape == (10, 32)
    assert clips[0, 0] == 0
    assert clips[-1, -1] == 299
    gaps = np.diff(clips[:, 0])
    assert gaps.max() - gaps.min() <= 1
    middle = InTime(32, 2).clips(300, 30.0, 1)[0]
    assert abs(middle[0] - (299 - middle[-1])) <= 1


@pytest.mark.parametrize(
    ("height", "width"), [(256, 340), (340, 256), (240, 320), (1, 1), (3, 7), (4320, 7680)]
)
@pytest.mark.parametrize("inverse", [False, True])
def test_windows_lie_inside_the_frame_and_have_the_right_scale(height, width, inverse):
    space, rng = InSpace(224, (256, 320), inverse), np.random.default_rng(0)
    sides = []
    for _ in range(300):
        window = space.window(height, width, rng.random(3))
        assert 0 <= window.top <= height - window.height
        assert 0 <= window.left <= width - window.width
        assert window.height == window.width
        assert window.size == (224, 224)
        sides.append(window.height)
    shorter = min(height, width)
    assert min(sides) >= max(int(shorter * 224 / 320), 1)
    assert max(sides) <= max(round(shorter * 224 / 256), 1)
    if shorter >= 240:  # enough pixels to see that both ends of the range are reached
        assert max(sides) - min(sides) > 0.9 * shorter * (224 / 256 - 224 / 320)


def test_inverse_lengths_are_uniform():
    rng = np.random.default_rng(0)
    samples = rng.random((4000, 3))
    lengths = {}
    for inverse in (False, True):
        space = InSpace(224, (256, 320), inverse)
        sides = [space.window(2560, 2560, shares).height for shares in samples]
        lengths[inverse] = [2560 * 224 / side for side in sides]
    assert abs(np.mean(lengths[False]) - 288) < 1.5
    assert abs(1 / np.mean(1 / np.array(lengths[True])) - 2 / (1 / 256 + 1 / 320)) < 1.5


def test_windows_are_placed_evenly():
    rng = np.random.default_rng(0)
    lefts = [InSpace(4, (4, 4)).window(4, 8, rng.random(3)).left for _ in range(2000)]
    assert np.bincount(lefts).min() > 330  # five places


@pytest.mark.parametrize("shape", [(256, 340), (340, 256), (256, 256)])
def test_three_crops(shape):
    """As in PySlowFast: along the longer side the start, the middle rounded up, and the end."""
    height, width = shape
    frames = np.arange(height * width).reshape(1, height, width, 1)
    for i, part in enumerate(crops(frames, 256, "three")):
        assert part.shape == (1, 256, 256, 1)
        row, column = divmod(int(part[0, 0, 0, 0]), width)
        assert row == np.ceil(i / 2 * (height - 256))
        assert column == np.ceil(i / 2 * (width - 256))
    centre, middle = crops(frames, 256, "centre")[0], crops(frames, 256, "three")[1]
    assert centre[0, 0, 0, 0] == middle[0, 0, 0, 0]
    assert crops(frames, 256, "full")[0].shape == frames.shape


def test_whole_frames_keep_their_shape():
    assert whole(240, 320, 256).size == (256, 341)
    assert whole(320, 240, 256).size == (341, 256)
    assert whole(1, 1, 256).size == (256, 256)


@pytest.mark.usefixtures("as_users_see_it")
def test_wrong_numbers():
    with pytest.raises(ValueError, match="frames must be at least 1; got 0"):
        InTime(0)
    with pytest.raises(ValueError, match="fps must be positive and finite, or None; got nan"):
        InTime(fps=float("nan"))
    with pytest.raises(
        ValueError, match=r"1 ≤ size ≤ shorter\[0\] ≤ shorter\[1\]; got size 300 and"
    ):
        InSpace(300)
    with pytest.raises(ValueError, match="clips must be at least 1; got 0"):
        InTime().clips(10, 30.0, 0)
    with pytest.raises(ValueError, match=r"preset must be one of 'paper', .*; got 'torch'"):
        InTime.from_preset(8, 8, "torch")
