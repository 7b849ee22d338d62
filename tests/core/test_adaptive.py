"""Interpolated tiles against every cell evaluated."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyproj import Transformer
from scipy.interpolate import BarycentricInterpolator

from tasks.core import adaptive
from tasks.core.adaptive import (
    CHECKS,
    MARGIN,
    Cells,
    barycentric,
    chebyshev,
    embed_cells,
    low_degrees,
    relative_error,
)
from tasks.core.earth.grid import GridSpec, Tile
from tasks.core.encoders.location import LocationEncoder
from tasks.core.retrieval import Method, RetrievalIndex, embed
from tests.core.test_retrieval import database

VISUAL, DIM = 8, 16


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return LocationEncoder(10, hidden=32, dim=DIM, smoothness=1.0)


@pytest.fixture(scope="module")
def index():
    return RetrievalIndex(*database(300, d=DIM, v=VISUAL))


def tile(step=0.1, row=450, column=1800, size=60, wanted=1.0):
    spec = GridSpec(step, size)
    mask = np.random.default_rng(0).random((size, size)) < wanted
    return Cells(spec.x[column : column + size], spec.y[row : row + size], mask, spec.plane)


@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("place", [{}, {"row": 0}, {"row": 1740}, {"column": 0}, {"column": 3540}, {"wanted": 0.4}])
@pytest.mark.parametrize("method", [Method(), Method("range")])
def test_every_cell_is_within_the_tolerance(encoder, index, tolerance, place, method):
    cells = tile(**place)
    found, report = embed_cells(encoder, index, cells, method, tolerance)
    expected = embed(encoder, index, cells.lonlat, method)
    assert relative_error(found[:, :VISUAL], expected[:, :VISUAL]).max() <= tolerance
    np.testing.assert_allclose(found[:, VISUAL:], expected[:, VISUAL:], atol=1e-6)
    assert report.cells == len(found)
    assert report.nodes > 0
    assert report.error <= MARGIN * tolerance
    assert CHECKS < report.evaluated < report.cells / 2


def test_zero_tolerance_evaluates_every_cell(encoder, index):
    cells = tile(wanted=0.5)
    found, report = embed_cells(encoder, index, cells, Method(), 0)
    np.testing.assert_allclose(found, embed(encoder, index, cells.lonlat, Method()), atol=3e-6)
    assert (report.evaluated, report.nodes) == (len(found), 0)


@pytest.mark.parametrize(
    ("crs", "west", "north"),
    [("EPSG:3413", -3e5, 3e5), ("EPSG:3035", 40e5, 30e5), ("EPSG:3832", 33e5, 2e6)],
    ids=["around the pole", "Europe", "across 180"],
)
def test_a_tile_of_a_projected_plane_is_interpolated_in_it(encoder, index, crs, west, north):
    spec = GridSpec(1e4, 60, (west, north - 6e5, west + 6e5, north), crs)
    cells = Cells(spec.x, spec.y, np.ones(spec.shape, bool), spec.plane)
    found, report = embed_cells(encoder, index, cells, Method(), 1e-4)
    x, y = np.meshgrid(west + 5e3 + 1e4 * np.arange(60), north - 5e3 - 1e4 * np.arange(60))
    lonlat = np.stack(Transformer.from_crs(crs, "EPSG:4326", always_xy=True).transform(x, y), -1).reshape(-1, 2)
    expected = embed(encoder, index, lonlat, Method())
    assert relative_error(found[:, :VISUAL], expected[:, :VISUAL]).max() <= 1e-4
    np.testing.assert_allclose(found[:, VISUAL:], expected[:, VISUAL:], atol=1e-6)
    assert report.nodes > 0
    assert report.evaluated < report.cells / 2


def test_a_tile_that_reaches_beyond_its_plane_is_evaluated_cell_by_cell(encoder, index):
    """At the edge of Equal Earth: the wanted cells have places, and the tile's corner has none."""
    spec = GridSpec(5e4, 60, (-17.2e6, 0, -14.2e6, 3e6), "EPSG:8857")
    wanted = np.isfinite(spec.lonlat(Tile(0, 0, 60, 60))).all(-1)
    assert 0 < wanted.sum() < wanted.size
    found, report = embed_cells(encoder, index, Cells(spec.x, spec.y, wanted, spec.plane), Method(), 1e-2)
    assert report.nodes == 0
    assert np.isfinite(found).all()
    assert len(found) == report.evaluated == wanted.sum()


class Edged:
    """A constant field but for waves along the northern edge of the tile."""

    def embed(self, lonlat):
        lon, lat = np.asarray(lonlat).T
        field = np.ones((len(lonlat), DIM))
        field[:, 0] += 0.4 * np.exp((lat - 45) / 0.4) * np.cos(8 * lon)
        return (field / np.linalg.norm(field, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("seen", [True, False])
def test_what_the_random_cells_miss_the_highest_degrees_show(index, monkeypatch, seen):
    """Few checks, and none near the edge: alone, they pass a tile that is not within its bound."""
    monkeypatch.setattr(adaptive, "CHECKS", 3)
    if not seen:
        monkeypatch.setattr(adaptive, "beyond", lambda tail, found: 0.0)
    cells = tile()
    found, _ = embed_cells(Edged(), index, cells, Method("range"), 1e-2)
    expected = embed(Edged(), index, cells.lonlat, Method("range"))
    error = np.quantile(relative_error(found[:, :VISUAL], expected[:, :VISUAL]), 0.99)
    assert (error <= 1e-2) == seen


@pytest.mark.parametrize("n", [3, 9, 24])
def test_low_degrees_are_those_of_numpy(n):
    nodes, values = np.cos(np.pi * (np.arange(n) + 0.5) / n), np.random.default_rng(n).normal(size=n)
    series = np.polynomial.chebyshev.chebfit(nodes, values, n - 1)
    expected = np.polynomial.chebyshev.chebval(nodes, series[: n - 2])
    np.testing.assert_allclose(low_degrees(n, n - 2) @ values, expected, atol=1e-10)


class Rough:
    """An encoder without any structure: neighbours have nothing in common."""

    def embed(self, lonlat):
        noise = np.sin(1e6 * np.asarray(lonlat) @ np.random.default_rng(0).normal(size=(2, DIM)))
        return (noise / np.linalg.norm(noise, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("method", [Method("top1"), Method("range"), Method()])
def test_what_does_not_converge_is_evaluated_cell_by_cell(index, method):
    cells = tile()
    found, report = embed_cells(Rough(), index, cells, method, 1e-3)
    np.testing.assert_allclose(found, embed(Rough(), index, cells.lonlat, method), atol=3e-6)
    assert report.nodes == 0
    assert report.evaluated >= len(found)


@pytest.mark.parametrize("count", [0, 1, 2, 150])
def test_few_cells_are_evaluated_themselves(encoder, index, count):
    cells = tile()
    cells.wanted[:] = False
    cells.wanted.flat[np.random.default_rng(1).permutation(3600)[:count]] = True
    found, report = embed_cells(encoder, index, cells, Method(), 1e-2)
    np.testing.assert_allclose(found, embed(encoder, index, cells.lonlat, Method()), atol=3e-6)
    assert (len(found), report.evaluated) == (count, count)


def test_the_same_tile_gives_the_same_numbers(encoder, index):
    one, other = (embed_cells(encoder, index, tile(), Method(), 1e-2)[0] for _ in range(2))
    np.testing.assert_allclose(one, other, atol=1e-6)  # a product's last bit depends on where its factors lie


@given(st.integers(2, 30), st.floats(-180, 170), st.floats(0.1, 10))
def test_interpolation_is_that_of_scipy(n, low, span):
    cells = np.linspace(low, low + span, 40)
    nodes = chebyshev(cells, n)
    values = np.random.default_rng(n).normal(size=n)
    expected = BarycentricInterpolator(nodes, values)(cells)
    np.testing.assert_allclose(barycentric(cells, nodes) @ values, expected, atol=1e-8)
    np.testing.assert_allclose(barycentric(nodes, nodes), np.eye(n), atol=1e-12)
