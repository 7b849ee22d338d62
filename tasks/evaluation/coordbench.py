"""Scores embedders on CoordBench, the public suite of labelled places of torchgeo-bench, by its own protocol.

The folder has a table for each source, `data/NAME/data.parquet`, as taylor-geospatial/coordbench publishes them. What
is there is scored; what is not is told. From a source come one or several benchmarks, each of one or several tasks.
Names, filters and families are those of torchgeo-bench (datasets.py and taxonomy.py of its coordbench), and the rows
of scores have its columns, so that its leaderboard reads them beside those of others.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from infra import storage
from infra.addresses import shown
from infra.errors import UserError
from tasks.artifacts import markdown_table
from tasks.core.probes import Kind
from tasks.evaluation.coord_probes import (
    BLOCK_DEGREES,
    FOLDS,
    NEIGHBOURS,
    SEED,
    Part,
    block_folds,
    known,
    neighbour_scores,
    parts_of,
    ridge_scores,
)
from tasks.evaluation.embedders import Named
from tasks.tables.files import open_table
from tasks.units import log

VIEWS = ("random", "spatial")
FLOOR = -1.0  # least R² that a mean over tasks takes
LON, LAT = ("lon", "longitude", "Lon", "x"), ("lat", "latitude", "Lat", "y")
CANONICAL = {"timestamp", "timestamp_end", "split", "id"}
MOST_CLASSES = 100  # values of a label of whole numbers up to which it is classes, in DeepMind's sets
NODATA = -999.0  # USAVars' number for none
PDFM_OTHERS = {"place", "county", "state", "latitude", "longitude", "Count_Person"} | {
    f"{name}_split" for name in ("imputation", "superresolution", "extrapolation")
}
SUSTAINBENCH = {
    "asset": "asset_index", "water": "water_index", "sanitation": "sanitation_index", "child_mortality": "under5_mort",
    "women_edu": "women_edu", "women_bmi": "women_bmi",
}  # fmt: skip
PLACES = {
    "phys_health": "phlth", "diabetes": "diabetes", "copd": "copd", "cancer": "cancer", "chd": "chd",
    "mental_health": "mhlth", "checkup": "checkup", "sleep_lt7": "sleep", "asthma": "casthma", "obesity": "obesity",
    "smoking": "csmoking", "high_chol": "highchol",
}  # fmt: skip
USAVARS = ("treecover", "elevation", "population", "nightlights", "income", "roads", "housing")
USAVARS_LOG = {"population", "income", "nightlights", "housing"}
DEEPMIND = (
    "africa_crop_mask", "aster_ged", "canada_crops_coarse", "canada_crops_fine", "descals", "ethiopia_crops", "glance",
    "lcmap_lc", "lcmap_lcc", "lcmap_lu", "lcmap_luc", "lucas_lc", "lucas_lu", "openet_ensemble", "us_trees",
)  # fmt: skip
COVERS = ("water", "trees", "grass", "flooded_vegetation", "crops", "shrub_and_scrub", "built", "bare", "snow_and_ice")
ENV = {
    "worldclim-bio1", "worldclim-bio12", "soilgrids-soc", "soilgrids-phh2o", "dm-aster_ged", "dm-openet_ensemble",
    "mosaiks-elevation", "mosaiks-treecover", "satclip-elevation", "satclip-air-temp", "bt-biomass", "bt-bioclim",
}  # fmt: skip
LAND = {f"dm-{name}" for name in DEEPMIND} - ENV | {
    "satclip-biome", "satclip-country", "satclip-ecoregion", "country", "ecoregions", "bt-cropharvest", "bt-landcover",
}  # fmt: skip
FAMILIES = ("socio", "env", "land")


@dataclass(frozen=True)
class Benchmark:
    """Labelled places of one or several tasks."""

    name: str
    """Name in the suite."""
    lonlat: NDArray[np.float64]
    """Places, (n, 2) in degrees."""
    tasks: dict[str, NDArray]
    """Label of each place by task."""
    kind: Kind = "regression"
    """Whether labels are classes or numbers."""
    scored: NDArray[np.bool_] | None = None
    """Whether a place is of the suite's own test set; None where it has none."""


Frame = pd.DataFrame
Read = Callable[[str], Frame]


def family_of(name: str) -> str:
    """Returns the family of a benchmark of the suite."""
    if name in ENV:
        return "env"
    return "land" if name in LAND else "socio"


def _made(name: str, rows: Frame, tasks: dict[str, Any], kind: Kind = "regression", **more: Any) -> Benchmark:
    lon, lat = (next((one for one in names if one in rows), "") for names in (LON, LAT))
    if not lon or not lat:
        raise UserError(f"CoordBench's table of {name} has no longitudes or latitudes: give it as published")
    typed = {task: np.asarray(rows[c] if isinstance(c, str) else c) for task, c in tasks.items()}
    if kind == "regression":
        typed = {task: labels.astype(np.float64) for task, labels in typed.items()}
    return Benchmark(name, rows[[lon, lat]].to_numpy(np.float64), typed, kind, **more)


def _names(rows: Frame) -> list[str]:
    return [str(name) for name in rows]


def _plain(config: str, name: str, tasks: dict[str, str], kind: Kind, read: Read) -> Iterator[Benchmark]:
    yield _made(name, read(config), tasks, kind)


def _pdfm(read: Read) -> Iterator[Benchmark]:
    rows = read("pdfm_conus27")
    labels = [c for c in _names(rows) if c not in PDFM_OTHERS | CANONICAL | set(LON) | set(LAT)]
    yield _made("pdfm-conus27", rows, {c: c for c in labels})


def _air_temperature(read: Read) -> Iterator[Benchmark]:
    rows = read("air_temp")
    told = [c for c in _names(rows) if "temp" in c.lower() or c.lower() == "meant"]
    told += [c for c in _names(rows) if c.lower().startswith("mean")]
    yield _made("satclip-air-temp", rows, {"air_temperature": told[0]})


def _satclip_country(read: Read) -> Iterator[Benchmark]:
    rows = read("satclip_country")
    yield _made("satclip-country", rows[rows["country"] != 0], {"country": "country"}, "classification")


def _satclip_ecoregions(read: Read) -> Iterator[Benchmark]:
    rows = read("satclip_ecoregion")
    land = rows[rows["ecoregion_class_index"] != -1]
    for task in ("ecoregion", "biome"):
        label = f"{task}_class_index"
        yield _made(f"satclip-{task}", land, {label: label}, "classification")


def _sustainbench(read: Read) -> Iterator[Benchmark]:
    rows = read("sustainbench")
    for name, label in SUSTAINBENCH.items():
        there = rows.dropna(subset=[label, "lat", "lon"])
        scored = (there["split"] == "test").to_numpy()
        yield _made(f"sustainbench-{name}", there, {label: label}, scored=scored)


def _biomass(read: Read) -> Iterator[Benchmark]:
    yield _made("bt-biomass", read("bt_biomass").dropna(subset=["biomass_mean"]), {"biomass": "biomass_mean"})


def _pool(read: Read) -> Frame:
    rows = read("bt_landcover")
    return rows[rows["random_sample"] == 1]


def _land_cover(read: Read) -> Iterator[Benchmark]:
    yield _made("bt-landcover", _pool(read), {c: c for c in COVERS})


def _bioclim(read: Read) -> Iterator[Benchmark]:
    rows = read("bt_bioclim")
    labels = [f"bioclim_{i:02d}" for i in range(1, 20)]
    yield _made("bt-bioclim", rows[rows["id"].isin(_pool(read)["id"])], {c: c for c in labels})


def _footprint(read: Read) -> Iterator[Benchmark]:
    rows = read("bt_human_footprint")
    rows = rows[rows["id"].isin(_pool(read)["id"])]
    yield _made("bt-population", rows, {"pop_density": "pop_density"})
    yield _made("bt-distroad", rows, {"maxdist_road": "maxdist_road"})


def _cdc_places(read: Read) -> Iterator[Benchmark]:
    rows = read("cdc_places")
    for name, prefix in PLACES.items():
        label = f"{prefix}_crudeprev"
        if label in rows:
            yield _made(f"places-{name}", rows.dropna(subset=[label, "lat", "lon"]), {label: label})


def _usavars(label: str, read: Read) -> Iterator[Benchmark]:
    rows = read(f"usavars_{label}").rename(columns=lambda name: str(name).strip())
    others = {"id", "lat", "lon"} | CANONICAL
    numbers = [c for c in _names(rows) if c.lower() not in others and not c.startswith("Unnamed")]
    numbers = [c for c in numbers if pd.api.types.is_numeric_dtype(rows[c])]
    chosen = [c for c in numbers if label in c.lower()] + [c for c in numbers if c.lower() == "price"] + numbers
    rows = rows[rows[chosen[0]] != NODATA]
    values = rows[chosen[0]].to_numpy(np.float64)
    yield _made(f"mosaiks-{label}", rows, {label: np.log1p(values) if label in USAVARS_LOG else values})


def _columns(config: str, prefix: str, labels: Sequence[str], read: Read) -> Iterator[Benchmark]:
    rows = read(config)
    for label in labels:
        if label in rows:
            yield _made(f"{prefix}-{label}", rows, {label: label})


def _deepmind(name: str, read: Read) -> Iterator[Benchmark]:
    rows = read(f"dm_{name}")
    labels = rows["label"].to_numpy()
    whole = bool(np.isfinite(labels).all() and np.allclose(labels, np.round(labels)))
    if whole and len(np.unique(labels)) <= MOST_CLASSES:
        yield _made(f"dm-{name}", rows, {name: labels.astype(np.int64)}, "classification")
    else:
        yield _made(f"dm-{name}", rows, {name: labels})


CLASSES: Kind = "classification"
NUMBERS: Kind = "regression"
SOURCES: dict[str, Callable[[Read], Iterator[Benchmark]]] = {
    "pdfm_conus27": _pdfm,
    "air_temp": _air_temperature,
    "california_housing": partial(
        _plain, "california_housing", "california-housing", {"median_house_value": "MedHouseVal"}, NUMBERS
    ),
    "satclip_country": _satclip_country,
    "satclip_ecoregion": _satclip_ecoregions,
    "satclip_population": partial(
        _plain, "satclip_population", "satclip-population", {"log_population": "log_population"}, NUMBERS
    ),
    "satclip_elevation": partial(_plain, "satclip_elevation", "satclip-elevation", {"elevation": "elevation"}, NUMBERS),
    "sustainbench": _sustainbench,
    "bt_cropharvest": partial(_plain, "bt_cropharvest", "bt-cropharvest", {"crop_type": "label_name"}, CLASSES),
    "bt_biomass": _biomass,
    "bt_landcover": _land_cover,
    "bt_bioclim": _bioclim,
    "bt_human_footprint": _footprint,
    "cdc_places": _cdc_places,
    **{f"usavars_{label}": partial(_usavars, label) for label in USAVARS},
    "country": partial(_plain, "country", "country", {"country": "country"}, CLASSES),
    "ecoregions": partial(_plain, "ecoregions", "ecoregions", {"biome": "biome", "ecoregion": "ecoregion"}, CLASSES),
    "worldclim_bio": partial(_columns, "worldclim_bio", "worldclim", ("bio1", "bio12")),
    "soilgrids": partial(_columns, "soilgrids", "soilgrids", ("soc", "phh2o")),
    **{f"dm_{name}": partial(_deepmind, name) for name in DEEPMIND},
}
NEEDS = {
    "bt_bioclim": ("bt_landcover",),
    "bt_human_footprint": ("bt_landcover",),
}  # whose places are a pool of another's


def read_suite(folder: str) -> list[Benchmark]:
    """Returns the benchmarks whose tables are in a folder.

    Args:
        folder: URL of the folder that has `data/NAME/data.parquet`.

    Raises:
        UserError: There are none, or one is not as published.
    """
    tables = _tables(folder)
    there = set(tables)
    usable = [name for name in SOURCES if {name, *NEEDS.get(name, ())} <= there]
    if missing := [name for name in SOURCES if name not in usable]:
        log().warning("CoordBench without %s, whose tables are not there", ", ".join(missing))
    found: list[Benchmark] = []
    for name in usable:
        try:
            found += SOURCES[name](lambda config: _frame(tables[config]))
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise UserError(f"{shown(tables[name])} is not as published ({error}): get it anew") from error
    return found


def _tables(folder: str) -> dict[str, str]:
    """Returns the URLs of the tables that are there, by the name of their source."""
    urls = {name: storage.join(folder, "data", name, "data.parquet") for name in SOURCES}
    found = {name: url for name, url in urls.items() if storage.exists(url)}
    if not found:
        raise UserError(f"{shown(folder)} has no data/NAME/data.parquet of CoordBench: give the folder that has data/")
    return found


def versions(folder: str) -> dict[str, str]:
    """Returns a text for each table that is there, which changes when the table does.

    Raises:
        UserError: There are none.
    """
    return {name: storage.version(url) for name, url in _tables(folder).items()}


def _frame(url: str) -> Frame:
    with open_table(url, "labels") as table:
        batches = list(table.batches())
    if not batches:
        raise UserError(f"{shown(url)} has no rows: get it anew")
    return pa.Table.from_batches(batches).to_pandas()


def score_suite(suite: Sequence[Benchmark], embedders: Sequence[Named], advance: Callable[..., None]) -> Frame:
    """Scores every embedder on every benchmark; returns a row for each task, method and split, as CoordBench has them.

    Args:
        suite: The benchmarks.
        embedders: The embedders; those without weights are left out.
        advance: Called with 1 after every embedder.
    """
    rows: list[dict[str, Any]] = []
    for one in embedders:
        if one.embed is not None:
            for bench in suite:
                rows += _score(one.name, np.asarray(one.embed(bench.lonlat), np.float32), bench)
        advance(1)
    return pd.DataFrame(rows)


def _score(name: str, features: NDArray[np.float32], bench: Benchmark) -> Iterator[dict[str, Any]]:
    folds = block_folds(bench.lonlat)
    for split in ("official",) if bench.scored is not None else VIEWS:
        for task, labels in bench.tasks.items():
            there = known(features, labels, bench.kind)
            own = None if bench.scored is None else bench.scored[there]
            parts = parts_of(int(there.sum()), folds[there] if split == "spatial" else None, own)
            about = {"dataset": bench.name, "task": task, "task_type": bench.kind, "split": split}
            about |= {"feature_dim": features.shape[1], "model_name": name} | _counts(bench, labels)
            for method, scores in _probed(features[there], labels[there], bench.kind, parts, own is not None):
                yield about | {"method": method} | _told(scores, bench.kind)


def _probed(
    features: NDArray[np.float32], labels: NDArray, kind: Kind, parts: list[Part], own: bool
) -> Iterator[tuple[str, list[float]]]:
    if kind == "classification":
        yield f"knn{NEIGHBOURS}", neighbour_scores(features, labels, parts)
    yield "linear", ridge_scores(features, labels, kind, parts, own)


def _counts(bench: Benchmark, labels: NDArray) -> dict[str, Any]:
    if bench.scored is not None:
        tested = int(bench.scored.sum())
    elif bench.kind == "regression":
        tested = int(np.isfinite(labels).sum())
    else:
        tested = len(labels)
    folds = FOLDS if bench.scored is None else 1
    return {"n_folds": folds, "cell_deg": BLOCK_DEGREES, "n_samples": len(labels), "n_test": tested, "seed": SEED}


def _told(scores: list[float], kind: Kind) -> dict[str, Any]:
    mean, std = float(np.mean(scores)), float(np.std(scores)) if len(scores) > 1 else 0.0
    metric = "r2" if kind == "regression" else "accuracy"
    return {"metric_name": metric, "metric_value": mean, "ci_lower": mean - std, "ci_upper": mean + std}


def leaderboard(scores: Frame, view: str, method: str) -> Frame:
    """Returns the mean rank of each embedder in each family and over all benchmarks, best first; 1 is best.

    The tasks of a benchmark count together, by their mean, in which R² is at least FLOOR. Benchmarks with a test set of
    their own are in both views.

    Args:
        scores: What `score_suite` returned, of several embedders.
        view: random or spatial.
        method: linear or knn.

    Returns:
        Columns of ranks (`socio`, `env`, `land`, `macro`), then of mean scores (`socio score`, …), by embedder.
    """
    rows = scores[scores["split"].isin([view, "official"]) & scores["method"].str.startswith(method)]
    floored = rows["metric_value"].where(rows["metric_name"] != "r2", rows["metric_value"].clip(lower=FLOOR))
    means = rows.assign(score=floored).groupby(["model_name", "dataset"], as_index=False)["score"].mean()
    means["rank"] = means.groupby("dataset")["score"].rank(ascending=False, method="average")
    means["family"] = means["dataset"].map(family_of)
    told = {}
    for value, suffix in (("rank", ""), ("score", " score")):
        for family in FAMILIES:
            told[family + suffix] = means[means["family"] == family].groupby("model_name")[value].mean()
        told[f"macro{suffix}"] = means.groupby("model_name")[value].mean()
    return pd.DataFrame(told).sort_values("macro")


def markdown(scores: Frame) -> str:
    """Returns the leaderboards, for each view and probe that has scores."""
    parts = []
    for view in VIEWS:
        for method in ("linear", "knn"):
            board = leaderboard(scores, view, method)
            if len(board):
                sets = scores[scores["split"].isin([view, "official"]) & scores["method"].str.startswith(method)]
                title = f"{view}, {method}: mean rank (mean score), {sets['dataset'].nunique()} sets"
                lines = [[str(name), *_cells(row)] for name, row in board.iterrows()]
                parts.append(markdown_table([title, *FAMILIES, "macro"], lines))
    return "\n\n".join(parts)


def _cells(row: pd.Series) -> list[str]:
    return [
        "" if np.isnan(row[name]) else f"{row[name]:.2f} ({row[f'{name} score']:.3f})" for name in (*FAMILIES, "macro")
    ]
