"""The companion that the explorer reads, against the grid, xarray's coarsening, scikit-learn's PCA and pyproj."""

from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from pyproj import Transformer
from sklearn.decomposition import PCA

from infra import storage
from tasks.cards import home_of
from tasks.grid import companion
from tasks.params import PublishParams
from tests.tasks.test_publish import publishing

ARCTIC = {"crs": "EPSG:3413", "step": 200_000.0} | dict(
    zip(("west", "south", "east", "north"), (-2.4e6, -2.4e6, 2.4e6, 2.4e6), strict=True)
)


@pytest.fixture(scope="module")
def publish(tmp_path_factory):
    """Publishes a grid whose companion has chunks of 20 cells, and three levels of the globe in steps of 5 degrees."""
    home = tmp_path_factory.mktemp("companion")
    with pytest.MonkeyPatch.context() as patch, publishing(home, 200) as publish_params:
        patch.setattr(companion, "CHUNK", 20)
        patch.setattr(companion, "COARSEST", 20)
        params = PublishParams(step=5.0, tile_cells=10, method="range+")
        yield lambda **options: publish_params(params.model_copy(update=options))


@pytest.fixture(scope="module")
def globe(publish):
    return publish(evidence=True)


def level(grid, name):
    return xr.open_zarr(companion.companion_url(grid), group=name, zarr_format=3)


def decoded(grid, name):
    """The components of a level, (component, lat, lon), as a reader decodes them; NaN at sea."""
    opened, root = level(grid, name), xr.open_zarr(companion.companion_url(grid), zarr_format=3)
    both = np.concatenate([opened.leading.values, opened.further.values])
    return both * root.scale.values[:, None, None]


def test_components_are_those_of_the_grid_to_half_a_code(globe):
    root = xr.open_zarr(companion.companion_url(globe), zarr_format=3)
    vectors, axes, scale = xr.open_zarr(globe).embedding.values, root.axes.values, root.scale.values
    exact = np.einsum("dyx,dc->cyx", vectors - root["mean"].values[:, None, None], axes)
    stored, bound = decoded(globe, "x1"), (127 * scale)[:, None, None]
    np.testing.assert_array_equal(np.isnan(stored), np.isnan(exact))
    known = np.isfinite(exact)
    inside = known & (np.abs(exact) < bound)
    assert inside.sum() > 0.999 * known.sum()
    assert (np.abs(stored - exact) / scale[:, None, None])[inside].max() < 0.501
    assert root.attrs["rangegrid:parts"] == {"visual": [0, 8], "location": [8, 24]}


def test_a_prefix_explains_as_much_as_the_principal_components_of_all_land(globe):
    """Each part at variance 1, every km² of land alike: scikit-learn's components of all cells, drawn by area."""
    grid = xr.open_zarr(globe)
    flat = grid.embedding.values.reshape(grid.sizes["embedding_dim"], -1).T
    weight = np.repeat(np.cos(np.radians(grid.lat.values)), grid.sizes["lon"])
    land = np.isfinite(flat).all(1)
    drawn = np.random.default_rng(1).choice(np.flatnonzero(land), 20_000, p=weight[land] / weight[land].sum())
    sample = flat[drawn].astype(np.float64)
    for name in ("visual", "location"):
        part = (grid.block == name).values
        sample[:, part] /= np.sqrt(sample[:, part].var(0).sum())
    best = PCA(8).fit(sample).explained_variance_
    ours = decoded(globe, "x1").reshape(128, -1).T[drawn]
    np.testing.assert_allclose(ours[:, :8].var(0), best, rtol=0.1)
    assert np.abs(np.corrcoef(ours[:, :4].T) - np.eye(4)).max() < 0.1
    assert not ours[:, 24:].any()  # beyond the vectors' own dimensions


def test_levels_are_means_and_the_root_lists_them(globe):
    listed = storage.read_json(f"{companion.companion_url(globe)}/zarr.json")
    layout = listed["attributes"]["multiscales"]["layout"]
    assert [each["asset"] for each in layout] == ["x1", "x2", "x4"]
    assert {"x1/leading", "x4/further", "x1/evidence", "scale"} <= listed["consolidated_metadata"]["metadata"].keys()
    before = level(globe, "x1")
    for each in layout[1:]:
        now = level(globe, each["asset"])
        for name in ("leading", "further"):
            expected = before[name].coarsen(lat=2, lon=2, boundary="pad").mean()
            np.testing.assert_array_equal(np.isnan(now[name]), np.isnan(expected))
            assert np.nanmax(np.abs(now[name].values - expected.values)) <= 0.5
        wide, _, west, _, high, north = each["spatial:transform"]
        np.testing.assert_allclose(now.lon, west + (np.arange(now.sizes["lon"]) + 0.5) * wide)
        np.testing.assert_allclose(now.lat, north + (np.arange(now.sizes["lat"]) + 0.5) * high)
        before = now


def test_every_object_is_there_and_evidence_is_the_grids(globe):
    """No request of a page for a part of the companion is answered by 404 or, where listing is forbidden, 403."""
    home = Path(companion.companion_url(globe).removeprefix("file://"))
    assert len(list(home.glob("x1/leading/c/0/*/*"))) == 2 * 4
    assert len(list(home.glob("x4/further/c/0/*/*"))) == 1
    grid, opened = xr.open_zarr(globe), level(globe, "x1")
    for i, name in enumerate(("distance_km", "effective_images")):
        np.testing.assert_array_equal(opened.evidence[i], grid[name])


def test_of_a_projected_grid_each_cell_has_that_of_the_grid_that_holds_it(publish):
    grid = publish(**ARCTIC)
    root, opened, arctic = xr.open_zarr(companion.companion_url(grid)), level(grid, "x1"), xr.open_zarr(grid)
    lon, lat = np.meshgrid(opened.lon, opened.lat)
    x, y = Transformer.from_crs("EPSG:4326", "EPSG:3413", always_xy=True).transform(lon, lat)
    inside = (np.abs(x) < 2.4e6) & (np.abs(y) < 2.4e6)
    at = {"x": xr.DataArray(x[inside], dims="p"), "y": xr.DataArray(y[inside], dims="p")}
    vectors = arctic.embedding.sel(at, method="nearest").values
    exact = root.axes.values.T @ (vectors - root["mean"].values[:, None])
    stored = decoded(grid, "x1")
    assert np.isnan(stored[:, ~inside]).all()
    np.testing.assert_array_equal(np.isnan(stored[0, inside]), np.isnan(exact[0]))
    error = np.abs(stored[:, inside] - exact) / root.scale.values[:, None]
    assert np.nanquantile(error, 0.999) < 0.501
    assert np.isfinite(stored[0]).sum() > 500


def test_a_rerun_completes_what_was_interrupted_and_reuses_its_axes(publish, globe):
    home = Path(companion.companion_url(globe).removeprefix("file://"))
    before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    (home / "zarr.json").unlink()
    (home / "x1/further/c/0/1/2").unlink()
    kept = home / "x1/leading/c/0/0/0"
    touched = kept.stat().st_mtime_ns
    assert publish(evidence=True) == globe
    assert {path: path.read_bytes() for path in home.rglob("*") if path.is_file()} == before
    assert kept.stat().st_mtime_ns == touched


def test_the_item_names_the_companion(globe):
    assets = storage.read_json(f"{home_of(globe)}/item.json")["assets"]
    assert assets["explorer"]["href"] == "./explorer.zarr"
