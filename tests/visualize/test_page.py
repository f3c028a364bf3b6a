"""The page in a real browser: pointing, tapping, keys, playback; and that it needs nothing but its file."""

import importlib
import json
import re
import shutil

import numpy as np
import pytest
from playwright.sync_api import expect, sync_playwright
from visualize.networks import OneBlock, TwoBlocks, clips, with_weights

import nonlocal_jax as nl
from nonlocal_jax.visualize import affinities, explore, measures, to_pixels

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    found = next(
        filter(None, map(shutil.which, BROWSERS)), None
    )  # else the one of `playwright install chromium`
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=list(QUIET))
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def maps():
    x = clips()
    model = TwoBlocks("dot_product")
    return affinities(model, with_weights(model, x), x)


@pytest.fixture(scope="module")
def file(maps, tmp_path_factory):
    return explore(
        maps,
        clips(),
        tmp_path_factory.mktemp("page") / "explore.html",
        query=(0, 1, 2),
        title="Clips & blocks",
    ).file


@pytest.fixture
def opened(browser, file):
    """A page of a computer, what it asked for and what went wrong in it."""
    yield from _opened(browser, file, viewport={"width": 1000, "height": 800})


def _opened(browser, file, **options):
    context = browser.new_context(**options)
    page = context.new_page()
    wrong, asked = [], []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    page.wait_for_function("pictures.every(picture => picture.complete)")
    yield page
    assert [
        text for text in wrong if "getImageData" not in text
    ] == []  # the tests read what was drawn
    assert all(url.startswith(("file:", "data:")) for url in asked)
    context.close()


def said(page):
    return page.locator("#status").inner_text()


def sees(one, query):
    """What the page must say of a query."""
    row = one[0].rows(query)[0, 0]
    share = measures.shares(row.reshape(-1))
    best = int(np.argmax(share))
    t, r, c = map(int, np.unravel_index(best, one.keys))
    negatively = ", negatively," if row.reshape(-1)[best] < 0 else ""
    return f"From frame {query[0]}, row {query[1]}, column {query[2]}: most{negatively} at frame {t}, row {r}, column {c} of the keys, "


def point(page, query):
    """Where a position is in the window: from the page's own layout."""
    x, y = page.evaluate("query => place(query, 'queries', layout())", list(query))
    box = page.locator("#view").bounding_box()
    return box["x"] + x, box["y"] + y


def test_pointing_shows_where_a_position_looks(opened, maps):
    assert said(opened).startswith(sees(maps["first"], (0, 1, 2)))
    assert opened.title() == "Clips & blocks"
    before = opened.locator("#view").screenshot()
    for query in [(0, 0, 0), (3, 5, 9), (2, 3, 4)]:
        opened.mouse.move(*point(opened, query))
        assert said(opened).startswith(sees(maps["first"], query))
    assert opened.locator("#view").screenshot() != before
    share = float(re.search(r"([\d.]+)% of the weight", said(opened))[1])
    row = np.abs(maps["first"][0].rows((2, 3, 4))).reshape(-1)
    assert share == pytest.approx(100 * row.max() / row.sum(), abs=0.06)
    assert (
        opened.locator("#caption").inner_text()
        == "dot product; signed weights f/N, shown as shares of Σ|f|/N; 60 keys."
    )


def colours(page, points):
    """(N, 3) of the frames as they are drawn, at points in CSS pixels of the canvas."""
    read = "points => points.map(([x, y]) => [...paint.getImageData(Math.floor(x), Math.floor(y), 1, 1).data.slice(0, 3)])"
    return np.array(page.evaluate(read, np.asarray(points, float).tolist()), float)


def show_only(page, *shown):
    for box in ("heat", "lines"):
        page.locator(f"#{box}").set_checked(box in shown)


def test_all_that_it_shows_is_in_the_map(opened, maps):
    """Every key, its share to the steps in which it is stored, its sign; and what the status says of the largest."""
    for name, query in (("first", (0, 1, 2)), ("first", (3, 5, 9)), ("second", (1, 2, 0))):
        opened.evaluate(
            "([block, query]) => { show(block); look(query); }",
            [list(maps).index(name), list(query)],
        )
        row = maps[name][0].rows(query)[0, 0]
        share = np.abs(row) / np.abs(row).sum()
        shown = np.zeros(row.shape)
        for position, value, sign in opened.evaluate("looks()"):
            shown[tuple(position)] = sign * value
        steps = np.sqrt(np.abs(shown) / share.max())
        np.testing.assert_allclose(steps, np.sqrt(share / share.max()), atol=0.51 / 127)
        visible = steps > 1 / 127
        assert (np.sign(shown) == np.sign(row))[visible].all()
        held = np.sort(np.abs(shown).reshape(-1))[::-1][:20]
        assert said(opened).endswith(
            f"the {(held > 0).sum()} largest hold {100 * held.sum():.0f}%."
        )
        assert f"{share.max() * row.size:.1f} × uniform" in said(opened)


def test_the_frames_and_the_heat_are_drawn_where_they_belong(opened, maps):
    one, query = maps["first"], (0, 0, 0)
    opened.evaluate("query => look(query)", list(query))
    keys = np.stack(np.unravel_index(np.arange(60), one.keys), axis=-1)[
        15:
    ]  # not in frame 0, where the dot is
    pixels = to_pixels(one, keys, of="keys").centre.astype(int)
    points = opened.evaluate(
        "pixels => { const at = layout(); return pixels.map(([t, r, c]) => { const [x, y] = corner(t, at); "
        "return [x + (c + 0.5) * at.scale, y + (r + 0.5) * at.scale]; }); }",
        pixels.tolist(),
    )
    show_only(opened)
    under = 255 * np.asarray(clips())[0][tuple(pixels.T)]
    np.testing.assert_allclose(colours(opened, points), under, atol=1.5)
    show_only(opened, "heat")
    row = one[0].rows(query)[0, 0].reshape(-1)[15:, None]
    alpha = 0.8 * np.abs(row) / np.abs(one[0].rows(query)).max()
    expected = alpha * np.where(row > 0, (230, 159, 0), (204, 121, 167)) + (1 - alpha) * under
    np.testing.assert_allclose(colours(opened, points), expected, atol=4)
    assert alpha.max() > 0.3


def test_an_arrow_goes_from_the_query_to_the_key(opened, maps):
    one, query = maps["first"], (0, 1, 2)
    opened.evaluate("query => look(query)", list(query))
    opened.locator("#top").fill("1")
    _, key = one[0].top(1, query)
    start, end = (
        np.array(
            opened.evaluate(
                "([position, of]) => place(position, of, layout())", [list(map(int, position)), of]
            )
        )
        for position, of in ((query, "queries"), (key[0, 0, 0], "keys"))
    )
    length = np.linalg.norm(end - start)
    assert length > 60
    along = (end - start) / length
    on = [start + s * along for s in np.linspace(12, length - 3, 20)]
    off = [*(point + 14 * along[::-1] * (1, -1) for point in on), end + 8 * along]
    show_only(opened)
    without_on, without_off = colours(opened, on), colours(opened, off)
    show_only(opened, "lines")
    assert (np.abs(colours(opened, on) - without_on).max(axis=1) > 10).mean() > 0.6  # it is dashed
    np.testing.assert_array_equal(colours(opened, off), without_off)


def test_the_keys_are_those_of_the_frames_alone(browser, file):
    """Elsewhere, and with the keys of a browser, the page is as any other; the frame of the query stays in sight."""
    for page in _opened(browser, file, viewport={"width": 420, "height": 330}):
        assert page.evaluate("document.activeElement.id") == "view"
        before = said(page)
        page.locator("#play").focus()
        for key in ("b", "h", "a", ".", "ArrowLeft"):
            page.keyboard.press(key)
        assert said(page) == before
        assert page.locator("#block").input_value() == "0"
        page.locator("#view").focus()
        page.keyboard.press("End")
        page.wait_for_function("scrollY > 0")
        before_scroll = -1
        while before_scroll != (
            before_scroll := page.evaluate("scrollY")
        ):  # browsers scroll smoothly
            page.wait_for_timeout(200)
        assert said(page) == before
        for key in (*"....", *",,,,"):
            page.keyboard.press(key)
            top, tall = page.evaluate(
                "[view.getBoundingClientRect().top + corner(state.query[0], layout())[1], layout().tall]"
            )
            assert top >= -1
            assert top + tall <= page.locator("#status").bounding_box()["y"] + 1
        assert page.locator("#status").bounding_box()["y"] < 330


def test_keys_do_all_that_pointing_does(opened, maps):
    query = [0, 1, 2]
    for key, axis, by in [
        ("ArrowRight", 2, 1),
        ("ArrowDown", 1, 1),
        (".", 0, 1),
        ("ArrowLeft", 2, -1),
        ("ArrowUp", 1, -1),
        (".", 0, 1),
        (",", 0, -1),
    ]:
        opened.keyboard.press(key)
        query[axis] += by
        assert said(opened).startswith(sees(maps["first"], tuple(query)))
    for _ in range(12):
        opened.keyboard.press("ArrowLeft")
    assert "row 1, column 0:" in said(opened)  # the border holds
    opened.keyboard.press("b")
    assert opened.locator("#block").input_value() == "1"
    assert said(opened).startswith(sees(maps["second"], (1, 0, 0)))
    for key, box in (("h", "#heat"), ("a", "#lines")):
        opened.keyboard.press(key)
        assert not opened.locator(box).is_checked()
    opened.keyboard.press("+")
    assert opened.locator("#top").input_value() == "21"


def test_a_block_is_chosen_and_played(opened, maps):
    opened.locator("#block").select_option("second")
    assert said(opened).startswith(sees(maps["second"], (0, 0, 1)))
    opened.locator("#play").click()
    assert opened.locator("#play").inner_text() == "Pause"
    for frame in (1, 2, 3, 0):
        expect(opened.locator("#status")).to_have_text(
            re.compile(f"^From frame {frame},"), timeout=5000
        )
    opened.keyboard.press(" ")  # the button's own
    assert opened.locator("#play").inner_text() == "Play"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_one_taps(browser, file, maps, scheme):
    phone = {
        "viewport": {"width": 390, "height": 780},
        "device_scale_factor": 2,
        "has_touch": True,
        "is_mobile": True,
    }
    for page in _opened(browser, file, color_scheme=scheme, **phone):
        page.touchscreen.tap(*point(page, (3, 4, 8)))
        assert said(page).startswith(sees(maps["first"], (3, 4, 8)))
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 24, 28)"}[scheme]
        small = page.evaluate(
            "[...document.querySelectorAll('button, select')].filter(e => e.getBoundingClientRect().height < 36).length"
        )
        assert small == 0  # large enough for a finger
        before, touch = said(page), page.context.new_cdp_session(page)
        x, y = point(page, (1, 1, 1))
        for kind, up in (
            ("touchStart", 0),
            *(("touchMove", n) for n in range(20, 201, 20)),
            ("touchEnd", None),
        ):
            points = [] if up is None else [{"x": x, "y": y - up}]
            touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        page.wait_for_timeout(300)
        assert said(page) == before  # a swipe is not a tap


def test_it_shows_itself_in_a_notebook(browser, file, maps, tmp_path):
    shown = explore(maps["second"], clips(), tmp_path / "one.html")._repr_html_()
    (tmp_path / "notebook.html").write_text(f"<!doctype html><body>{shown}</body>")
    page = browser.new_page()
    page.goto((tmp_path / "notebook.html").as_uri())
    inner = page.frame_locator("iframe")
    inner.locator("#status").wait_for()
    assert inner.locator("#status").inner_text().startswith(sees(maps["second"], (2, 1, 2)))
    page.close()


@pytest.mark.parametrize(
    "name",
    ["</script><script>document.title='x'</script>", "<img src=x onerror=\"document.title='x'\">"],
)
def test_names_cannot_leave_their_place(browser, maps, tmp_path, name):
    page = browser.new_page()
    page.goto(
        explore({name: maps["second"]}, clips(), tmp_path / "names.html", title=name).file.as_uri()
    )
    page.wait_for_timeout(100)
    assert page.title() == name
    assert page.locator("#block option").all_text_contents() == [name]
    assert page.locator("img, h1 *").count() == 0
    page.close()


def test_maps_of_two_networks_are_compared(browser, maps, tmp_path):
    page = browser.new_page()
    other = affinities(
        TwoBlocks("dot_product"), with_weights(TwoBlocks("dot_product"), clips(), 5), clips()
    )["first"]
    page.goto(
        explore(
            {"before": maps["first"], "after": other}, clips(), tmp_path / "two.html"
        ).file.as_uri()
    )
    assert page.locator("#block option").all_text_contents() == ["before", "after"]
    assert said(page).startswith(sees(maps["first"], (2, 3, 5)))
    page.locator("#block").select_option("after")
    assert said(page).startswith(sees(other, (2, 3, 5)))
    page.close()


def test_masked_keys_are_not_counted(maps, browser, tmp_path):
    x = clips((1, 9, 14, 3))
    model = OneBlock(nl.layers.nonlocal_block("embedded_gaussian", subsample=False), masked=True)
    one = affinities(model, with_weights(model, x), x)["block"]
    page = browser.new_page()
    page.goto(explore(one, x, tmp_path / "masked.html", query=(1, 2)).file.as_uri())
    assert f"{one.rows((1, 2)).max() * 9 * 7:.1f} × uniform" in said(page)
    assert "; 63 keys." in page.locator("#caption").inner_text()
    page.close()


def test_large_maps_are_cut_to_their_largest_weights(maps, tmp_path, monkeypatch):
    monkeypatch.setattr(
        importlib.import_module("nonlocal_jax.visualize.page"), "BUDGET", 2 * 240 * 3 * 11
    )
    page = explore(maps, clips(), tmp_path / "cut.html").file.read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    assert [block["kept"] for block in data["blocks"]] == [11, 44]
    assert data["blocks"][0]["caption"].endswith(
        "60 keys; of each position the 11 largest are kept."
    )


def test_an_image(browser, tmp_path):
    x = clips((1, 9, 14, 3))
    model = OneBlock(nl.layers.nonlocal_block("embedded_gaussian", subsample=False))
    maps = affinities(model, with_weights(model, x), x)
    page = browser.new_page()
    page.goto(explore(maps, x, tmp_path / "image.html").file.as_uri())
    assert said(page).startswith("From row 4, column 7: most at row ")
    assert not page.locator("#play").is_visible()
    page.close()


@pytest.mark.usefixtures("as_users_see_it")
def test_bad_input(maps, tmp_path):
    file = tmp_path / "page.html"
    with pytest.raises(ValueError, match="maps must have at least one block; got none"):
        explore({}, clips(), file)
    with pytest.raises(ValueError, match="file must lie in a folder that is there"):
        explore(maps, clips(), tmp_path / "none" / "page.html")
    with pytest.raises(ValueError, match="file must not be a folder; got"):
        explore(maps, clips(), tmp_path)
    with pytest.raises(
        ValueError,
        match=r"query must be one position of the map \(4, 6, 10\) of first; got \(2, 3\)",
    ):
        explore(maps, clips(), file, query=[(0, 0, 0), (1, 0, 0)])
    with pytest.raises(
        IndexError, match=r"a query must lie inside the map \(4, 6, 10\) of first; got \(9, 0, 0\)"
    ):
        explore(maps, clips(), file, query=(9, 0, 0))
    with pytest.raises(ValueError, match="clip must be the one that the network saw"):
        explore(maps, clips()[:, :2], file)
    assert not file.exists()
