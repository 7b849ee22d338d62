"""Validates a grid before it is promoted: is it complete, are its cells in their places, and are they right?

Every shard is read back and checked on Dask. Some land cells, chosen by the grid's name, are computed again by
another path than the one that published them: float64, image by image, over the whole database, at the stored
coordinates. The same comparison with mirrored places must fail: a check that cannot fail tells nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import numpy as np
import xarray as xr
from distributed import Client
from numpy.typing import NDArray

from infra import storage
from infra.errors import UserError
from tasks import arrays
from tasks.cards import fingerprint, home_of, name_of
from tasks.core.compact import Compact, Projection, project
from tasks.core.earth.grid import GridSpec, Tile
from tasks.core.earth.land import land_mask
from tasks.core.earth.plane import GLOBE, Box
from tasks.core.earth.sphere import unit_vectors
from tasks.core.methods import Head, Method
from tasks.database.store import Database, read_blocks
from tasks.findings import Finding
from tasks.grid import store
from tasks.grid.beside import embed_beside
from tasks.grid.tiles import SUMS, land_cells, land_tiles
from tasks.model.checkpoint import load_checkpoint
from tasks.params import PublishParams
from tasks.products import GridCard
from tasks.units import run_units

CANARIES = 24  # cells that are computed again
BATCH = 64  # objects decoded in one unit of work
BLOCK = 4096  # images read at a time
EXACT = {"float32": 1e-4, "float16": 2e-3, "int8": 0.1}  # largest relative error of a cell: ten times the usual
UNIT = {"float32": 1e-4, "float16": 2e-3, "int8": 0.02}  # largest deviation of a location part's length from 1
WITHIN = 0.9  # share of canaries within an interpolated grid's tolerance; the tolerance holds for 99 % of a tile
FARTHEST = 10  # times the tolerance: largest error of the other canaries

Float = NDArray[np.float64]


@dataclass(frozen=True)
class TileCheck:
    """Findings about one tile's shard."""

    tile: str
    """The tile."""
    error: str = ""
    """Why the shard cannot be decoded; empty where it can."""
    misplaced: int = 0
    """Number of cells with a value at sea, or without a finite one on land."""
    length: float = 0.0
    """Largest deviation of the length of a location part from 1."""
    low: NDArray[np.float32] | None = None
    """Smallest value of each dimension of the visual part."""
    high: NDArray[np.float32] | None = None
    """Largest value of each dimension of the visual part."""


@dataclass(frozen=True)
class Reference:
    """Cells computed from the database in float64, and what bounds any cell."""

    visual: Float
    """(m, v) visual parts."""
    scale: Float
    """(m,) length of the same selection of the values' magnitudes, to which errors are relative."""
    location: Float
    """(m, d) location parts."""
    low: Float
    """(v,) smallest value of each dimension: no mean of values is below it."""
    high: Float
    """(v,) largest value of each dimension."""

    def own(self, count: int) -> Float:
        """Returns the first vectors, (count, v + d), as they should be stored."""
        return np.concatenate([self.visual[:count], self.location[:count]], axis=1)

    def apart(self, stored: Float) -> Float:
        """Returns the relative errors of stored vectors, (k, v + d), as (m / k, k), the larger of both parts."""
        visual, location = np.split(stored, [self.visual.shape[1]], axis=1)
        times = len(self.scale) // len(stored)
        visual, location = np.tile(visual, (times, 1)), np.tile(location, (times, 1))
        errors = np.linalg.norm(visual - self.visual, axis=1) / self.scale
        return np.maximum(errors, np.linalg.norm(location - self.location, axis=1)).reshape(times, -1)


def validate_grid(client: Client, grid: str, card: GridCard) -> list[Finding]:
    """Checks a grid whose tiles are made.

    Args:
        client: The Dask cluster that reads the shards.
        grid: URL of the Zarr.
        card: The version's card.

    Returns:
        What was found, in order.

    Raises:
        UserError: The database or the checkpoint is gone, or the store does not answer.
    """
    params = card.recipe.params
    spec = store.spec_at(home_of(grid), params.spec, is_cut=bool(card.recipe.region))
    tiles = land_tiles(spec)
    missing = set(tiles) - store.written(grid, spec, tiles)
    findings = [presence(tiles, missing), checksums(grid), beside(client, grid)]
    if findings[-1].passed:
        findings += header(grid, spec, card)
    if any(finding.passed is False for finding in findings):
        return [*findings, Finding("values", None, "none read: first mend what failed")]
    checks = run_units(
        client, partial(check_tile, grid, blocks(grid), params.spec, bool(spec.region)), tiles, label="validate"
    )
    findings += shards(checks, None if params.location_dims else UNIT[params.dtype])
    if any(check.error for check in checks):
        return findings
    findings += storage_loss(grid)
    stored, reference, places = canaries(grid, spec, card, params)
    own = blocks(grid)["location"][1]
    slack = max(EXACT[params.dtype], FARTHEST * params.tolerance)
    findings.append(visual_range(checks, reference, slack))
    findings += other_encoders(stored[:, own:], places, params)
    apart = reference.apart(stored[:, :own]), reference.apart(reference.own(len(stored)))
    return [*findings, *compared(*apart, params)]


def refuse(grid: str, findings: list[Finding]) -> None:
    """Refuses a grid with a check that failed.

    Raises:
        UserError: It names the checks, and what to do.
    """
    failed = [f"{finding.check}: {finding.detail}" for finding in findings if finding.passed is False]
    if failed:
        raise UserError(
            f"{grid} is not good ({'; '.join(failed)}), and no reader was sent to it: delete what is wrong, or all "
            "of it, and run again"
        )


def presence(tiles: list[Tile], missing: set[Tile]) -> Finding:
    """Checks that every tile with land has its shard."""
    if missing:
        example = f", for example {min(map(str, missing))} is not"
    else:
        example = ""
    return Finding("shards", not missing, f"{len(tiles) - len(missing)} of {len(tiles)} land tiles are there{example}")


def checksums(grid: str) -> Finding:
    """Checks that every chunk has a checksum, without which damage may go unnoticed."""
    without = list(chain.from_iterable(map(arrays.unchecked, (grid, *others(grid)))))
    if not without:
        return Finding("checksums", True, "every chunk has one")
    some = ", ".join(without[:3]) + (" …" if len(without) > 3 else "")
    return Finding("checksums", None, f"{some} have none: a flipped bit may decode as another number")


def beside(client: Client, grid: str) -> Finding:
    """Checks that everything beside the vectors decodes: coordinates, evidence, coarser levels, kept sums."""
    stored = [(grid, found) for found in arrays.objects(grid) if found.array not in (store.VARIABLE, *store.BLOCKS)]
    stored += [(url, found) for url in others(grid) for found in arrays.objects(url)]
    batches = [stored[start : start + BATCH] for start in range(0, len(stored), BATCH)]
    bad = list(chain(*run_units(client, damaged, batches, label="decode", name=lambda _: "objects")))
    told = f"{len(stored) - len(bad)} of {len(stored)} chunks beside the vectors decode"
    return Finding("other arrays", not bad, f"{told} {'; '.join(bad[:3])}".rstrip())


def others(grid: str) -> list[str]:
    """Returns the URLs of the Zarrs beside a grid: its coarser levels and its sums, where it has them."""
    found, sums = store.level_urls(grid), storage.join(home_of(grid), SUMS)
    if storage.exists(storage.join(sums, store.ROOT)):
        found.append(sums)
    return found


def damaged(batch: list[tuple[str, arrays.Stored]]) -> list[str]:
    """Returns why objects of Zarr groups, given with the group's URL, cannot be decoded; leaves out those that can."""
    return [why for url, stored in batch if (why := arrays.check(url, stored))]


def header(grid: str, spec: GridSpec, card: GridCard) -> Iterator[Finding]:
    """Checks that coordinates and attributes are those of the card."""
    dataset, names, stored = opened(grid), spec.plane.dims, store.open_spec(grid)
    y, x = (dataset[name].values for name in names)
    same = np.array_equal(y, spec.y) and np.array_equal(x, spec.x) and (stored.box, stored.crs) == (spec.box, spec.crs)
    rising = bool((np.diff(y) < 0).all() and (np.diff(x) > 0).all())
    detail = f"{names[0]} {y[0]:g} to {y[-1]:g}, {names[1]} {x[0]:g} to {x[-1]:g}, {len(y)} x {len(x)}, {stored.crs}"
    yield Finding("coordinates, north up", same and rising, detail)
    recorded = dataset.attrs.get("rangegrid:made_of")
    named = fingerprint(card.made_of) == name_of(grid)
    yield Finding("card", recorded == card.made_of and named, "attributes, card and name tell of the same parameters")


def opened(grid: str) -> xr.Dataset:
    """Opens the grid as its readers do, without Dask."""
    arrays.check_axes(grid)
    return xr.open_zarr(storage.zarr_store(grid, read_only=True), chunks=None)


def blocks(grid: str) -> dict[str, list[int]]:
    """Returns the first and last dimension of each part of a vector."""
    return opened(grid).attrs["geoemb:blocks"]


def check_tile(grid: str, parts: dict[str, list[int]], spec: GridSpec, is_cut: bool, tile: Tile) -> TileCheck:
    """Reads one shard back and checks it.

    Args:
        grid: URL of the Zarr.
        parts: First and last dimension of each part of a vector.
        spec: The grid's cells, without its region, which may be large: it is read where it is needed.
        is_cut: Whether the grid is cut to a region.
        tile: The tile.
    """
    spec = store.spec_at(home_of(grid), spec, is_cut=is_cut)
    try:
        data = store.read_tile(grid, tile)
    except arrays.Damaged as error:
        return TileCheck(str(tile), error=str(error))
    wanted = land_cells(spec, tile).wanted
    finite = np.isfinite(data)
    misplaced = np.where(wanted, ~finite.all(0), finite.any(0))
    good = data[:, wanted & ~misplaced]
    if not good.shape[1]:
        return TileCheck(str(tile), misplaced=int(misplaced.sum()))
    visual, location = good[slice(*parts["visual"])], good[slice(*parts["location"])]
    length = float(np.abs(np.linalg.norm(location.astype(np.float64), axis=0) - 1).max())
    return TileCheck(str(tile), "", int(misplaced.sum()), length, visual.min(1), visual.max(1))


def shards(checks: list[TileCheck], unit: float | None) -> Iterator[Finding]:
    """Checks the shards together.

    Args:
        checks: What was found of each.
        unit: Largest deviation of a location part's length from 1; None where it is projected, and of any length.
    """
    bad = [f"{check.tile} ({check.error})" for check in checks if check.error]
    yield Finding("decoding", not bad, f"{len(checks) - len(bad)} of {len(checks)} shards decode {'; '.join(bad[:3])}")
    wrong = [check.tile for check in checks if check.misplaced]
    cells = sum(check.misplaced for check in checks)
    where = f", in {', '.join(wrong[:3])}" if wrong else ""
    yield Finding("land and sea", not cells, f"{cells} cells with a value at sea or without one on land{where}")
    if unit is None:
        return
    length = max((check.length for check in checks), default=0.0)
    yield Finding("location part", length < unit, f"of length 1 to {length:.1g}")


def storage_loss(grid: str) -> Iterator[Finding]:
    """Checks what fewer bits lost, by the worst dimension; None for float32 and for grids of earlier versions."""
    lost = opened(grid).attrs.get("rangegrid:loss", {})
    worst = [f"{name} {max(lost[name]['lost']):.0%}" for name in store.BLOCKS if "lost" in lost.get(name, {})]
    if not worst:
        return
    if "warning" in lost:
        yield Finding(f"stored as {lost['dtype']}", None, lost["warning"])
    else:
        told = f"the worst dimensions lose of their deviation: {', '.join(worst)}"
        yield Finding(f"stored as {lost['dtype']}", True, told)


def visual_range(checks: list[TileCheck], reference: Reference, slack: float) -> Finding:
    """Checks that cells are within the database's values, of which they are means, up to `slack` of their range."""
    low = np.min([check.low for check in checks if check.low is not None], axis=0)
    high = np.max([check.high for check in checks if check.high is not None], axis=0)
    room = slack * (reference.high - reference.low).max()
    beyond = int(((low < reference.low - room) | (high > reference.high + room)).sum())
    return Finding("visual part", not beyond, f"{beyond} of {len(low)} dimensions go beyond the database's values")


def other_encoders(stored: Float, places: Float, params: PublishParams) -> Iterator[Finding]:
    """Checks that parts of other encoders are what these say of the cells' places.

    Args:
        stored: The parts, (m, d).
        places: The places, (m, 2) in degrees.
        params: Which encoders.
    """
    if params.with_:
        expected = embed_beside(params.with_, places).astype(np.float64)
        error = (np.linalg.norm(stored - expected, axis=1) / np.linalg.norm(expected, axis=1)).max()
        told = f"{', '.join(params.with_)}: largest relative error of {len(stored)} cells {error:.1g}"
        yield Finding("other encoders", bool(error <= EXACT[params.dtype]), told)


def canaries(grid: str, spec: GridSpec, card: GridCard, params: PublishParams) -> tuple[Float, Reference, Float]:
    """Returns some cells as stored, (m, dim), as computed again, there and then at wrong places, and their places."""
    dataset, (y, x), plane = opened(grid), spec.plane.dims, store.open_spec(grid).plane
    rows, columns = chosen(spec, name_of(grid))
    stored = store.open_vectors(grid).at(rows, columns)
    places = np.column_stack([dataset[x].values[columns], dataset[y].values[rows]])
    compact = store.read_compact(grid)
    everywhere = plane.lonlat(np.concatenate([places, *wrong(places, spec.box).values()]))
    everywhere = np.where(np.isfinite(everywhere), everywhere, 0)  # where the plane has no place, any is wrong
    queries = load_checkpoint(card.checkpoint).location.embed(everywhere).astype(np.float64)
    return stored, refer(card.database, queries, everywhere, params.retrieval, compact), everywhere[: len(stored)]


def chosen(spec: GridSpec, name: str) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Returns rows and columns of land cells, uniform by area, the same in every call."""
    rows, columns = np.nonzero(land_mask(spec))
    rng = np.random.default_rng(int.from_bytes(name.encode()))
    if spec.plane.is_geographic:
        area = np.cos(np.radians(spec.y[rows]))
    else:
        area = np.ones(len(rows))
    picked = rng.choice(len(rows), min(CANARIES, len(rows)), replace=False, p=area / area.sum())
    return rows[picked], columns[picked]


def wrong(places: Float, box: Box) -> dict[str, Float]:
    """Returns where places of the plane would be if the grid were stored in a wrong order."""
    x, y = places.T
    west, south, east, north = box
    slope = (north - south) / (east - west)
    pairs = {
        "latitude flipped": (x, south + north - y),
        "longitude flipped": (west + east - x, y),
        "axes exchanged": (west + (y - south) / slope, south + (x - west) * slope),
    }
    return {name: np.column_stack(pair) for name, pair in pairs.items()} | {"shuffled": np.roll(places, 1, axis=0)}


def compared(apart: Float, own: Float, params: PublishParams) -> Iterator[Finding]:
    """Checks that cells are right at their places, and differ at the wrong places.

    Args:
        apart: How far the stored vectors are from those at their places, and at each of the wrong ones.
        own: How far the right vectors are from these: over a small box perhaps less than storage may change them.
        params: What may be lost.
    """
    right, *others = (agree(errors, params.tolerance, EXACT[params.dtype]) for errors in apart)
    yield Finding("cells computed again", *right)
    slack = 2 * max(EXACT[params.dtype], FARTHEST * params.tolerance)
    for name, (passed, detail), distance in zip(wrong(np.zeros((0, 2)), GLOBE), others, own[1:].max(1), strict=True):
        if distance > slack:
            yield Finding(f"{name}, must differ", not passed, detail)
        else:
            yield Finding(f"{name}, must differ", None, f"not to be told: the field changes by {distance:.1g} at most")


def agree(errors: Float, tolerance: float, exact: float) -> tuple[bool, str]:
    """Checks that errors of cells are within what interpolation and storage may leave, and returns them in words."""
    share = float((errors <= max(exact, tolerance)).mean())
    good = share == 1 or (tolerance > 0 and share >= WITHIN and errors.max() <= max(exact, FARTHEST * tolerance))
    return bool(good), f"{share:.0%} of {len(errors)} agree; largest relative error {errors.max():.1g}"


def refer(database: str, queries: Float, places: Float, method: Method, compact: Compact) -> Reference:
    """Computes the selections at some places by their formulas, streaming through the database."""
    low, high = np.asarray(np.inf), np.asarray(-np.inf)
    points = unit_vectors(places)
    told = [Running(head, temperatures(database, points, head)) for head in method.heads]
    for data, values in rows_of(database, compact.values):
        low, high = np.minimum(low, values.min(0)), np.maximum(high, values.max(0))
        table = np.column_stack([values, np.abs(values), np.ones(len(values))])
        if data.weights is not None:
            table *= data.weights[:, None]
        for head in told:
            if head.head.kind == "semantic":
                head.add(queries @ data.keys.astype(np.float64).T, table)
            else:
                head.add(points @ unit_vectors(data.locations).T, table)
    parts = [head.mean for head in told]
    if not method.is_side_by_side:
        parts = [np.average(parts, axis=0, weights=method.shares)]
    halves = [np.split(part, 2, axis=1) for part in parts]
    visual = np.concatenate([selected for selected, _ in halves], axis=1)
    magnitude = np.concatenate([scale for _, scale in halves], axis=1)
    location = project(compact.location, queries)
    bounds = np.tile(low, method.width), np.tile(high, method.width)
    return Reference(visual, np.linalg.norm(magnitude, axis=1), location, *bounds)


def temperatures(database: str, points: Float, head: Head) -> Float:
    """Returns the temperature of a head at points of the unit sphere, (m, 1)."""
    if head.kind != "nearest":
        return np.full((len(points), 1), head.at)
    squares = np.empty((len(points), 0))
    for data in read_blocks(database, BLOCK):
        squares = np.column_stack([squares, 2 - 2 * points @ unit_vectors(data.locations).T])
        squares = np.sort(squares, axis=1)[:, : int(head.at)]
    return 1 / np.maximum(squares[:, -1:], np.finfo(np.float64).tiny)


@dataclass
class Running:
    """The sums of a head over the images so far, relative to the largest weight so far."""

    head: Head
    """The head."""
    at: Float
    """(m, 1) temperature at each place."""
    largest: Float = field(init=False)
    """(m, 1) logarithm of the largest weight."""
    sums: Float = field(init=False)
    """(m, 2 v + 1)."""

    def __post_init__(self) -> None:
        self.largest, self.sums = np.full_like(self.at, -np.inf), np.zeros(())

    def add(self, cosines: Float, table: Float) -> None:
        """Adds images, by their cosines (m, n) and their values, magnitudes and ones, times weight, (n, 2 v + 1)."""
        logits = self.at * cosines
        largest = np.maximum(self.largest, logits.max(1, keepdims=True))
        self.sums = self.sums * np.exp(self.largest - largest) + np.exp(logits - largest) @ table
        self.largest = largest

    @property
    def mean(self) -> Float:
        """Returns the selection of values and of magnitudes, (m, 2 v)."""
        return self.sums[:, :-1] / self.sums[:, -1:]


def rows_of(database: str, projection: Projection | None) -> Iterator[tuple[Database, Float]]:
    """Yields the database in blocks, with the values in float64 and projected as the grid's."""
    for data in read_blocks(database, BLOCK):
        values = data.values.astype(np.float64)
        yield data, project(projection, values)
