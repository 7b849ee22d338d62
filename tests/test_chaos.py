"""What `tests/soak.py` plans and tells: the same of the same seed, in time, fair to every kind; what a run ended by."""

from collections import Counter
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.states import Crashed

from tests.chaos import KINDS, Fault, plan
from tests.invariants import fates


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


@pytest.mark.parametrize(
    ("silent", "kind", "column"),
    [(True, "process of a run", "reconciled, run again"), (False, "STAC server", "run again")],
)
def test_a_run_that_fell_silent_is_put_down_to_what_killed_its_process(silent, kind, column):
    begin = datetime(2026, 1, 1, tzinfo=UTC)
    at = {"S3 server": 20, "process of a run": 40, "STAC server": 60}
    injected = [(begin + timedelta(seconds=s), Fault(s, name, 5.0, 0.0)) for name, s in at.items()]
    crashed = Crashed(timestamp=begin + timedelta(seconds=240))
    run = FlowRun(flow_id=uuid4(), deployment_id=uuid4(), run_count=1, start_time=begin, state=crashed)
    table, unexplained = fates(injected, [run], {str(run.id)} if silent else set(), timedelta(seconds=150))
    assert table.loc[kind, column] == 1
    assert table.loc["S3 server", "by itself"] == 1
    assert not unexplained
