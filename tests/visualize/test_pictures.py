"""The pictures show the right arrows over the right frames; captions say what weights are."""

import dataclasses

import av
import flax.linen as nn
import matplotlib.image
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch
from matplotlib.text import Text
from PIL import Image
from visualize.networks import CLIP, OneBlock, TwoBlocks, clips, random_variables

import nonlocal_jax as nl
from nonlocal_jax import visualize
from nonlocal_jax.visualize.panels import POSITIVE

TITLES = {
    "embedded_gaussian": "embedded Gaussian",
    "dot_product": "dot product",
    "concatenation": "concatenation",
}


class AllNetworks(nn.Module):
    """The networks of all pairwise functions on one input, so that they are compiled once."""

    @nn.compact
    def __call__(self, x):
        for name in TITLES:
            TwoBlocks(name, name, name=name)(x)


@pytest.fixture(scope="module")
def all_maps():
    x, model = clips(), AllNetworks()
    return visualize.affinities(model, random_variables(model, x), x)


@pytest.fixture(params=TITLES)
def maps(all_maps, request):
    return {name: all_maps[f"{request.param}/{name}"] for name in ("first", "second")}


@pytest.fixture
def softmax_map(all_maps):
    return all_maps["embedded_gaussian/first"]


@pytest.fixture(scope="module")
def image_map():
    x = clips((1, 9, 14, 3))
    model = OneBlock(nl.layers.nonlocal_block("embedded_gaussian"))
    return visualize.affinities(model, random_variables(model, x), x)["block"], x


def arrows_of(figure):
    return [artist for artist in figure.artists if isinstance(artist, ConnectionPatch)]


def caption_of(figure):
    return figure._supxlabel.get_text().replace("\n", " ")


def pixels_of(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].astype(int)


def test_arrows_point_to_the_largest_shares(maps):
    affinity, query = maps["first"], (2, 1, 4)
    figure = visualize.arrows(affinity, clips(), query, top=7, sample=1)
    axes = [ax for ax in figure.axes if ax.images]
    assert [ax.get_xlabel() for ax in axes] == ["frame 0", "frame 1", "frame 2", "frame 3"]
    weights, positions = affinity[1].top(7, query)
    arrows = arrows_of(figure)
    assert len(arrows) == 7
    for arrow in arrows:  # queries have stride 2 and centre 0
        assert arrow.axesA is axes[2]
        assert arrow.xy1 == (8, 2)
    ends = [  # keys have stride 4 and centre 1
        (axes[t], (4 * column + 1, 4 * row + 1)) for t, row, column in positions[0, 0].tolist()
    ]
    assert [(arrow.axesB, arrow.xy2) for arrow in arrows] == ends
    assert arrows[0].get_linewidth() > arrows[-1].get_linewidth()
    positive = [arrow.get_linestyle() in ("solid", "-") for arrow in arrows]
    assert positive == (weights[0, 0] > 0).tolist()


@pytest.mark.parametrize("sample", [0, 1])
def test_panels_are_the_frames_of_the_clip(softmax_map, sample):
    x, query = clips(), (0, 0, 0)
    for figure in (
        visualize.arrows(softmax_map, x, query, sample=sample),
        visualize.heatmap(softmax_map, x, query, sample=sample),
        visualize.entropy(softmax_map, x, sample=sample),
        visualize.received(softmax_map, x[sample], sample=sample),
    ):
        panels = [ax.images[0].get_array() for ax in figure.axes if ax.images]
        np.testing.assert_array_equal(panels, x[sample])


def test_clips_of_any_range_are_shown(image_map):
    affinity, _ = image_map
    ramp = np.linspace(0, 1, 9 * 14 * 3, dtype=np.float32).reshape(9, 14, 3)
    for clip, expected in (
        (ramp, ramp),
        (4 * ramp - 2, ramp),
        (np.round(255 * ramp).astype(np.int64), ramp),
        (np.full_like(ramp, -3), 0 * ramp),
        (np.full_like(ramp, 7), 0 * ramp),
    ):
        picture = visualize.arrows(affinity, clip, (0, 0)).axes[0].images[0].get_array()
        np.testing.assert_allclose(picture, expected, atol=0.002)


def test_the_caption_says_what_the_weights_are(maps):
    affinity = maps["second"]
    caption = caption_of(visualize.arrows(affinity, clips(), (0, 0, 0)))
    title = TITLES[affinity.instantiation]
    assert caption.startswith(f"{affinity.block} · {title} · the 20 largest weights")
    units = {
        "embedded_gaussian": "softmax weights, which sum to 1",
        "dot_product": "signed weights f/N, shown as shares of Σ|f|/N",
        "concatenation": "non-negative weights f/N, shown as shares of their sum",
    }
    assert caption.endswith(units[affinity.instantiation])
    shares = visualize.measures.shares(affinity[0].rows((0, 0, 0)).reshape(-1))
    assert f"hold {np.sort(shares)[::-1][:20].sum():.0%} of the total" in caption


def test_heat_is_a_multiple_of_the_uniform_share(maps):
    affinity = maps["first"]
    queries = [(0, 0, 0), (3, 5, 9)]
    figure = visualize.heatmap(affinity, clips(), queries)
    meshes = [ax.collections[0] for ax in figure.axes if ax.collections and ax.images]
    assert len(meshes) == 8
    heat = np.stack([mesh.get_array() for mesh in meshes]).reshape(2, -1)
    rows = affinity[0].rows(queries)[0].reshape(2, -1)
    expected = 60 * rows / np.abs(rows).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(heat, expected, rtol=1e-5)
    signed = affinity.instantiation == "dot_product"
    outlines = [ax.collections[1] for ax in figure.axes if ax.collections and ax.images]
    largest = np.abs(heat).max()
    for outline in outlines:  # one scale for all frames and rows
        assert outline.norm.vmax == pytest.approx(largest)
        assert outline.norm.vmin == pytest.approx(-largest if signed else 0)
    assert signed == (heat.min() < 0)
    # Keys have stride 4 and centre 1; the outermost cells extend to the borders.
    columns, rows = np.moveaxis(np.asarray(meshes[0].get_coordinates()), -1, 0)
    assert columns[0].tolist() == [-0.5, 3, 7, 11, 15, 19.5]
    assert rows[:, 0].tolist() == [-0.5, 3, 7, 11.5]
    # Queries have stride 2 and centre 0; column, row.
    dots = [line.get_xydata().tolist() for ax in figure.axes for line in ax.lines]
    assert dots == [[[0, 0]], [[18, 10]]]
    assert [i for i, ax in enumerate(figure.axes) if ax.lines] == [0, 7]
    assert TITLES[affinity.instantiation] in caption_of(figure)


def test_tables_and_bars_show_the_measures(maps, tmp_path):
    affinity = maps["second"]
    table = visualize.time_by_time(affinity).axes[0].images[0].get_array()
    np.testing.assert_allclose(table, visualize.measures.time_by_time(affinity)[0], rtol=1e-6)
    figure = visualize.entropy(affinity, clips())
    cells = np.stack([ax.collections[0].get_array() for ax in figure.axes if ax.images])
    entropies = visualize.measures.entropy(affinity)[0]
    np.testing.assert_allclose(cells, np.exp(entropies), rtol=1e-6)
    figure = visualize.query_dependence(maps)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["first", "second"]
    cosines = [visualize.measures.query_dependence(m[0]).cosine[0] for m in maps.values()]
    np.testing.assert_allclose([bar.get_width() for bar in figure.axes[0].patches], cosines)
    figure.savefig(tmp_path / "figure.png")
    assert matplotlib.image.imread(tmp_path / "figure.png").std() > 0.05


def texts_of(figure):
    return " ".join(text.get_text() for text in figure.findobj(Text)).replace("\n", " ")


@pytest.mark.parametrize(
    "name", ["cost_$x$ a_b^c {d} $5", r"broken $\frac{$", r"_hidden \$", "<b>&amp; [red]", "3"]
)
def test_names_are_drawn_as_they_are(softmax_map, name):
    """Characters that Matplotlib reads as a formula, or hides, are characters of a name."""
    affinity = dataclasses.replace(softmax_map, block=name)
    x, query = clips(), (0, 1, 2)
    for figure in (
        visualize.arrows(affinity, x, query, top=1),
        visualize.heatmap(affinity, x, query),
        visualize.entropy(affinity, x),
        visualize.received(affinity, x),
        visualize.time_by_time(affinity),
        visualize.query_dependence({name: affinity, "other": affinity}),
    ):
        named = [
            text
            for text in figure.findobj(Text)
            if f"{text.get_text()} ·".replace("\n", " ").startswith((f"{name} ·", f"{name}:"))
        ]
        assert named
        for text in named:
            numbers = text.get_text().isdigit()  # of the axes, which look like a name
            assert numbers or not (text.get_parse_math() or text.get_usetex())
        FigureCanvasAgg(figure).draw()


def test_names_that_cannot_be_drawn_are_escaped(softmax_map):
    """Control characters, and bytes of file names that are not UTF-8."""
    affinity = dataclasses.replace(softmax_map, block="a\x1b[2J\nb\udcff")
    for figure in (
        visualize.arrows(affinity, clips(), (0, 1, 2)),
        visualize.time_by_time(affinity),
        visualize.query_dependence({affinity.block: affinity}),
    ):
        assert r"a\x1b[2J\nb\udcff" in texts_of(figure)
        FigureCanvasAgg(figure).draw()


def test_long_names_fit_the_figure(softmax_map):
    name = "/".join(f"stage{i}" for i in range(20))
    affinity = dataclasses.replace(softmax_map, block=name)
    for figure in (
        visualize.heatmap(affinity, clips(), (0, 1, 2)),
        visualize.time_by_time(affinity),
        visualize.query_dependence({name: affinity}),
    ):
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        text, *_ = (t for t in figure.findobj(Text) if t.get_text().startswith("stage0"))
        box = text.get_window_extent(canvas.get_renderer())
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.width
        assert name in text.get_text().replace("\n", "")


def test_arrows_contrast_with_frames_of_their_colour(softmax_map):
    """An amber arrow on an amber photograph has a dark casing."""
    amber = np.broadcast_to(np.array(to_rgb(POSITIVE), np.float32), CLIP[1:])
    figure = visualize.arrows(softmax_map, amber, (0, 0, 0), top=1)
    (arrow,) = arrows_of(figure)
    drawn = pixels_of(figure)
    arrow.remove()
    darker = (pixels_of(figure) - drawn).max(axis=-1)
    assert (darker > 80).sum() > 50


def test_images_are_clips_of_one_frame(image_map):
    affinity, x = image_map
    for figure in (
        visualize.arrows(affinity, x, (4, 5)),
        visualize.heatmap(affinity, x[0], (4, 5)),
        visualize.entropy(affinity, x),
    ):
        assert isinstance(figure, Figure)
    with pytest.raises(
        ValueError, match=r"time_by_time needs a map of size \(T, H, W\); block has \(9, 14\)"
    ):
        visualize.time_by_time(affinity)


def test_pictures_are_drawn_on_existing_axes(softmax_map):
    figure = Figure()
    axes = figure.subplots(1, 4)
    assert visualize.arrows(softmax_map, clips(), (0, 0, 0), axes=axes) is figure
    assert all(ax.images for ax in axes)
    with pytest.raises(ValueError, match="axes must be 4, one for each frame of the map; got 3"):
        visualize.arrows(softmax_map, clips(), (0, 0, 0), axes=axes[:3])


def test_a_map_without_time_is_drawn_on_the_middle_frame():
    class Averaged(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(6, (1, 3, 3), (1, 2, 2), padding=[(0, 0), (1, 1), (1, 1)])(x).mean(axis=1)
            return nl.layers.nonlocal_block("embedded_gaussian", name="block")(x)

    x = clips()
    affinity = visualize.affinities(Averaged(), random_variables(Averaged(), x), x)["block"]
    assert affinity.queries == (6, 10)
    assert visualize.to_pixels(affinity, (2, 3)).centre.tolist() == [1.5, 4, 6]
    for figure in (visualize.arrows(affinity, x, (2, 3)), visualize.heatmap(affinity, x, (2, 3))):
        (picture,) = [ax.images[0].get_array() for ax in figure.axes if ax.images]
        np.testing.assert_array_equal(picture, x[0, 2])


def test_animations_show_each_query(softmax_map, tmp_path):
    queries = [(0, 0, 0), (2, 5, 9)]
    gif = visualize.animate(softmax_map, clips(), queries, tmp_path / "moving.gif", seconds=0.25)
    with Image.open(gif) as image:
        assert image.n_frames == 2
        assert image.info["duration"] == 250
        first = np.asarray(image.convert("RGB"), int)
        image.seek(1)
        assert np.abs(np.asarray(image.convert("RGB"), int) - first).max() > 100
    mp4 = visualize.animate(softmax_map, clips(), queries, tmp_path / "moving.mp4", seconds=0.25)
    with av.open(str(mp4)) as container:
        decoded = container.decode(video=0)
        frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in decoded]
    assert len(frames) == 2
    height, width = frames[0].shape[:2]
    # The GIF has a palette, the MP4 has colours at half the resolution.
    assert np.abs(frames[0] - first[:height, :width]).mean() < 15
    assert np.abs(frames[1] - frames[0]).mean() > 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moving.gif", "moving.mp4"]


def test_animations_show_the_requested_clip(softmax_map, tmp_path):
    query = (1, 2, 3)
    expected, another = (
        pixels_of(visualize.arrows(softmax_map, clips(), query, sample=sample)) for sample in (1, 0)
    )
    file = visualize.animate(softmax_map, clips(), [query], tmp_path / "one.gif", sample=1)
    with Image.open(file) as image:
        shown = np.asarray(image.convert("RGB"), int)
    assert np.abs(shown - expected).mean() < 0.3 * np.abs(shown - another).mean()


@pytest.mark.usefixtures("as_users_see_it")
def test_arguments_that_do_not_fit_are_errors(softmax_map):
    affinity, x = softmax_map, clips()
    with pytest.raises(
        IndexError, match=r"a query must lie inside the map \(4, 6, 10\) of .*first"
    ):
        visualize.arrows(affinity, x, (4, 0, 0))
    with pytest.raises(
        ValueError,
        match=r"clip must be the one that the network saw, of shape \(4, 12, 20, 3\) .* got "
        r"\(4, 12, 18, 3\)",
    ):
        visualize.arrows(affinity, x[:, :, :, 2:], (0, 0, 0))
    broken = x.copy()
    broken[0, 0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="clip must be finite"):
        visualize.heatmap(affinity, broken, (0, 0, 0))
    for count in (0, 17):
        with pytest.raises(
            ValueError,
            match=f"queries must be between 1 and 16, each a row of the picture; got {count}",
        ):
            visualize.heatmap(affinity, x, [(0, 0, 0)] * count)
    with pytest.raises(
        ValueError,
        match=r"query must be a single position of the map \(4, 6, 10\) of .*first; got shape "
        r"\(2, 3\)",
    ):
        visualize.arrows(affinity, x, [(0, 0, 0), (1, 1, 1)])
    with pytest.raises(ValueError, match="top must be at least 1; got -1"):
        visualize.arrows(affinity, x, (0, 0, 0), top=-1)
    for pixel in ((np.nan, 0, 0), (0, 12, 0), (0, 0, -1), (0, 0)):
        with pytest.raises(
            ValueError,
            match=r"pixel must be 3 numbers, a position inside the input \(4, 12, 20\); got",
        ):
            visualize.from_pixels(affinity, pixel)
    with pytest.raises(ValueError, match="maps must have at least one block; got none"):
        visualize.query_dependence({})
    assert x.shape == CLIP


@pytest.mark.usefixtures("as_users_see_it")
def test_animations_that_cannot_be_written_are_errors(softmax_map, tmp_path):
    valid = {"queries": [(0, 0, 0)], "file": tmp_path / "a.gif"}
    for options, message in (
        ({"file": tmp_path / "a.webm"}, r"file must end in \.gif or \.mp4; got 'a\.webm'"),
        ({"file": tmp_path / "none" / "a.gif"}, r"file must be in an existing directory; .*none"),
        ({"seconds": 0}, "seconds must be between 0.01 and 60; got 0"),
        ({"queries": np.zeros((0, 3), int)}, "queries must have at least one position; got none"),
    ):
        with pytest.raises(ValueError, match=message):
            visualize.animate(softmax_map, clips(), **(valid | options))
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("as_users_see_it")
def test_maps_that_cannot_be_drawn_are_errors():
    sequence = clips((1, 9, 4))
    model = OneBlock(nl.layers.nonlocal_block("dot_product"))
    (affinity,) = visualize.affinities(model, random_variables(model, sequence), sequence).values()
    with pytest.raises(
        ValueError, match=r"pictures need a map of size \(T, H, W\) or \(H, W\); block has \(9,\)"
    ):
        visualize.arrows(affinity, sequence, (0,))
    x = clips()
    block = nl.layers.nonlocal_block("dot_product", name="block")
    turned = nn.Sequential([lambda x: x.swapaxes(2, 3), block])
    (affinity,) = visualize.affinities(turned, random_variables(turned, x), x).values()
    for draw in (visualize.arrows, visualize.heatmap):
        with pytest.raises(
            ValueError,
            match=r"pictures need a map whose axes are in the order of the input's; those of "
            ".* are not",
        ):
            draw(affinity, x, (0, 0, 0))
