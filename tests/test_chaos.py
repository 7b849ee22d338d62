"""The plan of faults of `tests/soak.py`: the same of the same seed, in time, and fair to every kind."""

from collections import Counter

import pytest

from tests.chaos import KINDS, plan


def test_a_plan_is_a_function_of_its_seed():
    assert plan(3, 1200) == plan(3, 1200)
    assert [fault.kind for fault in plan(3, 1200)] != [fault.kind for fault in plan(4, 1200)]
    assert plan(3, 600) == plan(3, 1200)[: len(plan(3, 600))]  # a shorter soak is the beginning of a longer one


@pytest.mark.parametrize("seed", range(5))
def test_faults_come_in_order_within_their_time_and_every_kind_in_turn(seed):
    faults = plan(seed, 1200)
    times = [fault.at for fault in faults]
    assert times == sorted(times)
    assert times[0] > 0
    assert times[-1] < 1200
    counts = Counter(fault.kind for fault in faults)
    assert set(counts) == set(KINDS)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert all(fault.lasts > 0 and 0 <= fault.draw < 1 for fault in faults)
