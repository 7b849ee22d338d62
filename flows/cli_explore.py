"""Defines `rangegrid explore`: the explorer's page of a grid, served on this machine."""

import json
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated
from urllib.parse import unquote

import typer

from flows.cli_grid import Grid
from infra.addresses import is_web

if TYPE_CHECKING:  # the server is slow to import
    from infra.explorer.server import Shelf

ALONE = "grid"  # name of a grid in no catalog


def explore(
    grid: Grid = "latest",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of this machine; 0: a free one.")] = 0,
    show: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in the browser.")] = True,
) -> None:
    """Show a grid in the browser: its colours, what is like a place, classes, clusters. Ends with Ctrl-C."""
    from infra.explorer.bundle import files
    from infra.explorer.server import serve
    from tasks.release.versions import find

    files()  # refuses where the page is not built, before any work
    url = find(grid)
    with TemporaryDirectory() as scratch:
        shelf, name = shelf_of(url, companion_of(url, scratch))
        serve(shelf, f"#grid={name}", port, show)


def companion_of(grid: str, scratch: str) -> str:
    """Returns the URL of a grid's companion, which is made where there is none: beside it, else in `scratch`."""
    from infra import clusters, storage
    from tasks.cards import COMPACT, GRID
    from tasks.grid.companion import companion_url, publish_companion

    beside = companion_url(grid)
    if storage.exists(storage.join(beside, "zarr.json")):
        return beside
    own = grid.endswith(f"/{GRID}") and not is_web(grid)
    with clusters.connect() as client:
        return publish_companion(client, grid, beside if own else storage.as_url(f"{scratch}/{COMPACT}"))


def shelf_of(grid: str, companion: str) -> tuple["Shelf", str]:
    """Returns what the server serves, all grids of the catalog that a grid is in, or it alone; and the grid's name."""
    from infra import storage
    from infra.explorer.server import Shelf
    from tasks.cards import COMPACT, home_of
    from tasks.release.stac import COLLECTION

    home = home_of(grid)
    parent, _, name = home.rpartition("/")
    if storage.exists(storage.join(parent, COLLECTION)):
        return Shelf({"": parent, f"{name}/{COMPACT}/": companion}), name
    alone = {"links": [{"rel": "item", "href": f"./{ALONE}/item.json", "title": unquote(name)}]}
    places = {f"{ALONE}/": home, f"{ALONE}/{COMPACT}/": companion}
    return Shelf(places, {COLLECTION: json.dumps(alone).encode()}), ALONE
