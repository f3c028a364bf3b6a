"""What the pictures show: the right arrows, over the right frames, and what the weights are, in words."""

import av
import flax.linen as nn
import matplotlib.image
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch
from PIL import Image
from visualize.networks import CLIP, OneBlock, TwoBlocks, clips, with_weights

import nonlocal_jax as nl
from nonlocal_jax import visualize


@pytest.fixture(scope="module", params=["embedded_gaussian", "dot_product", "concatenation"])
def maps(request):
    x = clips()
    model = TwoBlocks(request.param, request.param)
    return visualize.affinities(model, with_weights(model, x), x)


@pytest.fixture(scope="module")
def of_images():
    x = clips((1, 9, 14, 3))
    model = OneBlock(nl.layers.nonlocal_block("embedded_gaussian"))
    return visualize.affinities(model, with_weights(model, x), x)["block"], x


def drawn(figure):
    return [artist for artist in figure.artists if isinstance(artist, ConnectionPatch)]


def caption(figure):
    return figure._supxlabel.get_text().replace("\n", " ")


def test_arrows_go_to_the_largest_shares(maps):
    one, query = maps["first"], (2, 1, 4)
    figure = visualize.arrows(one, np.asarray(clips()), query, top=7, sample=1)
    axes = [ax for ax in figure.axes if ax.images]
    assert [ax.get_xlabel() for ax in axes] == ["frame 0", "frame 1", "frame 2", "frame 3"]
    weights, positions = one[1].top(7, query)
    arrows = drawn(figure)
    assert len(arrows) == 7
    assert all(
        arrow.axesA is axes[2] and arrow.xy1 == (8, 2) for arrow in arrows
    )  # stride 2, centre 0
    ends = [
        (axes[t], (4 * column + 1, 4 * row + 1)) for t, row, column in positions[0, 0].tolist()
    ]  # keys: stride 4, centre 1
    assert [(arrow.axesB, arrow.xy2) for arrow in arrows] == ends
    assert arrows[0].get_linewidth() > arrows[-1].get_linewidth()
    signs = [arrow.get_linestyle() in ("solid", "-") for arrow in arrows]
    assert signs == (weights[0, 0] > 0).tolist()


@pytest.mark.parametrize("sample", [0, 1])
def test_panels_are_the_frames_of_the_clip(maps, sample):
    one, x = maps["first"], np.asarray(clips())
    for figure in (
        visualize.arrows(one, x, (0, 0, 0), sample=sample), visualize.heatmap(one, x, (0, 0, 0), sample=sample),
        visualize.entropy(one, x, sample=sample), visualize.received(one, x[sample], sample=sample),
    ):  # fmt: skip
        shown = [ax.images[0].get_array() for ax in figure.axes if ax.images]
        np.testing.assert_array_equal(shown, x[sample])


def test_clips_of_any_numbers_are_shown(of_images):
    one, _ = of_images
    ramp = np.linspace(0, 1, 9 * 14 * 3, dtype=np.float32).reshape(9, 14, 3)
    for clip, shown in (
        (ramp, ramp), (4 * ramp - 2, ramp), (np.round(255 * ramp).astype(np.int64), ramp),
        (np.full_like(ramp, -3), 0 * ramp), (np.full_like(ramp, 7), 0 * ramp),
    ):  # fmt: skip
        picture = visualize.arrows(one, clip, (0, 0)).axes[0].images[0].get_array()
        np.testing.assert_allclose(picture, shown, atol=0.002)


def test_what_the_weights_are_is_said_on_the_picture(maps):
    one = maps["second"]
    text = caption(visualize.arrows(one, clips(), (0, 0, 0)))
    assert text.startswith(f"second · {one.instantiation.replace('_', ' ')} · the 20 largest")
    assert {
        "embedded_gaussian": "a softmax, sum 1",
        "dot_product": "shares of Σ|f|/N",
        "concatenation": "of any size, shown as shares",
    }[one.instantiation] in text
    held = np.sort(visualize.measures.shares(one[0].rows((0, 0, 0)).reshape(-1)))[::-1][:20].sum()
    assert f"hold {held:.0%}" in text


def test_heat_is_a_multiple_of_the_uniform_share(maps):
    one = maps["first"]
    figure = visualize.heatmap(one, clips(), [(0, 0, 0), (3, 5, 9)])
    cells = [ax.collections[0].get_array() for ax in figure.axes if ax.collections and ax.images]
    assert len(cells) == 8
    heat = np.stack(cells).reshape(2, -1)
    rows = one[0].rows([(0, 0, 0), (3, 5, 9)])[0].reshape(2, -1)
    np.testing.assert_allclose(heat, 60 * rows / np.abs(rows).sum(-1, keepdims=True), rtol=1e-5)
    meshes = [ax.collections[0] for ax in figure.axes if ax.collections and ax.images]
    signed = one.instantiation == "dot_product"
    assert {mesh.get_cmap().name for mesh in meshes} == {"PuOr_r" if signed else "inferno"}
    assert meshes[0].norm.vmin == (-meshes[0].norm.vmax if signed else 0)
    columns, rows = np.moveaxis(
        np.asarray(meshes[0].get_coordinates()), -1, 0
    )  # keys: stride 4, centre 1; then the borders
    assert columns[0].tolist() == [-0.5, 3, 7, 11, 15, 19.5]
    assert rows[:, 0].tolist() == [-0.5, 3, 7, 11.5]
    dots = [line.get_xydata().tolist() for ax in figure.axes for line in ax.lines]
    assert dots == [[[0, 0]], [[18, 10]]]  # queries: stride 2, centre 0; column, row
    assert [i for i, ax in enumerate(figure.axes) if ax.lines] == [0, 7]
    assert one.instantiation.replace("_", " ") in caption(figure)


def test_the_other_pictures(maps, tmp_path):
    one = maps["second"]
    table = visualize.time_by_time(one).axes[0].images[0].get_array()
    np.testing.assert_allclose(table, visualize.measures.time_by_time(one)[0], rtol=1e-6)
    figure = visualize.entropy(one, clips())
    cells = np.stack([ax.collections[0].get_array() for ax in figure.axes if ax.images])
    np.testing.assert_allclose(cells, np.exp(visualize.measures.entropy(one)[0]), rtol=1e-6)
    figure = visualize.query_dependence(maps)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["first", "second"]
    found = [visualize.measures.query_dependence(one[0]).cosine[0] for one in maps.values()]
    np.testing.assert_allclose([bar.get_width() for bar in figure.axes[0].patches], found)
    figure.savefig(tmp_path / "figure.png")
    assert matplotlib.image.imread(tmp_path / "figure.png").std() > 0.05


def test_images_are_clips_of_one_frame(of_images):
    one, x = of_images
    for figure in (
        visualize.arrows(one, x, (4, 5)), visualize.heatmap(one, x[0], (4, 5)), visualize.entropy(one, x),
    ):  # fmt: skip
        assert isinstance(figure, Figure)
    with pytest.raises(
        ValueError, match=r"time by time wants a map of \(T, H, W\); block has \(9, 14\)"
    ):
        visualize.time_by_time(one)


def test_pictures_are_drawn_on_axes_that_are_given(maps):
    figure = Figure()
    axes = figure.subplots(1, 4)
    assert visualize.arrows(maps["first"], clips(), (0, 0, 0), axes=axes) is figure
    assert all(ax.images for ax in axes)
    with pytest.raises(ValueError, match="axes must be 4, one for each frame of the map; got 3"):
        visualize.arrows(maps["first"], clips(), (0, 0, 0), axes=axes[:3])


def test_animations_are_of_the_clip_that_is_asked_for(maps, tmp_path):
    def drawn(sample):
        canvas = FigureCanvasAgg(visualize.arrows(maps["first"], clips(), (1, 2, 3), sample=sample))
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].astype(int)

    file = visualize.animate(maps["first"], clips(), [(1, 2, 3)], tmp_path / "one.gif", sample=1)
    with Image.open(file) as image:
        shown = np.asarray(image.convert("RGB"), int)
    assert np.abs(shown - drawn(1)).mean() < 0.3 * np.abs(shown - drawn(0)).mean()


def test_a_map_without_time_is_drawn_on_the_frame_in_the_middle():
    class Averaged(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nl.layers.VideoConv(6, (1, 3, 3), (1, 2, 2))(x).mean(axis=1)
            return nl.layers.nonlocal_block("embedded_gaussian", name="block")(x)

    x = clips()
    one = visualize.affinities(Averaged(), with_weights(Averaged(), x), x)["block"]
    assert one.queries == (6, 10)
    assert visualize.to_pixels(one, (2, 3)).centre.tolist() == [1.5, 4, 6]
    for figure in (visualize.arrows(one, x, (2, 3)), visualize.heatmap(one, x, (2, 3))):
        (shown,) = [ax.images[0].get_array() for ax in figure.axes if ax.images]
        np.testing.assert_array_equal(shown, np.asarray(x)[0, 2])


def test_animations_show_each_query(maps, tmp_path):
    queries = [(0, 0, 0), (1, 2, 3), (2, 5, 9)]
    gif = visualize.animate(maps["first"], clips(), queries, tmp_path / "moving.gif", seconds=0.25)
    with Image.open(gif) as image:
        assert image.n_frames == 3
        assert image.info["duration"] == 250
        first = np.asarray(image.convert("RGB"), int)
        image.seek(2)
        assert np.abs(np.asarray(image.convert("RGB"), int) - first).max() > 100
    mp4 = visualize.animate(maps["first"], clips(), queries, tmp_path / "moving.mp4", seconds=0.25)
    with av.open(str(mp4)) as container:
        frames = [
            frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)
        ]
    assert len(frames) == 3
    height, width = frames[0].shape[:2]
    assert (
        np.abs(frames[0] - first[:height, :width]).mean() < 15
    )  # a palette here, coarser colours there
    assert np.abs(frames[2] - frames[0]).mean() > 1


@pytest.mark.usefixtures("as_users_see_it")
def test_bad_input(maps, tmp_path):
    one, x = maps["first"], np.array(clips())
    with pytest.raises(
        IndexError, match=r"a query must lie inside the map \(4, 6, 10\) of first; got \(4, 0, 0\)"
    ):
        visualize.arrows(one, x, (4, 0, 0))
    with pytest.raises(
        ValueError,
        match=r"clip must be the one that the network saw, \(4, 12, 20, 3\), .* got \(4, 12, 18, 3\)",
    ):
        visualize.arrows(one, x[:, :, :, 2:], (0, 0, 0))
    broken = x.copy()
    broken[0, 0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="clip must be finite"):
        visualize.heatmap(one, broken, (0, 0, 0))
    for number in (0, 17):
        with pytest.raises(
            ValueError,
            match=f"queries must be from 1 to 16, each a row of the picture; got {number}",
        ):
            visualize.heatmap(one, x, [(0, 0, 0)] * number)
    with pytest.raises(
        ValueError,
        match=r"query must be one position of the map \(4, 6, 10\) of first; got \(2, 3\)",
    ):
        visualize.arrows(one, x, [(0, 0, 0), (1, 1, 1)])
    with pytest.raises(ValueError, match="top must be at least 1; got -1"):
        visualize.arrows(one, x, (0, 0, 0), top=-1)
    for where in ((np.nan, 0, 0), (0, 12, 0), (0, 0, -1), (0, 0)):
        with pytest.raises(
            ValueError,
            match=r"where must be 3 numbers, a position inside the input \(4, 12, 20\); got",
        ):
            visualize.from_pixels(one, where)
    with pytest.raises(ValueError, match="maps must have at least one block; got none"):
        visualize.query_dependence({})
    for options, message in (
        ({"file": tmp_path / "a.webm"}, r"file must end in \.gif or \.mp4; got 'a\.webm'"),
        ({"file": tmp_path / "none" / "a.gif"}, "file must lie in a folder that is there"),
        ({"seconds": 0}, "seconds must be from 0.01 to 60; got 0"),
        ({"queries": np.zeros((0, 3), int)}, "queries must hold at least one position; got none"),
    ):
        with pytest.raises(ValueError, match=message):
            visualize.animate(
                **{"affinity": one, "clip": x, "queries": [(0, 0, 0)], "file": tmp_path / "a.gif"}
                | options
            )
    assert not list(tmp_path.iterdir())
    sequence = clips((1, 9, 4))
    block = OneBlock(nl.layers.nonlocal_block("dot_product"))
    (of_sequence,) = visualize.affinities(block, with_weights(block, sequence), sequence).values()
    with pytest.raises(
        ValueError, match=r"pictures want a map of \(T, H, W\) or \(H, W\); block has \(9,\)"
    ):
        visualize.arrows(of_sequence, sequence, (0,))
    turned = nn.Sequential(
        [lambda x: x.swapaxes(2, 3), nl.layers.nonlocal_block("dot_product", name="block")]
    )
    (of_turned,) = visualize.affinities(turned, with_weights(turned, x), x).values()
    for draw in (visualize.arrows, visualize.heatmap):
        with pytest.raises(
            ValueError,
            match=r"pictures want the axes of a map in the order of the input's; those of .* are not",
        ):
            draw(of_turned, x, (0, 0, 0))
    assert x.shape == CLIP
