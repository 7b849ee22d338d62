"""What changed between two versions, against numpy over the whole arrays; and the commands about versions."""

import io
import json

import numpy as np
import pytest
import xarray as xr
import zarr
from PIL import Image
from scipy.spatial import distance
from typer.testing import CliRunner

from flows.cli import app
from flows.prune import prune
from infra import storage
from infra.errors import UserError
from tasks.grid import store
from tasks.params import PruneParams
from tasks.release import diff, validation, versions
from tests.tasks.release.test_validation import SPEC, copy, good, made  # noqa: F401
from tests.tasks.test_publish import VALUES


def vectors(grid):
    return xr.open_zarr(grid).embedding.values.astype(np.float64)


def rangegrid(*arguments):
    """The command's exit status and what it prints."""
    ran = CliRunner().invoke(app, ["grid", *arguments], catch_exceptions=False)
    return ran.exit_code, ran.stdout


def test_a_grid_has_not_moved_from_itself(client, good):  # noqa: F811
    found = diff.diff(client, good, good).numbers()
    assert (found["moved"], found["appeared"], found["vanished"]) == (0, 0, 0)
    assert set(found["relative_change"].values()) == {0.0}


def test_the_difference_is_that_of_the_arrays(client, made, good, tmp_path):  # noqa: F811
    other = made(beta=0.45, promote=False)
    before, after = vectors(good), vectors(other)
    change = np.linalg.norm(after - before, axis=0) / np.linalg.norm(before, axis=0)
    cosine = (before * after).sum(0) / np.linalg.norm(before, axis=0) / np.linalg.norm(after, axis=0)
    found = diff.diff(client, good, other)
    np.testing.assert_allclose(found.change, change, rtol=1e-4)
    np.testing.assert_allclose(found.cosine, cosine, atol=1e-6)
    numbers, known = found.numbers(), change[np.isfinite(change)]
    assert numbers["cells"] == len(known)
    assert numbers["moved"] == (known > 1e-4).sum()
    assert numbers["relative_change"]["0.5"] == pytest.approx(np.median(known), rel=1e-4)
    assert numbers["cosine"]["0"] == pytest.approx(np.nanmin(cosine), abs=1e-6)
    picture = Image.open(io.BytesIO(storage.read(diff.keep(found, good, other, str(tmp_path / "d.png")))))
    assert picture.width > 1000


def test_cells_that_moved_came_and_went_are_counted_where_they_are(client, good, copy):  # noqa: F811
    array = zarr.open_array(storage.zarr_store(storage.join(copy, store.VARIABLE)), mode="r+")
    data = array[...]
    land, sea = np.argwhere(np.isfinite(data[0])), np.argwhere(np.isnan(data[0]))
    tile = [place for place in sea if np.isfinite(data[0, place[0] // 5 * 5 :, place[1] // 5 * 5 :][:5, :5]).any()]
    data[(slice(None), *land[7])] *= -1
    data[(slice(None), *land[30])] = np.nan
    data[(slice(None), *tile[0])] = 1
    array[...] = data
    found = diff.diff(client, good, copy)
    assert np.argwhere(found.change > 1e-4).tolist() == [land[7].tolist()]
    assert found.change[tuple(land[7])] == pytest.approx(2)
    assert found.cosine[tuple(land[7])] == pytest.approx(-1)
    assert (found.appeared, found.vanished) == (1, 1)


def test_other_cells_and_other_vectors_are_not_compared(client, made, good):  # noqa: F811
    for params in ({"compact_dims": 3}, {"step": 20.0}):
        with pytest.raises(UserError, match="only vectors of the same cells can be compared"):
            diff.diff(client, good, made(promote=False, **params))


def test_drift_is_the_cosine_at_the_same_cells(made, good, caplog):  # noqa: F811
    """Against scipy, at the cells that are told apart by nothing but the grid."""
    versions.promote(good)
    other = made(beta=0.0)
    cells = validation.chosen(SPEC, diff.CANARIES)
    before, after = (vectors(grid)[:, *cells].T for grid in (good, other))
    expected = [distance.cosine(*pair) for pair in zip(before[:, :VALUES], after[:, :VALUES], strict=True)]
    pointer, _ = versions.read_pointer()
    assert pointer.grid == other
    assert pointer.drift["visual_mean"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert pointer.drift["visual_max"] == pytest.approx(np.max(expected), abs=1e-6)
    assert pointer.drift["location_mean"] == pytest.approx(0, abs=1e-6)  # the encoder is the same
    assert "its vectors turned from those of" in caplog.text
    assert made(beta=0.0) == other  # a rerun measures nothing, and the record stays
    assert versions.read_pointer()[0].drift == pointer.drift


def test_a_grid_that_cannot_be_compared_or_is_damaged_keeps_no_other_from_its_readers(made, good, caplog):  # noqa: F811
    made(beta=0.46, line="mixed")
    compact = made(compact_dims=4, line="mixed")
    assert versions.read_pointer("mixed")[0].grid == compact
    assert "only vectors of the same cells can be compared" in caplog.text
    damaged = made(beta=0.9, promote=False)
    versions.promote(damaged)
    storage.delete(storage.join(damaged, "embedding"))
    storage.delete(storage.join(damaged, "zarr.json"))
    caplog.clear()
    assert made(beta=0.85) == versions.read_pointer()[0].grid
    assert "drift was not measured" in caplog.text
    assert versions.read_pointer()[0].drift == {}


def test_the_commands_tell_and_move(made, good, tmp_path):  # noqa: F811
    other = made(beta=0.55, promote=False)
    versions.promote(good)
    name, theirs = versions.name_of(good), versions.name_of(other)
    listed = {row["fingerprint"]: row["state"] for row in json.loads(rangegrid("list", "--json")[1])}
    assert (listed[name], listed[theirs]) == ("latest", "kept")
    assert f"latest     {name}  2" in rangegrid("list")[1]
    told = json.loads(rangegrid("inspect", theirs)[1])
    assert told["made_of"]["beta"] == 0.55
    assert told["dimensions"] == {"embedding_dim": 24, "lat": 18, "lon": 36}
    status, checks = rangegrid("validate", "latest", "--json")
    assert status == 0
    assert all(check["passed"] for check in json.loads(checks))
    assert rangegrid("promote", theirs) == (0, f"{other}\n")
    status, changed = rangegrid("diff", "previous", "latest", "--output", str(tmp_path / "d.png"))
    assert json.loads(changed)["moved"] > 0
    assert (tmp_path / "d.png").stat().st_size > 10_000
    assert rangegrid("rollback") == (0, f"{good}\n")
    assert versions.read_pointer()[0].grid == good


def test_a_bad_grid_is_told_by_the_status(made):  # noqa: F811
    bad = made(beta=0.35, promote=False)
    shard = sorted(storage.names(storage.join(bad, "embedding/c/0/1")))[0]
    storage.write(storage.join(bad, "embedding/c/0/1", shard), b"no shard")
    status, told = rangegrid("validate", versions.name_of(bad))
    assert status == 1
    assert "FAIL  decoding" in told
    with pytest.raises(UserError, match="is not good"):
        rangegrid("promote", versions.name_of(bad))
    assert versions.read_pointer()[0].grid != bad


def test_the_prune_deployment_keeps_what_is_in_use(made, good, prefect):  # noqa: F811
    old = made(beta=0.15, promote=False)
    versions.promote(good)
    before = {found.fingerprint for found in versions.versions()}
    gone = prune(PruneParams(keep=0, dry_run=True))
    assert old in gone
    assert good not in gone
    assert {found.fingerprint for found in versions.versions()} == before
    status, printed = rangegrid("prune", "--keep", "0")
    assert (status, printed.split()) == (0, gone)
    assert not storage.names(storage.join(versions.directory(), versions.name_of(old)))
    assert xr.open_zarr(good).embedding.shape[0] == 24
