"""Every way to write where something is serves wherever something is named: the same numbers come from each."""

import json

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from infra import storage
from infra.addresses import as_url, name_of, shown
from infra.errors import UserError
from tasks.core.earth.grid import GridSpec
from tasks.evaluation.embedders import embedders
from tasks.evaluation.label_tables import read_labels
from tasks.grid import store
from tasks.model.features import read_weights
from tasks.model.satclip import import_satclip
from tasks.params import EvaluateParams
from tasks.patches.places import read_points
from tasks.points.embed import embed_file, embed_points
from tasks.points.sample_grid import sample_file
from tests.flows.test_embed import write_products
from tests.tasks.evaluation.test_embedders import Residual

PLACES = np.array([[2.35, 48.86], [-179.9, -30.0], [0.0, 89.0]])
KINDS = ["path", "relative", "above", "home", "file", "spaces", "s3", "https"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Whatever can be named, in a directory whose name has a space, a # and a letter beyond ASCII."""
    folder = tmp_path_factory.mktemp("addresses") / "my #1 things, ö"
    folder.mkdir()
    write_products(folder)
    layers = [torch.nn.Linear(4, 12), torch.nn.ReLU(), *(Residual(12) for _ in range(4))]
    save_file(torch.nn.ModuleDict({"feats": torch.nn.Sequential(*layers)}).state_dict(), folder / "sinr.safetensors")
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"lon": rng.uniform(-170, 170, 60), "lat": rng.uniform(-70, 70, 60), "elevation": range(60)})
    table.to_csv(folder / "labels.csv", index=False)
    points = gpd.points_from_xy(table["lon"], table["lat"], crs=4326)
    gpd.GeoDataFrame(table[["elevation"]], geometry=points).to_file(folder / "labels.geojson")
    spec, halves = GridSpec(90.0, 2), np.array([1, 2], "f4").reshape(1, 2, 1)
    store.create((folder / "grid.zarr").as_uri(), spec, store.template(spec, store.Content(1, 1), {}))
    for tile in spec.tiles():
        store.write_tile((folder / "grid.zarr").as_uri(), tile, np.broadcast_to(halves, (2, 2, tile.columns)))
    return folder


@pytest.fixture(params=KINDS)
def at(request, folder, monkeypatch):
    """From a file's name to an address of one kind."""
    kind = request.param
    if kind in ("s3", "https"):
        request.getfixturevalue("sandbox")
        storage.upload(folder, home := "s3://rangegrid/addresses/a space #1")
        return lambda name: f"{home}/{name}" if kind == "s3" else storage.presigned(f"{home}/{name}")
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.chdir(folder / "checkpoint" if kind == "above" else folder)
    return {
        "path": lambda name: str(folder / name),
        "relative": lambda name: name,
        "above": lambda name: f"../{name}",
        "home": lambda name: f"~/{folder.name}/{name}",
        "file": lambda name: (folder / name).as_uri(),
        "spaces": lambda name: f"file://{folder.parent}/./{folder.name}/{name}",
    }[kind]


def test_files_of_others_are_read_from_everywhere(folder, at, tmp_path):
    """Foreign checkpoint and database, weights by name and of an encoder, points, labels."""
    expected = embed_points(PLACES, str(folder / "checkpoint"), str(folder / "database"))
    found = embed_points(PLACES, at("satclip.ckpt"), at("range_db.npz"))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    card = import_satclip(at("satclip.ckpt"), (tmp_path / "imported").as_uri())
    assert card.made_of["file"] == "satclip.ckpt"  # of a signed address too
    for name in ("sinr=sinr.safetensors", "satclip=satclip.ckpt"):
        kind, _, file = name.partition("=")
        here, there = (
            embedders(None, None, None, EvaluateParams(embedder=(f"{kind}={place}",)))[0]
            for place in (folder / file, at(file))
        )
        np.testing.assert_array_equal(there.embed(PLACES), here.embed(PLACES))
        assert there.version
    weights = read_weights(at("sinr.safetensors"))
    np.testing.assert_array_equal(
        weights["feats.0.weight"], read_weights(str(folder / "sinr.safetensors"))["feats.0.weight"]
    )
    table = pd.read_csv(folder / "labels.csv")
    for name in ("labels.csv", "labels.geojson"):
        np.testing.assert_allclose(read_points(at(name)), table[["lon", "lat"]])
        (labels,) = read_labels(EvaluateParams(labels=(at(name),)))
        np.testing.assert_array_equal(labels.labels, table["elevation"])


def test_a_grid_is_sampled_wherever_it_is(folder, at, tmp_path, request):
    """On the web a grid is many files, of which a signature would be that of one."""
    if "https" in request.node.name:
        pytest.skip("tests/flows/test_sample_grid.py reads one of a public bucket")
    out = sample_file(at("labels.csv"), at("grid.zarr"), tmp_path / "out.parquet")
    table = pd.read_parquet(out)
    np.testing.assert_array_equal(np.stack(table["embedding"])[:, 0], np.where(table["lat"] > 0, 1, 2))


def test_what_is_not_there_is_one_sentence(at):
    for read in (read_points, read_weights, lambda place: embed_points(PLACES, place, place)):
        with pytest.raises(UserError, match=r"there is no (file|table|finished).*gone") as raised:
            read(at("gone.csv" if read is read_points else "gone.ckpt"))
        assert "X-Amz" not in str(raised.value)


@pytest.mark.parametrize("name", ["out.parquet", "out.zarr"])
def test_outputs_go_everywhere_but_to_the_web(folder, at, name, request):
    arguments = str(folder / "labels.csv"), str(folder / "checkpoint"), str(folder / "database")
    if "https" in request.node.name:
        with pytest.raises(UserError, match="nothing can be written to http"):
            embed_file(*arguments, at(name))
        return
    embed_file(*arguments, at(name))
    with pytest.raises(UserError, match="is there already"):
        embed_file(*arguments, at(name))
    embed_file(*arguments, at(name), overwrite=True)
    url = as_url(at(name))
    if name == "out.parquet":
        with storage.as_file(url) as path:
            assert len(pd.read_parquet(path)) == 60
    else:
        assert json.loads(storage.read(storage.join(url, "zarr.json")))["node_type"] == "group"
    storage.delete(url)


def test_an_address_is_the_same_url_however_it_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    url = (tmp_path / "a b%20#?.csv").as_uri()
    for text in (tmp_path / "a b%20#?.csv", "a b%20#?.csv", "./x/../a b%20#?.csv", "~/a b%20#?.csv", url):
        assert as_url(text) == url
    assert as_url("file://localhost/x") == "file:///x"
    assert as_url("S3://bucket/a b#1") == "s3://bucket/a b#1"
    assert name_of(url) == "a b%20#?.csv"
    assert name_of("https://host/a%20b.csv?sig=1/2") == "a b.csv"
    assert shown("https://me:secret@host/a.csv?sig=1") == "https://host/a.csv"


def test_a_link_above_is_followed_as_the_system_does(tmp_path):
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "deep")
    (tmp_path / "real" / "x").write_text("right")
    assert storage.read(as_url(f"{tmp_path}/link/../x")) == b"right"


@pytest.mark.parametrize(("text", "message"), [("", "is empty"), ("file://host/x", "no file of this machine")])
def test_what_is_no_address_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        as_url(text)
