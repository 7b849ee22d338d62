"""GeoCLIP beside the package's own class."""

import sys
from importlib import import_module
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import torch

from infra.packages import data_file
from tasks.core.probes import random_split, score
from tasks.evaluation.label_tables import read_labels
from tasks.model.geoclip import WEIGHTS, embed_geoclip
from tasks.params import EvaluateParams


@pytest.fixture
def published(monkeypatch):
    """The package's location encoder; its parents are stand-ins, since they import an image tower."""
    home = data_file("geoclip", WEIGHTS).parents[2]
    for name, path in (("geoclip", home), ("geoclip.model", home / "model")):
        parent = ModuleType(name)
        parent.__path__ = [str(path)]
        monkeypatch.setitem(sys.modules, name, parent)
    return import_module("geoclip.model.location_encoder").LocationEncoder().eval()


def test_geoclip_is_the_published_one(published, monkeypatch):
    monkeypatch.undo()  # the package is found again as it is installed
    rng = np.random.default_rng(0)
    lonlat = np.column_stack([rng.uniform(-180, 180, 50), rng.uniform(-85, 85, 50)])
    with torch.no_grad():
        expected = published(torch.from_numpy(lonlat[:, ::-1].copy()).float())
    np.testing.assert_allclose(embed_geoclip(lonlat), expected, atol=1e-4)


def test_a_label_that_the_embedding_holds_scores_its_share_of_the_variance(published, monkeypatch, tmp_path):
    """A table whose labels are a direction of the package's embeddings, variance 1, and noise, variance 1/25."""
    monkeypatch.undo()
    rng = np.random.default_rng(0)
    lonlat = np.column_stack([rng.uniform(-180, 180, 3000), rng.uniform(-85, 85, 3000)])
    with torch.no_grad():
        embedded = published(torch.from_numpy(lonlat[:, ::-1].copy()).float()).double().numpy()
    signal = embedded @ rng.normal(size=embedded.shape[1])
    labels = (signal - signal.mean()) / signal.std() + 0.2 * rng.normal(size=3000)
    pd.DataFrame({"Lon": lonlat[:, 0], "Lat": lonlat[:, 1], "meanT": labels}).to_csv(tmp_path / "t.csv", index=False)
    (table,) = read_labels(EvaluateParams(labels=(str(tmp_path / "t.csv"),)))
    found = score(embed_geoclip(table.lonlat), table.labels, table.kind, random_split(len(table.labels)))
    assert found == pytest.approx(1 / 1.04, abs=0.03)


def test_geoclip_scores_what_the_paper_says(fixtures_dir):
    """Table 2 of arXiv 2502.19781: R² 0.916 of temperature, 0.604 of elevation (here a draw: fewer points, lower)."""
    names = ("temperature_stations.csv", "mosaiks_elevation.csv.gz")
    params = EvaluateParams(labels=tuple(str(fixtures_dir / "labels" / name) for name in names), points=8000)
    temperature, elevation = (
        score(embed_geoclip(s.lonlat), s.labels, s.kind, random_split(len(s.labels))) for s in read_labels(params)
    )
    assert temperature == pytest.approx(0.916, abs=0.005)
    assert 0.5 < elevation < 0.65
