"""Tells how much each patch of a sample counts beside the others: as much as the land that it stands for.

Places drawn evenly over the land stand for as much each, and so count 1. Places drawn by class in turn stand for the
land of their class, shared by its patches. Tiles and lists tell no design: each of their patches counts 1.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

from infra import storage
from infra.addresses import as_url, shown
from infra.errors import UserError
from tasks.core.earth.region import Region
from tasks.patches.places import read_classes
from tasks.products import PatchesCard
from tasks.tables.regions import region_of
from tasks.units import log

Float = NDArray[np.float64]


def weights_of(url: str, card: PatchesCard, lonlat: Float) -> Float | None:
    """Returns how much each patch counts, (n,), of mean 1; none where each counts 1.

    Args:
        url: Directory of the patches.
        card: Their card.
        lonlat: Their places, (n, 2) degrees.
    """
    recipe = card.recipe
    if recipe.places != "class":
        return None
    source = str(recipe.source)
    try:
        digest = hashlib.sha256(storage.read(as_url(source))).hexdigest()
        classes, bounds = read_classes(source)
    except (UserError, OSError):
        digest = ""
    if digest != recipe.source_sha256:
        log().warning("%s is no longer what patches were drawn by: each counts 1", shown(source))
        return None
    region = region_of(url, card.region.geometry) if card.region else None
    return by_class(classes, bounds, lonlat, recipe.south, recipe.north, region)


def by_class(
    classes: NDArray[np.integer],
    bounds: tuple[float, float, float, float],
    lonlat: Float,
    south: float,
    north: float,
    region: Region | None = None,
) -> Float:
    """Returns how much each place counts, (n,): the area of its class where places were drawn, by the places in it.

    Args:
        classes: (lat, lon), north up; 0 is no class.
        bounds: West, south, east, north of the raster in degrees.
        lonlat: Places, (n, 2) degrees.
        south: Southern limit in degrees.
        north: Northern limit in degrees.
        region: Where places were drawn between these; unset, everywhere.
    """
    west, bottom, east, top = bounds
    height, width = classes.shape
    centres = top - (np.arange(height) + 0.5) * (top - bottom) / height
    inside = np.repeat(((south <= centres) & (centres <= north))[:, None], width, axis=1)
    if region is not None:
        across = west + (np.arange(width) + 0.5) * (east - west) / width
        inside &= region.holds(np.stack(np.meshgrid(across, centres), axis=-1).reshape(-1, 2)).reshape(inside.shape)
    areas = np.repeat(np.cos(np.radians(centres))[:, None], width, axis=1)
    area = np.bincount(np.maximum(classes, 0)[inside], areas[inside])
    row = np.clip((top - lonlat[:, 1]) / (top - bottom) * height, 0, height - 1).astype(int)
    column = np.clip((lonlat[:, 0] - west) % 360 / (east - west) * width, 0, width - 1).astype(int)
    own = classes[row, column]
    found = area[own] / np.bincount(own)[own]
    return found / found.mean()
