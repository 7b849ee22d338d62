"""Folders of images that others made, imported as patches by the command."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin
from rasterio.warp import transform
from typer.testing import CliRunner

from flows.cli import app
from infra import clusters
from infra.errors import UserError
from tasks.database.store import open_database
from tasks.encode import encode_database
from tasks.params import BANDS, EncodeParams, TrainParams
from tasks.patches.store import open_patches
from tasks.train import train_model

SIDE = 16
PRODUCT = "S2A_MSIL2A_20220704T101611_N0400_R065_T32TQM_20220704T150511"
NEWER = {"B03": 1300, "B04": 1250, "B08": 4000, "B11": 2500}  # dense vegetation with 1000 added
DESERT = {"B02": 2100, "B03": 2600, "B04": 3200, "B08": 3900, "B11": 4500}
TRAIN = {"encoder": {"dim": 16}, "degree": 4, "hidden": 16, "dim": 8, "steps": 4, "batch": 8}
TRAIN |= {"held_out_share": 0}  # all places are of one block


@pytest.fixture(autouse=True)
def at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", (tmp_path / "store").as_uri())


@pytest.fixture
def imported():
    """Runs the command on a folder; returns the patches."""

    def run(folder, *options, side=SIDE):
        args = ["sample", "import", str(folder), "--patch-pixels", str(side), "--shard-patches", "3", *options]
        with clusters.connect("threads", 2):
            ran = CliRunner().invoke(app, args, catch_exceptions=False)
        return open_patches(ran.stdout.strip())

    return run


def dn(seed=0, base=300, side=SIDE, **bands):
    """Numbers of twelve bands, noise on a level; those of some bands on levels of their own."""
    noise = np.random.default_rng(seed).integers(0, 90, (12, side, side))
    levels = np.array([bands.get(band, base) for band in BANDS])
    return (levels[:, None, None] + noise).astype(np.uint16)


def write(path, pixels, x=500_000.0, y=5_000_000.0, size=10.0, epsg=32632, **options):
    """Writes a GeoTIFF; returns longitude and latitude of its centre."""
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {"count": len(pixels), "height": pixels.shape[1], "width": pixels.shape[2], "dtype": pixels.dtype}
    profile |= {"crs": f"EPSG:{epsg}", "transform": from_origin(x, y, size, size)} | options
    with rasterio.open(path, "w", driver="GTiff", **profile) as file:
        file.write(pixels)
    half = np.array(pixels.shape[1:]) * size / 2
    lon, lat = transform(profile["crs"], "EPSG:4326", [x + half[1]], [y - half[0]])
    return lon[0], lat[0]


def index(folder, rows, names=("lat", "lon", "url", "fn")):
    with (folder / "index.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, names, restval="")
        table.writeheader()
        table.writerows(rows)


def s2_100k(folder, images, **columns):
    """Writes the layout of S2-100K: an index, and images a kilometre apart."""
    rows = []
    for i, pixels in enumerate(images):
        lon, lat = write(folder / "images" / f"patch_{i}.tif", pixels, x=500_000 + 1000 * i)
        rows.append(
            {"lat": lat, "lon": lon, "fn": f"patch_{i}.tif", **{name: text[i] for name, text in columns.items()}}
        )
    index(folder, rows, ("lat", "lon", "url", "fn", *columns))
    return rows


def card(patches):
    return json.loads(Path(patches.url.removeprefix("file://"), "card.json").read_text())


def test_the_layout_of_s2_100k(tmp_path, imported):
    """Offsets by the pixels: three without 1000, one with, and a desert that tells nothing."""
    images = [dn(1), dn(2), dn(3, 1300, **NEWER), dn(4, 3000, **DESERT), dn(5)]
    rows = s2_100k(tmp_path / "folder", images)
    patches = imported(tmp_path / "folder")
    np.testing.assert_array_equal(patches.pixels(slice(None)), images)
    manifest = patches.manifest
    assert [*zip(manifest.lon, manifest.lat, strict=True)] == [(row["lon"], row["lat"]) for row in rows]
    assert manifest.offset.tolist() == [0, 0, -1000, 0, 0]
    assert manifest.offset_check.tolist() == ["agree", "agree", "agree", "silent", "agree"]
    assert manifest.offset_reason[3] == "nothing tells; 3 of 4 others of the folder have 0"
    assert card(patches)["offsets"] == {
        "shown by the pixels: 0": 3,
        "shown by the pixels: -1000": 1,
        "as most others of the folder: 0": 1,
    }
    without = imported(tmp_path / "folder", "--silent", "leave-out")
    assert without.manifest.row_id.tolist() == [0, 1, 2, 4]
    assert card(without)["rejected"] == {"nothing tells the offset": 1}
    assert imported(tmp_path / "folder", "--offset", "-1000").manifest.offset.tolist() == [-1000] * 5


def test_what_a_row_tells_goes_before_the_pixels_unless_they_deny_it(tmp_path, imported):
    images = [dn(1, 3000, **DESERT), dn(2, 3000, **DESERT), dn(3)]
    told = {"s2:processing_baseline": ["02.14", "05.10", "05.10"], "date": ["2020-01-02", "2023-05-06", "2023-05-06"]}
    s2_100k(tmp_path / "folder", images, **told)
    manifest = imported(tmp_path / "folder").manifest
    assert manifest.offset.tolist() == [0, -1000, 0]  # the third has numbers below 1000
    assert manifest.baseline.tolist() == ["02.14", "05.10", "05.10"]
    assert manifest.datetime.tolist() == told["date"]
    assert "baseline 05.10" in manifest.offset_reason[1]
    assert "darker" in manifest.offset_reason[2]


def test_what_is_no_patch_is_counted_by_reason(tmp_path, imported):
    folder = tmp_path / "folder"
    rows = s2_100k(folder, [dn(i) for i in range(14)])
    images = folder / "images"
    (images / "patch_1.tif").write_bytes(b"II*\0 is none")
    whole = (images / "patch_2.tif").read_bytes()
    (images / "patch_2.tif").write_bytes(whole[: len(whole) // 2])
    write(images / "patch_3.tif", dn(3)[:11])
    write(images / "patch_4.tif", dn(4).astype(np.float32))
    write(images / "patch_5.tif", dn(5, side=SIDE - 1))
    write(images / "patch_6.tif", dn(6), x=11.0, y=45.0, size=1e-4, epsg=4326)
    write(images / "patch_7.tif", dn(7), size=15.0)
    empty = dn(8)
    empty[4, 3, 3] = 0
    write(images / "patch_8.tif", empty, x=508_000)
    write(images / "patch_9.tif", dn(0), x=509_000)  # the pixels of the first
    write(images / "extra.tif", dn(99))
    rows[10]["lat"] = "north"
    rows[11]["lat"], rows[11]["lon"] = rows[11]["lon"], rows[11]["lat"]
    rows[12]["lat"] = 95.0
    index(folder, [*rows, rows[0], {"lat": 1, "lon": 2, "fn": "gone.tif"}])
    patches = imported(folder)
    assert patches.manifest.row_id.tolist() == [0, 13]
    assert card(patches)["rejected"] == {
        "no readable GeoTIFF": 2, "bands not known": 1, "not of uint16": 1, "smaller than a patch": 1, "not in UTM": 1,
        "other pixel size": 1, "nodata": 1, "the pixels of another image": 1, "not in the index": 1,
        "row without a place on Earth": 2, "image elsewhere than its row says": 1, "listed twice": 1, "no such file": 1,
    }  # fmt: skip
    assert card(patches)["tried"] == 17


def test_chips_without_an_index(tmp_path, imported):
    """One file a band at its own pixel size, as of Major TOM; several bands a file, as of rslearn; and whole files."""
    folder, pixels = tmp_path / "folder", dn(1, side=24)
    coarse = {"B01": 6, "B05": 2, "B06": 2, "B07": 2, "B8A": 2, "B09": 6, "B11": 2, "B12": 2}
    for band, numbers in zip(BANDS, pixels, strict=True):
        step = coarse.get(band, 1)
        place = write(folder / "a" / PRODUCT / f"{band}.tif", numbers[None, ::step, ::step], size=10.0 * step)
    write(folder / "a" / PRODUCT / "cloud_mask.tif", pixels[:1])
    window, other = folder / "windows" / "default" / "w1", dn(2)
    write(window / "layers" / "sentinel2.1" / "B02_B03_B04_B08" / "geotiff.tif", other[[1, 2, 3, 7]], x=600_000)
    rest = [band for band in BANDS if band not in ("B02", "B03", "B04", "B08")]
    write(
        window / "layers/sentinel2.1" / "_".join(rest) / "geotiff.tif", other[[BANDS.index(b) for b in rest]], 600_000
    )
    scene = {"name": PRODUCT.replace("T32TQM", "T32TPM"), "geometry": {"time_range": ["2022-07-05T10:16:11Z"]}}
    layer = {"layer_name": "sentinel2", "serialized_item_groups": [[], [scene]]}
    (window / "items.json").write_text(json.dumps([layer]))
    write(folder / "z.tif", dn(3)[:, ::-1], x=700_000)
    patches = imported(folder)
    seen = patches.pixels(slice(None))
    assert len(seen) == 3
    middle = slice(4, 20)
    for i, band in enumerate(BANDS):
        step = coarse.get(band, 1)
        whole = np.kron(pixels[i, ::step, ::step], np.ones((step, step), np.uint16))
        np.testing.assert_array_equal(seen[0, i], whole[middle, middle])
    np.testing.assert_array_equal(seen[1:], [other, dn(3)[:, ::-1]])
    first, second = patches.manifest.iloc[0], patches.manifest.iloc[1]
    np.testing.assert_allclose([first.lon, first.lat], place, atol=1e-7)
    assert (first.item_id, first.datetime, first.platform) == (PRODUCT, "2022-07-04T10:16:11Z", "Sentinel-2A")
    assert (first.baseline, second.datetime) == ("04.00", "2022-07-05T10:16:11Z")


def test_an_import_goes_on_and_is_trained_on_and_encoded(tmp_path, imported, monkeypatch):
    images = [dn(i) for i in range(24)]
    s2_100k(tmp_path / "folder", images)
    kept = imported(tmp_path / "folder")
    home = Path(kept.url.removeprefix("file://"))
    before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    for lost in ("card.json", "manifest.parquet", "parts/0/00002.parquet", "screen/0/00001.parquet"):
        (home / lost).unlink()
    again = imported(tmp_path / "folder")
    assert again.url == kept.url
    assert {path: path.read_bytes() for path in home.rglob("*") if path.is_file()} == before
    with clusters.connect("threads", 2) as client:
        checkpoint = train_model(client, kept.url, TrainParams(**TRAIN))
        database = open_database(encode_database(client, kept.url, checkpoint, EncodeParams(shard_rows=16)))
    np.testing.assert_array_equal(database.locations, kept.manifest[["lon", "lat"]])


def test_a_folder_without_patches_is_one_sentence(tmp_path, imported):
    with pytest.raises(UserError, match="no GeoTIFFs in"):
        imported(tmp_path)
    write(tmp_path / "one" / "images" / "a.tif", dn())
    index(tmp_path / "one", [], ("latitude", "x", "fn"))
    with pytest.raises(UserError, match="no column 'lon' among latitude, x, fn"):
        imported(tmp_path / "one")
    s2_100k(tmp_path / "two", [dn(0, 3000, **DESERT)])
    with pytest.raises(UserError, match="give --offset -1000 where it was"):
        imported(tmp_path / "two")
    with pytest.raises(UserError, match=r"none of the images .* can be a patch .1 smaller than a patch"):
        imported(tmp_path / "two", side=64)


def test_the_published_patches(fixtures_dir, imported):
    """Ten real ones, whose date and baseline nothing tells; each file is what rasterio reads."""
    patches = imported(fixtures_dir / "s2_patches", side=256)
    files = [path.removeprefix("file://") for path in patches.manifest.href]
    for i, path in enumerate(files):
        with rasterio.open(path) as file:
            np.testing.assert_array_equal(patches.pixels(slice(i, i + 1))[0], file.read())
    assert card(patches)["offset_checks"] == {"agree": 9, "silent": 1}
    told = patches.manifest.set_index(patches.manifest.item_id.str.extract(r"(\d+)")[0])
    assert told.offset_check["252161"] == "silent"  # bright ground
    assert told.offset["57755"] == -1000
    assert (told.offset.drop("57755") == 0).all()
