"""Why a place gets no patch, or none of one scene: the texts that parts, manifest, card and counters hold."""

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
