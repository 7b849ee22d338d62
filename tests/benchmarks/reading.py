"""Windows of scenes over HTTP, by us and by others: `python -m tests.benchmarks.reading`.

256 x 256 windows of twelve bands, several in each of some scenes laid out as the archive's (10,980 pixels at 10 m, 20
and 60 m bands, blocks of 512, deflate with predictor 2, overviews), served by a real server (SeaweedFS's filer), and
again through a proxy that answers 50 ms later. Each reader is a process of its own that has read before; the fastest
of some runs, each of other windows. Right means: equal to rasterio's read of the file on disk.

By us the same scenes are read as lossless JPEG 2000 too (tiles of 1,024 pixels, which the header tells or not), and as
Zarr (chunks of 1,830 pixels as EOPF's, Blosc with zstd). The peers are the group `bench` (`uv pip install --group
bench`). The first run makes 4 GB per scene in `--folder`, which takes many minutes: `--bands B05 --bands B01` and
`--readers rangegrid` make less.
"""

import asyncio
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import psutil
import rasterio
import rasterio.shutil
import typer
import zarr
from affine import Affine
from numcodecs import Blosc
from numpy.typing import NDArray
from pyproj import Transformer
from rasterio.windows import Window
from scipy.ndimage import gaussian_filter

from infra.imagery.assets import Asset
from infra.imagery.cogs import read_scene
from infra.sandbox import servers
from tests.proxy import Proxy, latency

SIZES = {10: ("B02", "B03", "B04", "B08"), 20: ("B05", "B06", "B07", "B8A", "B11", "B12"), 60: ("B01", "B09")}
BANDS = {band: size // 10 for size, bands in SIZES.items() for band in bands}
ORDER = sorted(BANDS)
SIDE_M, PIXELS, LEFT, TOP, ZONE = 109_800, 256, 300_000, 5_500_020, 32_631
RUNS, DELAY, BUCKET = 3, 0.05, "scenes"
KEYS = {"AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": "benchmark-secret"}
GDAL = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_HTTP_MERGE_CONSECUTIVE_RANGES": "YES",
    "GDAL_HTTP_MULTIPLEX": "YES",
    "GDAL_INGESTED_BYTES_AT_OPEN": 16_384,
    "GDAL_CACHEMAX": 128,
}

Corners = NDArray[np.intp]
"""(n, 2) first column and row of windows, in 10 m pixels."""
Pixels = dict[tuple[int, str], list[NDArray]]
"""Windows by scene and band."""
Reader = Callable[[str, list[Corners]], Pixels]


def corners(scenes: int, windows: int, run: int) -> list[Corners]:
    """The windows of a run, by scene."""
    rng = np.random.default_rng(run)
    return [rng.integers(0, SIDE_M // 10 - PIXELS, (windows, 2)) for _ in range(scenes)]


def under(corner: NDArray[np.intp], band: str) -> tuple[Window, tuple[NDArray, ...]]:
    """The pixels of a band under a window, and the row and column among them of each of the window's."""
    columns, rows = ((start + np.arange(PIXELS)) // BANDS[band] for start in corner)
    window = Window(int(columns[0]), int(rows[0]), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1)
    return window, np.ix_(rows - rows[0], columns - columns[0])


def by_us(root: str, work: list[Corners], ending: str = ".tif", form: str = "") -> Pixels:
    """`read_scene`, four scenes at once."""
    to_lonlat = Transformer.from_crs(ZONE, 4326, always_xy=True)

    def read(number: int) -> Pixels:
        middle = work[number] + PIXELS // 2
        lonlat = np.column_stack(to_lonlat.transform(LEFT + 10 * middle[:, 0], TOP - 10 * middle[:, 1]))
        assets = {band: Asset(f"{root}/{number}/{band}{ending}", form, f"EPSG:{ZONE}") for band in BANDS}
        found = read_scene(assets, lonlat, PIXELS, 10)
        return {(number, band): list(windows) for band, windows in found.items()}  # type: ignore[arg-type]

    return _in_threads(4, read, range(len(work)))


def by_rasterio(root: str, work: list[Corners], threads: int = 24) -> Pixels:
    """One dataset per thread and asset."""

    def read(asset: tuple[int, str]) -> Pixels:
        number, band = asset
        with rasterio.Env(**GDAL), rasterio.open(f"{root}/{number}/{band}.tif") as source:
            windows = [under(corner, band) for corner in work[number]]
            return {asset: [source.read(1, window=window)[take] for window, take in windows]}

    return _in_threads(threads, read, product(range(len(work)), BANDS))


def by_odc(root: str, work: list[Corners]) -> Pixels:
    """`odc.stac.load` of each patch onto its own GeoBox, patches in threads."""
    import odc.stac
    from odc.geo.geobox import GeoBox

    odc.stac.configure_rio(**GDAL)

    def read(place: tuple[int, int]) -> dict:
        number, at = place
        column, row = work[number][at]
        grid = Affine(10, 0, LEFT + 10 * column, 0, -10, TOP - 10 * row)
        box = GeoBox((PIXELS, PIXELS), grid, f"EPSG:{ZONE}")
        loaded = odc.stac.load([_item(root, number)], bands=list(BANDS), geobox=box, resampling="nearest")
        return {(number, band, at): loaded[band].to_numpy()[0] for band in BANDS}

    flat = _in_threads(24, read, [(n, at) for n, those in enumerate(work) for at in range(len(those))])
    return {(n, b): [flat[n, b, at] for at in range(len(those))] for n, those in enumerate(work) for b in BANDS}


def by_async_geotiff(root: str, work: list[Corners]) -> Pixels:
    """`GeoTIFF.open` of each asset with obstore, and its windows, all at once."""
    from async_geotiff import GeoTIFF
    from async_geotiff import Window as Part
    from obstore.store import HTTPStore

    store = HTTPStore.from_url(root, client_options={"allow_http": True})

    async def window(source: GeoTIFF, corner: NDArray[np.intp], band: str) -> NDArray:
        part, take = under(corner, band)
        found = await source.read(window=Part(part.col_off, part.row_off, part.width, part.height))
        return found.data[0][take]

    async def asset(number: int, band: str) -> list[NDArray]:
        source = await GeoTIFF.open(f"{number}/{band}.tif", store=store, prefetch=16_384)
        return await asyncio.gather(*(window(source, corner, band) for corner in work[number]))

    async def everything() -> Pixels:
        keys = list(product(range(len(work)), BANDS))
        return dict(zip(keys, await asyncio.gather(*(asset(*key) for key in keys)), strict=True))

    return asyncio.run(everything())


READERS: dict[str, Reader] = {
    "rangegrid": by_us,
    "JPEG 2000, TLM": partial(by_us, ending=".tlm.jp2"),
    "JPEG 2000": partial(by_us, ending=".jp2"),
    "Zarr": partial(by_us, ending=".zarr/b", form="zarr2"),
    "async-geotiff": by_async_geotiff,
    "rasterio": by_rasterio,
    "odc-stac": by_odc,
}


def _in_threads(threads: int, read: Callable, jobs: object) -> dict:
    with ThreadPoolExecutor(threads) as pool:
        return {key: value for part in pool.map(read, jobs) for key, value in part.items()}


def _item(root: str, number: int):
    """A STAC item of a scene, as odc-stac wants it."""
    import pystac

    item = pystac.Item(f"scene-{number}", None, None, datetime(2021, 7, 1, tzinfo=UTC), {"proj:code": f"EPSG:{ZONE}"})
    item.stac_extensions.append("https://stac-extensions.github.io/projection/v2.0.0/schema.json")
    for band, factor in BANDS.items():
        side = SIDE_M // 10 // factor
        grid = {"proj:shape": [side, side], "proj:transform": [10 * factor, 0, LEFT, 0, -10 * factor, TOP]}
        bands = {"raster:bands": [{"data_type": "uint16", "nodata": 0}]}
        item.add_asset(band, pystac.Asset(f"{root}/{number}/{band}.tif", roles=["data"], extra_fields=grid | bands))
    return item


def make(folder: Path, scenes: int) -> None:
    """Writes the scenes that are not there yet."""
    texture = _texture()
    for number, (size, bands) in product(range(scenes), SIZES.items()):
        for band in sorted(BANDS.keys() & set(bands)):
            path = folder / str(number) / f"{band}.tif"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                _write(path, np.roll(texture, 100 * number + 7 * ORDER.index(band), (0, 1)), size)
            _rewrite(path)


def _rewrite(path: Path) -> None:
    """Writes a GeoTIFF as JPEG 2000 and as Zarr, unless they are there."""
    with rasterio.open(path) as source:
        placed = {"crs": source.crs, "transform": source.transform, "count": 1, "dtype": "uint16"}
        shape = {"width": source.width, "height": source.height}
        for ending, told in ((".jp2", "NO"), (".tlm.jp2", "YES")):
            if (target := path.with_suffix(ending)).exists():
                continue
            how = {"QUALITY": "100", "REVERSIBLE": "YES", "blockxsize": 1024, "blockysize": 1024, "TLM": told}
            new = target.with_name(f"new-{target.name}")  # by its ending GDAL writes boxes, with the CRS
            with rasterio.open(new, "w", driver="JP2OpenJPEG", **shape, **placed, **how) as file:
                file.write(source.read(1), 1)
            new.rename(target)
        if (target := path.with_suffix(".zarr")).exists():
            return
        group = zarr.open_group(new := target.with_suffix(".new"), mode="w", zarr_format=2)
        side = 1830 if source.width > 1830 else source.width
        packed = Blosc(cname="zstd", clevel=3, shuffle=Blosc.BITSHUFFLE)
        group.create_array("b", data=source.read(1), chunks=(side, side), compressors=packed)
        grid = source.transform
        group.create_array("x", data=grid.c + grid.a * (np.arange(source.width) + 0.5))
        group.create_array("y", data=grid.f + grid.e * (np.arange(source.height) + 0.5))
        new.rename(target)


def _texture() -> NDArray[np.uint16]:
    """Of the real scene where it is at hand, else noise of two scales."""
    real = Path(os.environ.get("RANGEGRID_FIXTURES", Path(__file__).parents[3] / "shared" / "data"))
    if (path := real / "s2_scene_29RKH" / "B04.tif").exists():
        with rasterio.open(path) as source:
            return source.read(1)
    noise = np.random.default_rng(0).normal(size=(1098, 1098))
    return (2000 + 8000 * gaussian_filter(noise, 8) + 60 * noise).astype(np.uint16)


def _write(path: Path, texture: NDArray[np.uint16], size: int) -> None:
    print(f"making {path}", file=sys.stderr)
    mirrored = np.block([[texture, texture[:, ::-1]], [texture[::-1], texture[::-1, ::-1]]])
    side = SIDE_M // size
    repeats = -(-side // len(mirrored))
    data = np.tile(mirrored, (repeats, repeats))[:side, :side] + (np.arange(side, dtype=np.uint16)[:, None] // 7 % 11)
    profile = {"width": side, "height": side, "count": 1, "dtype": "uint16", "crs": f"EPSG:{ZONE}", "nodata": 0}
    options = {"compress": "deflate", "predictor": "yes", "blocksize": 512, "overview_resampling": "average"}
    with rasterio.MemoryFile() as memory:
        with memory.open(driver="GTiff", transform=Affine(size, 0, LEFT, 0, -size, TOP), **profile) as plain:
            plain.write(data, 1)
        rasterio.shutil.copy(memory.name, path.with_suffix(".new"), driver="COG", num_threads="ALL_CPUS", **options)
    path.with_suffix(".new").rename(path)


@contextmanager
def served(folder: Path, scenes: int) -> Iterator[str]:
    """The scenes behind SeaweedFS: the filer's URL of their bucket."""
    home = folder / "seaweedfs"
    home.mkdir(exist_ok=True)
    ports = servers.free_ports(5)
    s3, filer = (f"http://{servers.HOST}:{ports[i]}" for i in (0, 2))
    process = servers.start(servers.s3_command(home, ports), folder / "logs" / "s3.log", KEYS, bound=True)
    try:
        servers.wait("S3", lambda: servers.answers(s3) and servers.answers(filer), process, folder / "logs" / "s3.log")
        _upload(s3, folder, scenes)
        yield f"{filer}/buckets/{BUCKET}"
    finally:
        servers.stop(process)


def _upload(endpoint: str, folder: Path, scenes: int) -> None:
    import s3fs

    files = s3fs.S3FileSystem(
        key=KEYS["AWS_ACCESS_KEY_ID"], secret=KEYS["AWS_SECRET_ACCESS_KEY"], endpoint_url=endpoint
    )
    if not files.exists(BUCKET):
        files.mkdir(BUCKET)
    there = files.find(BUCKET, detail=True)
    found = [path for number in range(scenes) for path in (folder / str(number)).rglob("*") if path.is_file()]
    for path in found:
        key = f"{BUCKET}/{path.relative_to(folder).as_posix()}"
        if there.get(key, {}).get("size") != path.stat().st_size:
            files.put(str(path), key)


def digest(found: Pixels) -> str:
    """A hash of all pixels."""
    total = hashlib.sha256()
    for key in sorted(found):
        total.update(np.ascontiguousarray(found[key]).tobytes())
    return total.hexdigest()


def on_disk(folder: Path, work: list[Corners]) -> Pixels:
    """The oracle: rasterio's plain read of the files."""
    return by_rasterio(str(folder), work, threads=2)


def measure(name: str, root: str, scenes: int, windows: int) -> dict[str, object]:
    """The fastest of some runs of one reader, in this process."""
    read, best = READERS[name], {"seconds": np.inf}
    read(root, corners(1, 1, RUNS))  # warm: projections, connections, threads
    for run in range(RUNS):
        work = corners(scenes, windows, run)
        cpu, start = _cpu(), time.perf_counter()
        found = read(root, work)
        took = {"seconds": time.perf_counter() - start, "cpu": _cpu() - cpu}
        took |= {"run": run, "digest": digest(found)}
        best = min(best, took, key=lambda t: t["seconds"])
    return best


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main(
    scenes: int = 2,
    windows: int = 8,
    folder: Path = Path(tempfile.gettempdir(), "rangegrid-reading"),
    reader: str = "",
    root: str = "",
    bands: list[str] = typer.Option(list(BANDS)),
    readers: list[str] = typer.Option(list(READERS)),
) -> None:
    """Prints the table; with `reader` and `root`, the measures of one reader as JSON (for the table's own use)."""
    for band in set(BANDS) - set(bands):
        del BANDS[band]
    if reader:
        print(json.dumps(measure(reader, root, scenes, windows)))
        return
    folder.mkdir(parents=True, exist_ok=True)
    make(folder, scenes)
    memory = psutil.virtual_memory().total / 2**30
    print(
        f"{os.cpu_count()} cores, {memory:.0f} GiB, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}"
    )
    print(f"{windows} windows in each of {scenes} scenes, {len(BANDS)} bands, best of {RUNS}")
    print(f"{'latency':>8} {'reader':<14} {'Mpx/s':>7} {'CPU s':>6} {'requests/patch':>15} {'MB/patch':>9}  right")
    expected = [digest(on_disk(folder, corners(scenes, windows, run))) for run in range(RUNS)]
    with served(folder, scenes) as url:
        for delay, name in product((0, DELAY), readers):
            _row(delay, name, url, scenes, windows, expected)


def _row(delay: float, name: str, url: str, scenes: int, windows: int, expected: list[str]) -> None:
    origin, path = url.split("/buckets/")
    patches = scenes * windows
    with Proxy(origin) as proxy:
        if delay:
            proxy.inject(latency(delay))
        root = f"{proxy.url if delay else origin}/buckets/{path}"
        command = [sys.executable, "-m", "tests.benchmarks.reading", "--reader", name, "--root", root]
        sizes = ["--scenes", str(scenes), "--windows", str(windows), *(f"--bands={band}" for band in BANDS)]
        best = json.loads(subprocess.run([*command, *sizes], check=True, capture_output=True, text=True).stdout)
        asked, sent = sum(proxy.requests.values()) / (RUNS * patches), proxy.sent / 1e6 / (RUNS * patches)
    speed = patches * len(BANDS) * PIXELS**2 / 1e6 / best["seconds"]
    counts = f"{asked:15.1f} {sent:9.2f}" if delay else f"{'':>15} {'':>9}"
    right = "yes" if best["digest"] == expected[best["run"]] else "NO"
    print(f"{delay * 1000:5.0f} ms {name:<14} {speed:7.1f} {best['cpu']:6.2f} {counts}  {right}", flush=True)


if __name__ == "__main__":
    typer.run(main)
