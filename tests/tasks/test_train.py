"""Train and encode on a small patch store: resumed, refused, and true to the parts they are made of."""

import numpy as np
import pandas as pd
import pytest
from distributed import Client

from infra import storage
from infra.errors import UserError
from tasks import train as train_module
from tasks.cards import read_card, write_card
from tasks.checkpoint import load_checkpoint, save_checkpoint
from tasks.core.contrastive import Trainer
from tasks.core.location import LocationEncoder
from tasks.database import open_database
from tasks.encode import encode_database
from tasks.params import EncodeParams, EncoderParams, TrainParams
from tasks.patches import MANIFEST, create, open_patches, write_manifest, write_shard
from tasks.train import train_model

N = 90
PARAMS = TrainParams(encoder=EncoderParams(dim=32), degree=4, hidden=16, dim=8, steps=40, batch=16, held_out_share=0.2)


@pytest.fixture(scope="module")
def client():
    with Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=":0") as client:
        yield client


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", tmp_path.as_uri())
    return tmp_path.as_uri()


def mock_patches(url, bands=("red", "nir")):
    rng = np.random.default_rng(0)
    create(url, N, bands, 16, 10.0, 45)
    for start in (0, 45):
        write_shard(url, start, rng.integers(1, 9000, (45, len(bands), 16, 16)).astype("u2"))
    blank = {"str": "a", "int64": 0, "float64": 0.0}
    rows = pd.DataFrame({name: [blank[kind]] * N for name, kind in MANIFEST.items()}).assign(
        row_id=3 * np.arange(N),
        lon=rng.uniform(-180, 180, N),
        lat=rng.uniform(-60, 80, N),
        offset=-1000,
        datetime="2020-01-01T00:00:00Z",
    )
    write_manifest(url, rows)
    write_card(url, "patches", fingerprint="123456789abc", attribution="mock")
    return url


def test_database_is_what_the_checkpoint_makes_of_the_patches(client, home):
    patches = mock_patches(f"{home}/patches/p")
    checkpoint = train_model(client, patches, PARAMS)
    database = encode_database(client, patches, checkpoint, EncodeParams(shard_rows=40))
    data, model, source = open_database(database), load_checkpoint(checkpoint), open_patches(patches)
    values = model.encoder.encode(source.reflectance(slice(0, N)))
    np.testing.assert_allclose(data.values, values, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(data.keys, model.projection.keys(values), atol=1e-4)
    np.testing.assert_array_equal(data.locations, source.manifest[["lon", "lat"]])
    np.testing.assert_array_equal(data.row_ids, 3 * np.arange(N))
    assert data.card["checkpoint"] == model.card["fingerprint"]
    assert data.card["attribution"] == "mock"


def test_a_rerun_finds_what_is_there(client, home, monkeypatch):
    patches = mock_patches(f"{home}/patches/p")
    checkpoint = train_model(client, patches, PARAMS)
    monkeypatch.setattr(train_module, "fit", None)  # would fail if it were called
    assert train_model(client, patches, PARAMS) == checkpoint
    history = read_card(checkpoint, "checkpoint")["history"]
    assert [p["step"] for p in history] == list(range(2, 41, 2))
    assert "training.pt" not in storage.names(checkpoint)


def test_a_killed_training_resumes_to_the_same_weights(client, home, tmp_path, monkeypatch):
    patches = mock_patches(f"{home}/patches/p")
    params = PARAMS.model_copy(update={"save_every": 10})
    whole = read_card(train_model(client, patches, params), "checkpoint")
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", (tmp_path / "other").as_uri())
    step, calls = Trainer.step, []

    def killed(self, *batch):
        calls.append(self.step_number)
        if calls == list(range(25)):
            raise KeyboardInterrupt
        return step(self, *batch)

    monkeypatch.setattr(Trainer, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        train_model(client, patches, params)
    resumed = read_card(train_model(client, patches, params), "checkpoint")
    assert calls[25] == 20
    assert resumed["fingerprint"] == whole["fingerprint"]
    assert resumed["history"] == whole["history"]


def test_other_bands_are_refused(client, home):
    checkpoint = train_model(client, mock_patches(f"{home}/patches/p"), PARAMS)
    other = mock_patches(f"{home}/patches/q", bands=("red", "green"))
    with pytest.raises(UserError, match="has the bands red, green and the checkpoint takes red, nir"):
        encode_database(client, other, checkpoint, EncodeParams())


def test_a_checkpoint_without_images_is_refused(client, home):
    patches = mock_patches(f"{home}/patches/p")
    save_checkpoint(f"{home}/imported", LocationEncoder(3, hidden=8, dim=4))
    with pytest.raises(UserError, match="encodes no images"):
        encode_database(client, patches, f"{home}/imported", EncodeParams())


def test_an_unknown_encoder_is_refused(client, home):
    params = PARAMS.model_copy(update={"encoder": EncoderParams(name="vit")})
    with pytest.raises(UserError, match="use one of rcf"):
        train_model(client, mock_patches(f"{home}/patches/p"), params)
