"""Files of some kilobytes that tell of gigabytes: refused by their names, and never unpacked.

Each is read through what a command or a step reads it by, all in one process, whose peak memory is looked at.
"""

import json
import re
import subprocess
import sys

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import rasterio
import zarr
from numcodecs import Blosc
from zarr.codecs import BloscCodec, GzipCodec, ZstdCodec
from zarr.codecs.numcodecs import LZ4

from tasks.core.earth.grid import GridSpec
from tasks.grid import store as grids
from tests.tasks.test_publish import images, store, store_checkpoint
from tests.test_architecture import ROOT

GIGABYTE = 1 << 30
SPEC = GridSpec(10.0, 6)
READ = """
import json, sys
from infra.errors import UserError
from infra.imagery import cogs
from tasks.points import sample_grid
from tasks.patches import places
from tasks.release import validation
from tasks.database.store import open_database
from tasks.evaluation.label_tables import read_labels
from tasks.params import EvaluateParams, SampleParams
from tests.benchmarks.memory import resident
import numpy as np

READERS = {
    "grid": lambda url: sample_grid.sample_grid(url, [[2.35, 48.86]]),
    "header": validation.opened,
    "database": open_database,
    "points": lambda url: sample_grid.sample_file(url, sys.argv[1], url + ".out.parquet"),
    "labels": lambda url: read_labels(EvaluateParams(labels=[url], label="label", kind="classification")),
    "classes": lambda url: places.draw(3, SampleParams(places="class", source=url)),
    "scene": lambda url: cogs.read_windows(url, np.array([[15.0, 50.0]]), 16, 10.0),
}
np.zeros(30_000_000).sum()
before, said = resident("VmHWM"), {}
for name, (kind, url) in json.loads(sys.argv[2]).items():
    try:
        said[name] = f"nothing: {READERS[kind](url)}"
    except (UserError, cogs.UnreadableAsset) as error:
        said[name] = str(error)
    said[name] += f" [{resident('VmHWM') - before:.0f} MB]"
print(json.dumps(said))
"""


def a_grid(folder, name):
    """The URL of a small grid, and where the metadata of its vectors are."""
    url = (folder / name / "grid.zarr").as_uri()
    grids.create(url, SPEC, grids.template(SPEC, grids.Content(300, 8), {}))
    return url, folder / name / "grid.zarr/embedding/zarr.json"


def nothing(codec, size):
    """Zeros, packed: `size` bytes of them in a few thousand or so."""
    if codec != "blosc":
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, codec) as packed:
            for _ in range(size >> 24):
                packed.write(bytes(1 << 24))
        return sink.getvalue().to_pybytes()
    packed = bytearray(Blosc(shuffle=0).encode(bytes(1 << 20)))
    packed[4:8] = size.to_bytes(4, "little")  # of what follows no byte is read before memory is there
    return bytes(packed)


def with_array(folder, home, **array):
    """A grid of which one array is another; its URL."""
    url, _ = a_grid(folder, home)
    path = url.removeprefix("file://")
    zarr.open_group(path, mode="a").create_array(**array, overwrite=True)
    zarr.consolidate_metadata(path)
    return url


def grids_of_nothing(folder):
    """Grids: with chunks, tiles and axes of any size, by foreign codecs, and with shards that unpack to gigabytes."""
    vectors = {"name": "embedding", "shape": (308, 18, 36), "dtype": "f4"}
    url = with_array(
        folder, "tile", **vectors | {"shape": (308, 18000, 36000)}, shards=(512, 18000, 18000), chunks=(256, 100, 100)
    )
    yield "tile", "grid", url, "tile/grid.zarr says that its tiles have 18,000 cells a side"
    url = with_array(
        folder, "deep", **vectors | {"shape": (1 << 24, 18, 36)}, shards=(1 << 24, 6, 6), chunks=(1 << 24, 6, 6)
    )
    yield "deep", "grid", url, r"deep/grid.zarr/embedding says that it is of shape \(16777216, 18, 36\)"
    url = with_array(folder, "lz4", **vectors, shards=(512, 6, 6), chunks=(256, 6, 6), compressors=[LZ4()])
    yield "lz4", "grid", url, "lz4/grid.zarr/embedding is packed by numcodecs.lz4"
    url = with_array(
        folder, "axis", name="lat", shape=(GIGABYTE,), chunks=(1 << 20,), dtype="f8", dimension_names=["lat"]
    )
    yield "axis", "header", url, r"axis/grid.zarr/lat says that it is of shape \(1073741824,\)"
    for codec, kind in (("zstd", ZstdCodec()), ("gzip", GzipCodec()), ("blosc", BloscCodec())):
        url = with_array(folder, codec, **vectors, shards=(512, 6, 6), chunks=(256, 6, 6), compressors=[kind])
        packed = nothing(codec, GIGABYTE // 2)
        index = np.array([[0, len(packed)], [2**64 - 1, 2**64 - 1]], "<u8").tobytes()
        shard = folder / codec / "grid.zarr/embedding/c/0/0/3"
        shard.parent.mkdir(parents=True)
        shard.write_bytes(packed + checked(index))
        yield codec, "grid", url, rf"{codec}/grid.zarr/embedding/c/0/0/3 is damaged"


def checked(data):
    """Bytes with their CRC32C behind them."""
    return data + google_crc32c.value(data).to_bytes(4, "little")


def tables_of_nothing(folder):
    """Parquet: of rows, of one long text in all rows, and of pages without end."""
    some = np.zeros(1 << 20)
    table = pa.table({"lon": some, "lat": some, "label": pa.array(["a"] * len(some)).dictionary_encode()})
    with pq.ParquetWriter(folder / "rows.parquet", table.schema, compression="zstd") as writer:
        for _ in range(20):
            writer.write_table(table)
    few = np.zeros(200_000)
    text = pa.DictionaryArray.from_arrays(pa.array(few.astype("i4")), pa.array(["x" * 100_000]))
    pq.write_table(pa.table({"lon": few, "lat": few, "label": text}), folder / "text.parquet")
    pages = pa.table({"lon": np.zeros(18_000_000), "lat": np.zeros(18_000_000)})
    large = {"use_dictionary": False, "compression": "zstd", "data_page_size": GIGABYTE, "row_group_size": 18_000_000}
    pq.write_table(pages, folder / "page.parquet", **large)
    for name, kind in (("rows", "labels"), ("text", "labels"), ("page", "points")):
        said = rf"{name}.parquet has [0-9,]+ bytes and says that they hold"
        yield name, kind, (folder / f"{name}.parquet").as_uri(), said


def rasters_of_nothing(folder):
    """GeoTIFFs: of pixels that no byte tells of, and of tiles larger than the image."""
    large = {"blockxsize": 32768, "blockysize": 32768}
    said = r"\.tif has [0-9,]+ bytes and says that they hold"
    for name, kind, crs, size, options, message in (
        ("pixels", "classes", 4326, 40_000, {}, said),
        ("tiles", "classes", 4326, 16, large, said),
        ("scene", "scene", 32633, 64, large, "scene.tif .*its tiles have 32768 x 32768 pixels"),
    ):
        corner = rasterio.transform.from_origin(499_680, 5_540_000, 10, 10) if crs != 4326 else None
        place = {"crs": crs, "transform": corner or rasterio.transform.from_bounds(-180, -90, 180, 90, size, size)}
        about = {"width": size, "height": size, "count": 1, "dtype": "uint16", "sparse_ok": True, "tiled": True}
        with rasterio.open(
            folder / f"{name}.tif", "w", driver="GTiff", compress="deflate", **about, **place, **options
        ):
            pass
        where = folder / f"{name}.tif"
        yield name, kind, str(where) if kind == "scene" else where.as_uri(), message


def a_database(folder):
    """With a shard of values that unpacks to a gigabyte, its checksum right."""
    store_checkpoint(folder.as_uri())
    url = store(folder, "database", images(np.arange(300)))
    (folder / "database/database.zarr/values/c/1/0").write_bytes(checked(nothing("zstd", GIGABYTE)))
    yield "database", "database", url, "database.zarr/values/c/1/0 is damaged"


def test_nothing_is_unpacked_that_cannot_be(tmp_path):
    made = [
        *grids_of_nothing(tmp_path),
        *tables_of_nothing(tmp_path),
        *rasters_of_nothing(tmp_path),
        *a_database(tmp_path),
    ]
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or path.stat().st_size < 3_000_000, path
    good, _ = a_grid(tmp_path, "good")
    told = json.dumps({name: (kind, url) for name, kind, url, _ in made})
    ran = subprocess.run([sys.executable, "-c", READ, good, told], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout.splitlines()[-1])
    for name, _, _, message in made:
        assert re.search(message, said[name]), (name, said[name])
        peak = float(re.search(r"\[(-?\d+) MB\]$", said[name])[1])
        assert peak < 400, (name, said[name])
