"""Toy videos are deterministic and balanced, and every clip is what its label says."""

import functools

import chex
import jax
import numpy as np
import pytest

from nonlocal_jax.data.toy_video import SIDE, Scene, load_scans, make_clips, num_classes

CLEAN = Scene(noise=0.0, strokes=0)
NOISY = Scene(strokes=0)
MOVING = Scene(size=32, noise=0.0, strokes=0)
STRUCK = Scene(noise=0.0)
# Every test of a task uses one scene and one batch size, so that each task is compiled once.
SCENES = {
    "single_digit": NOISY,
    "moving_digit": MOVING,
    "same_digit": CLEAN,
    "moving_pair": MOVING,
}
BATCH = 500
DIRECTIONS = ((0, 1), (0, -1), (1, 0), (-1, 0))


@functools.cache
def make(task, seed, scene=None):
    """Makes a batch, as NumPy arrays."""
    scans = load_scans("train")
    clips = make_clips(task, jax.random.key(seed), scans, BATCH, scene or SCENES[task])
    return jax.tree.map(np.asarray, clips)


def make_first(task, seed, count):
    return jax.tree.map(lambda leaf: leaf[:count], make(task, seed))


@pytest.fixture(scope="module")
def scans():
    return load_scans("train")


def class_scans(scans, digit):
    """Returns the scans of one class, flattened."""
    return np.asarray(scans.images[digit, : scans.counts[digit]]).reshape(-1, SIDE * SIDE)


def crop(frame, middle):
    """Cuts a scan's worth of pixels around a place; outside the frame they are white."""
    row, column = (int(m) - SIDE // 2 + 1 for m in middle)
    return np.pad(frame[..., 0], 1)[row : row + SIDE, column : column + SIDE].ravel()


def find_class(scans, scan):
    """Returns the class that has exactly this scan."""
    classes = [
        digit
        for digit in range(10)
        if (np.abs(class_scans(scans, digit) - scan).max(1) < 1e-6).any()
    ]
    assert len(classes) == 1
    return classes[0]


def test_no_scan_is_in_both_splits(scans):
    test = load_scans("test")
    for digit in range(10):
        train_rows = {row.tobytes() for row in class_scans(scans, digit)}
        test_rows = {row.tobytes() for row in class_scans(test, digit)}
        assert len(test_rows) > 40
        assert len(train_rows) > 120
        assert not train_rows & test_rows


@pytest.mark.parametrize("task", ["single_digit", "same_digit", "moving_pair"])
def test_the_key_determines_the_clips(task):
    chex.assert_trees_all_equal(make(task, 0), make.__wrapped__(task, 0))
    assert not np.array_equal(make(task, 0).video, make(task, 1).video)
    chex.assert_tree_all_finite(make(task, 0).video)


@pytest.mark.parametrize("task", SCENES)
def test_labels_are_balanced(task):
    labels = np.concatenate([make(task, seed).labels for seed in range(4)])
    classes = num_classes(task)
    expected = len(labels) / classes
    counts = np.bincount(labels, minlength=classes)
    assert len(counts) == classes
    np.testing.assert_allclose(counts, expected, atol=5 * np.sqrt(expected))


def test_same_digit_means_the_same_class_far_apart(scans):
    """In clips without noise, each digit is cut out at its place and looked up in the scans."""
    clips = make_first("same_digit", 1, 40)
    for video, label, places in zip(*clips, strict=True):
        (t0, *middle0), (t1, *middle1) = places
        first = find_class(scans, crop(video[t0], middle0))
        second = find_class(scans, crop(video[t1], middle1))
        assert (first == second) == bool(label)
        assert t1 - (t0 + CLEAN.visible - 1) >= CLEAN.gap
        assert np.abs(np.subtract(middle0, middle1)).max() >= CLEAN.distance
        frames_with_ink = np.flatnonzero(video.any((1, 2, 3)))
        assert list(frames_with_ink) == [t0, t0 + 1, t1, t1 + 1]


def test_a_single_digit_does_not_give_the_label_away(scans):
    """Each class is as frequent among equal pairs as among different ones."""
    clips = make("same_digit", 2)
    classes = np.array(
        [
            find_class(scans, crop(video[places[0, 0]], places[0, 1:]))
            for video, places in zip(clips.video, clips.places, strict=True)
        ]
    )
    for label in (0, 1):
        counts = np.bincount(classes[clips.labels == label], minlength=10)
        np.testing.assert_allclose(counts, BATCH / 20, atol=BATCH / 24)


def test_moving_digit_moves_as_its_label_says(scans):
    clips = make_first("moving_digit", 3, 20)
    for video, label, places in zip(*clips, strict=True):
        digit, direction = divmod(int(label), 4)
        for t in (0, 3, MOVING.frames - 1):
            middle = places[0, 1:] + t * np.array(DIRECTIONS[direction])
            assert find_class(scans, crop(video[t], middle)) == digit


def test_moving_pair_label_is_about_the_two_digits_of_one_class(scans):
    clips = make_first("moving_pair", 3, 300)
    checked = 0
    for video, label, places in zip(*clips, strict=True):
        corners = places[:, 1:]
        pairs = ((0, 1), (0, 2), (1, 2))
        if any(np.abs(corners[a] - corners[b]).max() < SIDE + 2 for a, b in pairs):
            continue  # they overlap in the first frame, where they are looked up
        drawn = [crop(video[0], corner) for corner in corners]
        pair, twin, single = (find_class(scans, scan) for scan in drawn)
        assert pair == twin != single
        moves = [
            [
                move
                for move in DIRECTIONS
                if np.allclose(crop(video[1], corner + np.array(move)), scan)
            ]
            for corner, scan in zip(corners, drawn, strict=True)
        ]
        if all(len(candidates) == 1 for candidates in moves):
            assert (moves[0] == moves[1]) == bool(label)
            checked += 1
    assert checked >= 20


def test_noise_and_strokes_are_as_strong_as_the_scene_says():
    noise = make("single_digit", 0).video - make("single_digit", 0, CLEAN).video
    np.testing.assert_allclose(np.std(noise), NOISY.noise, rtol=0.02)
    strokes = make("same_digit", 0, STRUCK).video - make("same_digit", 0).video
    assert strokes.min() >= 0
    assert 0.4 < strokes.max() <= 0.5
    assert strokes.any((1, 2, 3, 4)).mean() > 0.9


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 7}, r"size must be at least 8, a digit's side; got 7"),
        ({"frames": 5}, r"frames must be at least 6, two digits and the gap between them; got 5"),
        ({"distance": 9}, r"distance must be from 0 to 8.*got 9"),
        ({"noise": float("nan")}, r"noise must be at least 0.*got nan"),
        ({"visible": 0}, r"visible must be at least 1"),
        ({"strokes": -1}, r"strokes must be at least 0"),
    ],
)
def test_impossible_scenes_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Scene(**options)


@pytest.mark.usefixtures("as_users_see_it")
def test_bad_tasks(scans):
    with pytest.raises(ValueError, match=r"task must be one of 'single_digit', .*got 'counting'"):
        make_clips("counting", jax.random.key(0), scans, 2, Scene())
    message = r"moving_pair needs size of at least 15.*8 frames; got 14"
    with pytest.raises(ValueError, match=message):
        make_clips("moving_pair", jax.random.key(0), scans, 2, Scene(size=14, distance=2))
