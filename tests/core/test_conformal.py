"""Conformal calibration against ranks by hand, the exact coverage of exchangeable scores, and brute-force distances."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from scipy.stats import beta

from tasks.core import conformal
from tasks.core.conformal import Calibration, feature_distance, threshold


@pytest.mark.parametrize(
    ("n", "coverage", "rank"), [(8, 0.9, None), (9, 0.9, 9), (10, 0.9, 10), (19, 0.9, 18), (99, 0.9, 90), (19, 0.5, 10)]
)
def test_the_rank_is_the_one_by_hand(n, coverage, rank):
    scores = np.random.default_rng(0).permutation(np.arange(1.0, n + 1))
    assert threshold(scores, coverage) == (rank or np.inf)


@given(st.lists(st.floats(0, 1e6), max_size=300), st.integers(1, 99))
def test_the_threshold_is_the_smallest_that_the_promise_allows(scores, percent):
    rank = math.ceil((len(scores) + 1) * Fraction(percent, 100))
    expected = sorted(scores)[rank - 1] if rank <= len(scores) else math.inf
    assert threshold(np.array(scores), percent / 100) == expected


def test_labels_that_could_not_be_count_as_not_covered():
    assert threshold(np.array([1.0] * 17 + [np.inf] * 2)) == np.inf
    assert threshold(np.array([1.0] * 18 + [np.inf])) == 1.0


def test_further_places_are_covered_as_often_as_promised():
    """The coverage of uniform scores is their threshold, which is the rank's order statistic: a beta distribution."""
    rng, n, trials = np.random.default_rng(0), 50, 4000
    reached = [threshold(rng.uniform(size=n)) for _ in range(trials)]
    exact = beta(46, n + 1 - 46)  # ceil(51 * 0.9) = 46
    assert exact.mean() >= 0.9
    assert np.mean(reached) == pytest.approx(exact.mean(), abs=4 * exact.std() / math.sqrt(trials))


def test_each_group_by_distance_is_covered_where_one_region_is_not():
    """Scores that grow with the distance; shares within four standard errors of a binomial."""
    rng, n = np.random.default_rng(1), 20_000
    distance = rng.uniform(0, 1, 2 * n)
    scores = np.abs(rng.normal(size=2 * n)) * (0.2 + distance)
    near, far = distance[n:] < 0.2, distance[n:] > 0.8

    def covered(groups):
        found = Calibration.fit(scores[:n], distance[:n], groups)
        return scores[n:] <= found.limits(distance[n:])

    error = 4 * math.sqrt(0.09 / near.sum())
    assert covered(4).mean() == pytest.approx(0.9, abs=0.01)
    assert covered(20)[near].mean() == pytest.approx(0.9, abs=error)
    assert covered(20)[far].mean() == pytest.approx(0.9, abs=error)
    assert covered(1)[near].mean() > 0.98
    assert covered(1)[far].mean() < 0.8


def test_few_places_make_fewer_groups_and_none_an_unbounded_region():
    rng = np.random.default_rng(0)
    assert len(Calibration.fit(rng.uniform(size=199), rng.uniform(size=199)).thresholds) == 3
    assert Calibration.fit(np.ones(3), np.arange(3.0)).limits(np.array([0.0, 9.0])).tolist() == [np.inf, np.inf]


def test_places_beyond_all_of_the_calibration_are_of_the_last_group():
    distance = np.arange(400.0)
    found = Calibration.fit(distance, distance)
    assert found.limits(np.array([-5.0, 1e9])).tolist() == [90, 390]  # the 91st of 100 in the first and last quarter


@pytest.mark.parametrize("most", [10_000, 30])
def test_the_distance_is_that_of_brute_force(monkeypatch, most):
    """Over the square root of the dimensions; of a constant dimension nothing is divided by zero."""
    monkeypatch.setattr(conformal, "REFERENCES", most)
    rng = np.random.default_rng(0)
    labelled, features = (rng.normal(3, [1, 5, 0.1, 1], (n, 4)).astype(np.float32) for n in (90, 25))
    labelled[:, 3] = features[:, 3] = 7
    scaled = [(x - labelled.mean(0)) / np.where(np.arange(4) < 3, labelled.std(0), 1) for x in (features, labelled)]
    known = scaled[1] if most > 90 else scaled[1][::3]
    expected = np.sort(cdist(scaled[0], known), axis=1)[:, :10].mean(1) / 2
    np.testing.assert_allclose(feature_distance(features, labelled), expected, rtol=1e-4)
