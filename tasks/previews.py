"""What shows a grid to people: maps of its colours and its evidence, and a page with both that lies in the bucket."""

import html
from typing import Any

import numpy as np
import zarr

from infra import storage
from tasks import grids
from tasks.artifacts import keep_picture
from tasks.core.grid import GridSpec
from tasks.pictures import geotiff, layer_map, principal_colours, world_map
from tasks.tiles import GRID, Job

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
<pre>import xarray as xr
grid = xr.open_zarr({url})
vectors = grid.sel({place}, method="nearest")</pre>
<table>
{rows}
</table>
<p><a href="item.json">STAC item</a> · <a href="{zarr}/zarr.json">metadata of the Zarr</a> · <a href="world.tif">map as
a GeoTIFF</a></p>
</html>
"""


def draw(job: Job, attribution: str) -> None:
    """Keeps the world in embedding colours beside the grid, as PNG and GeoTIFF, and a map of the evidence."""
    where = "world" if job.spec.is_globe else "land"
    colours = principal_colours(grids.open_vectors(job.grid))
    title = f"The {where} in {job.method.name.upper()} colours, {job.spec.size}"
    caption = f"First three principal components of the embeddings. {attribution}."
    picture = world_map(colours, job.spec, title, caption)
    keep_picture(storage.join(job.home, "world.png"), picture, "world-map", title)
    storage.write(storage.join(job.home, "world.tif"), geotiff(colours, job.spec))
    if job.evidence:
        draw_evidence(job, attribution)


def draw_evidence(job: Job, attribution: str) -> None:
    """Keeps a map of the distance to the nearest image: far from all, an embedding is extrapolation."""
    layer = np.asarray(zarr.open_array(storage.zarr_store(storage.join(job.grid, "distance_km")), mode="r")[:])
    title = f"What the {job.method.name.upper()} embeddings rest on, {job.spec.size}"
    caption = f"Great-circle distance from a cell to the nearest image of the database. {attribution}."
    picture = layer_map(layer, job.spec, title, caption, "km")
    keep_picture(storage.join(job.home, "evidence.png"), picture, "evidence-map", title)


def write_page(home: str) -> str:
    """Writes `index.html` of the grid in the directory `home`, from what is there; returns its URL."""
    grid = storage.join(home, GRID)
    attrs, spec = storage.read_json(storage.join(grid, "zarr.json"))["attributes"], grids.open_spec(grid)
    there = storage.names(home)
    maps = "\n".join(f'<img src="{name}" alt="{alt}">' for name, alt in MAPS.items() if name in there)
    rows = "\n".join(f"<tr><th>{_text(name)}<td>{_text(value)}" for name, value in _facts(attrs).items())
    title = f"RANGE embeddings of the land, {spec.size}"
    url = _text(repr(grid))
    page = PAGE.format(title=title, maps=maps, url=url, place=_place(spec), rows=rows, zarr=GRID)
    storage.write(target := storage.join(home, "index.html"), page.encode())
    return target


def _place(spec: GridSpec) -> str:
    """A place of the grid, as `sel` takes it: Paris, or the middle of the box."""
    (west, south, east, north), (y, x) = spec.box, spec.plane.dims
    middle = (2.35, 48.86) if spec.is_globe else ((west + east) / 2, (south + north) / 2)
    return f"{x}={middle[0]:.10g}, {y}={middle[1]:.10g}"


def _facts(attrs: dict[str, Any]) -> dict[str, Any]:
    """What a reader asks first."""
    blocks, field, lost = attrs["geoemb:blocks"], attrs.get("rangegrid:field", {}), attrs.get("rangegrid:loss", {})
    facts = {
        "source": attrs["attribution"],
        "dimensions": f"{blocks['location'][1]}: visual {blocks['visual'][1]}, then location",
        "stored as": attrs["geoemb:data_type"],
        "loss": lost and f"cosine with float32 {lost['cosine_mean']} on average, {lost['cosine_min']} at least",
        "resolution": field.get("warning"),
        "made by": attrs["geoemb:build_version"],
        "checkpoint": attrs["rangegrid:checkpoint"],
        "database": attrs["rangegrid:database"],
    }
    return {name: value for name, value in facts.items() if value}


def _text(value: object) -> str:
    return html.escape(str(value), quote=False)
