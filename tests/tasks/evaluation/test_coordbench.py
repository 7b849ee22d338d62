"""CoordBench: its probes against torchgeo-bench's own code, its tables, and its leaderboard."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from infra import storage
from infra.errors import UserError
from tasks.evaluate import evaluate_database
from tasks.evaluation.coordbench import SOURCES, family_of, leaderboard, read_suite
from tasks.params import AblateParams, EvaluateParams, PipelineParams

ORACLE = Path(__file__).parents[2] / "oracles" / "coordbench.csv"
EMBEDDERS = ("unit vectors", "wrap")
COUNT = 400


def write_suite(folder):
    """Tables of the published layout, of made up labels: classes, numbers, a test set, nulls and nodata."""
    rng = np.random.default_rng(0)
    lon, lat = rng.uniform(-180, 180, COUNT).round(4), rng.uniform(-60, 75, COUNT).round(4)
    noise = rng.normal(size=(8, COUNT))
    country = np.array([f"c{int(x // 60)}" for x in lon + 180], object)
    country[rng.choice(COUNT, 50)] = "c1"
    country[:3] = None
    warm = 30 * np.cos(np.radians(lat)) + 2 * noise[0]
    warm[5] = np.nan
    income = np.exp(2 + np.sin(np.radians(lon)) + 0.3 * noise[1])
    income[7:9] = -999
    place = {"lon": lon, "lat": lat}
    indices = ["asset_index", "water_index", "sanitation_index", "under5_mort", "women_edu", "women_bmi"]
    survey = {name: np.sin(np.radians(lon * (i + 1) / 2)) + 0.4 * noise[2 + i] for i, name in enumerate(indices)}
    survey["women_bmi"][::7] = np.nan
    split = np.where(np.arange(COUNT) % 4 == 0, "test", "trainval")
    tables = {
        "country": {**place, "country": country},
        "air_temp": {"Lon": lon, "Lat": lat, "meanT": warm},
        "usavars_income": {**place, "id": np.arange(COUNT), "income": income},
        "sustainbench": {**place, **survey, "split": split},
        "dm_glance": {**place, "label": ((lat + 60) // 30 + (noise[0] > 1)).astype(int), "timestamp": [None] * COUNT},
    }
    for name, columns in tables.items():
        (folder / "data" / name).mkdir(parents=True)
        pd.DataFrame(columns).to_parquet(folder / "data" / name / "data.parquet")
    return folder


@pytest.fixture
def report(tmp_path, monkeypatch):
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", (tmp_path / "out").as_uri())
    write_suite(tmp_path / "suite")
    params = EvaluateParams(suite="coordbench", data=str(tmp_path / "suite"), embedder=EMBEDDERS)
    return evaluate_database(None, None, params), params


def test_scores_are_torchgeo_benchs_to_a_millionth(report):
    """Recorded from its own probes on these tables: python -m tests.oracles.coordbench PROBE."""
    url, params = report
    keys = ["model_name", "dataset", "task", "method", "split"]
    ours = pd.DataFrame(json.loads(storage.read(f"{url}/scorecard.json"))["scores"]).set_index(keys)
    theirs = pd.read_csv(ORACLE).set_index(keys)
    assert set(ours.index) == set(theirs.index)
    np.testing.assert_allclose(ours.loc[theirs.index, "metric_value"], theirs["metric_value"], atol=1e-6)
    np.testing.assert_allclose(ours.loc[theirs.index, "ci_lower"], theirs["ci_lower"], atol=1e-6)
    assert evaluate_database(None, None, params) == url
    assert "spatial, knn: mean rank (mean score), 2 sets" in storage.read(f"{url}/scores.md").decode()


def test_tables_are_read_as_the_suite_reads_them(tmp_path, caplog):
    found = {one.name: one for one in read_suite(write_suite(tmp_path).as_uri())}
    assert next(iter(found)) == "satclip-air-temp"
    assert len(found) == 10
    assert len(found["mosaiks-income"].lonlat) == COUNT - 2  # nodata is left out, and the rest is log(1 + label)
    assert found["mosaiks-income"].tasks["income"].max() < 5
    assert found["dm-glance"].kind == "classification"
    assert found["sustainbench-women_bmi"].scored.mean() == pytest.approx(0.25, abs=0.02)
    assert "whose tables are not there" in caplog.text
    assert len(SOURCES) == 40


def test_the_leaderboard_is_of_mean_ranks_by_family():
    """By hand: two sets of one family and one of another, with tasks that count together and a floor."""
    rows = [
        ("a", "country", "c", 0.9), ("b", "country", "c", 0.8),
        ("a", "satclip-elevation", "e", 0.2), ("b", "satclip-elevation", "e", 0.5),
        ("a", "bt-bioclim", "x", -90.0), ("a", "bt-bioclim", "y", 1.0), ("b", "bt-bioclim", "x", 0.0),
        ("b", "bt-bioclim", "y", -0.5),
    ]  # fmt: skip
    scores = pd.DataFrame(rows, columns=["model_name", "dataset", "task", "metric_value"])
    scores = scores.assign(split="random", method="linear", metric_name="r2")
    board = leaderboard(scores, "random", "linear")
    assert board.loc["a", ["env", "land", "macro"]].tolist() == pytest.approx([1.5, 1.0, 4 / 3])
    assert board.loc["a", "env score"] == pytest.approx((0.2 + 0.0) / 2)
    assert board.index[0] == "a"
    assert [family_of(name) for name in ("bt-bioclim", "country", "places-copd")] == ["env", "land", "socio"]


def test_what_is_no_suite_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no data/NAME/data"):
        read_suite(tmp_path.as_uri())
    (tmp_path / "data" / "country").mkdir(parents=True)
    pd.DataFrame({"lon": [1.0], "lat": [2.0]}).to_parquet(tmp_path / "data" / "country" / "data.parquet")
    with pytest.raises(UserError, match="is not as published"):
        read_suite(tmp_path.as_uri())
    for build, given, message in (
        (EvaluateParams, {"suite": "coordbench"}, "go together"),
        (EvaluateParams, {"suite": "coordbench", "data": "x", "region": ("KE",)}, "has its own places"),
        (AblateParams, {"suite": "coordbench", "data": "x"}, "ablations are scored on labels"),
        (PipelineParams, {"evaluate": {"suite": "coordbench", "data": "x"}}, "score a suite by evaluate"),
    ):
        with pytest.raises(ValueError, match=message):
            build.model_validate(given)
