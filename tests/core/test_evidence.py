"""Evidence and compact products against float64, scikit-learn and pyproj."""

import subprocess
import sys

import numpy as np
import pytest
from pyproj import Geod
from sklearn.decomposition import PCA

from tasks.core.compact import Projection
from tasks.core.earth.sphere import unit_vectors
from tasks.core.evidence import evidence
from tasks.core.retrieval import Method, RetrievalIndex
from tests.core.test_retrieval import RNG, SPECIAL, close, database, places, softmax, unit
from tests.test_architecture import ROOT

SPHERE = Geod(a=6371008.8, b=6371008.8)


def weights(index, queries, lonlat, method):
    keys, _, where = (a.astype(np.float64) for a in index)
    semantic = softmax(method.semantic * queries.astype(np.float64) @ keys.T)
    if method.name == "range":
        return semantic
    geodesic = softmax(method.geodesic_temperature * unit_vectors(lonlat) @ unit_vectors(where).T)
    return method.beta * semantic + (1 - method.beta) * geodesic


@pytest.mark.parametrize("method", [Method("range"), Method(), Method(beta=0), Method(beta=1), Method(temperature=500)])
@pytest.mark.parametrize("rows", [1, 700])
def test_evidence_is_that_of_the_weights(method, rows):
    index, lonlat = database(rows), np.concatenate([places(60), SPECIAL])
    queries = unit(RNG.normal(size=(65, 16)))
    found = evidence(RetrievalIndex(*index), queries, lonlat, method, top=3)
    w = weights(index, queries, lonlat, method)
    entropy = -np.sum(w * np.log(np.where(w > 0, w, 1)), axis=1)
    np.testing.assert_allclose(found.images, np.exp(entropy), rtol=2e-4)
    np.testing.assert_allclose(found.largest, w.max(1), rtol=2e-4)
    named = np.take_along_axis(w, found.rows, 1)
    np.testing.assert_allclose(named, -np.sort(-w, axis=1)[:, :3], rtol=2e-4)


def test_hard_methods_rest_on_k_images():
    index, lonlat, queries = RetrievalIndex(*database(50)), places(4), unit(RNG.normal(size=(4, 16)))
    for method, k in ((Method("top1"), 1), (Method("topk", k=5), 5), (Method("topk", k=99), 50)):
        found = evidence(index, queries, lonlat, method, top=2)
        np.testing.assert_allclose(found.images, k, rtol=1e-5)
        np.testing.assert_allclose(found.largest, 1 / k, rtol=1e-6)
        assert found.rows.shape == (4, 2)
    with pytest.raises(ValueError, match="rests on no image"):
        evidence(index, queries, lonlat, Method("none"))


def test_distances_are_great_circles():
    keys, values, where = database(40)
    lonlat = np.concatenate([places(30), SPECIAL, where[:2], where[:1] + 1e-6])
    found = evidence(RetrievalIndex(keys, values, where), unit(RNG.normal(size=(len(lonlat), 16))), lonlat, Method())
    metres = [min(SPHERE.inv(lon, lat, *place)[2] for place in where.tolist()) for lon, lat in lonlat.tolist()]
    np.testing.assert_allclose(found.distance_km, np.array(metres) / 1000, rtol=1e-6, atol=1e-7)


def test_no_places_have_no_evidence():
    found = evidence(RetrievalIndex(*database(5)), np.empty((0, 16), np.float32), np.empty((0, 2)), Method(), top=2)
    assert found.images.shape == found.distance_km.shape == (0,)
    assert found.rows.shape == (0, 2)


def test_components_are_those_of_scikit_learn():
    values = (RNG.normal(size=(9000, 12)) * np.arange(1, 13) + 5).astype(np.float32)
    ours, theirs = Projection.fit(values, 4), PCA(4).fit(values.astype(np.float64))
    assert ours.explained == pytest.approx(theirs.explained_variance_ratio_.sum(), rel=1e-5)
    for mine, other in zip(ours.components.T, theirs.components_, strict=True):
        close(mine * np.sign(mine @ other), other, 1e-4)


@pytest.mark.parametrize("method", [Method(), Method("range"), Method("topk")])
def test_compact_retrieval_is_the_projection_of_the_whole(method):
    keys, values, where = database(6000, v=12)
    projection = Projection.fit(values, 5)
    queries, lonlat = unit(RNG.normal(size=(50, 16))), places(50)
    whole = RetrievalIndex(keys, values, where).retrieve(queries, lonlat, method)
    compact = RetrievalIndex(keys, projection.apply(values), where).retrieve(queries, lonlat, method)
    close(compact, projection.apply(whole), 2e-6, scale=1)


def test_all_components_restore_the_values():
    values = database(100, v=6)[1]
    projection = Projection.fit(values, 6)
    assert projection.explained == pytest.approx(1)
    close(projection.apply(values) @ projection.components.T + projection.mean, values, 1e-5)
    with pytest.raises(ValueError, match="values of length 6 have no 7 components"):
        Projection.fit(values, 7)


MEMORY = """
import threading
import numpy as np
import torch
from tasks.core.evidence import evidence
from tasks.core.retrieval import Method, RetrievalIndex
from tests.benchmarks.memory import resident
from tests.core.test_retrieval import unit

torch.set_num_threads(1)
rng = np.random.default_rng(0)
images, places = (np.column_stack([rng.uniform(-180, 180, n), rng.uniform(-80, 80, n)]) for n in (4000, 5000))
index = RetrievalIndex(unit(rng.normal(size=(4000, 32))), rng.normal(size=(4000, 8)).astype("f4"), images)
queries, before = unit(rng.normal(size=(5000, 32))), resident("VmRSS")
tiles = [threading.Thread(target=evidence, args=(index, queries, places, Method())) for _ in range(2)]
[tile.start() for tile in tiles]
[tile.join() for tile in tiles]
print(resident("VmHWM") - before)
"""


def test_memory_is_that_of_one_turn():
    """Two tiles of 5,000 places at once: 4 MB of places and two times 16 MB of weights each, not gigabytes of gaps."""
    ran = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) < 200
