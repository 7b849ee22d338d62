"""Product lines: grids that replace one another for their readers, each line with a `latest` of its own.

A line has the name that `--line` gives, or one made of what a reader's code relies on: CRS, step, box, dtype and
number of dimensions. A version is in one line for good: its card tells which.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

from infra import storage
from infra.errors import UserError
from tasks.cards import find_card, home_of, parse_card
from tasks.products import GridCard, GridRecipe

GLOBE = (-180.0, -90.0, 180.0, 90.0)  # the box in degrees
WKT = 24  # letters from which a CRS is no code, and is named by its digest


@dataclass(frozen=True)
class Layout:
    """What a reader's code relies on."""

    crs: str
    """Code or WKT."""
    step: float
    """Cell size in the units of the CRS."""
    box: tuple[float, ...]
    """West, south, east and north in these units."""
    dtype: str
    """How a number is stored."""
    dims: int | None
    """Numbers of a vector; none where no metadata tells them."""

    @classmethod
    def of(cls, recipe: GridRecipe, dims: int | None) -> "Layout":
        """Returns the layout of a grid that is made so."""
        return cls(recipe.crs, recipe.step, recipe.box, recipe.dtype, dims)

    @property
    def place(self) -> str:
        """The box in words."""
        if self.box == GLOBE:
            return "globe"
        return ",".join(f"{edge:.10g}" for edge in self.box)

    @property
    def line(self) -> str:
        """The name of its line, where none was given."""
        crs = self.crs.replace(":", "").lower()
        if len(self.crs) >= WKT:
            crs = f"wkt{hashlib.sha256(self.crs.encode()).hexdigest()[:8]}"
        parts = [crs, f"{self.step:.10g}", self.dtype]
        if self.dims is not None:
            parts.append(str(self.dims))
        if self.box != GLOBE:
            parts.append("box" + self.place.replace(",", "_"))
        return "-".join(parts)


@dataclass(frozen=True)
class Told:
    """What a version tells of itself."""

    card: GridCard
    """Its card; of what that does not tell, and while there is none, what its metadata tell."""
    is_finished: bool
    """Whether its card is there."""

    @property
    def layout(self) -> Layout | None:
        """What its readers rely on; none before its metadata are there."""
        return Layout.of(self.card.recipe, self.card.dims) if self.card.made_of else None

    @property
    def line(self) -> str:
        """Its line; empty before its metadata are there."""
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
    """What the metadata of a grid tell of what its card will: what it is made of, line, dimensions."""
    try:
        attrs = storage.read_json(storage.join(grid, "zarr.json")).get("attributes", {})
    except FileNotFoundError:
        return {}
    names = {"made_of": "rangegrid:made_of", "line": "rangegrid:line", "dims": "geoemb:dimensions"}
    return {name: attrs[key] for name, key in names.items() if key in attrs}


def read_line(grid: str) -> str:
    """Returns the line of the version whose Zarr is at `grid`; nothing where nothing tells it."""
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
    """Names of the versions under the directory of all grids; pointers, locks and collection there have a dot."""
    return [name for name in storage.names(directory) if "." not in name]


def lines_in(directory: str) -> list[str]:
    """Names of the lines that have a pointer of their own, `latest.LINE.json`, under the directory of all grids."""
    begin, end = "latest.", ".json"
    names = [name for name in storage.names(directory) if name.startswith(begin) and name.endswith(end)]
    return [name[len(begin) : -len(end)] for name in names if name != begin + "json"]
