"""The uncertainty in a report: regions against scikit-learn's probes and sorted lists, by the command and its files."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import rankdata
from sklearn.linear_model import RidgeClassifierCV, RidgeCV
from sklearn.metrics.pairwise import haversine_distances
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler

from infra import storage
from tasks.core.encoders.encodings import wrap
from tasks.core.probes import block_of, random_split
from tasks.evaluate import evaluate_database
from tasks.params import EvaluateParams

COUNT, FOLDS = 600, 3
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def places():
    """Places, and labels that no probe knows well beyond 60 degrees east: numbers, and classes of which one is rare."""
    rng = np.random.default_rng(0)
    lon, lat = rng.uniform(-170, 170, COUNT), rng.uniform(-60, 70, COUNT)
    noise = np.where(lon > 60, 0.8, 0.1) * rng.normal(size=COUNT)
    height = np.cos(np.radians(lon)) + noise
    kinds = np.where((lon > 150) & (lat > 40), "alone", np.where(height > 0.3, "high", "low"))
    return pd.DataFrame({"lon": lon, "lat": lat, "height": height, "kind": kinds})


@pytest.fixture
def table(places, tmp_path, monkeypatch):
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", (tmp_path / "out").as_uri())
    places.to_csv(tmp_path / "labels.csv", index=False)
    return str(tmp_path / "labels.csv")


def evaluated(table, label, kind):
    options = EvaluateParams(labels=(table,), label=label, kind=kind, embedder=("wrap",), folds=FOLDS)
    url = evaluate_database(None, None, options)
    return url, json.loads(storage.read(storage.join(url, "scorecard.json")))["uncertainty"]


def sorted_rank(scores):
    """The ceil((n + 1) * 0.9)-th smallest."""
    rank = -((len(scores) + 1) * 9 // -10)
    return sorted(scores)[rank - 1] if rank <= len(scores) else math.inf


def by_hand(places, scores_of):
    """Scores of each fold's places by scikit-learn, their folds, and the scores of the random split's test places."""
    features, lonlat = wrap(places[["lon", "lat"]].to_numpy()), places[["lon", "lat"]].to_numpy()
    scores, fold = np.empty(COUNT), np.empty(COUNT, int)
    splitter = GroupKFold(FOLDS, shuffle=True, random_state=42)
    for number, (train, test) in enumerate(splitter.split(lonlat, groups=block_of(lonlat, 10))):
        scores[test], fold[test] = scores_of(features, train, test), number
    split = random_split(COUNT)
    return scores, fold, scores_of(features, split.train, split.test)


def check(found, scores, fold, random):
    rows = {row["calibration"]: row for row in found["uncertainty"]}
    assert list(rows) == ["random", "blocked", "blocked, by distance"]
    assert {row["promised"] for row in rows.values()} == {0.9}
    for name in ("random", "blocked"):
        limits = [sorted_rank(random if name == "random" else scores[fold != each]) for each in range(FOLDS)]
        shares = [(scores[fold == each] <= limit).mean() for each, limit in enumerate(limits)]
        assert rows[name]["covered"] == pytest.approx((scores <= np.array(limits)[fold]).mean(), abs=2e-3)
        assert rows[name]["covered_std"] == pytest.approx(np.std(shares, ddof=1), abs=4e-3)
        assert rows[name]["covered_least"] == pytest.approx(min(shares), abs=6e-3)
        yield rows[name], np.array(limits)


def test_intervals_are_those_of_scikit_learn_and_a_sorted_list(places, table):
    labels = places["height"].to_numpy()

    def errors(features, train, test):
        probe = make_pipeline(MinMaxScaler(), RidgeCV(alphas=[0.1, 1, 10], cv=3)).fit(features[train], labels[train])
        return np.abs(probe.predict(features[test]) - labels[test])

    url, found = evaluated(table, "height", "regression")
    scores, fold, random = by_hand(places, errors)
    for row, limits in check(found, scores, fold, random):
        assert row["size"] == pytest.approx(2 * limits[fold].mean(), rel=1e-3)
        assert (row["size_of"], row["label_std"]) == ("interval", pytest.approx(labels.std()))
    assert {"uncertainty.csv", "uncertainty.md", "signals.csv", "uncertainty-height.png"} <= set(storage.names(url))
    signals = {row["signal"]: row["spearman"] for row in found["signals"]}
    lonlat, km = np.radians(places[["lat", "lon"]].to_numpy()), np.empty(COUNT)
    for each in range(FOLDS):
        apart = 6371.0088 * haversine_distances(lonlat[fold == each], lonlat[fold != each])
        km[fold == each] = np.sort(apart, axis=1)[:, :10].mean(1)
    assert signals["km to labels"] == pytest.approx(np.corrcoef(rankdata(km), rankdata(scores))[0, 1], abs=5e-3)
    assert set(signals) == {"feature distance", "km to labels"}


@pytest.mark.filterwarnings("ignore:The least populated class")
def test_sets_hold_every_class_that_could_be_and_one_that_was_never_seen_is_in_none(places, table):
    labels = places["kind"].to_numpy()

    def one_minus_output(features, train, test):
        probe = make_pipeline(MinMaxScaler(), RidgeClassifierCV(alphas=[0.1, 1, 10], cv=10))
        outputs = probe.fit(features[train], labels[train]).decision_function(features[test])
        if outputs.ndim == 1:  # of two classes, scikit-learn gives the output of the second
            outputs = np.column_stack([-outputs, outputs])
        scores = np.full((len(test), 3), np.inf)
        scores[:, np.searchsorted(["alone", "high", "low"], probe[-1].classes_)] = 1 - outputs
        return scores[np.arange(len(test)), np.searchsorted(["alone", "high", "low"], labels[test])]

    _, found = evaluated(table, "kind", "classification")
    scores, fold, random = by_hand(places, one_minus_output)
    for row, _ in check(found, scores, fold, random):
        assert 1 <= row["size"] <= 3
        assert (row["size_of"], row["label_std"]) == ("classes", None)


def test_far_places_have_wider_regions_where_their_errors_are_larger(places, table):
    """By distance the promise holds far from the labels too, where one width for all does not keep it."""
    far = places.assign(
        height=np.where(np.abs(places["lat"] - 5) > 45, 1.5, 0.05) * np.random.default_rng(1).normal(size=COUNT)
    )
    far.loc[(np.abs(far["lat"] - 5) > 45) & (far.index % 4 > 0), "height"] = np.nan  # fewer labels there
    far.to_csv(table, index=False)
    _, found = evaluated(table, "height", "regression")
    rows = {row["calibration"]: row for row in found["uncertainty"]}
    assert rows["blocked"]["covered_far"] < rows["blocked, by distance"]["covered_far"]
    assert rows["blocked, by distance"]["covered"] == pytest.approx(
        0.9, abs=4 * math.sqrt(0.09 / far["height"].count())
    )
    assert max(found["signals"], key=lambda row: row["spearman"])["spearman"] > 0.2


def test_classes_that_lie_in_one_block_make_sets_of_all_classes(places, table):
    """Half of the places have a class that no other block has: of these no set but that of all can promise .90."""
    own = (places["lon"] // 90).astype(int).astype(str)
    places.assign(kind=np.where(places["lat"] > 0, own, "all")).to_csv(table, index=False)
    options = EvaluateParams(
        labels=(table,), label="kind", kind="classification", embedder=("wrap",), folds=FOLDS, block_degrees=90
    )
    url = evaluate_database(None, None, options)
    rows = pd.read_csv(storage.join(url, "uncertainty.csv")).set_index("calibration")
    assert rows.loc["blocked", "size"] == 5
    assert rows.loc["blocked", "covered"] == 1
    assert rows.loc["random", "covered"] < 0.8
    assert "± 0.00, far 1.00; 5.0 classes" in storage.read(storage.join(url, "uncertainty.md")).decode()


def test_the_recipe_of_the_page_keeps_its_promise_on_places_of_other_blocks():
    """Labels of the demo's kind: noise that grows with the distance to Greenwich; new places in every fourth block."""
    page = (ROOT / "docs" / "evaluation.md").read_text()
    (recipe,) = re.findall(r"```python\n(import numpy.*?)```", page, re.DOTALL)
    rng = np.random.default_rng(0)
    lonlat = rng.uniform([-170, -60], [170, 70], (4000, 2))
    vectors = wrap(lonlat)
    labels = vectors[:, 0] + (0.1 + np.abs(vectors[:, 0])) * rng.normal(size=4000)
    inside = block_of(lonlat, 10) % 4 > 0
    given = {"lonlat": lonlat[inside], "vectors": vectors[inside], "labels": labels[inside], "new": vectors[~inside]}
    exec(recipe, given)
    covered = np.abs(labels[~inside] - given["predicted"]) <= given["half_width"]
    assert covered.mean() == pytest.approx(0.9, abs=4 * math.sqrt(0.09 / len(covered)) + 0.02)
