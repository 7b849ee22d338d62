"""The probes' splits and protocol."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import MinMaxScaler

from tasks.core.probes import block_of, blocked_split, random_split, score


@given(st.integers(0, 1000), st.sampled_from([5.0, 10.0, 30.0]))
def test_no_block_is_on_both_sides(seed, degrees):
    rng = np.random.default_rng(seed)
    lonlat = np.column_stack([rng.uniform(-180, 180, 300), rng.uniform(-90, 90, 300)])
    split, blocks = blocked_split(lonlat, degrees, seed), block_of(lonlat, degrees)
    assert not set(blocks[split.train]) & set(blocks[split.test])
    assert sorted([*split.train, *split.test]) == list(range(300))


def test_the_random_probe_is_the_papers():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 20)).astype(np.float32)
    y = x @ rng.normal(size=20) + rng.normal(size=400)
    train, test = train_test_split(np.arange(400), test_size=0.2, random_state=42)
    scaler = MinMaxScaler().fit(x[train].astype(float))
    ridge = RidgeCV(alphas=[0.1, 1, 10], cv=3).fit(scaler.transform(x[train].astype(float)), y[train])
    expected = ridge.score(scaler.transform(x[test].astype(float)), y[test])
    assert score(x, y, "regression", random_split(400)) == expected


def test_classes_that_are_plain_are_found():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 300)
    x = (np.eye(3)[y] + 0.05 * rng.normal(size=(300, 3))).astype(np.float32)
    assert score(x, y, "classification", random_split(300)) == 1.0
