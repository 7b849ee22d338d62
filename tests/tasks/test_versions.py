"""The pointer `latest`: who may move it, back and forth, and what is deleted."""

import json
import threading
from dataclasses import replace

import pytest

from infra import storage
from infra.errors import UserError
from tasks import versions
from tests.proxy import Proxy, lost


@pytest.fixture(params=["file", "s3"])
def home(request, tmp_path, monkeypatch):
    """Empty storage of either kind."""
    url = (tmp_path / "storage").as_uri()
    if request.param == "s3":
        box = request.getfixturevalue("sandbox")
        url = f"{box.environment()['RANGEGRID_STORAGE_URL']}/{tmp_path.name}"
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", url)
    return url


def version(name, parent=None, finished=True):
    """A version as far as the pointer knows it."""
    grid = storage.join(versions.directory(), name, "grid.zarr")
    storage.write(storage.join(grid, "zarr.json"), b"{}")
    if finished:
        card = {"kind": "grid", "fingerprint": name, "made_of": {"parent": parent}}
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
