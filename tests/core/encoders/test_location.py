"""The location encoder: shared latitudes, gradients, the dtype; parity is tested with the checkpoints."""

import numpy as np
import pytest
import torch

from tasks.core.encoders.location import LocationEncoder


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return LocationEncoder(degree=9, hidden=16, dim=8, smoothness=0.5).double()


def grid(rows=7, columns=20):
    lon, lat = np.meshgrid(np.linspace(-180, 180, columns), np.linspace(-90, 90, rows))
    places = np.stack([lon, lat], -1).reshape(-1, 2)
    return np.random.default_rng(0).permutation(places)


def plain(encoder, lonlat):
    with torch.no_grad():
        return torch.nn.functional.normalize(encoder(lonlat), dim=-1).numpy()


@pytest.mark.parametrize("batch", [1, 33, 64, 10_000])
def test_shared_latitudes_change_nothing(encoder, batch):
    np.testing.assert_allclose(encoder.embed(grid(), batch), plain(encoder, grid()), atol=1e-6)


def test_scattered_places(encoder):
    rng = np.random.default_rng(1)
    places = np.c_[rng.uniform(-180, 180, 50), rng.uniform(-90, 90, 50)]
    np.testing.assert_allclose(encoder.embed(places, 16), plain(encoder, places), atol=1e-6)


def test_embeddings_are_unit_float32_and_training_mode_is_kept(encoder):
    encoder.train()
    embedding = encoder.embed(grid())
    assert embedding.dtype == np.float32
    assert encoder.training
    np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1, rtol=1e-6)
    assert encoder.embed(np.empty((0, 2))).shape == (0, 8)


def test_smoothness_is_a_factor_of_the_first_weights(encoder):
    same = LocationEncoder(degree=9, hidden=16, dim=8).double()
    same.load_state_dict(encoder.state_dict())
    same.layers[0].weight.data = encoder.first_weight.data
    np.testing.assert_allclose(plain(same, grid()), plain(encoder, grid()), atol=1e-12)


def test_gradient():
    torch.manual_seed(0)
    encoder = LocationEncoder(degree=4, hidden=5, dim=3, smoothness=1).double()
    features = encoder.harmonics(grid(2, 3))
    names, weights = zip(*encoder.named_parameters(), strict=True)

    def run(*values):
        return torch.func.functional_call(_FromHarmonics(encoder), _prefixed(names, values), (features,))

    assert torch.autograd.gradcheck(run, weights)


class _FromHarmonics(torch.nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, features):
        return self.encoder.from_harmonics(features)


def _prefixed(names, values):
    return {f"encoder.{name}": value for name, value in zip(names, values, strict=True)}


def test_refuses_a_latitude_of_95(encoder):
    with pytest.raises(ValueError, match="latitude 95 is not a place"):
        encoder.embed(np.array([[0.0, 95.0]]))
