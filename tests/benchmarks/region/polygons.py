"""Memory of a region of many vertices: `python -m tests.benchmarks.region.polygons [--polygons 3000] [--vertices 667]`.

Writes a file of rings, and reads it in a process that does nothing else, which draws places in it; prints seconds, the
peak of that process as the kernel counts it, and what it had before.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import geopandas as gpd
import numpy as np
import shapely

from tasks.core.earth.sampling import draw_even
from tasks.tables.regions import find_region
from tests.benchmarks.memory import resident

PLACES = 5000


def main() -> None:
    """Writes the file, and starts the reading in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--polygons", type=int, default=3000)
    parser.add_argument("--vertices", type=int, default=667)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    lon, lat = rng.uniform(-10, 40, options.polygons), rng.uniform(-20, 30, options.polygons)
    angle = np.linspace(0, 2 * np.pi, options.vertices)
    rings = np.stack([lon[:, None] + 0.05 * np.cos(angle), lat[:, None] + 0.05 * np.sin(angle)], axis=-1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "many.parquet")
        gpd.GeoDataFrame(geometry=shapely.polygons(rings), crs=4326).to_parquet(path)
        command = [sys.executable, "-c", "from tests.benchmarks.region.polygons import read; read()", str(path)]
        subprocess.run(command, check=True)


def read() -> None:
    """Reads the region that is named on the command line, and prints one line."""
    program, begun = resident("VmHWM"), time.perf_counter()
    region = find_region((sys.argv[1],))
    places = draw_even(PLACES, 0, region=region)
    assert region.holds(places).all()
    vertices, took = shapely.get_num_coordinates(region.polygons).sum(), time.perf_counter() - begun
    print(
        f"{len(region.polygons):,} polygons of {vertices:,} vertices, {len(places):,} places in them: {took:,.0f} s, "
        f"peak {resident('VmHWM'):,.0f} MB, of which the program {program:,.0f} MB"
    )


if __name__ == "__main__":
    main()
