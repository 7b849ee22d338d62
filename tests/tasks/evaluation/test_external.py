"""Embedders of other projects: tables of vectors aligned by place, and functions, in one table of scores with ours."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler

from infra import storage
from infra.errors import UserError
from tasks.core.probes import random_split
from tasks.evaluate import evaluate_database
from tasks.evaluation.embedders import embedders
from tasks.evaluation.fusion import parts_of
from tasks.params import EvaluateParams

COUNT = 300
LONLAT = np.random.default_rng(0).uniform([-180, -80], [180, 80], (COUNT, 2)).round(5)
LONLAT[0] = (180, 10)
MODULE = """
import numpy as np
import torch

def waves(lonlat):
    return torch.from_numpy(np.sin(np.radians(lonlat)))

def north(lonlat):
    return np.where(lonlat[:, 1:] > 0, lonlat, np.nan)

def flat(lonlat):
    return lonlat[:, 0]

def broken(lonlat):
    raise OSError("no weights")

number = 3
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    (tmp_path / "vectors_of_others.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return "vectors_of_others"


@pytest.fixture
def labels(tmp_path, monkeypatch):
    """A label that the vectors hold."""
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", (tmp_path / "out").as_uri())
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(COUNT, 4)).astype("f4")
    label = vectors @ [1.0, -2, 0.5, 0] + 0.5 * rng.normal(size=COUNT)
    pd.DataFrame({"lon": LONLAT[:, 0], "lat": LONLAT[:, 1], "elevation": label}).to_csv(tmp_path / "e.csv", index=False)
    return tmp_path / "e.csv", vectors, label


def columns(vectors, order):
    """A table in another order than the labels, with one longitude written the other way round, and the label in it."""
    table = pd.DataFrame({"lat": LONLAT[:, 1], "lon": LONLAT[:, 0], "elevation": 7.0, "row": "a"})
    table.loc[0, "lon"] = -180.0
    for i in (3, 0, 2, 1):
        table[f"A{i:02d}"] = vectors[:, i]
    return table.iloc[order]


def scores(*embedder, labels, **params):
    params = EvaluateParams(labels=(str(labels),), embedder=embedder, folds=3, fold_seeds=1, **params)
    return json.loads(storage.read(f"{evaluate_database(None, None, params)}/scores.json"))


def test_vectors_of_a_table_are_aligned_by_place_and_stand_beside_ours(labels, tmp_path, package):
    """Scores of scikit-learn's probe on the vectors in the labels' own order; lists and columns are one embedder."""
    table, vectors, label = labels
    order = np.random.default_rng(2).permutation(COUNT)
    columns(vectors, order).to_parquet(tmp_path / "aef.parquet")
    lists = pa.table({"lon": LONLAT[order, 0], "lat": LONLAT[order, 1], "ids": [[1, 2]] * COUNT,
                      "embedding": pa.array(list(vectors[order]), pa.list_(pa.float32(), 4))})  # fmt: skip
    pq.write_table(lists, tmp_path / "lists.parquet")
    split = random_split(COUNT)
    probe = make_pipeline(MinMaxScaler(), RidgeCV(alphas=(0.1, 1.0, 10.0), cv=3))
    probe.fit(vectors[split.train].astype("f8"), label[split.train])
    expected = probe.score(vectors[split.test].astype("f8"), label[split.test])
    found = scores(f"AEF={tmp_path / 'aef.parquet'}", f"Lists={tmp_path / 'lists.parquet'}", "coordinates",
                   f"AEF={tmp_path / 'aef.parquet'}+Waves={package}:waves", labels=table)  # fmt: skip
    by_name = {row["embedder"]: row for row in found}
    assert list(by_name) == ["AEF", "Lists", "coordinates", "Waves", "AEF + Waves"]
    assert {row["places"] for row in found} == {"all"}
    assert by_name["AEF"]["random_splits"] == pytest.approx([expected], abs=1e-5)
    assert by_name["Lists"]["random_splits"] == pytest.approx([expected], abs=1e-5)
    assert (by_name["AEF"]["dims"], by_name["AEF + Waves"]["dims"]) == (4, 6)
    assert by_name["AEF"]["blocked_splits"] == by_name["Lists"]["blocked_splits"]


def test_places_that_a_table_lacks_are_scored_apart(labels, tmp_path, package):
    table, vectors, _ = labels
    columns(vectors, np.arange(50, COUNT)).to_csv(tmp_path / "part.csv", index=False)
    found = scores(f"part={tmp_path / 'part.csv'}", f"north={package}:north", "coordinates", labels=table)
    told = {(row["embedder"], row["places"]): (row["n"], row["left_out"]) for row in found}
    north = int((LONLAT[:, 1] > 0).sum())
    assert told["part", "part"] == told["coordinates", "part"] == (COUNT - 50, 50)
    assert told["north", "north"] == (north, COUNT - north)
    assert told["coordinates", "all"] == (COUNT, 0)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"v0": [1.0, 2], "w0": [1.0, 2]}, "numbered columns of several names, 'v…' and 'w…'"),
        ({"elevation": [1.0, 2]}, "has no vectors among its columns"),
        ({"v": [[1.0], [1.0, 2]]}, r"different lengths \(1, 2\)"),
        ({"v": [[1.0], [2.0]], "w": [[1.0], [2.0]]}, "lists of numbers in its columns v and w"),
        ({"v0": [1.0, 2], "lat": [3.0, 3.0]}, "two vectors at lon 1, lat 3"),
        ({"v0": [1.0, 2], "lat": [3.0, 95.0]}, "has no place in row 2"),
    ],
)
def test_tables_without_one_vector_a_place_are_refused(tmp_path, columns, message):
    pq.write_table(pa.table({"lon": [1.0, 1.0], "lat": [3.0, 4.0]} | columns), tmp_path / "v.parquet")
    with pytest.raises(UserError, match=message):
        embedders(None, None, None, EvaluateParams(embedder=(f"v={tmp_path / 'v.parquet'}",)))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("x=vectors_of_others:flat", r"gave an array \(2,\) for 2 places"),
        ("x=vectors_of_others:broken", "failed on 2 places .OSError: no weights"),
        ("x=vectors_of_others:number", "failed on 2 places"),
        ("x=vectors_of_others:gone", "was not found"),
        ("x=no_such_package.encoders:embed", "was not found"),
        ("x=os:system", "is a function of Python itself"),
        ("x=gone.parquet", "there is no table"),
        ("geoclip2=a b:c", "is unknown"),
        ("multi-head=vectors_of_others:waves", "has a name that is taken"),
    ],
)
def test_what_is_no_embedder_is_refused(package, spec, message):
    with pytest.raises(UserError, match=message):
        embedders(None, None, None, EvaluateParams(embedder=(spec,)))


@pytest.mark.parametrize(
    "parts",
    [
        ["a=x+y.parquet", "range+"],
        ["range+", "a=p.q:f"],
        ["a=p.q:f", "my own=x.csv.gz", "geoclip"],
        ["a=s3://b/x.parquet", "b=s3://b/y.parquet"],
    ],
)
def test_those_of_others_are_fused_too(parts):
    assert parts_of("+".join(parts), ("range+", "range", "geoclip")) == parts
