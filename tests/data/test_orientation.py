"""Frames are flipped and rotated as FFmpeg's `autorotate` shows them. Pictures are read as well."""

from fractions import Fraction

import av
import numpy as np
import pytest
from data.files import ORIENTATIONS, scene, set_display_matrix
from PIL import Image

from nonlocal_jax.data import stand_in
from nonlocal_jax.data.video import Video, Window


def oriented_file(folder, name):
    """Makes a file with a display matrix, and one that differs in nothing else."""
    stored, file = folder / "stored.mp4", folder / f"{name}.mp4"
    if not stored.exists():
        stand_in.write(stored, scene(4, 48, 64), options={"crf": "10"})
    file.write_bytes(stored.read_bytes())
    set_display_matrix(file, ORIENTATIONS[name][0])
    return stored, file


def orient_by_matrix(pixels, coefficients):
    """Moves the centre of every pixel as the matrix says, and the whole to the origin."""
    a, b, c, d = coefficients
    y, x = np.indices(pixels.shape[:2])
    new_x, new_y = a * x + c * y, b * x + d * y
    new_x, new_y = new_x - new_x.min(), new_y - new_y.min()
    shown = np.zeros((new_y.max() + 1, new_x.max() + 1, 3), np.uint8)
    shown[new_y, new_x] = pixels
    return shown


def orient_by_filters(pixels, filters):
    """Applies the filters that FFmpeg inserts for a display matrix."""
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
    graph = av.filter.Graph()
    nodes = [graph.add_buffer(width=64, height=48, format=frame.format, time_base=Fraction(1))]
    nodes += [graph.add(*arguments) for arguments in filters]
    nodes += [graph.add("format", "rgb24"), graph.add("buffersink")]
    graph.link_nodes(*nodes).configure()
    graph.push(frame)
    return graph.pull().to_ndarray(format="rgb24")


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_frames_are_flipped_and_rotated_as_the_display_matrix_says(tmp_path, name):
    stored, file = oriented_file(tmp_path, name)
    coefficients, filters = ORIENTATIONS[name]
    with Video(stored) as video:
        frames = video.read([0, 3])
    expected = np.stack([orient_by_matrix(frame, coefficients) for frame in frames])
    by_filters = np.stack([orient_by_filters(frame, filters) for frame in frames])
    np.testing.assert_array_equal(expected, by_filters)
    height, width = expected.shape[1:3]
    # At even distances, since colours have half the resolution.
    window = Window(4, 10, 30, 36, (30, 36))
    with Video(file) as video:
        np.testing.assert_array_equal(video.read([0, 3]), expected)
        part = video.read([3], lambda *shape: window if shape == (height, width) else None)[0]
        small = video.read([3], lambda h, w: Window(0, 0, h, w, (h // 2, w // 2)))[0]
    np.testing.assert_array_equal(part, expected[1, 4:34, 10:46])
    halved = expected[1].reshape(height // 2, 2, width // 2, 2, 3).mean((1, 3))
    assert np.abs(small - halved).mean() < 6


@pytest.mark.parametrize(
    ("coefficients", "same_as"),
    [
        ((0, 0, 0, 0), "upright"),
        ((0, 0, 0, -1), "upright"),
        ((0, 2, -2, 0), "clockwise"),
        ((-0.5, 0, 0, 0.5), "mirrored"),
        ((-3, 0.01, 0.01, -2), "upside_down"),
    ],
)
def test_display_matrices_that_are_scaled_or_damaged(tmp_path, coefficients, same_as):
    file = oriented_file(tmp_path, same_as)[1]
    with Video(file) as video:
        expected = video.read([1])
    set_display_matrix(file, coefficients)
    with Video(file) as video:
        np.testing.assert_array_equal(video.read([1]), expected)


@pytest.mark.parametrize("tag", range(1, 9))
def test_orientation_in_the_exif_data_of_a_picture(tmp_path, tag):
    pixels, exif = scene(1, 48, 64)[0], Image.Exif()
    exif[0x112] = tag
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=95, subsampling=0)
    by_tag = (
        *("upright", "mirrored", "upside_down", "flipped"),
        *("transposed", "clockwise", "mirrored_clockwise", "counterclockwise"),
    )
    expected = orient_by_matrix(pixels, ORIENTATIONS[by_tag[tag - 1]][0])
    with Video(tmp_path / "a.jpg") as video:
        assert np.abs(video.read([0])[0].astype(int) - expected).mean() < 6


@pytest.mark.parametrize("name", ["a.jpg", "a.jpeg", "a.png", "a%03d.jpg", "a*?{b}.png", "a.mp4"])
def test_pictures_are_read_whatever_their_size_and_name(tmp_path, name):
    for shape in ((8, 8), (240, 320)):
        pixels = scene(1, *shape)[0]
        kind = "PNG" if name.endswith("png") else "JPEG"
        Image.fromarray(pixels).save(tmp_path / name, kind, quality=95, subsampling=0)
        with Video(tmp_path / name) as video:
            assert np.abs(video.read([0])[0].astype(int) - pixels).mean() < 6
