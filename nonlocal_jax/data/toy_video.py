"""Toy videos of real handwriting, made on the device from a random key.

The digits are scikit-learn's 1,797 scans of 8×8 pixels. A clip is noise and strokes, and in some of its frames a few digits. What is asked
of it depends on digits that are far apart in space and in time.
"""

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nonlocal_jax.types import Array, Labels, PRNGKeyArray, Video

Task = Literal["single_digit", "same_digit", "moving_pair"]
SIDE = 8  # pixels of a scan
CLASSES = 10


class Scans(NamedTuple):
    """Scanned digits, grouped by class so that one can be drawn by its class.

    Attributes:
        images: (10, n, 8, 8), from 0 (paper) to 1 (ink); rows beyond a class's count repeat its scans.
        counts: (10,), how many scans each class has.
    """

    images: Array
    counts: Array


@dataclasses.dataclass(frozen=True)
class Scene:
    """How the clips look; the same for every network and task."""

    frames: int = 8  # frames of a clip
    size: int = 16  # height and width of a frame, pixels
    visible: int = 2  # consecutive frames in which a digit of `same_digit` is seen
    gap: int = 3  # frames, at least, from the last of the first digit to the first of the second
    noise: float = 0.1  # standard deviation of the background
    strokes: int = 2  # distractor strokes, each in `visible` frames


class Clips(NamedTuple):
    """A batch of clips.

    Attributes:
        video: (B, T, H, W, 1), about 0 (paper) to 1 (ink).
        labels: (B,).
        places: (B, digits, 3), the frame, row and column of the middle of each digit when it is first seen.
    """

    video: Video
    labels: Labels
    places: Array


def load_scans(split: Literal["train", "test"], test_share: float = 0.25) -> Scans:
    """The scans of one split: no scan is in both, and each class is split alike.

    >>> load_scans("train").counts.sum() + load_scans("test").counts.sum()
    Array(1797, dtype=int32)
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    classes = []
    for digit in range(CLASSES):
        images = digits.images[digits.target == digit].astype(np.float32) / 16
        order = np.random.default_rng(digit).permutation(len(images))
        held_out = round(test_share * len(images))
        classes.append(images[order[:held_out] if split == "test" else order[held_out:]])
    counts = [len(images) for images in classes]
    padded = [np.resize(images, (max(counts), SIDE, SIDE)) for images in classes]
    return Scans(jnp.asarray(np.stack(padded)), jnp.asarray(counts, jnp.int32))


def make_clips(task: Task, key: PRNGKeyArray, scans: Scans, batch_size: int, scene: Scene) -> Clips:
    one = {"single_digit": _single_digit, "same_digit": _same_digit}[task]
    return jax.vmap(lambda k: one(k, scans, scene))(jax.random.split(key, batch_size))


def _scan(key, scans, digit):
    index = jax.random.randint(key, (), 0, scans.counts[digit])
    return scans.images[digit, index]


def _paste(image, row, column, size):
    """An (H, W) frame, empty but for `image`."""
    rows = jnp.arange(size) - row
    columns = jnp.arange(size) - column
    pick_r = (rows[:, None] == jnp.arange(SIDE)).astype(image.dtype)
    pick_c = (columns[:, None] == jnp.arange(SIDE)).astype(image.dtype)
    return pick_r @ image @ pick_c.T


def _stroke(key, size):
    """An (H, W) frame, empty but for a line of ink."""
    ends = jax.random.uniform(key, (2, 2), minval=0, maxval=size - 1)
    along = ends[1] - ends[0]
    along = along * jnp.minimum(1.0, SIDE / (jnp.linalg.norm(along) + 1e-6))
    grid = jnp.stack(jnp.meshgrid(jnp.arange(size), jnp.arange(size), indexing="ij"), -1) - ends[0]
    t = jnp.clip(grid @ along / (along @ along + 1e-6), 0, 1)
    distance = jnp.linalg.norm(grid - t[..., None] * along, axis=-1)
    return jnp.clip(1.5 - distance, 0, 1)


def _background(key, scene):
    k_noise, k_stroke, k_time = jax.random.split(key, 3)
    noise = scene.noise * jax.random.normal(k_noise, (scene.frames, scene.size, scene.size))
    strokes = jax.vmap(lambda k: _stroke(k, scene.size))(jax.random.split(k_stroke, scene.strokes))
    starts = jax.random.randint(k_time, (scene.strokes,), 0, max(scene.frames - scene.visible, 0) + 1)
    seen = _seen(starts, scene)  # (strokes, T)
    return noise, jnp.einsum("kt,khw->thw", seen, strokes)


def _seen(starts, scene):
    t = jnp.arange(scene.frames)
    return ((t >= starts[:, None]) & (t < starts[:, None] + scene.visible)).astype(jnp.float32)


def _single_digit(key, scans, scene):
    k_c, k_s, k_p, k_b = jax.random.split(key, 4)
    scene = dataclasses.replace(scene, frames=1, visible=1, strokes=1)
    digit = jax.random.randint(k_c, (), 0, CLASSES)
    row, column = jax.random.randint(k_p, (2,), 0, scene.size - SIDE + 1)
    noise, ink = _background(k_b, scene)
    ink = jnp.maximum(ink * jax.random.bernoulli(k_c, 0.5), _paste(_scan(k_s, scans, digit), row, column, scene.size)[None])
    return Clips((noise + ink)[..., None], digit, jnp.array([[0, row + SIDE // 2, column + SIDE // 2]]))


def _same_digit(key, scans, scene):
    k_same, k_a, k_b, k_sa, k_sb, k_pa, k_pb, k_t, k_bg, k_swap = jax.random.split(key, 10)
    same = jax.random.bernoulli(k_same)
    a = jax.random.randint(k_a, (), 0, CLASSES)
    b = jnp.where(same, a, (a + jax.random.randint(k_b, (), 1, CLASSES)) % CLASSES)
    latest = (scene.frames - scene.gap - 2 * scene.visible + 2)
    t0 = jax.random.randint(k_t, (), 0, latest)
    t1 = jax.random.randint(k_swap, (), t0 + scene.visible + scene.gap - 1, scene.frames - scene.visible + 1)
    p = jax.random.randint(k_pa, (2, 2), 0, scene.size - SIDE + 1)
    noise, ink = _background(k_bg, scene)
    digits = jnp.stack([_paste(_scan(k, scans, d), q[0], q[1], scene.size) for k, d, q in ((k_sa, a, p[0]), (k_sb, b, p[1]))])
    seen = _seen(jnp.stack([t0, t1]), scene)
    ink = jnp.maximum(ink, jnp.einsum("kt,khw->thw", seen, digits))
    places = jnp.concatenate([jnp.stack([t0, t1])[:, None], p + SIDE // 2], axis=1)
    return Clips((noise + ink)[..., None], same.astype(jnp.int32), places)
