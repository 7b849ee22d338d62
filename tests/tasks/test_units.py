"""Units on Dask: order, bounded failures, retries."""

import math
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from prefect import flow

from infra import clusters
from infra.errors import Unavailable, UserError
from tasks import units
from tasks.units import REPORTED, UnitsFailed, Work, in_words, progress, run_units, so_far
from tests.waiting import until


@pytest.fixture(scope="module")
def client():
    with clusters.connect("local", workers=2) as client:
        yield client


def double(n):
    return 2 * n


def after_the_next(directory, n):
    """An even one ends after its successor, which another worker does meanwhile."""
    if n % 2 == 0 and n < 4:
        until((directory / str(n + 1)).exists)
    (directory / str(n)).touch()
    return n


def sleeps(seconds):
    time.sleep(seconds)


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


def refuses(error, _):
    raise error


def test_results_come_in_the_order_of_the_units(client, tmp_path):
    """Also where they end in another."""
    assert run_units(client, partial(after_the_next, tmp_path), range(5), label="order") == [0, 1, 2, 3, 4]
    assert (tmp_path / "1").stat().st_mtime_ns <= (tmp_path / "0").stat().st_mtime_ns


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
        run_units(client, double, range(3), label="good", there=4)
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


def test_the_log_has_one_line_for_each_unit(client, caplog):
    caplog.set_level("DEBUG", "rangegrid")
    with pytest.raises(UnitsFailed):
        run_units(client, math.sqrt, [1, -4, 9], label="roots", name=lambda x: f"of {x}", max_failed_fraction=0.5)
    lines = [record.getMessage() for record in caplog.records if record.name == "rangegrid"]
    assert len(lines) == 3
    assert {re.sub(r"[123] of 3$", "", line) for line in lines if "done" in line} == {
        "roots: of 1 done, ",
        "roots: of 9 done, ",
    }
    (failed,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert re.fullmatch(
        "roots: of -4: ValueError: .*A rerun does it again and keeps what succeeded", failed.getMessage()
    )


def test_a_display_that_fails_is_no_failure_of_the_work(client, prefect, monkeypatch):
    """In a run, where the API stops to answer: the units are done, counted, and nothing is charged to them."""

    def gone(*_, **__):
        raise ConnectionError("no answer")

    @flow
    def work():
        return run_units(client, double, range(5), label="double")

    for name in ("create_progress_artifact", "update_progress_artifact"):
        monkeypatch.setattr(f"prefect.artifacts.{name}", gone)
        assert work() == [0, 2, 4, 6, 8]


def test_what_only_the_user_can_mend_is_no_outage(client):
    """So a deployment does not try it again by itself."""
    refused = partial(refuses, UserError("no such band: give another"))
    with pytest.raises(UserError, match=r"1 of 1 units failed \(1: no such band: give another") as raised:
        run_units(client, refused, [1], label="refused")
    assert not isinstance(raised.value, Unavailable)


def test_an_outage_among_the_causes_is_tried_again(client):
    with pytest.raises(UnitsFailed, match="the archive rests"):
        run_units(client, partial(refuses, Unavailable("the archive rests")), [1], label="outage")


def test_where_no_terminal_is_lines_tell_how_far_the_work_is(client, capfd, monkeypatch):
    """At the start, at every interval also while one unit takes long, and at the end."""
    monkeypatch.setattr(units, "EVERY", 0.05)
    run_units(client, sleeps, [0.5, 0.5, 0.5], label="slow", there=7)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("slow:")]
    assert lines[0] == "slow: 7 of 10"
    assert len(lines) > 5
    said = re.compile(r"slow: (\d+) of 10(?:, ([\d.]+) a second, 0:00:(\d\d) left)?")
    counts = [int(said.fullmatch(line)[1]) for line in lines]
    assert counts == sorted(counts)
    assert counts[-1] == 10
    for line, count in zip(lines, counts, strict=True):
        assert (said.fullmatch(line)[2] is None) == (count == 7)


def test_rate_and_time_left_are_of_what_this_run_does():
    work = Work("publish", 648, there=600, done=12)
    assert so_far(work, 24) == "publish: 612 of 648, 0.5 a second, 0:01:12 left"
    ended = Work("train", 1500, done=1500, note="loss 0.31")
    assert so_far(ended, 3) == "train: 1,500 of 1,500, 500 a second, 0:00:00 left; loss 0.31"


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0.00 B"), (999, "999.00 B"), (1000, "1.00 kB"), (64e9, "64.00 GB"), (5e15, "5,000.00 TB")]
)
def test_bytes_are_told_in_words(count, words):
    assert in_words(count) == words


UNREAD = """
import os
from {module} import {name}
read, write = os.pipe()
os.dup2(write, 2)
os.close(write)
os.close(read)
{work}
print("done")
"""
WRITERS = {
    "lines": ("tasks.units", "progress", "with progress('work', 2) as advance: advance(1)"),
    "log": ("flows.deployed", "logging", "[logging.getLogger('prefect').warning(text) for text in 'ab']"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_work_goes_on_where_nobody_reads_what_it_tells(writer):
    """As after the death of a run's worker, which reads what the run writes."""
    module, name, work = WRITERS[writer]
    code = UNREAD.format(module=module, name=name, work=work)
    ran = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert (ran.returncode, ran.stdout) == (0, "done\n")
