"""Flipped bits: in any chunk of any product one is an error that names the file, and never other numbers."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
import xarray as xr
import zarr
from safetensors.torch import save as serialise

from infra import storage
from infra.errors import UserError
from tasks import arrays
from tasks.cards import read_card, write_card
from tasks.core.earth.grid import GridSpec
from tasks.database.store import open_database, read_blocks, read_rows, stored_values
from tasks.grid import store as grids
from tasks.grid.updates import home_of
from tasks.model import features
from tasks.model.checkpoint import dump_state, pack, parse_state, unpack
from tasks.params import PublishParams
from tasks.patches import store as patches
from tasks.patches.store import open_patches
from tasks.points.embed import embed_file
from tasks.points.sample_grid import sample_file
from tasks.products import GridCard, PatchesCard
from tasks.publish import publish_grid
from tasks.release import validation
from tasks.tables.files import open_table
from tests.tasks.test_publish import images, inputs, store

RICH = {"step": 10.0, "tile_cells": 6, "evidence": True, "keep_sums": True, "compact_dims": 3}
KINDS = {
    "float32": RICH,
    "int8": {"step": 10.0, "tile_cells": 6, "dtype": "int8", "overviews": 1},
}
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def made(client, tmp_path_factory):
    with inputs(tmp_path_factory.mktemp("rot")) as (checkpoint, database):
        yield lambda params: publish_grid(client, checkpoint, database, PublishParams(**params))


def path(url, *parts):
    return Path(storage.join(url, *parts).removeprefix("file://"))


class Flipped:
    """A file with one of its bits flipped meanwhile, somewhere in it."""

    def __init__(self, file):
        self.file, self.data = file, file.read_bytes()

    def __enter__(self):
        spoiled = bytearray(self.data)
        spoiled[RNG.integers(len(spoiled))] ^= 1 << RNG.integers(8)
        self.file.write_bytes(spoiled)

    def __exit__(self, *_):
        self.file.write_bytes(self.data)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("float32", {*grids.EVIDENCE, "embedding", "components", "mean", "lat", "lon", "sums", "block"}),
        ("int8", {"visual", "location", "x2.zarr/visual", "x2.zarr/location", "x2.zarr/lat"}),
    ],
)
def test_validation_names_the_damaged_object_of_a_grid(made, client, kind, names):
    """In the vectors, and in whatever lies beside them."""
    grid = made(KINDS[kind])
    card = read_card(home_of(grid), GridCard)
    by_array = {}
    for url, within in ((grid, ""), (f"{home_of(grid)}/x2.zarr", "x2.zarr/"), (f"{home_of(grid)}/sums.zarr", "")):
        by_array |= {within + stored.array: (url, stored) for stored in arrays.objects(url)}
    assert names <= by_array.keys()
    for url, stored in by_array.values():
        with Flipped(path(url, str(stored))):
            assert f"{storage.join(url, str(stored))} is damaged" in arrays.check(url, stored)
    vectors, beside = ("embedding", "sums") if kind == "float32" else ("location", "x2.zarr/visual")
    for name, check in ((vectors, "decoding"), (beside, "other arrays")):
        url, stored = by_array[name]
        with Flipped(path(url, str(stored))):
            found = {finding.check: finding for finding in validation.validate_grid(client, grid, card)}
        assert found["checksums"].passed
        assert not found[check].passed
        assert f"{storage.join(url, str(stored))} is damaged" in found[check].detail


def test_no_flip_is_read_as_other_numbers(made):
    """Anywhere in a shard: by our own readers and by plain xarray."""
    grid = made(KINDS["float32"])
    variables = {"embedding": grids.open_vectors(grid)[:], "distance_km": xr.open_zarr(grid).distance_km.values}
    for name, whole in variables.items():
        stored = next(found for found in arrays.objects(grid) if found.array == name)
        refused = 0
        for _ in range(20):
            with Flipped(path(grid, str(stored))):
                read = xr.open_zarr(grid, chunks=None)[name]
                try:
                    np.testing.assert_array_equal(read.values, whole)
                except ValueError:
                    refused += 1
        assert refused > 18  # another can be in bytes that no chunk has
    shard = next(found for found in arrays.objects(grid) if found.array == "embedding")
    with Flipped(path(grid, str(shard))), pytest.raises(UserError, match=f"{shard} is damaged"):
        grids.open_vectors(grid)[:]


def test_databases_patches_and_features_name_what_is_damaged(tmp_path, made):
    home = path(made(RICH)).parents[2]
    url = store(home, "rotten", images(np.arange(300)))
    readers = {
        "keys": lambda: open_database(url),
        "values": lambda: stored_values(url)[slice(0, 300)],
        "locations": lambda: read_rows(url, [1, 200, 299]),
        "row_ids": lambda: list(read_blocks(url, 70)),
    }
    for name, read in readers.items():
        for file in path(url, "database.zarr", name).rglob("c/*"):
            file = next(iter(file.rglob("[0-9]"))) if file.is_dir() else file
            match = rf"database.zarr/{name}/c/[0-9/]+ is damaged"
            with Flipped(file), pytest.raises(UserError, match=match):
                read()
        read()
    url = tmp_path.as_uri()
    patches.create(url, 5, ("B02", "B03"), 8, 10.0, 2)
    for start in (0, 2, 4):
        patches.write_shard(url, start, RNG.integers(1, 9000, (min(2, 5 - start), 2, 8, 8)).astype("u2"))
    with Flipped(path(url, "patches.zarr/pixels/c/1/0/0/0")):
        patches.read_rows(url, slice(0, 2))
        with pytest.raises(UserError, match=r"patches.zarr/pixels/c/1/0/0/0 is damaged"):
            patches.read_rows(url, slice(0, 5))
    stored = features._table(url)
    stored.create((2, 700, 4), dtype="f4", chunks=(1, features.SHARD, 4), fill_value=np.nan)
    stored.open("r+")[:] = RNG.normal(size=(2, 700, 4)).astype("f4")
    with Flipped(path(url, "features.zarr/features/c/0/1/0")):
        with pytest.raises(UserError, match=r"features/c/0/1/0 is damaged"):
            features.read_features(url)
        with pytest.raises(UserError, match=r"features/c/0/1/0 is damaged"):
            features.StoredFeatures(url, 100).take(np.array([600]), np.array([0]))


def manifest(count):
    """A manifest's columns, of made-up rows."""
    columns = {name: np.arange(count).astype(kind) for name, kind in patches.MANIFEST.items() if kind != "str"}
    texts = {name: [f"{name} {i}" for i in range(count)] for name, kind in patches.MANIFEST.items() if kind == "str"}
    return pd.DataFrame(columns | texts)


def refused(file, read, match, least=20):
    """Flips bits of a file, 20 times one: so many are told at least, and none is read as anything else."""
    told, whole = [], read()
    for _ in range(20):
        with Flipped(file):
            try:
                found = read()
            except UserError as error:
                told.append(str(error))
            else:
                assert found == whole
    assert len(told) >= least
    assert [text for text in told if not re.search(match, text)] == []


def test_what_lies_beside_the_arrays_is_vouched_for_too(tmp_path):
    """Manifest, parts, fitted encoder and training state."""
    url, count = tmp_path.as_uri(), 40
    patches.create(url, count, ("B02", "B03"), 8, 10.0, 20)
    digest = patches.write_manifest(url, manifest(count))
    write_card(url, PatchesCard(fingerprint="123456789abc", manifest_sha256=digest))
    refused(
        tmp_path / "manifest.parquet",
        lambda: open_patches(url).manifest.to_json(),
        r"manifest.parquet is damaged: .*its digest is not that of the card",
    )
    write_card(url, PatchesCard(fingerprint="123456789abc"))
    assert len(open_patches(url).manifest) == count  # as of before
    patches.create_part(url, "screen", 0, 3, manifest(3000))
    pages = tmp_path / "screen/0/00003.parquet"
    refused(pages, lambda: patches.read_part(url, "screen", 0, 3).to_json(), "screen/0/00003.parquet is damaged", 15)
    tensors = {"weight": torch.arange(2000.0).reshape(40, 50), "one": torch.tensor(3), "size": torch.ones(7).half()}
    for name, data, read in (
        ("encoder.safetensors", pack(tensors), lambda data, place: str(unpack(data, place).items())),
        ("state.pt", dump_state(tensors), lambda data, place: str(parse_state(data, place).items())),
    ):
        (file := tmp_path / name).write_bytes(data)
        refused(file, lambda file=file, read=read: read(file.read_bytes(), str(file)), f"{name} is damaged")
    for data, read in ((serialise(tensors), unpack), (dump_state(tensors)[32:], parse_state)):
        assert torch.equal(read(data, "of before")["weight"], tensors["weight"])


def test_points_are_written_with_checksums(made, tmp_path):
    """As Parquet, page by page, and as Zarr: other readers that look at these find the flips too."""
    lonlat = np.random.default_rng(3).uniform(-80, 80, (500, 2))
    pd.DataFrame(lonlat, columns=["lon", "lat"]).to_csv(tmp_path / "points.csv", index=False)
    found = Path(sample_file(tmp_path / "points.csv", made(RICH), tmp_path / "points.parquet"))

    def read():
        with open_table(str(found)) as table:
            return pa.Table.from_batches(table.batches()).to_pylist()

    refused(found, lambda: str(read()), "points.parquet", 17)
    home = path(made(RICH)).parents[2]
    embed_file(tmp_path / "points.csv", f"{home}/checkpoint", f"{home}/database", tmp_path / "points.zarr")
    assert arrays.unchecked((tmp_path / "points.zarr").as_uri()) == []


def test_a_grid_of_before_is_read_and_what_it_cannot_vouch_for_is_said(made, client, monkeypatch):
    """As the earlier versions wrote them: the same arrays without checksums."""
    with monkeypatch.context() as patch:
        patch.setattr(arrays, "packed", lambda compressor=None: (compressor or zarr.codecs.ZstdCodec(),))
        grid = made({**RICH, "method": "range+", "beta": 0.4})
    found = {f.check: f for f in validation.validate_grid(client, grid, read_card(home_of(grid), GridCard))}
    assert found["checksums"].passed is None
    assert "have none: a flipped bit may decode as another number" in found["checksums"].detail
    assert not [check for check, finding in found.items() if finding.passed is False]
    assert np.isfinite(grids.read_tile(grid, list(GridSpec(10.0, 6).tiles())[8])).any()
