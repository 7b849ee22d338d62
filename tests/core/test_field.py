"""How fine a field is: against fields whose structure function is known."""

import numpy as np
import pyproj
import pytest

from tasks.core.earth.land import is_land
from tasks.core.earth.sphere import unit_vectors
from tasks.core.field import Change, kernel_width_km, probe_places

DISTANCES = (30.0, 300.0, 3000.0)


def test_neighbours_are_as_far_as_they_are_said_to_be():
    places = probe_places(DISTANCES, 100)
    assert places.shape == (100, 4, 2)
    assert is_land(places[:, 0]).all()
    assert np.abs(places[..., 1]).max() <= 90
    sphere = pyproj.Geod(a=6371008.8, b=6371008.8)
    for i, distance in enumerate(DISTANCES, 1):
        _, _, metres = sphere.inv(*places[:, 0].T, *places[:, i].T)
        np.testing.assert_allclose(metres / 1000, distance, rtol=1e-9)


def test_change_is_that_of_a_field_that_is_known():
    """For the unit vectors of places, |x - y|^2 = 2 - 2 cos d, and the variance is 1 - |mean|^2."""
    places = probe_places(DISTANCES, 400)
    vectors = unit_vectors(places.reshape(-1, 2)).reshape(400, 4, 3)
    variance = 1 - np.sum(vectors[:, 0].mean(0) ** 2)
    found = Change.of(vectors.astype(np.float32), DISTANCES)
    expected = (1 - np.cos(np.array(DISTANCES) / 6371.0088)) / variance
    np.testing.assert_allclose(found.shares, expected, atol=2e-5)
    assert found.half_km is None


def test_noise_shares_nothing_with_its_neighbours():
    vectors = np.random.default_rng(0).normal(size=(2000, 4, 5)).astype(np.float32)
    found = Change.of(vectors, DISTANCES)
    np.testing.assert_allclose(found.shares, 1, atol=0.05)
    assert found.half_km == pytest.approx(15, abs=1)


def test_the_kernel_is_half_as_high_at_half_its_width():
    angle = kernel_width_km(40.0) / 2 / 6371.0088
    assert np.exp(40 * (np.cos(angle) - 1)) == pytest.approx(0.5, abs=1e-3)
