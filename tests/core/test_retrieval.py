"""Retrieval against a float64 brute force and against the authors' package."""

import numpy as np
import pytest
import rangegeo
import torch
from hypothesis import given
from hypothesis import strategies as st

from tasks.core.retrieval import Method, RetrievalIndex, embed, unit_vectors

RNG = np.random.default_rng(0)


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def places(n, rng=RNG):
    return np.column_stack([rng.uniform(-180, 180, n), np.degrees(np.arcsin(rng.uniform(-1, 1, n)))])


def database(n, d=16, v=8, seed=1):
    rng = np.random.default_rng(seed)
    return unit(rng.normal(size=(n, d))), rng.normal(size=(n, v)).astype(np.float32), places(n, rng)


def brute_force(index, queries, lonlat, method):
    keys, values, where = (a.astype(np.float64) for a in index)
    semantic = softmax(method.semantic * queries.astype(np.float64) @ keys.T) @ values
    if method.name == "range":
        return semantic
    geodesic = softmax(method.geodesic_temperature * unit_vectors(lonlat) @ unit_vectors(where).T) @ values
    return method.beta * semantic + (1 - method.beta) * geodesic


def softmax(logits):
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


SPECIAL = np.array([[0, 90], [13, -90], [180, 10], [-180, 10], [0, 0]], float)


@pytest.mark.parametrize("method", [Method("range"), Method("range+"), Method("range+", beta=0.2), Method("range+", 1)])
@pytest.mark.parametrize("rows", [1, 2, 5000])
def test_soft_retrieval_is_the_brute_force(method, rows):
    index = database(rows)
    lonlat = np.concatenate([places(700), SPECIAL])
    queries = unit(RNG.normal(size=(len(lonlat), 16)))
    found = RetrievalIndex(*index).retrieve(queries, lonlat, method)
    expected = brute_force(index, queries, lonlat, method)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_hard_retrieval_takes_the_nearest_images():
    keys, values, where = database(300)
    queries = unit(RNG.normal(size=(50, 16)))
    order = np.argsort(-(queries.astype(np.float64) @ keys.T.astype(np.float64)), axis=1)
    index = RetrievalIndex(keys, values, where)
    lonlat = places(50)
    np.testing.assert_array_equal(index.retrieve(queries, lonlat, Method("top1")), values[order[:, 0]])
    expected = values[order[:, :7]].mean(1)
    np.testing.assert_allclose(index.retrieve(queries, lonlat, Method("topk", k=7)), expected, rtol=1e-5, atol=1e-6)


@given(st.permutations(range(40)))
def test_the_order_of_the_database_changes_nothing(order):
    index = database(40)
    queries, lonlat = unit(RNG.normal(size=(3, 16))), places(3)
    one = RetrievalIndex(*index).retrieve(queries, lonlat, Method())
    other = RetrievalIndex(*(a[list(order)] for a in index)).retrieve(queries, lonlat, Method())
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@given(st.floats(0, 1))
def test_beta_is_linear(beta):
    index, queries, lonlat = RetrievalIndex(*database(40)), unit(RNG.normal(size=(3, 16))), places(3)
    ends = [index.retrieve(queries, lonlat, Method(beta=b)) for b in (0, 1)]
    mixed = index.retrieve(queries, lonlat, Method(beta=beta))
    np.testing.assert_allclose(mixed, (1 - beta) * ends[0] + beta * ends[1], rtol=1e-4, atol=1e-5)


def test_temperature_leads_from_the_mean_to_the_nearest():
    index, queries, lonlat = database(100), unit(RNG.normal(size=(5, 16))), places(5)
    found = RetrievalIndex(*index)
    flat = found.retrieve(queries, lonlat, Method("range", temperature=0.0))
    np.testing.assert_allclose(flat, np.broadcast_to(index[1].mean(0), flat.shape), rtol=1e-4, atol=1e-5)
    sharp = found.retrieve(queries, lonlat, Method("range", temperature=5000.0))
    np.testing.assert_allclose(sharp, found.retrieve(queries, lonlat, Method("top1")), atol=1e-3)


@pytest.mark.parametrize("name", ["RANGE", "RANGE+"])
def test_equals_the_authors_package(name, tmp_path):
    from tasks.checkpoint import export_satclip, save_checkpoint
    from tasks.core.location import LocationEncoder

    torch.manual_seed(0)
    encoder = LocationEncoder(degree=10, hidden=64, dim=16, basis="analytic")
    keys, values, where = database(500)
    where = where.astype(np.float32).astype(np.float64)
    np.savez(tmp_path / "db.npz", locs=where, satclip_embeddings=keys, image_embeddings=values)
    save_checkpoint((tmp_path / "checkpoint").as_uri(), encoder)
    export_satclip((tmp_path / "checkpoint").as_uri(), tmp_path / "model.ckpt")
    theirs = rangegeo.RANGE(
        name, device="cpu", pretrained_path=str(tmp_path / "model.ckpt"), db_path=str(tmp_path / "db.npz")
    )
    lonlat = np.concatenate([places(200), SPECIAL[2:]])
    ours = embed(encoder, RetrievalIndex(keys, values, where), lonlat, Method(name.lower()))
    np.testing.assert_allclose(ours, theirs.encode(lonlat), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "soft"}, "unknown: use one of range"),
        ({"beta": 1.5}, "beta 1.5 is not between 0"),
        ({"k": 0}, "k 0 is not positive"),
    ],
)
def test_a_method_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Method(**arguments)


def test_a_database_that_cannot_be_is_refused():
    keys, values, where = database(5)
    with pytest.raises(ValueError, match="each image has one of each"):
        RetrievalIndex(keys[:4], values, where)
    with pytest.raises(ValueError, match="not unit vectors"):
        RetrievalIndex(keys * 2, values, where)
