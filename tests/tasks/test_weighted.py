"""Databases whose images have weights, through the public ways in, against the formulas in float64."""

import numpy as np
import pytest
import xarray as xr

from tasks.core.earth.sphere import unit_vectors
from tasks.core.methods import Head
from tasks.database.store import open_database
from tasks.model.checkpoint import load_checkpoint
from tasks.params import EmbedParams, PublishParams
from tasks.points.embed import embed_points
from tests.core.test_heads import weights
from tests.core.test_retrieval import close, softmax
from tests.tasks.test_publish import KEEPS, SIDE_BY_SIDE, STEP, VALUES, home, images, publish, same, store  # noqa: F401

DENSE = 0.05


@pytest.fixture(scope="module")
def dense(home):  # noqa: F811
    """400 images of the world, and 200 about three of them: those all count a twentieth."""
    rows = np.r_[0:400, 600:800]
    arrays = images(rows)
    arrays["locations"][400:] = arrays["locations"][:3].repeat(67, 0)[:200] + 0.01 * arrays["locations"][400:] / 180
    counts = np.where((np.arange(600) >= 400) | (np.arange(600) < 3), DENSE, 1.0)
    return store(home, "dense", arrays | {"weights": counts})


def cells(grid):
    opened = xr.open_zarr(grid)
    land = np.isfinite(opened.embedding.values[0])
    row, column = np.nonzero(land)
    return opened, land, np.column_stack([opened.lon.values[column], opened.lat.values[row]])


def mixed(data, queries, lonlat):
    """RANGE+ with log w in both softmaxes."""
    values, log_w = data.values.astype(np.float64), np.log(data.weights)
    semantic = softmax(12 * queries.astype(np.float64) @ data.keys.T.astype(np.float64) + log_w)
    geodesic = softmax(40 * unit_vectors(lonlat) @ unit_vectors(data.locations).T + log_w)
    return 0.5 * (semantic + geodesic) @ values


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"keep_sums": True, "evidence": True}, marks=pytest.mark.further),
        {"tolerance": 1e-3, "step": 2.0},
    ],
)
def test_a_grid_is_weighed(home, publish, dense, options):  # noqa: F811
    grid = publish(dense, PublishParams(**STEP | options | ({"tile_cells": 40} if "step" in options else {})))
    opened, land, lonlat = cells(grid)
    data, encoder = open_database(dense), load_checkpoint(f"{home.as_uri()}/checkpoint").location
    expected = mixed(data, encoder.embed(lonlat), lonlat)
    found = opened.embedding.values[:VALUES, land].T
    close(found, expected, 2e-3 if "tolerance" in options else 2e-6, scale=np.abs(data.values).max())
    if "evidence" in options:
        log_w = np.log(data.weights)
        shares = 0.5 * softmax(12 * encoder.embed(lonlat).astype("f8") @ data.keys.T.astype("f8") + log_w)
        shares += 0.5 * softmax(40 * unit_vectors(lonlat) @ unit_vectors(data.locations).T + log_w)
        entropy = -(shares * np.log(np.maximum(shares, 1e-300))).sum(1)
        np.testing.assert_allclose(opened.effective_images.values[land], np.exp(entropy), rtol=1e-3)


def test_heads_side_by_side_and_points_are_weighed(home, publish, dense):  # noqa: F811
    """By projections that the weights decide too: the mean of a dense region counts as little as its land."""
    heads = ("semantic:12", "geodesic:2000", "nearest:5")
    grid = publish(dense, PublishParams(step=10.0, tile_cells=8, heads=heads, compact_dims=5, location_dims=10))
    opened, land, lonlat = cells(grid)
    data, encoder = open_database(dense), load_checkpoint(f"{home.as_uri()}/checkpoint").location
    np.testing.assert_allclose(opened["mean"].values, np.average(data.values, 0, data.weights), rtol=1e-5, atol=1e-6)
    scaled, index = (data.values - opened["mean"].values) @ opened.components.values, vars(data)
    arrays = [index[name] for name in ("keys", "values", "locations")]
    expected = []
    for head in heads:
        kernel = weights(Head.parse(head), arrays, encoder.embed(lonlat), lonlat) * data.weights
        expected.append(kernel / kernel.sum(1, keepdims=True) @ scaled)
    expected = np.concatenate(expected, 1)
    close(opened.embedding.values[:15, land].T, expected, 1e-5, scale=np.abs(scaled).max())
    params = EmbedParams(heads=heads, compact_dims=5, location_dims=10)
    points = embed_points(lonlat[:50], f"{home.as_uri()}/checkpoint", dense, params)
    close(points[:, :15], expected[:50], 1e-5, scale=np.abs(scaled).max())


@pytest.mark.parametrize("options", [pytest.param({}, marks=pytest.mark.further), SIDE_BY_SIDE])
def test_an_update_takes_back_former_weights(home, publish, dense, options):  # noqa: F811
    """Three images of before count less now, and 200 came beside them."""
    keeps = KEEPS.model_copy(update=options)
    before = store(home, f"world{len(options)}", images(np.arange(400)))
    parent = publish(before, keeps.model_copy(update={"compact_dims": 5} if options else {}))
    child = publish(dense, keeps.model_copy(update={"parent": parent}))
    if not options:
        same(child, publish(dense, PublishParams(**STEP)), 1e-6)
        return
    opened, land, lonlat = cells(child)
    data, encoder = open_database(dense), load_checkpoint(f"{home.as_uri()}/checkpoint").location
    scaled = (data.values - opened["mean"].values) @ opened.components.values
    arrays = [data.keys, data.values, data.locations]
    for i, head in enumerate(options["heads"]):
        kernel = weights(Head.parse(head), arrays, encoder.embed(lonlat), lonlat) * data.weights
        expected = kernel / kernel.sum(1, keepdims=True) @ scaled
        close(opened.embedding.values[5 * i : 5 * i + 5, land].T, expected, 1e-5, scale=np.abs(scaled).max())
