"""Estimates the cost of a sampling run before it runs, and adds up its actual cost."""

import math
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from infra.imagery.cogs import HEADER, Traffic
from infra.imagery.ranges import CONNECTIONS
from infra.metrics import BYTES
from tasks.core.earth.sampling import grid_zone, square
from tasks.params import SampleParams
from tasks.patches.places import counted, draw
from tasks.units import in_words

COMPOSED = 16  # places whose scenes are in memory at once for composites: 5 scenes of the default patches take 130 MB
THREADS = 8  # scenes read at a time in one unit: they wait for the network
LATENCY = 0.1  # seconds of one request to an archive in another region
RATE = 50e6  # bytes per second of one machine's network
PROCESS_BYTES = 350e6  # memory of a Python process with the libraries that a unit needs
COARSENESS = {"B01": 6, "B09": 6, **dict.fromkeys(("B05", "B06", "B07", "B8A", "B11", "B12", "SCL"), 2)}


@dataclass(frozen=True)
class Cost:
    """Cost of a run, planned or actual."""

    places: int
    """Places tried."""
    cells: int
    """Grid-zone cells searched for scenes, each by one or more pages of the catalog."""
    scenes: int
    """Scenes opened."""
    requests: int
    """HTTP requests to the archive, retries included."""
    bytes_read: int
    """Bytes fetched from the archive."""
    bytes_stored: int
    """Bytes of the stored pixels."""
    seconds: int
    """Seconds during which units were at work."""
    worker_bytes: int
    """Peak memory of a worker in bytes."""

    def lines(self) -> dict[str, str]:
        """Returns names and values to print."""
        values = {f.name.replace("_", " "): getattr(self, f.name) for f in fields(self)}
        return {name: in_words(value) if "bytes" in name else f"{value:,}" for name, value in values.items()}


@dataclass(frozen=True)
class Archive:
    """Layout of an archive in scenes and files; the defaults are Sentinel-2's COGs."""

    scene: Callable[[NDArray[np.float64]], NDArray] = square
    """Gives for (n, 2) places the number of the area that one scene covers."""
    accepted: float = 0.55
    """Share of the places tried that are accepted; the others are lost to sea, clouds and scene edges."""
    block: int = 512
    """Pixels along one side of a block."""
    pixel_bytes: float = 1.4
    """Bytes of a compressed uint16 pixel, in the archive and in the store."""
    header_bytes: int = HEADER
    """Bytes read to open a file."""
    coarseness: Mapping[str, int] = field(default_factory=lambda: COARSENESS)
    """Side of a band's pixels in pixels of the finest band; 1 for bands that are not named."""
    finest_m: float = 10.0
    """Pixel size of the finest band in metres."""
    scene_m: float = 109_800.0
    """Side of a scene in metres."""

    def touch(self, params: SampleParams, band: str, places: NDArray[np.float64]) -> NDArray[np.float64]:
        """Returns opens, further requests and blocks of one band under windows at (n, 2) places.

        A window touches 1 + side / block blocks along each axis. Blocks side by side are neighbours in the file, so a
        row of them is one request. Windows of one scene share blocks.
        """
        pixel_m = self.coarseness.get(band, 1) * self.finest_m
        rows = 1 + params.patch_pixels * min(1.0, params.resolution_m / pixel_m) / self.block
        blocks = max(1.0, (self.scene_m / pixel_m / self.block) ** 2)
        _, windows = np.unique(self.scene(places), return_counts=True)
        share = 1 - (1 - min(1.0, rows**2 / blocks)) ** windows
        requests = np.maximum(1, share * blocks / rows * (1 - share))
        return np.array([len(windows), requests.sum(), share.sum() * blocks])


def estimate(params: SampleParams, workers: int, archive: Archive = Archive()) -> Cost:
    """Estimates the cost of a run from its real places, without asking the catalog.

    Args:
        params: Parameters of the run.
        workers: Number of Dask worker processes.
        archive: Layout of the archive.
    """
    params = counted(params)
    n = params.patches
    places = draw(min(math.ceil(n / archive.accepted), int(n * params.max_tries)), params)[:, 1:3]
    touched = [
        archive.touch(params, "SCL", places),
        *(archive.touch(params, band, places[:n]) for band in params.bands),
    ]
    if params.scene == "composite":
        touched[1:] = [params.composite_scenes * each for each in touched[1:]]
        touched.append(params.composite_scenes * archive.touch(params, "SCL", places[:n]))
    opens, further, blocks = np.sum(touched, axis=0)
    requests = opens + further
    read_bytes = opens * archive.header_bytes + blocks * archive.block**2 * archive.pixel_bytes
    patch = len(params.bands) * params.patch_pixels**2 * 2
    return Cost(
        places=len(places),
        cells=len(np.unique(grid_zone(places))),
        scenes=int(touched[0][0]),
        requests=round(requests),
        bytes_read=round(read_bytes),
        bytes_stored=round(n * patch * archive.pixel_bytes / 2),
        seconds=math.ceil(max(requests * LATENCY / (workers * CONNECTIONS), read_bytes / RATE)),
        worker_bytes=round(PROCESS_BYTES + min(n, params.shard_patches) * patch * 3 + _composed_bytes(params, patch)),
    )


def _composed_bytes(params: SampleParams, patch: int) -> int:
    """Returns the memory of the scenes of the places that are composed at once, and of one stack of floats."""
    if params.scene != "composite":
        return 0
    return (COMPOSED + 4) * params.composite_scenes * patch


class Meter:
    """Counts the cost of one unit."""

    def __init__(self) -> None:
        self.began = time.time()
        self.traffic = Traffic()

    def stamp(self, table: pd.DataFrame) -> pd.DataFrame:
        """Returns the table with the counts in its attributes, which Parquet keeps for a resumed run."""
        BYTES.inc(self.traffic.bytes)
        table.attrs = {
            "requests": self.traffic.requests,
            "bytes_read": self.traffic.bytes,
            "began": self.began,
            "ended": time.time(),
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        return table


def spent(units: list[dict[str, Any]], cells: int, screened: pd.DataFrame, bytes_stored: int) -> Cost:
    """Returns the actual cost of a run: the sum over its units, also of earlier processes, without failed attempts.

    Args:
        units: The counts that `Meter` stamped on each unit.
        cells: Number of grid-zone cells screened.
        screened: Verdict on each place tried.
        bytes_stored: Bytes of the stored pixels.
    """
    return Cost(
        places=len(screened),
        cells=cells,
        scenes=screened.loc[screened["item_id"] != "", "item_id"].nunique(),
        requests=sum(unit["requests"] for unit in units),
        bytes_read=sum(unit["bytes_read"] for unit in units),
        bytes_stored=bytes_stored,
        seconds=math.ceil(_covered([(unit["began"], unit["ended"]) for unit in units])),
        worker_bytes=max(unit["peak_bytes"] for unit in units),
    )


def _covered(spans: list[tuple[float, float]]) -> float:
    """Returns the length of the union of time spans, since a pause between two runs is no work."""
    total, until = 0.0, 0.0
    for began, ended in sorted(spans):
        total += max(0.0, ended - max(began, until))
        until = max(until, ended)
    return total


def beside(plan: Cost, actual: Cost, rejected: Mapping[str, int]) -> str:
    """Returns a Markdown table of planned and actual cost, and of rejected places."""
    found = actual.lines()
    rows = [f"| {name} | {value} | {found[name]} |" for name, value in plan.lines().items()]
    rows += [f"| rejected: {reason} | | {count:,} |" for reason, count in sorted(rejected.items())]
    return "\n".join(["| | plan | actual |", "|---|---|---|", *rows])
