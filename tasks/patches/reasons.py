"""Why a place gets no patch, or none of one scene: the texts that parts, manifest, card and counters hold."""

from collections.abc import Mapping
from enum import StrEnum


class Reason(StrEnum):
    """A reason of rejection; an empty text in its place means that there is none."""

    NO_SCENE = "no scene"
    THINNED = "passed over for equal tiles"
    QUARANTINED = "radiometry quarantined"
    UNTRIED = "not tried"
    """An earlier scene of the place served."""
    REFUSED = "access refused"
    MISSING_ASSET = "missing asset"
    """Followed by the band."""
    UNREADABLE_CLASSES = "unreadable scene classification"
    UNREADABLE = "unreadable"
    EDGE = "crosses the scene's edge"
    NODATA = "nodata"
    NOT_CLEAR = "not clear"
    SATURATED = "saturated"
    BEYOND_FORMAT = "numbers beyond the format"

    # Of images that are imported from files
    NO_PLACE = "row without a place on Earth"
    NO_FILE = "no such file"
    TWICE = "listed twice"
    UNLISTED = "not in the index"
    SAME_PIXELS = "the pixels of another image"
    NO_IMAGE = "no readable GeoTIFF"
    UNKNOWN_BANDS = "bands not known"
    NOT_UINT16 = "not of uint16"
    NOT_UTM = "not in UTM"
    NOT_SQUARE = "not north up with square pixels"
    PIXEL_SIZE = "other pixel size"
    TOO_SMALL = "smaller than a patch"
    SEVERAL_GRIDS = "bands on several grids"
    ELSEWHERE = "image elsewhere than its row says"
    UNTOLD = "nothing tells the offset"


def counts(rejected: Mapping[str, int]) -> str:
    """Returns counts in words, such as `3 nodata, 1 unreadable`."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(rejected.items())) or "none rejected"
