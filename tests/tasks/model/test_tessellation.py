"""A tessellation in place of spherical harmonics: trained, stored, encoded, embedded, and no SatCLIP."""

import numpy as np
import pytest
import xarray as xr

from infra import storage
from infra.errors import UserError
from tasks.cards import read_card
from tasks.core.training import Trainer
from tasks.database.store import open_database
from tasks.encode import encode_database
from tasks.model.checkpoint import load_checkpoint
from tasks.model.satclip import export_satclip
from tasks.params import EmbedParams, EncodeParams, EncoderParams, PublishParams, TrainParams
from tasks.patches.store import open_patches
from tasks.points.embed import embed_points
from tasks.products import CheckpointCard
from tasks.publish import publish_grid
from tasks.train import train_model

PARAMS = TrainParams(
    encoder=EncoderParams(dim=32), location="tessellation", sites=40, tokens=6, hidden=16, dim=8, steps=60, batch=16,
    lr=1e-2, save_every=20, dropout=0.1, held_out_share=0.2,
)  # fmt: skip
PLACES = np.array([[0.0, 0.0], [10.5, -33.0], [179.0, 70.0]])


@pytest.fixture(scope="module")
def checkpoint(client, home):
    return train_model(client, f"{home}/patches/p", PARAMS)


def test_training_lowers_the_loss_and_moves_the_sites(checkpoint, home):
    card, location = read_card(checkpoint, CheckpointCard), load_checkpoint(checkpoint).location
    assert card.history[-1]["loss"] < 0.9 * card.history[0]["loss"]
    assert card.architecture.model_dump() == location.architecture | {"members": 1, "degree": 0}
    assert (location.architecture["kind"], len(location.sites), len(location.tokens)) == ("tessellation", 40, 6)
    images = sphere(open_patches(f"{home}/patches/p").manifest[["lon", "lat"]].to_numpy("f8"))
    sites = location.sites.detach().numpy()
    cosines = sites / np.linalg.norm(sites, axis=1, keepdims=True) @ images.T
    assert cosines.max(1).min() > 0.8  # they began at places of images
    assert cosines.max(1).max() < 1 - 1e-6  # and have moved


@pytest.fixture(scope="module")
def database(client, home, checkpoint):
    return encode_database(client, f"{home}/patches/p", checkpoint, EncodeParams())


def test_from_patches_to_points(checkpoint, database):
    model, data = load_checkpoint(checkpoint), open_database(database)
    found = embed_points(PLACES, checkpoint, database, EmbedParams(method="range+"))
    location = model.location.embed(PLACES).astype("f8")
    np.testing.assert_allclose(found[:, -8:], location, atol=1e-6)
    weights = soft(12 * location @ data.keys.T), soft(40 * sphere(PLACES) @ sphere(data.locations).T)
    expected = np.mean(weights, axis=0) @ data.values
    np.testing.assert_allclose(found[:, :-8], expected, rtol=1e-3, atol=1e-3)


def test_its_grid_tells_no_degrees_of_harmonics(client, checkpoint, database):
    grid = publish_grid(client, checkpoint, database, PublishParams(step=30.0, tile_cells=4))
    stored = xr.open_zarr(grid)
    assert "harmonic_degree" not in stored.attrs["rangegrid:kernels"]
    location = stored.embedding[(stored.block == "location").values].stack(cell=["lat", "lon"]).dropna("cell").T
    expected = load_checkpoint(checkpoint).location.embed(np.c_[location.lon, location.lat])
    np.testing.assert_allclose(location, expected, atol=1e-6)


def sphere(lonlat):
    lon, lat = np.radians(lonlat).T
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], 1)


def soft(logits):
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def test_a_killed_training_resumes_to_the_same_weights(client, home, checkpoint, tmp_path, monkeypatch):
    storage.copy(f"{home}/patches", (tmp_path / "patches").as_uri())
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", tmp_path.as_uri())
    step = Trainer.step

    def killed(self, *batch):
        if self.step_number == 50:
            raise KeyboardInterrupt
        return step(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            train_model(client, f"{home}/patches/p", PARAMS)
    again = train_model(client, f"{home}/patches/p", PARAMS)
    assert read_card(again, CheckpointCard) == read_card(checkpoint, CheckpointCard)


def test_members_may_be_tessellations(client, home):
    params = PARAMS.model_copy(update={"members": 2, "steps": 4})
    location = load_checkpoint(train_model(client, f"{home}/patches/p", params)).location
    parts = [member.embed(PLACES) for member in location.members]
    assert not np.allclose(parts[0], parts[1], atol=0.1)
    np.testing.assert_allclose(location.embed(PLACES), np.hstack(parts) / np.sqrt(2), atol=1e-7)


def test_what_does_not_concern_it_finds_the_same_checkpoint(client, home, checkpoint):
    assert train_model(client, f"{home}/patches/p", PARAMS.model_copy(update={"degree": 7})) == checkpoint


def test_it_is_no_satclip(checkpoint, tmp_path):
    with pytest.raises(UserError, match="has a tessellation and SatCLIP's format has room for one"):
        export_satclip(checkpoint, tmp_path / "out.ckpt")
