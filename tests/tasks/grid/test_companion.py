"""The compact product, which the explorer reads, against the grid, xarray's means, scikit-learn's PCA and pyproj."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
import xarray as xr
from pyproj import Transformer
from rio_cogeo import cog_validate
from sklearn.decomposition import PCA

from infra import storage
from tasks.cards import home_of
from tasks.grid import companion, geotiff, levels
from tasks.params import PublishParams
from tests.tasks.test_publish import publishing

ARCTIC = {"crs": "EPSG:3413", "step": 200_000.0} | dict(
    zip(("west", "south", "east", "north"), (-2.4e6, -2.4e6, 2.4e6, 2.4e6), strict=True)
)


@pytest.fixture(scope="module")
def publish(tmp_path_factory):
    """Publishes a grid whose product has chunks of 10 of its 24 components and 20 cells, and three levels."""
    home = tmp_path_factory.mktemp("companion")
    with pytest.MonkeyPatch.context() as patch, publishing(home, 200) as publish_params:
        patch.setattr(levels, "CHUNK", 20)
        patch.setattr(levels, "COARSEST", 20)
        patch.setattr(companion, "DEPTH", 10)
        patch.setattr(geotiff, "SIDE", 32)
        params = PublishParams(step=5.0, tile_cells=10, method="range+")
        yield lambda **options: publish_params(params.model_copy(update=options))


@pytest.fixture(scope="module")
def globe(publish):
    return publish(evidence=True)


def level(grid, name=None):
    return xr.open_zarr(companion.companion_url(grid), group=name, zarr_format=3)


def decoded(grid, name=None):
    """The components of a level, (component, y, x), as a reader decodes them; NaN at sea."""
    return (level(grid, name).embedding * level(grid).scale).values


def test_components_are_those_of_the_grid_to_half_a_code(globe):
    root = xr.open_zarr(companion.companion_url(globe), zarr_format=3)
    vectors, axes, scale = xr.open_zarr(globe).embedding.values, root.axes.values, root.scale.values
    exact = np.einsum("dyx,dc->cyx", vectors - root["mean"].values[:, None, None], axes)
    stored, bound = decoded(globe), (127 * scale)[:, None, None]
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
    best = PCA().fit(sample).explained_variance_
    ours = decoded(globe).reshape(24, -1).T[drawn]
    np.testing.assert_allclose(ours[:, :8].var(0), best[:8], rtol=0.1)
    assert np.abs(np.corrcoef(ours[:, :4].T) - np.eye(4)).max() < 0.1
    np.testing.assert_allclose(level(globe).kept, np.cumsum(best) / best.sum(), atol=0.01)


@pytest.mark.further
def test_heads_together_count_as_much_as_the_location(publish):
    """Of all components the axes are a rotation of what each dimension is multiplied by, one number for each part."""
    grid = publish(method="multi-head", heads=("semantic:9", "geodesic:500"), compact_dims=4, location_dims=8)
    opened, root = xr.open_zarr(grid), level(grid)
    factors = np.sqrt((root.axes.values.astype(np.float64) ** 2).sum(1))
    weight = np.cos(np.radians(opened.lat))
    for part in (opened.block.isin(["semantic", "geodesic"]), opened.block == "location"):
        variance = opened.embedding[part.values].weighted(weight).var(("lat", "lon")).sum()
        np.testing.assert_allclose(factors[part], factors[part][0], rtol=1e-4)
        assert factors[part][0] ** 2 * variance == pytest.approx(1, rel=0.05)
    assert root.attrs["rangegrid:parts"] == {"semantic": [0, 4], "geodesic": [4, 8], "location": [8, 16]}


@pytest.mark.parametrize("more", [{}, ARCTIC, {"compact_dims": 4}], ids=["globe", "arctic", "compact"])
def test_slopes_lead_to_the_components_of_another_beta(publish, globe, more):
    """Of vectors that NumPy mixes from the kept sums; means of them on coarser levels, and no grid without has any."""
    grid = publish(keep_sums=True, beta=0.3, evidence=not more, **more)
    opened, root, vectors = xr.open_zarr(grid), level(grid), xr.open_zarr(grid).embedding.values.astype(np.float64)
    kept = xr.open_zarr(grid.replace("grid.zarr", "sums.zarr")).sums.values.astype(np.float64)
    semantic, geodesic = (half[:-2] / half[-2] for half in np.split(kept, 2))
    visual = (opened.block == "visual").values
    vectors[visual] = 0.9 * semantic + 0.1 * geodesic
    exact = np.einsum("dyx,dc->cyx", vectors - root["mean"].values[:, None, None], root.axes.values[:, :10])
    own, slope = decoded(grid)[:10], (root.beta * root.beta_scale).values
    found = own + (0.9 - root.attrs["rangegrid:beta"]) * slope
    np.testing.assert_array_equal(np.isnan(found), np.isnan(exact))
    steps = 0.502 * (root.scale.values[:10] + 0.6 * root.beta_scale.values)
    assert (np.abs(found - exact) < steps[:, None, None])[np.isfinite(exact)].mean() > 0.999
    away = np.nanstd(own - exact, axis=(1, 2)) / np.nanstd(found - exact, axis=(1, 2))
    assert away.max() > 10  # another beta is another field
    coarser = level(grid, "x2").beta
    expected = root.beta.coarsen(dict.fromkeys(coarser.dims[1:], 2), boundary="pad").mean()
    assert np.nanmax(np.abs(coarser.values - expected.values)) <= 0.5
    assert not {"beta", "beta_scale"} & level(globe).keys()
    assert "rangegrid:beta" not in level(globe).attrs


@pytest.mark.parametrize("more", [{"method": "multi-head", "heads": ("semantic:9", "geodesic:500")}, {"beta": 1.0}])
def test_sums_of_what_no_beta_mixes_have_no_slopes(publish, more):
    assert not {"beta", "beta_scale"} & level(publish(keep_sums=True, north=0.0, **more)).keys()


def test_levels_are_means_and_the_root_lists_them(globe):
    listed = storage.read_json(f"{companion.companion_url(globe)}/zarr.json")
    layout = listed["attributes"]["multiscales"]["layout"]
    assert [each["asset"] for each in layout] == [".", "x2", "x4"]
    assert {"embedding", "x4/embedding", "evidence", "scale"} <= listed["consolidated_metadata"]["metadata"].keys()
    before = level(globe)
    for each in layout[1:]:
        now = level(globe, each["asset"])
        expected = before.embedding.coarsen(lat=2, lon=2, boundary="pad").mean()
        np.testing.assert_array_equal(np.isnan(now.embedding), np.isnan(expected))
        assert np.nanmax(np.abs(now.embedding.values - expected.values)) <= 0.5
        wide, _, west, _, high, north = each["spatial:transform"]
        np.testing.assert_allclose(now.lon, west + (np.arange(now.sizes["lon"]) + 0.5) * wide)
        np.testing.assert_allclose(now.lat, north + (np.arange(now.sizes["lat"]) + 0.5) * high)
        before = now


def test_every_object_is_there_and_evidence_is_the_grids(globe):
    """No request of a page for a part of the companion is answered by 404 or, where listing is forbidden, 403."""
    home = Path(companion.companion_url(globe).removeprefix("file://"))
    assert len(list(home.glob("embedding/*/*/*"))) == 3 * 2 * 4
    assert len(list(home.glob("x4/embedding/2/*/*"))) == 1
    grid, opened = xr.open_zarr(globe), level(globe)
    for i, name in enumerate(("distance_km", "effective_images")):
        np.testing.assert_array_equal(opened.evidence[i], grid[name])


@pytest.fixture(scope="module")
def arctic(publish):
    return publish(**ARCTIC)


def test_a_projected_grid_is_stored_in_its_own_cells_and_shown_by_the_nearest_ones(arctic):
    """Both by the grid's vectors: those of the same cells, and those of the cell that holds a place, by pyproj."""
    grid, root, shown = xr.open_zarr(arctic), level(arctic), level(arctic, "lonlat")
    vectors, mean, axes = grid.embedding.values, root["mean"].values, root.axes.values
    exact = np.einsum("dyx,dc->cyx", vectors - mean[:, None, None], axes)
    assert np.nanquantile(np.abs(decoded(arctic) - exact) / root.scale.values[:, None, None], 0.999) < 0.501
    np.testing.assert_array_equal(root.x, grid.x)
    np.testing.assert_array_equal(root.y, grid.y)
    lon, lat = np.meshgrid(shown.lon, shown.lat)
    x, y = Transformer.from_crs("EPSG:4326", "EPSG:3413", always_xy=True).transform(lon, lat)
    inside = (np.abs(x) < 2.4e6) & (np.abs(y) < 2.4e6)
    at = {"x": xr.DataArray(x[inside], dims="p"), "y": xr.DataArray(y[inside], dims="p")}
    stored = (shown.embedding * root.scale).values
    assert np.isnan(stored[:, ~inside]).all()
    there = root.embedding.sel(at, method="nearest")
    np.testing.assert_array_equal(stored[:, inside], (there * root.scale).values)
    assert np.isfinite(stored[0]).sum() > 500


@pytest.mark.parametrize("name", ["embedding", "x2/embedding", "evidence"])
def test_gdal_reads_it_with_its_place_and_no_data(globe, name):
    """GDAL of rasterio 1.4 knows of Zarr what format 2 tells, and of that no shards, checksums or strings."""
    home = companion.companion_url(globe).removeprefix("file://")
    group, _, variable = name.rpartition("/")
    expected = xr.open_zarr(home, group=group or None, zarr_format=3, mask_and_scale=False)
    with rasterio.open(f'ZARR:"{home}":/{name}') as opened:
        np.testing.assert_array_equal(opened.read(), expected[variable])
        assert opened.crs.to_epsg() == 4326
        step = 10.0 if group else 5.0
        assert opened.transform == rasterio.transform.from_origin(-180, 90, step, step)
        assert opened.nodata == -128 or np.isnan(opened.nodata)


def test_gdal_reads_a_projected_one_in_its_own_plane(arctic):
    home = companion.companion_url(arctic).removeprefix("file://")
    with rasterio.open(f'ZARR:"{home}":/embedding') as opened:
        assert (opened.crs.to_epsg(), opened.count, opened.dtypes[0]) == (3413, 24, "int8")
        assert opened.bounds == (-2.4e6, -2.4e6, 2.4e6, 2.4e6)


def test_both_formats_tell_the_same(globe):
    home = companion.companion_url(globe)
    found, expected = (xr.open_zarr(home, zarr_format=n) for n in (2, 3))
    xr.testing.assert_identical(found.drop_encoding(), expected.drop_encoding())


def geotiff_of(grid):
    return Path(home_of(grid).removeprefix("file://"), "compact.tif")


def test_the_geotiff_has_the_codes_of_every_level_with_scales_and_names(globe):
    path, scale = geotiff_of(globe), level(globe).scale.values
    assert cog_validate(path, strict=True) == (True, [], [])
    for n, group in enumerate([None, "x2", "x4"]):
        with rasterio.open(path, **({"OVERVIEW_LEVEL": n - 1} if group else {})) as opened:
            codes = opened.read(masked=True)
        expected = decoded(globe, group)
        np.testing.assert_array_equal(codes.mask, np.isnan(expected))
        np.testing.assert_array_equal((codes * scale[:, None, None]).filled(np.nan), expected)
    with rasterio.open(path) as opened:
        assert opened.scales == tuple(map(float, scale))
        assert (set(opened.offsets), opened.nodata, opened.dtypes[0]) == ({0.0}, -128, "int8")
        assert opened.descriptions == tuple(f"component {n}" for n in range(1, 25))
        assert (opened.crs.to_epsg(), opened.bounds) == (4326, (-180, -90, 180, 90))
        assert opened.overviews(24) == [2, 4]
        assert opened.tags()["attribution"] == level(globe).attrs["attribution"]


def test_the_geotiff_of_a_projected_grid_is_in_its_plane(arctic):
    assert cog_validate(geotiff_of(arctic), strict=True) == (True, [], [])
    with rasterio.open(geotiff_of(arctic)) as opened:
        assert (opened.crs.to_epsg(), opened.bounds) == (3413, (-2.4e6, -2.4e6, 2.4e6, 2.4e6))
        scaled = opened.read(masked=True) * np.array(opened.scales, np.float32)[:, None, None]
        np.testing.assert_array_equal(scaled.filled(np.nan), decoded(arctic))


def test_an_interrupted_geotiff_is_resumed_to_the_same_bytes(publish, globe, monkeypatch, capsys):
    path = geotiff_of(globe)
    before = path.read_bytes()
    path.unlink()
    monkeypatch.setattr(geotiff, "put_together", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        publish(evidence=True)
    parts = sorted(path.with_name("compact.tif.parts").iterdir())
    assert len(parts) == 3 * 2 + 2 * 1 + 1
    parts[3].unlink()
    monkeypatch.undo()
    capsys.readouterr()
    assert publish(evidence=True) == globe
    assert "compact GeoTIFF: 8 of 9" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert not parts[0].parent.exists()


def test_a_rerun_completes_what_was_interrupted_and_reuses_its_axes(publish, globe):
    home = Path(companion.companion_url(globe).removeprefix("file://"))
    before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    (home / "zarr.json").unlink()
    (home / "embedding/2/1/2").unlink()
    kept = home / "embedding/0/0/0"
    touched = kept.stat().st_mtime_ns
    assert publish(evidence=True) == globe
    assert {path: path.read_bytes() for path in home.rglob("*") if path.is_file()} == before
    assert kept.stat().st_mtime_ns == touched


def test_the_item_names_the_companion(globe):
    assets = storage.read_json(f"{home_of(globe)}/item.json")["assets"]
    assert [assets[name]["href"] for name in ("compact", "compact-geotiff")] == ["./compact.zarr", "./compact.tif"]
