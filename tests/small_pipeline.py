"""The pipeline and its consumers on the small planet, by texts of parameters, with what must hold of all they store."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import xarray as xr
from pystac.validation import validate_dict

from flows.cli_options import build
from infra import clusters, storage
from infra.errors import UserError
from tasks import ablate, encode, evaluate, publish, sample, train
from tasks.cards import read_card
from tasks.core.earth.land import is_land
from tasks.core.earth.sphere import unit_vectors
from tasks.database.store import open_database
from tasks.grid import store
from tasks.model.checkpoint import load_checkpoint
from tasks.params import AblateParams, Choice, EmbedParams, Params, PipelineParams, PruneParams, Sampling
from tasks.patches.estimate import estimate
from tasks.patches.store import open_patches
from tasks.points import embed as points
from tasks.points import sample_grid as grid_sampling
from tasks.products import AblationCard, CheckpointCard, GridCard, GridRecipe, ReportCard
from tasks.release import promotion, versions
from tests.tasks.release.test_stac import schemas

SETTLED = ("heads", "compact_dims", "location_dims")  # of multi-head, by the database
Case = dict[str, str]  # text of an option, as a command line has it, by `step.option`
BASE: Case = {
    "sample.patches": "20", "sample.patch_pixels": "12", "sample.resolution_m": "5000",
    "sample.bands": '["B02", "B04"]', "sample.south": "43", "sample.north": "52", "sample.shard_patches": "8",
    "sample.max_cloud_percent": "95", "sample.min_clear_fraction": "0.5", "train.encoder_dim": "16",
    "train.degree": "4", "train.hidden": "16", "train.dim": "8", "train.steps": "6", "train.batch": "8",
    "encode.shard_rows": "8", "publish.step": "10", "publish.tile_cells": "20", "evaluate.folds": "2",
    "evaluate.embedder": '["coordinates"]', "evaluate.labels": '["LABELS"]', "evaluate.label": "warmth",
    "evaluate.kind": "regression",
}  # fmt: skip
STEPS = ("sample", "train", "encode", "publish", "evaluate")
CONSUMERS: dict[str, type[Params]] = {"embed": EmbedParams, "ablate": AblateParams, "prune": PruneParams}
CHOICES = {"sample_grid.method": get_args(Sampling), "ablate.choice": get_args(Choice)}
ABLATED = {"ablate.labels": "evaluate.labels", "ablate.label": "evaluate.label", "ablate.kind": "evaluate.kind",
           "ablate.folds": "evaluate.folds"}  # fmt: skip
LATE = re.compile(  # what only the work itself can show
    r"patches were found|held out|probe needs|blocks|distinct|commonest class|cannot be scored|diverged"
)


def options() -> dict[str, dict[str, Any]]:
    """The JSON schema of every option, by `step.option`; an option that is new is driven without a change here."""
    found = dict(_leaves(PipelineParams.model_json_schema()))
    for step, model in CONSUMERS.items():
        found |= _leaves(model.model_json_schema(), f"{step}.")
    return found | {name: {"enum": list(values)} for name, values in CHOICES.items()}


def _leaves(schema: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Options of a schema; those of a model within a step's are named as on the command line, `train.encoder_dim`."""

    def walk(node: dict[str, Any], prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, leaf in node["properties"].items():
            if "$ref" in leaf:
                inner = schema["$defs"][leaf["$ref"].rpartition("/")[2]]
                yield from walk(inner, prefix + name + ("_" if prefix else "."))
            else:
                yield prefix + name, leaf

    return walk(schema, prefix)


def parsed(case: Case, paths: dict[str, str]) -> dict[str, Any]:
    """The parameters of a case, by step.

    Raises:
        UserError: A value is refused by the form.
    """
    texts = BASE | {name: BASE[other] for name, other in ABLATED.items()} | case
    for name, path in paths.items():
        texts = {option: text.replace(name, path) for option, text in texts.items()}
    whole = {name.replace(".", "_"): text for name, text in texts.items() if name.partition(".")[0] in (*STEPS, name)}
    found: dict[str, Any] = {"pipeline": build(PipelineParams, whole)}
    for step, model in CONSUMERS.items():
        own = {n.removeprefix(f"{step}."): t for n, t in texts.items() if n.startswith(f"{step}.") and n not in CHOICES}
        found[step] = build(model, own)
    return found | {name: texts.get(name, values[0]) for name, values in CHOICES.items()}


def run(case: Case, paths: dict[str, str]) -> None:
    """Runs the steps that a case concerns, and those behind them, and checks what they store; all, where it is empty.

    Raises:
        UserError: The case is refused before the step that refuses it wrote anything.
        AssertionError: What is stored is wrong, or the refusal came late.
    """
    params = parsed(case, paths)
    whole, concerned = params["pipeline"], {name.partition(".")[0] for name in case}
    urls = json.loads(Path(paths["BASE"]).read_text()) if case else {}
    promotes = "gate_margin" in concerned or not concerned.isdisjoint(STEPS)
    begin = min((STEPS.index(step) for step in concerned & {*STEPS}), default=4 if promotes else 5) if case else 0
    with clusters.connect("threads", 2) as client:
        for step in STEPS[begin:]:
            with refused_early(paths):
                urls[step] = RUN[step](client, urls, whole)
            CHECKS[step](urls, whole)
    if not case:
        versions.promote(urls["publish"])
        Path(paths["BASE"]).write_text(json.dumps(urls))
    elif promotes and whole.publish.promote:
        promote(urls["publish"], whole)
    for step in sorted(concerned & CONSUME.keys()):
        with refused_early(paths):
            CONSUME[step](urls, params, paths)


def promote(grid: str, whole: PipelineParams) -> None:
    """Has a grid promoted by its scores, or refused by the gate and readers left with the one that they have."""
    before = versions.read_pointer()[0]
    try:
        promotion.promote_evaluated(grid, whole.gate_margin, whole.publish.drift_alert)
    except UserError as error:
        if "is not promoted" not in str(error):
            raise
        assert versions.read_pointer()[0] == before


@contextmanager
def refused_early(paths: dict[str, str]) -> Iterator[None]:
    """Holds a step to refusing what it cannot do before it writes anything."""
    before = files(paths)
    try:
        yield
    except UserError as error:
        new = sorted(files(paths) - before)
        if new and not LATE.search(str(error)):
            raise AssertionError(f"refused when {new[:3]} were written") from error
        raise


def files(paths: dict[str, str]) -> set[Path]:
    return {path for path in Path(paths["HOME"]).rglob("*") if path.is_file()}


RUN: dict[str, Callable[..., str]] = {
    "sample": lambda client, urls, p: (estimate(p.sample, 2).lines(), sample.sample_patches(client, p.sample))[1],
    "train": lambda client, urls, p: train.train_model(client, urls["sample"], p.train),
    "encode": lambda client, urls, p: encode.encode_database(client, urls["sample"], urls["train"], p.encode),
    "publish": lambda client, urls, p: publish.publish_grid(
        client, urls["train"], urls["encode"], p.publish.model_copy(update={"promote": False})
    ),
    "evaluate": lambda client, urls, p: evaluate.evaluate_database(
        urls["train"], urls["encode"], p.evaluate, urls["publish"]
    ),
}


def check_patches(urls: dict[str, str], whole: PipelineParams) -> None:
    params, patches = whole.sample, open_patches(urls["sample"])
    rows, pixels = patches.manifest, patches.reflectance(slice(None))
    assert pixels.shape == (params.patches, len(params.bands), params.patch_pixels, params.patch_pixels)
    assert rows["row_id"].is_unique
    assert len(rows) == params.patches
    assert tuple(patches.bands) == tuple(params.bands)
    if params.places != "list":
        assert rows["lat"].between(params.south, params.north).all(), "places beyond the limits"
    assert (np.isnan(pixels).any(1).mean((1, 2)) <= params.max_nodata_fraction + 1e-6).all(), "too much without data"
    assert (rows["clear_fraction"] >= params.min_clear_fraction - 1e-6).all()
    assert (rows["saturated_fraction"] <= params.max_saturated_fraction + 1e-6).all()
    card_tells(patches.card.made_of, params, {"weights"})


def card_tells(made: dict[str, Any], params: Params, but: set[str]) -> None:
    """What a product says that it is made of is what was asked for; what was left unset is the step's to settle."""
    asked = json.loads(params.model_dump_json(exclude_none=True))
    told = {name: json.loads(json.dumps(made[name])) for name in asked.keys() & made.keys() - but}
    wrong = {name: (value, asked[name]) for name, value in told.items() if value != asked[name]}
    assert not wrong, f"the card is of other parameters: {wrong}"


def check_checkpoint(urls: dict[str, str], whole: PipelineParams) -> None:
    places = np.array([[0, 0], [180, 90], [-180, -90], [12.3, 45.6]])
    vectors = load_checkpoint(urls["train"]).location.embed(places)
    assert vectors.shape == (4, whole.train.dim)
    are_unit(vectors)
    card_tells(read_card(urls["train"], CheckpointCard).made_of, whole.train, {"encoder"})
    names = set(storage.names(urls["train"]))
    assert "loss.png" in names
    assert "training.pt" not in names


def are_unit(vectors: np.ndarray, tolerance: float = 1e-4) -> None:
    off = np.abs(np.linalg.norm(vectors.astype("f8"), axis=-1) - 1).max()
    assert off <= tolerance, f"lengths are off 1 by {off}"


def check_database(urls: dict[str, str], whole: PipelineParams) -> None:
    found, rows = open_database(urls["encode"]), open_patches(urls["sample"]).manifest
    assert found.keys.shape == (len(rows), whole.train.dim)
    assert np.isfinite(found.values).all(), "values are not finite"
    are_unit(found.keys)
    np.testing.assert_array_equal(found.locations, rows[["lon", "lat"]])
    np.testing.assert_array_equal(found.row_ids, rows["row_id"])
    card_tells(found.card.made_of, whole.encode, {"values"})


def check_grid(urls: dict[str, str], whole: PipelineParams) -> None:
    """Its cells where the parameters say, values on all land, and a few of them by brute force in float64."""
    params, url = whole.publish, urls["publish"]
    grid = xr.open_zarr(storage.zarr_store(url, read_only=True), chunks=None)
    down, across = ("lat", "lon") if "lat" in grid.coords else ("y", "x")
    shape = round((params.north - params.south) / params.step), round((params.east - params.west) / params.step)
    assert (grid.sizes[down], grid.sizes[across]) == shape
    for axis, start, step in ((down, params.north, -params.step), (across, params.west, params.step)):
        np.testing.assert_allclose(grid[axis], start + step * (np.arange(grid.sizes[axis]) + 0.5), rtol=1e-9, atol=1e-9)
    visual, location = _parts(grid, params.dtype)
    known = np.isfinite(location).all(-1)
    assert (np.isfinite(visual).all(-1) == known).all(), "half of a vector is missing"
    if not GridRecipe.model_validate(grid.attrs["rangegrid:made_of"]).location_dims:
        are_unit(location[known], {"float32": 1e-4, "float16": 2e-3, "int8": 0.03}[params.dtype])
    if params.evidence:
        assert (grid["effective_images"].values[known] >= 1 - 1e-4).all()
        assert (grid["largest_weight"].values[known] <= 1 + 1e-6).all()
        assert np.isfinite(grid["distance_km"].values[known]).all()
    if down == "lat":
        places = np.stack(np.meshgrid(grid[across], grid[down]), axis=-1)
        centres = is_land(places.reshape(-1, 2)).reshape(shape)
        assert known[centres].all(), "land has no values"
        assert params.land != "centre" or (known == centres).all(), "the sea has values"
        if not (params.method == "multi-head" or params.compact_dims or params.tolerance):
            error = {"float32": 1e-4, "float16": 2e-3, "int8": 0.1}[params.dtype]
            by_brute_force(urls, params, places[known][:3], visual[known][:3], location[known][:3], error)
    home = url.removesuffix("/grid.zarr")
    for made in (grid.attrs["rangegrid:made_of"], read_card(home, GridCard).made_of):
        card_tells(made, params, {"parent", "tile_cells", "land", "beta", *SETTLED})
    assert validate_dict(storage.read_json(storage.join(home, "item.json")), validator=schemas())
    for level in range(1, params.overviews + 1):
        coarse = xr.open_zarr(storage.zarr_store(store.level_url(url, level), read_only=True), chunks=None)
        assert coarse.sizes[down] * 2**level == shape[0]
        assert np.isfinite(_parts(coarse, params.dtype)[1]).any()


def _parts(grid: xr.Dataset, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Visual and location part, (y, x, dim)."""
    if dtype == "int8":
        return np.moveaxis(grid["visual"].values, 0, -1), np.moveaxis(grid["location"].values, 0, -1)
    values, block = np.moveaxis(grid["embedding"].values, 0, -1), grid["block"].values
    return values[..., block != "location"], values[..., block == "location"]


def by_brute_force(urls: dict[str, str], method: Any, lonlat: Any, visual: Any, location: Any, error: float) -> None:
    """Holds vectors to those of float64, image by image; `error` is a share of the values."""
    database, queries = open_database(urls["encode"]), load_checkpoint(urls["train"]).location.embed(lonlat)
    found = _softmax(12 * queries.astype("f8") @ database.keys.astype("f8").T) @ database.values.astype("f8")
    if method.method == "range+":
        near = _softmax(40 * unit_vectors(lonlat) @ unit_vectors(database.locations).T) @ database.values
        found = method.beta * found + (1 - method.beta) * near
    off = np.linalg.norm(visual - found, axis=1) / np.linalg.norm(np.abs(database.values).max(0))
    assert (off <= error).all(), f"visual parts are off by {off}"
    assert np.abs(location - queries).max() <= error, "location parts are off"


def _softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)


def check_report(urls: dict[str, str], whole: PipelineParams) -> None:
    card = read_card(urls["evaluate"], ReportCard)
    scores = pd.DataFrame(card.scores)
    told = scores.loc[scores["note"] == "", ["random", "blocked"]].astype(float)
    assert len(told), "nothing is scored"
    assert np.isfinite(told).all(axis=None), "scores are not finite"
    assert (told <= 1).all(axis=None)
    assert storage.exists(storage.join(urls["publish"].removesuffix("/grid.zarr"), "scorecard.json"))
    card_tells(card.made_of, whole.evaluate, {"embedder", "embedders", "labels"})


CHECKS = {"sample": check_patches, "train": check_checkpoint, "encode": check_database, "publish": check_grid,
          "evaluate": check_report}  # fmt: skip


def embed(urls: dict[str, str], params: dict[str, Any], paths: dict[str, str]) -> None:
    asked, output = params["embed"], Path(paths["HOME"]) / "embedded.parquet"
    points.embed_file(paths["POINTS"], urls["train"], urls["encode"], output, asked)
    table, given, database = pd.read_parquet(output), pd.read_csv(paths["POINTS"]), open_database(urls["encode"])
    assert len(table) == len(given)
    vectors = np.stack(table["embedding"].to_list())
    assert np.isfinite(vectors).all(), "embeddings are not finite"
    if asked.method == "multi-head":
        assert vectors.shape[1] > (asked.location_dims or 0) + (asked.compact_dims or 0)
    else:
        visual, location = np.split(vectors, [vectors.shape[1] - database.keys.shape[1]], axis=1)
        are_unit(location)
        assert visual.shape[1] == (0 if asked.method == "none" else asked.compact_dims or database.values.shape[1])
    if asked.method in ("range", "range+") and not asked.compact_dims:
        by_brute_force(urls, asked, given[["lon", "lat"]].to_numpy("f8"), visual, location,
                       0.02 if asked.precision == "bf16" else 1e-4)  # fmt: skip
    if asked.evidence:
        assert table["effective_images"].between(1 - 1e-4, len(database.keys) + 1e-2).all()
        assert table["largest_weight"].between(0, 1 + 1e-6).all()
        assert table["distance_km"].between(0, 20_100).all()
    if asked.top_images:
        ids = np.stack(table["image_ids"].to_list())
        assert ids.shape[1] == min(asked.top_images, len(database.keys))
        assert np.isin(ids, database.row_ids).all(), "unknown images"


def sample_grid(urls: dict[str, str], params: dict[str, Any], paths: dict[str, str]) -> None:
    output = Path(paths["HOME"]) / "sampled.parquet"
    grid_sampling.sample_file(paths["POINTS"], urls["publish"], output, params["sample_grid.method"])
    table = pd.read_parquet(output)
    assert len(table) == len(pd.read_csv(paths["POINTS"]))
    whole = [vector is not None and np.isfinite(vector).all() for vector in table["embedding"]]
    assert (whole == (table["status"] == grid_sampling.STATUSES[0])).all(), "status and vectors disagree"


def ablated(urls: dict[str, str], params: dict[str, Any], paths: dict[str, str]) -> None:
    url = ablate.ablate_database(params["ablate.choice"], urls["train"], urls["encode"], params["ablate"])
    table = pd.DataFrame(storage.read_json(storage.join(url, "ablation.json")))
    assert len(table)
    assert table["embedder"].is_unique, f"variants of one name: {list(table['embedder'])}"
    assert np.isfinite(table[["random", "blocked"]].astype(float)).all(axis=None), "scores are not finite"
    card_tells(read_card(url, AblationCard).made_of, params["ablate"], {"labels", "databases"})


def pruned(urls: dict[str, str], params: dict[str, Any], paths: dict[str, str]) -> None:
    before, asked = versions.read_pointer()[0].grid, params["prune"]
    versions.prune(asked.keep, unfinished=asked.unfinished, dry_run=asked.dry_run, line=asked.line)
    assert versions.read_pointer()[0].grid == before
    assert storage.exists(storage.join(before, "zarr.json")), "the latest is gone"


CONSUME = {"embed": embed, "sample_grid": sample_grid, "ablate": ablated, "prune": pruned}
