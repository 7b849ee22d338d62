"""Windows of COGs, against rasterio's own read."""

import numpy as np
import pytest
import rasterio
from pyproj import Transformer
from rasterio.transform import from_origin

from infra.errors import UserError
from infra.imagery.cogs import UnreadableAsset, read_scene, read_windows

EPSG, LEFT, TOP = 32631, 400_000.0, 5_500_000.0


def write(path, data, resolution, **options):
    profile = {"driver": "GTiff", "dtype": data.dtype, "count": 1, "height": data.shape[0], "width": data.shape[1]}
    profile |= {"crs": EPSG, "transform": from_origin(LEFT, TOP, resolution, resolution), "nodata": 0}
    with rasterio.open(path, "w", **profile | options) as target:
        target.write(data, 1)
    return str(path)


def place(x, y):
    return np.array([Transformer.from_crs(EPSG, 4326, always_xy=True).transform(x, y)])


@pytest.fixture
def data():
    return np.random.default_rng(0).integers(1, 9000, (200, 300), dtype=np.uint16)


def test_a_window_is_centred_on_its_place(tmp_path, data):
    href = write(tmp_path / "a.tif", data, 10)
    (window,) = read_windows(href, place(LEFT + 1500, TOP - 800), 16, 10)
    np.testing.assert_array_equal(window, data[72:88, 142:158])


def test_a_coarser_asset_repeats_its_pixels(tmp_path, data):
    href = write(tmp_path / "a.tif", data, 20)
    (window,) = read_windows(href, place(LEFT + 3000, TOP - 1600), 16, 10)
    np.testing.assert_array_equal(window, np.kron(data[76:84, 146:154], np.ones((2, 2), np.uint16)))


@pytest.mark.parametrize("factor", [1, 2, 6])
def test_bands_of_all_pixel_sizes_register(tmp_path, factor):
    """Against GDAL's own nearest resampling of the whole asset to 10 m."""
    coarse = np.random.default_rng(1).integers(1, 9000, (600 // factor, 900 // factor), dtype=np.uint16)
    href = write(tmp_path / "a.tif", coarse, 10 * factor)
    with rasterio.open(href) as source:
        fine = source.read(1, out_shape=(600, 900), resampling=rasterio.enums.Resampling.nearest)
    rng = np.random.default_rng(2)
    for _ in range(20):
        column, row = rng.integers(128, 900 - 128), rng.integers(128, 600 - 128)
        (window,) = read_windows(href, place(LEFT + 10 * column, TOP - 10 * row), 256, 10)
        np.testing.assert_array_equal(window, fine[row - 128 : row + 128, column - 128 : column + 128])


@pytest.mark.parametrize(
    "options",
    [
        {"driver": "COG", "blocksize": 128, "compress": "deflate", "predictor": "yes"},
        {"driver": "COG", "blocksize": 128, "compress": "zstd"},
        {"compress": "lzw", "predictor": 2},
        {"bigtiff": "yes", "tiled": True, "blockxsize": 64, "blockysize": 32},
        {"endianness": "big", "compress": "deflate"},
        {"bigtiff": "yes", "endianness": "big"},
        {"tiled": True, "blockxsize": 16, "blockysize": 16},  # a header of 200 kB
    ],
)
def test_every_layout_of_a_tiff_is_read(tmp_path, options):
    data = np.random.default_rng(3).integers(1, 9000, (2000, 3000), dtype=np.uint16)
    href = write(tmp_path / "a.tif", data, 10, **options)
    places = np.concatenate([place(LEFT + 10 * column, TOP - 10 * row) for column, row in [(500, 300), (2900, 1900)]])
    first, second = read_windows(href, places, 200, 10)
    np.testing.assert_array_equal(first, data[200:400, 400:600])
    np.testing.assert_array_equal(second, data[1800:2000, 2800:3000])


def test_tiles_without_bytes_are_nodata(tmp_path):
    data = np.zeros((512, 512), np.uint16)
    data[:128, :128] = 7
    href = write(tmp_path / "a.tif", data, 10, tiled=True, blockxsize=128, blockysize=128, sparse_ok=True)
    (window,) = read_windows(href, place(LEFT + 1280, TOP - 1280), 128, 10)
    np.testing.assert_array_equal(window, data[64:192, 64:192])


@pytest.mark.parametrize("options", [{"dtype": "float32"}, {"count": 2}, {"crs": None}])
def test_what_is_no_band_is_unreadable(tmp_path, data, options):
    href = write(tmp_path / "a.tif", data.astype(options.get("dtype", "uint16")), 10, **options)
    with pytest.raises(UnreadableAsset, match=r"a\.tif cannot be read \(bands: .*, in (EPSG:32631|no CRS)\)"):
        read_windows(href, place(LEFT + 1500, TOP - 800), 16, 10)


def test_an_unknown_scheme_is_refused():
    with pytest.raises(
        UserError, match=r"the asset gs://bucket/a\.tif is not one that is read: http, https, s3 and file"
    ):
        read_windows("gs://bucket/a.tif?sig=x", place(LEFT, TOP), 16, 10)


def test_a_whole_scene_reads_as_rasterio_reads_it(whole_scene):
    """Twelve bands and the classification, against rasterio's read of the whole asset."""
    corners = [(130, 900), (512, 512), (900, 140)]
    found = read_scene(whole_scene.files, whole_scene.places(corners), 256, 100)
    assert len(found) == 13
    for name, windows in found.items():
        with rasterio.open(whole_scene.files[name]) as source:
            factor = 1098 // source.width
            fine = source.read(1).repeat(factor, axis=0).repeat(factor, axis=1)
        for window, (column, row) in zip(windows, corners, strict=True):
            np.testing.assert_array_equal(window, fine[row - 128 : row + 128, column - 128 : column + 128])


def test_the_bands_of_a_scene_register(whole_scene):
    """Around one place, against rasterio at each pixel's centre."""
    with rasterio.open(whole_scene.files["B04"]) as source:
        x, y = source.transform @ (513, 407)
    for band in ("B04", "B08", "B05", "B12", "B01", "B09", "SCL"):
        (window,) = read_windows(whole_scene.files[band], whole_scene.places([(513, 407)]), 64, 100)
        with rasterio.open(whole_scene.files[band]) as source:
            for row, column in [(0, 0), (63, 63), (17, 40), (40, 17)]:
                at = (x + (column - 32 + 0.5) * 100, y - (row - 32 + 0.5) * 100)
                assert window[row, column] == next(source.sample([at]))[0], band


def test_a_window_across_the_edge_is_refused(tmp_path, data):
    href = write(tmp_path / "a.tif", data, 10)
    places = np.concatenate([place(LEFT + 70, TOP - 800), place(LEFT + 80, TOP - 800)])
    outside, inside = read_windows(href, places, 16, 10)
    assert outside is None
    np.testing.assert_array_equal(inside, data[72:88, :16])


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize(
    "middles",
    [
        [(r, c) for r in range(40, 560, 40) for c in range(40, 860, 40)],  # in every tile: read at once
        [(64, 64), (70, 70), (320, 320), (310, 330), (-50, 10)],  # in tiles on a diagonal, and one outside
        [(130, 300), (135, 310), (140, 500)],  # in one row of tiles, one between left out
        [(-50, 10)],
    ],
)
def test_many_windows_are_the_pixels_under_each(tmp_path, middles, factor, mask):
    rng = np.random.default_rng(5)
    data = rng.integers(1, 9000, (600 // factor, 900 // factor), dtype=np.uint16)
    data[rng.random(data.shape) < 0.1] = 65535
    shown = rng.random(data.shape) < 0.8
    tiles = {"tiled": True, "blockxsize": 128, "blockysize": 128, "compress": "deflate", "nodata": 65535}
    href = write(tmp_path / "a.tif", data, 10 * factor, **tiles | ({"nodata": None} if mask else {}))
    if mask:
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(href, "r+") as target:
            target.write_mask(shown)
    hidden = ~shown if mask else data == 65535
    fine = np.where(hidden, 0, data).repeat(factor, axis=0).repeat(factor, axis=1)
    places = np.concatenate([place(LEFT + 10 * column, TOP - 10 * row) for row, column in middles])
    for window, (row, column) in zip(read_windows(href, places, 32, 10), middles, strict=True):
        if row < 0:
            assert window is None
        else:
            np.testing.assert_array_equal(window, fine[row - 16 : row + 16, column - 16 : column + 16])


def test_a_pixel_size_that_does_not_fit_is_refused(tmp_path, data):
    href = write(tmp_path / "a.tif", data, 15)
    with pytest.raises(UserError, match="an asset of 15 m pixels does not fit windows of 10 m pixels"):
        read_windows(href, place(LEFT + 1500, TOP - 800), 16, 10)


@pytest.mark.parametrize("content", [b"", b"not a tiff", None])
def test_a_corrupt_or_missing_asset_is_one_sentence_without_its_query(tmp_path, data, content):
    path = tmp_path / "scene" / "red.tif"
    path.parent.mkdir()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UnreadableAsset, match=r"the asset scene/red\.tif cannot be read") as caught:
        read_windows(f"{path}?sig=secret", place(LEFT, TOP), 16, 10)
    assert "secret" not in str(caught.value)


def test_a_truncated_asset_is_unreadable(tmp_path, data):
    path = tmp_path / "a.tif"
    write(path, data, 10)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UnreadableAsset):
        read_windows(str(path), place(LEFT + 1500, TOP - 1900), 16, 10)


@pytest.fixture(params=["made up", "recorded"])
def patch_files(request, tmp_path):
    """Files of twelve bands, in several zones on both hemispheres."""
    if request.param == "recorded":
        return sorted((request.getfixturevalue("fixtures_dir") / "s2_patches").glob("*.tif"))
    rng, paths = np.random.default_rng(4), []
    for epsg in (32601, 32660, 32733):
        profile = PROFILE | {"count": 12, "crs": epsg, "width": 256, "height": 256}
        with rasterio.open(tmp_path / f"patch_{epsg}.tif", "w", **profile) as target:
            target.write(rng.integers(0, 9000, (12, 256, 256), dtype=np.uint16))
        paths.append(tmp_path / f"patch_{epsg}.tif")
    return paths


def test_patches_read_as_rasterio_reads_them(patch_files, tmp_path):
    """In all twelve bands, each band a COG of its own as in the archive."""
    for path in patch_files:
        with rasterio.open(path) as source:
            bands, profile = source.read(), source.profile | {"count": 1, "driver": "COG"}
            x, y = source.transform @ (source.width / 2, source.height / 2)
            centre = Transformer.from_crs(source.crs, 4326, always_xy=True).transform(x, y)
        hrefs = {f"{path.stem}-{i}": str(tmp_path / f"{path.stem}-{i}.tif") for i in range(12)}
        for href, band in zip(hrefs.values(), bands, strict=True):
            with rasterio.open(href, "w", **profile) as target:
                target.write(band, 1)
        found = read_scene(hrefs, np.array([centre]), 256, 10)
        np.testing.assert_array_equal(np.stack([windows[0] for windows in found.values()]), bands)


@pytest.mark.parametrize("epsg", [32601, 32631, 32660, 32701, 32733, 32760])
@pytest.mark.parametrize(("resolution", "sizes"), [(10, (10, 20, 60)), (20, (20, 60)), (60, (60,))])
def test_bands_register_at_pixel_centres_in_every_zone(tmp_path, epsg, resolution, sizes):
    """A pixel holds the column of its left edge: all bands of a window begin at one."""
    rng, left, top = np.random.default_rng(0), 499_980.0, 5_000_040.0
    for size in sizes:
        side = 7_200 // size
        edges = np.broadcast_to((1000 + np.arange(side) * (size // 10)).astype(np.uint16), (side, side)).copy()
        transform = from_origin(left, top, size, size)
        write(tmp_path / f"{size}.tif", edges, size, crs=epsg, transform=transform)
    middles = (rng.integers(20, 7_200 // resolution - 20, (60, 2)) + 0.5) * resolution
    x, y = left + middles[:, 0], top - middles[:, 1]
    lonlat = np.column_stack(Transformer.from_crs(epsg, 4326, always_xy=True).transform(x, y))
    found = read_scene({str(size): str(tmp_path / f"{size}.tif") for size in sizes}, lonlat, 16, resolution)
    for windows in zip(*found.values(), strict=True):
        finest = windows[0].astype(int) - 1000
        for size, window in zip(sizes, windows, strict=True):
            np.testing.assert_array_equal(window.astype(int) - 1000, finest // (size // 10) * (size // 10))


def test_bands_half_a_pixel_apart_are_refused(tmp_path, data):
    hrefs = {"a": write(tmp_path / "a.tif", data, 10)}
    for name, off in (("half", 5), ("whole", 10), ("north", 0)):
        transform = from_origin(LEFT + off, TOP + (5 if name == "north" else 0), 10, 10)
        hrefs["b"] = write(tmp_path / f"{name}.tif", data, 10, transform=transform)
        with pytest.raises(UnreadableAsset, match=rf"{name}\.tif cannot be read \(its corner is"):
            read_scene(hrefs, place(LEFT + 1500, TOP - 800), 16, 10)
    hrefs["b"] = write(tmp_path / "zone.tif", data, 10, crs=32632)
    with pytest.raises(UnreadableAsset, match="its corner is"):
        read_scene(hrefs, place(LEFT + 1500, TOP - 800), 16, 10)


@pytest.mark.parametrize("driver", ["GTiff", "COG"])
@pytest.mark.parametrize("bigtiff", ["yes", "no"])
def test_what_an_internal_mask_hides_is_nodata(tmp_path, driver, bigtiff):
    """The mask lies behind the pixels in a plain file, before them in a COG."""
    data = np.random.default_rng(0).integers(1, 9000, (1024, 1024), dtype=np.uint16)
    mask = np.random.default_rng(1).random((1024, 1024)) > 0.3
    options = {"tiled": True, "blockxsize": 128, "blockysize": 128, "nodata": None, "bigtiff": bigtiff}
    plain = tmp_path / "plain.tif"
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        write(plain, data, 10, **options)
        with rasterio.open(plain, "r+") as target:
            target.write_mask(mask)
        if driver == "COG":
            with rasterio.open(plain) as source:
                rasterio.shutil.copy(source, tmp_path / "cog.tif", driver="COG", blocksize=128, compress="deflate")
    href = str(plain if driver == "GTiff" else tmp_path / "cog.tif")
    (window,) = read_windows(href, place(LEFT + 5120, TOP - 5120), 256, 10)
    rows = slice(384, 640)
    np.testing.assert_array_equal(window, np.where(mask, data, 0)[rows, rows])


def test_a_mask_in_a_file_of_its_own_and_an_alpha_band_are_refused(tmp_path, data):
    href = write(tmp_path / "a.tif", data, 10, nodata=None)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(href, "r+") as target:
        target.write_mask(data > 5)
    with pytest.raises(UnreadableAsset, match=r"its mask is in a file of its own, \.msk"):
        read_windows(href, place(LEFT + 1500, TOP - 800), 16, 10)
    with rasterio.open(tmp_path / "b.tif", "w", **PROFILE | {"count": 2, "alpha": "yes"}) as target:
        target.write(np.stack([data, data]))
    with pytest.raises(UnreadableAsset, match="bands: uint16, uint16"):
        read_windows(str(tmp_path / "b.tif"), place(LEFT + 1500, TOP - 800), 16, 10)


PROFILE = {
    "driver": "GTiff",
    "dtype": "uint16",
    "height": 200,
    "width": 300,
    "crs": EPSG,
    "transform": from_origin(LEFT, TOP, 10, 10),
}


@pytest.mark.parametrize("sparse", [True, False])
def test_the_headers_nodata_is_nodata(tmp_path, sparse):
    data = np.full((512, 512), 65_535, np.uint16)
    data[:, 200:] = 7
    options = {"tiled": True, "blockxsize": 128, "blockysize": 128, "nodata": 65_535, "sparse_ok": sparse}
    href = write(tmp_path / "a.tif", data, 10, **options)
    (window,) = read_windows(href, place(LEFT + 2000, TOP - 2560), 256, 10)
    np.testing.assert_array_equal(window, np.where(data == 65_535, 0, data)[128:384, 72:328])


@pytest.mark.parametrize("bigtiff", ["yes", "no"])
def test_a_header_at_the_end_is_read(tmp_path, bigtiff):
    """Of a file that is far larger than what is read ahead."""
    data = np.random.default_rng(0).integers(1, 30_000, (2000, 2000), dtype=np.uint16)
    options = {"tiled": True, "blockxsize": 256, "blockysize": 256, "bigtiff": bigtiff}
    href = write(tmp_path / "a.tif", data, 10, **options)
    with rasterio.open(href, "r+") as target:
        target.update_tags(x="y" * 40_000)
    head = (tmp_path / "a.tif").read_bytes()[:16]
    assert int.from_bytes(head[8:16] if bigtiff == "yes" else head[4:8], "little") > 7_000_000
    (window,) = read_windows(href, place(LEFT + 10_000, TOP - 10_000), 256, 10)
    np.testing.assert_array_equal(window, data[872:1128, 872:1128])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"transform": rasterio.Affine(10, 1, LEFT, 1, -10, TOP)}, "not square with north up"),
        ({"transform": rasterio.Affine(10, 0, LEFT, 0, 10, TOP)}, "not square with north up"),
        ({"transform": rasterio.Affine(10, 0, LEFT, 0, -20, TOP)}, "not square with north up"),
        ({"dtype": "int16"}, "bands: int16"),
        ({"dtype": "float32"}, "bands: float32"),
    ],
)
def test_what_is_no_band_is_said(tmp_path, data, options, said):
    with rasterio.open(tmp_path / "a.tif", "w", **PROFILE | {"count": 1} | options) as target:
        target.write(data.astype(options.get("dtype", "uint16")), 1)
    with pytest.raises(UnreadableAsset, match=said):
        read_windows(str(tmp_path / "a.tif"), place(LEFT + 1500, TOP - 800), 16, 10)


def test_a_chain_of_directories_that_leads_back_ends(tmp_path, data):
    href = write(tmp_path / "a.tif", data, 10)
    content = bytearray((tmp_path / "a.tif").read_bytes())
    at = int.from_bytes(content[4:8], "little")
    end = at + 2 + 12 * int.from_bytes(content[at : at + 2], "little")
    content[end : end + 4] = at.to_bytes(4, "little")
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(UnreadableAsset, match="its bytes are corrupt"):
        read_windows(href, place(LEFT + 1500, TOP - 800), 16, 10)
