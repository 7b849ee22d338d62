"""What `rangegrid ls` tells and `rangegrid prune` deletes, of cards as the steps write them."""

import json
import os
import time
from pathlib import Path

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.states import Running
from typer.testing import CliRunner

from flows.cli import app
from infra import storage
from infra.deployments import TAG
from tasks.cards import fingerprint, kind_of, write_card
from tasks.products import CARDS
from tasks.release import versions

OLD = 40  # days, of all that is not said to be young
MODELS = {kind_of(model): model for model in CARDS}
WHOLE = {  # what a card of the kind has besides
    "features": {"encoder": {"name": "rcf"}},
    "checkpoint": {"architecture": {"degree": 4, "dim": 16}},
    "database": {"checkpoint": "", "images": 1, "key_dim": 16, "value_dim": 8},
}


def rangegrid(*arguments):
    """The products that a command tells, by name."""
    ran = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert ran.exit_code == 0
    return {row["product"]: row for row in json.loads(ran.stdout)}


class Home:
    """A storage in a directory."""

    def __init__(self, folder):
        self.folder = folder

    def put(self, kind, made_of, days=OLD, finished=True, name=None, **card):
        """A product of so many days; its name."""
        directory, model = name or fingerprint(made_of), MODELS[kind]
        url = storage.join(self.folder.as_uri(), model.directory, directory)
        storage.write(storage.join(url, "data.bin"), b"12345")
        if kind == "grid":
            attrs = {"rangegrid:made_of": made_of, "rangegrid:line": "a"}
            storage.write_json(storage.join(url, "grid.zarr/zarr.json"), {"attributes": attrs})
        if finished:
            told = {"fingerprint": directory, "made_of": made_of} | WHOLE.get(kind, {}) | card
            write_card(url, model(**told))
        path = Path(url.removeprefix("file://"))
        for file in path.rglob("*"):
            os.utime(file, (time.time() - days * 86400,) * 2)
        return f"{path.parent.name}/{path.name}"

    def chain(self, number, days=OLD):
        """Patches, features, checkpoint, database, grid and report, as a pipeline makes them; their names by kind."""
        patches = self.put("patches", {"seed": number}, days)
        sample = patches.partition("/")[2]
        encoder = {"name": "rcf", "seed": 0}
        features = self.put("features", {"patches": sample, "views": 2, **encoder}, days)
        made_of = {"patches": sample, "views": 2, "encoder": encoder}
        weights = f"{number:012d}"  # of the checkpoint, by which databases name it
        checkpoint = self.put("checkpoint", made_of, days, fingerprint=weights)
        made_of = {"patches": sample, "checkpoint": weights}
        database = self.put("database", made_of, days, checkpoint=weights, patches=sample, values={"features": None})
        made_of = {"database": database.partition("/")[2], "step": 1.0, "parent": None}
        where = {"database": f"{self.folder.as_uri()}/{database}", "checkpoint": f"{self.folder.as_uri()}/{checkpoint}"}
        grid = self.put("grid", made_of, days, line="a", dims=3, **where)
        url = f"{self.folder.as_uri()}/{grid}/grid.zarr"
        report = self.put("report", {"database": database.partition("/")[2], "grid": url}, days)
        return {name.partition("/")[0]: name for name in (patches, features, checkpoint, database, grid, report)}

    def promote(self, chain):
        """Makes its grid the latest."""
        versions.promote(f"{self.folder.as_uri()}/{chain['grids']}/grid.zarr")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", (tmp_path / "storage").as_uri())
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    return Home(tmp_path / "storage")


def test_every_product_is_listed_with_what_it_is_made_of(home):
    one, two = home.chain(1), home.chain(2)
    begun = home.put("database", {"x": 1}, finished=False)
    found = rangegrid("ls")
    assert set(found) == {*one.values(), *two.values(), begun}
    assert found[one["checkpoints"]]["made_of"] == [one["patches"], one["features"]]
    assert found[one["databases"]]["made_of"] == [
        one["patches"],
        one["checkpoints"],
    ]  # not by the digest of its weights
    assert found[one["grids"]]["made_of"] == [one["checkpoints"], one["databases"]]
    assert found[one["reports"]]["made_of"] == [one["databases"], one["grids"]]
    assert found[one["checkpoints"]]["used_by"] == [one["databases"], one["grids"]]
    assert (found[begun]["state"], found[begun]["made_of"], found[begun]["bytes"]) == ("unfinished", [], 5)
    folder = home.folder / one["grids"]
    assert found[one["grids"]]["bytes"] == sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    text = CliRunner().invoke(app, ["ls"]).stdout
    assert all(name in text for name in found)


def test_prune_tells_first_and_never_takes_what_a_grid_in_use_needs(home):
    """The oldest grid is in force, the next was before, and the third and fourth nobody reads."""
    one, two, three, four = (home.chain(n, OLD + 4 - n) for n in range(4))
    home.promote(two)
    home.promote(one)
    imported = home.put("checkpoint", {"file": "x"}, name="satclip")
    broken = home.put("database", {"x": 1}, finished=False)
    told = rangegrid("prune", "--keep", "1")
    assert set(told) == {*three.values(), one["features"], two["features"], one["reports"], two["reports"]}
    assert set(rangegrid("ls")) >= set(told)
    assert rangegrid("prune", "--keep", "1", "--delete").keys() == told.keys()
    left = rangegrid("ls")
    assert not left.keys() & told.keys()
    assert left.keys() >= {*four.values(), imported, broken}
    for chain in (one, two):
        assert left.keys() >= {chain[kind] for kind in ("patches", "checkpoints", "databases", "grids")}
    assert list(rangegrid("prune", "--unfinished", "--delete")) == [broken]
    assert versions.read_pointer()[0].fingerprint == one["grids"].partition("/")[2]


def test_what_a_joined_database_is_made_of_is_kept_with_it_and_goes_after_it(home):
    """Also where a file was written beside a part later than to what is joined of it, as a picture may be."""
    one, two, latest = home.chain(1, OLD), home.chain(2, OLD), home.chain(3, OLD + 9)
    home.promote(latest)
    parts = [chain["databases"] for chain in (one, two)]
    names = [part.partition("/")[2] for part in parts]
    joined = home.put("database", {"joined": names}, OLD + 3)
    again = home.put("database", {"joined": [*names, joined.partition("/")[2]]}, OLD + 5)
    told = list(rangegrid("prune", "--keep", "0"))
    order = [told.index(name) for name in (again, joined, *parts, one["patches"])]
    assert max(order[:1]) < order[1] < min(order[2:4])
    assert max(order[2:4]) < order[4]
    url = f"{home.folder.as_uri()}/{again}"
    home.put("grid", {"database": again.partition("/")[2]}, days=0, finished=False, database=url)
    assert not {*parts, joined, again, one["patches"], two["patches"]} & rangegrid("prune", "--keep", "0").keys()


def test_what_is_young_or_under_way_is_kept(home):
    keep = "prune", "--keep", "0", "--unfinished"
    old, young, latest = home.chain(1), home.chain(2, days=3), home.chain(3)
    home.promote(latest)
    assert set(rangegrid(*keep)) == {*old.values(), latest["features"], latest["reports"]}
    assert set(rangegrid(*keep, "--days", "2")) == {
        *old.values(),
        *young.values(),
        latest["features"],
        latest["reports"],
    }
    home.put("grid", {"database": old["databases"].partition("/")[2]}, days=0, finished=False)
    assert set(rangegrid(*keep)) == {
        old["features"],
        old["grids"],
        old["reports"],
        latest["features"],
        latest["reports"],
    }
    home.put("checkpoint", {"y": 1}, days=0, finished=False)  # what it reads is not known
    assert set(rangegrid(*keep)) == {old["grids"], old["reports"], latest["reports"]}


def test_what_a_run_was_given_is_kept(home, prefect):
    """A run that has written nothing yet, as the Prefect server knows it."""
    old, latest = home.chain(1), home.chain(2)
    home.promote(latest)

    @flow(name="train")
    def train(patches: str):
        """Never runs here."""

    with pytest.MonkeyPatch.context() as patch, get_client(sync_client=True) as client:
        patch.setenv("PREFECT_API_URL", str(client.api_url))
        given = {"patches": f"{home.folder.as_uri()}/{old['patches']}"}
        run = client.create_flow_run(train, parameters=given, tags=[TAG], state=Running())
        under_way = rangegrid("prune", "--keep", "0")
        client.delete_flow_run(run.id)
        ended = rangegrid("prune", "--keep", "0")
    assert set(ended) - set(under_way) == {old["patches"], old["features"]}
