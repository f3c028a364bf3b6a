"""Toy videos of real handwriting, generated on the device from a random key.

The digits are scikit-learn's 1,797 scans of 8×8 pixels. A clip consists of noise, strokes and, in
some of its frames, a few digits. Its label depends on digits that are far apart in space and time.
"""

import dataclasses
import functools
import itertools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from nonlocal_jax import checks
from nonlocal_jax.lazy import extra
from nonlocal_jax.types import Array, PRNGKeyArray

Task = Literal["single_digit", "moving_digit", "same_digit", "moving_pair"]
Split = Literal["train", "test"]

CLASSES = 10
SIDE = 8  # pixels of a scan
DIRECTIONS = np.array([(0, 1), (0, -1), (1, 0), (-1, 0)])  # rows and columns per frame
TEST_SHARE = 0.25  # share of each class's scans that is held out

Scan = Float[Array, "8 8"]
Frames = Float[Array, "t h w"]


class Scans(NamedTuple):
    """Scanned digits by class.

    Attributes:
        images: (10, n, 8, 8), from 0 (paper) to 1 (ink). Rows beyond a class's count repeat scans.
        counts: (10,) number of scans of each class.
    """

    images: Float[Array, "10 n 8 8"]
    counts: Int[Array, "10"]


class Clips(NamedTuple):
    """A batch of clips, or one clip without the axis b.

    Attributes:
        video: (B, T, H, W, 1); 0 is paper and 1 is ink.
        labels: (B,).
        places: (B, digits, 3): frame, row and column of the middle of each digit in the first frame
            that shows it.
    """

    video: Float[Array, "*b t h w 1"]
    labels: Int[Array, "*b"]
    places: Int[Array, "*b digits 3"]


@dataclasses.dataclass(frozen=True)
class Scene:
    """What the clips look like, whichever network they are for."""

    frames: int = 8  # frames of a clip
    size: int = 16  # height and width in pixels
    visible: int = 2  # consecutive frames that show a digit of `same_digit`, or a stroke
    gap: int = 3  # smallest distance in frames from the first digit's last to the second's first
    distance: int = 6  # smallest distance of the two digits of `same_digit`, along rows or columns
    noise: float = 0.1  # standard deviation; ink is 1
    strokes: int = 2  # distracting strokes per clip
    stroke_ink: float = 0.5  # brightness of a stroke; a digit's is 1

    def __post_init__(self) -> None:
        minimum_frames = 2 * self.visible + self.gap - 1
        minima = {
            "size": (SIDE, "a digit's side"),
            "visible": (1, "one frame"),
            "gap": (1, "one frame"),
            "frames": (minimum_frames, "two digits and the gap between them"),
            "strokes": (0, "none"),
            "noise": (0, "none"),
        }
        for name, (minimum, reason) in minima.items():
            value = getattr(self, name)
            if not value >= minimum:  # written so that NaN fails as well
                raise ValueError(f"{name} must be at least {minimum}, {reason}; got {value}.")
        room = self.size - SIDE
        if not 0 <= self.distance <= room:
            raise ValueError(
                f"distance must be from 0 to {room}, the room that a digit has; "
                f"got {self.distance}."
            )


def load_scans(split: Split) -> Scans:
    """Loads the scans of one split.

    Every class is split in the same proportion, no scan is in both splits, and the split never
    changes.

    >>> [int(load_scans(split).counts.sum()) for split in ("train", "test")]
    [1347, 450]
    """
    with extra("experiments"):
        from sklearn.datasets import load_digits

    digits = load_digits()
    classes = []
    for digit in range(CLASSES):
        images = digits.images[digits.target == digit].astype(np.float32) / 16
        # The seed makes the split the same everywhere.
        order = np.random.default_rng(digit).permutation(len(images))
        held_out = round(TEST_SHARE * len(images))
        classes.append(images[order[:held_out] if split == "test" else order[held_out:]])
    counts = [len(images) for images in classes]
    padded = [np.resize(images, (max(counts), SIDE, SIDE)) for images in classes]
    return Scans(jnp.asarray(np.stack(padded)), jnp.asarray(counts, jnp.int32))


@functools.partial(jax.jit, static_argnames=("task", "batch_size", "scene"))
def make_clips(task: Task, key: PRNGKeyArray, scans: Scans, batch_size: int, scene: Scene) -> Clips:
    """Makes clips of one task. The same key gives the same clips.

    - "single_digit": an image (one frame) with one digit. The label is its class.
    - "moving_digit": one digit moves. The label is 4 times its class plus its direction.
    - "same_digit": two digits, one after the other and far apart. The label is whether they are of
      the same class (half of the clips).
    - "moving_pair": three digits move, two of them of one class. The label is whether these two
      move in the same direction (half of the clips). Looking at directions alone, whether any two
      are equal, gives the right answer for three quarters of the clips.

    Args:
        task: Task to make clips of.
        key: Key of the random numbers.
        scans: Digits to draw from.
        batch_size: Number of clips, B.
        scene: What the clips look like.

    Returns:
        B clips.

    Raises:
        ValueError: The task is unknown, or the scene is too small for digits that move.

    >>> clips = make_clips("single_digit", jax.random.key(0), load_scans("train"), 5, Scene())
    >>> clips.video.shape, clips.labels.shape, clips.places.shape
    ((5, 1, 16, 16, 1), (5,), (5, 1, 3))
    """
    makers = {
        "single_digit": _single_digit,
        "moving_digit": _moving_digit,
        "same_digit": _same_digit,
        "moving_pair": _moving_pair,
    }
    checks.one_of("task", task, makers)
    if task in ("moving_digit", "moving_pair") and scene.size - SIDE < scene.frames - 1:
        raise ValueError(
            f"{task} needs size of at least {SIDE + scene.frames - 1}, a digit and its way through "
            f"{scene.frames} frames; got {scene.size}."
        )
    keys = jax.random.split(key, batch_size)
    return jax.vmap(lambda clip_key: makers[task](clip_key, scans, scene))(keys)


def num_classes(task: Task) -> int:
    """Returns the number of classes: 10 digits, 10 digits in 4 directions, or yes and no."""
    return {"single_digit": CLASSES, "moving_digit": CLASSES * len(DIRECTIONS)}.get(task, 2)


def _single_digit(key: PRNGKeyArray, scans: Scans, scene: Scene) -> Clips:
    k_digit, k_scan, k_place, k_background = jax.random.split(key, 4)
    digit = jax.random.randint(k_digit, (), 0, CLASSES)
    place = jax.random.randint(k_place, (2,), 0, scene.size - SIDE + 1)
    ink = _paste(_draw(k_scan, scans, digit), place, scene)[None]
    # The first frame of the shortest clip, so that an image has as many strokes as other frames.
    shortest = dataclasses.replace(scene, frames=2 * scene.visible + scene.gap - 1)
    clutter = _clutter(k_background, shortest)[:1]
    corner = jnp.concatenate([jnp.zeros(1, int), place])[None]
    return _compose(k_background, ink, clutter, digit, corner, scene)


def _same_digit(key: PRNGKeyArray, scans: Scans, scene: Scene) -> Clips:
    keys = jax.random.split(key, 7)
    k_label, k_classes, k_scans, k_places, k_first, k_second, k_background = keys
    is_same = jax.random.bernoulli(k_label)
    digits = _different_classes(k_classes)
    digits = jnp.where(is_same, digits[0], digits)

    pairs = _distant_places(scene)
    places = pairs[jax.random.randint(k_places, (), 0, len(pairs))]  # (2, 2)
    interval = scene.visible + scene.gap - 1  # smallest, from the first digit's start to the next
    latest = scene.frames - scene.visible
    first = jax.random.randint(k_first, (), 0, latest - interval + 1)
    second = jax.random.randint(k_second, (), first + interval, latest + 1)
    starts = jnp.stack([first, second])

    drawn = jax.vmap(lambda k, digit: _draw(k, scans, digit))(jax.random.split(k_scans), digits)
    pasted = jax.vmap(lambda scan, place: _paste(scan, place, scene))(drawn, places)
    ink = jnp.einsum("dt,dhw->thw", _visibility(starts, scene), pasted)
    clutter = _clutter(k_background, scene)
    corners = jnp.column_stack([starts, places])
    return _compose(k_background, ink, clutter, is_same.astype(int), corners, scene)


def _moving_digit(key: PRNGKeyArray, scans: Scans, scene: Scene) -> Clips:
    k_digit, k_direction, k_move = jax.random.split(key, 3)
    digit = jax.random.randint(k_digit, (1,), 0, CLASSES)
    direction = jax.random.randint(k_direction, (1,), 0, len(DIRECTIONS))
    label = (len(DIRECTIONS) * digit + direction)[0]
    return _moving(k_move, scans, digit, direction, label, scene)


def _moving_pair(key: PRNGKeyArray, scans: Scans, scene: Scene) -> Clips:
    k_label, k_classes, k_directions, k_third, k_move = jax.random.split(key, 5)
    is_same = jax.random.bernoulli(k_label)
    pair, single = _different_classes(k_classes)
    a, b = jax.random.choice(k_directions, len(DIRECTIONS), (2,), replace=False)
    third = jax.random.randint(k_third, (), 0, len(DIRECTIONS))
    digits = jnp.stack([pair, pair, single])
    directions = jnp.stack([a, jnp.where(is_same, a, b), third])
    return _moving(k_move, scans, digits, directions, is_same.astype(int), scene)


def _moving(
    key: PRNGKeyArray,
    scans: Scans,
    digits: Int[Array, " n"],
    directions: Int[Array, " n"],
    label: Array,
    scene: Scene,
) -> Clips:
    """Makes a clip of digits that move by one pixel per frame and stay inside."""
    k_scans, k_places, k_background = jax.random.split(key, 3)
    steps = jnp.asarray(DIRECTIONS)[directions]  # (n, 2)
    distance = (scene.frames - 1) * steps
    room = scene.size - SIDE
    lowest, highest = jnp.maximum(-distance, 0), room - jnp.maximum(distance, 0)
    starts = jax.random.randint(k_places, steps.shape, lowest, highest + 1)
    places = starts[:, None] + jnp.arange(scene.frames)[None, :, None] * steps[:, None]  # (n, T, 2)
    scan_keys = jax.random.split(k_scans, len(digits))
    drawn = jax.vmap(lambda k, digit: _draw(k, scans, digit))(scan_keys, digits)
    paste = jax.vmap(jax.vmap(lambda scan, place: _paste(scan, place, scene), (None, 0)))
    clutter = _clutter(k_background, scene)
    ink = paste(drawn, places).max(axis=0)
    corners = jnp.pad(starts, ((0, 0), (1, 0)))
    return _compose(k_background, ink, clutter, label, corners, scene)


def _compose(
    key: PRNGKeyArray, ink: Frames, clutter: Frames, label: Array, corners: Array, scene: Scene
) -> Clips:
    """Draws digits over strokes, and adds noise. `corners` has (frame, row, column) per digit."""
    noise = scene.noise * jax.random.normal(jax.random.fold_in(key, 1), ink.shape)
    video = (jnp.maximum(ink, clutter) + noise)[..., None]
    middles = corners + jnp.array([[0, SIDE // 2, SIDE // 2]])
    return Clips(video, label, middles)


def _different_classes(key: PRNGKeyArray) -> Int[Array, "2"]:
    return jax.random.choice(key, CLASSES, (2,), replace=False)


def _distant_places(scene: Scene) -> Int[Array, "pairs 2 2"]:
    """Lists every two corners at which digits fit and are far enough apart."""
    corners = np.array(list(itertools.product(range(scene.size - SIDE + 1), repeat=2)))
    is_far = np.abs(corners[:, None] - corners).max(-1) >= scene.distance
    first, second = np.nonzero(is_far)
    return jnp.asarray(np.stack([corners[first], corners[second]], axis=1))


def _draw(key: PRNGKeyArray, scans: Scans, digit: Array) -> Scan:
    return scans.images[digit, jax.random.randint(key, (), 0, scans.counts[digit])]


def _paste(scan: Scan, corner: Int[Array, "2"], scene: Scene) -> Float[Array, "h w"]:
    """Returns an empty frame with the scan in it."""
    return jax.lax.dynamic_update_slice(jnp.zeros((scene.size, scene.size)), scan, tuple(corner))


def _visibility(starts: Int[Array, " n"], scene: Scene) -> Float[Array, "n t"]:
    """Returns 1 for the frames that show an item and 0 for the others."""
    age = jnp.arange(scene.frames)[None] - starts[:, None]
    return ((age >= 0) & (age < scene.visible)).astype(jnp.float32)


def _clutter(key: PRNGKeyArray, scene: Scene) -> Frames:
    """Draws straight strokes, at most as long as a digit, at random places and times."""
    k_ends, k_starts = jax.random.split(key)
    ends = jax.random.uniform(k_ends, (scene.strokes, 2, 2), maxval=scene.size - 1)
    starts = jax.random.randint(k_starts, (scene.strokes,), 0, scene.frames - scene.visible + 1)
    strokes = jax.vmap(lambda pair: _stroke(pair, scene))(ends)
    visibility = _visibility(starts, scene)[..., None, None]
    return jnp.max(visibility * strokes[:, None], axis=0, initial=0.0)


def _stroke(ends: Float[Array, "2 2"], scene: Scene) -> Float[Array, "h w"]:
    """Draws a line by the distance of each pixel from it, with soft edges."""
    start, vector = ends[0], ends[1] - ends[0]
    # The inner maximum avoids a division by zero for a stroke of no length.
    vector = vector * jnp.minimum(1.0, SIDE / jnp.maximum(jnp.linalg.norm(vector), 1.0))
    rows, columns = jnp.indices((scene.size, scene.size), dtype=jnp.float32)
    dy, dx = rows - start[0], columns - start[1]
    projection = (dy * vector[0] + dx * vector[1]) / jnp.maximum(vector @ vector, 1e-6)
    nearest = jnp.clip(projection, 0, 1)
    distance = jnp.hypot(dy - nearest * vector[0], dx - nearest * vector[1])
    return scene.stroke_ink * jnp.clip(1.5 - distance, 0, 1)
