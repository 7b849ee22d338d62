"""Spherical harmonics against scipy and against the published features."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rangegeo.satclip.positional_encoding import SphericalHarmonics
from scipy.special import sph_harm_y

from tasks.core.encoders.harmonics import spherical_harmonics

EDGES = np.array([[0, 90], [10, -90], [180, 5], [-180, 5], [30, 89.9999], [0, 0], [-180, -90], [180, 90]], float)


def places(n, seed=0):
    rng = np.random.default_rng(seed)
    return np.c_[rng.uniform(-180, 180, n), np.degrees(np.arcsin(rng.uniform(-1, 1, n)))]


def by_scipy(lonlat, degree):
    theta, phi = np.radians(lonlat[:, 1] + 90), np.radians(lonlat[:, 0] + 180)
    columns = []
    for n in range(degree):
        for m in range(-n, n + 1):
            value = sph_harm_y(n, abs(m), theta, phi) * (-1) ** m * (np.sqrt(2) if m else 1)
            columns.append(value.imag if m < 0 else value.real)
    return np.stack(columns, 1)


@pytest.mark.parametrize("degree", [1, 2, 10, 40, 101])
def test_orthonormal_is_scipys(degree):
    lonlat = np.concatenate([places(20), EDGES])
    np.testing.assert_allclose(spherical_harmonics(lonlat, degree), by_scipy(lonlat, degree), atol=1e-12)


@pytest.mark.parametrize("degree", [1, 2, 3, 10, 40])
def test_analytic_is_the_published_basis_with_its_rounding(degree):
    lonlat = np.concatenate([places(120), EDGES])
    theirs = SphericalHarmonics(degree)(torch.from_numpy(lonlat)).numpy()
    np.testing.assert_allclose(spherical_harmonics(lonlat, degree, "analytic"), theirs, atol=1e-9)


def test_analytic_is_orthonormal_times_pi_at_order_zero():
    lonlat = places(50)
    lonlat[:, 1] /= 3  # where the published polynomials do not lose their digits
    ratio = np.ones(100)
    ratio[[n * n + n for n in range(10)]] = np.pi
    ours = spherical_harmonics(lonlat, 10) * ratio
    np.testing.assert_allclose(spherical_harmonics(lonlat, 10, "analytic"), ours, atol=1e-11)


def test_orthonormal_integrates_to_the_identity():
    degree = 12
    nodes, weights = np.polynomial.legendre.leggauss(degree)
    lon = np.arange(2 * degree) * 360 / (2 * degree) - 180
    lonlat = np.stack(np.meshgrid(lon, np.degrees(np.arcsin(nodes))), -1).reshape(-1, 2)
    area = np.repeat(weights, len(lon)) * 2 * np.pi / len(lon)
    features = spherical_harmonics(lonlat, degree)
    np.testing.assert_allclose(features.T @ (features * area[:, None]), np.eye(degree**2), atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.floats(-720, 720), st.floats(-90, 90))
def test_addition_theorem_and_no_seam(lon, lat):
    """The squares of one degree sum to (2l+1)/(4 pi) everywhere, and a turn changes nothing."""
    features = spherical_harmonics(np.array([[lon, lat], [lon + 360, lat]]), 30)
    np.testing.assert_allclose(features[0], features[1], atol=1e-10)
    for n in range(30):
        total = (features[0, n * n : (n + 1) ** 2] ** 2).sum()
        assert total == pytest.approx((2 * n + 1) / (4 * np.pi), rel=1e-11)


@pytest.mark.parametrize("place", [[0, 95], [0, -90.01], [np.nan, 0], [0, np.inf]])
def test_refuses_what_is_no_place(place):
    with pytest.raises(ValueError, match="is not a place"):
        spherical_harmonics(np.array([place]), 3)


def test_refuses_unknown_basis_and_shape():
    with pytest.raises(ValueError, match="orthonormal, analytic"):
        spherical_harmonics(places(2), 3, "real")
    with pytest.raises(ValueError, match="shape"):
        spherical_harmonics(np.zeros((2, 3)), 3)
