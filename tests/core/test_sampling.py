"""Where places are drawn."""

import numpy as np
import pytest

from tasks.core.land import is_land, land_mask, mask
from tasks.core.sampling import draw_land, grid_zone


@pytest.mark.parametrize(
    ("lon", "lat", "land"),
    [(2.35, 48.86, True), (-60, -5, True), (150, -25, True), (-30, 30, False), (100, -30, False), (0, -85, True)],
)
def test_known_places(lon, lat, land):
    assert is_land(np.array([[lon, lat]], float))[0] == land


def test_mask_by_cells_is_the_mask_by_points():
    lon, lat = np.array([-75.0, 2.35]), np.array([48.86, -5.0])
    assert land_mask(lon, lat).tolist() == [[is_land(np.array([[x, y]]))[0] for x in lon] for y in lat]


def test_more_places_extend_the_same_sample():
    np.testing.assert_array_equal(draw_land(3000, 5)[:100], draw_land(100, 5))
    assert not np.array_equal(draw_land(100, 5), draw_land(100, 6))


def test_places_are_uniform_by_area():
    lonlat = draw_land(20_000, 0)
    assert is_land(lonlat).all()
    rows = np.arange(-90 + 1 / 24, 90, 1 / 12)
    weight = np.cos(np.radians(rows)) * mask().sum(1) * (rows > -80) * (rows < 84)
    expected = np.histogram(rows, 8, (-80, 84), weights=weight / weight.sum())[0] * len(lonlat)
    found = np.histogram(lonlat[:, 1], 8, (-80, 84))[0]
    assert (np.abs(found - expected) < 5 * np.sqrt(expected)).all()


def test_grid_zone_cells():
    zones = grid_zone(np.array([[-180, -80], [-174.01, -72.01], [179.9, 83.9], [2.35, 48.86]], float))
    assert zones.tolist() == [0, 0, 59 * 20 + 19, 30 * 20 + 16]
