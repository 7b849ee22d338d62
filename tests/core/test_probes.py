"""The probes' splits and protocol, against scikit-learn and PyTorch."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Ridge, RidgeClassifierCV, RidgeCV
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler

from tasks.core.probes import (
    ALPHAS,
    Features,
    Moments,
    Split,
    block_of,
    blocked_folds,
    by_factors,
    by_spectrum,
    near_duplicates,
    predict,
    probe,
    random_split,
    score,
    spectrum_pays,
)


@given(st.integers(0, 1000), st.sampled_from([5.0, 10.0, 30.0]))
def test_every_place_is_scored_once_and_no_block_is_on_both_sides(seed, degrees):
    rng = np.random.default_rng(seed)
    lonlat = np.column_stack([rng.uniform(-180, 360, 300), rng.uniform(-90, 90, 300)])
    blocks, folds = block_of(lonlat, degrees), blocked_folds(lonlat, degrees, 4, seed)
    assert sorted(np.concatenate([split.test for split in folds])) == list(range(300))
    for split in folds:
        assert not set(blocks[split.train]) & set(blocks[split.test])
        assert sorted([*split.train, *split.test]) == list(range(300))


def test_longitudes_east_of_180_are_in_the_block_of_their_place():
    assert block_of(np.array([[200.0, 5.0]]), 10) == block_of(np.array([[-160.0, 5.0]]), 10)


def test_too_few_blocks_are_refused():
    with pytest.raises(ValueError, match="lie in 1 blocks of 10 degrees, too few for 3 folds"):
        blocked_folds(np.full((9, 2), 5.0), 10, 3)


def sklearn_probe(kind):
    ridge = RidgeClassifierCV if kind == "classification" else RidgeCV
    return make_pipeline(MinMaxScaler(), ridge(alphas=[0.1, 1, 10], cv=10 if kind == "classification" else 3))


def data(kind, n, d, seed, edges=(-2.8, -1, 0, 0.3, 1.5)):
    """Features with near-duplicate columns, and labels with rare classes."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    x[:, d // 2 :] = x[:, : d - d // 2] + 1e-3 * rng.normal(size=(n, d - d // 2))
    y = x @ rng.normal(size=d) / np.sqrt(d) + 0.3 * rng.normal(size=n)
    labels = y if kind == "regression" else np.digitize(y, edges).astype(str)
    return x.astype(np.float32), labels


@pytest.mark.filterwarnings("ignore:The least populated class")
@pytest.mark.parametrize("kind", ["classification", "regression"])
@pytest.mark.parametrize(("n", "d"), [(400, 20), (600, 300), (150, 200)])
@pytest.mark.parametrize("seed", range(3))
def test_the_probe_is_scikit_learns(kind, n, d, seed):
    x, labels = data(kind, n, d, seed)
    split = random_split(n)
    train, test = x[split.train].astype(float), x[split.test].astype(float)
    ours, theirs = (made.fit(train, labels[split.train]) for made in (probe(kind), sklearn_probe(kind)))
    assert ours[1].alpha_ == theirs[1].alpha_
    expected = theirs.predict(test)
    if kind == "regression":
        np.testing.assert_allclose(ours.predict(test), expected, rtol=1e-6, atol=1e-8)
    else:
        assert (ours.predict(test) == expected).all()
        np.testing.assert_allclose(ours.decision_function(test), theirs.decision_function(test), atol=1e-7)
    assert (predict(x, labels, kind, split) == ours.predict(test)).all()
    assert score(x, labels, kind, split) == pytest.approx(theirs.score(test, labels[split.test]), abs=1e-9)


@pytest.mark.filterwarnings("ignore:The least populated class")
@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_features_that_vary_in_few_directions_are_probed_in_these_with_the_same_result(kind):
    """Of means over images, as retrieval makes; by scikit-learn on all dimensions. Some rows are unknown."""
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.full(60, 0.1), size=900)
    wide = (weights @ rng.normal(size=(60, 320)) * rng.uniform(1e-3, 1e3, 320)).astype(np.float32)
    wide[:, 0] = 7
    _, labels = data(kind, 900, 20, 1)
    labels = np.where(weights[:, 0] > 0.02, labels[0], labels)
    kept, split = Features.of(np.vstack([np.full((5, 320), np.nan, np.float32), wide])), random_split(900)
    assert kept.along.shape[1] < 80
    found = predict(kept.at(np.arange(5, 905)), labels, kind, split)
    expected = sklearn_probe(kind).fit(wide[split.train].astype(float), labels[split.train])
    expected = expected.predict(wide[split.test].astype(float))
    if kind == "regression":
        np.testing.assert_allclose(found, expected, atol=2e-4 * labels.std())
    else:
        assert (found == expected).all()


def test_a_training_part_that_spans_too_little_is_probed_as_it_is():
    rng = np.random.default_rng(0)
    wide = (rng.normal(size=(400, 30)) @ rng.normal(size=(30, 320))).astype(np.float32)
    wide[-1, 0] *= 1e3
    split, labels = Split(np.arange(300), np.arange(300, 400)), wide[:, 1] + rng.normal(size=400)
    kept = Features.of(wide)
    assert kept.along is not None
    assert kept.narrow(split.train) is None
    assert (predict(kept, labels, "regression", split) == predict(wide, labels, "regression", split)).all()


@pytest.mark.parametrize("way", [by_spectrum, by_factors])
@pytest.mark.parametrize(("n", "d"), [(120, 8), (90, 150)])
def test_both_ways_to_held_out_outputs_are_scikit_learns(way, n, d):
    rng = np.random.default_rng(0)
    x, y = rng.normal(2, 1, size=(n, d)), rng.normal(3, 1, size=(n, 4))
    parts = [held for _, held in KFold(10).split(x)]
    found = way(x, y, Moments.of(x, y), parts, ALPHAS)
    expected = [cross_val_predict(Ridge(alpha), x, y, cv=KFold(10)) for alpha in ALPHAS]
    np.testing.assert_allclose(found, expected, atol=1e-8)


def test_few_rows_of_many_features_go_by_the_spectrum():
    assert spectrum_pays(2000, 1280, 10, 3)
    assert not spectrum_pays(8000, 1280, 10, 3)
    assert not spectrum_pays(2000, 1280, 3, 3)


@pytest.mark.filterwarnings("ignore:The least populated class")
def test_the_spectrum_tells_classes_as_scikit_learn_does(monkeypatch):
    monkeypatch.setattr("tasks.core.probes.spectrum_pays", lambda *_: True)
    x, labels = data("classification", 300, 120, 4)
    ours, theirs = (make("classification").fit(x.astype(float), labels) for make in (probe, sklearn_probe))
    assert ours[1].alpha_ == theirs[1].alpha_
    assert (ours.predict(x.astype(float)) == theirs.predict(x.astype(float))).all()


def test_two_classes_are_told_as_scikit_learn_tells_them():
    x, labels = data("classification", 200, 30, 0, edges=(0.2,))
    ours, theirs = (
        made.fit(x.astype(float), labels) for made in (probe("classification"), sklearn_probe("classification"))
    )
    assert ours[1].alpha_ == theirs[1].alpha_
    assert (ours.predict(x) == theirs.predict(x)).all()


def test_the_probe_works_in_scikit_learns_tools():
    x, labels = data("regression", 200, 10, 0)
    found, expected = (
        cross_val_predict(made, x.astype(float), labels) for made in (probe("regression"), sklearn_probe("regression"))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("n", [400, 401, 403, 404])
def test_the_random_split_is_the_papers(n):
    theirs = torch.utils.data.random_split(range(n), [0.8, 0.2], torch.Generator().manual_seed(42))
    for part, rows in zip(theirs, (random_split(n).train, random_split(n).test), strict=True):
        assert list(part) == rows.tolist()


def test_classes_that_are_plain_are_found():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 300)
    x = (np.eye(3)[y] + 0.05 * rng.normal(size=(300, 3))).astype(np.float32)
    assert score(x, y, "classification", random_split(300)) == 1.0


def test_labels_that_are_shuffled_are_not_found():
    x, labels = data("regression", 2000, 20, 0)
    shuffled = np.random.default_rng(1).permutation(labels)
    assert abs(score(x, shuffled, "regression", random_split(2000))) < 0.1


def test_near_duplicates_across_the_split_are_counted():
    rng = np.random.default_rng(0)
    lonlat = np.column_stack([rng.uniform(-180, 180, 500), rng.uniform(-80, 80, 500)])
    split = random_split(500)
    before = near_duplicates(lonlat, split, 1.0)
    lonlat[split.test[:30]] = lonlat[split.train[:30]] + [0, 0.008]  # 0.9 km
    lonlat[split.test[30:40]] = lonlat[split.train[30:40]] + [0, 0.01]  # 1.1 km
    assert near_duplicates(lonlat, split, 1.0) == before + 30
