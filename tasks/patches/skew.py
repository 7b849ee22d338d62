"""Tells how a sample is spread over years, seasons and latitudes, beside what an even spread would be.

Catalogs have holes, and clouds lie where they lie: a sample takes what is there. So its card tells it.
"""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd

from infra.errors import UserError
from infra.intervals import Interval
from tasks.core.earth.land import land_km2
from tasks.core.earth.region import Region

BAND = 15  # degrees of latitude
SEASONS = ("December to February", "March to May", "June to August", "September to November")
POOR, TOLD = 0.5, 0.02  # share of its even share below which a group is told as poor, where that is at least so much

Skew = dict[str, dict[str, dict[str, float]]]  # by kind and group: `patches`, `share`, `even`


def season_of(month: int) -> str:
    """Returns the season of a month, as its three months."""
    return SEASONS[month % 12 // 3]


def skew_of(rows: pd.DataFrame, window: str, south: float, north: float, region: Region | None = None) -> Skew:
    """Returns the shares of a sample's patches by year, season and latitude, beside those of an even spread.

    Args:
        rows: Columns `lat`, and `datetime` as text, empty where it is unknown.
        window: The time window of the images, or an empty text.
        south: Southern limit of the places in degrees.
        north: Northern limit.
        region: Where the places were drawn; none for everywhere.
    """
    told = rows["datetime"].where(rows["datetime"] != "")
    times = pd.to_datetime(told, utc=True, format="ISO8601", errors="coerce").dropna()
    lower = np.floor(rows["lat"] / BAND).astype(int) * BAND
    found = {"latitude": _beside(lower.map(_band), _land(lower, south, north, region))}
    if len(times):
        days = _days(window, times)
        years, seasons = ([*map(kind, days)] for kind in (lambda day: str(day.year), lambda day: season_of(day.month)))
        found["year"] = _beside(times.dt.year.astype(str), pd.Series(years).value_counts())
        found["season"] = _beside(times.dt.month.map(season_of), pd.Series(seasons).value_counts())
    return found


def _band(lower: int) -> str:
    return f"{lower} to {lower + BAND}"


def _land(lower: pd.Series, south: float, north: float, region: Region | None) -> pd.Series:
    """Returns the area of land of each band of latitude between the limits."""
    edges = range(min(lower.min(), int(south // BAND) * BAND), int(np.ceil(north / BAND)) * BAND, BAND)
    areas = {_band(low): land_km2(max(low, south), min(low + BAND, north), region) for low in edges}
    return pd.Series({band: area for band, area in areas.items() if area})


def _days(window: str, times: pd.Series) -> pd.DatetimeIndex:
    """Returns the days of a window; those between the first and the last image where it is open or unknown."""
    first, last = times.min(), times.max()
    try:
        told = Interval.parse(window)
    except UserError:
        told = Interval(None, None)
    begin, end = told.start or first, min(told.end or last, datetime.now(UTC) + timedelta(days=1))
    return pd.date_range(pd.Timestamp(begin).floor("D"), pd.Timestamp(end).floor("D"), freq="D")


def _beside(groups: pd.Series, even: pd.Series) -> dict[str, dict[str, float]]:
    """Returns for each group the number of patches, their share, and the even share."""
    counts, whole = groups.value_counts(), max(float(even.sum()), 1.0)
    named = [*even.index, *(name for name in counts.index if name not in even.index)]
    if all(name in SEASONS for name in named):
        named.sort(key=SEASONS.index)
    elif not any(" to " in name for name in named):
        named.sort()
    return {
        name: {
            "patches": int(counts.get(name, 0)),
            "share": round(float(counts.get(name, 0)) / len(groups), 4),
            "even": round(float(even.get(name, 0.0)) / whole, 4),
        }
        for name in named
    }


def poor(skew: Skew) -> list[str]:
    """Returns the groups that have less than half of their even share, in words."""
    return [
        f"{kind} {name}: {group['share']:.1%} of the patches, {group['even']:.1%} if even"
        for kind, groups in skew.items()
        for name, group in groups.items()
        if group["even"] >= TOLD and group["share"] < POOR * group["even"]
    ]


def table(skew: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Returns the shares as a Markdown table."""
    rows = [
        f"| {kind} | {name} | {group['patches']:,} | {group['share']:.1%} | {group['even']:.1%} |"
        for kind, groups in skew.items()
        for name, group in groups.items()
    ]
    return "\n".join(["| by | group | patches | share | even |", "|---|---|---|---|---|", *rows])
