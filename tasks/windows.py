"""Resolves rolling time windows, `last 90 days` or `previous month`, which schedules use instead of fixed dates.

A window is whole days in UTC. It ends with the day before the one on which it is asked for, so that it is the same
however late on that day a run begins.
"""

import re
from datetime import UTC, date, datetime, timedelta

from dateutil.relativedelta import relativedelta

EXAMPLES = "`last 90 days`, `previous month`, `previous season` or `previous year`"
LAST = re.compile(r"last (\d{1,4}) (day|week|month|year)s?")
PREVIOUS = re.compile(r"previous (day|week|month|quarter|season|year)")
MONTHS = {"month": 1, "quarter": 3, "season": 3, "year": 12}  # a season begins in December, March, June or September
DAY = timedelta(days=1)


def is_rolling(text: str) -> bool:
    """Tells whether a window is a rolling one, which `fixed` gives its dates."""
    return text.lstrip()[:1].isalpha()


def fixed(text: str, at: datetime) -> str:
    """Returns the dates of a rolling window.

    Args:
        text: A window, such as `last 90 days` or `previous month`.
        at: The time at which it is asked for.

    Returns:
        An interval of days, such as 2021-01-01/2021-01-31.

    Raises:
        ValueError: There is no such window.
    """
    words, today = " ".join(text.lower().split()), at.astimezone(UTC).date()
    if (last := LAST.fullmatch(words)) and int(last[1]):
        first, end = _before(today, int(last[1]), last[2]), today
    elif previous := PREVIOUS.fullmatch(words):
        end = _begin(today, previous[1])
        first = _before(end, MONTHS.get(previous[1], 1), "month" if previous[1] in MONTHS else previous[1])
    else:
        raise ValueError(
            f"{text!r} is no time window: give a day, a month or a year, two of them with / between, or {EXAMPLES}"
        )
    return f"{first}/{end - DAY}"


def _before(day: date, count: int, unit: str) -> date:
    try:
        return day - relativedelta(**{f"{unit}s": count})
    except (ValueError, OverflowError):
        raise ValueError(f"{count} {unit}s before {day} is before all dates: give fewer") from None


def _begin(day: date, unit: str) -> date:
    """Returns the first day of the week, month, quarter, season or year that a day is in."""
    if unit not in MONTHS:
        if unit == "week":
            return day - day.weekday() * DAY
        return day
    if unit == "season":
        past = day.month % 3
    else:
        past = (day.month - 1) % MONTHS[unit]
    return day.replace(day=1) - relativedelta(months=past)
