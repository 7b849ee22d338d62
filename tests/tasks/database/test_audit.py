"""The audit: a good database passes, and every fault that can be put into one is found."""

import argparse
from pathlib import PurePosixPath

import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from distributed import Client
from safetensors.numpy import save_file

from infra import storage
from infra.errors import UserError
from tasks.cards import read_card
from tasks.core.contrastive import ImageProjection
from tasks.core.encoders.location import LocationEncoder
from tasks.core.encoders.rcf import fit_rcf
from tasks.core.encoders.registry import load_tower
from tasks.database.audit import audit_database
from tasks.database.npz import export_npz, import_npz
from tasks.database.store import open_database
from tasks.encode import encode_database
from tasks.model.checkpoint import save_checkpoint
from tasks.model.features import read_weights
from tasks.params import EncodeParams, ValueParams
from tasks.patches.store import MANIFEST, create, open_patches, write_manifest, write_shard
from tasks.products import DatabaseCard
from tests.core.encoders.test_registry import weights

N, BANDS = 80, ("B02", "B03", "B04", "B08")


@pytest.fixture(scope="module")
def client():
    with Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=":0") as client:
        yield client


def mock_patches(url):
    """Images whose colours follow their place, as on Earth."""
    rng = np.random.default_rng(0)
    lon, lat = rng.uniform(-180, 180, N), rng.uniform(-60, 80, N)
    colour = np.stack([np.cos(np.radians(lon)), np.sin(np.radians(lon)), np.sin(np.radians(2 * lat)), lat / 90], 1)
    pixels = 5000 + 2000 * colour[:, :, None, None] + rng.normal(0, 500, (N, 4, 16, 16))
    create(url, N, BANDS, 16, 10.0, N)
    write_shard(url, 0, pixels.astype("u2"))
    blank = {"str": "a", "int64": 0, "float64": 0.0}
    table = pd.DataFrame({name: [blank[kind]] * N for name, kind in MANIFEST.items()})
    write_manifest(url, table.assign(row_id=3 * np.arange(N), lon=lon, lat=lat))
    storage.write_json(f"{url}/card.json", {"kind": "patches", "fingerprint": "123456789abc", "attribution": "mock"})
    return url


@pytest.fixture(scope="module")
def made(client, tmp_path_factory):
    """Patches, a checkpoint, and its database."""
    home = tmp_path_factory.mktemp("audit").as_uri()
    patches = mock_patches(f"{home}/patches/p")
    images = open_patches(patches).reflectance(slice(None))
    encoder = fit_rcf(images, BANDS, dim=32)
    torch.manual_seed(0)
    projection = ImageProjection(32, 16).fit(encoder.encode(images))
    save_checkpoint(f"{home}/checkpoint", LocationEncoder(4, hidden=16, dim=16), projection, encoder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANGEGRID_STORAGE_URL", home)
        database = encode_database(client, patches, f"{home}/checkpoint", EncodeParams(shard_rows=30))
    return {"home": home, "patches": patches, "checkpoint": f"{home}/checkpoint", "database": database}


@pytest.fixture
def changed(made, tmp_path):
    """A copy of the database, and a function that changes one of its arrays."""
    url = (tmp_path / "copy").as_uri()
    storage.copy(made["database"], url)

    def change(name, function):
        array = zarr.open_array(storage.zarr_store(f"{url}/database.zarr/{name}"), mode="r+")
        array[...] = function(array[...])
        return url

    return change


def failed(findings):
    return [finding.check for finding in findings if finding.passed is False]


def test_a_good_database_passes_every_check(made):
    findings = audit_database(made["database"], made["patches"], made["checkpoint"])
    assert not failed(findings), findings
    checks = {finding.check for finding in findings if finding.passed}
    assert {"numbers", "checkpoint", "patches", "row ids", "places", "keys encoded again"} <= checks
    assert {"keys shuffled, must differ", "values shuffled, must differ"} <= checks


def shift(array):
    return np.roll(array, 1, axis=0)


def one_row(array):
    array = array.copy()
    array[[3, 4]] = array[[4, 3]]
    return array


@pytest.mark.parametrize(
    ("name", "change", "check"),
    [
        ("keys", shift, "keys encoded again"),
        ("values", shift, "values encoded again"),
        ("values", one_row, "values encoded again"),
        ("values", lambda a: a * 1.01, "values encoded again"),
        ("locations", one_row, "places"),
        ("row_ids", shift, "row ids"),
        ("keys", lambda a: 2 * a, "numbers"),
        ("keys", lambda a: a * np.nan, "numbers"),
    ],
)
def test_each_fault_is_found(made, changed, name, change, check):
    url = changed(name, change)
    assert failed(audit_database(url, made["patches"], made["checkpoint"], sample=N)) == [check]


def test_products_of_other_fingerprints_are_found(made, tmp_path):
    other = (tmp_path / "other").as_uri()
    save_checkpoint(other, LocationEncoder(3, hidden=8, dim=16))
    assert failed(audit_database(made["database"], made["patches"], other)) == ["checkpoint"]
    with pytest.raises(UserError, match="give --checkpoint too"):
        audit_database(made["database"], made["patches"])


@pytest.fixture
def published(made, tmp_path):
    """The database as another project's file, after a change of its arrays, imported: no image leads back."""

    def imported(**change):
        export_npz(made["database"], tmp_path / "db.npz", overwrite=True)
        with np.load(tmp_path / "db.npz") as file:
            arrays = {name: change.get(name, lambda a: a)(file[name]) for name in file.files}
        np.savez(tmp_path / "changed.npz", **arrays)
        url = (tmp_path / "-".join(["imported", *change])).as_uri()
        import_npz(tmp_path / "changed.npz", url, made["checkpoint"])
        return url

    return imported


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("image_embeddings", ["values and keys", "places and values"]),
        ("satclip_embeddings", ["values and keys", "places and keys"]),
        ("locs", ["places and keys", "places and values"]),
    ],
)
def test_a_foreign_database_is_told_by_statistics(made, published, name, broken):
    """As the published builder could make it: one list in another order than the rest."""
    assert not failed(audit_database(published()))
    assert not failed(audit_database(published(), made["patches"], made["checkpoint"]))  # no row leads to a patch
    assert failed(audit_database(published(**{name: np.random.default_rng(1).permutation}))) == broken


def test_values_of_their_own_encoder(client, made, tmp_path, monkeypatch):
    """Keys from the checkpoint, values from a tower with weights in a file; the audit encodes both again."""
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", tmp_path.as_uri())
    arrays = {"2.weight": np.array([[1, 0], [0, 3]], "f4")}
    save_file(arrays, tmp_path / "own.safetensors")
    values = ValueParams(name="tests.core.encoders.my_encoder:build", weights=str(tmp_path / "own.safetensors"))
    params = EncodeParams(shard_rows=30, values=values)
    database = encode_database(client, made["patches"], made["checkpoint"], params)
    data, images = open_database(database), open_patches(made["patches"]).reflectance(slice(None))
    means = images.mean((2, 3), dtype="f8")
    np.testing.assert_allclose(data.values, np.stack([means[:, 2], 3 * means[:, 0]], 1), rtol=1e-5)
    np.testing.assert_array_equal(data.keys, open_database(made["database"]).keys)
    assert read_card(database, DatabaseCard).values.encoder.bands == ("B04", "B02")
    assert encode_database(client, made["patches"], made["checkpoint"], params) == database
    assert not failed(audit_database(database, made["patches"], made["checkpoint"]))
    monkeypatch.setattr("tasks.database.audit.encode_rows", lambda encoder, *_: np.ones((1, encoder.dim), "f4"))
    assert "values encoded again" in failed(audit_database(database, made["patches"], made["checkpoint"]))
    monkeypatch.undo()
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", tmp_path.as_uri())
    storage.delete(read_card(database, DatabaseCard).values.features)
    with pytest.raises(UserError, match="there is no finished features at"):
        audit_database(database, made["patches"], made["checkpoint"])
    save_file({"2.weight": 2 * arrays["2.weight"]}, tmp_path / "own.safetensors")
    assert encode_database(client, made["patches"], made["checkpoint"], params) != database


def test_weights_are_read_from_a_checkpoint_or_a_file(tmp_path):
    tower = load_tower("satclip-resnet18", weights("satclip-resnet18"))
    save_checkpoint((tmp_path / "tower").as_uri(), LocationEncoder(3, hidden=8, dim=4), ImageProjection(512, 4), tower)
    save_file(tower.arrays(), tmp_path / "tower.safetensors")
    state = {name: torch.from_numpy(array) for name, array in tower.arrays().items()}
    stored = {
        "model": state,
        "optimizer": {"state": {}},
        "args": argparse.Namespace(lr=1.0),
        "path": PurePosixPath("out"),
    }
    torch.save(stored, tmp_path / "tower.pth")  # as training scripts store it, with a class of theirs
    torch.save(state, tmp_path / "pytorch_model.bin")
    files = [tmp_path / name for name in ("tower.safetensors", "tower.pth", "pytorch_model.bin")]
    for place in (tmp_path / "tower", (tmp_path / "tower").as_uri(), *files):
        found = read_weights(str(place))
        assert set(found) == set(tower.arrays())
        np.testing.assert_array_equal(found["bn1.weight"], tower.arrays()["bn1.weight"])


def test_weights_without_a_name_are_refused():
    with pytest.raises(ValueError, match="need the name of their encoder"):
        ValueParams(weights="satmae.safetensors")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "satclip-resnet18", "weights": "tower"}, "takes B01, .* sample patches with B01, B05"),
        ({"name": "satmae"}, "needs weights"),
        ({"name": "satmae", "weights": "nowhere"}, "there is no file .*nowhere"),
        ({"name": "satmae", "weights": "text"}, r"no \.safetensors"),
        ({"name": "satmae", "weights": "tower"}, "lack cls_token"),
        ({"name": "satmae", "weights": "evil.pth"}, "without running code"),
        ({"name": "satmae-sentinel2", "weights": "empty.bin"}, "has no tensors by name"),
    ],
)
def test_values_that_cannot_be_are_refused(client, made, tmp_path, monkeypatch, values, message):
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", tmp_path.as_uri())
    tower = load_tower("satclip-resnet18", weights("satclip-resnet18"))
    save_checkpoint((tmp_path / "tower").as_uri(), LocationEncoder(3, hidden=8, dim=4), ImageProjection(512, 4), tower)
    (tmp_path / "text").write_text("not weights")
    torch.save({"model": {}, "hook": print}, tmp_path / "evil.pth")
    torch.save({"model": {"cls_token": "text"}}, tmp_path / "empty.bin")
    if "weights" in values:
        values = values | {"weights": str(tmp_path / values["weights"])}
    with pytest.raises(UserError, match=message):
        encode_database(client, made["patches"], made["checkpoint"], EncodeParams(values=ValueParams(**values)))
