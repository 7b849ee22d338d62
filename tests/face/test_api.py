"""The names that users of the field type, against rangegeo, and what they are told where a name is taken."""

import os
import subprocess
import sys
import types
from abc import ABC

import numpy as np
import pytest
from rangegeo import RANGE

import rangegrid
from tasks.core.earth.sphere import unit_vectors
from tests.tasks.database.test_store import VALUES, arrays
from tests.tasks.evaluation.test_fusion import grid  # noqa: F401
from tests.tasks.model.test_checkpoint import satclip_file
from tests.test_architecture import ROOT

PLACES = np.array([[12.0, 57.0], [-177.0, -33.0], [3.0, 23.0]])


@pytest.fixture
def published(tmp_path):
    """A checkpoint and a database in their published files, of random numbers."""
    keys = np.random.default_rng(5).normal(size=(25, 256)).astype("f4")
    np.savez(tmp_path / "db.npz", **arrays() | {"satclip_embeddings": keys})
    return str(satclip_file(tmp_path / "satclip.ckpt", 10)), str(tmp_path / "db.npz")


def test_a_field_is_rangegeos(published):
    checkpoint, database = published
    theirs = RANGE("RANGE+", pretrained_path=checkpoint, db_path=database).encode(PLACES)
    field = rangegrid.load(checkpoint, database, "range+")
    assert field.embed(PLACES).shape == (3, VALUES + 256)
    np.testing.assert_allclose(field.embed(PLACES), theirs, atol=2e-5)
    np.testing.assert_array_equal(field.encode(PLACES[:, 0], PLACES[:, 1], 2020), field.embed(PLACES))
    assert field.embed([10.0, 50.0]).shape == (1, VALUES + 256)


def test_a_grid_is_sampled_and_opened(grid):  # noqa: F811
    """The grid holds unit vectors of its cells' centres, none north of 50 degrees."""
    stored = rangegrid.open_grid(grid)
    spacing = 10.0
    centres = (np.floor(PLACES / spacing) + 0.5) * spacing
    found = stored.sample(PLACES)
    known = np.isfinite(found[:, 0])
    np.testing.assert_array_equal(known, centres[:, 1] <= 50)
    np.testing.assert_allclose(found[known], unit_vectors(centres[known]), atol=1e-6)
    np.testing.assert_array_equal(rangegrid.sample(grid, PLACES), found)
    np.testing.assert_array_equal(stored.encode(PLACES[:, 0], PLACES[:, 1]), found)
    assert stored.xarray().sizes
    assert stored.attrs


def test_coordbench_loads_a_field_and_a_grid(published, grid, monkeypatch):  # noqa: F811
    """By the interface of torchgeo-bench, which is not installed here: `_encode` of chunks of lon, lat and year."""

    class LocationEncoder(ABC):  # noqa: B024
        def __init__(self, device="cpu", batch_size=8192):
            self.device, self.batch_size = device, batch_size

        def encode(self, lon, lat, year=None):
            starts = range(0, len(lon), self.batch_size)
            return np.concatenate([self._encode(lon[s : s + 2], lat[s : s + 2], None) for s in starts])

    models = types.ModuleType("torchgeo_bench.coordbench.models")
    models.LocationEncoder = LocationEncoder
    for name in ("torchgeo_bench", "torchgeo_bench.coordbench", "torchgeo_bench.coordbench.models"):
        monkeypatch.setitem(sys.modules, name, models)
    monkeypatch.delitem(sys.modules, "rangegrid.coordbench", raising=False)
    from rangegrid.coordbench import FieldLocationEncoder, GridLocationEncoder

    field = FieldLocationEncoder(*published, method="range+", batch_size=2)
    expected = rangegrid.load(*published, "range+").embed(PLACES)
    np.testing.assert_allclose(field.encode(*PLACES.T), expected, atol=1e-6)
    np.testing.assert_array_equal(
        GridLocationEncoder(grid, batch_size=2).encode(*PLACES.T), rangegrid.sample(grid, PLACES)
    )
    monkeypatch.delitem(sys.modules, "rangegrid.coordbench")


def test_an_environment_in_which_a_name_is_taken_is_told(tmp_path):
    """Another project's `tasks` comes first: the command and the import say so, and show no traceback of ours."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "__init__.py").write_text("")
    for code in (["-m", "rangegrid", "doctor"], ["-c", "from rangegrid import load"]):
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        run = subprocess.run(
            [sys.executable, *code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
        )
        assert run.returncode == 1
        last = run.stderr.strip().splitlines()[-1]
        assert "and here tasks is of" in last
        assert "install rangegrid into an environment of its own" in last


def test_no_other_name_is_public():
    with pytest.raises(AttributeError, match="no attribute 'tasks'"):
        _ = rangegrid.tasks
