"""Searches of a dump of many items: seconds, row groups read, and peak memory; and of the same file held whole.

`python -m tests.benchmarks.catalogs [--items 1000000] [--group 20000] [--order place] [--folder FOLDER]` writes a
stac-geoparquet of made-up items, as its specification has it without `type` and `collection`: one a day and square of
100 km, with the hrefs of thirteen files each. Then it searches ten grid-zone cells for the scenes of a quarter of a
year around 25 places each, in a process of its own.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import shapely

from infra.stac import dumps, files
from infra.stac.catalogs import Catalog, search
from tasks.core.sentinel2.items import NAMES
from tests.benchmarks.memory import resident

BATCH, SIDE = 20_000, 1.0  # items made at a time; degrees of a scene
DAY = 86_400_000_000  # microseconds
BEGIN, DAYS = np.datetime64("2021-01-01", "us").astype(int), 730
ORDERS = ("place", "time", "none")


def main() -> None:
    """Prints a line for each way to read."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--group", type=int, default=20_000)
    parser.add_argument("--order", choices=ORDERS, default="place")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--read")
    options = parser.parse_args()
    if options.read:
        read(options)
        return
    with TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder, "dump.parquet")
        began = time.perf_counter()
        write(path, options)
        size, took = path.stat().st_size, time.perf_counter() - began
        print(f"{options.items:,} items by {options.order}, {size / 1e6:,.0f} MB, written in {took:.0f} s", flush=True)
        print(f"{'':<10}{'found':>7}{'groups':>8}{'first, s':>10}{'a cell, s':>11}{'program, MB':>13}{'peak, MB':>10}")
        command = [sys.executable, "-m", "tests.benchmarks.catalogs", "--folder", folder]
        for way in ("in parts", "whole"):
            subprocess.run([*command, "--read", way], check=way == "in parts")


def write(path: Path, options: argparse.Namespace) -> None:
    """Writes the dump in batches."""
    rng = np.random.default_rng(0)
    lon, lat = rng.uniform(-179, 178, options.items), rng.uniform(-60, 70, options.items)
    day = rng.integers(0, DAYS, options.items)
    cell = np.floor((lon + 180) / 6) * 20 + np.floor((lat + 80) / 8)
    rows = {"place": np.lexsort((day, cell)), "time": np.argsort(day), "none": np.arange(options.items)}[options.order]
    writer = None
    for start in range(0, options.items, BATCH):
        part = rows[start : start + BATCH]
        batch = table(part, lon[part], lat[part], day[part])
        writer = writer or pq.ParquetWriter(path, batch.schema, compression="zstd", use_dictionary=False)
        writer.write_table(batch, row_group_size=options.group)
    writer.close()


def table(row, lon, lat, day) -> pa.Table:
    """Returns items as rows: flat properties, a box, WKB, and thirteen assets."""
    corners = {"xmin": lon, "ymin": lat, "xmax": lon + SIDE, "ymax": lat + SIDE}
    names = pa.array([f"S2A_{n:08d}_T31TQM_{when:04d}_0_L2A" for n, when in zip(row, day, strict=True)])
    return pa.table(
        {
            "id": names,
            "stac_version": ["1.0.0"] * len(row),
            "bbox": pa.StructArray.from_arrays(list(map(pa.array, corners.values())), list(corners)),
            "geometry": shapely.to_wkb(shapely.box(*corners.values())),
            "datetime": pa.array(BEGIN + day * DAY, pa.timestamp("us", "UTC")),
            "eo:cloud_cover": pa.array([None if n % 7 == 0 else float(n % 60) for n in row], pa.float64()),
            "s2:processing_baseline": ["05.10"] * len(row),
            "assets": pa.StructArray.from_arrays([asset(names, band) for band in NAMES], list(NAMES)),
        }
    )


def asset(names: pa.StringArray, band: str) -> pa.StructArray:
    """Returns one file of each item."""
    parts = "https://archive.example/sentinel-2/29/R/KH/", names, f"/{band}.tif", ""
    return pa.StructArray.from_arrays([pc.binary_join_element_wise(*parts)], ["href"])


def read(options: argparse.Namespace) -> None:
    """Searches ten cells, and prints a line."""
    if options.read == "whole":
        files.WHOLE = 1 << 40
    groups = []
    brief = dumps.Dump.brief
    dumps.Dump.brief = lambda dump, group: groups.append(group) or brief(dump, group)
    catalog = Catalog(str(options.folder / "dump.parquet"), "sentinel-2")
    rng, program, took, found = np.random.default_rng(1), resident("VmRSS"), [], 0
    for west, south in rng.integers([0, 1], [60, 15], (10, 2)) * [6, 8] - [180, 80]:
        began = time.perf_counter()
        points = rng.uniform([west, south], [west + 6, south + 8], (25, 2))
        found += len(search(catalog, "2021-04-01/2021-06-30", points, 60.0))
        took.append(time.perf_counter() - began)
    counts = f"{options.read:<10}{found:>7,}{len(groups):>8}{took[0]:>10.2f}{np.mean(took[1:]):>11.2f}"
    print(f"{counts}{program:>13,.0f}{resident('VmHWM'):>10,.0f}", flush=True)


if __name__ == "__main__":
    main()
