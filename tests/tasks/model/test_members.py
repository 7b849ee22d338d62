"""Checkpoints of several location encoders: each is the one trained alone, and together they are the mean of all."""

import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import xarray as xr
from safetensors.numpy import load as parse

from infra import storage
from infra.errors import UserError
from tasks.cards import read_card
from tasks.core.training import Trainer
from tasks.database.store import open_database
from tasks.encode import encode_database
from tasks.model.checkpoint import load_checkpoint
from tasks.model.satclip import export_satclip
from tasks.params import EncodeParams, EncoderParams, PublishParams, TrainParams
from tasks.patches.store import open_patches
from tasks.products import CheckpointCard
from tasks.publish import publish_grid
from tasks.train import train_model
from tests.tasks.test_train import N

DIM, SEED = 8, 2**32 - 2  # so that the third member has seed 0
ALONE = TrainParams(
    encoder=EncoderParams(dim=32), degree=4, hidden=16, dim=DIM, steps=40, batch=16, save_every=10, dropout=0.2,
    held_out_share=0, seed=SEED,
)  # fmt: skip
THREE = ALONE.model_copy(update={"members": 3})
PLACES = np.array([[0.0, 0.0], [10.5, -33.0], [179.0, 70.0], [-120.0, 5.0]])


@pytest.fixture(scope="module")
def three(client, home):
    return train_model(client, f"{home}/patches/p", THREE)


@pytest.fixture(scope="module")
def singles(client, home):
    seeds = [SEED, SEED + 1, 0]
    urls = [train_model(client, f"{home}/patches/p", ALONE.model_copy(update={"seed": seed})) for seed in seeds]
    return [load_checkpoint(url) for url in urls]


@pytest.fixture(scope="module")
def database(client, home, three):
    return encode_database(client, f"{home}/patches/p", three, EncodeParams())


def test_a_member_is_the_encoder_trained_alone(three, singles):
    stored = parse(storage.read(f"{three}/model.safetensors"))
    for i, single in enumerate(singles):
        for part, module in (("location", single.location), ("projection", single.projection)):
            for name, weight in module.state_dict().items():
                np.testing.assert_array_equal(stored[f"{part}.members.{i}.{name}"], weight.numpy())


def test_the_card_tells_the_training_of_each(three, singles):
    card = read_card(three, CheckpointCard)
    assert (card.architecture.dim, card.architecture.members, card.architecture.degree) == (3 * DIM, 3, 4)
    assert [member.seed for member in card.members] == [SEED, SEED + 1, 0]
    assert [member.history for member in card.members] == [single.card.history for single in singles]
    assert set(storage.names(three)) == {"model.safetensors", "card.json", "loss.png"}


def test_embeddings_are_the_members_side_by_side(three, singles):
    found = load_checkpoint(three).location.embed(PLACES)
    members = [single.location.embed(PLACES).astype("f8") for single in singles]
    np.testing.assert_allclose(found, np.hstack(members) / np.sqrt(3), atol=1e-7)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)
    mean = np.mean([vectors @ vectors.T for vectors in members], axis=0)
    np.testing.assert_allclose(found @ found.T, mean, atol=1e-6)


def test_keys_are_the_members_side_by_side(home, database, singles):
    stored = open_database(database)
    images = open_patches(f"{home}/patches/p").reflectance(slice(0, N))
    features = singles[0].encoder.encode(images).astype("f8")
    keys = []
    for single in singles:
        weights = {name: value.numpy().astype("f8") for name, value in single.projection.state_dict().items()}
        key = (features - weights["mean"]) / weights["std"] @ weights["linear.weight"].T + weights["linear.bias"]
        keys.append(key / np.linalg.norm(key, axis=1, keepdims=True))
    np.testing.assert_allclose(stored.keys, np.hstack(keys) / np.sqrt(3), atol=1e-5)
    assert stored.card.key_dim == 3 * DIM


def test_a_grid_holds_the_members_side_by_side(client, three, database, singles):
    grid = publish_grid(client, three, database, PublishParams(step=15.0, tile_cells=8))
    stored = xr.open_zarr(grid).embedding
    location = stored[(stored.block == "location").values].stack(cell=["lat", "lon"]).dropna("cell").T
    members = [single.location.embed(np.c_[location.lon, location.lat]) for single in singles]
    assert len(location) > 40
    np.testing.assert_allclose(location, np.hstack(members) / np.sqrt(3), atol=1e-6)


def test_members_are_no_satclip(three, tmp_path):
    with pytest.raises(UserError, match="has 3 members and SatCLIP's format has room for one location encoder"):
        export_satclip(three, tmp_path / "out.ckpt")
    assert not (tmp_path / "out.ckpt").exists()


def test_held_out_blocks_are_those_of_the_first_member(client, home):
    params = THREE.model_copy(update={"held_out_share": 0.3, "seed": 3})
    card = read_card(train_model(client, f"{home}/patches/p", params), CheckpointCard)
    first = read_card(
        train_model(client, f"{home}/patches/p", params.model_copy(update={"members": 1})), CheckpointCard
    )
    assert card.members[0].history == first.history
    assert card.members[0].metrics == first.metrics
    assert 0 <= card.metrics["accuracy"] <= 1


def test_a_member_that_fails_resumes_and_the_others_are_kept(client, home, three, tmp_path, monkeypatch):
    """The second fails after its state of step 20, as often as Dask tries; a rerun trains from there."""
    storage.copy(f"{home}/patches", (tmp_path / "patches").as_uri())
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", tmp_path.as_uri())
    step, steps, sick = Trainer.step, Counter(), [True]

    def counted(self, *batch):
        steps[self.schedule.seed, self.step_number] += 1
        if sick[0] and (self.schedule.seed, self.step_number) == (SEED + 1, 25):
            raise RuntimeError("the second member is sick")
        return step(self, *batch)

    monkeypatch.setattr(Trainer, "step", counted)
    with pytest.raises(RuntimeError, match="is sick"):
        train_model(client, f"{home}/patches/p", THREE)
    assert steps[SEED + 1, 25] == 3  # once, and two retries
    assert steps[SEED + 1, 19] == 1
    (name,) = storage.names((tmp_path / "checkpoints").as_uri())
    assert {"member-0.pt", "training-1.pt"} <= set(storage.names((tmp_path / "checkpoints" / name).as_uri()))
    sick[0] = False
    steps.clear()
    again = train_model(client, f"{home}/patches/p", THREE)
    assert {number for seed, number in steps if seed == SEED + 1} == set(range(20, 40))
    assert {seed for seed, _ in steps} == {SEED + 1}
    assert read_card(again, CheckpointCard) == read_card(three, CheckpointCard)


def test_the_terminal_shows_the_steps_of_all(client, home, caplog, capsys):
    params = THREE.model_copy(update={"members": 2, "steps": 20, "seed": 5})
    with caplog.at_level("INFO", "rangegrid"):
        train_model(client, f"{home}/patches/p", params)
    for member in (1, 2):
        assert f"member {member}, step 20 of 20: loss" in caplog.text
    assert "train: 40 of 40" in capsys.readouterr().err


CHILD = """
import os, sys
from distributed import Client
from tasks.params import TrainParams
from tasks.train import train_model

first = os.environ["RANK"] == "0"
client = Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None) if first else None
train_model(client, sys.argv[1], TrainParams.model_validate_json(sys.argv[2]))
"""


@pytest.mark.faults
def test_two_processes_train_the_members_in_turn(home, client, tmp_path, monkeypatch):
    """As one process does, to rounding."""
    storage.copy(f"{home}/patches", (tmp_path / "patches").as_uri())
    params = THREE.model_copy(update={"dropout": 0.0})
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
    words = [*launch, sys.executable, "-c", CHILD, (tmp_path / "patches/p").as_uri(), params.model_dump_json()]
    environment = os.environ | {"RANGEGRID_STORAGE_URL": tmp_path.as_uri(), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    (name,) = storage.names((tmp_path / "checkpoints").as_uri())
    made = (tmp_path / "checkpoints" / name).as_uri()
    assert set(storage.names(made)) == {"model.safetensors", "card.json", "loss.png"}
    expected = load_checkpoint(train_model(client, f"{home}/patches/p", params)).location.embed(PLACES)
    np.testing.assert_allclose(load_checkpoint(made).location.embed(PLACES), expected, atol=1e-3)


@pytest.mark.parametrize(
    ("architecture", "why"),
    [
        ({"dim": 8}, "has a degree of at least 1"),
        ({"degree": 4, "dim": 8, "members": 3}, "8 numbers are not 3 times as many"),
        ({"degree": 4, "dim": 8, "members": 10**9}, "less than or equal to 16"),
        ({"kind": "voronoi", "dim": 8}, "'harmonics' or 'tessellation'"),
    ],
)
def test_an_architecture_that_cannot_be_is_refused(tmp_path, architecture, why):
    card = {"kind": "checkpoint", "fingerprint": "0" * 12, "architecture": architecture}
    storage.write_json((tmp_path / "card.json").as_uri(), card)
    with pytest.raises(UserError, match=f"damaged or foreign.*{why}"):
        load_checkpoint(tmp_path.as_uri())
