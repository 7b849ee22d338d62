"""The pipeline end to end: real STAC and S3 servers, separately started Dask workers, Prefect's test server."""

import io
import json
import re
import subprocess
import sys
from urllib.request import urlopen

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from distributed import Client
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, FlowRunFilter
from s3fs import S3FileSystem

from flows.pipeline import pipeline
from infra import storage
from infra.errors import UserError
from infra.settings import settings
from tasks.core.earth.sphere import unit_vectors
from tasks.database.store import open_database
from tasks.model.checkpoint import load_checkpoint
from tasks.params import EvaluateParams, PipelineParams, PublishParams, SampleParams, TrainParams
from tasks.patches.store import open_patches

SAMPLE = SampleParams(
    patches=30,
    patch_pixels=16,
    resolution_m=5_000,
    bands=("B02", "B03", "B04", "B08"),
    south=43,
    north=52,
    shard_patches=10,
    max_cloud_percent=95,
    min_clear_fraction=0.5,
)
READER = """
import sys, xarray as xr
grid = xr.open_zarr(sys.argv[1], storage_options={"endpoint_url": sys.argv[2]})
print(grid.embedding.sel(lon=2.35, lat=48.86, method="nearest").values.sum(dtype="float64"))
"""


@pytest.fixture(scope="module")
def made(sandbox, cluster, prefect):
    """The products of a small pipeline."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANGEGRID_CLUSTER", cluster)
        yield pipeline(
            PipelineParams(
                sample=SAMPLE,
                train=TrainParams(steps=20, batch=16, degree=8, hidden=32, dim=16),
                publish=PublishParams(step=1.0, tile_cells=60),
                evaluate=EvaluateParams(points=400, folds=2),
            )
        )


def test_patches_are_where_the_manifest_says(made):
    patches = open_patches(made["patches"])
    assert len(patches.manifest) == 30
    assert patches.manifest["row_id"].is_unique
    assert patches.manifest["lat"].between(43, 52).all()
    assert set(patches.manifest["offset"]) <= {0, -1000}
    reflectance = patches.reflectance(slice(None))
    assert reflectance.shape == (30, 4, 16, 16)
    assert np.isfinite(reflectance).mean() > 0.9


def test_the_grid_is_the_brute_force(made):
    """A float64 softmax over the whole database at every sampled cell, for each of the heads side by side."""
    grid = xr.open_zarr(storage.zarr_store(made["grid"]))
    database = open_database(made["database"])
    encoder = load_checkpoint(made["checkpoint"]).location
    keys, values, where = (np.asarray(a, np.float64) for a in (database.keys, database.values, database.locations))
    selected = (values - grid["mean"].values) @ grid.components.values
    semantic, geodesic = (float(head.partition(":")[2]) for head in grid.attrs["rangegrid:made_of"]["heads"])
    for lon, lat in [(2.5, 48.5), (-120.5, 40.5), (179.5, 68.5), (25.5, -30.5), (0.5, -85.5)]:
        query = encoder.embed(np.array([[lon, lat]])).astype(np.float64)
        alike = weights(semantic * query @ keys.T) @ selected
        near = weights(geodesic * unit_vectors([[lon, lat]]) @ unit_vectors(where).T) @ selected
        expected = np.concatenate([alike, near, query], axis=1)[0]
        found = grid.embedding.sel(lon=lon, lat=lat).values
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def weights(logits):
    raised = np.exp(logits - logits.max())
    return raised / raised.sum()


@pytest.fixture(scope="module")
def artifacts(made):
    """What the pipeline's page shows, and the pages of its steps."""
    with get_client(sync_client=True) as client:
        tables = client.read_artifacts(artifact_filter=ArtifactFilter(key={"any_": ["pipeline"]}))
        (page,) = [table.flow_run_id for table in tables if made["grid"] in table.data]
        steps = client.read_flow_runs(flow_run_filter=FlowRunFilter(parent_flow_run_id={"any_": [page]}))
        runs = {page, *(step.id for step in steps)}
        return [shown for shown in client.read_artifacts(limit=200) if shown.flow_run_id in runs]


def test_the_pipelines_page_tells_products_costs_and_gate(made, artifacts):
    (table,) = [json.loads(shown.data) for shown in artifacts if shown.key == "pipeline"]
    rows = {row["what"]: row for row in table}
    assert {what: row["what it is"] for what, row in rows.items() if what != "gate"} == made
    assert all(re.fullmatch(r"[\d.]+ [kM]B", rows[product]["stored"]) for product in made)
    assert all(re.fullmatch(r"0:\d\d:\d\d", rows[product]["took"]) for product in made)
    assert rows["gate"]["what it is"] == "promoted: readers have it"


def test_the_run_tells_how_training_stands(artifacts):
    shown = [artifact.description for artifact in artifacts if artifact.type == "progress"]
    told = r"train, 20 of 20: loss \d+\.\d+, scale \d+\.\d, held-out retrieval \d+\.\d%, [\d,]+ pairs/s"
    assert [text for text in shown if re.fullmatch(told, text or "")], shown


def test_the_run_tells_where_grid_and_score_card_are(made, artifacts):
    """Everybody may read the sandbox's grids: by links that a browser opens, and by lines that open what they name."""
    home, opened = made["grid"].removesuffix("/grid.zarr"), {}
    shown = [artifact for artifact in artifacts if artifact.key in ("grid", "score-card")]
    for url in (f"{home}/index.html", f"{home}/scorecard.json"):
        (text,) = [artifact.data for artifact in shown if f"[{url}](" in artifact.data]
        with urlopen(re.search(rf"\[{url}\]\((.*?)\)", text)[1]) as answer:
            assert answer.read() == storage.read(url)
        exec(re.search(r"```python\n(.*?)```", text, re.S)[1], opened)
    assert opened["grid"].sizes["lat"] == 180
    assert set(opened["scores"]["embedder"]) >= {"grid", "coordinates"}


def test_each_step_tells_its_plan_and_what_came_of_it(made, artifacts):
    shown = [artifact for artifact in artifacts if artifact.type == "table" and str(artifact.key).endswith("-run")]
    tables = {artifact.key: {row["what"]: row for row in json.loads(artifact.data)} for artifact in shown}
    asked = {
        ("sample-patches-run", "read patches"): 3,
        ("train-model-run", "train"): 20,
        ("encode-database-run", "encode"): 1,
        ("evaluate-database-run", "evaluate"): 15,
        ("publish-grid-run", "land cells"): int(np.isfinite(xr.open_zarr(made["grid"]).embedding[0]).sum()),
    }
    for (key, what), count in asked.items():
        row = tables[key][what]
        assert (row["planned"], row["already there"], row["done"]) == (count, 0, count), what
        assert row["seconds"] > 0
        assert re.fullmatch(r"[\d.]{4,6} [kM]B", tables[key]["stored"]["done"]), tables[key]["stored"]
    memory = tables["publish-grid-run"]["memory of a worker"]
    assert memory["planned"] is None
    assert all(re.fullmatch(r"[\d.]{4,6} [MG]B", memory[column]) for column in ("limit", "done")), memory


def test_the_grid_has_its_score_card(made):
    home = made["grid"].removesuffix("/grid.zarr")
    card = storage.read_json(storage.join(home, "scorecard.json"))
    assert "score-card" in storage.read_json(storage.join(home, "item.json"))["assets"]
    assert card == storage.read_json(storage.join(made["report"], "scorecard.json"))
    assert card["product"] == "grid"
    rows = {(row["embedder"], row["task"]): row for row in card["scores"]}
    assert len(rows) == 15 * 5
    assert rows["grid", "temperature"]["n"] + rows["grid", "temperature"]["left_out"] == 400
    assert rows["wrap", "temperature"]["blocked"] > rows["coordinates", "temperature"]["blocked"]
    assert rows["CSP", "country"]["note"] == "weights not given"


def test_no_secret_and_no_signature_is_stored_or_shown(made, sandbox, cluster):
    """In no object of the products, no key of Dask's graphs, nothing that Prefect keeps: states, artifacts, logs."""
    products = S3FileSystem(key=sandbox.keys[0], secret=sandbox.keys[1], endpoint_url=sandbox.endpoint)
    paths = [path for url in made.values() if url.startswith("s3://") for path in products.find(url)]
    with get_client(sync_client=True) as client:
        kept = [*client.read_flow_runs(), *client.read_task_runs(), *client.read_artifacts(), *client.read_logs()]
    told = {repr(thing)[:60]: thing.model_dump_json().encode() for thing in kept}
    told |= {path: plain(path, products.cat_file(path)) for path in paths}
    with Client(cluster) as client:
        keys = client.run_on_scheduler(
            lambda dask_scheduler: {str(moved.key) for moved in dask_scheduler.transition_log}
        )
    told |= {key: key.encode() for key in keys}
    assert {"screen", "read", "encode", "survey", "check"} <= {re.split("[-_]", key)[0] for key in keys}, keys
    assert len(paths) > 20
    assert any(b"https" in text or b"s3://" in text for text in told.values())
    for name, text in told.items():
        for secret in (sandbox.keys[1].encode(), b"X-Amz-Signature", b"X-Amz-Credential"):
            assert secret not in text, name


def plain(path, data):
    """A Parquet's columns as text, since they are stored compressed; all else as it is."""
    return pd.read_parquet(io.BytesIO(data)).to_csv().encode() if path.endswith(".parquet") else data


def test_the_sea_has_no_values(made):
    grid = xr.open_zarr(storage.zarr_store(made["grid"]))
    assert np.isnan(grid.embedding.sel(lon=-30.5, lat=30.5)).all()


def test_another_process_opens_the_grid_with_plain_xarray(made, sandbox, tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", READER, made["grid"], sandbox.endpoint], capture_output=True, text=True, cwd=tmp_path
    )
    assert ran.returncode == 0, ran.stderr
    grid = xr.open_zarr(storage.zarr_store(made["grid"]))
    expected = grid.embedding.sel(lon=2.35, lat=48.86, method="nearest").values.sum(dtype="float64")
    assert float(ran.stdout) == expected


def test_a_second_run_finds_everything_there(made, cluster, monkeypatch):
    from flows.sample import sample

    monkeypatch.setenv("RANGEGRID_CLUSTER", cluster)
    before = storage.read(storage.join(made["patches"], "manifest.parquet"))
    assert sample(SAMPLE) == made["patches"]
    assert storage.read(storage.join(made["patches"], "manifest.parquet")) == before


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("RANGEGRID_STAC_URL", "http://{nobody}", "no STAC API answers at"),
        ("RANGEGRID_COLLECTION", "landsat", "no collection 'landsat'"),
        ("RANGEGRID_STORAGE_URL", "s3://no-such-bucket-here", "does not exist"),
    ],
)
def test_a_wrong_place_is_one_sentence(sandbox, prefect, nobody, monkeypatch, variable, value, message):
    from flows.sample import sample

    monkeypatch.setenv(variable, value.format(nobody=nobody))
    with pytest.raises(UserError, match=message):
        sample(SAMPLE.model_copy(update={"seed": 9}))


def test_nothing_found_is_one_sentence(sandbox, prefect, cluster, monkeypatch):
    from flows.sample import sample

    monkeypatch.setenv("RANGEGRID_CLUSTER", cluster)
    with pytest.raises(UserError, match=r"only 0 of 5 patches .* widen --datetime"):
        sample(SAMPLE.model_copy(update={"datetime": "1999-01-01/1999-12-31", "patches": 5}))


REGION = {"region": ("-5 43 8 50",), "spacing_km": 180.0, "sample": SAMPLE}


def test_a_region_is_joined_to_the_base_and_scored_beside_it(made, cluster, monkeypatch):
    """Nothing is trained; the places are the world's; the report compares two grids of the same cells."""
    monkeypatch.setenv("RANGEGRID_CLUSTER", cluster)
    publish, evaluate = PublishParams(step=1.0, promote=False), EvaluateParams(points=300, folds=2)
    base = (made["checkpoint"], made["database"])
    urls = pipeline(PipelineParams(**REGION, base=base, publish=publish, evaluate=evaluate))
    assert list(urls) == ["patches", "own-database", "database", "base-grid", "grid", "report"]
    own, joined = open_database(urls["own-database"]), open_database(urls["database"])
    lon, lat = own.locations.T
    assert len(own.keys) > 10
    assert ((lon >= -5) & (lon <= 8) & (lat >= 43) & (lat <= 50)).all()
    world = open_database(made["database"])
    places = np.concatenate([world.locations, own.locations])
    assert len(joined.keys) == len(np.unique(places.round(7), axis=0)) > 30  # the same place of both is one
    grids = [xr.open_zarr(storage.zarr_store(urls[name])).embedding for name in ("base-grid", "grid")]
    held = [np.isfinite(grid.values[0]) for grid in grids]
    np.testing.assert_array_equal(*held)
    rows = json.loads(storage.read(storage.join(urls["report"], "scores.json")))
    compared = {row["embedder"]: row for row in rows if row["places"] == "base grid, grid"}
    assert compared["grid"]["reference"] == "base grid"
    assert compared["grid"]["blocked_splits"] != compared["base grid"]["blocked_splits"]


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (("file:///nowhere/checkpoint", "file:///nowhere/database"), "no finished checkpoint"),
        (("nowhere", "elsewhere"), "no finished checkpoint"),
    ],
)
def test_a_base_that_is_none_is_refused_before_any_work(sandbox, cluster, monkeypatch, base, message):
    monkeypatch.setenv("RANGEGRID_CLUSTER", cluster)
    before = storage.names(storage.join(settings().storage_url, "patches"))
    with pytest.raises(UserError, match=message):
        pipeline(PipelineParams(**REGION | {"spacing_km": 500.0}, base=base))
    assert storage.names(storage.join(settings().storage_url, "patches")) == before


def test_a_base_is_two():
    with pytest.raises(ValueError, match="one: give two, a checkpoint and the database"):
        PipelineParams(base=("one",))
