"""Heads side by side, sharp kernels and the choice of bandwidths, against float64 brute force."""

from functools import reduce
from itertools import pairwise
from operator import add

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from sklearn.neighbors import KernelDensity
from sklearn.preprocessing import StandardScaler

from tasks.core import neighbours
from tasks.core.bandwidths import BLOCK_DEGREES, curves
from tasks.core.compact import Projection, rotation
from tasks.core.earth.sphere import unit_vectors
from tasks.core.evidence import evidence
from tasks.core.methods import Head, Method
from tasks.core.retrieval import RetrievalIndex, embed
from tasks.core.sums import Selections, updated
from tests.core.test_retrieval import close, database, places, softmax, unit

RNG = np.random.default_rng(5)
HEADS = tuple(
    map(Head.parse, ("semantic:12", "geodesic:40", "geodesic:1000", "geodesic:20000", "nearest:1", "nearest:9"))
)


def weights(head, index, queries, lonlat):
    """Of every image by the formulas, in float64."""
    keys, _, where = (a.astype(np.float64) for a in index)
    if head.kind == "semantic":
        return softmax(head.at * queries.astype(np.float64) @ keys.T)
    chords = np.linalg.norm(unit_vectors(lonlat)[:, None] - unit_vectors(where), axis=2)
    if head.kind == "nearest":
        wide = np.maximum(
            np.sort(chords, axis=1)[:, min(int(head.at), len(keys)) - 1][:, None], 1e-9
        )  # at an image itself
        return softmax(-(chords**2) / (2 * wide**2))
    return softmax(-head.at * chords**2 / 2)


@pytest.mark.parametrize("rows", [1, 5, 700, 6000])
def test_heads_side_by_side_are_their_formulas(rows):
    index = database(rows)
    lonlat = np.concatenate([places(60), [[0, 90], [180, -90], [179.9, 3]]])
    queries = unit(RNG.normal(size=(len(lonlat), 16)))
    found = RetrievalIndex(*index).retrieve(queries, lonlat, Method("multi-head", side_by_side=HEADS))
    parts = np.split(found, len(HEADS), axis=1)
    for head, part in zip(HEADS, parts, strict=True):
        close(
            part,
            weights(head, index, queries, lonlat) @ index[1].astype(np.float64),
            2e-6,
            scale=np.abs(index[1]).max(),
        )


@pytest.mark.parametrize("head", ["geodesic:700", "geodesic:3000", "geodesic:1e6", "nearest:1", "nearest:4"])
def test_few_images_stand_for_all_within_the_bound(head, monkeypatch):
    """Clustered images, and places far from all of them, at which the kernel has left float64's range."""
    keys, values, where = database(9000)
    where = np.column_stack([where[:, 0] / 6, where[:, 1] / 3])
    index, lonlat = RetrievalIndex(keys, values, where, precision="float64"), np.concatenate([places(300), where[:50]])
    asked = []
    real = neighbours.sums_near
    monkeypatch.setattr(neighbours, "sums_near", lambda *args: asked.append(real(*args)) or asked[-1])
    method = Method("multi-head", side_by_side=(Head.parse(head),))
    found = index.retrieve(unit(RNG.normal(size=(350, 16))), lonlat, method)
    assert not asked or not asked[0][1].all()
    exact = weights(method.heads[0], (keys, values, where), np.zeros((350, 16)), lonlat) @ values.astype(np.float64)
    assert np.abs(found - exact).max() <= neighbours.EPSILON * np.ptp(values, axis=0).max() + 1e-6
    if Head.parse(head).at > 2000:
        assert asked


def test_images_at_one_place_share_the_weight():
    keys, values, _ = database(600)
    where = np.tile([[10.0, 20.0]], (600, 1))
    found = RetrievalIndex(keys, values, where).retrieve(
        keys[:2], where[:2], Method("multi-head", side_by_side=(Head("nearest", 3), Head("geodesic", 5000)))
    )
    close(found, np.tile(values.mean(0), (2, 2)), 1e-5, scale=1)


@given(st.lists(st.integers(1, 699), max_size=4, unique=True))
def test_sums_of_sharp_heads_add_over_parts(cuts):
    keys, values, where = database(700)
    queries, lonlat = unit(RNG.normal(size=(6, 16))), places(6)
    method = Method("multi-head", side_by_side=HEADS[:4])
    edges = [0, *sorted(cuts), 700]
    shards = [RetrievalIndex(keys[a:b], values[a:b], where[a:b]) for a, b in pairwise(edges)]
    found = reduce(add, (shard.select(queries, lonlat, method) for shard in shards)).visual(method)
    close(found, RetrievalIndex(keys, values, where).retrieve(queries, lonlat, method), 1e-5)


def test_sums_of_sharp_heads_are_stored_and_updated():
    index, method = database(900), Method("multi-head", side_by_side=HEADS[:4])
    queries, lonlat = unit(RNG.normal(size=(40, 16))), places(40)
    of = lambda rows: RetrievalIndex(*(a[rows] for a in index)).select(queries, lonlat, method)  # noqa: E731
    before, all_but = of(np.arange(800)).scaled(), np.r_[40:900]
    kept = Selections.unpack(before.pack(), 4)
    after, anew = updated(kept, of(np.arange(800, 900)), of(np.arange(40)))
    assert anew.mean() < 0.5
    close(after.visual(method)[~anew], of(all_but).visual(method)[~anew], 1e-4)


def test_evidence_of_heads_counts_them_alike():
    index = database(500)
    queries, lonlat = unit(RNG.normal(size=(30, 16))), places(30)
    method = Method("multi-head", side_by_side=HEADS)
    shared = np.mean([weights(head, index, queries, lonlat) for head in HEADS], axis=0)
    found = evidence(RetrievalIndex(*index), queries, lonlat, method, top=1)
    entropy = -(shared * np.log(np.maximum(shared, 1e-300))).sum(1)
    np.testing.assert_allclose(found.images, np.exp(entropy), rtol=2e-2)  # float32 angles times 20,000
    np.testing.assert_allclose(found.largest, shared.max(1), rtol=2e-2)
    np.testing.assert_array_equal(found.rows[:, 0], shared.argmax(1))


def test_rotated_components_are_those_of_standardised_values():
    values = (RNG.normal(size=(400, 12)) @ RNG.normal(size=(12, 12)) * np.geomspace(0.01, 100, 12)).astype("f4") + 7
    projection = Projection.rotated(values, 5)
    scaled = StandardScaler().fit_transform(values.astype(np.float64))
    theirs = PCA(5).fit(scaled)
    ours, expected = projection.apply(values), theirs.transform(scaled)
    close(ours @ ours.T, expected @ expected.T, 1e-4)  # a rotation keeps all products
    close(projection.restore(ours), theirs.inverse_transform(expected) * scaled_by(values) + values.mean(0), 1e-4)
    np.testing.assert_allclose(projection.explained, theirs.explained_variance_ratio_.sum(), rtol=1e-5)
    np.testing.assert_allclose(rotation(5).T @ rotation(5), np.eye(5), atol=1e-12)
    spread = ours.std(0)
    assert spread.max() / spread.min() < expected.std(0).max() / expected.std(0).min()


def scaled_by(values):
    return values.astype(np.float64).std(0)


def test_the_location_part_keeps_what_its_projection_keeps():
    keys, values, where = database(300)
    projection = Projection.rotated(keys, 6, standardise=False)

    class Same:
        def embed(self, lonlat):
            return keys[: len(lonlat)]

    method = Method("multi-head", side_by_side=HEADS[:2])
    found = embed(Same(), RetrievalIndex(keys, values, where, location=projection), where[:9], method)
    assert found.shape == (9, 2 * 8 + 6)
    close(found[:, 16:], projection.apply(keys[:9]))


def test_curves_are_the_kernel_regression_of_what_is_left_out():
    """Against scikit-learn's kernel density, whose ratio of weighted densities is the kernel regression."""
    keys, values, where = database(120, v=3)
    found = {curve.kind: curve for curve in curves(keys, keys, values, where)}
    scaled = StandardScaler().fit_transform(values.astype(np.float64))
    points, blocks = unit_vectors(where), np.floor((where + np.array([180, 90])) / BLOCK_DEGREES)
    at = found["geodesic"].at.index(100)
    for shares, same in (
        (found["geodesic"].one_out, np.eye(120, dtype=bool)),
        (found["geodesic"].block_out, (blocks[:, None] == blocks).all(2)),
    ):
        told = [regressed(points[~same[i]], scaled[~same[i]], points[i], 100**-0.5) for i in range(120)]
        lost = ((scaled - told) ** 2).sum() / (scaled**2).sum()
        np.testing.assert_allclose(shares[at], 1 - lost, atol=1e-3)


def regressed(points, values, at, bandwidth):
    """A positive shift makes weights of the values, which the mean of the densities gives back."""

    def density(share):
        model = KernelDensity(bandwidth=bandwidth, kernel="gaussian", rtol=0).fit(points, sample_weight=share)
        return np.exp(model.score_samples(at[None])[0]) * share.sum()

    shifted = values - values.min(0) + 1
    return [density(v) / density(np.ones(len(points))) for v in shifted.T] + values.min(0) - 1


def test_images_that_look_alike_near_each_other_choose_a_sharp_head():
    """Values that change over some 500 km ask for a kernel narrower than that, noise for a broad one."""
    where = places(3000, np.random.default_rng(2))
    x = unit_vectors(where)
    waves = np.sin(12 * x @ RNG.normal(size=(3, 6))).astype("f4")
    noise = RNG.normal(size=(3000, 6)).astype("f4")
    keys = unit(RNG.normal(size=(3000, 8)))
    smooth, rough = ({c.kind: c.chosen.at for c in curves(keys, keys, v, where)} for v in (waves, noise))
    assert smooth["geodesic"] >= 500 > 100 >= rough["geodesic"]
    assert smooth["nearest"] <= 16 < rough["nearest"]


@pytest.mark.parametrize(
    "text", ["semantic", "semantic:", "geodesic:-1", "nearest:0", "nearest:2.5", "far:3", "geodesic:nan"]
)
def test_what_is_no_head_is_refused(text):
    with pytest.raises(ValueError, match=r"no head|unknown|not a number|no number of an image"):
        Head.parse(text)
