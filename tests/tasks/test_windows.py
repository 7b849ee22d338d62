"""Rolling windows of time."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from pydantic import ValidationError

from tasks.params import PipelineParams, SampleParams


def asked(text, *when, zone=UTC):
    return SampleParams(datetime=text).at(datetime(*when, tzinfo=zone)).datetime


@pytest.mark.parametrize(
    ("text", "when", "expected"),
    [  # by the calendar
        ("last 90 days", (2026, 1, 1), "2025-10-03/2025-12-31"),
        ("last 1 day", (2024, 3, 1), "2024-02-29/2024-02-29"),
        ("last 2 weeks", (2024, 3, 1), "2024-02-16/2024-02-29"),
        ("last 1 month", (2023, 3, 31), "2023-02-28/2023-03-30"),
        ("last 3 years", (2024, 2, 29), "2021-02-28/2024-02-28"),
        ("previous day", (2026, 1, 1), "2025-12-31/2025-12-31"),
        ("previous week", (2026, 1, 1), "2025-12-22/2025-12-28"),
        ("previous month", (2024, 3, 31), "2024-02-01/2024-02-29"),
        ("previous month", (2026, 1, 1), "2025-12-01/2025-12-31"),
        ("previous quarter", (2026, 2, 14), "2025-10-01/2025-12-31"),
        ("previous season", (2026, 1, 1), "2025-09-01/2025-11-30"),
        ("previous season", (2024, 3, 1), "2023-12-01/2024-02-29"),
        ("previous season", (2024, 12, 1), "2024-09-01/2024-11-30"),
        ("previous year", (2024, 7, 4), "2023-01-01/2023-12-31"),
        ("  Previous   YEAR ", (2024, 7, 4), "2023-01-01/2023-12-31"),
        ("2021-07/2021-08", (2024, 7, 4), "2021-07/2021-08"),
    ],
)
def test_a_window_ends_before_the_day_that_it_is_asked_on(text, when, expected):
    assert asked(text, *when, 3, 0) == asked(text, *when, 23, 59) == expected


def test_days_are_those_of_utc():
    auckland = timezone(timedelta(hours=13))
    assert asked("previous day", 2026, 1, 1, 9, zone=auckland) == "2025-12-30/2025-12-30"


@pytest.mark.parametrize("text", ["last week", "last 0 days", "last 9999 years", "previous fortnight", "soon", "last"])
def test_what_is_no_window_is_refused(text):
    with pytest.raises(ValidationError, match="give"):
        SampleParams(datetime=text)


@pytest.mark.parametrize("line", ["a/b", "..", "-", ".hidden", "x" * 65, "a b"])
def test_a_line_is_a_name(line):
    with pytest.raises(ValidationError, match="line"):
        SampleParams(line=line)


def test_a_pipeline_fixes_the_window_of_its_sample():
    fixed = PipelineParams(sample=SampleParams(datetime="previous year")).at(datetime(2024, 7, 4, tzinfo=UTC))
    assert fixed == PipelineParams(sample=SampleParams(datetime="2023-01-01/2023-12-31"))
