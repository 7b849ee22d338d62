"""One scene as each archive stores it: the same patches, byte for byte, and what is in no known format is refused."""

import pytest
import rasterio

from infra import clusters, retries
from infra.errors import UserError
from tasks.params import SampleParams
from tasks.patches.store import open_patches
from tasks.sample import sample_patches
from tests import formats
from tests.archive import catalog, served

BANDS = ("B02", "B05", "B01")
CORNERS = [(400, 500), (700, 420), (600, 800)]


@pytest.fixture(autouse=True)
def settings(tmp_path, monkeypatch, whole_scene):
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.001)
    monkeypatch.setenv("RANGEGRID_COLLECTION", whole_scene.item["collection"])


def sample(folder, scene, items, monkeypatch, home="home", **more):
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", (folder / home).as_uri())
    monkeypatch.setenv("RANGEGRID_STAC_URL", catalog(folder, items))
    lonlat = scene.places(CORNERS)
    (folder / "places.csv").write_text("lon,lat\n" + "".join(f"{lon},{lat}\n" for lon, lat in lonlat))
    day = scene.item["properties"]["datetime"][:10]
    asked = {"patches": 3, "places": "list", "source": str(folder / "places.csv"), "patch_pixels": 96}
    asked |= {"resolution_m": 100, "datetime": day, "bands": BANDS, "min_clear_fraction": 0.0, "max_tries": 1}
    with clusters.connect("threads") as client:
        return open_patches(sample_patches(client, SampleParams(**asked | more)))


def test_every_shape_of_an_archive_gives_the_same_patches(whole_scene, tmp_path, monkeypatch):
    """Against rasterio's own read of the GeoTIFFs; of B01 the original is read, not the copies beside it."""
    files = {band: whole_scene.files[band] for band in (*BANDS, "SCL")}
    found = {}
    for shape, rewrite in formats.SHAPES.items():
        folder = tmp_path / shape
        folder.mkdir()
        with served(folder) as server:
            items = [formats.item(whole_scene, rewrite(folder, files, server.url))]
            patches = sample(folder, whole_scene, items, monkeypatch, max_nodata_fraction=1.0)
        rows = patches.manifest.sort_values("row_id")
        found[shape] = patches.pixels(slice(None))[rows.index], rows[["lon", "lat", "offset", "sha256"]]
    for n, band in enumerate(BANDS):
        with rasterio.open(files[band]) as source:
            fine = source.read(1).repeat(1098 // source.width, 0).repeat(1098 // source.width, 1)
        for patch, (column, row) in zip(found["cog"][0], CORNERS, strict=True):
            assert (patch[n] == fine[row - 48 : row + 48, column - 48 : column + 48]).all()
    for shape, (pixels, rows) in found.items():
        assert pixels.tobytes() == found["cog"][0].tobytes(), shape
        assert rows.reset_index(drop=True).equals(found["cog"][1].reset_index(drop=True)), shape


def test_another_format_is_refused_by_name_before_the_first_place(whole_scene, tmp_path, monkeypatch):
    files = {band: whole_scene.files[band] for band in (*BANDS, "SCL")}
    assets = formats.cogs(tmp_path, files, tmp_path.as_uri())
    assets["blue"] |= {"type": "application/x-netcdf"}
    with pytest.raises(
        UserError, match="B02 is application/x-netcdf, which is not read: GeoTIFF, JPEG 2000 and Zarr are"
    ):
        sample(tmp_path, whole_scene, [formats.item(whole_scene, assets)], monkeypatch)
    assert not (tmp_path / "home/patches").exists()
