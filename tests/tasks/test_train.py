"""Train and encode on a small patch store: resumed, refused, and true to the parts they are made of."""

import os
import re
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from distributed import Client
from pydantic import ValidationError
from safetensors.numpy import load as parse

from infra import storage
from infra.errors import UserError
from tasks import train as train_module
from tasks.cards import read_card, write_card
from tasks.core import bandwidths
from tasks.core.encoders.location import LocationEncoder
from tasks.core.training import Trainer
from tasks.database.store import open_database
from tasks.encode import encode_database
from tasks.model import features as features_module
from tasks.model.checkpoint import load_checkpoint, save_checkpoint
from tasks.model.features import StoredFeatures, encode_features, open_encoder, view_of
from tasks.params import EncodeParams, EncoderParams, PipelineParams, SampleParams, TrainParams
from tasks.patches.store import MANIFEST, create, open_patches, write_manifest, write_shard
from tasks.products import CheckpointCard, PatchesCard
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


def mock_patches(url, bands=("red", "nir"), pixels=16):
    rng = np.random.default_rng(0)
    create(url, N, bands, pixels, 10.0, 45)
    for start in (0, 45):
        write_shard(url, start, rng.integers(1, 9000, (45, len(bands), pixels, pixels)).astype("u2"))
    blank = {"str": "a", "int64": 0, "float64": 0.0}
    rows = pd.DataFrame({name: [blank[kind]] * N for name, kind in MANIFEST.items()}).assign(
        row_id=3 * np.arange(N),
        lon=rng.uniform(-180, 180, N),
        lat=rng.uniform(-60, 80, N),
        offset=-1000,
        datetime="2020-01-01T00:00:00Z",
    )
    write_manifest(url, rows)
    write_card(url, PatchesCard(fingerprint="123456789abc", attribution="mock"))
    return url


def test_database_is_what_the_checkpoint_makes_of_the_patches(client, home, monkeypatch):
    monkeypatch.setattr(bandwidths, "LEAST", N)
    patches = mock_patches(f"{home}/patches/p")
    checkpoint = train_model(client, patches, PARAMS)
    database = encode_database(client, patches, checkpoint, EncodeParams(shard_rows=40))
    data, model, source = open_database(database), load_checkpoint(checkpoint), open_patches(patches)
    values = model.encoder.encode(source.reflectance(slice(0, N)))
    np.testing.assert_allclose(data.values, values, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(data.keys, model.projection.keys(values), atol=1e-4)
    np.testing.assert_array_equal(data.locations, source.manifest[["lon", "lat"]])
    np.testing.assert_array_equal(data.row_ids, 3 * np.arange(N))
    assert data.card.checkpoint == model.card.fingerprint
    assert data.card.attribution == "mock"
    assert {head["kind"] for head in data.card.heads} == {"semantic", "geodesic", "nearest"}
    curve = storage.read(f"{database}/heads.png")
    storage.delete(f"{database}/heads.png")  # as if the run had been killed before it
    assert encode_database(client, patches, checkpoint, EncodeParams(shard_rows=40)) == database
    assert storage.read(f"{database}/heads.png") == curve


def test_a_rerun_finds_what_is_there(client, home, monkeypatch):
    patches = mock_patches(f"{home}/patches/p")
    checkpoint = train_model(client, patches, PARAMS)
    monkeypatch.setattr(train_module, "fit", None)  # would fail if it were called
    assert train_model(client, patches, PARAMS) == checkpoint
    history = read_card(checkpoint, CheckpointCard).history
    assert [p["step"] for p in history] == list(range(2, 41, 2))
    assert "training.pt" not in storage.names(checkpoint)


def test_a_checkpoint_that_is_finished_has_its_curve(client, home, monkeypatch):
    """Killed between the two: a rerun looks for the card alone."""

    def killed(*_):
        raise KeyboardInterrupt

    patches = mock_patches(f"{home}/patches/p")
    with monkeypatch.context() as context:
        context.setattr("tasks.train.keep_picture", killed)
        with pytest.raises(KeyboardInterrupt):
            train_model(client, patches, PARAMS)
    assert not [path for path in storage.paths(f"{home}/checkpoints") if path.endswith("card.json")]
    checkpoint = train_model(client, patches, PARAMS)
    assert {"card.json", "loss.png"} <= set(storage.names(checkpoint))
    storage.write(f"{checkpoint}/training.pt", b"left")
    train_model(client, patches, PARAMS)
    assert "training.pt" not in storage.names(checkpoint)


def test_a_killed_training_resumes_to_the_same_weights(client, home, tmp_path, monkeypatch):
    patches = mock_patches(f"{home}/patches/p")
    params = PARAMS.model_copy(update={"save_every": 10})
    whole = read_card(train_model(client, patches, params), CheckpointCard)
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
    resumed = read_card(train_model(client, patches, params), CheckpointCard)
    assert calls[25] == 20
    assert resumed.fingerprint == whole.fingerprint
    assert resumed.history == whole.history


CHILD = """
import os, signal, sys
from distributed import Client
from tasks.core.training import Trainer
from tasks.params import TrainParams
from tasks.train import train_model
from tasks.products import CheckpointCard, PatchesCard

patches, params, last = sys.argv[1:]
step = Trainer.step

def killed(self, *batch):
    if self.step_number == int(last):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *batch)

Trainer.step = killed
first = os.environ.get("RANK", "0") == "0"
client = Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None) if first else None
train_model(client, patches, TrainParams.model_validate_json(params))
"""
CAREFUL = PARAMS.model_copy(update={"save_every": 7, "views": 3, "mask_km": 500.0, "patience": 15})


def child(home, *before, last, processes=1):
    """A process of its own that trains, and is killed at a step."""
    threads = str(torch.get_num_threads() // processes or 1)
    environment = os.environ | {"RANGEGRID_STORAGE_URL": home, "OMP_NUM_THREADS": threads}
    words = [*before, sys.executable, "-c", CHILD, f"{home}/patches/p", CAREFUL.model_dump_json(), str(last)]
    return subprocess.run(words, env=environment, capture_output=True, text=True)


@pytest.mark.faults
def test_a_training_that_the_system_kills_goes_on_to_the_same_bytes(client, home, tmp_path, monkeypatch):
    mock_patches(f"{home}/patches/p")
    killed = child(home, last=25)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (name,) = storage.names(f"{home}/checkpoints")
    assert storage.names(f"{home}/checkpoints/{name}") == ["training.pt"]
    for other in ("whole", "two"):
        storage.copy(home, (tmp_path / other).as_uri())
    storage.delete((tmp_path / "whole" / "checkpoints").as_uri())

    whole, resumed = (weights(client, url, monkeypatch) for url in ((tmp_path / "whole").as_uri(), home))
    assert whole == resumed
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
    ran = child((tmp_path / "two").as_uri(), *launch, last=-1, processes=2)
    assert ran.returncode == 0, ran.stderr
    alone, of_two = (
        parse(whole),
        parse(storage.read((tmp_path / "two/checkpoints" / name / "model.safetensors").as_uri())),
    )
    for key, value in alone.items():
        np.testing.assert_allclose(of_two[key], value, rtol=1e-3, atol=1e-4, err_msg=key)


def weights(client, home, monkeypatch):
    """The bytes of the checkpoint that training at a place ends with."""
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", home)
    return storage.read(train_model(client, f"{home}/patches/p", CAREFUL) + "/model.safetensors")


def test_features_are_those_of_the_views(client, home, monkeypatch):
    monkeypatch.setattr(features_module, "SHARD", 40)
    patches = mock_patches(f"{home}/patches/p")
    url = encode_features(client, patches, PARAMS.encoder, 10)
    stored = StoredFeatures(url, 50)
    assert (stored.shape, stored.run) == ((10, N, 32), 40)
    images, encoder = open_patches(patches).reflectance(slice(0, N)), open_encoder(url, patches, "rcf")
    rng = np.random.default_rng(0)
    rows, views = rng.permutation(N), rng.integers(10, size=N)
    expected = [encoder.encode(view_of(images[row : row + 1], view))[0] for row, view in zip(rows, views, strict=True)]
    np.testing.assert_allclose(stored.take(rows, views), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stored.take(rows, 0 * rows), encoder.encode(images)[rows], rtol=1e-4, atol=1e-5)
    assert stored._shard.cache_info().currsize == 4  # two windows of 50: what memory holds does not grow


def test_views_are_the_symmetries_of_the_square_then_corners():
    image = np.arange(64, dtype="f4").reshape(1, 1, 8, 8)
    np.testing.assert_array_equal(view_of(image, 0), image)
    np.testing.assert_array_equal(view_of(image, 1)[0, 0], image[0, 0].T[::-1])
    np.testing.assert_array_equal(view_of(image, 2)[0, 0], image[0, 0, ::-1, ::-1])
    np.testing.assert_array_equal(view_of(image, 4)[0, 0], image[0, 0, :, ::-1])
    whole = {view_of(image, view).tobytes() for view in range(8)}
    assert len(whole) == 8
    assert {view_of(view_of(image, 3), view).tobytes() for view in range(8)} == whole
    corners = [view_of(image, view) for view in range(8, 16)]
    assert {corner.shape for corner in corners} == {(1, 1, 6, 6)}
    assert len({corner.tobytes() for corner in corners}) == 8
    assert {int(corner.min()) for corner in corners} == {0, 2, 16, 18}  # the upper left pixel of each corner


def test_training_tells_how_it_stands(client, home, caplog, capsys):
    with caplog.at_level("INFO", "rangegrid"):
        train_model(client, mock_patches(f"{home}/patches/p"), PARAMS)
    told = r"step 40 of 40: loss \d.\d+, scale 1\d.\d, held-out retrieval \d+.\d%, [\d,]+ pairs/s"
    assert re.search(told, caplog.text)
    assert "pairs/s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 80}, r"has 90 patches: a batch of 80 pairs needs more than the \d+ there are to train on"),
        ({"device": "cuda"}, "the device 'cuda' is not on this machine: use auto or one of cpu"),
        ({"patience": 2, "held_out_share": 0.001}, "patience needs held-out pairs and no 10-degree block"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_images_are_encoded(client, home, monkeypatch, changes, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(train_module, "encode_features", None)  # would fail if it were called
    patches = mock_patches(f"{home}/patches/p")
    with pytest.raises(UserError, match=message):
        train_model(client, patches, PARAMS.model_copy(update=changes))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"patience": 2, "held_out_share": 0}, "patience needs held-out pairs: give held_out_share above 0"),
        ({"batch": 1024, "shuffle": 100}, "shuffle 100 is less than a batch of 1024: give at least the batch"),
        ({"views": 17}, "less than or equal to 16"),
        ({"mask_km": -1}, "greater than or equal to 0"),
        ({"precision": "half"}, "'float32' or 'bf16'"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        TrainParams(**values)


def test_training_that_diverges_is_no_checkpoint(client, home):
    """A matrix that decays by nine times itself at each step; NaN compares as no larger, as if all were found."""
    params = PARAMS.model_copy(update={"lr": 1.0, "weight_decay": 10.0, "steps": 100})
    with pytest.raises(UserError, match=r"training diverged before step .*: lower lr or weight_decay"):
        train_model(client, mock_patches(f"{home}/patches/p"), params)
    assert not any(path.endswith("card.json") for path in storage.paths(f"{home}/checkpoints"))


def test_a_pipeline_with_too_few_patches_is_refused_before_it_samples():
    with pytest.raises(ValidationError, match=r"1024 pairs needs more than 500 patches: raise sample\.patches"):
        PipelineParams(sample=SampleParams(patches=500))


def test_too_small_views_are_refused_before_the_work(client, home, monkeypatch):
    monkeypatch.setattr(features_module, "run_units", None)  # would fail if it were called
    patches = mock_patches(f"{home}/patches/p", pixels=14)  # a corner has 10
    with pytest.raises(UserError, match=r"does not take view 15 of .* fewer views"):
        encode_features(client, patches, PARAMS.encoder, 16)


def test_parameters_that_decide_nothing_find_the_same_checkpoint(client, home):
    patches = mock_patches(f"{home}/patches/p")
    made = train_model(client, patches, PARAMS)
    assert train_model(client, patches, PARAMS.model_copy(update={"device": "cpu", "save_every": 3})) == made
    assert train_model(client, patches, PARAMS.model_copy(update={"mask_km": 100.0})) != made


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
