"""Pictures: colours against scikit-learn, and what is drawn where, against pyproj's Equal Earth."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from pyproj import Proj
from sklearn.decomposition import PCA

from tasks.core.compact import Projection
from tasks.core.earth.grid import GridSpec
from tasks.grid.previews import MOST_DRAWN, Drawn
from tasks.plots import maps
from tasks.plots.maps import principal_colours
from tasks.plots.style import ACCENT, OCEAN, SECOND


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


EARTH = Proj("+proj=eqearth +R=1")
PLACES = np.array([[5.0, 45.0], [-115.0, 45.0], [155.0, -35.0], [-55.0, -65.0]])
EMPTY = np.array([[-30.0, 0.0], [90.0, 10.0], [165.0, 15.0]])
GRID = GridSpec(10.0)


def rgb(colour):
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])


def seen(png, lonlat):
    """(n, 5, 5, 3) pixels around each place: the globe's own edges in the picture tell where a place is."""
    pixels = np.asarray(Image.open(BytesIO(png)).convert("RGB")).astype(int)
    globe = (pixels == rgb(OCEAN)).all(-1)
    top, bottom = np.flatnonzero(globe.sum(1) > 20)[[0, -1]]
    left, right = np.flatnonzero(globe.sum(0) > 20)[[0, -1]]
    (widest, _), (_, highest) = EARTH(180, 0), EARTH(0, 90)
    x, y = EARTH(*lonlat.T)
    columns = np.rint((left + right) / 2 + x / widest * (right - left) / 2).astype(int)
    rows = np.rint((top + bottom) / 2 - y / highest * (bottom - top) / 2).astype(int)
    return np.stack([pixels[r - 2 : r + 3, c - 2 : c + 3] for r, c in zip(rows, columns, strict=True)])


def away(pixels, colour):
    """How far the nearest of each place's pixels is from a colour."""
    return np.abs(pixels - rgb(colour)).sum(-1).min(axis=(1, 2))


def test_samples_are_marked_where_they_lie_and_nowhere_else():
    png = maps.sample_map(PLACES, "places", "four")
    marks = seen(png, PLACES)
    assert (np.abs(marks - rgb(OCEAN)).sum(-1).max(axis=(1, 2)) > 100).all()
    assert away(marks, ACCENT).max() < away(seen(png, EMPTY), ACCENT).min()
    assert (seen(png, EMPTY) == rgb(OCEAN)).all()


def test_errors_are_coloured_by_their_size_and_the_worst_lie_on_top():
    where = np.concatenate([PLACES[:3], PLACES[2:3]])
    marks = seen(maps.error_map(where, np.array([0.0, 0.5, 5.0, 0.0]), "errors", "three"), PLACES[:3])
    for mark, colour in zip(marks, ("#b4c1cb", SECOND, "#7a1022"), strict=True):
        assert away(mark[None], colour) < 20


def cells(values):
    """A layer of nothing but the cells of the places."""
    layer = np.full(GRID.shape, np.nan, np.float32)
    for (lon, lat), value in zip(PLACES, values, strict=True):
        layer[int((90 - lat) // 10), int((lon + 180) // 10)] = value
    return layer


@pytest.mark.parametrize(
    ("draw", "values"),
    [
        (lambda layer: maps.layer_map(layer, GRID, "layer", "of four", "km"), [0, 100, 200, 300]),
        (lambda layer: maps.change_map(layer, GRID, "change", "of four"), [1e-6, 1e-4, 1e-2, 1]),
    ],
)
def test_cells_have_the_colour_of_their_number(draw, values):
    """The scale's colours in its order: darker from number to number; the sea stays as it is."""
    png = draw(cells(values))
    light = seen(png, PLACES)[:, 2, 2].sum(-1)
    assert (np.diff(light) < -40).all()
    assert (seen(png, EMPTY) == rgb(OCEAN)).all()
    assert not np.array_equal(seen(draw(cells(values[::-1])), PLACES), seen(png, PLACES))


def test_a_world_map_shows_the_colours_it_is_given():
    given = [[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 1], [0, 0, 0, 0]]
    colours = np.stack([cells([colour[i] for colour in given]) for i in range(4)], axis=-1)
    png = maps.world_map(np.nan_to_num(colours), GRID, "world", "in three colours")
    found = seen(png, PLACES)[:, 2, 2]
    np.testing.assert_array_equal(found, [[255, 0, 0], [0, 255, 0], [0, 0, 255], rgb(OCEAN)])
