"""Alignment of tables: true ones pass, every kind of exchange fails, over many seeds."""

import numpy as np
import pytest
from sklearn.cross_decomposition import CCA

from tasks.core.alignment import alignment, components


def pair(n, noise, seed):
    """Two tables that share four hidden columns."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(n, 4))
    tables = [hidden @ rng.normal(size=(4, width)) + noise * rng.normal(size=(n, width)) for width in (30, 20)]
    return tables[0], np.tanh(tables[1])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n", [100, 600, 6000])
def test_what_belongs_together_passes_and_shuffled_fails(n, seed):
    x, y = pair(n, 1.0, seed)
    assert alignment(x, y).aligned
    assert not alignment(x, np.random.default_rng(seed).permutation(y)).aligned
    assert not alignment(x, np.roll(y, 1, axis=0)).aligned


def test_unrelated_tables_seldom_pass():
    """At five standard errors, none in a hundred."""
    found = [alignment(pair(200, 1.0, seed)[0], pair(200, 1.0, 1000 + seed)[1]) for seed in range(100)]
    assert not any(one.aligned for one in found)
    heights = np.array([(one.score - one.shuffled) / one.error for one in found])
    assert abs(heights.mean()) < 0.5


def test_a_shift_from_some_row_on_is_found_where_it_is():
    x, y = pair(1600, 0.5, 0)
    y[800:1200] = np.roll(y[800:1200], 1, axis=0)
    found = alignment(x, y)
    assert not found.aligned
    assert found.broken == ((800, 900), (900, 1000), (1000, 1100), (1100, 1200))


def test_the_score_grows_with_the_canonical_correlation():
    """scikit-learn's CCA as an independent measure of how much two tables share."""
    ours, theirs = [], []
    for noise in (0.5, 1.0, 2.0, 4.0):
        x, y = pair(2000, noise, 1)
        ours.append(alignment(x, y).score)
        a, b = CCA(n_components=1).fit_transform(x, y)
        theirs.append(np.corrcoef(a[:, 0], b[:, 0])[0, 1])
    assert np.argsort(ours).tolist() == np.argsort(theirs).tolist()


def test_components_are_uncorrelated_and_of_variance_1():
    parts = components(pair(1000, 1.0, 0)[0])
    np.testing.assert_allclose(parts.T @ parts / 1000, np.eye(parts.shape[1]), atol=1e-8)


@pytest.mark.parametrize("rank", [3, 30])
def test_components_are_those_of_a_singular_value_decomposition(rank):
    """Columns that depend on others add none."""
    table = pair(1000, 1.0, 0)[0]
    table = table[:, :rank] @ np.random.default_rng(1).normal(size=(rank, 30)) if rank < 30 else table
    left, _, _ = np.linalg.svd((table - table.mean(0)) / table.std(0), full_matrices=False)
    found = components(table)
    expected = left * np.sqrt(1000) * np.sign((left * found).sum(0))
    np.testing.assert_allclose(found[:, :rank], expected[:, :rank], atol=1e-8)
    assert np.abs(found[:, rank:]).max(initial=0) < 1e-6 * found.std(0).max()


def test_constant_columns_do_no_harm_and_few_rows_cannot_tell():
    x, y = pair(200, 0.5, 0)
    assert alignment(np.c_[x, np.ones(200)], np.c_[np.zeros(200), y]).aligned
    with pytest.raises(ValueError, match="63 rows are too few"):
        alignment(x[:63], y[:63])
