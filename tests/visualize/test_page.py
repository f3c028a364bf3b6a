"""The page in a real browser: mouse, touch, keys and playback; it loads nothing but its file."""

import json
import re
import shutil

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from playwright.sync_api import expect, sync_playwright
from visualize.networks import OneBlock, TwoBlocks, clips, random_variables

import nonlocal_jax as nl
from nonlocal_jax.visualize import affinities, explore, measures, to_pixels
from nonlocal_jax.visualize.overlay import NEGATIVE_BANDS, POSITIVE_BANDS, bands, weight_edges
from nonlocal_jax.visualize.page import _first_query, _Weights
from nonlocal_jax.visualize.scene import select_clip

pytestmark = pytest.mark.browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
EDGES = weight_edges(np.array([127.0**2]))  # of the bands of squared levels
DESKTOP = {"viewport": {"width": 1000, "height": 800}}
PHONE = {
    "viewport": {"width": 390, "height": 780},
    "device_scale_factor": 2,
    "has_touch": True,
    "is_mobile": True,
}
WIDE = {"viewport": {"width": 1440, "height": 900}}
VERY_WIDE = {"viewport": {"width": 1920, "height": 1080}}
LOW = {"viewport": {"width": 600, "height": 580}}  # the height limits the size of the frames


@pytest.fixture(scope="module")
def browser():
    installed = next(filter(None, map(shutil.which, BROWSERS)), None)  # None: playwright's own
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=installed, args=list(QUIET))
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def maps():
    x = clips()
    model = TwoBlocks("dot_product")
    return affinities(model, random_variables(model, x), x)


@pytest.fixture(scope="module")
def file(maps, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "explore.html"
    return explore(maps, clips(), path, query=(0, 1, 2), title="Clips & blocks").file


@pytest.fixture
def load(browser):
    """Opens a page and checks, when the test ends, that it had no errors and made no requests."""
    contexts, problems, requests = [], [], []

    def open_page(file, script="", **options):
        context = browser.new_context(**(options or DESKTOP))
        contexts.append(context)
        page = context.new_page()
        page.add_init_script(script)
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    # Chromium warns about reading back the canvas, which only the tests do.
    assert [text for text in problems if "getImageData" not in text] == []
    assert all(url.startswith(("file:", "data:")) for url in requests)


@pytest.fixture
def page(load, file):
    return loaded(load(file))


def loaded(page):
    page.wait_for_function("pictures.every(picture => picture.complete)")
    return page


def status(page):
    return page.locator("#status").inner_text()


def expected_status(affinity, query):
    """Returns the start of the status line for a query of a clip."""
    row = affinity[0].rows(query)[0, 0]
    shares = measures.shares(row.reshape(-1))
    best = int(np.argmax(shares))
    t, r, c = map(int, np.unravel_index(best, affinity.keys))
    weight = "weight (negative)" if row.reshape(-1)[best] < 0 else "weight"
    frame, query_row, column = query
    return (
        f"Query at frame {frame}, row {query_row}, column {column}: the largest {weight} goes to "
        f"frame {t}, row {r}, column {c} of the keys: "
    )


def window_position(page, query):
    """Returns where a query is in the window, by the layout of the page."""
    x, y = page.evaluate("query => place(query, 'queries', layout())", list(query))
    box = page.locator("#view").bounding_box()
    return box["x"] + x, box["y"] + y


def colours(page, points):
    """Returns the colours (N, 3) that are drawn at points in CSS pixels of the canvas."""
    read = (
        "points => points.map(([x, y]) => "
        "[...paint.getImageData(Math.floor(x), Math.floor(y), 1, 1).data.slice(0, 3)])"
    )
    return np.array(page.evaluate(read, np.asarray(points, float).tolist()), float)


def first_query(affinity):
    """Returns the position with the largest share times the length of its arrow."""
    diagonal, best = np.hypot(12, 20), {}
    for query in np.ndindex(affinity.queries):
        shares = measures.shares(affinity[0].rows(query)[0, 0].reshape(-1))
        key = tuple(map(int, np.unravel_index(shares.argmax(), affinity.keys)))
        step = to_pixels(affinity, query).centre - to_pixels(affinity, key, of="keys").centre
        length = min(np.hypot(*step[1:]), diagonal / 4) if step[0] == 0 else diagonal / 4
        best[query] = shares.max() * length
    return max(best, key=best.get)


def show_only(page, *layers):
    for layer in ("heat", "lines"):
        page.locator(f"#{layer}").set_checked(layer in layers)


def test_pointing_shows_what_a_position_attends_to(page, maps):
    assert status(page).startswith(expected_status(maps["first"], (0, 1, 2)))
    assert page.title() == "Clips & blocks"
    picture = page.locator("#view").screenshot()
    for query in [(0, 0, 0), (3, 5, 9), (2, 3, 4)]:
        page.mouse.move(*window_position(page, query))
        assert status(page).startswith(expected_status(maps["first"], query))
    assert page.locator("#view").screenshot() != picture
    share = float(re.search(r"keys: ([\d.]+)% of the total", status(page))[1])
    row = np.abs(maps["first"][0].rows((2, 3, 4))).reshape(-1)
    assert share == pytest.approx(100 * row.max() / row.sum(), abs=0.06)
    assert page.locator("#caption").inner_text() == (
        "Dot product: signed weights f/N, shown as shares of Σ|f|/N; 60 keys."
    )


def test_all_numbers_are_those_of_the_map(page, maps):
    """Every key, its share up to the levels in which it is stored, its sign; the status line."""
    for name, query in (("first", (0, 1, 2)), ("first", (3, 5, 9)), ("second", (1, 2, 0))):
        page.evaluate(
            "([block, query]) => { show(block); select(query); }",
            [list(maps).index(name), list(query)],
        )
        row = maps[name][0].rows(query)[0, 0]
        share = np.abs(row) / np.abs(row).sum()
        stored = np.zeros(row.shape)
        for position, value, sign in page.evaluate("attended()"):
            stored[tuple(position)] = sign * value
        levels = np.sqrt(np.abs(stored) / share.max())
        np.testing.assert_allclose(levels, np.sqrt(share / share.max()), atol=0.51 / 127)
        nonzero = levels > 1 / 127
        assert (np.sign(stored) == np.sign(row))[nonzero].all()
        largest = np.sort(np.abs(stored).reshape(-1))[::-1][:20]
        total = f"The {(largest > 0).sum()} largest weights hold {100 * largest.sum():.0f}% of the"
        assert total in status(page)
        assert f"{share.max() * row.size:.1f} × uniform" in status(page)


def test_frames_and_heat_are_drawn_at_their_positions(page, maps):
    affinity, query = maps["first"], (0, 0, 0)
    page.evaluate("query => select(query)", list(query))
    positions = np.stack(np.unravel_index(np.arange(60), affinity.keys), axis=-1)
    keys = positions[15:]  # not those of frame 0, where the dot is
    pixels = to_pixels(affinity, keys, of="keys").centre.astype(int)
    points = page.evaluate(
        "pixels => { const at = layout(); return pixels.map(([t, r, c]) => { "
        "const [x, y] = corner(t, at); "
        "return [x + (c + 0.5) * at.scale, y + (r + 0.5) * at.scale]; }); }",
        pixels.tolist(),
    )
    show_only(page)
    frames = 255 * clips()[0][tuple(pixels.T)]
    np.testing.assert_allclose(colours(page, points), frames, atol=1.5)
    show_only(page, "heat")
    row = affinity[0].rows(query)[0, 0].reshape(-1)
    levels = bands(np.round(127 * np.sqrt(np.abs(row) / np.abs(row).max())) ** 2, EDGES)
    alpha = 0.6 * (1 - levels[15:, None] / 4)
    expected = alpha * 128 + (1 - alpha) * frames
    np.testing.assert_allclose(colours(page, points), expected, atol=4)
    assert set(levels) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("ratio", [1, 2])
def test_outlines_have_exactly_the_colours_of_the_legend(load, file, maps, ratio):
    """The colours of bands that a query has are drawn, and no others; the legend says what for."""
    page = loaded(load(file, **DESKTOP, device_scale_factor=ratio))
    show_only(page, "heat")
    count_colours = """() => {
      const { data } = paint.getImageData(0, 0, view.width, view.height), counts = {};
      for (let i = 0; i < data.length; i += 4) {
        const colour = `rgb(${data[i]}, ${data[i + 1]}, ${data[i + 2]})`;
        counts[colour] = (counts[colour] ?? 0) + 1;
      }
      return counts;
    }"""
    read_legend = (
        "Object.fromEntries([...document.querySelectorAll('#legend .swatch')].map(swatch => "
        "[getComputedStyle(swatch).borderTopColor, swatch.parentNode.innerText]))"
    )
    seen = set()
    for query in [(3, 0, 9), (0, 1, 2), (2, 3, 4)]:
        page.evaluate("query => select(query)", list(query))
        row = maps["first"][0].rows(query)[0, 0]
        largest = np.abs(row).max()
        stored = np.round(127 * np.sqrt(np.abs(row) / largest))
        levels = set((np.sign(row) * bands(stored**2, EDGES)).reshape(-1).tolist()) - {0}
        counts, legend = page.evaluate(count_colours), page.evaluate(read_legend)
        uniform = largest * row.size / np.abs(row).sum()
        for sign, arm in ((1, POSITIVE_BANDS), (-1, NEGATIVE_BANDS)):
            for band, colour in enumerate(arm, 1):
                name = "rgb({}, {}, {})".format(*(round(255 * value) for value in to_rgb(colour)))
                assert (counts.get(name, 0) >= 8) == (sign * band in levels)
                low, high = (f"{uniform * (k / 5) ** 2:.2g}" for k in (band, band + 1))
                minus = "" if sign > 0 else "−"
                assert legend[name] == f"{minus}{low} to {minus}{high}"
        seen |= levels
    assert seen == {-4, -3, -2, -1, 1, 2, 3, 4}


def test_an_arrow_goes_from_the_query_to_the_key(page, maps):
    affinity, query = maps["first"], (0, 1, 2)
    page.evaluate("query => select(query)", list(query))
    page.locator("#top").fill("1")
    key = affinity[0].top(1, query)[1][0, 0, 0].tolist()
    place = "([position, of]) => place(position, of, layout())"
    start = np.array(page.evaluate(place, [list(query), "queries"]))
    end = np.array(page.evaluate(place, [key, "keys"]))
    length = np.linalg.norm(end - start)
    assert length > 60
    direction = (end - start) / length
    normal = direction[::-1] * (1, -1)
    line = [start + s * direction for s in np.linspace(12, length - 3, 20)]
    background = [*(point + 14 * normal for point in line), end + 8 * direction]
    show_only(page)
    bare_line, bare_background = colours(page, line), colours(page, background)
    show_only(page, "lines")
    changed = np.abs(colours(page, line) - bare_line).max(axis=1) > 10
    assert changed.mean() > 0.6  # the line of a negative weight is dashed
    np.testing.assert_array_equal(colours(page, background), bare_background)


def test_keys_work_only_while_the_frames_have_the_focus(load, file):
    """The keys of the browser keep their meaning, and the frame of the query stays in sight."""
    page = loaded(load(file, viewport={"width": 420, "height": 330}))
    assert page.evaluate("document.activeElement.id") == "view"
    text = status(page)
    page.locator("#play").focus()
    for key in ("b", "h", "a", ".", "ArrowLeft"):
        page.keyboard.press(key)
    assert status(page) == text
    assert page.locator("#block").input_value() == "0"
    page.locator("#view").focus()
    page.keyboard.press("End")
    page.wait_for_function("scrollY > 0")
    scroll = -1
    while scroll != (scroll := page.evaluate("scrollY")):  # browsers scroll smoothly
        page.wait_for_timeout(200)
    assert status(page) == text
    for key in (*"....", *",,,,"):
        page.keyboard.press(key)
        top, height = page.evaluate(
            "[view.getBoundingClientRect().top + corner(state.query[0], layout())[1], "
            "layout().tall]"
        )
        assert top >= -1
        assert top + height <= page.locator("#status").bounding_box()["y"] + 1
    assert page.locator("#status").bounding_box()["y"] < 330


def test_keys_do_everything_that_pointing_does(page, maps):
    query = [0, 1, 2]
    for key, axis, step in [
        ("ArrowRight", 2, 1),
        ("ArrowDown", 1, 1),
        (".", 0, 1),
        ("ArrowLeft", 2, -1),
        ("ArrowUp", 1, -1),
        (".", 0, 1),
        (",", 0, -1),
    ]:
        page.keyboard.press(key)
        query[axis] += step
        assert status(page).startswith(expected_status(maps["first"], tuple(query)))
    for _ in range(12):
        page.keyboard.press("ArrowLeft")
    assert "row 1, column 0:" in status(page)  # it stops at the border
    page.keyboard.press("b")
    assert page.locator("#block").input_value() == "1"
    assert status(page).startswith(expected_status(maps["second"], (1, 0, 0)))
    for key, box in (("h", "#heat"), ("a", "#lines")):
        page.keyboard.press(key)
        assert not page.locator(box).is_checked()
    page.keyboard.press("+")
    assert page.locator("#top").input_value() == "21"


def test_a_block_is_selected_and_played(page, maps):
    page.locator("#block").select_option("second")
    assert status(page).startswith(expected_status(maps["second"], (0, 0, 1)))
    page.locator("#play").click()
    assert page.locator("#play").inner_text() == "Pause"
    for frame in (1, 2, 3, 0):
        pattern = re.compile(f"^Query at frame {frame},")
        expect(page.locator("#status")).to_have_text(pattern, timeout=5000)
    page.keyboard.press(" ")  # the space key presses the button
    assert page.locator("#play").inner_text() == "Play"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_selects_by_tapping(load, file, maps, scheme):
    page = loaded(load(file, color_scheme=scheme, **PHONE))
    page.touchscreen.tap(*window_position(page, (3, 4, 8)))
    assert status(page).startswith(expected_status(maps["first"], (3, 4, 8)))
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 24, 28)"}[scheme]
    too_small_for_a_finger = page.evaluate(
        "[...document.querySelectorAll('button, select')]"
        ".filter(e => e.getBoundingClientRect().height < 36).length"
    )
    assert too_small_for_a_finger == 0
    text, touch = status(page), page.context.new_cdp_session(page)
    x, y = window_position(page, (1, 1, 1))

    def send(event, *offsets):
        points = [{"x": x, "y": y - offset} for offset in offsets]
        touch.send("Input.dispatchTouchEvent", {"type": event, "touchPoints": points})

    send("touchStart", 0)
    for offset in range(20, 201, 20):
        send("touchMove", offset)
    send("touchEnd")
    page.wait_for_timeout(300)
    assert status(page) == text  # a swipe scrolls; it does not select


def test_the_first_position_is_shown_at_once(load, maps, tmp_path):
    """Its arrows grow; people who ask for less motion see them as they are."""
    file = explore(maps, clips(), tmp_path / "first.html").file
    record = (
        "const request = requestAnimationFrame; window.seen = [];"
        "window.requestAnimationFrame = "
        "step => request(now => { step(now); seen.push(state.grown); });"
    )
    page = load(file, script=record)
    page.wait_for_function("() => seen.at(-1) === 1", timeout=20_000)
    grown = page.evaluate("seen")
    assert grown[0] == 0
    assert len(grown) > 20
    assert np.diff(grown).min() >= 0
    assert status(page).startswith(expected_status(maps["first"], first_query(maps["first"])))
    still = load(file, **DESKTOP, reduced_motion="reduce")
    assert still.evaluate("state.grown") == 1
    assert still.evaluate("state.growing") == 0


def test_the_first_position_attends_to_another(maps):
    """Positions that attend to themselves do not show what the page does."""
    selected, scene = select_clip(maps["second"], clips(), 0)
    count = 4 * 3 * 5  # keys are not subsampled
    own = np.arange(count, dtype=np.uint16)[:, None]
    largest = np.full(count, 0.9, np.float32)
    far = 17
    own[far], largest[far] = 29, 0.4
    weights = _Weights(own, np.full((count, 1), 127, np.int8), largest)
    query = _first_query(selected, scene, weights)
    assert query == tuple(map(int, np.unravel_index(far, selected.queries)))


def test_pointing_ends_the_first_animation(load, file, maps):
    page = loaded(load(file))
    page.mouse.move(*window_position(page, (2, 3, 4)))
    assert page.evaluate("state.grown") == 1
    page.wait_for_timeout(100)
    assert page.evaluate("state.grown") == 1
    assert status(page).startswith(expected_status(maps["first"], (2, 3, 4)))


@pytest.mark.parametrize("options", [WIDE, VERY_WIDE, LOW, PHONE])
def test_the_page_explains_itself(load, file, options):
    """Instructions are above the frames, which fill the window; the ring of the focus is whole."""
    page = loaded(load(file, **options))
    width, height = options["viewport"]["width"], options["viewport"]["height"]
    box = page.locator("#view").bounding_box()
    text = page.locator("#help")
    assert text.inner_text().startswith("Point at a position in the frames, tap it, or move")
    assert text.bounding_box()["y"] + text.bounding_box()["height"] <= box["y"]
    assert page.locator("#count").inner_text() == "20"
    page.locator("#top").fill("7")
    assert page.locator("#count").inner_text() == "7"
    assert page.get_by_label("number of arrows").count() == 1
    side, columns = page.evaluate("[layout().side, layout().columns]")
    assert columns * side > 0.9 * box["width"] or box["y"] + box["height"] > 0.8 * height
    assert side > (115 if width < 1000 else 300)
    page.locator("#view").focus()
    ring = 5  # outline and offset
    assert page.evaluate("getComputedStyle(view).outlineStyle") == "solid"
    assert box["x"] - ring >= 0
    assert box["x"] + box["width"] + ring <= width
    assert box["y"] + box["height"] + ring <= height
    for x in (box["x"] + 20, box["x"] + box["width"] - 20):
        for y in (box["y"] - 4, box["y"] + box["height"] + 3):
            covering = "([x, y]) => document.elementFromPoint(x, y).id"
            assert page.evaluate(covering, [x, y]) == "stage"
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_legend_explains_all_colours(page):
    legend = page.locator("#legend").inner_text()
    assert "the position you selected" in legend
    assert "Outlines and arrows of negative weights are dashed." in legend
    assert page.locator("#legend .swatch").count() == 10
    page.locator("#block").select_option("second")  # softmax weights are not negative
    assert "negative" not in page.locator("#legend").inner_text()
    assert page.locator("#legend .swatch").count() == 6


def test_a_screen_reader_finds_names_and_is_not_flooded(page):
    for role, name in [
        ("combobox", "Block"),
        ("button", "Play"),
        ("checkbox", "outlines"),
        ("checkbox", "arrows"),
        ("application", "first, 4 frames of 6 by 10 positions"),
        ("heading", "Clips & blocks"),
        ("region", "Colours of outlines and arrows"),
    ]:
        assert page.get_by_role(role, name=name, exact=True).count() == 1, name
    described = page.locator("#view").get_attribute("aria-describedby").split()
    assert all(page.locator(f"#{name}").inner_text() for name in described)
    live = page.locator("#status")
    assert live.get_attribute("aria-live") == "polite"
    page.locator("#play").click()
    assert live.get_attribute("aria-live") == "off"
    page.locator("#play").click()
    assert live.get_attribute("aria-live") == "polite"


def test_a_notebook_displays_the_page(browser, maps, tmp_path):
    shown = explore(maps["second"], clips(), tmp_path / "one.html")._repr_html_()
    (tmp_path / "notebook.html").write_text(f"<!doctype html><body>{shown}</body>")
    page = browser.new_page()
    page.goto((tmp_path / "notebook.html").as_uri())
    frame = page.frame_locator("iframe")
    frame.locator("#status").wait_for()
    text = frame.locator("#status").inner_text()
    assert text.startswith(expected_status(maps["second"], first_query(maps["second"])))
    page.close()


def test_names_are_never_run_as_html(load, maps, tmp_path):
    names = [
        "</script><script>document.title='x'</script>",
        "<img src=x onerror=\"document.title='x'\">",
    ]
    title, named = "".join(names), dict.fromkeys(names, maps["second"])
    page = load(explore(named, clips(), tmp_path / "names.html", title=title).file)
    page.wait_for_timeout(100)
    assert page.title() == title
    assert page.locator("#block option").all_text_contents() == names
    assert page.locator("img, h1 *").count() == 0


def test_maps_of_two_networks_are_compared(load, maps, tmp_path):
    two = {
        "before": maps["first"][0],
        "after": maps["first"][1],
    }  # two clips stand for two networks
    page = load(explore(two, clips()[0], tmp_path / "two.html").file)
    assert page.locator("#block option").all_text_contents() == ["before", "after"]
    query = first_query(two["before"])
    assert status(page).startswith(expected_status(two["before"], query))
    page.locator("#block").select_option("after")
    assert status(page).startswith(expected_status(two["after"], query))


def test_an_image_with_masked_keys(load, tmp_path):
    """An image has no frames to play; masked keys are not counted."""
    x = clips((1, 9, 14, 3))
    model = OneBlock(nl.layers.nonlocal_block("embedded_gaussian", subsample=False), masked=True)
    affinity = affinities(model, random_variables(model, x), x)["block"]
    page = load(explore(affinity, x, tmp_path / "image.html", query=(1, 2)).file)
    assert status(page).startswith("Query at row 1, column 2: the largest weight goes to row ")
    assert not page.locator("#play").is_visible()
    assert f"{affinity.rows((1, 2)).max() * 9 * 7:.1f} × uniform" in status(page)
    assert "; 63 keys." in page.locator("#caption").inner_text()


def test_large_maps_keep_only_their_largest_weights(maps, tmp_path):
    file = explore(maps, clips(), tmp_path / "cut.html", max_bytes=2 * 240 * 3 * 11).file
    data = json.loads(re.search(r'id="data">(.*?)</script>', file.read_text())[1])
    assert [block["kept"] for block in data["blocks"]] == [11, 44]
    assert data["blocks"][0]["caption"].endswith(
        "60 keys; the 11 largest of each position are stored."
    )


@pytest.mark.usefixtures("as_users_see_it")
def test_arguments_that_do_not_fit_are_errors(maps, tmp_path):
    file = tmp_path / "page.html"
    with pytest.raises(ValueError, match="maps must have at least one block; got none"):
        explore({}, clips(), file)
    with pytest.raises(ValueError, match=r"file must be in an existing directory; .*none does not"):
        explore(maps, clips(), tmp_path / "none" / "page.html")
    with pytest.raises(ValueError, match="file must not be a directory; got"):
        explore(maps, clips(), tmp_path)
    with pytest.raises(
        ValueError,
        match=r"query must be a single position of the map \(4, 6, 10\) of first; got shape "
        r"\(2, 3\)",
    ):
        explore(maps, clips(), file, query=[(0, 0, 0), (1, 0, 0)])
    with pytest.raises(
        IndexError, match=r"a query must lie inside the map \(4, 6, 10\) of first; got \(9, 0, 0\)"
    ):
        explore(maps, clips(), file, query=(9, 0, 0))
    with pytest.raises(ValueError, match="clip must be the one that the network saw"):
        explore(maps, clips()[:, :2], file)
    assert not file.exists()
