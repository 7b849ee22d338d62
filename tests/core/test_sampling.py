"""Where places are drawn."""

import numpy as np
import pytest

from tasks.core.land import is_land, land_mask, mask
from tasks.core.sampling import draw_classes, draw_land, grid_zone, square


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


def raster():
    classes = np.zeros((90, 180), np.uint8)
    classes[10:80, :60], classes[40:60, 60:90], classes[0, 100] = 1, 2, 7
    return classes, (-180.0, -90.0, 180.0, 90.0)


def class_at(lonlat):
    classes, _ = raster()
    return classes[((90 - lonlat[:, 1]) / 2).astype(int), ((lonlat[:, 0] + 180) / 2).astype(int)]


def test_classes_are_visited_in_turn():
    lonlat = draw_classes(3001, 0, *raster())
    assert class_at(lonlat).tolist() == ([1, 2, 7] * 1001)[:3001]
    np.testing.assert_array_equal(draw_classes(100, 0, *raster()), lonlat[:100])
    assert not np.array_equal(draw_classes(100, 1, *raster()), lonlat[:100])


def test_places_of_a_class_are_uniform_by_area():
    lonlat = draw_classes(60_000, 3, *raster())[::3]
    sines = np.sin(np.radians(lonlat[:, 1]))
    found = np.histogram(sines, 10, (np.sin(np.radians(-70)), np.sin(np.radians(70))))[0]
    assert (np.abs(found - 2000) < 5 * np.sqrt(2000)).all()


def test_a_raster_without_classes_is_refused():
    with pytest.raises(ValueError, match="0 everywhere"):
        draw_classes(5, 0, np.zeros((4, 8), np.uint8), (-180, -90, 180, 90))


def test_a_square_is_about_a_tile():
    places = draw_land(50_000, 0, -60, 60)
    near = np.abs(places - places[0]).max(1) < 0.05
    assert len(np.unique(square(places[near]))) <= 4
    assert 10_000 < len(np.unique(square(places))) < 16_000  # 1.3e8 km2 of land in squares of 1e4 km2
