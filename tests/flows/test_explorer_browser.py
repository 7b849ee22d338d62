"""The explorer in a real browser, on the sandbox's S3: `make ui` runs this and keeps screenshots in `build/ui`."""

import json
import shutil
from contextlib import contextmanager
from types import SimpleNamespace
from urllib.parse import parse_qs

import numpy as np
import pytest
import xarray as xr

from infra import clusters, storage
from infra.sandbox import PRODUCTS
from tasks.cards import name_of
from tasks.grid.companion import companion_url
from tasks.params import PublishParams
from tasks.publish import publish_grid
from tests.station import ROOT
from tests.tasks.test_publish import images, store, store_checkpoint

SHOTS = ROOT / "build/ui"
CONGO, SAHARA, AMAZON = (22.5, 0.5), (10.5, 24.5), (-61.5, -4.5)
pytestmark = [pytest.mark.ui, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def grid(sandbox):
    """A grid of one degree in the sandbox, published as any: with its companion, and the page beside all grids."""
    root = f"s3://{PRODUCTS}"
    checkpoint = store_checkpoint(root)
    database = store(SimpleNamespace(as_uri=lambda: root), "database", images(np.arange(300)))
    with clusters.connect("threads", 2) as client:
        params = PublishParams(step=1.0, method="range+", evidence=True)
        return publish_grid(client, checkpoint, database, params)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright  # of the group `ui`, which `make ui` installs

    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--enable-unsafe-swiftshader"]  # root has no sandbox; the map draws by WebGL
        found = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        yield found
        found.close()


@contextmanager
def opened(browser, address, **options):
    """A page, which no part of may be refused by its own policy."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
    page = context.new_page()
    page.set_default_timeout(120_000)
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: "Content Security Policy" in said.text and wrong.append(said.text))
    page.goto(address)
    yield page
    assert not wrong
    context.close()


def address(sandbox, grid, more=""):
    return f"{sandbox.endpoint}/{PRODUCTS}/explorer/index.html#grid={name_of(grid)}{more}"


def shown(page, layer):
    page.wait_for_selector(f"body[data-shown={layer}]")


def keep(page, name):
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.wait_for_timeout(2000)  # for the tiles
    page.screenshot(path=SHOTS / f"explorer-{name}.png")


def decoded(grid):
    url = companion_url(grid)
    options = {"zarr_format": 3, "storage_options": {"anon": True}}
    level = xr.open_zarr(url, **options)
    return (level.embedding * level.scale).values[:128], level


def test_likeness_is_numpys(sandbox, grid, browser):
    cells, level = decoded(grid)
    leading = cells[:64]
    query = leading[:, np.abs(level.lat - CONGO[1]).argmin(), np.abs(level.lon - CONGO[0]).argmin()]
    expected = np.einsum("cyx,c->yx", leading, query) / np.linalg.norm(leading, axis=0) / np.linalg.norm(query)
    with opened(browser, address(sandbox, grid, f"&mode=likeness&at={CONGO[0]},{CONGO[1]}")) as page:
        shown(page, "likeness")
        found = page.evaluate(f"explorer.engine.likenesses([{CONGO[0]}, {CONGO[1]}]).then((all) => [...all])")
        found = np.array([np.nan if value is None else value for value in found], float).reshape(expected.shape)
        np.testing.assert_allclose(found, expected, atol=1e-3)
        first = page.locator("ol.found button").first.inner_text()
        assert float(first.split()[0]) <= np.nanmax(expected) + 1e-3
        assert "nearest image" in page.inner_text("#evidence")
        keep(page, "likeness")


def test_a_click_asks_for_that_place_and_its_address_restores_the_view(sandbox, grid, browser):
    with opened(browser, address(sandbox, grid, "&flat=1&map=3.00/20.00/5.00")) as page:
        shown(page, "colours")
        keep(page, "colours")
        x, y = page.evaluate("Object.values(explorer.map.map.project([22.5, 0.5]))")
        page.mouse.click(x, y)
        shown(page, "likeness")
        page.locator("#took").wait_for()
        link = page.evaluate("location.href")
        at = parse_qs(link.partition("#")[2])["at"][0].split(",")
        assert [float(number) for number in at] == pytest.approx(CONGO, abs=0.5)  # a pixel
        told = page.inner_text("#panel p >> nth=0")
    with opened(browser, link) as page:
        shown(page, "likeness")
        page.locator("#took").wait_for()
        assert page.inner_text("#panel p >> nth=0") == told
        assert page.evaluate("explorer.map.map.getZoom()") == pytest.approx(3, abs=0.01)


def test_marks_give_classes_and_their_accuracy(sandbox, grid, browser):
    marks = [
        (*CONGO, "wet"),
        (*AMAZON, "wet"),
        (112.5, 0.5, "wet"),
        (*SAHARA, "dry"),
        (45.5, 22.5, "dry"),
        (133.5, -25.5, "dry"),
    ]
    told = ";".join(",".join(map(str, mark)) for mark in marks)
    with opened(browser, address(sandbox, grid, f"&mode=classes&marks={told}")) as page:
        shown(page, "classes")
        assert "accuracy" in page.inner_text("#scores")
        assert "wet (3)" in page.inner_text("ul.names")
        keep(page, "classes")


def test_labels_of_a_file_give_a_map_and_a_score(sandbox, grid, browser, tmp_path):
    _, level = decoded(grid)
    land = np.argwhere(np.isfinite(level.embedding.values[0]))[::60]
    file = tmp_path / "latitudes.csv"
    rows = [f"{level.lon.values[j]},{level.lat.values[i]},{abs(level.lat.values[i])}" for i, j in land]
    file.write_text("\n".join(["lon,lat,from the equator", *rows]))
    with opened(browser, address(sandbox, grid, "&mode=labels")) as page:
        shown(page, "colours")
        page.set_input_files("#file", file)
        shown(page, "probe")
        page.locator("#scores").wait_for()
        assert float(page.inner_text("#scores").split("R² ")[1].split(",")[0]) > 0.5
        assert f"{len(rows)} places" in page.inner_text("#panel")


@pytest.mark.parametrize("broken", ["missing", "damaged", "no catalog"])
def test_a_broken_bucket_is_told(sandbox, grid, browser, broken):
    home = storage.join(f"s3://{PRODUCTS}", "grids")
    places = {
        "missing": (f"{companion_url(grid)}/zarr.json", None, "There is no companion of a grid at"),
        "damaged": (f"{companion_url(grid)}/embedding/0/0/0", b"no such bytes", "is damaged"),
        "no catalog": (f"{home}/collection.json", None, "There is no catalog of grids"),
    }
    url, content, told = places[broken]
    before = storage.read(url)
    try:
        if content is None:
            storage.delete(url)
        else:
            storage.write(url, content)
        with opened(browser, address(sandbox, grid, "&mode=clusters")) as page:
            page.wait_for_selector("#status.error")
            assert told in page.inner_text("#status")
    finally:
        storage.write(url, before)


def test_another_origin_needs_cors_and_the_page_says_so(sandbox, grid, browser):
    """The sandbox's rules allow it; without them the browser refuses, and the page tells what to allow."""
    collection = {"links": [{"rel": "item", "href": f"{sandbox.endpoint}/{PRODUCTS}/grids/{name_of(grid)}/item.json"}]}
    elsewhere = {"content_type": "application/json", "body": json.dumps(collection)}
    for allowed in (True, False):
        with opened(browser, "about:blank") as page:
            page.route("**/grids/collection.json", lambda route: route.fulfill(**elsewhere))
            if not allowed:
                page.route(f"**/{name_of(grid)}/**", lambda route: route.abort())
            page.goto(address(sandbox, grid).replace("127.0.0.1", "localhost"))
            if allowed:
                shown(page, "colours")
            else:
                page.wait_for_selector("#status.error")
                assert "CORS rules do not allow http://localhost" in page.inner_text("#status")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_usable_on_a_telephone_and_by_keyboard(sandbox, grid, browser, scheme):
    phone = {"viewport": {"width": 360, "height": 740}, "color_scheme": scheme, "has_touch": True}
    with opened(browser, address(sandbox, grid), **phone) as page:
        shown(page, "colours")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        page.locator("#tab-clusters").focus()
        page.keyboard.press("Enter")
        shown(page, "clusters")
        assert page.evaluate("document.activeElement.id") == "tab-clusters"
        keep(page, f"telephone-{scheme}")
