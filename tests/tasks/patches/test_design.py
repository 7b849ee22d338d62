"""How much images drawn by class count, against areas of strips of the sphere."""

import numpy as np
import pytest
import shapely

from tasks.core.earth.region import Region
from tasks.patches.design import by_class


@pytest.mark.parametrize(
    ("region", "limits"), [(Region("box", np.array([shapely.box(4, 46, 8, 50)])), (46, 50)), (None, (45, 51))]
)
def test_images_of_a_class_share_its_land_where_they_were_drawn(region, limits):
    """Class 2 lies north of 49 degrees, on a raster of a tenth of a degree from 45 to 51."""
    classes = np.where(np.arange(60)[:, None] < 20, 2, 1).repeat(80, 1)
    lonlat = np.column_stack([np.random.default_rng(0).uniform(low, high, 300) for low, high in ((4, 8), limits)])
    found = by_class(classes, (2.0, 45.0, 10.0, 51.0), lonlat, -80.0, 84.0, region)
    north, (low, edge, high) = lonlat[:, 1] > 49, np.sin(np.radians([limits[0], 49, limits[1]]))
    np.testing.assert_allclose(found[north].sum() / found.sum(), (high - edge) / (high - low), rtol=1e-4)
    assert found.mean() == pytest.approx(1)
    assert np.ptp(found[north]) == 0
