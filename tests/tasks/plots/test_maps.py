"""Pictures: colours by another way to OKLab, and what is drawn where, against pyproj's Equal Earth."""

from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from pyproj import Proj
from scipy.stats import rankdata, spearmanr
from sklearn.metrics import r2_score

from tasks.core.earth.grid import GridSpec
from tasks.core.earth.land import land_mask
from tasks.grid import previews
from tasks.grid.previews import MOST_DRAWN, Drawn
from tasks.params import PublishParams
from tasks.plots import maps
from tasks.plots.maps import principal_colours
from tasks.plots.style import ACCENT, OCEAN, SECOND
from tests.tasks.plots.test_oklab import oklab


def land(seed=0, shape=(90, 180)):
    """Three components of land, of which some cells are extreme; with areas and latitudes of the cells."""
    rng = np.random.default_rng(seed)
    components = rng.lognormal(0, 1, (3, *shape)).astype(np.float32)
    latitudes = np.broadcast_to(np.linspace(89, -89, shape[0])[:, None], shape)
    components[1] *= np.cos(np.radians(latitudes))
    components[:, rng.random(shape) < 0.6] = np.nan
    return components, np.cos(np.radians(latitudes)), latitudes


def test_colours_use_all_of_the_lightness_by_area():
    """Each tenth of the lightness has a tenth of the land, in the order of the first component; nothing is black."""
    components, areas, latitudes = land()
    colours = principal_colours(components, areas, latitudes)
    known = np.isfinite(components[0])
    np.testing.assert_array_equal(colours[..., 3], known)
    assert (colours[~known] == 0).all()
    lab = oklab(colours[known, :3].astype(float))
    counts, _ = np.histogram(lab[:, 0], np.linspace(0.435, 0.935, 11), weights=areas[known])
    np.testing.assert_allclose(counts / counts.sum(), 0.1, atol=0.02)
    assert spearmanr(lab[:, 0], components[0][known]).statistic > 0.9999
    luminance = ((colours[known, :3] + 0.055) / 1.055) ** 2.4 @ [0.2126, 0.7152, 0.0722]
    assert (116 * np.cbrt(luminance) - 16).min() > 33


def test_hues_are_a_plane_of_the_second_and_third_component():
    components, areas, latitudes = land()
    colours = principal_colours(components, areas, latitudes)
    known = np.isfinite(components[0])
    plane = oklab(colours[known, :3].astype(float))[:, 1:]
    ranks = np.stack([rankdata(part[known]) for part in components[1:]])
    middle = np.abs(oklab(colours[known, :3].astype(float))[:, 0] - 0.65) < 0.1  # where sRGB has all of the chroma
    ranks = ranks[:, middle] - ranks[:, middle].mean(1, keepdims=True)
    fit, *_ = np.linalg.lstsq(ranks.T, plane[middle], rcond=None)
    assert r2_score(plane[middle], ranks.T @ fit) > 0.95
    np.testing.assert_allclose(fit @ fit.T / (fit @ fit.T)[0, 0], np.eye(2), atol=0.15)


def test_signs_of_axes_do_not_matter_and_the_tropics_are_warm():
    components, areas, latitudes = land()
    expected = principal_colours(components, areas, latitudes)
    for signs in ([-1, 1, 1], [1, -1, 1], [1, 1, -1], [-1, -1, -1]):
        turned = components * np.array(signs, np.float32)[:, None, None]
        np.testing.assert_array_equal(principal_colours(turned, areas, latitudes), expected)
    known = expected[..., 3] == 1
    hue = oklab(expected[..., :3].astype(float))[..., 2]
    tropics, poles = known & (np.abs(latitudes) < 20), known & (np.abs(latitudes) > 70)
    assert hue[tropics].mean() > hue[poles].mean() + 0.05


def test_equal_cells_have_one_colour_and_no_land_has_none():
    components, areas, latitudes = land()
    colours = principal_colours(np.where(np.isfinite(components), 3, np.nan), areas, latitudes)
    assert len(np.unique(colours[colours[..., 3] == 1], axis=0)) == 1
    assert not principal_colours(np.full_like(components, np.nan), areas, latitudes).any()


def test_axes_of_colours_count_land_by_area(monkeypatch):
    """By the number of cells the ice varies more than the tropics, by area less."""
    spec, rng = GridSpec(2.0), np.random.default_rng(0)
    lat = np.abs(spec.y)[:, None]
    vectors = 0.1 * rng.normal(size=(4, *spec.shape)).astype(np.float32)
    vectors[0] += rng.normal(size=spec.shape) * np.where(lat > 70, 2.4, 0)
    vectors[1] += rng.normal(size=spec.shape) * np.where(lat < 70, 1.0, 0)
    known = land_mask(spec)
    flat, areas = vectors[:, known].T, np.cos(np.radians(np.broadcast_to(lat, spec.shape)))[known]
    cells, weighted = flat.var(0), np.average(flat**2, axis=0, weights=areas)
    assert cells[0] > 1.5 * cells[1]
    assert weighted[1] > weighted[0]
    monkeypatch.setattr(previews.store, "open_vectors", lambda grid: vectors)
    monkeypatch.setattr(previews, "BLOCKS", 1000)
    axes = previews.axes_of(SimpleNamespace(grid="", spec=spec, params=PublishParams()))
    assert np.abs(axes).argmax(0).tolist()[:2] == [1, 0]


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


def test_numbers_of_places_have_the_colour_of_the_scale_and_what_is_unbounded_the_last():
    marks = seen(maps.place_map(PLACES, np.array([0.0, 150.0, 300.0, np.inf]), "places", "four", "km"), PLACES)
    dark = marks.sum(-1).min(axis=(1, 2))
    assert (np.diff(dark[:3]) < -40).all()
    assert abs(dark[3] - dark[2]) < 20


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
        (lambda layer: maps.change_map(layer, GRID, "change", "of three"), [0, 1e-4, 1e-2, 1]),
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
