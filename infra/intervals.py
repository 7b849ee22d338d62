"""Parses spans of time as in STAC: a year, a month, a day or a moment, or two of these with `/` between."""

import calendar
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Self

from infra.errors import UserError

DATE = re.compile(r"([0-9]{4})(?:-([0-9]{2})(?:-([0-9]{2}))?)?")
MOMENT = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]+)?)?(Z|[+-][0-9]{2}:?[0-9]{2})?")
OPEN = ("", "..")
WHOLE = (0, 999_999)  # microseconds of a first or last moment that the second alone tells


@dataclass(frozen=True)
class Interval:
    """A span of time with both its ends, either of which may be open."""

    start: datetime | None
    """First moment in UTC; None: no beginning."""
    end: datetime | None
    """Last moment in UTC; None: no end."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads `2021`, `2021-06`, `2021-06-30`, an RFC 3339 time, or two of them; `..` or nothing is an open end.

        A year, a month or a day means all of it. A time without a zone is UTC.

        Raises:
            UserError: It is none, has no end at all, or ends before it begins.
        """
        first, *more = (part.strip() for part in text.split("/"))
        last = more[0] if more else first
        if len(more) > 1 or (first in OPEN and last in OPEN):
            raise _refusal(text)
        try:
            start = None if first in OPEN and more else _moments(first)[0]
            end = None if last in OPEN and more else _moments(last)[1]
        except (ValueError, OverflowError):
            raise _refusal(text) from None
        if start and end and start > end:
            raise UserError(f"the time window {text!r} ends before it begins: give the earlier date first")
        return cls(start, end)

    def meets(self, first: datetime, last: datetime) -> bool:
        """Tells whether any moment from `first` to `last` is within."""
        return (self.start is None or last >= self.start) and (self.end is None or first <= self.end)

    def split(self, at: datetime) -> tuple["Interval", "Interval"] | None:
        """Returns the parts before and after a moment, which both hold it; nothing where one would be as long."""
        if at in (self.start, self.end) or not self.meets(at, at):
            return None
        return Interval(self.start, at), Interval(at, self.end)

    @property
    def asked(self) -> str:
        """Returns RFC 3339 text for a server, in whole seconds, so up to one second wider on each side."""
        start = self.start and self.start.replace(microsecond=0)
        return "/".join([_text(start) if start else "..", _text(_up(self.end)) if self.end else ".."])

    def temporal(self, earliest: datetime, latest: datetime) -> dict[str, Any]:
        """Returns the properties by which a STAC Item tells it.

        Args:
            earliest: Stands in for a beginning that is open, since STAC knows none.
            latest: Stands in for an open end.
        """
        start = self.start or min(earliest, self.end or earliest)
        end = self.end or max(latest, start)
        return {"datetime": None, "start_datetime": _text(start), "end_datetime": _text(end)}


def _refusal(text: str) -> UserError:
    return UserError(
        f"{text!r} is no time window: give a day, a month or a year, as 2021-06-30, 2021-06 or 2021, "
        "or two with / between, as 2021-01-01/2021-12-31; .. is an open end"
    )


def _moments(text: str) -> tuple[datetime, datetime]:
    """Returns the first and last moment of a date; for a time, the same moment twice."""
    if match := DATE.fullmatch(text):
        year, month = int(match[1]), int(match[2] or 12)
        first = datetime(year, int(match[2] or 1), int(match[3] or 1), tzinfo=UTC)
        until = datetime(year, month, int(match[3] or calendar.monthrange(year, month)[1]), tzinfo=UTC)
        return first, until.replace(hour=23, minute=59, second=59, microsecond=999_999)
    if not MOMENT.fullmatch(text.upper()):
        raise ValueError(text)
    moment = datetime.fromisoformat(text.upper())
    moment = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    return moment, moment


def _up(moment: datetime) -> datetime:
    """Returns the whole second at or after a moment."""
    if not moment.microsecond or moment.year == 9999:
        return moment.replace(microsecond=0)
    return moment.replace(microsecond=0) + timedelta(seconds=1)


def _text(moment: datetime) -> str:
    precision = "seconds" if moment.microsecond in WHOLE else "microseconds"
    return moment.isoformat(timespec=precision).replace("+00:00", "Z")
