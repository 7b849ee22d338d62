"""The pointer `latest`: who may move it, back and forth, and what is deleted."""

import json
import posixpath
import threading
from dataclasses import replace

import pytest
import xarray as xr
from typer.testing import CliRunner

from flows.cli import app
from infra import storage
from infra.errors import UserError
from tasks import publish as publish_module
from tasks.params import PublishParams
from tasks.release import versions
from tests.proxy import Proxy, lost
from tests.tasks.test_publish import STEP, publishing


@pytest.fixture(params=["file", "s3"])
def home(request, tmp_path, monkeypatch):
    """Empty storage of either kind."""
    url = (tmp_path / "storage").as_uri()
    if request.param == "s3":
        box = request.getfixturevalue("sandbox")
        url = f"{box.environment()['RANGEGRID_STORAGE_URL']}/{tmp_path.name}"
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", url)
    return url


def version(name, parent=None, finished=True, **made_of):
    """A version as far as the pointer knows it."""
    grid = storage.join(versions.directory(), name, "grid.zarr")
    storage.write(storage.join(grid, "zarr.json"), b"{}")
    if finished:
        card = {"kind": "grid", "fingerprint": name, "made_of": {"parent": parent, **made_of}}
        storage.write_json(storage.join(versions.directory(), name, "card.json"), card)
    return grid


def latest():
    return storage.read_json(versions.pointer_url())


def states():
    return {found.fingerprint: found.state for found in versions.versions()}


def test_promotion_moves_the_pointer_and_remembers(home):
    one, two = version("one"), version("two")
    versions.promote(one)
    assert latest()["grid"] == one
    assert latest()["previous"] is None
    versions.promote(two)
    assert latest() == latest() | {"grid": two, "fingerprint": "two", "previous": one}
    assert [move["grid"] for move in latest()["history"]] == [one]
    assert states() == {"one": "previous", "two": "latest"}


def test_promoting_the_latest_changes_nothing(home):
    version("one")
    versions.promote(versions.find("one"))
    before = storage.read(versions.pointer_url())
    versions.promote(versions.find("one"))
    assert storage.read(versions.pointer_url()) == before


def test_an_unfinished_version_is_not_promoted(home):
    with pytest.raises(UserError, match="no finished grid"):
        versions.promote(version("half", finished=False))
    assert not storage.exists(versions.pointer_url())


def test_a_pointer_without_history_is_read(home):
    one, two = version("one"), version("two")
    storage.write_json(versions.pointer_url(), {"grid": one})
    assert states() == {"one": "latest", "two": "kept"}
    versions.promote(two)
    assert versions.rollback().grid == one


def test_of_runs_that_overlap_one_wins(home):
    """All of them began while `first` was the latest."""
    versions.promote(version("first"))
    grids = [version(f"run{i}") for i in range(4)]
    known, outcome = versions.begin(grids[0]), {}

    def run(grid):
        try:
            outcome[grid] = versions.promote(grid, known).grid
        except UserError as error:
            outcome[grid] = str(error)

    threads = [threading.Thread(target=run, args=(grid,)) for grid in grids]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    (winner,) = [grid for grid, found in outcome.items() if found == grid]
    assert latest()["grid"] == winner
    assert [move["fingerprint"] for move in latest()["history"]] == ["first"]
    losers = [found for grid, found in outcome.items() if grid != winner]
    assert all("was moved from first to run" in said for said in losers)


def test_runs_of_the_same_parameters_both_succeed(home):
    versions.promote(version("first"))
    known, same = versions.begin(version("same")), version("same")
    assert versions.promote(same, known).grid == versions.promote(same, known).grid == same
    assert len(latest()["history"]) == 1


def test_a_lost_answer_to_the_promotion_is_a_promotion(sandbox, tmp_path, monkeypatch):
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", f"s3://rangegrid/{tmp_path.name}")
    one, two = version("one"), version("two")
    versions.promote(one)
    with Proxy(sandbox.endpoint) as proxy:
        monkeypatch.setenv("RANGEGRID_S3_ENDPOINT", proxy.url)
        proxy.inject(lost(), lambda request: request.method == "PUT", times=1)
        assert versions.promote(two, versions.begin(two)).grid == two
        assert proxy.faults["lost"] == 1
        assert latest()["grid"] == two


def test_rollback_goes_back_one_and_then_another(home):
    grids = [version(name) for name in ("one", "two", "three")]
    [versions.promote(grid) for grid in grids]
    assert versions.rollback().grid == grids[1] == latest()["grid"]
    assert states() == {"one": "previous", "two": "latest", "three": "withdrawn"}
    assert versions.rollback().grid == grids[0]
    with pytest.raises(UserError, match="nothing to go back to"):
        versions.rollback()
    versions.promote(grids[2])
    assert states() == {"one": "previous", "two": "withdrawn", "three": "latest"}


def test_rollback_to_a_named_version(home):
    grids = [version(name) for name in ("one", "two", "three", "never")]
    [versions.promote(grid) for grid in grids[:3]]
    with pytest.raises(UserError, match="was not the latest before"):
        versions.rollback(grids[3])
    assert versions.rollback(versions.find("one")).grid == grids[0]
    assert latest()["withdrawn"] == ["three", "two"]
    assert latest()["previous"] is None


def test_rollback_to_what_is_gone_is_refused(home):
    one, two = version("one"), version("two")
    [versions.promote(grid) for grid in (one, two)]
    storage.delete(storage.join(versions.directory(), "one"))
    with pytest.raises(UserError, match="no finished grid"):
        versions.rollback()
    assert latest()["grid"] == two


def test_prune_keeps_the_newest_and_what_is_in_use(home, monkeypatch):
    parents = {"child": "parent"}
    names = ["parent", "old", "older", "previous", "latest", "child", "newest"]
    grids = {name: version(name, parents.get(name)) for name in names}
    version("half", finished=False)
    [versions.promote(grids[name]) for name in ("older", "previous", "latest")]
    order = iter(range(len(names)))
    age = {name: next(order) for name in names}
    real = versions._version

    def aged(name, pointer):
        """Prune goes by age; versions written within a second have the same in S3."""
        found = real(name, pointer)
        if found.finished:
            found = replace(found, finished=found.finished.replace(year=2000 + age[name]))
        return found

    monkeypatch.setattr(versions, "_version", aged)
    before = latest()
    assert {v.fingerprint for v in versions.prune(2, dry_run=True)} == {"old", "older"}
    assert latest() == before
    assert len(states()) == 8
    assert {v.fingerprint for v in versions.prune(2)} == {"old", "older"}
    assert states().keys() == {"parent", "previous", "latest", "child", "newest", "half"}
    assert [move["fingerprint"] for move in latest()["history"]] == ["previous"]
    assert latest()["condemned"] == []
    assert latest()["nonce"] == before["nonce"]
    assert [v.fingerprint for v in versions.prune(2, unfinished=True)] == ["half"]


def test_prune_without_a_latest_is_refused(home):
    version("one")
    with pytest.raises(UserError, match="promote one first"):
        versions.prune(0)
    assert states() == {"one": "kept"}


def test_what_a_killed_prune_left_is_neither_promoted_nor_kept(home, monkeypatch):
    one, two = version("one"), version("two")
    versions.promote(two)
    monkeypatch.setattr(storage, "delete", lambda url: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        versions.prune(0)
    monkeypatch.undo()
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", home)
    assert states() == {"one": "condemned", "two": "latest"}
    for refused in (versions.promote, versions.begin):
        with pytest.raises(UserError, match="is being deleted"):
            refused(one)
    versions.prune(5)
    assert states() == {"two": "latest"}
    versions.promote(version("one"))


def test_prune_does_not_disturb_a_run(home):
    version("old")
    versions.promote(version("first"))
    known = versions.begin(version("next"))
    storage.delete(storage.join(versions.directory(), "next", "card.json"))
    versions.prune(0)
    assert states() == {"first": "latest", "next": "unfinished"}
    assert versions.promote(version("next"), known).fingerprint == "next"


def test_names_of_versions(home):
    one = version("abc")
    version("abd")
    assert versions.find("abc") == one == versions.find(one)
    with pytest.raises(UserError, match="names abc, abd of the versions"):
        versions.find("ab")
    with pytest.raises(UserError, match="names none"):
        versions.find("x")
    with pytest.raises(UserError, match="there is no latest version"):
        versions.find("latest")
    versions.promote(one)
    assert versions.find("latest") == one
    assert json.loads(storage.read(versions.pointer_url()))["grid"] == one


def rangegrid(*arguments):
    """The command's output."""
    ran = CliRunner().invoke(app, ["grid", *arguments], catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    return ran.stdout


def test_each_line_has_its_own_latest(home):
    """Readers of one keep theirs whatever becomes of the others."""
    half, europe = version("half"), version("europe", crs="EPSG:3035", step=10000)
    named = version("named", dtype="int8")
    card = storage.read_json(f"{versions.directory()}/named/card.json")
    storage.write_json(f"{versions.directory()}/named/card.json", card | {"line": "small", "dims": 320})
    for grid in (half, europe, named):
        rangegrid("promote", grid, "--unchecked")
    assert latest()["grid"] == half
    assert (
        storage.read_json(f"{versions.directory()}/latest.small.json")["grid"] == named == versions.find("latest.small")
    )
    listed = {row["fingerprint"]: row for row in json.loads(rangegrid("list", "--json"))}
    assert {name: row["state"] for name, row in listed.items()} == dict.fromkeys(("half", "europe", "named"), "latest")
    assert listed["named"] == listed["named"] | {"line": "small", "dtype": "int8", "dims": 320, "box": "globe"}
    assert listed["europe"] == listed["europe"] | {"crs": "EPSG:3035", "step": 10000}
    second = version("second")
    rangegrid("promote", second, "--unchecked")
    assert (latest()["grid"], latest()["previous"]) == (second, half)
    assert versions.find("latest.small") == named
    line = listed["half"]["line"]
    assert versions.find(f"latest.{line}") == second
    assert storage.read_json(f"{versions.directory()}/latest.{line}.json") == latest()
    with pytest.raises(UserError, match="nothing to go back to"):
        rangegrid("rollback", "--line", "small")
    rangegrid("rollback")
    assert latest()["grid"] == half
    assert states() == {"half": "latest", "second": "withdrawn", "europe": "latest", "named": "latest"}


def test_prune_goes_line_by_line(home):
    """To keep two of the newest deleted every other box and CRS."""
    boxes = [version(f"{crs}{i}", crs=crs, step=10000) for crs in ("3035", "6933") for i in range(4)]
    for grid in boxes:
        versions.promote(grid)
    assert {found.fingerprint for found in versions.prune(0)} == {
        f"{crs}{i}" for crs in ("3035", "6933") for i in (0, 1)
    }
    assert {found.fingerprint for found in versions.prune(0)} == set()
    waiting = version("waiting", crs="EPSG:3857")
    rangegrid("prune", "--keep", "0")
    assert states()["waiting"] == "kept", "nothing says which of its line is in use"
    versions.promote(version("other", crs="EPSG:3857"))
    assert rangegrid("prune", "--keep", "0", "--line", versions.read_line(boxes[3])) == ""
    assert rangegrid("prune", "--keep", "0").split() == [waiting]


def test_lines_that_begin_at_once_get_a_pointer_each(home):
    grids = [version(f"run{i}", step=1 + i) for i in range(4)]
    threads = [threading.Thread(target=versions.promote, args=(grid,)) for grid in grids]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert set(states().values()) == {"latest"}
    assert latest()["grid"] in grids


def former(name, **made_of):
    """A version as it was before there were lines: commit f485dcd."""
    grid = version(name, **made_of)
    attrs = {"geoemb:dimensions": 24, "rangegrid:made_of": made_of}
    storage.write_json(f"{grid}/zarr.json", {"attributes": attrs})
    return grid


def test_a_storage_of_before_there_were_lines_is_read(home):
    """Of two half-degree grids, an int8 that took their place, and a box that took its."""
    globe = {"step": 0.5, "crs": "EPSG:4326", "west": -180.0, "south": -90.0, "east": 180.0, "north": 90.0}
    first, second = (
        former(name, **globe, dtype="float32", beta=beta) for name, beta in (("first", 0.5), ("second", 1))
    )
    small, box = former("small", **globe, dtype="int8"), former("box", **globe | {"west": -25.0}, dtype="float32")
    moves = [
        {"grid": grid, "fingerprint": posixpath.basename(posixpath.dirname(grid)), "nonce": nonce, "drift": {}}
        | {"promoted": "2026-01-01T00:00:00+00:00"}
        for grid, nonce in ((box, "d"), (small, "c"), (second, "b"), (first, "a"))
    ]
    stored = moves[0] | {"history": moves[1:], "withdrawn": [], "condemned": [], "previous": small}
    storage.write_json(versions.pointer_url(), stored)
    assert states() == {"box": "latest", "small": "latest", "second": "latest", "first": "previous"}
    assert versions.prune(0, dry_run=True) == []
    rangegrid("promote", third := former("third", **globe, dtype="float32", beta=0.1), "--unchecked")
    assert latest() == stored, "readers of today's pointer keep their grid"
    assert versions.find("latest.epsg4326-0.5-float32-24") == third
    assert [found.fingerprint for found in versions.prune(0)] == ["first"]
    assert states() == {"box": "latest", "small": "latest", "third": "latest", "second": "previous"}
    rangegrid("promote", box2 := former("box2", **globe | {"west": -25.0}, dtype="float32", beta=0.1), "--unchecked")
    assert (latest()["grid"], latest()["previous"]) == (box2, box)
    assert versions.rollback(line="epsg4326-0.5-float32-24").grid == second
    assert states()["small"] == "latest"


def test_a_copied_storage_names_its_own_grids(home, tmp_path, monkeypatch):
    versions.promote(version("one"))
    copy = f"{home}-copy"
    storage.copy(home, copy)
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", copy)
    assert latest()["grid"].startswith(f"{home}/"), "for readers of before there was href"
    assert f"{versions.directory()}/{latest()['href']}" == versions.find("latest") == f"{copy}/grids/one/grid.zarr"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function that publishes a grid."""
    with publishing(tmp_path_factory.mktemp("lines")) as publish_params:
        yield lambda **params: publish_params(PublishParams(**{**STEP, **params}))


def test_publish_goes_by_line(made):
    whole, compact = made(), made(compact_dims=3, dtype="int8")
    named = made(beta=0.6, line="trial")
    assert {versions.find(f"latest{line}") for line in ("", ".epsg4326-10-int8-19", ".trial")} == {
        whole,
        compact,
        named,
    }
    assert latest()["grid"] == whole
    assert xr.open_zarr(named).attrs["rangegrid:line"] == "trial"
    assert made(beta=0.6) == named == versions.find("latest.trial"), "the line is no part of what makes a grid"
    with pytest.raises(UserError, match="of the line trial"):
        made(beta=0.6, line="other")
    child = made(beta=0.7, line="trial")
    assert (versions.find("latest.trial"), versions.find("previous.trial"), versions.find("latest")) == (
        child,
        named,
        whole,
    )


def test_the_collection_tells_what_was_withdrawn(made):
    first, second = made(beta=0.8, line="told"), made(beta=0.9, line="told")
    versions.rollback(line="told")
    links = storage.read_json(f"{versions.directory()}/collection.json")["links"]
    marks = {link["href"]: link for link in links if link["rel"] == "item"}
    assert marks[f"./{versions.name_of(second)}/item.json"]["deprecated"]
    assert "deprecated" not in marks[f"./{versions.name_of(first)}/item.json"]
    assert marks[f"./{versions.name_of(second)}/item.json"]["rangegrid:line"] == "told"


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.further)])
def test_a_version_that_is_deleted_under_its_run_is_not_promoted(made, monkeypatch, killed):
    """A prune comes when the tiles were found good, and before the card is written: by then it is done, or half so."""
    doomed, kept = made(beta=0.2, line="raced"), made(beta=0.3, line="raced")
    versions.promote(kept)
    versions.promote(made(beta=0.4, line="raced"))
    real = publish_module.show

    def show(*arguments):
        real(*arguments)
        if killed:
            monkeypatch.setattr(storage, "delete", lambda url: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                versions.prune(0, line="raced")
            monkeypatch.undo()
        else:
            assert [found.grid for found in versions.prune(0, line="raced")] == [doomed]

    monkeypatch.setattr(publish_module, "show", show)
    before = versions.read_pointer("raced")[0].grid
    with pytest.raises(UserError, match="is being deleted" if killed else "was deleted by a prune meanwhile"):
        made(beta=0.2, line="raced")
    monkeypatch.undo()
    assert versions.find("latest.raced") == before
    assert not storage.exists(f"{versions.home_of(doomed)}/card.json")
    if killed:
        versions.prune(0, line="raced")
    assert made(beta=0.2, line="raced") == doomed == versions.find("latest.raced")
    assert xr.open_zarr(doomed).embedding.notnull().any()


def test_a_card_alone_is_not_promoted(home):
    grid = version("alone")
    storage.delete(grid)
    with pytest.raises(UserError, match="a card and no grid"):
        rangegrid("promote", "alone", "--unchecked")
