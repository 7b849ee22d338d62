"""Parses usable items once, with their place and their time."""

import math
from datetime import UTC, datetime
from typing import Any, Self

import pystac
import shapely

BROKEN = (  # errors of JSON that is no item
    *(LookupError, TypeError, ValueError, AttributeError, OverflowError),
    *(pystac.STACError, pystac.STACTypeError, shapely.errors.ShapelyError),
)


class UsableItem(pystac.Item):
    """An item that has a place, a time and assets.

    Attributes:
        shape: Its footprint between -180 and 180 degrees, see `footprint`.
        begin: Its first moment, with a zone.
        end: Its last moment, with a zone.
    """

    shape: shapely.Geometry
    begin: datetime
    end: datetime

    @classmethod
    def parse(cls, feature: Any) -> Self:
        """Reads a feature of a catalog; a cloud cover that is no number of percent becomes None.

        Raises:
            Exception: One of `BROKEN`, for what is no such item.
        """
        item = cls.from_dict(feature, preserve_dict=False, migrate=False)  # migration copies all, for nothing here
        cloud = item.properties.get("eo:cloud_cover")
        if cloud is None or math.isnan(float(cloud)):
            item.properties["eo:cloud_cover"] = None
        else:
            item.properties["eo:cloud_cover"] = float(cloud)
        item.begin, item.end = _times(item)
        if item.datetime is None:  # the manifest tells when an image begins
            item.datetime, item.properties["datetime"] = item.begin, item.properties["start_datetime"]
        item.shape = footprint(item.geometry)
        if not item.assets or item.shape.is_empty:
            raise ValueError("the item has no place or no assets")
        return item


def _times(item: pystac.Item) -> tuple[datetime, datetime]:
    """Returns when the item begins and ends."""
    known = item.common_metadata
    first, last = known.start_datetime or item.datetime, known.end_datetime or item.datetime
    ends = [time if time.tzinfo else time.replace(tzinfo=UTC) for time in (first, last or first) if time]
    return ends[0], ends[-1]


def footprint(geometry: Any) -> shapely.Geometry:
    """Returns the shape of a GeoJSON geometry within -180 and 180 degrees, split at the antimeridian.

    A polygon wider than half the Earth is one that crosses and was written unsplit; longitudes beyond 180 are another
    way to write the same.

    Args:
        geometry: GeoJSON in lon, lat.
    """
    parts = shapely.get_parts(shapely.force_2d(shapely.geometry.shape(geometry)))
    return shapely.union_all([piece for part in parts for piece in _split(part)])


def _split(part: shapely.Geometry) -> list[shapely.Geometry]:
    west, _, east, _ = part.bounds
    if east - west > 180:
        part = shapely.make_valid(shapely.transform(part, lambda xy: xy + [360, 0] * (xy[:, :1] < 0)))
        west, _, east, _ = part.bounds
    if west >= -180 and east <= 180:
        return [part]
    worlds = [(turn, shapely.box(turn - 180, -90, turn + 180, 90)) for turn in (-360, 0, 360)]
    return [shapely.transform(part & world, lambda xy, turn=turn: xy - [turn, 0]) for turn, world in worlds]
