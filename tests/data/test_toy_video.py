"""The toy videos: deterministic, balanced, and what they claim of digits, frames and distances holds in every clip."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nonlocal_jax.data.toy_video import SIDE, Scene, load_scans, make_clips, num_classes

CLEAN = Scene(noise=0.0, strokes=0)
MOVING = Scene(size=20, noise=0.0, strokes=0)


@pytest.fixture(scope="module")
def scans():
    return load_scans("train")


def of_class(scans, digit):
    """The scans of one class, flat."""
    return np.asarray(scans.images[digit, : scans.counts[digit]]).reshape(-1, SIDE * SIDE)


def crop(frame, middle):
    """The scan's worth of pixels around a place; white outside the frame."""
    row, column = (int(m) - SIDE // 2 + 1 for m in middle)
    return np.pad(np.asarray(frame)[..., 0], 1)[row : row + SIDE, column : column + SIDE].ravel()


def class_of(scans, scan):
    """The class that has this very scan."""
    found = [
        digit for digit in range(10) if (np.abs(of_class(scans, digit) - scan).max(1) < 1e-6).any()
    ]
    assert len(found) == 1
    return found[0]


def test_no_scan_is_in_both_splits(scans):
    test = load_scans("test")
    for digit in range(10):
        train_rows = {row.tobytes() for row in of_class(scans, digit)}
        test_rows = {row.tobytes() for row in of_class(test, digit)}
        assert len(test_rows) > 40
        assert len(train_rows) > 120
        assert not train_rows & test_rows


@pytest.mark.parametrize(
    ("task", "scene"), [("single_digit", Scene()), ("same_digit", Scene()), ("moving_pair", MOVING)]
)
def test_the_key_decides_the_clips(scans, task, scene):
    first, again = (make_clips(task, jax.random.key(7), scans, 5, scene) for _ in range(2))
    chex.assert_trees_all_equal(first, again)
    other = make_clips(task, jax.random.key(8), scans, 5, scene)
    assert not np.array_equal(first.video, other.video)
    chex.assert_tree_all_finite(first.video)


@pytest.mark.parametrize(
    ("task", "scene"),
    [
        ("single_digit", Scene()),
        ("moving_digit", MOVING),
        ("same_digit", Scene()),
        ("moving_pair", MOVING),
    ],
)
def test_labels_are_balanced(scans, task, scene):
    labels = np.asarray(make_clips(task, jax.random.key(0), scans, 2000, scene).labels)
    classes = num_classes(task)
    expected = len(labels) / classes
    counts = np.bincount(labels, minlength=classes)
    assert len(counts) == classes
    np.testing.assert_allclose(counts, expected, atol=5 * np.sqrt(expected))


def test_same_digit_means_the_same_class_far_apart(scans):
    """In clean clips each digit is cut out at its place and looked up among the scans."""
    clips = make_clips("same_digit", jax.random.key(1), scans, 40, CLEAN)
    for video, label, places in zip(
        clips.video, clips.labels, np.asarray(clips.places), strict=True
    ):
        (t0, *middle0), (t1, *middle1) = places
        first, second = (
            class_of(scans, crop(video[t], middle)) for t, middle in ((t0, middle0), (t1, middle1))
        )
        assert (first == second) == bool(label)
        assert t1 - (t0 + CLEAN.visible - 1) >= CLEAN.gap
        assert np.abs(np.subtract(middle0, middle1)).max() >= CLEAN.distance
        seen = np.flatnonzero(np.asarray(video).any((1, 2, 3)))
        assert list(seen) == [t0, t0 + 1, t1, t1 + 1]


def test_classes_tell_nothing_one_by_one(scans):
    """Each class is as frequent among the equal pairs as among the different ones, or the control could cheat."""
    clips = make_clips("same_digit", jax.random.key(2), scans, 600, CLEAN)
    first = [
        class_of(scans, crop(v[p[0, 0]], p[0, 1:]))
        for v, p in zip(clips.video, np.asarray(clips.places), strict=True)
    ]
    for label in (0, 1):
        counts = np.bincount(np.array(first)[np.asarray(clips.labels) == label], minlength=10)
        np.testing.assert_allclose(counts, 30, atol=25)


def test_moving_digit_moves_as_its_label_says(scans):
    clips = make_clips("moving_digit", jax.random.key(3), scans, 20, MOVING)
    moves = [(0, 1), (0, -1), (1, 0), (-1, 0)]
    for video, label, places in zip(
        clips.video, clips.labels, np.asarray(clips.places), strict=True
    ):
        digit, direction = divmod(int(label), 4)
        for t in (0, 3, MOVING.frames - 1):
            assert (
                class_of(scans, crop(video[t], places[0, 1:] + t * np.array(moves[direction])))
                == digit
            )


def test_moving_pair_label_is_that_of_the_two_of_one_class(scans):
    clips = make_clips(
        "moving_pair", jax.random.key(4), scans, 60, Scene(size=50, noise=0.0, strokes=0)
    )
    checked = 0
    for video, label, places in zip(
        clips.video, clips.labels, np.asarray(clips.places)[:, :, 1:], strict=True
    ):
        if any(np.abs(places[a] - places[b]).max() < SIDE + 2 for a, b in ((0, 1), (0, 2), (1, 2))):
            continue  # they overlap at the start, where they are looked up
        scanned = [crop(video[0], place) for place in places]
        pair, twin, other = (class_of(scans, scan) for scan in scanned)
        assert pair == twin != other
        moved = [
            [
                m
                for m in ((0, 1), (0, -1), (1, 0), (-1, 0))
                if np.allclose(crop(video[1], place + np.array(m)), scan)
            ]
            for place, scan in zip(places, scanned, strict=True)
        ]
        if all(len(m) == 1 for m in moved):
            assert (moved[0] == moved[1]) == bool(label)
            checked += 1
    assert checked >= 20


def test_clutter_is_there_and_in_its_measure(scans):
    clean = make_clips("same_digit", jax.random.key(5), scans, 50, CLEAN).video
    noisy = make_clips("same_digit", jax.random.key(5), scans, 50, Scene(strokes=0)).video
    np.testing.assert_allclose(jnp.std(noisy - clean), 0.1, rtol=0.02)
    struck = make_clips("same_digit", jax.random.key(5), scans, 50, Scene(noise=0.0)).video - clean
    assert struck.min() >= 0
    assert 0.4 < struck.max() <= 0.5
    assert struck.any((1, 2, 3, 4)).mean() > 0.9


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
def test_a_scene_that_cannot_be_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        Scene(**options)


@pytest.mark.usefixtures("as_users_see_it")
def test_bad_tasks(scans):
    with pytest.raises(ValueError, match=r"task must be one of 'single_digit', .*got 'counting'"):
        make_clips("counting", jax.random.key(0), scans, 2, Scene())
    with pytest.raises(
        ValueError, match=r"moving_pair needs size of at least 15.*8 frames; got 14"
    ):
        make_clips("moving_pair", jax.random.key(0), scans, 2, Scene(size=14, distance=2))
