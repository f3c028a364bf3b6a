"""Toy videos of real handwriting, made on the device from a random key.

The digits are scikit-learn's 1,797 scans of 8×8 pixels. A clip is noise and strokes and, in some of its frames, a few
digits. What is asked of it depends on digits that are far apart in space and time.
"""

import dataclasses
import functools
import itertools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from nonlocal_jax.types import Array, PRNGKeyArray

Task = Literal["single_digit", "moving_digit", "same_digit", "moving_pair"]
Split = Literal["train", "test"]

CLASSES = 10
SIDE = 8  # pixels of a scan
DIRECTIONS = np.array([(0, 1), (0, -1), (1, 0), (-1, 0)])  # rows and columns a frame
TEST_SHARE = 0.25  # of the scans of each class

Scan = Float[Array, "8 8"]
Frames = Float[Array, "t h w"]


class Scans(NamedTuple):
    """Scanned digits by class.

    Attributes:
        images: (10, n, 8, 8), from 0 (paper) to 1 (ink); rows beyond a class's count repeat its scans.
        counts: (10,), how many scans each class has.
    """

    images: Float[Array, "10 n 8 8"]
    counts: Int[Array, "10"]


class Clips(NamedTuple):
    """A batch of clips, or one clip without the axis b.

    Attributes:
        video: (B, T, H, W, 1), 0 is paper and 1 is ink.
        labels: (B,).
        places: (B, digits, 3): frame, row and column of the middle of each digit when it is first seen.
    """

    video: Float[Array, "*b t h w 1"]
    labels: Int[Array, "*b"]
    places: Int[Array, "*b digits 3"]


@dataclasses.dataclass(frozen=True)
class Scene:
    """How the clips look, for every network alike."""

    frames: int = 8  # of a clip
    size: int = 16  # height and width, pixels
    visible: int = 2  # consecutive frames in which a digit of `same_digit`, or a stroke, is seen
    gap: int = (
        3  # frames, at least, from the last one of the first digit to the first one of the second
    )
    distance: int = (
        6  # pixels, at least, between the two digits of `same_digit`, along rows or columns
    )
    noise: float = 0.1  # standard deviation; ink is 1
    strokes: int = 2  # distractors in a clip
    stroke_ink: float = 0.5  # of a digit's

    def __post_init__(self) -> None:
        room = self.size - SIDE
        needs = {
            "size": (self.size, SIDE, "a digit's side"),
            "visible": (self.visible, 1, "one frame"),
            "gap": (self.gap, 1, "one frame"),
            "frames": (
                self.frames,
                2 * self.visible + self.gap - 1,
                "two digits and the gap between them",
            ),
            "strokes": (self.strokes, 0, "none"),
            "noise": (self.noise, 0, "none"),
        }
        for name, (value, least, why) in needs.items():
            if not value >= least:  # true of NaN too
                raise ValueError(f"{name} must be at least {least}, {why}; got {value}.")
        if not 0 <= self.distance <= room:
            raise ValueError(
                f"distance must be from 0 to {room}, the room that a digit has; got {self.distance}."
            )


def load_scans(split: Split) -> Scans:
    """The scans of one split. No scan is in both; each class is split alike, and always in the same way.

    >>> [int(load_scans(split).counts.sum()) for split in ("train", "test")]
    [1347, 450]
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    classes = []
    for digit in range(CLASSES):
        images = digits.images[digits.target == digit].astype(np.float32) / 16
        order = np.random.default_rng(digit).permutation(len(images))
        held_out = round(TEST_SHARE * len(images))
        classes.append(images[order[:held_out] if split == "test" else order[held_out:]])
    counts = [len(images) for images in classes]
    return Scans(
        images=jnp.asarray(
            np.stack([np.resize(images, (max(counts), SIDE, SIDE)) for images in classes])
        ),
        counts=jnp.asarray(counts, jnp.int32),
    )


@functools.partial(jax.jit, static_argnames=("task", "batch_size", "scene"))
def make_clips(task: Task, key: PRNGKeyArray, scans: Scans, batch_size: int, scene: Scene) -> Clips:
    """Clips of one task; the same key gives the same clips.

    - "single_digit": an image (one frame) with one digit; the label is its class.
    - "moving_digit": one digit moves; the label is 4 times its class plus its direction.
    - "same_digit": two digits, one after the other and far apart; the label is whether they are of the same class (half
      of the clips).
    - "moving_pair": three digits move, two of them of one class; the label is whether these two move in the same
      direction (half of the clips). Directions alone, whether any two are equal, answer three quarters of the clips.

    Args:
        task: what is asked.
        key: of the random numbers.
        scans: the digits to draw from.
        batch_size: B.
        scene: how the clips look.

    Returns:
        B clips.

    Raises:
        ValueError: an unknown task, or a scene too small for a digit to move through.

    >>> clips = make_clips("same_digit", jax.random.key(0), load_scans("train"), 5, Scene())
    >>> clips.video.shape, clips.labels.shape, clips.places.shape
    ((5, 8, 16, 16, 1), (5,), (5, 2, 3))
    """
    makers = {
        "single_digit": _single_digit,
        "moving_digit": _moving_digit,
        "same_digit": _same_digit,
        "moving_pair": _moving_pair,
    }
    if task not in makers:
        raise ValueError(f"task must be one of {', '.join(map(repr, makers))}; got {task!r}.")
    if task in ("moving_digit", "moving_pair") and scene.size - SIDE < scene.frames - 1:
        raise ValueError(
            f"{task} needs size of at least {SIDE + scene.frames - 1}, a digit and its way through "
            f"{scene.frames} frames; got {scene.size}."
        )
    return jax.vmap(lambda one: makers[task](one, scans, scene))(jax.random.split(key, batch_size))


def num_classes(task: Task) -> int:
    """10 digits, 10 digits in 4 directions, or a yes and a no."""
    return {"single_digit": CLASSES, "moving_digit": CLASSES * len(DIRECTIONS)}.get(task, 2)


def _single_digit(key: PRNGKeyArray, scans: Scans, scene: Scene) -> Clips:
    k_digit, k_scan, k_place, k_background = jax.random.split(key, 4)
    image = dataclasses.replace(scene, frames=2 * scene.visible + scene.gap - 1)
    digit = jax.random.randint(k_digit, (), 0, CLASSES)
    place = jax.random.randint(k_place, (2,), 0, scene.size - SIDE + 1)
    ink = _paste(_draw(k_scan, scans, digit), place, scene)[None]
    clutter = _clutter(k_background, image)[
        :1
    ]  # the first frame of a clip, with as many strokes as others have
    return _clip(
        k_background, ink, clutter, digit, jnp.concatenate([jnp.zeros(1, int), place])[None], scene
    )


def _same_digit(key: PRNGKeyArray, scans: Scans, scene: Scene) -> Clips:
    k_label, k_classes, k_scans, k_places, k_first, k_second, k_background = jax.random.split(
        key, 7
    )
    same = jax.random.bernoulli(k_label)
    digits = _different_classes(k_classes)
    digits = jnp.where(same, digits[0], digits)

    pairs = _distant_places(scene)
    places = pairs[jax.random.randint(k_places, (), 0, len(pairs))]  # (2, 2)
    after = (
        scene.visible + scene.gap - 1
    )  # frames from the start of the first digit to that of the second, at least
    last = scene.frames - scene.visible
    first = jax.random.randint(k_first, (), 0, last - after + 1)
    starts = jnp.stack([first, jax.random.randint(k_second, (), first + after, last + 1)])

    scanned = jax.vmap(lambda k, digit: _draw(k, scans, digit))(jax.random.split(k_scans), digits)
    pasted = jax.vmap(lambda scan, place: _paste(scan, place, scene))(scanned, places)
    ink = jnp.einsum("dt,dhw->thw", _seen(starts, scene), pasted)
    clutter = _clutter(k_background, scene)
    return _clip(
        k_background, ink, clutter, same.astype(int), jnp.column_stack([starts, places]), scene
    )


def _moving_digit(key: PRNGKeyArray, scans: Scans, scene: Scene) -> Clips:
    k_digit, k_direction, k_move = jax.random.split(key, 3)
    digit = jax.random.randint(k_digit, (1,), 0, CLASSES)
    direction = jax.random.randint(k_direction, (1,), 0, len(DIRECTIONS))
    return _moving(k_move, scans, digit, direction, (len(DIRECTIONS) * digit + direction)[0], scene)


def _moving_pair(key: PRNGKeyArray, scans: Scans, scene: Scene) -> Clips:
    k_label, k_classes, k_directions, k_third, k_move = jax.random.split(key, 5)
    same = jax.random.bernoulli(k_label)
    pair, other = _different_classes(k_classes)
    a, b = jax.random.choice(k_directions, len(DIRECTIONS), (2,), replace=False)
    third = jax.random.randint(k_third, (), 0, len(DIRECTIONS))
    directions = jnp.stack([a, jnp.where(same, a, b), third])
    return _moving(
        k_move, scans, jnp.stack([pair, pair, other]), directions, same.astype(int), scene
    )


def _moving(
    key: PRNGKeyArray,
    scans: Scans,
    digits: Int[Array, " n"],
    directions: Int[Array, " n"],
    label: Array,
    scene: Scene,
) -> Clips:
    """Digits that move by a pixel a frame and stay inside."""
    k_scans, k_places, k_background = jax.random.split(key, 3)
    steps = jnp.asarray(DIRECTIONS)[directions]  # (n, 2)
    way = (scene.frames - 1) * steps
    room = scene.size - SIDE
    starts = jax.random.randint(
        k_places, steps.shape, jnp.maximum(-way, 0), room - jnp.maximum(way, 0) + 1
    )
    places = starts[:, None] + jnp.arange(scene.frames)[None, :, None] * steps[:, None]  # (n, T, 2)
    scanned = jax.vmap(lambda k, digit: _draw(k, scans, digit))(
        jax.random.split(k_scans, len(digits)), digits
    )
    paste = jax.vmap(jax.vmap(lambda scan, place: _paste(scan, place, scene), (None, 0)))
    clutter = _clutter(k_background, scene)
    ink = paste(scanned, places).max(axis=0)
    return _clip(k_background, ink, clutter, label, jnp.pad(starts, ((0, 0), (1, 0))), scene)


def _clip(
    key: PRNGKeyArray, ink: Frames, clutter: Frames, label: Array, corners: Array, scene: Scene
) -> Clips:
    """Digits over strokes, and noise over everything; `corners` are frame, row and column of each digit."""
    noise = scene.noise * jax.random.normal(jax.random.fold_in(key, 1), ink.shape)
    return Clips(
        (jnp.maximum(ink, clutter) + noise)[..., None],
        label,
        corners + jnp.array([[0, SIDE // 2, SIDE // 2]]),
    )


def _different_classes(key: PRNGKeyArray) -> Int[Array, "2"]:
    return jax.random.choice(key, CLASSES, (2,), replace=False)


def _distant_places(scene: Scene) -> Int[Array, "pairs 2 2"]:
    """Every two corners at which digits fit and are far enough apart."""
    corners = np.array(list(itertools.product(range(scene.size - SIDE + 1), repeat=2)))
    far = np.abs(corners[:, None] - corners).max(-1) >= scene.distance
    first, second = np.nonzero(far)
    return jnp.asarray(np.stack([corners[first], corners[second]], axis=1))


def _draw(key: PRNGKeyArray, scans: Scans, digit: Array) -> Scan:
    return scans.images[digit, jax.random.randint(key, (), 0, scans.counts[digit])]


def _paste(scan: Scan, corner: Int[Array, "2"], scene: Scene) -> Float[Array, "h w"]:
    """A frame that is empty but for the scan."""
    return jax.lax.dynamic_update_slice(jnp.zeros((scene.size, scene.size)), scan, tuple(corner))


def _seen(starts: Int[Array, " n"], scene: Scene) -> Float[Array, "n t"]:
    since = jnp.arange(scene.frames)[None] - starts[:, None]
    return ((since >= 0) & (since < scene.visible)).astype(jnp.float32)


def _clutter(key: PRNGKeyArray, scene: Scene) -> Frames:
    """Straight strokes of at most a digit's length, each somewhere and at some time."""
    k_ends, k_starts = jax.random.split(key)
    ends = jax.random.uniform(k_ends, (scene.strokes, 2, 2), maxval=scene.size - 1)
    starts = jax.random.randint(k_starts, (scene.strokes,), 0, scene.frames - scene.visible + 1)
    strokes = jax.vmap(lambda two: _stroke(two, scene))(ends)
    return jnp.max(_seen(starts, scene)[..., None, None] * strokes[:, None], axis=0, initial=0.0)


def _stroke(ends: Float[Array, "2 2"], scene: Scene) -> Float[Array, "h w"]:
    start, along = ends[0], ends[1] - ends[0]
    along = along * jnp.minimum(1.0, SIDE / jnp.maximum(jnp.linalg.norm(along), 1.0))
    rows, columns = jnp.indices((scene.size, scene.size), dtype=jnp.float32)
    down, right = rows - start[0], columns - start[1]
    nearest = jnp.clip(
        (down * along[0] + right * along[1]) / jnp.maximum(along @ along, 1e-6), 0, 1
    )
    distance = jnp.hypot(down - nearest * along[0], right - nearest * along[1])
    return scene.stroke_ink * jnp.clip(1.5 - distance, 0, 1)
