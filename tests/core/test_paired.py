"""Paired differences and their interval."""

import numpy as np
import pytest
from scipy import stats

from tasks.core.paired import paired


def test_the_interval_holds_0_where_the_corrected_test_of_nadeau_and_bengio_does_not_reject():
    rng, verdicts = np.random.default_rng(0), set()
    for shift in np.linspace(-4, 4, 41):
        ours, theirs = rng.normal(size=(2, 9))
        ours = ours + shift
        found = paired(ours, theirs, 1 / 2)
        difference = ours - theirs
        statistic = difference.mean() / np.sqrt((1 / 9 + 1 / 2) * difference.var(ddof=1))
        rejected = 2 * stats.t.sf(abs(statistic), 8) < 0.05
        assert (found.verdict != "level") == rejected
        assert found.mean == pytest.approx(difference.mean())
        verdicts.add(found.verdict)
    assert verdicts == {"above", "level", "below"}


def test_the_same_scores_are_level_and_one_split_has_no_interval():
    same = paired([0.5, 0.7], [0.5, 0.7], 1)
    assert (same.mean, same.low, same.high, same.verdict) == (0, 0, 0, "level")
    assert paired([0.9], [0.1], 1).verdict == "level"
    assert paired([0.9, 0.8], [0.8, 0.7], 1).verdict == "above"


def test_scores_of_other_splits_are_refused():
    with pytest.raises(ValueError, match="not of the same splits"):
        paired([0.5, 0.6], [0.5, 0.6, 0.7], 1)
