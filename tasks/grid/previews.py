"""Draws previews of a grid: maps of its colours and its evidence, and a page with both beside the grid."""

import html
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from distributed import Client
from numpy.typing import NDArray

from infra import storage
from tasks.artifacts import keep_picture
from tasks.cards import GRID
from tasks.core.compact import Projection
from tasks.core.earth.grid import CHUNK_CELLS, GridSpec, Tile
from tasks.core.earth.land import land_mask
from tasks.grid import store
from tasks.grid.beside import dims_beside
from tasks.grid.tiles import Job, land_tiles
from tasks.plots.maps import geotiff, layer_map, principal_colours, world_map
from tasks.units import run_units

MOST_DRAWN = 500_000  # cells: as many as the picture has pixels
BLOCKS = 64  # samples of a chunk of cells each, by which the axes of the colours are found
MAPS = {"world.png": "The world in embedding colours", "evidence.png": "Distance to the nearest image"}
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1d2733; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }}
img {{ width: 100%; height: auto }} pre {{ background: #eef2f5; padding: 1rem; overflow-x: auto }}
td, th {{ text-align: left; padding: .15rem 1.5rem .15rem 0; vertical-align: top }}
</style>
<h1>{title}</h1>
{maps}
<pre>{code}</pre>
<script>document.querySelectorAll("pre").forEach(code => {{
  code.textContent = code.textContent.replace('"{zarr}"', JSON.stringify(new URL("{zarr}", location.href).href))
}})</script>
<table>
{rows}
</table>
<p><a href="item.json">STAC item</a> · <a href="{zarr}/zarr.json">metadata of the Zarr</a> · <a href="world.tif">map as
a GeoTIFF</a></p>
</html>
"""
CODE = """import xarray as xr{imports}

grid = xr.open_zarr("{zarr}", zarr_format=3)  # by http(s), from a disk, or from s3:// with storage_options
lon, lat = {lon:.10g}, {lat:.10g}
x, y = {moved}
vectors = grid.sel({x}=x, {y}=y, method="nearest", tolerance={tolerance:.10g})  # KeyError: outside of the grid"""
DEGREES = "{west:.10g} + (lon - {west:.10g}) % 360, lat"  # as the grid counts: a box across 180 goes on beyond
PROJECTED = 'Transformer.from_crs("EPSG:4326", grid.spatial_ref.attrs["crs_wkt"], always_xy=True).transform(lon, lat)'
EDGE = 0.50001  # half the side of a cell and a little: an edge between two is in one of them, whatever rounding does


def draw(client: Client, job: Job, attribution: str) -> None:
    """Keeps the world in embedding colours beside a grid, as PNG and GeoTIFF, and a map of the evidence.

    What is there is not drawn again. Of a large grid some cells are drawn, evenly: tiles are read on Dask, and three
    numbers a drawn cell come back, so that memory and time here do not grow with the grid.
    """
    wanted = {"world.png", "world.tif"} | ({"evidence.png"} if job.params.evidence else set())
    if wanted <= set(storage.names(job.home)):
        return
    tiles, drawn = land_tiles(job.spec), Drawn.of(job.spec)
    parts = run_units(client, partial(look, job, drawn, axes_of(job)), tiles, label="draw")
    whole = np.full((4, len(drawn.rows), len(drawn.columns)), np.nan, np.float32)
    for tile, part in zip(tiles, parts, strict=True):
        whole[(slice(None), *drawn.window(tile))] = part
    where = "world" if job.spec.is_globe else "land"
    latitudes = drawn.latitudes(job.spec)
    colours = principal_colours(
        whole[:3], np.broadcast_to(areas(job.spec)[drawn.rows, None], latitudes.shape), latitudes
    )
    title = f"The {where} in {job.method.title} colours, {job.spec.size}"
    caption = f"First three principal components of the embeddings, as lightness and two axes of hue. {attribution}."
    picture = world_map(colours, job.spec, title, caption)
    keep_picture(storage.join(job.home, "world.png"), picture, "world-map", title)
    storage.write(storage.join(job.home, "world.tif"), geotiff(colours, job.spec))
    if job.params.evidence:
        draw_evidence(job, whole[3], attribution)


@dataclass(frozen=True)
class Drawn:
    """The cells of a grid that a picture shows."""

    rows: NDArray[np.intp]
    """Rows of the cells, rising."""
    columns: NDArray[np.intp]
    """Columns of the cells, rising."""

    @classmethod
    def of(cls, spec: GridSpec) -> "Drawn":
        """Chooses all cells, or evenly as many as a picture needs: the middle cell of each piece of the box."""
        times, (rows, columns) = max(1.0, np.sqrt(np.prod(spec.shape) / MOST_DRAWN)), spec.shape
        return cls(_spread(rows, times), _spread(columns, times))

    def latitudes(self, spec: GridSpec) -> NDArray[np.float64]:
        """Returns the latitudes of their centres in degrees, (rows, columns)."""
        return spec.plane.lonlat(np.stack(np.meshgrid(spec.x[self.columns], spec.y[self.rows]), axis=-1))[..., 1]

    def window(self, tile: Tile) -> tuple[slice, slice]:
        """Returns which of them are in a tile."""
        rows, columns = tile.window
        return _within(self.rows, rows), _within(self.columns, columns)


def _spread(cells: int, times: float) -> NDArray[np.intp]:
    """Returns evenly spread cells, each from the middle of its piece; at least one."""
    count = max(1, int(cells / times))
    return ((np.arange(count) + 0.5) * cells / count).astype(int)


def _within(cells: NDArray[np.intp], part: slice) -> slice:
    """Returns which of some rising cells are in a range."""
    start, stop = np.searchsorted(cells, (part.start, part.stop)).tolist()
    return slice(start, stop)


def areas(spec: GridSpec) -> NDArray[np.float64]:
    """Returns the relative areas of the cells of each row; in a projected plane all are alike."""
    if spec.plane.is_geographic:
        return np.cos(np.radians(spec.y))
    return np.ones(spec.shape[0])


def axes_of(job: Job) -> NDArray[np.float32]:
    """Returns the principal axes of a grid's embeddings, (dim, 3), from some blocks of its land."""
    vectors = store.open_vectors(job.grid)
    own = vectors.shape[0] - sum(dims_beside(job.params.with_).values())
    return Projection.fit(land_sample(vectors, job.spec, BLOCKS)[:, :own], 3).components


def land_sample(vectors: store.Vectors, spec: GridSpec, blocks: int, most: int = CHUNK_CELLS**2) -> NDArray[np.float32]:
    """Returns vectors of land cells, (n, dim), from some blocks of a grid.

    Of smaller cells as many fewer count: else ice, which has a quarter of a globe's land cells, would decide.

    Args:
        vectors: The grid's.
        spec: Its cells.
        blocks: Most blocks, a chunk of cells each.
        most: Most cells of a block.
    """
    land, side = land_mask(spec), min(CHUNK_CELLS, spec.tile)
    rows, columns = np.nonzero(land)
    places = np.unique(np.column_stack([rows, columns]) // side, axis=0)
    rng = np.random.default_rng(0)
    found, sizes = [], []
    for i, j in places[np.sort(rng.permutation(len(places))[:blocks])]:
        window = slice(i * side, (i + 1) * side), slice(j * side, (j + 1) * side)
        there = land[window]
        spread = slice(None, None, -(-int(there.sum()) // most))
        found.append(vectors[(slice(None), *window)][:, there].T[spread])
        sizes.append(areas(spec)[window[0]][np.nonzero(there)[0]][spread])
    size = np.concatenate(sizes)
    return np.concatenate(found)[rng.random(len(size)) < size / size.max()]


def look(job: Job, drawn: Drawn, axes: NDArray[np.float32], tile: Tile) -> NDArray[np.float32]:
    """Returns what a picture shows of a tile, (4, rows, columns): three components, and km to the nearest image."""
    rows, columns = drawn.window(tile)
    i, j = np.ix_(drawn.rows[rows] - tile.row, drawn.columns[columns] - tile.column)
    seen = np.full((4, i.size, j.size), np.nan, np.float32)
    if seen.size:
        seen[:3] = np.tensordot(axes.T, store.read_tile(job.grid, tile)[: len(axes), i, j], 1)
    if seen.size and job.params.evidence:
        seen[3] = store.read_tile(job.grid, tile, "distance_km")[i, j]
    return seen


def draw_evidence(job: Job, away: NDArray[np.float32], attribution: str) -> None:
    """Writes a map of the distance to the nearest image: far from all images, an embedding is an extrapolation."""
    title = f"What the {job.method.title} embeddings rest on, {job.spec.size}"
    caption = f"Great-circle distance from a cell to the nearest image of the database. {attribution}."
    picture = layer_map(away, job.spec, title, caption, "km")
    keep_picture(storage.join(job.home, "evidence.png"), picture, "evidence-map", title)


def write_page(home: str) -> str:
    """Writes `index.html` of the grid in the directory `home`, from the files there, and returns its URL."""
    grid = storage.join(home, GRID)
    attrs, spec = storage.read_json(storage.join(grid, "zarr.json"))["attributes"], store.open_spec(grid)
    there = storage.names(home)
    maps = "\n".join(f'<img src="{name}" alt="{alt}">' for name, alt in MAPS.items() if name in there)
    facts = _facts(attrs) | {"version": attrs["rangegrid:fingerprint"]}
    rows = "\n".join(f"<tr><th>{_text(name)}<td>{_text(value)}" for name, value in facts.items())
    title = f"RANGE embeddings of the land, {spec.size}"
    page = PAGE.format(title=title, maps=maps, code=_text(_code(spec)), rows=rows, zarr=GRID)
    storage.write(target := storage.join(home, "index.html"), page.encode())
    return target


def _code(spec: GridSpec) -> str:
    """Returns the lines that open the grid, as seen from the page, and read it in Paris or the middle of the box."""
    (west, south, east, north), (y, x) = spec.box, spec.plane.dims
    middle = np.array([(west + east) / 2, (south + north) / 2])
    lon, lat = (2.35, 48.86) if spec.is_globe else spec.plane.lonlat(middle)
    degrees = spec.plane.is_geographic
    imports = "" if degrees else "\nfrom pyproj import Transformer"
    moved = DEGREES.format(west=west) if degrees else PROJECTED
    about = {"imports": imports, "moved": moved, "tolerance": EDGE * spec.step}
    return CODE.format(zarr=GRID, lon=lon, lat=lat, x=x, y=y, **about)


def _facts(attrs: dict[str, Any]) -> dict[str, Any]:
    """Returns the facts that a reader asks for first."""
    blocks, field, lost = attrs["geoemb:blocks"], attrs.get("rangegrid:field", {}), attrs.get("rangegrid:loss", {})
    after = [name for name, (start, _) in blocks.items() if start >= blocks["visual"][1]]
    facts = {
        "source": attrs["attribution"],
        "dimensions": f"{attrs['geoemb:dimensions']}: visual {blocks['visual'][1]}, then {', '.join(after)}",
        "stored as": attrs["geoemb:data_type"],
        "loss": lost and f"cosine with float32 {lost['cosine_mean']} on average, {lost['cosine_min']} at least",
        "lost dimensions": lost.get("warning"),
        "effective resolution": _resolution(field),
        "resolution": field.get("warning"),
        "made by": attrs["geoemb:build_version"],
        "checkpoint": attrs["rangegrid:checkpoint"],
        "database": attrs["rangegrid:database"],
    }
    return {name: value for name, value in facts.items() if value}


def _resolution(field: dict[str, Any]) -> str | None:
    """Returns how fine the field is in words; None where it was not measured, as of grids of earlier versions."""
    if "whole_half_km" not in field:
        return None
    low, high = field["whole_interval_km"]
    return f"{field['whole_half_km']} km ({low} to {high}), over which an embedding changes by half of its variance"


def _text(value: object) -> str:
    return html.escape(str(value), quote=False)
