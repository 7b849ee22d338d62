"""The Prefect UI as an operator meets it, in a real browser: `make ui` runs this and keeps screenshots in `build/ui`.

A grid is published from the form of its deployment and watched; access to the storage is lost on the way; once it is
back, the run is retried from its page. Server, worker, storage and demo planet are real.
"""

# ruff: noqa: F811 - pytest finds the fixture `station` by its name

import re
import shutil
import threading

import pytest
from prefect.client.orchestration import get_client

from infra import clusters, storage
from tasks.artifacts import PREVIEW_WIDTH
from tasks.encode import encode_database
from tasks.params import EncodeParams, EncoderParams, TrainParams
from tasks.sample import sample_patches
from tasks.train import train_model
from tests.flows.test_killed import PATIENCE, station  # noqa: F401
from tests.flows.test_pipeline import SAMPLE
from tests.proxy import named, status
from tests.station import ROOT
from tests.tasks.test_artifacts import readable
from tests.tasks.test_faults import shard

SHOTS = ROOT / "build/ui"
DEPLOYMENTS = ["ablate", "encode", "evaluate", "join", "pipeline", "prune", "publish", "sample", "train"]
RUN = "publish range+ in steps of 1.5"
RELOAD = 15  # seconds for a page to show what it has
TILES = 59  # with land, of a grid of 1.5 degrees in tiles of 20 cells
pytestmark = [pytest.mark.ui, pytest.mark.timeout(3600)]


class Gate:
    """Holds the writing of shards until there is room for so many: a run stands still while it is looked at."""

    def __init__(self):
        self.room, self.changed = 0, threading.Condition()

    def open(self, more):
        with self.changed:
            self.room += more
            self.changed.notify_all()

    def wait(self):
        with self.changed:
            self.changed.wait_for(lambda: self.room > 0)
            self.room -= 1


@pytest.fixture(scope="module")
def products(station):
    """URLs of a checkpoint and a database, made from the demo planet."""
    train = TrainParams(encoder=EncoderParams(dim=64), steps=20, batch=32, degree=8, hidden=32, dim=16)
    with clusters.connect() as client:
        patches = sample_patches(client, SAMPLE)
        checkpoint = train_model(client, patches, train)
        return checkpoint, encode_database(client, patches, checkpoint, EncodeParams())


@pytest.fixture(scope="module")
def page(station, products):
    """A page of Debian's Chromium, while everybody may read grids."""
    from playwright.sync_api import sync_playwright  # of the group `ui`, which `make ui` installs

    with readable(station.box, "grids"), sync_playwright() as playwright:
        options = {"executable_path": shutil.which("chromium"), "args": ["--no-sandbox"]}  # root has no sandbox
        browser = playwright.chromium.launch(**options)
        found = browser.new_page(
            viewport={"width": 1400, "height": 1000},
            base_url=station.environment["PREFECT_API_URL"].removesuffix("/api"),
        )
        found.set_default_timeout(PATIENCE * 1000)
        yield found
        browser.close()


def keep(page, name):
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.wait_for_timeout(1000)  # for what moves into its place
    page.screenshot(path=SHOTS / f"{name}.png")


def open_form(page, deployment):
    page.goto("/deployments")
    page.get_by_role("link", name=deployment, exact=True).first.click()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text("Custom run").click()


def field(page, label):
    """A field of the form; Prefect's labels name no element."""
    own = page.locator(".schema-form-property__label", has_text=re.compile(rf"^{label}( \(Optional\))?$"))
    return page.locator(".schema-form-property", has=own).last


def choose(page, label, kind):
    """Gives a field that may be unset a value of a kind."""
    field(page, label).get_by_role("button", name=kind, exact=True).click()


def fill(page, products, **values):
    for label, value in {"checkpoint": products[0], "database": products[1], **values}.items():
        field(page, label.replace("_", " ")).locator("input, textarea").fill(str(value))


def runs():
    with get_client(sync_client=True) as client:
        return client.read_flow_runs()


def tab(page, name):
    page.locator(".p-tab", has_text=re.compile(f"^{name}$")).click()


def said(page, pattern, place="Logs"):
    """The first match of a pattern on a tab of a run's page, which is loaded anew until it is there."""
    for second in range(PATIENCE):
        if second and second % RELOAD == 0:
            page.reload()
        if second % RELOAD == 0:
            tab(page, place)
        page.wait_for_timeout(1000)
        if found := re.search(pattern, page.inner_text("body")):
            return found
    raise AssertionError(f"{pattern} was not said")


def published(page, more_than):
    """How many tiles the run's artifacts tell, once they are more."""
    while (count := int(said(page, rf"publish, (\d+) of {TILES}", "Artifacts")[1])) <= more_than:
        pass
    return count


def ends(page, state):
    page.locator(".state-badge", has_text=re.compile(f"^{state}$")).first.wait_for()


def tiles(grid):
    """Of each shard that is stored, the tag of its version and its time."""
    found = storage._list(storage.join(grid, "embedding/c"))
    return {meta["path"]: (meta["e_tag"], meta["last_modified"]) for meta in found}


def sizes(page):
    """Natural widths of the pictures that the page shows."""
    return page.evaluate("[...document.images].filter(i => i.checkVisibility()).map(i => i.naturalWidth)")


def test_the_deployments_are_listed(page):
    page.goto("/deployments")
    page.get_by_text(f"{len(DEPLOYMENTS)} Deployments").wait_for()
    text = page.inner_text("table")
    keep(page, "1-deployments")
    assert [name for name in DEPLOYMENTS if re.search(rf"^{name}$", text, re.M)] == DEPLOYMENTS
    assert text.count("Ready") == len(DEPLOYMENTS)  # a worker is there


def test_a_form_tells_what_it_asks_and_refuses_what_is_out_of_bounds(page, products):
    before = len(runs())
    open_form(page, "publish")
    fill(page, products, Beta=2)
    keep(page, "2-form")
    assert "Share of the semantic half in RANGE+; 1 is purely semantic. At least 0, at most 1." in page.inner_text(
        "form"
    )
    page.get_by_role("button", name="Submit").click()
    page.get_by_text("2 is greater than the maximum of 1").first.wait_for()
    keep(page, "3-refused")
    assert len(runs()) == before


def test_a_run_is_started_watched_mended_and_retried_and_resumes(page, products, station):
    gate = Gate()
    station.proxy.inject(named("gate", lambda request, ask: gate.wait() or ask()), shard)
    open_form(page, "publish")
    choose(page, "Tile Cells", "int")
    fill(page, products, Step=1.5, Tile_Cells=20)
    page.get_by_role("button", name="Submit").click()
    page.get_by_text(RUN).first.click()

    gate.open(12)
    first = published(page, 0)
    keep(page, "4-progress")
    gate.open(12)
    assert first < published(page, first) < TILES

    station.proxy.inject(status(403), shard)
    gate.open(TILES)
    ends(page, "Failed")
    told = said(page, r"publish: r\d+-c\d+: (.*)")[1]
    page.get_by_text("A rerun does it again").first.scroll_into_view_if_needed()
    keep(page, "5-failed")
    assert "check AWS_ACCESS_KEY_ID" in told
    assert "A rerun does it again and keeps what succeeded" in told
    (run,) = [run for run in runs() if run.name.startswith(RUN)]
    grid = re.search(r"s3://\S+/grid\.zarr", said(page, rf"s3://\S+: {TILES} tiles of land, 0 already there")[0])[0]
    before = tiles(grid)
    assert 0 < len(before) < TILES

    station.proxy.heal()
    page.get_by_role("button", name="Retry", exact=True).click()
    page.get_by_role("dialog").get_by_role("button", name="Retry", exact=True).click()
    ends(page, "Completed")
    said(page, rf"{TILES} tiles of land, {len(before)} already there")
    keep(page, "6-retried")
    after = tiles(grid)
    assert len(after) == TILES
    assert {path: after[path] for path in before} == before
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(run.id).run_count == 2


def test_a_run_shows_the_map_and_leads_to_the_grid(page):
    """Of the run of the test above."""
    page.goto("/runs")
    page.get_by_text(RUN).first.click()
    said(page, "world-map", "Artifacts")
    keep(page, "7-artifacts")
    page.get_by_text("world-map").first.click()
    page.get_by_text("Full size").wait_for()
    keep(page, "8-map")
    assert sizes(page) == [PREVIEW_WIDTH]

    page.go_back()
    said(page, "The RANGE\\+ grid", "Artifacts")
    page.get_by_text("The multi-head RANGE grid").first.click()
    page.get_by_text("xr.open_zarr").wait_for()
    keep(page, "9-links")
    with page.expect_popup() as opened:
        page.get_by_role("link", name=re.compile("index.html")).click()
    grid = opened.value
    grid.get_by_text("import xarray").wait_for()
    keep(grid, "10-page")
    assert min(sizes(grid)) > 1000
