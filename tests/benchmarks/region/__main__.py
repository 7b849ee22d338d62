"""What a denser sample of a region brings there, and what it changes elsewhere: `python -m tests.benchmarks.region`.

Runs the commands that docs/regions.md shows on the demo planet, in `.sandbox/region`: a sample of the world, a
checkpoint and a database; then the pipeline of a region at four times the density, whose report compares the region's
grid with one of the world's database alone, and the same report by other label places. Prints the commands, the rows of
the two grids, and by how much the field changes outside the region; draws three pictures into `docs/`. What is finished
stays: an interrupted run goes on.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from infra import sandbox, storage
from tasks.cards import home_of
from tasks.core.compact import Projection
from tasks.core.earth.sampling import draw_even
from tasks.core.earth.sphere import equal_earth
from tasks.core.methods import Head, Method
from tasks.core.paired import MARKS
from tasks.core.retrieval import RetrievalIndex
from tasks.database.store import Database, open_database
from tasks.grid.store import open_spec, open_vectors, read_compact
from tasks.model.checkpoint import load_checkpoint
from tasks.plots.maps import globe, principal_colours
from tasks.plots.style import ACCENT, FAINT, INK, SECOND, plain, png
from tasks.tables.regions import find_region
from tests.benchmarks.retrieval import machine

HOME, DOCS = Path(".sandbox/region"), Path("docs")
REGION, BASE, SPACING = "60 5 145 55", 2500, 122  # Asia; the world has a quarter of that density, at random
PATCHES = {"patch-pixels": 32, "resolution-m": 5000, "bands": '["B02","B03","B04","B08"]'}  # the demo's
SCORED = {"folds": 10}
SEEDS = (2, 3)  # of the label places; the first is the default
ASKED, PLACES = ("elevation", "land cover"), 3000


def main() -> None:
    """Runs it all, and prints what came out."""
    with sandbox.running(HOME, prefect=False) as box:
        store = {"RANGEGRID_STORAGE_URL": (HOME / "store").absolute().as_uri(), "RANGEGRID_WORKERS": "2"}
        os.environ |= box.environment() | store
        print(machine(), flush=True)
        (patches,) = run("sample", patches=BASE, places="area", **PATCHES)
        (checkpoint,) = run("train", patches, members=3)
        (world,) = run("encode", patches, checkpoint)
        made = dict(line.split() for line in regional(checkpoint, world))
        grids = {"base grid": made["base-grid"], "grid": made["grid"]}
        reports = [made["report"], *(again(made, checkpoint, seed) for seed in SEEDS[1:])]
    tables = [pd.DataFrame(storage.read_json(storage.join(url, "scores.json"))) for url in reports]
    for seed, table in zip(SEEDS, tables, strict=True):
        tell(seed, table)
    before, after = (open_database(url) for url in (world, made["database"]))
    print("heads:", {name: heads_of(grid) for name, grid in grids.items()}, "world:", chosen(before), chosen(after))
    tell_outside(before, after, checkpoint)
    (DOCS / "region-places.png").write_bytes(places(before, after))
    (DOCS / "region-field.png").write_bytes(field(grids))
    (DOCS / "region-scores.png").write_bytes(differences(tables))


def regional(checkpoint: str, world: str) -> list[str]:
    """Runs the pipeline of the region, and returns the lines that it prints: a name and a URL."""
    told = {f"sample-{name}": value for name, value in PATCHES.items()}
    told |= {f"evaluate-{name}": value for name, value in SCORED.items()}
    told |= {"evaluate-embedder": '["coordinates"]', "publish-step": 0.25, "publish-promote": "false"}
    return run("pipeline", base=[checkpoint, world], region=REGION, spacing_km=SPACING, **told)


def again(made: dict[str, str], checkpoint: str, seed: int) -> str:
    """Evaluates the two grids by label places of another seed, and returns the URL of the report."""
    embedders = json.dumps(["coordinates", f"base grid={made['base-grid']}"])
    told = {"grid": made["grid"], "embedder": embedders, "reference": "base grid", "region": REGION, "seed": seed}
    return run("evaluate", checkpoint, made["database"], **told, **SCORED)[-1]


def run(*words: str, **options: object) -> list[str]:
    """Runs a command of `rangegrid`, after printing it; returns the lines that it prints."""
    command = ["rangegrid", *words]
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            command += [f"--{name.replace('_', '-')}", str(one)]
    print("$", shlex.join(command), flush=True)
    program = Path(sys.executable).with_name("rangegrid")
    return subprocess.run([program, *command[1:]], check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()


def tell(seed: int, table: pd.DataFrame) -> None:
    """Prints the scores of the two grids, and the interval of their difference."""
    rows = of_grid(table)
    base = table[table["embedder"] == "base grid"].set_index("task")
    print(f"\nlabel places of seed {seed}, blocks of {rows.block_degrees.iloc[0]:g} degrees, {SCORED['folds']} folds")
    print("| task | places | base grid | grid | difference | |\n|---|---|---|---|---|---|")
    for row in rows.itertuples():
        interval = f"{row.difference:+.4f} ({row.difference_low:+.4f} to {row.difference_high:+.4f})"
        score, mark = base.blocked[row.task], MARKS.get(str(row.verdict), "")
        print(f"| {row.task} | {row.n:,} | {score:.3f} | {row.blocked:.3f} | {interval} | {mark} |", flush=True)


def of_grid(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the region's grid, compared with the base's."""
    return table[(table["embedder"] == "grid") & (table["reference"] == "base grid")]


def heads_of(grid: str) -> list[str]:
    """The heads that a grid was made with."""
    return json.loads(storage.read(storage.join(home_of(grid), "card.json")))["made_of"]["heads"]


def chosen(database: Database) -> list[str]:
    """The heads that a database chooses for the world."""
    return [curve["chosen"] for curve in database.card.heads or ()]


def tell_outside(before: Database, after: Database, checkpoint: str) -> None:
    """Prints how much the world's field changes at even places outside the region, by heads of the world's database."""
    region, encoder = find_region([REGION]), load_checkpoint(checkpoint).location
    lonlat = draw_even(PLACES, 5)
    lonlat = lonlat[~region.holds(lonlat)]
    scale = before.values.std(0)
    scale[scale == 0] = 1
    print(f"\noutside, at {len(lonlat):,} even places: share of the variance by which the field changes")
    for text in chosen(before)[:2]:
        method = Method("multi-head", side_by_side=(Head.parse(text),))
        told = [
            RetrievalIndex(data.keys, data.values / scale, data.locations, weights=data.weights).retrieve(
                encoder.embed(lonlat), lonlat, method
            )
            for data in (before, after)
        ]
        variance = ((told[0] - told[0].mean(0)) ** 2).sum(1).mean()
        share = ((told[1] - told[0]) ** 2).sum(1) / variance
        print(f"{text}: mean {share.mean():.4%}, 95th percentile {np.percentile(share, 95):.4%}", flush=True)


# Pictures


def places(before: Database, after: Database) -> bytes:
    """The places of the world's images, and those that the region's sample adds."""
    world, added = np.unique(before.locations, axis=0), after.locations[len(before.locations) :]
    figure = Figure(figsize=(10, 5.2), facecolor="white", layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_aspect("equal")
    globe(axes)
    for lonlat, colour, label in ((world, ACCENT, "the world's"), (added, SECOND, "added in the region")):
        axes.scatter(*equal_earth(*lonlat.T), s=3, c=colour, linewidths=0, label=f"{len(lonlat):,} {label}")
    axes.legend(loc="lower left", frameon=False, markerscale=3)
    axes.set_title("Places of the joined database", loc="left", color=INK)
    return png(figure)


def field(grids: dict[str, str]) -> bytes:
    """The geodesic heads of both grids in the same colours: principal components of the values that they restore."""
    specs = [open_spec(url) for url in grids.values()]
    values = [restored(url) for url in grids.values()]
    known = np.isfinite(values[1][0])
    axes = Projection.fit(values[1][:, known].T[::7], 3).components
    seen = np.concatenate([np.tensordot(axes.T, each, 1) for each in values], axis=2)
    west, south, east, north = specs[0].box
    latitudes = np.repeat(np.linspace(north, south, seen.shape[1])[:, None], seen.shape[2], 1)
    colours = np.split(principal_colours(seen, np.cos(np.radians(latitudes)), latitudes), 2, axis=1)
    figure = Figure(figsize=(13, 4.3), facecolor="white", layout="constrained")
    for panel, name, cells in zip(
        figure.subplots(1, 2), ("the world's images alone", "with the region's"), colours, strict=True
    ):
        panel.imshow(cells, extent=(west, east, south, north), aspect=1.25, interpolation="nearest")
        panel.set_title(name, loc="left", color=INK)
        panel.set_axis_off()
    return png(figure)


def restored(grid: str) -> NDArray[np.float32]:
    """The values that the geodesic head of a grid tells, standardised, (v, y, x); NaN for no data."""
    found, compact = open_vectors(grid), read_compact(grid).values
    assert compact is not None
    assert compact.deviation is not None
    dims = compact.components.shape[1]
    cells = found[dims : 2 * dims]  # the second head
    flat = cells.reshape(dims, -1).T
    return (compact.restore(flat) / compact.deviation).T.reshape(-1, *cells.shape[1:])


def differences(tables: list[pd.DataFrame]) -> bytes:
    """What the region's images bring to each task, with its interval, for each seed of the label places."""
    figure = Figure(figsize=(8, 3.6), facecolor="white", layout="constrained")
    axes, tasks = figure.subplots(), list(of_grid(tables[0])["task"])
    for i, (table, colour) in enumerate(zip(tables, (ACCENT, SECOND), strict=False)):
        rows = of_grid(table).set_index("task").loc[tasks]
        at = np.arange(len(tasks))[::-1] + 0.12 - 0.24 * i
        ends = [rows.difference - rows.difference_low, rows.difference_high - rows.difference]
        axes.errorbar(rows.difference, at, xerr=ends, fmt="o", color=colour, label=f"label places of seed {SEEDS[i]}")
    axes.axvline(0, color=FAINT, lw=0.8)
    axes.set_yticks(range(len(tasks))[::-1], tasks, color=INK)
    axes.set_title("Score with the region's images minus that without, blocks held out", loc="left", color=INK)
    axes.legend(frameon=False, fontsize=8)
    plain(axes, "x")
    return png(figure)


if __name__ == "__main__":
    main()
