"""The tessellation: its formula against NumPy, its lattice, its gradients."""

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from tasks.core.encoders.tessellation import Tessellation, lattice


def places(n=60, seed=0):
    rng = np.random.default_rng(seed)
    return np.c_[rng.uniform(-180, 180, n), np.degrees(np.arcsin(rng.uniform(-1, 1, n)))]


@pytest.fixture
def encoder():
    """With weights far from the first ones, so that no term is near its beginning."""
    torch.manual_seed(0)
    encoder = Tessellation(sites=30, tokens=5, hidden=12, dim=6, dropout=0.3).double().eval()
    with torch.no_grad():
        for weight in encoder.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return encoder


def softmax(x):
    x = np.exp(x - x.max(1, keepdims=True))
    return x / x.sum(1, keepdims=True)


def by_numpy(encoder, lonlat):
    """The formula of docs/model.md."""
    w = {name: value.detach().numpy() for name, value in encoder.state_dict().items()}
    lon, lat = np.radians(lonlat).T
    x = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], 1)
    sites = w["sites"] / np.linalg.norm(w["sites"], axis=1, keepdims=True)
    near = softmax(np.exp(w["log_sharpness"]) * (x @ sites.T - 1)) @ w["site_vectors"]
    shared = softmax(near @ w["attention.weight"].T + w["attention.bias"]) @ w["tokens"]
    mixed = (near + shared) / 2
    normal = (mixed - mixed.mean(1, keepdims=True)) / np.sqrt(mixed.var(1, keepdims=True) + 1e-5)
    x = np.maximum((normal * w["norm.weight"] + w["norm.bias"]) @ w["first.weight"].T + w["first.bias"], 0)
    for i in (0, 1):
        inner = np.maximum(x @ w[f"layers.{i}.inner.weight"].T + w[f"layers.{i}.inner.bias"], 0)
        x = x + np.maximum(inner @ w[f"layers.{i}.outer.weight"].T + w[f"layers.{i}.outer.bias"], 0)
    out = x @ w["last.weight"].T
    return out / np.linalg.norm(out, axis=1, keepdims=True)


@pytest.mark.parametrize("batch", [7, 1000])
def test_embeddings_are_those_of_the_formula(encoder, batch):
    encoder.train()
    found = encoder.embed(places(), batch)
    assert encoder.training
    assert (found.dtype, found.shape) == (np.float32, (60, 6))
    np.testing.assert_allclose(found, by_numpy(encoder, places()), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)
    assert encoder.embed(np.empty((0, 2))).shape == (0, 6)


def test_180_degrees_and_the_pole_have_one_vector(encoder):
    same = encoder.embed(np.array([[180.0, 10], [-180, 10], [0, 90], [77, 90]]))
    np.testing.assert_allclose(same[::2], same[1::2], atol=1e-6)


def test_gradients_reach_sites_sharpness_and_tokens(encoder):
    encoder(places(4)).square().sum().backward()
    for weight in (encoder.sites, encoder.log_sharpness, encoder.tokens, encoder.site_vectors):
        assert weight.grad.abs().max() > 1e-6


def test_the_lattice_is_even():
    points = lattice(500)
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1)
    nearest = cKDTree(points).query(points, 2)[0][:, 1]
    assert nearest.min() > 0.6 * np.sqrt(4 * np.pi / 500)  # of the side of a square of one point's area
    assert abs(points.mean(0)).max() < 0.01


def test_refuses_a_latitude_of_95(encoder):
    with pytest.raises(ValueError, match="latitude 95 is not a place"):
        encoder.embed(np.array([[0.0, 95.0]]))
