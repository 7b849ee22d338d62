"""Builds the demo planet: NASA Blue Marble cut into scenes like Sentinel-2's, with their STAC items, in S3.

It is NASA Blue Marble at about 7 km (1/15 degree) standing in for 10 m Sentinel-2, and says so on every item.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any

import obstore
from obstore.store import S3Store

from infra.errors import UserError
from infra.sandbox import bluemarble, scenes
from infra.sandbox.cells import Cell, Frame, frame, land_cells, parse
from infra.sandbox.tether import die_with_parent

BUCKET = "rangegrid-planet"
LAYOUT = 2  # raise it when the same spec would give other bytes
PROCESSES = 2
CELLS_PER_PROCESS = 10  # to start a process and read the source there takes as long as some 15 cells

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PlanetSpec:
    """What the demo planet consists of."""

    resolution_m: int = 5_000
    """Pixel size of the bands, metres; the source has about 7,400 m, so finer pixels show nothing more."""
    cells: tuple[str, ...] | None = None
    """Grid zone cells to build, e.g. `("31U", "01K")`; None: every cell with land."""
    seed: int = 0
    """Seed of dates, clouds and partial coverage."""

    def __post_init__(self) -> None:
        if not 1_000 <= self.resolution_m <= 50_000:
            raise UserError(f"the planet's pixel size {self.resolution_m} m does not fit: use 1000 to 50000, e.g. 5000")
        for name in self.cells or ():
            parse(name)

    @property
    def fingerprint(self) -> str:
        """Returns 12 hexadecimal digits of what makes the planet."""
        text = json.dumps([LAYOUT, asdict(self)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def grid_cells(self) -> list[Cell]:
        """Returns the cells to build, by name."""
        if self.cells is None:
            return land_cells()
        return [parse(name) for name in sorted(set(self.cells))]


@dataclass(frozen=True)
class Bucket:
    """Where the planet is kept, and the keys to it."""

    endpoint: str
    """URL of the S3 server."""
    access_key: str
    secret_key: str
    name: str = BUCKET

    def store(self) -> S3Store:
        return S3Store(
            self.name,
            endpoint=self.endpoint,
            access_key_id=self.access_key,
            secret_access_key=self.secret_key,
            region="us-east-1",
            virtual_hosted_style_request=False,
            client_options={"allow_http": True},
        )


def build(spec: PlanetSpec, bucket: Bucket, on_progress: Progress = lambda done, total: None) -> int:
    """Builds what is missing of the planet and returns the number of its items.

    One cell is one unit: its items are written last, so a build that was interrupted goes on where it stopped.

    Args:
        spec: What to build.
        bucket: Where to.
        on_progress: Called with the cells done and the cells in all.
    """
    store = bucket.store()
    cells = spec.grid_cells()
    made = _made(spec, store)
    missing = [cell for cell in cells if cell.name not in made]
    on_progress(len(cells) - len(missing), len(cells))
    if missing:
        _build_cells(spec, bucket, missing, lambda done: on_progress(len(cells) - len(missing) + done, len(cells)))
    if not is_built(spec, bucket):
        _write_catalog(spec, store, cells)
    return len(items(spec, bucket)["features"])


def is_built(spec: PlanetSpec, bucket: Bucket) -> bool:
    """Tells whether the whole planet of this spec is in the bucket."""
    try:
        obstore.head(bucket.store(), _catalog(spec))
    except FileNotFoundError:
        return False
    return True


def items(spec: PlanetSpec, bucket: Bucket) -> dict[str, Any]:
    """Returns every item of a built planet, as a GeoJSON FeatureCollection."""
    return json.loads(bytes(obstore.get(bucket.store(), _catalog(spec)).bytes()))


def collection(spec: PlanetSpec) -> dict[str, Any]:
    """Returns the STAC collection of the planet."""
    return {
        "type": "Collection",
        "stac_version": "1.1.0",
        "stac_extensions": [],
        "id": scenes.COLLECTION,
        "title": f"Demo planet: {scenes.STAND_IN}",
        "description": f"{scenes.STAND_IN}. Bands are Blue Marble (1/15 degree, about 7.4 km at the equator) with the "
        f"sRGB curve undone, NIR follows from MODIS NDVI, resampled to {spec.resolution_m} m in UTM. "
        "Dates, clouds, cloud shadows and processing baselines are synthetic.",
        "keywords": ["Blue Marble", "demo", "not Sentinel-2"],
        "license": "other",
        "providers": [{"name": "NASA Visible Earth (Blue Marble), MODIS (NDVI)", "roles": ["producer"]}],
        "extent": {
            "spatial": {"bbox": [[-180, -90, 180, 90]]},
            "temporal": {"interval": [["2021-01-01T00:00:00Z", "2023-12-31T23:59:59Z"]]},
        },
        "links": [],
    }


def _catalog(spec: PlanetSpec) -> str:
    return f"{spec.fingerprint}/items.json"


def _cell_key(spec: PlanetSpec, cell: str) -> str:
    return f"{spec.fingerprint}/cells/{cell}.json"


def _made(spec: PlanetSpec, store: S3Store) -> set[str]:
    """Returns the names of complete cells."""
    listing = obstore.list_with_delimiter(store, f"{spec.fingerprint}/cells")
    return {meta["path"].rpartition("/")[2].removesuffix(".json") for meta in listing["objects"]}


def _write_catalog(spec: PlanetSpec, store: S3Store, cells: list[Cell]) -> None:
    features = []
    for cell in cells:
        features += json.loads(bytes(obstore.get(store, _cell_key(spec, cell.name)).bytes()))
    catalog = {"type": "FeatureCollection", "features": features}
    obstore.put(store, _catalog(spec), json.dumps(catalog).encode())


def _build_cells(spec: PlanetSpec, bucket: Bucket, cells: list[Cell], on_done: Callable[[int], None]) -> None:
    if len(cells) <= CELLS_PER_PROCESS:
        for done, cell in enumerate(cells, 1):
            build_cell(spec, bucket, cell)
            on_done(done)
        return
    with _processes() as pool:
        pending = {pool.submit(build_cell, spec, bucket, cell) for cell in cells}
        while pending:
            finished, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in finished:
                future.result()
            on_done(len(cells) - len(pending))


@contextmanager
def _processes() -> Iterator[ProcessPoolExecutor]:
    """Makes building processes, spawned since forks of a process with threads and S3 clients break."""
    pool = ProcessPoolExecutor(PROCESSES, get_context("spawn"), initializer=die_with_parent)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def build_cell(spec: PlanetSpec, bucket: Bucket, cell: Cell) -> None:
    """Writes the COGs of a cell's acquisitions, and then their items."""
    store = bucket.store()
    grid = frame(cell, spec.resolution_m)
    ground = bluemarble.surface(grid)
    root = f"s3://{bucket.name}/{spec.fingerprint}/scenes"
    made = [_build_scene(store, spec, taken, ground, grid, root) for taken in scenes.acquisitions(cell, spec.seed)]
    obstore.put(store, _cell_key(spec, cell.name), json.dumps(made).encode(), use_multipart=False)


def _build_scene(
    store: S3Store,
    spec: PlanetSpec,
    taken: scenes.Acquisition,
    ground: bluemarble.Surface,
    grid: Frame,
    root: str,
) -> dict[str, Any]:
    scene = scenes.render(taken, ground)
    folder = f"{spec.fingerprint}/scenes/{taken.cell.name}/{taken.id}"
    for name, data in scenes.files(taken, scene, grid).items():
        obstore.put(store, f"{folder}/{name}", data, use_multipart=False)
    return scenes.item(taken, scene, grid, root)
