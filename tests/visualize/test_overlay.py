"""Heat maps on photographs: the frames stay visible, and colours are those of the colour bar."""

import functools
import itertools

import flax.linen as nn
import jax
import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from PIL import Image
from sklearn.datasets import load_sample_image
from visualize.networks import OneBlock, clips, random_variables

import nonlocal_jax as nl
from nonlocal_jax import visualize
from nonlocal_jax.visualize import overlay
from nonlocal_jax.visualize.scene import select_clip

SIZE = (192, 288)  # of the photographs; the map has cells of 24 pixels
COLOURS = (*overlay.POSITIVE_BANDS, *overlay.NEGATIVE_BANDS)
# Machado, Oliveira, Fernandes 2009: colours as people without one kind of cone see them.
COLOUR_BLINDNESS = {
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}
LUMA = np.array([0.2126, 0.7152, 0.0722])


@functools.cache
def photographs():
    """Returns photographs that are cold, bright, dark and warm, by name."""
    hopper = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    with Image.open(hopper) as image:
        portrait = image.convert("RGB").crop((0, 40, 512, 381))
    china, flower, portrait = (
        np.asarray(image.resize(SIZE[::-1]), np.float32) / 255
        for image in (
            Image.fromarray(load_sample_image("china.jpg")),
            Image.fromarray(load_sample_image("flower.jpg")),
            portrait,
        )
    )
    warm = china.mean(axis=-1, keepdims=True) * np.array([1.2, 0.75, 0.25], np.float32)
    return {
        "cold": portrait * np.array([0.6, 0.8, 1], np.float32),
        "bright": 1 - (1 - china) / 3,
        "dark": flower / 4,
        "warm": warm.clip(0, 1),
    }


class Patches(nn.Module):
    """Blocks on patches of 24 pixels."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (24, 24), strides=24)(x)
        for name in ("embedded_gaussian", "dot_product"):
            nl.layers.nonlocal_block(name, subsample=False, name=name)(x)


@functools.cache
def maps():
    photo = photographs()["bright"][None]
    x = (photo - photo.mean((0, 1, 2))) / photo.std((0, 1, 2))
    variables = jax.tree.map(lambda kernel: 0.55 * kernel, random_variables(Patches(), x))
    return visualize.affinities(Patches(), variables, x)


def rendered(figure, dpi=150):
    """Returns the pixels of a figure, from 0 to 1, the first row at the bottom."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[::-1, :, :3] / 255


def without_overlay(figure):
    """Removes everything from the panels of a figure but their photographs."""
    for ax in figure.axes:
        if ax.images:
            for artist in (*ax.collections, *ax.lines):
                artist.remove()
    return figure


def pixel_box(ax, left, top, right, bottom):
    """Returns the slices of the pixels that a rectangle of the frame covers."""
    (x0, y1), (x1, y0) = np.round(ax.transData.transform([(left, top), (right, bottom)])).astype(
        int
    )
    return slice(y0, y1), slice(x0, x1)


def cell_boxes(ax):
    """Returns the pixels of each cell, by row and column, and the values of the cells."""
    values = np.asarray(ax.collections[0].get_array())
    edges = ax.collections[0].get_coordinates()
    boxes = {
        (i, j): pixel_box(ax, *edges[i, j], *edges[i + 1, j + 1])
        for i, j in itertools.product(*map(range, values.shape))
    }
    return boxes, values


PICTURES = {
    "heatmap": lambda photo: visualize.heatmap(maps()["embedded_gaussian"], photo, (3, 4)),
    "signed": lambda photo: visualize.heatmap(maps()["dot_product"], photo, (3, 4)),
    "received": lambda photo: visualize.received(maps()["embedded_gaussian"], photo),
    "entropy": lambda photo: visualize.entropy(maps()["embedded_gaussian"], photo),
}
PHOTOGRAPHS = ("cold", "bright", "dark", "warm")
CASES = [("heatmap", photo) for photo in PHOTOGRAPHS] + [(name, "warm") for name in PICTURES][1:]


@pytest.mark.parametrize(("picture", "photo"), CASES)
def test_the_photograph_is_visible_in_every_cell(picture, photo):
    """In the strongest cell it is as in the original; elsewhere it is greyed."""
    figure = PICTURES[picture](photographs()[photo])
    shown = rendered(figure)
    (panel,) = [ax for ax in figure.axes if ax.images]
    boxes, values = cell_boxes(panel)
    original = rendered(without_overlay(figure))
    strongest = np.unravel_index(np.abs(values).argmax(), values.shape)
    for position, (rows, columns) in boxes.items():
        size = rows.stop - rows.start
        inner = np.s_[rows.start + size // 4 : rows.stop - size // 4]
        inner = (inner, np.s_[columns.start + size // 4 : columns.stop - size // 4])
        before, after = original[inner] @ LUMA, shown[inner] @ LUMA
        if picture == "entropy" or position != (3, 4):  # where the circle is
            assert after.std() >= 0.35 * before.std() - 0.01
            assert position != strongest or np.allclose(before, after, atol=0.03)
    rows, columns = boxes[strongest]
    unchanged = np.abs(shown - original)[rows, columns].max(axis=-1) < 0.03
    assert unchanged.mean() > 0.4


@pytest.mark.parametrize("picture", PICTURES)
def test_colours_are_those_of_the_colour_bar(picture):
    """The pixels of the outline of a cell have the colour of the bar at the value of the cell."""
    figure = PICTURES[picture](photographs()["warm"])
    panel, bar = figure.axes
    for line in panel.lines:
        line.remove()  # the circle covers some outlines
    shown = rendered(figure)
    outlines = panel.collections[1]
    values, edges = outlines.get_array(), outlines.get_coordinates()
    centres = (edges[:-1, :-1] + edges[1:, 1:]) / 2
    checked = set()
    for row, column in zip(*np.nonzero(~np.ma.getmaskarray(values)), strict=True):
        if (row % 5 in (1, 3)) == (column % 5 in (1, 3)):
            continue  # parts at corners are small, and partly below the black lines
        value = values[row, column]
        x, y = panel.transData.transform(centres[row, column]).astype(int)
        bar_y = bar.transData.transform((0.5, value))[1]
        edges_y = [bar.transData.transform((0.5, edge))[1] for edge in outlines.norm.boundaries]
        if np.abs(np.array(edges_y) - bar_y).min() < 2:
            continue  # where two colours of the bar meet
        bar_x = bar.transAxes.transform((0.5, 0.5))[0]
        np.testing.assert_allclose(shown[y, x], shown[int(bar_y), int(bar_x)], atol=0.01)
        checked.add(tuple(shown[y, x]))
    assert len(checked) >= 3


def test_negative_weights_have_dashed_outlines_and_cold_colours():
    figure = PICTURES["signed"](photographs()["cold"])
    panel = figure.axes[0]
    heat = panel.collections[0].get_array()
    outlines = panel.collections[1]
    assert (heat < 0).any()
    assert (heat > 0).any()
    drawn = ~np.ma.getmaskarray(outlines.get_array()).reshape(heat.shape[0], 5, heat.shape[1], 5)
    middle = drawn[:, 2].any(axis=-1) | drawn[:, :, :, 2].any(axis=1)
    corners = drawn[:, 0, :, 0] | drawn[:, 0, :, 4] | drawn[:, 4, :, 0] | drawn[:, 4, :, 4]
    levels = overlay.bands(heat, overlay.weight_edges(heat))
    assert not middle[levels < 0].any()
    assert corners[levels < 0].any()
    assert middle[levels > 0].any()
    assert not drawn.any(axis=(1, 3))[levels == 0].any()
    for value in (-1, 1):
        colours = [to_rgb(c) for c in (overlay.NEGATIVE_BANDS, overlay.POSITIVE_BANDS)[value > 0]]
        strongest = outlines.norm.vmax * value * np.array([0.05, 0.2, 0.5, 0.9])
        np.testing.assert_allclose(outlines.to_rgba(strongest)[:, :3], colours, atol=1e-6)
    assert "(negative weights dashed)" in figure._supxlabel.get_text().replace("\n", " ")


def linear(colour):
    """Returns a colour in linear RGB, whose weighted sum is the luminance."""
    colour = np.asarray(to_rgb(colour) if isinstance(colour, str) else colour)
    return np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """Returns CIE L*a*b* of a colour in linear RGB."""
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.array(to_xyz) @ np.clip(rgb, 0, 1) / np.array([0.9505, 1, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("kind", ["all cones", *COLOUR_BLINDNESS])
def test_colour_blind_people_tell_all_colours_apart(kind):
    seen = np.array(COLOUR_BLINDNESS.get(kind, np.eye(3)))
    for first, second in itertools.combinations((*COLOURS, overlay.GREY), 2):
        distance = np.linalg.norm(lab(seen @ linear(first)) - lab(seen @ linear(second)))
        assert distance > 12, (first, second)
    for arm in (overlay.POSITIVE_BANDS, overlay.NEGATIVE_BANDS):
        brightness = [lab(seen @ linear(colour))[0] for colour in arm]
        assert np.diff(brightness).min() > 8


def test_an_outline_contrasts_with_every_photograph():
    """Either its colour or its black border does, also on a photograph of the same colour."""
    for background in np.linspace(0, 1, 101):
        black = (background + 0.05) / 0.05
        for colour in COLOURS:
            luminance = linear(colour) @ LUMA
            bright, dim = max(luminance, background) + 0.05, min(luminance, background) + 0.05
            assert max(black, bright / dim) > 1.8


def test_bands_are_equal_steps_of_the_square_root():
    edges = 3.0 * (np.arange(6) / 5) ** 2
    inside = (edges[1:] + edges[:-1]) / 2
    np.testing.assert_allclose(overlay.weight_edges(np.array([1.0, -3.0])), edges)
    assert overlay.bands(inside, edges).tolist() == [0, 1, 2, 3, 4]
    assert overlay.bands(-inside, edges).tolist() == [0, -1, -2, -3, -4]
    assert overlay.bands(np.array([3.0, -3.0, 0.0]), edges).tolist() == [4, -4, 0]


@pytest.mark.parametrize("picture", PICTURES)
def test_outlines_are_where_the_colour_bar_changes(picture):
    """Also for values at the edges of the bands: both are computed from the same edges."""
    panel = PICTURES[picture](photographs()["warm"]).axes[0]
    outlines = panel.collections[1]
    boundaries = np.array(outlines.norm.boundaries)
    edges = boundaries[-5:] if boundaries[0] < 0 else boundaries[1:]
    first = 0.0 if boundaries[0] < 0 else boundaries[0]
    values = np.concatenate([edges[:-1], np.nextafter(edges, 0)])
    levels = overlay.bands(values, np.array([first, *edges]))
    colours = [matplotlib.colors.to_rgba(c) for c in (overlay.GREY, *overlay.POSITIVE_BANDS)]
    for level, colour in zip(levels, outlines.to_rgba(values), strict=True):
        np.testing.assert_allclose(colour[:3], colours[level][:3])


def test_numbers_of_keys_have_equal_bands_from_the_smallest_to_the_largest():
    """Positions that attend to nearly all keys are told apart, as trained networks have them."""
    edges = overlay.equal_edges(np.array([[330.0, 380.0]]))
    np.testing.assert_allclose(edges, [330, 340, 350, 360, 370, 380])
    values = np.array([330.0, 345.0, 355.0, 365.0, 380.0])
    assert overlay.bands(values, edges).tolist() == [0, 1, 2, 3, 4]
    figure = PICTURES["entropy"](photographs()["warm"])
    values = figure.axes[0].collections[0].get_array()
    boundaries = figure.axes[0].collections[1].norm.boundaries
    np.testing.assert_allclose(boundaries, np.linspace(values.min(), values.max(), 6))
    levels = overlay.bands(values, np.array(boundaries))
    assert set(levels.flat) == {0, 1, 2, 3, 4}


def test_a_flat_map_shows_no_rounding():
    edges = overlay.equal_edges(np.array([[391.99, 392.0]]))
    np.testing.assert_allclose(edges, 392 * np.arange(6) / 5)
    assert overlay.bands(np.array([391.99, 392.0]), edges).tolist() == [4, 4]


@pytest.mark.parametrize(
    ("ticks", "labels"),
    [
        ([0, 0.037, 0.15, 0.337, 0.6, 0.94], ["0", "0.037", "0.15", "0.34", "0.6", "0.94"]),
        ([49.5, 49.6, 49.7], ["49.5", "49.6", "49.7"]),
        ([1200.2, 1200.4], ["1200.2", "1200.4"]),
        ([120.0, 3400.0], ["120", "3,400"]),
    ],
)
def test_ticks_have_the_digits_that_tell_them_apart(ticks, labels):
    digits = overlay._tick_digits(ticks)
    assert [overlay._tick(tick, digits) for tick in ticks] == labels


def test_neighbours_of_the_same_band_share_an_outline():
    """Only rims next to another band are drawn, corners included."""
    levels = np.array([[0, 0, 0, 0], [0, 3, 3, 0], [0, 3, 1, 0], [0, 0, 0, 0]])
    drawn = overlay._outline(levels).reshape(4, 5, 4, 5)
    first, last, whole = [0], [4], range(5)
    expected = {
        (1, 1): [(first, whole), (whole, first), (last, last)],
        (1, 2): [(first, whole), (whole, last), (last, whole)],
        (2, 1): [(whole, first), (last, whole), (whole, last)],
        (2, 2): [(first, whole), (last, whole), (whole, first), (whole, last)],
    }
    for i, j in itertools.product(range(4), repeat=2):
        cell = np.zeros((5, 5), bool)
        for rows, columns in expected.get((i, j), []):
            cell[np.ix_(rows, columns)] = True
        np.testing.assert_array_equal(drawn[i, :, j], cell)


def test_maps_of_many_cells_and_without_weights():
    """Cells of two pixels keep a window; weights of 0 are drawn as nothing."""
    x = clips((1, 48, 80, 3))
    block = nl.layers.nonlocal_block("dot_product", subsample=False)
    model = OneBlock(block)
    affinity = visualize.affinities(model, random_variables(model, x), x)["block"]
    figure = visualize.heatmap(affinity, x, (0, 0))
    edges = figure.axes[0].collections[1].get_coordinates()[0, :6, 0]
    assert (edges[4] - edges[1]) / (edges[5] - edges[0]) > 0.5
    assert all(np.diff(edges) > 0)
    zeros = jax.tree.map(np.zeros_like, random_variables(model, x))
    affinity = visualize.affinities(model, zeros, x)["block"]
    selected, scene = select_clip(affinity, x, 0)
    assert np.abs(selected.rows((0, 0))).max() == 0
    figure = visualize.heatmap(affinity, x, (0, 0))
    assert np.ma.getmaskarray(figure.axes[0].collections[1].get_array()).all()
    rendered(figure, dpi=50)
    assert scene.keys.grid == (1, 48, 80)
