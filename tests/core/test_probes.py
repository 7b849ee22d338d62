"""The probes' splits and protocol."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import RidgeClassifierCV, RidgeCV
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler

from tasks.core.probes import best_ridge, block_of, blocked_split, random_split, score


@given(st.integers(0, 1000), st.sampled_from([5.0, 10.0, 30.0]))
def test_no_block_is_on_both_sides(seed, degrees):
    rng = np.random.default_rng(seed)
    lonlat = np.column_stack([rng.uniform(-180, 180, 300), rng.uniform(-90, 90, 300)])
    split, blocks = blocked_split(lonlat, degrees, seed), block_of(lonlat, degrees)
    assert not set(blocks[split.train]) & set(blocks[split.test])
    assert sorted([*split.train, *split.test]) == list(range(300))


def sklearn_probe(kind):
    ridge = RidgeClassifierCV if kind == "classification" else RidgeCV
    return make_pipeline(MinMaxScaler(), ridge(alphas=[0.1, 1, 10], cv=10 if kind == "classification" else 3))


def data(kind, n, d, seed):
    """Features with near-duplicate columns, and labels with rare classes."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    x[:, d // 2 :] = x[:, : d - d // 2] + 1e-3 * rng.normal(size=(n, d - d // 2))
    y = x @ rng.normal(size=d) / np.sqrt(d) + 0.3 * rng.normal(size=n)
    labels = y if kind == "regression" else np.digitize(y, [-2.8, -1, 0, 0.3, 1.5]).astype(str)
    return x.astype(np.float32), labels


@pytest.mark.filterwarnings("ignore:The least populated class")
@pytest.mark.parametrize("kind", ["classification", "regression"])
@pytest.mark.parametrize(("n", "d"), [(400, 20), (600, 300), (150, 200)])
@pytest.mark.parametrize("seed", range(3))
def test_the_probe_is_scikit_learns(kind, n, d, seed):
    x, labels = data(kind, n, d, seed)
    split = random_split(n)
    theirs = sklearn_probe(kind).fit(x[split.train].astype(float), labels[split.train])
    scaled = theirs[0].transform(x.astype(float))
    ours = best_ridge(scaled[split.train], labels[split.train], kind)
    assert ours.alpha == theirs[1].alpha_
    expected = theirs.predict(x[split.test].astype(float))
    if kind == "regression":
        np.testing.assert_allclose(ours.predict(scaled[split.test]), expected, rtol=1e-6, atol=1e-8)
    else:
        assert (ours.predict(scaled[split.test]) == expected).all()
    assert score(x, labels, kind, split) == pytest.approx(
        theirs.score(x[split.test].astype(float), labels[split.test]), abs=1e-9
    )


def test_the_random_split_is_the_papers():
    train, test = train_test_split(np.arange(400), test_size=0.2, random_state=42)
    np.testing.assert_array_equal(random_split(400).train, train)
    np.testing.assert_array_equal(random_split(400).test, test)


def test_classes_that_are_plain_are_found():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 300)
    x = (np.eye(3)[y] + 0.05 * rng.normal(size=(300, 3))).astype(np.float32)
    assert score(x, y, "classification", random_split(300)) == 1.0
