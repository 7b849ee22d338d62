"""The geometry of the grid."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.core.grid import GridSpec

specs = st.builds(GridSpec, st.sampled_from([0.5, 1.0, 1.5, 2.0, 4.0, 10.0, 22.5]), st.integers(5, 90))


@given(specs)
def test_tiles_cover_every_cell_once(spec):
    count = np.zeros(spec.shape, int)
    for tile in spec.tiles():
        assert (tile.rows, tile.columns) == count[tile.window].shape
        count[tile.window] += 1
    assert (count == 1).all()


@given(specs)
def test_centres_are_north_up_half_a_step_inside(spec):
    lat, lon = spec.lat, spec.lon
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
    with pytest.raises(ValueError, match=r"grid step .* does not divide 180"):
        GridSpec(step)
