"""Pictures against scikit-learn."""

import numpy as np
import pytest
from sklearn.decomposition import PCA

from tasks.core.compact import Projection
from tasks.core.earth.grid import GridSpec
from tasks.grid.previews import MOST_DRAWN, Drawn
from tasks.plots.maps import principal_colours


def test_colours_are_ranks_of_the_principal_components():
    rng = np.random.default_rng(0)
    vectors = (rng.normal(size=(6, 67, 9)) * np.array([9, 5, 3, 1, 1, 1])[:, None, None]).astype(np.float32)
    vectors[:, rng.random(vectors.shape[1:]) < 0.4] = np.nan
    known = np.isfinite(vectors[0])
    axes = Projection.fit(vectors[:, known].T, 3).components
    colours = principal_colours(np.tensordot(axes.T, vectors, 1))
    np.testing.assert_array_equal(colours[..., 3], known)
    expected = PCA(3).fit_transform(vectors[:, known].T.astype("f8"))
    for found, component in zip(colours[known, :3].T, expected.T, strict=True):
        agreement = np.corrcoef(found, component.argsort().argsort())[0, 1]
        assert abs(agreement) > 0.9999


@pytest.mark.parametrize("spec", [GridSpec(10.0, 5), GridSpec(0.5), GridSpec(0.05, 120), GridSpec(0.01, 480)])
def test_a_picture_shows_evenly_as_many_cells_as_it_needs(spec):
    drawn = Drawn.of(spec)
    count = len(drawn.rows) * len(drawn.columns)
    assert count <= MOST_DRAWN
    assert count == np.prod(spec.shape) or count > 0.9 * MOST_DRAWN
    for cells, n in ((drawn.rows, spec.shape[0]), (drawn.columns, spec.shape[1])):
        steps = np.diff(cells)
        assert steps.min() >= 1
        assert steps.max() - steps.min() <= 1
        assert abs(cells[0] - (n - 1 - cells[-1])) <= 1
    tiles = [drawn.window(tile) for tile in spec.tiles()]
    assert sum((r.stop - r.start) * (c.stop - c.start) for r, c in tiles) == count
