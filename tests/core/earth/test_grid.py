"""The geometry of the grid."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyproj import Transformer

from tasks.core.earth.grid import GridSpec, Tile
from tasks.core.earth.plane import Plane

specs = st.builds(GridSpec, st.sampled_from([0.5, 1.0, 1.5, 2.0, 4.0, 10.0, 22.5]), st.integers(5, 90))
EUROPE = (2.5e6, 1.4e6, 7.5e6, 5.5e6)


@given(specs)
def test_tiles_cover_every_cell_once(spec):
    count = np.zeros(spec.shape, int)
    for tile in spec.tiles():
        assert (tile.rows, tile.columns) == count[tile.window].shape
        count[tile.window] += 1
    assert (count == 1).all()


@given(specs)
def test_centres_are_north_up_half_a_step_inside(spec):
    lat, lon = spec.y, spec.x
    assert lat[0] == 90 - spec.step / 2 == -lat[-1]
    assert lon[0] == -180 + spec.step / 2 == -lon[-1]
    assert (np.diff(lat) < 0).all()
    assert (np.diff(lon) > 0).all()


def test_tile_coordinates_are_lon_lat():
    spec = GridSpec(10.0, 5)
    tile = list(spec.tiles())[1]
    assert spec.lonlat(tile)[0, 0].tolist() == [-125.0, 85.0]
    assert spec.lonlat(tile)[2, 1].tolist() == [-115.0, 65.0]


@pytest.mark.parametrize("step", [0.0, -1.0, 0.7, 100.0])
def test_a_step_that_does_not_divide_is_refused(step):
    with pytest.raises(ValueError, match=r"a step of .* does not divide the box of 360 x 180 degree"):
        GridSpec(step)


@pytest.mark.parametrize(
    ("step", "box", "way_out"),
    [
        (0.7, (-180, -90, 180, 90), "use a step of 0.6"),
        (0.3, (5.1, 45.2, 9.0, 48.0), "use the box 5.1, 45, 9, 48"),
        (2.0, (5.0, 45.0, 8.0, 48.7), "use the box 4, 44, 8, 50"),
    ],
)
def test_a_step_that_does_not_fit_is_refused_with_one_that_does(step, box, way_out):
    with pytest.raises(ValueError, match=re.escape(way_out)):
        GridSpec(step, 5, box)
    numbers = [float(number) for number in re.findall(r"[\d.]+", way_out)]
    GridSpec(numbers[0], 5, box) if len(numbers) == 1 else GridSpec(step, 5, tuple(numbers))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"box": (10, 0, 0, 10)}, "is empty"),
        ({"box": (0, 0, 10, 100)}, "not on the globe"),
        ({"box": (-190, 0, 0, 10)}, "not on the globe"),
        ({"crs": "EPSG:3035"}, "is in metres and needs a box"),
        ({"crs": "EPSG:2263", "box": EUROPE}, "US survey foot"),
        ({"crs": "EPSG:2053", "box": EUROPE}, "to the east and north"),
        ({"crs": "EPSG:999999", "box": EUROPE}, "unknown: give a code"),
    ],
)
def test_boxes_and_planes_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GridSpec(10.0, **options)


def test_a_box_has_its_edges_half_a_step_outside_its_centres():
    spec = GridSpec(25e3, 60, EUROPE, "EPSG:3035")
    assert spec.shape == (164, 200)
    assert (spec.x[0], spec.x[-1], spec.y[0], spec.y[-1]) == (2512.5e3, 7487.5e3, 5487.5e3, 1412.5e3)
    assert (spec.gsd, spec.size, spec.closes) == (25e3, "25000 m", False)


@given(st.floats(-175, 175), st.floats(-85, 85), st.sampled_from(["EPSG:3413", "EPSG:8857", "EPSG:3832", "EPSG:4269"]))
def test_a_plane_leads_there_and_back(lon, lat, crs):
    plane = Plane(crs)
    there = plane.xy(np.array([lon, lat]))
    expected = Transformer.from_crs("EPSG:4326", crs, always_xy=True).transform(lon, lat)
    np.testing.assert_allclose(there, expected)
    np.testing.assert_allclose(plane.lonlat(there), [lon, lat], atol=1e-4)


def test_beyond_its_domain_a_plane_has_no_places():
    """The corners of Equal Earth's rectangle; its formula answers there too, with a longitude of the other side."""
    spec = GridSpec(100e3, 60, (-17.3e6, -8.4e6, 17.3e6, 8.4e6), "EPSG:8857")
    places = spec.lonlat(Tile(0, 0, *spec.shape))
    known = np.isfinite(places).all(-1)
    assert not known[0, 0]
    assert known[84, 173]
    # the area of the Earth over that of the rectangle: the projection is equal-area
    assert known.mean() == pytest.approx(510.07e12 / (34.6e6 * 16.8e6), abs=2e-3)


@pytest.mark.parametrize(
    ("crs", "box", "expected"),
    [
        ("EPSG:4326", (170, -20, 190, 0), (170, -20, -170, 0)),
        ("EPSG:4326", (0, -90, 360, 90), (-180, -90, 180, 90)),
        ("EPSG:4326", (-20, 30, 40, 70), (-20, 30, 40, 70)),
        ("EPSG:3413", (-1e6, -1e6, 1e6, 1e6), (-180, 77, 180, 90)),
        ("EPSG:3832", (2e6, -1e6, 4e6, 1e6), (168, -9, -174, 9)),
    ],
)
def test_bounds_in_degrees(crs, box, expected):
    np.testing.assert_allclose(Plane(crs).bounds(box), expected, atol=0.5)
