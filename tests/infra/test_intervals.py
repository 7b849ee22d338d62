"""Time windows: what people write, and what is asked, held and told by it; against the calendar of pandas."""

from datetime import UTC, datetime, timedelta

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from infra.errors import UserError
from infra.intervals import Interval
from tasks.params import SampleParams

TICK = timedelta(microseconds=1)


@given(st.dates(datetime(1700, 1, 1).date(), datetime(2200, 1, 1).date()), st.sampled_from(["YE", "ME", "D"]))
def test_a_year_a_month_and_a_day_mean_all_of_it(day, kind):
    period = pd.Period(day, kind.removesuffix("E"))
    begin, after = (
        moment.to_pydatetime().replace(tzinfo=UTC) for moment in (period.start_time, (period + 1).start_time)
    )
    found = Interval.parse(str(period))
    assert (found.start, found.end) == (begin, after - TICK)
    assert found.meets(begin, begin)
    assert found.meets(after - TICK, after - TICK)
    assert not found.meets(after, after)
    assert not found.meets(begin - TICK, begin - TICK)
    assert [pd.Timestamp(text) for text in found.asked.split("/")] == [begin, after]


NOON = datetime(2021, 6, 30, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "start", "end", "asked"),
    [
        ("2021-06-30T12:00:00Z", NOON, NOON, "2021-06-30T12:00:00Z/2021-06-30T12:00:00Z"),
        ("2021-06-30t12:00:00z/..", NOON, None, "2021-06-30T12:00:00Z/.."),
        ("2021-06-30T14:00+02:00/", NOON, None, "2021-06-30T12:00:00Z/.."),
        ("../2021-06-30T07:30:00-0430", None, NOON, "../2021-06-30T12:00:00Z"),
        ("/2021-06-30T12:00:00", None, NOON, "../2021-06-30T12:00:00Z"),
        ("2021-06-30T12:00:00.000000000Z", NOON, NOON, "2021-06-30T12:00:00Z/2021-06-30T12:00:00Z"),
        (" 2021-06-30T12:00:00Z / .. ", NOON, None, "2021-06-30T12:00:00Z/.."),
        (
            "2021-06-30T12:00:00.5Z",
            *[NOON + timedelta(seconds=0.5)] * 2,
            "2021-06-30T12:00:00Z/2021-06-30T12:00:01Z",
        ),
        (
            "0999",
            datetime(999, 1, 1, tzinfo=UTC),
            datetime(1000, 1, 1, tzinfo=UTC) - TICK,
            "0999-01-01T00:00:00Z/1000-01-01T00:00:00Z",
        ),
        (
            "9999",
            datetime(9999, 1, 1, tzinfo=UTC),
            datetime.max.replace(tzinfo=UTC),
            "9999-01-01T00:00:00Z/9999-12-31T23:59:59Z",
        ),
    ],
)
def test_what_a_window_is(text, start, end, asked):
    assert Interval.parse(text) == Interval(start, end)
    assert Interval.parse(text).asked == asked
    assert SampleParams(datetime=text).datetime == text


NONE = ["", "..", "/", "../..", "../", "2021-02-30", "2021-13", "2021-1-1", "20210630", "0000", "2021/2022/2023"]
NONE += ["2021-06-30T25:00:00Z", "2021-06-30T12:00:60Z", "2021-06-30 12:00", "0001-01-01T00:00:00+14:00", "٢٠٢١", "x"]


@pytest.mark.parametrize(("texts", "reason"), [(NONE, "is no time window: give a day"), (["2022/2021"], "ends before")])
def test_what_is_none_is_refused_before_work_starts(texts, reason):
    for text in texts:
        with pytest.raises(UserError, match=reason) as caught:
            Interval.parse(text)
        assert "\n" not in str(caught.value)
        with pytest.raises(ValidationError, match=reason):
            SampleParams(datetime=text)


def test_a_window_is_split_where_both_parts_are_shorter():
    year = Interval.parse("2021")
    assert year.split(NOON) == (Interval(year.start, NOON), Interval(NOON, year.end))
    assert Interval.parse("2021/..").split(NOON) == (Interval(year.start, NOON), Interval(NOON, None))
    for at in (year.start, year.end, year.start - TICK, year.end + TICK):
        assert year.split(at) is None
