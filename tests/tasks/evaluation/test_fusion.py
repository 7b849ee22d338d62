"""Fused embedders: their names, their vectors, and what they are worth above their parts, by the command's products."""

import json

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from typer.testing import CliRunner

from flows.cli import app
from infra import storage
from infra.errors import UserError
from tasks.core.earth.grid import GridSpec
from tasks.core.earth.sphere import unit_vectors
from tasks.core.encoders.encodings import wrap
from tasks.core.probes import random_split
from tasks.evaluate import evaluate_database
from tasks.evaluation.embedders import NAMES, embedders
from tasks.evaluation.fusion import complementarity, markdown, parts_of
from tasks.grid.store import Content, create, template, write_tile
from tasks.params import EvaluateParams

PLACES = np.random.default_rng(0).uniform([-180, -80], [180, 80], (400, 2))


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("range+", ["range+"]),
        ("geoclip+range+", ["geoclip", "range+"]),
        ("range++geoclip", ["range+", "geoclip"]),
        ("range+geoclip", ["range", "geoclip"]),
        ("range+range+", ["range", "range+"]),
        ("range++range", ["range+", "range"]),
        ("RANGE+ + GeoCLIP + location encoder", ["RANGE+", "GeoCLIP", "location encoder"]),
        ("a+b.zarr", ["a+b.zarr"]),
        ("a.zarr+b.zarr", ["a.zarr", "b.zarr"]),
        ("wrap+https://h/a+b.zarr?q=1+2", ["wrap", "https://h/a+b.zarr?q=1+2"]),
        ("s3://b/a+b.zarr/+range+", ["s3://b/a+b.zarr/", "range+"]),
        ("satclip=/a+b/x.ckpt+range++sinr=y", ["satclip=/a+b/x.ckpt", "range+", "sinr=y"]),
        ("satclip=/a+b/x+y.ckpt", ["satclip=/a+b/x+y.ckpt"]),
        ("satellite+geoclip", ["satellite", "geoclip"]),
        ("geoclip+satellite", ["geoclip", "satellite"]),
        ("geoclip+", ["geoclip", ""]),
    ],
)
def test_a_plus_sign_joins_ends_a_name_or_is_of_a_path(spec, parts):
    assert parts_of(spec, NAMES) == parts


@pytest.mark.parametrize("names", [(a, b) for a in NAMES for b in NAMES])
def test_any_two_names_are_split_as_they_were_joined(names):
    assert parts_of("+".join(names), NAMES) == list(names)


@pytest.mark.parametrize(
    ("embedder", "message"),
    [
        (("geoclip+satellite",), "the embedder 'satellite' is unknown: use coordinates"),
        (("satellite+geoclip",), "the embedder 'satellite' is unknown"),
        (("geoclip+",), r"'geoclip\+' needs two or more different ones"),
        (("wrap+geoclip+Wrap",), "needs two or more different ones, each once"),
        (("wrap+range+",), r"'range\+' is ours: name the checkpoint"),
        (("wrap+gone.zarr",), "there is nothing at"),
        ((" ",), "the embedder ' ' is unknown"),
    ],
)
def test_what_cannot_be_fused_is_refused(embedder, message):
    with pytest.raises(UserError, match=message):
        embedders(None, None, None, EvaluateParams(embedder=embedder))


def test_parts_stand_before_what_is_fused_of_them_and_each_row_once():
    found = embedders(None, None, None, EvaluateParams(embedder=("wrap+theory", "theory", "wrap + satclip")))
    assert [one.name for one in found] == ["wrap", "theory", "wrap + theory", "SatCLIP", "wrap + SatCLIP"]
    vectors = {one.name: one.embed(PLACES) for one in found if one.embed}
    assert np.array_equal(vectors["wrap + theory"], np.hstack([vectors["wrap"], vectors["theory"]]))
    assert "wrap + SatCLIP" not in vectors


@pytest.fixture
def grid(tmp_path):
    """A grid of unit vectors, without any north of 50 degrees."""
    url, spec = (tmp_path / "units.zarr").as_uri(), GridSpec(10, 20)
    create(url, spec, template(spec, Content(2, 1), {}))
    for tile in spec.tiles():
        lonlat = spec.lonlat(tile)
        vectors = np.moveaxis(unit_vectors(lonlat.reshape(-1, 2)).reshape(*lonlat.shape[:2], 3), 2, 0)
        write_tile(url, tile, np.where(lonlat[..., 1] > 50, np.nan, vectors).astype(np.float32))
    return url


def test_a_place_that_one_part_lacks_the_fused_lacks_too(grid):
    *_, fused = embedders(None, None, None, EvaluateParams(embedder=(f"wrap+{grid}",)))
    vectors = fused.embed(PLACES)
    assert fused.partial
    assert (np.isnan(vectors).all(1) == (PLACES[:, 1] > 50)).all()
    assert np.array_equal(vectors[PLACES[:, 1] <= 50, :4], wrap(PLACES)[PLACES[:, 1] <= 50].astype(np.float32))


@pytest.fixture
def labels(tmp_path, monkeypatch):
    """A table whose label is of two parts: longitude's cosine, which `wrap` has, and latitude times longitude."""
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", (tmp_path / "out").as_uri())
    lon, lat = PLACES.T
    values = np.cos(np.radians(lon)) + 0.01 * lat + 0.3 * np.random.default_rng(1).normal(size=400)
    pd.DataFrame({"lon": lon, "lat": lat, "of two": values}).to_csv(tmp_path / "labels.csv", index=False)
    return {"labels": (str(tmp_path / "labels.csv"),), "label": "of two", "kind": "regression", "folds": 3}


def test_the_index_is_the_share_of_what_the_best_part_left(labels, grid):
    """Of the score card's rows by the formula, and the fused row by scikit-learn."""
    asked = ("wrap+coordinates", f"coordinates+{grid}", "satclip+wrap")
    url = evaluate_database(None, None, EvaluateParams(**labels, embedder=asked))
    card = json.loads(storage.read(storage.join(url, "scorecard.json")))
    rows = {(row["places"], row["embedder"]): row for row in card["scores"]}
    held = f"{grid}, coordinates + {grid}"
    found = {(row["embedder"], row["split"]): row for row in card["complementarity"]}
    for places, name, parts in (
        ("all", "wrap + coordinates", ["wrap", "coordinates"]),
        (held, f"coordinates + {grid}", ["coordinates", grid]),
    ):
        for split in ("random", "blocked"):
            score = {part: rows[places, part][split] for part in (*parts, name)}
            best = max(parts, key=lambda part: score[part])
            assert found[name, split]["best_part"] == best
            assert found[name, split]["index"] == pytest.approx(
                (score[name] - score[best]) / (1 - score[best]), abs=1e-4
            )
    assert found["SatCLIP + wrap", "blocked"]["index"] is None
    assert rows["all", "SatCLIP + wrap"]["note"] == "weights not given"
    table = pd.read_csv(labels["labels"][0])["of two"].to_numpy()
    split, probe = random_split(len(PLACES)), make_pipeline(MinMaxScaler(), RidgeCV(alphas=[0.1, 1, 10], cv=3))
    features = np.hstack([wrap(PLACES), PLACES])
    expected = probe.fit(features[split.train], table[split.train]).score(features[split.test], table[split.test])
    assert rows["all", "wrap + coordinates"]["random"] == pytest.approx(expected, abs=1e-3)
    assert rows[held, "coordinates"]["n"] == (PLACES[:, 1] <= 50).sum()


def test_a_part_of_large_numbers_drowns_no_other(labels, monkeypatch):
    asked = EvaluateParams(**labels, embedder=("unit vectors+coordinates",))
    first = evaluate_database(None, None, asked)
    monkeypatch.setitem(embedders.__globals__["FIXED"], "coordinates", lambda lonlat: 1e4 * lonlat + 3e4)
    second = evaluate_database(None, None, asked.model_copy(update={"near_km": 2.0}))
    assert first != second
    one, other = (pd.read_csv(storage.join(url, "scores.csv"))["blocked"] for url in (first, second))
    np.testing.assert_allclose(one, other, atol=1e-3)


def test_a_perfect_part_leaves_nothing_to_share():
    table = pd.DataFrame(
        [("all", "t", name, score, score) for name, score in (("a", 1.0), ("b", 0.5), ("a + b", 1.0))],
        columns=["places", "task", "embedder", "random", "blocked"],
    )
    assert complementarity(table, {"a + b": ("a", "b")})["index"].isna().all()
    assert "| a + b | none |" in markdown(complementarity(table, {"a + b": ("a", "b")}))


def test_the_command_prints_index_and_uncertainty(labels, prefect):
    options = ["--labels", labels["labels"][0], "--label", "of two", "--kind", "regression", "--folds", "3"]
    ran = CliRunner().invoke(app, ["evaluate", *options, "--embedder", "wrap+coordinates"])
    assert ran.exit_code == 0, ran.output
    assert "| complementarity, random / blocked | of two |" in ran.stdout
    assert "| wrap + coordinates | +" in ran.stdout
    assert "| covered of 0.90 promised; mean size | random | blocked | blocked, by distance |" in ran.stdout
    assert "| Spearman's correlation with the error | feature distance | km to labels |" in ran.stdout
