"""Where places are drawn."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial import cKDTree
from scipy.stats import chisquare

from tasks.core.earth.grid import GridSpec
from tasks.core.earth.land import is_land, land_mask, mask
from tasks.core.earth.recurrence import recurrence
from tasks.core.earth.sampling import draw_classes, draw_even, draw_land, grid_zone, square
from tasks.core.earth.sphere import EARTH_RADIUS_KM, unit_vectors

BOTH = pytest.mark.parametrize("draw", [draw_land, draw_even])


@pytest.mark.parametrize(
    ("lon", "lat", "land"),
    [(2.35, 48.86, True), (-60, -5, True), (150, -25, True), (-30, 30, False), (100, -30, False), (0, -85, True)],
)
def test_known_places(lon, lat, land):
    assert is_land(np.array([[lon, lat]], float))[0] == land


def test_mask_by_cells_is_the_mask_by_points():
    spec = GridSpec(15.0, 5, land="centre")
    assert land_mask(spec).tolist() == [[is_land(np.array([[x, y]]))[0] for x in spec.x] for y in spec.y]


@BOTH
def test_more_places_extend_the_same_sample(draw):
    np.testing.assert_array_equal(draw(3000, 5)[:100], draw(100, 5))
    assert not np.array_equal(draw(100, 5), draw(100, 6))
    assert draw(0, 5).shape == (0, 2)


def land_by_row():
    """Latitude of each row of the mask, and the area of its land in units of one cell at the equator."""
    rows = np.arange(-90 + 1 / 24, 90, 1 / 12)
    return rows, np.cos(np.radians(rows)) * mask().sum(1) * (rows > -80) * (rows < 84)


@BOTH
@pytest.mark.parametrize("seed", [0, 1])
def test_places_are_uniform_by_area(seed, draw):
    """Chi-square over bands of latitude, and over blocks of longitude, against the land's area."""
    lonlat = draw(40_000, seed)
    assert is_land(lonlat).all()
    rows, area = land_by_row()
    edges = np.arange(-80, 85, 4.0)
    expected = np.histogram(rows, edges, weights=area)[0]
    found = np.histogram(lonlat[:, 1], edges)[0]
    some = expected > 0
    assert found[~some].sum() == 0
    assert chisquare(found[some], expected[some] / expected.sum() * len(lonlat)).pvalue > 1e-3
    inside = np.abs(rows - 2) < 82
    weights = (mask() * np.cos(np.radians(rows))[:, None])[inside].sum(0).reshape(36, 120).sum(1)
    east = np.histogram(lonlat[:, 0], 36, (-180, 180))[0]
    assert chisquare(east[weights > 0], (weights / weights.sum() * len(lonlat))[weights > 0]).pvalue > 1e-3


def test_the_test_of_uniformity_sees_a_sample_by_degrees():
    rng = np.random.default_rng(0)
    by_degrees = rng.uniform((-180, -80), (180, 84), (200_000, 2))
    found = np.histogram(by_degrees[is_land(by_degrees)][:40_000, 1], np.arange(-80, 85, 4.0))[0]
    rows, area = land_by_row()
    expected = np.histogram(rows, np.arange(-80, 85, 4.0), weights=area)[0]
    some = expected > 0
    assert chisquare(found[some], expected[some] / expected.sum() * found.sum()).pvalue < 1e-9


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize(("south", "north"), [(-80, 84), (-11, 12.5)])
def test_even_places_leave_smaller_holes(seed, south, north):
    """Land lies nearer to them, on average and where it is far; so it does among the first of them."""
    land = draw_land(20_000, 99, south, north)
    for count in (100, 3000):
        even, independent = (km_to_nearest(draw(count, seed, south, north), land) for draw in (draw_even, draw_land))
        assert even.mean() < 0.92 * independent.mean()
        assert np.percentile(even, 95) < 0.9 * np.percentile(independent, 95)


def km_to_nearest(places, lonlat):
    return 2 * EARTH_RADIUS_KM * np.arcsin(cKDTree(unit_vectors(places)).query(unit_vectors(lonlat))[0] / 2)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_even_places_share_land_as_its_area_is(seed):
    """In blocks of land counts are nearer to the area than independent places can be: these are off by sqrt(n)."""
    lon, lat = np.meshgrid(np.arange(-180 + 1 / 24, 180, 1 / 12), np.arange(-90 + 1 / 24, 90, 1 / 12))
    area = mask() * np.cos(np.radians(lat)) * (lat > -80) * (lat < 84)
    edges = np.arange(-180, 181, 20), np.arange(-80, 85, 16)
    expected = np.histogram2d(lon.ravel(), lat.ravel(), edges, weights=area.ravel())[0]
    expected *= 20_000 / expected.sum()
    some = expected > 20
    off = [
        ((np.histogram2d(*draw(20_000, seed).T, edges)[0] - expected)[some] ** 2 / expected[some]).mean()
        for draw in (draw_even, draw_land)
    ]
    assert off[0] < 0.2
    assert 0.7 < off[1] < 1.4, "the measure is one of independent places"


def plastic(bits):
    """The root of x**3 = x + 1 to so many bits after the point, by bisection in whole numbers."""
    one = 1 << bits
    low, high = one, 2 * one
    while high - low > 1:
        middle = (low + high) // 2
        if middle**3 > (middle + one) * one**2:
            high = middle
        else:
            low = middle
    return Fraction(low, one)


@pytest.mark.parametrize("start", [0, 1, 12_345, 10**8, 7 * 10**9])
def test_the_recurrence_is_exact_far_out(start):
    """Against fractions: the n-th point is off by n * 2**-64 at most, and by what float64 rounds."""
    shift = np.random.default_rng(start).integers(0, 2**64, 2, dtype=np.uint64)
    found, root = recurrence(start, 3, shift), plastic(200)
    for number, point in enumerate(found, start):
        for value, first, step in zip(point, shift, (1 / root, 1 / root**2), strict=True):
            true = (Fraction(int(first), 2**64) + number * step) % 1
            off = (Fraction(float(value)) - true) % 1
            assert min(off, 1 - off) <= Fraction(number, 2**64) + Fraction(1, 2**53)
    assert ((found >= 0) & (found < 1)).all()


@BOTH
def test_limits_without_land_are_refused(draw):
    with pytest.raises(ValueError, match=r"no land between -61\.85 and -61\.55"):
        draw(5, 0, -61.85, -61.55)


def test_grid_zone_cells():
    zones = grid_zone(np.array([[-180, -80], [-174.01, -72.01], [179.9, 83.9], [2.35, 48.86]], float))
    assert zones.tolist() == [0, 0, 59 * 20 + 19, 30 * 20 + 16]


@given(st.lists(st.tuples(st.floats(-180, 180), st.floats(-80, 84)), min_size=2, max_size=40))
def test_no_cell_reaches_across_180(points):
    """Cells are what the catalog is asked for, so that no query does."""
    lonlat = np.array(points)
    for cell in np.unique(zones := grid_zone(lonlat)):
        within = lonlat[zones == cell]
        assert np.ptp(within[:, 0]) <= 6
        assert np.ptp(within[:, 1]) <= 12


POLES = (-90, 90)


def raster():
    classes = np.zeros((90, 180), np.uint8)
    classes[10:80, :60], classes[40:60, 60:90], classes[0, 100] = 1, 2, 7
    return classes, (-180.0, -90.0, 180.0, 90.0)


def class_at(lonlat):
    classes, _ = raster()
    return classes[((90 - lonlat[:, 1]) / 2).astype(int), ((lonlat[:, 0] + 180) / 2).astype(int)]


def test_classes_are_visited_in_turn():
    lonlat = draw_classes(3001, 0, *raster(), *POLES)
    assert class_at(lonlat).tolist() == ([1, 2, 7] * 1001)[:3001]
    np.testing.assert_array_equal(draw_classes(100, 0, *raster(), *POLES), lonlat[:100])
    assert not np.array_equal(draw_classes(100, 1, *raster(), *POLES), lonlat[:100])


def test_places_of_a_class_are_uniform_by_area():
    lonlat = draw_classes(60_000, 3, *raster(), *POLES)[::3]
    sines = np.sin(np.radians(lonlat[:, 1]))
    found = np.histogram(sines, 10, (np.sin(np.radians(-70)), np.sin(np.radians(70))))[0]
    assert (np.abs(found - 2000) < 5 * np.sqrt(2000)).all()


def test_classes_beyond_the_limits_are_none_and_longitudes_wrap():
    classes, _ = raster()
    places = draw_classes(999, 0, classes, (0.0, -90.0, 360.0, 90.0), -50, 20)
    assert places[:, 1].min() >= -50
    assert places[:, 1].max() <= 20
    assert places[:, 0].min() >= -180
    assert places[:, 0].max() < 180
    shifted = np.column_stack([(places[:, 0] % 360) - 180, places[:, 1]])
    assert class_at(shifted).tolist() == [1, 2] * 499 + [1], "class 7 lies north of the limit"


def test_a_raster_without_classes_is_refused():
    with pytest.raises(ValueError, match="0 everywhere"):
        draw_classes(5, 0, np.zeros((4, 8), np.uint8), (-180, -90, 180, 90))


def test_a_square_is_about_a_tile():
    places = draw_land(50_000, 0, -60, 60)
    near = np.abs(places - places[0]).max(1) < 0.05
    assert len(np.unique(square(places[near]))) <= 4
    assert 10_000 < len(np.unique(square(places))) < 16_000  # 1.3e8 km2 of land in squares of 1e4 km2
