"""What a sampling run will ask of the catalog and the archive, before it runs, and what it did ask."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tasks.core.sampling import grid_zone, square
from tasks.params import SampleParams
from tasks.places import draw

SPARES = 0.05  # of a shard's patches, to replace what cannot be read
THREADS = 8  # reads at a time in one unit: they wait for the network
ACCEPTED = 0.55  # of the places tried: sea at the edge of the mask, clouds and scene edges take the others
BLOCK = 512  # pixels along one side of a block of Sentinel-2 COGs
PIXEL_BYTES = 1.4  # of a compressed uint16 pixel, in the archive as in the store
HEADER_BYTES = 32_768  # read at an open; holds the header of a COG
LATENCY = 0.1  # seconds of one request to an archive in another region
RATE = 50e6  # bytes per second of one machine's network
COARSENESS = {"B01": 6, "B09": 6, **dict.fromkeys(("B05", "B06", "B07", "B8A", "B11", "B12", "SCL"), 2)}


@dataclass(frozen=True)
class Estimate:
    """The cost of a run."""

    places: int
    """Places tried."""
    cells: int
    """Grid-zone cells, each one search."""
    scenes: int
    """Scenes opened: one for each 100-km square that holds a place."""
    requests: int
    """HTTP requests to the catalog and the archive."""
    bytes_read: int
    """Bytes fetched."""
    bytes_stored: int
    """Bytes of the finished store."""
    seconds: int
    """Time on the given number of workers."""
    worker_bytes: int
    """Memory that one worker's unit needs."""

    def lines(self) -> list[tuple[str, str]]:
        """Names and values to print."""
        sizes = {"bytes_read", "bytes_stored", "worker_bytes"}
        return [
            (k.replace("_", " "), f"{v / 1e9:,.2f} GB" if k in sizes else f"{v:,}") for k, v in asdict(self).items()
        ]


def estimate(params: SampleParams, workers: int) -> Estimate:
    """The cost of a run by arithmetic on its real places; the catalog is not asked.

    A scene is opened once per band, each patch is one window of it, and a window touches as many 512-pixel
    blocks as its side and place make it.

    Args:
        params: The run.
        workers: Dask workers, each with eight reads at a time.
    """
    wanted = params.patches * (1 + SPARES)
    places = draw(min(math.ceil(wanted / ACCEPTED), int(params.patches * params.max_tries) + 16), params)[:, 1:3]
    tried, cells = len(places), len(np.unique(grid_zone(places)))
    scenes, read = len(np.unique(square(places))), len(np.unique(square(places[: math.ceil(wanted)])))
    windows = {"SCL": tried} | dict.fromkeys(params.bands, math.ceil(wanted))
    opens = {"SCL": scenes} | dict.fromkeys(params.bands, read)
    touched = {band: n * _blocks(params, band) for band, n in windows.items()}
    requests = 2 * cells + sum(opens.values()) + sum(windows.values())
    read_bytes = sum(opens.values()) * HEADER_BYTES + sum(touched.values()) * BLOCK**2 * PIXEL_BYTES
    patch = len(params.bands) * params.patch_pixels**2 * 2
    return Estimate(
        places=tried,
        cells=cells,
        scenes=scenes,
        requests=requests,
        bytes_read=round(read_bytes),
        bytes_stored=round(params.patches * patch * PIXEL_BYTES / 2),
        seconds=math.ceil(max(requests * LATENCY / (workers * THREADS), read_bytes / RATE)),
        worker_bytes=min(params.patches, params.shard_patches) * patch * 3,
    )


def _blocks(params: SampleParams, band: str) -> float:
    """Blocks that a window touches on average: its side covers 1 + side / block of them along each axis."""
    side = params.patch_pixels / max(1, COARSENESS.get(band, 1) * 10 / params.resolution_m)
    return (1 + side / BLOCK) ** 2


def beside(plan: Estimate, actual: dict[str, Any]) -> str:
    """A Markdown table of plan and actual."""
    rows = [f"| {name} | {value} | {actual.get(name, '')} |" for name, value in plan.lines()]
    return "\n".join(["| | plan | actual |", "|---|---|---|", *rows])
