"""Units on Dask: order, bounded failures, retries."""

import math
import os
import time
from functools import partial

import pytest

from infra import clusters
from tasks.units import REPORTED, UnitsFailed, progress, run_units


@pytest.fixture(scope="module")
def client():
    with clusters.connect("local", workers=2) as client:
        yield client


def slowest_first(n):
    time.sleep(0.01 * (5 - n))
    return n


def fails_once(directory, n):
    """Kills its own worker process the first time that it sees 3."""
    mark = directory / str(n)
    if n == 3 and not mark.exists():
        mark.touch()
        os._exit(1)
    return n


def leaves_a_mark(directory, n):
    if n == 3:
        raise ValueError("three")
    time.sleep(0.2)
    (directory / str(n)).touch()


def test_results_come_in_the_order_of_the_units(client):
    assert run_units(client, slowest_first, range(5), label="order") == [0, 1, 2, 3, 4]


def test_one_failure_too_many_ends_the_run_and_names_the_unit(client):
    with pytest.raises(UnitsFailed, match=r"-4: ValueError: (math domain error|expected)"):
        run_units(client, math.sqrt, [1, -4, 9], label="roots")


def test_failures_within_the_bound_do_not_stop_the_others(client, tmp_path):
    with pytest.raises(UnitsFailed, match=r"1 of 6 units failed \(3: ValueError: three\)"):
        run_units(client, partial(leaves_a_mark, tmp_path), range(6), label="marks", max_failed_fraction=0.2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "4", "5"]


def test_a_report_counts_what_was_done_also_of_a_run_that_failed(client, tmp_path):
    token = REPORTED.set(parts := [])
    try:
        run_units(client, slowest_first, range(3), label="good", there=4)
        with pytest.raises(UnitsFailed):
            run_units(client, partial(leaves_a_mark, tmp_path), range(6), label="marks", max_failed_fraction=0.2)
        with progress("ends early", 10, there=2) as advance:
            advance(3)
    finally:
        REPORTED.reset(token)
    told = [(part.name, part.planned, part.there, part.done) for part in parts]
    assert told == [("good", 7, 4, 3), ("marks", 6, 0, 5), ("ends early", 10, 2, 3)]
    assert all(part.seconds > 0 for part in parts)


def test_a_killed_worker_costs_one_unit(client, tmp_path):
    assert run_units(client, partial(fails_once, tmp_path), range(6), label="killed") == list(range(6))


def test_no_units_is_no_work(client):
    assert run_units(client, math.sqrt, [], label="nothing") == []
