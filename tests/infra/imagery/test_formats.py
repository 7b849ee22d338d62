"""Windows of JPEG 2000 and Zarr, against rasterio's own read and Zarr's own; what is damaged or forged is refused."""

import json
import struct

import numpy as np
import pytest
import rasterio
import zarr
from rasterio.transform import from_origin
from zarr.codecs import BloscCodec, GzipCodec

from infra import retries
from infra.imagery.assets import Asset
from infra.imagery.cogs import RefusedAsset, Traffic, UnreadableAsset, read_scene, read_windows
from tests.archive import Server, served
from tests.infra.imagery.test_cogs import EPSG, LEFT, TOP, place
from tests.tasks.test_bombs import GIGABYTE, nothing

SIDE, CORNERS = 700, [(60, 50), (350, 300), (640, 650)]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.001)


@pytest.fixture(scope="module")
def data():
    return np.random.default_rng(0).integers(1, 9000, (SIDE, SIDE), dtype=np.uint16)


def places():
    return np.concatenate([place(LEFT + 10 * column, TOP - 10 * row) for column, row in CORNERS])


def assert_windows(windows, data):
    for window, (column, row) in zip(windows, CORNERS, strict=True):
        np.testing.assert_array_equal(window, data[row - 50 : row + 50, column - 50 : column + 50])


def jp2(path, data, **options):
    size = {"height": data.shape[0], "width": data.shape[1], "count": 1, "dtype": data.dtype}
    placed = {"crs": EPSG, "transform": from_origin(LEFT, TOP, 10, 10)}
    how = {"QUALITY": "100", "REVERSIBLE": "YES", "blockxsize": 128, "blockysize": 128} | options
    with rasterio.open(path, "w", driver="JP2OpenJPEG", **size, **placed, **how) as target:
        target.write(data, 1)
    return path


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"TLM": "YES", "PLT": "YES"},
        {"blockxsize": 96, "blockysize": 160, "PROGRESSION": "RPCL", "PRECINCTS": "{64,64},{32,32}"},
        {"blockxsize": 1024, "blockysize": 1024},
        {"RESOLUTIONS": "1", "CODEBLOCK_WIDTH": 32, "CODEBLOCK_HEIGHT": 16},
        {"REVERSIBLE": "NO", "QUALITY": "10"},
    ],
)
def test_every_layout_of_jpeg_2000_is_read_as_rasterio_reads_it(tmp_path, data, options):
    path = jp2(tmp_path / "a.jp2", data, **options)
    with rasterio.open(path) as source:
        assert_windows(read_windows(str(path), places(), 100, 10), source.read(1))


@pytest.mark.parametrize("told", ["YES", "NO"])
def test_a_window_takes_its_tiles_alone(tmp_path, monkeypatch, data, told):
    """By what the header tells, or tile by tile; a small file comes whole."""
    monkeypatch.setattr("infra.imagery.jpeg2000.WHOLE", 0)
    path = jp2(tmp_path / "a.jp2", np.tile(data, (2, 2)), TLM=told)
    traffic = Traffic()
    with served(tmp_path) as server:
        windows = read_scene({"a": f"{server.url}/a.jp2"}, places()[:1], 100, 10, traffic)["a"]
    np.testing.assert_array_equal(windows[0], data[:100, 10:110])
    assert traffic.bytes < path.stat().st_size / 10
    assert traffic.requests < (4 if told == "YES" else 14)


def test_a_file_is_known_by_its_bytes(tmp_path, data):
    path = jp2(tmp_path / "a.jp2", data).rename(tmp_path / "a.tif")
    assert_windows(read_windows(str(path), places(), 100, 10), data)


def marked(content, marker, at, value):
    """A file whose segment of the main header has other bytes."""
    begin = content.index(b"\xff\x4f\xff\x51")
    start = content.index(struct.pack(">H", marker), begin) + 4 + at
    return content[:start] + value + content[start + len(value) :]


def sizes(side):
    """An image of one tile, of so many pixels a side."""
    return struct.pack(">8I", side, side, 0, 0, side, side, 0, 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda b: b[: len(b) // 2], "it ends before its last tile|its bytes are corrupt"),
        (lambda b: b[:300], "corrupt"),
        (lambda b: marked(b, 0xFF51, 2, struct.pack(">II", 60_000, 60_000)), r"it has [\d,]+ tiles"),
        (lambda b: marked(b, 0xFF51, 2, struct.pack(">8I", *[60_000] * 2, 0, 0, *[60_000] * 2, 0, 0)), "code-blocks"),
        (
            lambda b: marked(b, 0xFF51, 2, struct.pack(">8I", *[10_000] * 2, 0, 0, *[10_000] * 2, 0, 0)),
            "cannot be read",
        ),
        (lambda b: marked(b, 0xFF51, 34, b"\0\x03"), "bands: 3"),
        (lambda b: marked(b, 0xFF51, 10, struct.pack(">I", 5)), "do not begin at its corner"),
        (lambda b: marked(b, 0xFF52, 6, b"\x09\x09"), "cannot be read"),
        (lambda b: b.replace(b"\xff\x90\0\x0a\0", b"\xff\x90\0\x0a\x01"), "cannot be read"),
    ],
)
def test_damaged_jpeg_2000_is_unreadable(tmp_path, data, change, said):
    path = jp2(tmp_path / "a.jp2", data[:300, :300])
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UnreadableAsset, match=said):
        read_windows(str(path), place(LEFT + 2400, TOP - 2400), 100, 10)


def test_jpeg_2000_that_is_no_band_is_unreadable(tmp_path, data):
    path = jp2(tmp_path / "a.jp2", data.astype(np.int16))
    with pytest.raises(UnreadableAsset, match="bands: int16"):
        read_windows(str(path), places(), 100, 10)


def zarray(folder, data, version=3, axes=True, attributes=None, **options):
    """Writes an array with its coordinates in the group r10m; its asset."""
    group = zarr.open_group(folder / "a.zarr/r10m", mode="w", zarr_format=version)
    told = {"proj:epsg": EPSG, "_ARRAY_DIMENSIONS": ["y", "x"]} if attributes is None else attributes
    array = group.create_array("b02", shape=data.shape, dtype=data.dtype, attributes=told, **options)
    array[:] = data
    for name, sign, start in (("x", 1, LEFT), ("y", -1, TOP)) if axes else ():
        group.create_array(name, data=start + sign * 10 * (np.arange(len(data)) + 0.5))
    return Asset(str(folder / "a.zarr/r10m/b02"), "zarr")


@pytest.mark.parametrize(
    "options",
    [
        {"version": 2, "chunks": (100, 100)},
        {"version": 2, "chunks": (128, 300), "order": "F", "compressors": None},
        {"version": 2, "chunks": (128, 300), "chunk_key_encoding": {"name": "v2", "separator": "/"}},
        {"chunks": (64, 64), "shards": (256, 256)},
        {"chunks": (200, 90), "compressors": GzipCodec()},
        {"chunks": (200, 90), "compressors": BloscCodec(cname="lz4", shuffle="bitshuffle"), "fill_value": 7},
        {"chunks": (700, 700), "dtype": ">u2"},
    ],
)
def test_every_layout_of_zarr_is_read_as_zarr_reads_it(tmp_path, data, options):
    """The number of chunks without bytes, and that of the attributes, are no data."""
    attributes = {"proj:epsg": EPSG, "_ARRAY_DIMENSIONS": ["y", "x"], "_FillValue": 4000}
    kind = options.pop("dtype", "u2")
    asset = zarray(tmp_path, data.astype(kind), attributes=attributes, **options)
    found = zarr.open_array(asset.href, mode="r")[:]
    nodata = [4000, options.get("fill_value", 0)]
    windows = read_windows(asset, places(), 100, 10)
    assert_windows(windows, np.where(np.isin(found, nodata), 0, found))
    assert windows[0].dtype == np.uint16


def test_a_chunk_that_is_not_there_has_no_data(tmp_path, data):
    asset = zarray(tmp_path, data, chunks=(100, 100))
    (tmp_path / "a.zarr/r10m/b02/c/3/3").unlink()
    found = zarr.open_array(asset.href, mode="r")[:]
    assert (found[300:400, 300:400] == 0).all()
    assert_windows(read_windows(asset, places(), 100, 10), found)


@pytest.mark.parametrize(
    ("attributes", "where"),
    [
        ({"proj:code": f"EPSG:{EPSG}", "proj:transform": [10, 0, LEFT, 0, -10, TOP, 0, 0, 1]}, ""),
        ({"spatial:transform": [10, 0, LEFT, 0, -10, TOP]}, ".."),
        ({"grid_mapping": "spatial_ref"}, "spatial_ref"),
        ({"proj:transform": [10, 0, LEFT, 0, -10, TOP]}, "item"),
    ],
)
def test_attributes_tell_where_pixels_lie(tmp_path, data, attributes, where):
    """Of the array, its grid mapping, a group above; else the item tells the CRS."""
    asset = zarray(tmp_path, data, axes=False, attributes=attributes)
    if where == "..":
        root = zarr.open_group(tmp_path / "a.zarr", mode="a")
        root.attrs["stac_discovery"] = {"properties": {"proj:epsg": EPSG}}
    elif where == "spatial_ref":
        told = {"crs_wkt": rasterio.CRS.from_epsg(EPSG).to_wkt(), "GeoTransform": f"{LEFT} 10 0 {TOP} 0 -10"}
        group = zarr.open_group(tmp_path / "a.zarr/r10m", mode="a")
        group.create_array("spatial_ref", shape=(), dtype="i4", attributes=told)
    elif where == "item":
        asset = Asset(asset.href, "zarr", str(EPSG))  # as `proj:epsg` has it
    assert_windows(read_windows(asset, places(), 100, 10), data)


def test_bands_in_either_case_are_one(tmp_path, data):
    asset = zarray(tmp_path, data)
    assert_windows(read_windows(Asset(asset.href.replace("b02", "B02"), "zarr3"), places(), 100, 10), data)


@pytest.mark.parametrize("version", [2, 3])
def test_a_server_that_forbids_what_is_not_there_serves_both_versions(tmp_path, data, version):
    """As S3 does of buckets that may not be listed."""
    zarray(tmp_path, data, version, chunks=(350, 350))

    def forbid(path):
        return None if (tmp_path / path.partition("?")[0].lstrip("/")).is_file() else (403, {})

    with served(tmp_path, forbid) as server:
        asset = Asset(f"{server.url}/a.zarr/r10m/b02?token=x", "zarr")
        assert_windows(read_windows(asset, places(), 100, 10), data)
        assert all(path.endswith("?token=x") for path in server.asked)
        chunks = [
            path for path in server.asked if "/b02/" in path and "zarr.json" not in path and ".z" not in path[-20:]
        ]
        assert len(chunks) == len(set(chunks)) == 3  # each once, whatever windows share it


def test_arrays_lead_where_files_may(tmp_path, data, monkeypatch):
    """A redirect to a host that is not allowed is not followed, and a refusal of all is one."""
    zarray(tmp_path, data)
    monkeypatch.setenv("RANGEGRID_ASSET_HOSTS", '["127.0.0.1"]')
    with served(tmp_path) as other:
        elsewhere = other.url.replace("127.0.0.1", "localhost")
        away = served(tmp_path, lambda path: (302, {"Location": elsewhere + path}))
        with away as server, pytest.raises(UnreadableAsset, match="leads to localhost"):
            read_windows(Asset(f"{server.url}/a.zarr/r10m/b02", "zarr"), places(), 100, 10)
        assert other.asked == []
    with served(tmp_path, lambda path: (403, {})) as server, pytest.raises(RefusedAsset):
        read_windows(Asset(f"{server.url}/a.zarr/r10m/b02", "zarr3"), places(), 100, 10)


@pytest.mark.parametrize("shape", ["jp2", "zarr"])
def test_damage_on_the_way_passes(tmp_path, data, shape, monkeypatch):
    """One answer of other bytes, of the right length: read again, all anew."""
    monkeypatch.setattr("infra.imagery.jpeg2000.WHOLE", 0)
    jp2(tmp_path / "a.jp2", data, TLM="YES")
    zarray(tmp_path, data, chunks=(350, 350))
    damaged = []

    class Flaky(Server):
        def reply(self, request):
            status, headers, body = super().reply(request)
            if status == 206 and len(body) > 20_000 and not damaged:
                damaged.append(request.path)
                return status, headers, bytes(len(body))
            return status, headers, body

    server = Flaky(tmp_path)
    try:
        href = f"{server.url}/a.jp2" if shape == "jp2" else f"{server.url}/a.zarr/r10m/b02"
        assert_windows(read_windows(Asset(href, "zarr3" if shape == "zarr" else ""), places(), 100, 10), data)
    finally:
        server.server.shutdown()
        server.server.server_close()
    assert len(damaged) == 1


def forged(folder, **told):
    """An array whose metadata tell something else."""
    path = folder / "a.zarr/r10m/b02/zarr.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | told))


def grid(side):
    return {"name": "regular", "configuration": {"chunk_shape": [side, side]}}


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"chunk_grid": grid(20_000)}, "its tiles have 20000 x 20000 pixels"),
        ({"chunk_grid": grid(11_585)}, "does not decode"),
        ({"shape": [SIDE, 1 << 40]}, "its coordinates are of shape"),
        ({"data_type": "float32"}, "bands: float32"),
        ({"shape": [SIDE]}, "cannot be read"),
        ({"codecs": [{"name": "bytes"}, {"name": "numcodecs.lz4", "configuration": {}}]}, "packed by numcodecs.lz4"),
        ({"codecs": "none"}, "does not decode"),
        ({"chunk_grid": grid(0)}, "cannot be read"),
        ({"node_type": "group"}, "a group of Zarr, no array"),
    ],
)
def test_forged_metadata_are_refused(tmp_path, data, told, said):
    asset = zarray(tmp_path, data, chunks=(100, 100))
    forged(tmp_path, **told)
    with pytest.raises(UnreadableAsset, match=said):
        read_windows(asset, places(), 100, 10)


@pytest.mark.parametrize("content", [b"", b"damaged", nothing("zstd", GIGABYTE // 2)], ids=["empty", "bad", "bomb"])
def test_damaged_chunks_are_unreadable(tmp_path, data, content):
    asset = zarray(tmp_path, data, chunks=(100, 100))
    (tmp_path / "a.zarr/r10m/b02/c/3/3").write_bytes(content)
    with pytest.raises(UnreadableAsset, match="does not decode"):
        read_windows(asset, places(), 100, 10)


def test_uneven_coordinates_are_refused(tmp_path, data):
    asset = zarray(tmp_path, data)
    zarr.open_array(tmp_path / "a.zarr/r10m/x")[3] = LEFT
    with pytest.raises(UnreadableAsset, match="not evenly spaced"):
        read_windows(asset, places(), 100, 10)
