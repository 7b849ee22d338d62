"""Makes one image of several of one place: the median of the pixels that are clear."""

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tasks.core.sentinel2.radiometry import MOST, NODATA_DN

NOT_CLEAR = (0, 1, 3, 8, 9, 10)  # SCL: no data, saturated, shadow, cloud (medium, high), cirrus


def composite(
    images: Sequence[NDArray[np.uint16]], classes: Sequence[NDArray[np.uint8]], offsets: Sequence[int]
) -> tuple[NDArray[np.uint16], int]:
    """Returns the median of the clear pixels of images of one grid, each after its offset.

    Args:
        images: Raw numbers, (band, y, x) each.
        classes: Scene classification of each, (y, x). A pixel is clear where no cloud, shadow, cirrus or defect is and
            all bands have data.
        offsets: DN to add to each image: -1000 or 0.

    Returns:
        Raw numbers, (band, y, x), rounded, 0 where no image is clear; and the DN to add to them: the least of the
        offsets, so that dark pixels of an image without one stay above nodata.
    """
    least = min(offsets)
    stack = np.stack(images).astype(np.float32)
    known = ((stack != NODATA_DN) & (stack <= MOST)).all(1) & ~np.isin(np.stack(classes), NOT_CLEAR)
    stack += np.subtract(offsets, least, dtype=np.float32)[:, None, None, None]
    stack[~np.broadcast_to(known[:, None], stack.shape)] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of pixels that no image has
        middle = np.rint(np.nanmedian(stack, axis=0))
    return np.nan_to_num(np.clip(middle, 1, MOST), nan=NODATA_DN).astype(np.uint16), least
