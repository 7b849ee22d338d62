"""Retrieval against a float64 brute force and against the authors' package."""

from functools import reduce
from operator import add

import numpy as np
import pytest
import rangegeo
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.core import retrieval
from tasks.core.earth.sphere import unit_vectors
from tasks.core.encoders.location import LocationEncoder
from tasks.core.retrieval import Method, RetrievalIndex, embed
from tasks.core.sums import Selections, updated
from tasks.model.checkpoint import save_checkpoint
from tasks.model.satclip import export_satclip

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


def close(found, expected, tolerance=1e-6, scale=None):
    """To `tolerance` of the largest number, or of a given scale."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * (scale or np.abs(expected).max()))


def exact(found, index, queries, lonlat, method, tolerance=1e-6):
    """The float64 brute force to 1e-6 of the mean magnitude of what is averaged: values here cancel."""
    keys, values, where = index
    scale = brute_force((keys, np.abs(values), where), queries, lonlat, method).max()
    close(found, brute_force(index, queries, lonlat, method), tolerance, scale)


def turned(lonlat, degrees):
    return np.column_stack([(lonlat[:, 0] + degrees + 180) % 360 - 180, lonlat[:, 1]])


SPECIAL = np.array([[0, 90], [13, -90], [180, 10], [-180, 10], [0, 0]], float)
SOFT = [Method("range"), Method("range+"), Method("range+", beta=0.2), Method("range+", 1), Method("range+", 0)]
MANY = 6000  # images from which the geodesic half has a spectrum


@pytest.mark.parametrize("method", SOFT)
@pytest.mark.parametrize("rows", [1, 2, 2500, MANY])
@pytest.mark.parametrize("queries", [None, 700])
def test_soft_retrieval_is_the_brute_force(method, rows, queries):
    index = database(rows, d=256)
    lonlat = np.concatenate([places(700), SPECIAL, index[2][:20]])
    asked = unit(RNG.normal(size=(len(lonlat), 256)))
    found = RetrievalIndex(*index, queries=queries).retrieve(asked, lonlat, method)
    exact(found, index, asked, lonlat, method)


@pytest.mark.parametrize("method", SOFT)
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("float64", 1e-7)])
def test_a_query_that_is_a_key(method, precision, tolerance):
    index = database(MANY, d=256)
    found = RetrievalIndex(*index, precision=precision).retrieve(index[0][:50], index[2][:50], method)
    exact(found, index, index[0][:50], index[2][:50], method, tolerance)


def test_far_from_every_image_the_sums_are_as_exact():
    """The spectrum ends where the weights are below its error: 60 degrees and more from all images."""
    keys, values, where = database(MANY)
    where = np.column_stack([where[:, 0] / 18, where[:, 1] / 9])  # all within 10 degrees of 0, 0
    lonlat = np.column_stack([np.linspace(-180, 180, 91), np.linspace(-90, 90, 91)])
    queries = unit(RNG.normal(size=(91, 16)))
    index = RetrievalIndex(keys, values, where)
    far = index.spectrum(40.0).sums(lonlat)[1]
    assert 0 < far.sum() < 91
    np.testing.assert_array_equal(index.spectrum(40.0).weights.sums(lonlat)[1], far)
    found = index.retrieve(queries, lonlat, Method(beta=0))
    exact(found, (keys, values, where), queries, lonlat, Method(beta=0))


@pytest.mark.parametrize("temperature", [0.0, 1.0, 12.0, 40.0, 100.0, 5000.0])
def test_any_geodesic_temperature(temperature):
    index, lonlat, queries = database(MANY), places(30), unit(RNG.normal(size=(30, 16)))
    method = Method(beta=0, geodesic_temperature=temperature)
    exact(RetrievalIndex(*index).retrieve(queries, lonlat, method), index, queries, lonlat, method)


def test_hard_retrieval_takes_the_nearest_images():
    keys, values, where = database(5000)
    queries = unit(RNG.normal(size=(50, 16)))
    order = np.argsort(-(queries.astype(np.float64) @ keys.T.astype(np.float64)), axis=1)
    index = RetrievalIndex(keys, values, where)
    lonlat = places(50)
    np.testing.assert_array_equal(index.retrieve(queries, lonlat, Method("top1")), values[order[:, 0]])
    expected = values[order[:, :7]].mean(1)
    np.testing.assert_allclose(index.retrieve(queries, lonlat, Method("topk", k=7)), expected, rtol=1e-5, atol=1e-6)


def test_topk_of_more_images_than_there_are_is_their_mean():
    index = RetrievalIndex(*database(3))
    found = index.retrieve(unit(RNG.normal(size=(2, 16))), places(2), Method("topk", k=10))
    close(found, np.tile(database(3)[1].mean(0), (2, 1)))


def test_the_same_image_twice_counts_twice():
    keys, values, where = database(30)
    twice = [np.concatenate([a, a[:10], a[:10]]) for a in (keys, values, where)]
    queries, lonlat = unit(RNG.normal(size=(9, 16))), places(9)
    exact(RetrievalIndex(*twice).retrieve(queries, lonlat, Method()), twice, queries, lonlat, Method())
    whole = [np.concatenate([a, a]) for a in (keys, values, where)]
    once = RetrievalIndex(keys, values, where).retrieve(queries, lonlat, Method())
    close(RetrievalIndex(*whole).retrieve(queries, lonlat, Method()), once)


@given(st.permutations(range(40)), st.sampled_from(SOFT))
def test_the_order_of_the_database_changes_nothing(order, method):
    index = database(40)
    queries, lonlat = unit(RNG.normal(size=(3, 16))), places(3)
    one = RetrievalIndex(*index).retrieve(queries, lonlat, method)
    other = RetrievalIndex(*(a[list(order)] for a in index)).retrieve(queries, lonlat, method)
    close(one, other)


@given(st.lists(st.integers(1, 39), max_size=5, unique=True), st.sampled_from(SOFT), st.sampled_from([None, 500.0]))
def test_the_sums_of_shards_add(cuts, method, hot):
    method = Method(method.name, method.beta, temperature=hot, geodesic_temperature=hot or 40.0)
    index, queries, lonlat = database(40), unit(RNG.normal(size=(3, 16))), places(3)
    shards = [RetrievalIndex(*parts) for parts in zip(*(np.split(a, sorted(cuts)) for a in index), strict=True)]
    found = reduce(add, (shard.select(queries, lonlat, method) for shard in shards)).mix(method.beta)
    close(found, RetrievalIndex(*index).retrieve(queries, lonlat, method), 1e-4 if hot else 1e-6)


@pytest.mark.parametrize("rows", [300, MANY])
def test_an_updated_database_is_a_rebuilt_one(rows):
    """A tenth goes, as much comes; and everything near one place goes, which must be told."""
    rng = np.random.default_rng(3)
    index, lonlat = database(rows + rows // 10), places(200, rng)
    lonlat[0] = index[2][rows - 1]
    queries = unit(rng.normal(size=(200, 16)))
    near = unit_vectors(index[2]) @ unit_vectors(lonlat[:1])[0] > 0.8
    old, new = np.arange(len(near)) < rows, np.arange(len(near)) >= rows // 10
    for gone, come in ((old & ~new, ~old), (old & near, ~old & ~near)):
        sums = {
            name: RetrievalIndex(*(a[chosen] for a in index)).select(queries, lonlat, Method())
            for name, chosen in {"old": old, "come": come, "gone": gone, "all": (old | come) & ~gone}.items()
        }
        after, anew = updated(sums["old"].scaled(), sums["come"], sums["gone"])
        close(after.mix(0.5)[~anew], sums["all"].mix(0.5)[~anew], 1e-5)
        assert anew[0] == gone[rows - 1]
        assert anew.mean() < 0.2


@pytest.mark.parametrize("method", [Method(), Method("range"), Method(temperature=300.0)])
def test_kept_sums_are_the_sums(method):
    index, queries, lonlat = RetrievalIndex(*database(60)), unit(RNG.normal(size=(9, 16))), places(9)
    halves = index.select(queries, lonlat, method).scaled()
    kept = Selections.unpack(halves.pack(), len(method.heads))
    close(kept.mix(0.3), halves.mix(0.3))
    for sums, exact in zip(kept.sums, halves.sums, strict=True):
        torch.testing.assert_close(sums.denominator, torch.ones(9, dtype=torch.float64), atol=1e-5, rtol=0)
        torch.testing.assert_close(sums.shift, exact.shift, atol=0, rtol=0)


def test_spectra_of_shards_add():
    keys, values, where = database(MANY)
    whole = RetrievalIndex(keys, values, where).spectrum(40.0)
    parts = [RetrievalIndex(keys[s], values[s], where[s]).spectrum(40.0) for s in (slice(0, 99), slice(99, None))]
    torch.testing.assert_close((parts[0] + parts[1]).moments, whole.moments, rtol=1e-9, atol=1e-9)
    assert (parts[0] + parts[1]).images == MANY


@given(st.floats(0, 1))
def test_beta_is_linear(beta):
    index, queries, lonlat = RetrievalIndex(*database(40)), unit(RNG.normal(size=(3, 16))), places(3)
    ends = [index.retrieve(queries, lonlat, Method(beta=b)) for b in (0, 1)]
    halves = index.select(queries, lonlat, Method())
    close(halves.mix(beta), (1 - beta) * ends[0] + beta * ends[1])
    close(halves.mix(beta), index.retrieve(queries, lonlat, Method(beta=beta)))


def test_temperature_leads_from_the_mean_to_the_nearest():
    index, queries, lonlat = database(100), unit(RNG.normal(size=(5, 16))), places(5)
    found = RetrievalIndex(*index)
    flat = found.retrieve(queries, lonlat, Method(temperature=0.0, geodesic_temperature=0.0))
    close(flat, np.broadcast_to(index[1].mean(0), flat.shape))
    sharp = found.retrieve(queries, lonlat, Method("range", temperature=1e6))
    np.testing.assert_allclose(sharp, found.retrieve(queries, lonlat, Method("top1")), atol=1e-3)
    nearest = (unit_vectors(lonlat) @ unit_vectors(index[2]).T).argmax(1)
    sharp = found.retrieve(queries, lonlat, Method(beta=0, geodesic_temperature=1e6))
    np.testing.assert_allclose(sharp, index[1][nearest], atol=1e-3)


@settings(max_examples=20)
@given(st.floats(-360, 360), st.sampled_from([40, MANY]))
def test_turning_the_earth_turns_the_geodesic_half(degrees, rows):
    keys, values, where = database(rows, v=2)
    queries, lonlat = unit(RNG.normal(size=(3, 16))), np.concatenate([places(1), SPECIAL[:2]])
    here = RetrievalIndex(keys, values, where).retrieve(queries, lonlat, Method(beta=0))
    there = RetrievalIndex(keys, values, turned(where, degrees))
    close(there.retrieve(queries, turned(lonlat, degrees), Method(beta=0)), here)


@given(st.permutations(range(40)), st.sampled_from([Method("top1"), Method("topk", k=7)]))
def test_the_order_of_the_database_changes_no_nearest_image(order, method):
    index, queries = database(40), unit(RNG.normal(size=(3, 16)))
    one = RetrievalIndex(*index).retrieve(queries, places(3), method)
    other = RetrievalIndex(*(a[list(order)] for a in index)).retrieve(queries, places(3), method)
    close(one, other)


@pytest.mark.parametrize("method", [Method("top1"), Method("topk", k=4)])
def test_hard_retrieval_of_one_image_and_of_duplicates(method):
    """Of equal images any may be taken: they have equal values."""
    keys, values, where = database(1)
    queries = unit(RNG.normal(size=(4, 16)))
    for copies in (1, 6):
        index = RetrievalIndex(*(np.repeat(a, copies, 0) for a in (keys, values, where)))
        close(index.retrieve(queries, places(4), method), np.repeat(values, 4, 0))


def test_tiles_on_a_gpu_take_a_share_of_what_is_free(monkeypatch):
    assert retrieval.tile_sizes("cpu", 10**7) == (retrieval.QUERY_TILE, retrieval.KEY_TILE)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 << 30, 80 << 30))
    queries, keys = retrieval.tile_sizes("cuda", 10**7)
    assert queries * keys * 4 == pytest.approx(retrieval.GPU_SHARE * (8 << 30), rel=1e-3)
    assert retrieval.tile_sizes("cuda:1", 5000)[1] == 5000


@pytest.mark.parametrize("method", [*SOFT, Method("top1"), Method("topk"), Method("none")])
def test_no_places_give_no_embeddings(method):
    width = 0 if method.name == "none" else 8
    index = RetrievalIndex(*database(4))
    assert index.retrieve(np.empty((0, 16), np.float32), np.empty((0, 2)), method).shape == (0, width)


class Constant:
    """An encoder that knows one place."""

    def embed(self, lonlat):
        return np.tile(np.eye(16, dtype=np.float32)[0], (len(lonlat), 1))


def test_bf16_rounds_values_alone():
    index, lonlat, queries = database(3000), places(50), unit(RNG.normal(size=(50, 16)))
    close(
        RetrievalIndex(*index, precision="bf16").retrieve(queries, lonlat, Method()),
        brute_force(index, queries, lonlat, Method()),
        2e-2,
    )


METHODS = [Method("range"), Method(), Method(beta=0.0), Method(beta=0.9)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("rows", "seed"), [(1, 0), (2, 1), (500, 2), (MANY, 3)])
def test_equals_the_authors_package(method, rows, seed, tmp_path):
    """Row by row, on a random checkpoint and database; poles, 180 degrees, images themselves and duplicates too."""
    torch.manual_seed(seed)
    encoder = LocationEncoder(10, hidden=64, dim=16, basis="analytic")
    keys, values, where = (np.concatenate([a, a[:5]]) for a in database(rows, seed=seed))
    values, where = np.abs(values), where.astype(np.float32).astype(np.float64)  # features are no less than 0
    np.savez(tmp_path / "db.npz", locs=where, satclip_embeddings=keys, image_embeddings=values)
    save_checkpoint((tmp_path / "checkpoint").as_uri(), encoder)
    export_satclip((tmp_path / "checkpoint").as_uri(), tmp_path / "model.ckpt")
    files = {"pretrained_path": str(tmp_path / "model.ckpt"), "db_path": str(tmp_path / "db.npz")}
    theirs = rangegeo.RANGE(method.name.upper(), beta=method.beta, device="cpu", **files)
    lonlat = np.concatenate([places(200), SPECIAL, where[:20]])
    found, expected = embed(encoder, RetrievalIndex(keys, values, where), lonlat, method), theirs.encode(lonlat)
    for part in (slice(8), slice(8, None)):
        error = np.linalg.norm(found[:, part] - expected[:, part], axis=1)
        assert (error / np.linalg.norm(expected[:, part], axis=1)).max() <= 1e-5
    location = embed(encoder, RetrievalIndex(keys, values, where), lonlat, Method("none"))
    np.testing.assert_array_equal(location, found[:, 8:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "soft"}, "unknown: use one of multi-head, range"),
        ({"beta": 1.5}, "beta 1.5 is not between 0"),
        ({"k": 0}, "k 0 is not positive"),
        ({"temperature": -1.0}, "temperature -1.0 is not a number from 0"),
        ({"geodesic_temperature": float("nan")}, "temperature nan is not"),
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


def test_queries_of_another_encoder_are_refused():
    index = RetrievalIndex(*database(5))
    with pytest.raises(ValueError, match="keys of length 16: embed the places with the encoder"):
        index.retrieve(unit(RNG.normal(size=(3, 8))), places(3), Method())
    with pytest.raises(ValueError, match=r"top1 selects no weights: only multi-head, range\+, range have heads"):
        index.select(unit(RNG.normal(size=(3, 16))), places(3), Method("top1"))
