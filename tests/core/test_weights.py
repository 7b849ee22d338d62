"""Images that count otherwise than 1: every kernel is multiplied by their weights, by float64 and by repeated rows."""

from functools import reduce
from itertools import pairwise
from operator import add

import numpy as np
import pytest

from tasks.core import neighbours
from tasks.core.bandwidths import TRIED, curves
from tasks.core.compact import Projection
from tasks.core.evidence import evidence
from tasks.core.methods import Head, Method
from tasks.core.probes import block_of
from tasks.core.retrieval import RetrievalIndex
from tests.core.test_heads import HEADS, weights
from tests.core.test_retrieval import MANY, SOFT, close, database, places, unit

RNG = np.random.default_rng(8)
SIDE = Method("multi-head", side_by_side=HEADS)


def counted(index, spread=3.0):
    """How much each image counts: over some orders of magnitude, dense ones least."""
    return np.exp(np.random.default_rng(3).uniform(-spread, spread, len(index[0])))


def shares(head, index, counts, queries, lonlat):
    """Of every image, by the formula of the head with log w added to its logits."""
    kernel = weights(head, index, queries, lonlat) * counts
    return kernel / kernel.sum(1, keepdims=True)


def mixed(method, index, counts, queries, lonlat):
    """The shares of the heads of a method that mixes them."""
    parts = zip(method.shares, method.heads, strict=True)
    return sum(share * shares(head, index, counts, queries, lonlat) for share, head in parts)


@pytest.mark.parametrize("method", SOFT)
@pytest.mark.parametrize(("rows", "queries"), [(2, None), (2500, 100), (MANY, None)])
def test_mixtures_are_weighed(method, rows, queries):
    index, lonlat = database(rows), np.concatenate([places(100), [[0, 90], [180, -10]]])
    asked, counts = unit(RNG.normal(size=(len(lonlat), 16))), counted(index)
    found = RetrievalIndex(*index, queries=queries, weights=counts).retrieve(asked, lonlat, method)
    expected = mixed(method, index, counts, asked, lonlat) @ index[1].astype(np.float64)
    close(found, expected, 2e-6, scale=np.abs(index[1]).max())


@pytest.mark.parametrize("rows", [5, 700, 6000])
def test_heads_side_by_side_are_weighed(rows):
    index, lonlat = database(rows), np.concatenate([places(60), [[0, 90], [180, -90]]])
    asked, counts = unit(RNG.normal(size=(len(lonlat), 16))), counted(index)
    found = RetrievalIndex(*index, weights=counts).retrieve(asked, lonlat, SIDE)
    for head, part in zip(HEADS, np.split(found, len(HEADS), axis=1), strict=True):
        expected = shares(head, index, counts, asked, lonlat) @ index[1].astype(np.float64)
        close(part, expected, 4e-6, scale=np.abs(index[1]).max())


@pytest.mark.parametrize("method", [SIDE, Method("topk", k=7), Method("range", temperature=200.0)])
def test_images_that_count_twice_are_there_twice(method):
    """Whole weights against rows repeated so often; but for heads whose bandwidth depends on how many there are."""
    if method == SIDE:
        method = Method("multi-head", side_by_side=HEADS[:4])
    keys, values, where = database(900)
    counts = np.random.default_rng(0).integers(1, 5, 900)
    asked, lonlat = unit(RNG.normal(size=(40, 16))), places(40)
    found = RetrievalIndex(keys, values, where, weights=counts).retrieve(asked, lonlat, method)
    if method.name == "topk":
        rows = np.argsort(-asked @ keys.T, axis=1)[:, :7]
        expected = np.array([np.average(values[some], 0, counts[some]) for some in rows])
    else:
        expected = RetrievalIndex(*(np.repeat(a, counts, 0) for a in (keys, values, where))).retrieve(
            asked, lonlat, method
        )
    close(found, expected, 1e-5, scale=1)


@pytest.mark.parametrize("method", [Method(beta=0.3), SIDE, Method("topk", k=5)])
def test_weights_of_one_change_no_bit(method):
    index, lonlat, asked = database(MANY), places(40), unit(RNG.normal(size=(40, 16)))
    plain, weighed = (RetrievalIndex(*index, **told) for told in ({}, {"weights": np.ones(MANY)}))
    np.testing.assert_array_equal(weighed.retrieve(asked, lonlat, method), plain.retrieve(asked, lonlat, method))
    ours, theirs = (vars(evidence(one, asked[:9], lonlat[:9], method, 3)) for one in (weighed, plain))
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name])


@pytest.mark.parametrize("head", ["geodesic:700", "geodesic:3000", "geodesic:1e6", "nearest:4"])
def test_few_images_stand_for_all_within_the_bound(head, monkeypatch):
    """Where the nearest image counts a millionth of those beyond, the bound asks for more of them."""
    keys, values, where = database(9000)
    where = np.column_stack([where[:, 0] / 6, where[:, 1] / 3])
    counts = np.where(np.arange(9000) % 2, 1e-6, 1.0)
    index = RetrievalIndex(keys, values, where, precision="float64", weights=counts)
    lonlat, asked, real = np.concatenate([places(200), where[:50]]), [], neighbours.sums_near
    monkeypatch.setattr(neighbours, "sums_near", lambda *args: asked.append(real(*args)) or asked[-1])
    method = Method("multi-head", side_by_side=(Head.parse(head),))
    found = index.retrieve(unit(RNG.normal(size=(250, 16))), lonlat, method)
    exact = shares(method.heads[0], (keys, values, where), counts, np.zeros((250, 16)), lonlat) @ values.astype("f8")
    assert np.abs(found - exact).max() <= neighbours.EPSILON * np.ptp(values, axis=0).max() + 1e-6
    if Head.parse(head).at > 2000:
        assert asked
        assert not asked[0][1].all()


def test_far_from_every_image_the_sums_are_as_exact():
    keys, values, where = database(MANY)
    where = np.column_stack([where[:, 0] / 18, where[:, 1] / 9])  # all within 10 degrees of 0, 0
    index, counts = (keys, values, where), counted((keys,), 5)
    lonlat = np.column_stack([np.linspace(-180, 180, 91), np.linspace(-90, 90, 91)])
    queries = unit(RNG.normal(size=(91, 16)))
    weighed = RetrievalIndex(*index, weights=counts)
    assert 0 < weighed.spectrum(40.0).sums(lonlat)[1].sum() < 91
    found, expected = (
        weighed.retrieve(queries, lonlat, Method(beta=0)),
        shares(HEADS[1], index, counts, queries, lonlat),
    )
    close(found, expected @ values.astype(np.float64), 2e-6, scale=np.abs(values).max())


def test_sums_of_parts_add():
    index, counts = database(MANY), counted(database(MANY))
    queries, lonlat, method = unit(RNG.normal(size=(20, 16))), places(20), Method("multi-head", side_by_side=HEADS[:4])
    edges = [0, 40, 2500, MANY]
    parts = [RetrievalIndex(*(a[i:j] for a in index), weights=counts[i:j]) for i, j in pairwise(edges)]
    found = reduce(add, (part.select(queries, lonlat, method) for part in parts)).visual(method)
    close(found, RetrievalIndex(*index, weights=counts).retrieve(queries, lonlat, method), 1e-5)
    spectra, whole = [part.spectrum(40.0) for part in parts], RetrievalIndex(*index, weights=counts).spectrum(40.0)
    close(reduce(add, spectra).moments.numpy(), whole.moments.numpy(), 1e-12)
    np.testing.assert_allclose(reduce(add, spectra).images, counts.sum())


@pytest.mark.parametrize("method", [Method(beta=0.3), SIDE, Method("topk", k=4)])
def test_evidence_counts_images_by_their_weights(method):
    index = database(500)
    queries, lonlat, counts = unit(RNG.normal(size=(30, 16))), places(30), counted(index, 1)
    if method.name == "topk":
        shared = np.zeros((30, 500))
        rows = np.argsort(-queries @ index[0].T, axis=1)[:, :4]
        np.put_along_axis(shared, rows, counts[rows] / counts[rows].sum(1, keepdims=True), 1)
    else:
        shared = mixed(method, index, counts, queries, lonlat)
    found = evidence(RetrievalIndex(*index, weights=counts), queries, lonlat, method, top=1)
    entropy = -(shared * np.log(np.maximum(shared, 1e-300))).sum(1)
    np.testing.assert_allclose(found.images, np.exp(entropy), rtol=2e-2)  # float32 angles times 20,000
    np.testing.assert_allclose(found.largest, shared.max(1), rtol=2e-2)
    np.testing.assert_array_equal(found.rows[:, 0], shared.argmax(1))


def test_components_are_those_of_rows_repeated():
    values, counts = RNG.normal(size=(300, 12)).astype("f4") * np.geomspace(1, 30, 12), RNG.integers(1, 6, 300)
    often = np.repeat(values, counts, 0)
    for fit in (lambda v, w=None: Projection.fit(v, 4, w), lambda v, w=None: Projection.rotated(v, 4, weights=w)):
        ours, theirs = fit(values, counts.astype(float)), fit(often)
        close(ours.components, theirs.components, 1e-5)
        close(ours.mean, theirs.mean, 1e-5)
        np.testing.assert_allclose(ours.explained, theirs.explained, rtol=1e-6)


@pytest.mark.parametrize("weighed", [False, True])
def test_heads_are_chosen_by_what_images_count(weighed):
    """Of 100 images all are left out in turn, so only the formulas are left to check."""
    keys, values, where = database(100, v=3)
    counts = counted((keys,)) if weighed else None
    found = {curve.kind: curve for curve in curves(keys, keys, values, where, counts)}
    w = np.ones(100) if counts is None else counts
    scaled = values.astype(np.float64) / np.sqrt(np.cov(values.T.astype(np.float64), aweights=w, bias=True).diagonal())
    total = ((scaled - np.average(scaled, 0, w)) ** 2).sum()
    block, compared = block_of(where, 10.0), 0
    for kind in ("semantic", "geodesic"):
        for left_out, told in ((np.eye(100, dtype=bool), "one_out"), (block[:, None] == block, "block_out")):
            for at, share in zip(TRIED[kind], getattr(found[kind], told), strict=True):
                kernel = weights(Head(kind, at), (keys, values, where), keys, where) * w * ~left_out
                with np.errstate(invalid="ignore"):
                    lost = (kernel @ scaled / kernel.sum(1, keepdims=True) - scaled) ** 2
                if np.isfinite(lost).all():
                    assert abs(1 - lost.sum() / total - share) < 3e-4
                    compared += 1
    assert compared > 20


def test_other_weights_than_numbers_above_0_are_refused():
    for wrong in (np.zeros(5), np.full(5, np.nan), np.ones(4), -np.ones(5)):
        with pytest.raises(ValueError, match="a number above 0 for each"):
            RetrievalIndex(*database(5), weights=wrong)
