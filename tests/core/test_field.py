"""How fine a field is: against fields whose structure function is known."""

import numpy as np
import pyproj
import pytest

from tasks.core.earth.land import is_land
from tasks.core.earth.sphere import unit_vectors
from tasks.core.field import DISTANCES_KM, Change, kernel_width_km, probe_places, whole

DISTANCES = (30.0, 300.0, 3000.0)


def test_neighbours_are_as_far_as_they_are_said_to_be():
    places = probe_places(DISTANCES, 100)
    assert places.shape == (100, 4, 2)
    assert is_land(places[:, 0]).all()
    assert np.abs(places[..., 1]).max() <= 90
    assert is_land(places[:, 1]).mean() > 0.9
    sphere = pyproj.Geod(a=6371008.8, b=6371008.8)
    for i, distance in enumerate(DISTANCES, 1):
        _, _, metres = sphere.inv(*places[:, 0].T, *places[:, i].T)
        np.testing.assert_allclose(metres / 1000, distance, rtol=1e-9)


def test_change_is_that_of_a_field_that_is_known():
    """For the unit vectors of places, |x - y|^2 = 2 - 2 cos d, and the variance is 1 - |mean|^2."""
    places = probe_places(DISTANCES, 400)
    vectors = unit_vectors(places.reshape(-1, 2)).reshape(400, 4, 3)
    variance = (1 - np.sum(vectors[:, 0].mean(0) ** 2)) * 400 / 399  # of a sample
    found = Change.of(vectors.astype(np.float32), DISTANCES)
    expected = (1 - np.cos(np.array(DISTANCES) / 6371.0088)) / variance
    np.testing.assert_allclose(found.shares, expected, atol=2e-5)
    assert found.half_km == ">3000"
    assert found.interval_km == (">3000", ">3000")


def test_noise_shares_nothing_with_its_neighbours():
    vectors = np.random.default_rng(0).normal(size=(2000, 4, 5)).astype(np.float32)
    found = Change.of(vectors, DISTANCES)
    np.testing.assert_allclose(found.shares, 1, atol=0.05)
    assert found.half_km == pytest.approx(15, abs=1)


def waves(places, temperature, seed):
    """Random waves: neighbours at an angle d correlate by exp(t (cos d - 1)) (Rahimi and Recht, 2007)."""
    rng = np.random.default_rng(seed)
    frequencies = rng.normal(0, np.sqrt(temperature), (3, 512))
    angles = unit_vectors(places.reshape(-1, 2)) @ frequencies + rng.uniform(0, 2 * np.pi, 512)
    return np.cos(angles).astype(np.float32).reshape(*places.shape[:2], -1)


def half_of(temperature):
    """The angle, in km, at which waves have changed by half of their variance over the sphere."""
    mean = (1 - np.exp(-2 * temperature)) / (2 * temperature)
    return 6371.0088 * np.arccos(1 + np.log(1 - (1 - mean) / 2) / temperature)


@pytest.mark.parametrize("temperature", [7, 40, 1000, 30_000, 90_000])
def test_the_effective_resolution_is_that_of_a_field_that_is_known(temperature):
    """From 25 to 3,000 km, within the interval, whose width is that of 250 places."""
    found = Change.of(waves(probe_places(DISTANCES_KM), temperature, 1), DISTANCES_KM)
    assert 25 < half_of(temperature) < 3000
    assert found.half_km == pytest.approx(half_of(temperature), rel=0.06)
    low, high = found.interval_km
    assert low < found.half_km < high < 1.4 * low


def test_the_interval_holds_the_resolution_of_the_same_field_at_all_places():
    """In 19 of 20 draws of places by its level: the field itself is one, as the resampling takes it."""
    many = probe_places(DISTANCES_KM[8:], 4000, seed=99)
    truth = Change.of(waves(many, 80, 1), DISTANCES_KM[8:]).half_km
    draws = [Change.of(waves(probe_places(DISTANCES_KM[8:], 100, seed), 80, 1), DISTANCES_KM[8:]) for seed in range(30)]
    held = [draw.interval_km[0] <= truth <= draw.interval_km[1] for draw in draws]
    assert sum(held) >= 25


def test_blocks_count_alike_in_the_whole():
    """Whatever their scale: the whole changes by the mean of what the blocks change by."""
    places = probe_places(DISTANCES_KM, 100)
    blocks = [1000 * waves(places, 40, 1), 1e-3 * waves(places, 4000, 2), np.ones((*places.shape[:2], 3), np.float32)]
    shares = [Change.of(block, DISTANCES_KM).shares for block in blocks]
    found = Change.of(whole(blocks), DISTANCES_KM)
    np.testing.assert_allclose(found.shares, np.mean(shares[:2], axis=0), atol=2e-5)
    assert shares[2] == (0.0,) * len(DISTANCES_KM)
    assert Change.of(whole(blocks[2:]), DISTANCES_KM).half_km == ">3200"


def test_the_kernel_is_half_as_high_at_half_its_width():
    angle = kernel_width_km(40.0) / 2 / 6371.0088
    assert np.exp(40 * (np.cos(angle) - 1)) == pytest.approx(0.5, abs=1e-3)
