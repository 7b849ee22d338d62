"""The explorer in a real browser, on the sandbox's S3: `make ui` runs this and keeps screenshots in `build/ui`."""

import json
import shutil
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from urllib.parse import parse_qs

import numpy as np
import pytest
import rasterio
import xarray as xr

from infra import clusters, storage
from infra.explorer import bundle
from infra.sandbox import PRODUCTS
from tasks.cards import name_of
from tasks.grid.companion import companion_url
from tasks.params import PublishParams
from tasks.publish import publish_grid
from tests.station import ROOT
from tests.tasks.test_publish import SIDE_BY_SIDE, images, store, store_checkpoint

SHOTS = ROOT / "build/ui"
CONGO, SAHARA, AMAZON = (22.5, 0.5), (10.5, 24.5), (-61.5, -4.5)
pytestmark = [pytest.mark.ui, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def grids(sandbox):
    """Grids in the sandbox, published as any are: with their companions, and the page beside all of them.

    One of one degree, a later version of it from other images, and one of two degrees by another method.
    """
    root = f"s3://{PRODUCTS}"
    home = SimpleNamespace(as_uri=lambda: root)
    checkpoint = store_checkpoint(root)
    first = store(home, "database", images(np.arange(300)))
    later = store(home, "later", images(np.arange(100, 400), changed=range(0, 300, 3)))
    params = PublishParams(step=1.0, method="range+", evidence=True)
    heads = PublishParams(step=2.0, **SIDE_BY_SIDE)
    with clusters.connect("threads", 2) as client:
        publish = partial(publish_grid, client, checkpoint)
        return publish(first, params), publish(later, params), publish(first, heads)


@pytest.fixture(scope="module")
def grid(grids):
    return grids[0]


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
    return level, (level.embedding * level.scale).values[:128]


def taken(page, folder):
    """The numbers of the map that is shown, from the GeoTIFF that the page saves, and how it is placed."""
    with page.expect_download() as saving:
        page.get_by_role("button", name="GeoTIFF").click()
    file = folder / saving.value.suggested_filename
    saving.value.save_as(file)
    with rasterio.open(file) as tiff:
        return tiff.read(), {"names": tiff.descriptions, "tags": tiff.tags(), **tiff.profile}


def printed(page):
    """What the page's lines of Python define."""
    page.get_by_role("button", name="Python").click()
    found = {}
    exec(page.inner_text("pre"), found)
    return found


def test_likeness_is_numpys(sandbox, grid, browser, tmp_path):
    level, cells = decoded(grid)
    leading = cells[:64]
    query = leading[:, np.abs(level.lat - CONGO[1]).argmin(), np.abs(level.lon - CONGO[0]).argmin()]
    expected = np.einsum("cyx,c->yx", leading, query) / np.linalg.norm(leading, axis=0) / np.linalg.norm(query)
    with opened(browser, address(sandbox, grid, f"&mode=likeness&at={CONGO[0]},{CONGO[1]}")) as page:
        shown(page, "likeness")
        (found,), told = taken(page, tmp_path)
        np.testing.assert_allclose(found, expected, atol=1e-3)
        np.testing.assert_allclose(printed(page)["likeness"], found, atol=1e-3)
        assert (told["crs"], told["dtype"], told["names"]) == ("EPSG:4326", "float32", ("likeness",))
        assert told["transform"] == rasterio.transform.from_bounds(-180, -90, 180, 90, 360, 180)
        assert told["tags"]["ATTRIBUTION"] == "nobody"
        first = page.locator("ol.found button").first.inner_text()
        assert float(first.split()[0]) <= np.nanmax(expected) + 1e-3
        assert "nearest image" in page.inner_text("#evidence")
        keep(page, "likeness")


def test_parts_count_as_their_sliders_say(sandbox, grids, browser, tmp_path):
    """All 24 numbers of this grid are in its components, so what the page makes of them is the grid's own."""
    grid, _, side_by_side = grids
    level, cells = decoded(grid)
    axes = level.axes.values[:, :64].astype(float)
    weights = np.linalg.norm(axes, axis=1)  # of a rotation of weighted numbers
    whole = np.einsum("cyx,dc->dyx", cells[:64], axes / weights[:, None])
    shares = np.where(np.arange(len(whole)) < level.attrs["rangegrid:parts"]["visual"][1], 0.2, 0.9)
    whole *= np.sqrt(shares)[:, None, None]
    query = whole[:, np.abs(level.lat - CONGO[1]).argmin(), np.abs(level.lon - CONGO[0]).argmin()]
    expected = np.einsum("dyx,d->yx", whole, query) / np.linalg.norm(whole, axis=0) / np.linalg.norm(query)
    with opened(browser, address(sandbox, grid, f"&mode=likeness&at={CONGO[0]},{CONGO[1]}")) as page:
        shown(page, "likeness")
        page.get_by_label("visual").fill("0.2")
        page.get_by_label("location").fill("0.9")
        page.wait_for_url("**location%3A0.9**")
        page.wait_for_selector("#status:empty", state="attached")
        (found,), _ = taken(page, tmp_path)
        np.testing.assert_allclose(found, expected, atol=1e-3)
        np.testing.assert_allclose(printed(page)["likeness"], found, atol=1e-3)
        keep(page, "parts")
        link = page.evaluate("location.href")
    with opened(browser, link) as page:
        shown(page, "likeness")
        assert page.get_by_label("visual").input_value() == "0.2"
    with opened(browser, address(sandbox, side_by_side, f"&mode=likeness&at={CONGO[0]},{CONGO[1]}")) as page:
        shown(page, "likeness")
        names = page.locator("#shares span").all_inner_texts()
        assert len(names) == len(SIDE_BY_SIDE["heads"]) + 1  # each head apart, and the location
        page.get_by_label(names[0], exact=True).fill("0")
        page.wait_for_url("**parts**")
        page.wait_for_selector("#status:empty", state="attached")
        (found,), _ = taken(page, tmp_path)
        assert np.nanmax(found) == pytest.approx(1, abs=1e-3)  # the place itself


def test_two_places_are_compared(sandbox, grid, browser, tmp_path):
    level, cells = decoded(grid)
    cells = cells[:64] / np.linalg.norm(cells[:64], axis=0)
    a, b = (
        cells[:, np.abs(level.lat - lat).argmin(), np.abs(level.lon - lon).argmin()] for lon, lat in (CONGO, SAHARA)
    )
    with opened(browser, address(sandbox, grid, "&mode=compare&flat=1&map=2.50/16.00/10.00")) as page:
        shown(page, "colours")
        for lon, lat in (CONGO, SAHARA):
            page.mouse.click(*page.evaluate(f"Object.values(explorer.map.map.project([{lon}, {lat}]))"))
        shown(page, "between")
        page.wait_for_selector("#pair")
        (found,), _ = taken(page, tmp_path)
        at = parse_qs(page.evaluate("location.hash"))  # a pixel is less than a cell
        assert [round(float(n) - 0.5) for n in at["other"][0].split(",")] == [round(n - 0.5) for n in SAHARA]
        np.testing.assert_allclose(found, np.einsum("cyx,c->yx", cells, b - a), atol=1e-3)
        assert f"likeness {a @ b:.3f}" in page.inner_text("#pair")
        np.testing.assert_allclose(printed(page)["between"], found, atol=1e-3)


@pytest.mark.parametrize("which", [1, 2], ids=["version", "grid"])
def test_two_versions_and_two_grids_are_compared(sandbox, grids, browser, tmp_path, which):
    """How far cells turned: 1 - correlation of likeness to some places, which the page names."""
    with opened(browser, address(sandbox, grids[0], "&mode=compare")) as page:
        shown(page, "colours")
        page.select_option("#against", name_of(grids[which]))
        shown(page, "change")
        page.wait_for_selector("#turned")
        (found,), told = taken(page, tmp_path)
        assert told["names"] == ("turned",)
        places = np.array(page.evaluate("explorer.shown.compared.places"))
        expected = 1 - correlations(*(profiles(grid, places, grids[0]) for grid in (grids[0], grids[which])))
        np.testing.assert_allclose(found, expected, atol=1e-3)
        assert np.nanmedian(expected) > 0.01  # they differ
        assert float(page.inner_text("#turned").split()[-1].rstrip(".")) == pytest.approx(
            np.nanmedian(expected), rel=0.3
        )
        np.testing.assert_allclose(printed(page)["turned"], found, atol=1e-3)
        keep(page, f"change-{which}")


def profiles(grid, places, of):
    """Likeness of each cell of a grid to some places, in another grid: its cells that hold the centres."""
    level, cells = decoded(grid)
    unit = cells[:64] / np.linalg.norm(cells[:64], axis=0)
    look = partial(level.assign(unit=(("c", "lat", "lon"), unit)).unit.sel, method="nearest")
    own = decoded(of)[0]
    anchors = np.stack([look(lon=lon, lat=lat).values for lon, lat in places])
    return np.einsum("kc,cyx->kyx", anchors, look(lon=own.lon, lat=own.lat).values)


def correlations(a, b):
    both = np.isfinite(a[0]) & np.isfinite(b[0])
    found = np.full(both.shape, np.nan)
    found[both] = [np.corrcoef(x, y)[0, 1] for x, y in zip(a[:, both].T, b[:, both].T, strict=True)]
    return found


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


def cell_of(mark):
    return int(90 - mark[1]), int(mark[0] + 180)


def test_marks_give_classes_and_their_accuracy(sandbox, grid, browser, tmp_path):
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
        (found, near), about = taken(page, tmp_path)
        assert (about["dtype"], about["nodata"], about["names"]) == ("uint8", 255, ("class", "a mark is alike"))
        names = np.array([about["tags"][f"CLASS_{n}"] for n in range(2)])
        expected = printed(page)["classes"]  # scikit-learn's
        land = expected != ""
        assert (names[found[land]] == expected[land]).mean() > 0.999
        assert set(found[~land]) == {255}
        unit = (cells := decoded(grid)[1][:64]) / np.linalg.norm(cells, axis=0)
        alike = np.max([np.einsum("cyx,c->yx", unit, unit[:, *cell_of(mark)]) for mark in marks], 0)
        assert (near[land] == (alike[land] >= 0.3)).mean() > 0.999
        assert "accuracy" in page.inner_text("#scores")
        assert "wet (3)" in page.inner_text("ul.names")
        keep(page, "classes")


def test_labels_of_a_file_give_a_map_and_a_score(sandbox, grid, browser, tmp_path, monkeypatch):
    level, _ = decoded(grid)
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
        (found,), _ = taken(page, tmp_path)
        file.rename(tmp_path / "labels.csv")
        monkeypatch.chdir(tmp_path)
        np.testing.assert_allclose(printed(page)["prediction"].astype(float), found, atol=0.05)


@pytest.mark.parametrize("broken", ["missing", "part missing", "no JSON", "damaged", "one bit", "no catalog"])
def test_a_broken_bucket_is_told(sandbox, grid, browser, broken):
    home, part = storage.join(f"s3://{PRODUCTS}", "grids"), f"{companion_url(grid)}/embedding/0/0/0"
    places = {
        "missing": (f"{companion_url(grid)}/zarr.json", None, "There is no companion of a grid at"),
        "part missing": (part, None, "There is no part of this grid at"),
        "no JSON": (f"{companion_url(grid)}/zarr.json", b"<html>", "is no companion of a grid: the address leads to"),
        "damaged": (part, b"no such bytes", "is damaged"),
        "one bit": (part, flipped(storage.read(part)), "is damaged"),
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


def flipped(data):
    """The same but for one bit in the middle."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def test_a_bucket_that_nobody_may_read_is_told(sandbox, grid, browser):
    """As S3 answers where its policy does not let everybody read."""
    with opened(browser, "about:blank") as page:
        page.route("**/compact.zarr/**", lambda route: route.fulfill(status=403, body="AccessDenied"))
        page.goto(address(sandbox, grid, "&mode=compare&at=22.5,0.5&other=10.5,24.5"))
        page.wait_for_selector("#status.error")
        assert "does not let anybody read" in page.inner_text("#status")
        assert "(HTTP 403)" in page.inner_text("#status")


def test_a_server_of_plain_files_without_ranges_serves(grid, browser, tmp_path):
    """`python -m http.server`, which answers each request with the whole file."""
    home = tmp_path / "grids" / "own"
    storage.copy(companion_url(grid), (home / "compact.zarr").as_uri())
    shutil.copytree(bundle.FOLDER, tmp_path / "explorer")
    links = [{"rel": "item", "href": "./own/item.json", "title": "own"}]
    (tmp_path / "grids/collection.json").write_text(json.dumps({"links": links}))
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            port = server.stdout.readline().split("port ")[1].split()[0]
            with opened(browser, f"http://127.0.0.1:{port}/explorer/index.html#mode=likeness&at=22.5,0.5") as page:
                shown(page, "likeness")
                page.wait_for_selector("#took")
                found, _ = taken(page, tmp_path)
                assert np.nanmax(found) == pytest.approx(1, abs=1e-3)  # the place itself
                assert not page.inner_text("#status")
        finally:
            server.terminate()


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


TABS = ("colours", "likeness", "classes", "clusters", "compare", "labels")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_usable_on_a_telephone_and_by_keyboard(sandbox, grid, browser, scheme):
    from axe_playwright_python.sync_playwright import Axe  # of the group `ui`

    phone = {"viewport": {"width": 360, "height": 740}, "color_scheme": scheme, "has_touch": True}
    with opened(browser, address(sandbox, grid), **phone) as page:
        shown(page, "colours")
        page.locator("#search").focus()
        for name in TABS:
            page.keyboard.press("Tab")
            page.keyboard.press("Enter")
            assert page.evaluate("document.activeElement.id") == f"tab-{name}"
            assert page.get_attribute(f"#tab-{name}", "aria-selected") == "true"
            assert page.evaluate("document.documentElement.scrollWidth") <= 360
            faults = Axe().run(page).response["violations"]  # contrast, names and roles
            assert not [(fault["id"], [node["html"] for node in fault["nodes"]]) for fault in faults]
        shown(page, "clusters")
        page.locator("canvas").focus()
        page.keyboard.press("Enter")  # takes the middle, of the last tab as likeness
        shown(page, "likeness")
        keep(page, f"telephone-{scheme}")


def test_touch_takes_a_place_and_two_fingers_zoom(sandbox, grid, browser):
    phone = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
    with opened(browser, address(sandbox, grid, "&flat=1&map=2.00/20.00/5.00"), **phone) as page:
        shown(page, "colours")
        x, y = page.evaluate(f"Object.values(explorer.map.map.project([{CONGO[0]}, {CONGO[1]}]))")
        page.touchscreen.tap(x, y)
        shown(page, "likeness")
        at = parse_qs(page.evaluate("location.hash"))["at"][0].split(",")
        assert [float(number) for number in at] == pytest.approx(CONGO, abs=1)  # a pixel
        touch = page.context.new_cdp_session(page)
        for kind, far in [("touchStart", 20), *(("touchMove", far) for far in range(25, 90, 5)), ("touchEnd", None)]:
            points = [] if far is None else [{"x": 180 + far, "y": 170}, {"x": 180 - far, "y": 170}]
            touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        page.wait_for_timeout(1500)  # for it to come to rest
        assert page.evaluate("explorer.map.map.getZoom()") > 3
