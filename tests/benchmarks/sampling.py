"""What a place costs by screening and by reading: `python -m tests.benchmarks.sampling 10000x32 40000x16`.

CPU of this process and of the sandbox's servers, and requests, of some cells of the demo planet, for samples of so many
patches and pixels. The first run builds the planet in `--folder`, which takes minutes.
"""

import os
import resource
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import typer
from numpy.typing import NDArray

from infra import sandbox
from tasks.core.earth.sampling import grid_zone
from tasks.params import SampleParams
from tasks.patches import store
from tasks.patches.places import draw
from tasks.patches.reading import read_shard, shape
from tasks.patches.reuse import WHERE
from tasks.patches.screening import by_place, screen_cell
from tasks.sample import PLANNED, SCREENED, assign

TRIED = 1.1  # places tried for each patch: the planet has few clouds that no other scene makes up for


def cpu() -> NDArray[np.float64]:
    """Seconds of this process and of its servers, so far."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    servers = psutil.Process().children(recursive=True)
    return np.array([own.ru_utime + own.ru_stime, sum(sum(one.cpu_times()[:2]) for one in servers)])


def measure(params: SampleParams, cells: int, home: Path) -> None:
    """Prints the row of one size of sample."""
    places = draw(round(params.patches * TRIED), params)
    zones = grid_zone(places[:, 1:3])
    known = np.unique(zones)
    some = known[np.linspace(0, len(known) - 1, cells).astype(int)].tolist()
    shutil.rmtree(home, ignore_errors=True)
    url = home.as_uri()
    store.create(url, *shape(params))
    screen_cell(url, params, (1, some[0], places[zones == some[0]][:2]))  # warm: catalog, projections, connections
    start = cpu()
    for cell in some:
        screen_cell(url, params, (0, cell, places[zones == cell]))
    screened, plan, parts = cpu() - start, *planned(url, params, some)
    start = cpu()
    for part in parts:
        read_shard(url, params, (0, part))
    read, tried = cpu() - start, int(np.isin(zones, some).sum())
    asked = requests(url, "screen", some) / tried, requests(url, "parts", parts) / len(plan)
    each = 1000 * screened / tried, 1000 * read / len(plan)
    total = params.patches * (TRIED * each[0].sum() + each[1].sum()) / 1000
    print(
        f"{params.patches:>7,} x {params.patch_pixels:<4}{len(plan) / plan['item_id'].nunique():9.1f}"
        f"{each[0][0]:10.2f}{each[0][1]:9.2f}{asked[0]:10.2f}{each[1][0]:10.2f}{each[1][1]:9.2f}{asked[1]:10.2f}{total:9.0f}",
        flush=True,
    )


def planned(url: str, params: SampleParams, cells: list[int]) -> tuple[pd.DataFrame, list[int]]:
    """The clear places in the order in which they are read, and the shards, whose plans are stored."""
    table = by_place(pd.concat(store.read_parts(url, "screen", 0, cells, [*SCREENED, "rank"]), ignore_index=True))
    plan = assign(table[table["reason"] == ""]).assign(**dict.fromkeys(WHERE))
    shards = plan["position"] // params.shard_patches
    for shard, rows in plan.groupby(shards):
        store.create_part(url, "plan", 0, int(shard), rows[[*PLANNED, *WHERE]])  # type: ignore[call-overload]
    return plan, sorted(set(shards))


def requests(url: str, kind: str, parts: list[int]) -> int:
    """Requests that the parts tell of."""
    return sum(table.attrs["requests"] for table in store.read_parts(url, kind, 0, parts, ["row_id"]))  # type: ignore[misc]


def main(
    sizes: list[str],
    cells: int = 40,
    folder: Path = Path(tempfile.gettempdir(), "rangegrid-sampling"),
) -> None:
    """Prints the table; sizes are patches x pixels."""
    with sandbox.running(folder, prefect=False) as box:
        os.environ.update(box.environment() | {"RANGEGRID_STORAGE_URL": folder.as_uri()})
        print(
            f"{cells} cells, of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; ms of CPU, ours and the servers'"
        )
        columns = "screening", "servers", "requests", "reading", "servers", "requests", "CPU s"
        print(
            f"{'sample':<14}{'an item':>9}" + "".join(f"{name:>{9 + (i % 3 != 1)}}" for i, name in enumerate(columns))
        )
        for size in sizes:
            patches, pixels = map(int, size.split("x"))
            bands = ("B02", "B03", "B04", "B08")
            params = SampleParams(patches=patches, patch_pixels=pixels, resolution_m=5000, bands=bands)
            measure(params, cells, folder / "sample")


if __name__ == "__main__":
    typer.run(main)
