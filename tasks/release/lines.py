"""Names product lines: a line is a series of grids that replace one another for readers, with a `latest` of its own.

A line has the name that `--line` gives, or a name made of what readers' code relies on: CRS, step, box, dtype and
number of dimensions. A version never changes its line, which its card names.
"""

import hashlib
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from infra import storage
from infra.errors import UserError
from tasks.cards import find_card, home_of, parse_card
from tasks.products import GridCard, GridRecipe

GLOBE = (-180.0, -90.0, 180.0, 90.0)  # the box in degrees
WKT = 24  # letters; a longer CRS is WKT, and is named by its digest


@dataclass(frozen=True)
class Layout:
    """Properties of a grid that a reader's code relies on."""

    crs: str
    """CRS, as code or WKT."""
    step: float
    """Cell size in the units of the CRS."""
    box: tuple[float, ...]
    """West, south, east and north in the units of the CRS."""
    dtype: str
    """How a number is stored."""
    dims: int | None
    """Length of a vector; None where no metadata tells it."""
    region: str | None = None
    """Digest of the region that the grid is cut to; None where it has all land of its box."""

    @classmethod
    def of(cls, recipe: GridRecipe, dims: int | None) -> "Layout":
        """Returns the layout of a grid with these properties."""
        return cls(recipe.crs, recipe.step, recipe.box, recipe.dtype, dims, recipe.region)

    @property
    def place(self) -> str:
        """Returns the box in words."""
        if self.box == GLOBE:
            return "globe"
        return ",".join(f"{edge:.10g}" for edge in self.box)

    @property
    def line(self) -> str:
        """Returns the name of the line of grids with this layout."""
        crs = self.crs.replace(":", "").lower()
        if len(self.crs) >= WKT:
            crs = f"wkt{hashlib.sha256(self.crs.encode()).hexdigest()[:8]}"
        parts = [crs, f"{self.step:.10g}", self.dtype]
        if self.dims is not None:
            parts.append(str(self.dims))
        if self.box != GLOBE:
            parts.append("box" + self.place.replace(",", "_"))
        if self.region:
            parts.append("region" + self.region[:8])
        return "-".join(parts)


@dataclass(frozen=True)
class Told:
    """What a version says of itself."""

    card: GridCard
    """The card; for missing entries, and before there is a card, what the metadata tell."""
    is_finished: bool
    """Whether the version has its card."""

    @property
    def layout(self) -> Layout | None:
        """Returns the layout of the grid, or None before its metadata exist."""
        if self.card.made_of:
            return Layout.of(self.card.recipe, self.card.dims)
        return None

    @property
    def line(self) -> str:
        """Returns the line; empty before the metadata exist."""
        if self.layout is None:
            return ""
        return self.card.line or self.layout.line


def read_told(grid: str) -> Told:
    """Returns what the version whose Zarr is at `grid` tells: its card, or while it is unfinished, its metadata.

    Raises:
        UserError: Its card is damaged, or another product's.
    """
    card = find_card(home_of(grid), GridCard)
    if card and card.line and card.dims is not None:
        return Told(card, True)
    told = _metadata(grid)
    if card:
        told |= card.stored()
    return Told(parse_card(told, GridCard, home_of(grid)), card is not None)


def _metadata(grid: str) -> dict[str, Any]:
    """Returns what the metadata of a grid tell of its future card: what it is made from, line, dimensions."""
    try:
        attrs = storage.read_json(storage.join(grid, "zarr.json")).get("attributes", {})
    except FileNotFoundError:
        return {}
    names = {"made_of": "rangegrid:made_of", "line": "rangegrid:line", "dims": "geoemb:dimensions"}
    return {name: attrs[key] for name, key in names.items() if key in attrs}


def read_line(grid: str) -> str:
    """Returns the line of the version whose Zarr is at `grid`; empty where it is unknown."""
    return read_told(grid).line


def choose_line(grid: str, asked: str, layout: Layout) -> str:
    """Returns the line of a grid that is going to be made, or is there.

    Args:
        grid: URL of its Zarr.
        asked: The name that was given, if one was.
        layout: What its readers rely on.

    Raises:
        UserError: It is there, in another line than the one that is asked for.
    """
    there = read_line(grid)
    if there and asked and there != asked:
        raise UserError(
            f"the grid of these parameters is {home_of(grid)}, of the line {there}, where its readers look for it: "
            f"give --line {there}, or leave --line out"
        )
    return there or asked or layout.line


def versions_in(directory: str) -> list[str]:
    """Returns the names of the versions in the directory of all grids; other names there have a dot."""
    return [name for name in storage.names(directory) if "." not in name]


def lines_in(directory: str) -> list[str]:
    """Returns the names of the lines with a pointer of their own, `latest.LINE.json`, in the directory of all grids."""
    begin, end = "latest.", ".json"
    names = [name for name in storage.names(directory) if name.startswith(begin) and name.endswith(end)]
    return [name[len(begin) : -len(end)] for name in names if name != begin + "json"]


@dataclass(frozen=True)
class Version:
    """A version: a directory under `grids/`."""

    fingerprint: str
    """Fingerprint, which is its name."""
    grid: str
    """URL of its Zarr."""
    state: str
    """`latest`, `previous`, `withdrawn`, `kept`, `unfinished` or `condemned`; the first two are those of its line."""
    finished: datetime | None
    """When its card was written; None while unfinished."""
    told: Told
    """What the version says of itself."""

    @property
    def line(self) -> str:
        """Returns its product line; empty before its metadata exist."""
        return self.told.line

    @property
    def layout(self) -> Layout | None:
        """Returns its layout, or None before its metadata exist."""
        return self.told.layout

    @property
    def parent(self) -> str | None:
        """Returns the fingerprint of the version whose sums it was updated from."""
        return self.told.card.recipe.parent
