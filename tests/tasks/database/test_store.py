"""The database: shards, exchange with rangegeo, and files that must be refused."""

import io
import zipfile

import numpy as np
import pytest
import torch
from rangegeo import RANGE

from infra import storage
from infra.errors import UserError
from tasks.core.encoders.location import LocationEncoder
from tasks.database.audit import audit_database
from tasks.database.npz import export_npz, import_npz
from tasks.database.store import create_database, finish_database, open_database, read_rows, write_rows, written_shards
from tasks.model.checkpoint import save_checkpoint
from tasks.model.satclip import export_satclip

N, DIM, VALUES = 25, 8, 5


@pytest.fixture
def home(tmp_path):
    return tmp_path.as_uri()


@pytest.fixture
def space(home):
    torch.manual_seed(0)
    save_checkpoint(f"{home}/space", LocationEncoder(6, hidden=16, dim=DIM))
    return f"{home}/space"


def arrays():
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(N, DIM)).astype("f4")
    return {
        "locs": np.c_[rng.uniform(-180, 180, N), rng.uniform(-90, 90, N)],
        "satclip_embeddings": keys,
        "image_embeddings": rng.normal(size=(N, VALUES)).astype("f4"),
    }


def rows(start, stop):
    data = arrays()
    keys = data["satclip_embeddings"] / np.linalg.norm(data["satclip_embeddings"], axis=1, keepdims=True)
    whole = {
        "keys": keys,
        "values": data["image_embeddings"],
        "locations": data["locs"],
        "row_ids": np.arange(100, 100 + N),
    }
    return {name: array[start:stop] for name, array in whole.items()}


def test_shards_in_any_order_make_the_database(home):
    url = f"{home}/database"
    create_database(url, N, DIM, VALUES, rows=10)
    for done, start in enumerate((20, 0, 10)):
        assert len(written_shards(url)) == done
        write_rows(url, start, rows(start, min(start + 10, N)))
        create_database(url, N, DIM, VALUES, rows=10)  # a rerun keeps what is there
    card = finish_database(url, checkpoint="abc", fingerprint="def")
    data = open_database(url)
    for name, array in rows(0, N).items():
        np.testing.assert_array_equal(getattr(data, name), array)
    assert (data.card, card.images, card.key_dim, card.value_dim) == (card, N, DIM, VALUES)
    assert (data.keys.dtype, data.locations.dtype, data.row_ids.dtype) == ("f4", "f8", "i8")


@pytest.mark.parametrize(("start", "stop"), [(5, 15), (0, 9), (0, 20), (20, 24)])
def test_part_of_a_shard_is_refused(home, start, stop):
    create_database(f"{home}/database", N, DIM, VALUES, rows=10)
    with pytest.raises(UserError, match="whole shard of 10"):
        write_rows(f"{home}/database", start, rows(start, stop))


def test_an_unfinished_database_is_refused(home):
    url = f"{home}/database"
    create_database(url, N, DIM, VALUES, rows=10)
    write_rows(url, 0, rows(0, 10))
    with pytest.raises(UserError, match="not finite"):
        finish_database(url, checkpoint="abc", fingerprint="def")
    with pytest.raises(UserError, match="no finished database"):
        open_database(url)


def test_import_and_export_keep_every_number(home, space, tmp_path):
    np.savez(tmp_path / "db.npz", **arrays())
    import_npz(tmp_path / "db.npz", f"{home}/database", space)
    export_npz(f"{home}/database", tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz", allow_pickle=False) as out:
        np.testing.assert_array_equal(out["locs"], arrays()["locs"])
        np.testing.assert_array_equal(out["image_embeddings"], arrays()["image_embeddings"])
        np.testing.assert_array_equal(out["satclip_embeddings"], rows(0, N)["keys"])
    assert (open_database(f"{home}/database").row_ids == -1).all()


def test_rangegeo_runs_on_our_export(home, space, tmp_path):
    """RANGE+ by rangegeo on the exported files, against float64 from what is stored."""
    np.savez(tmp_path / "db.npz", **arrays())
    import_npz(tmp_path / "db.npz", f"{home}/database", space)
    export_npz(f"{home}/database", tmp_path / "out.npz")
    export_satclip(space, tmp_path / "out.ckpt")
    theirs = RANGE("RANGE+", pretrained_path=str(tmp_path / "out.ckpt"), db_path=str(tmp_path / "out.npz"))
    places = np.array([[10.0, 50.0], [-179.9, -30.0], [0.0, 89.0]])
    data = open_database(f"{home}/database")
    torch.manual_seed(0)
    queries = LocationEncoder(6, hidden=16, dim=DIM).double().embed(places).astype("f8")
    weights = 0.5 * softmax(12 * queries @ data.keys.T) + 0.5 * softmax(40 * sphere(places) @ sphere(data.locations).T)
    expected = np.concatenate([weights @ data.values, queries], 1)
    np.testing.assert_allclose(theirs.encode(places), expected, atol=2e-5)


def softmax(x):
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def sphere(lonlat):
    lon, lat = np.radians(lonlat).T
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], 1)


def test_rows_that_are_there_twice_are_told_and_kept(home, space, tmp_path, caplog):
    """As in the published code, a row that is there twice counts twice; the audit does not call it a fault."""
    twice = {name: np.concatenate([array, array[:2]]) for name, array in arrays().items()}
    np.savez(tmp_path / "db.npz", **twice)
    assert import_npz(tmp_path / "db.npz", f"{home}/database", space).images == N + 2
    assert "has 2 images twice, place and value" in caplog.text
    np.testing.assert_array_equal(open_database(f"{home}/database").values, twice["image_embeddings"])
    (found,) = (one for one in audit_database(f"{home}/database") if one.check == "duplicates")
    assert (found.passed, found.detail.split()[0]) == (None, "2")


def broken(name, index, value):
    data = arrays()
    data[name][index] = value
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (broken("satclip_embeddings", 3, 0), "1 keys of length zero.*row 3"),
        (broken("image_embeddings", (4, 2), np.nan), "values that are not finite.*row 4"),
        (broken("locs", (2, 1), 95), "latitudes beyond the poles.*row 2"),
        (broken("locs", (2, 0), 500), "longitudes outside"),
        (arrays() | {"locs": arrays()["locs"][:-1]}, "every image needs one of each"),
        (arrays() | {"locs": np.zeros((N, 3))}, "tables"),
        (arrays() | {"satclip_embeddings": np.ones((N, 9), "f4")}, "length 9 and the checkpoint embeds to 8"),
        ({"locs": arrays()["locs"]}, "lacks an array"),
        (arrays() | {"locs": np.array([object()])}, "no readable .npz of plain numbers"),
        (arrays() | {"locs": np.array(["north"] * N)}, "no readable .npz of plain numbers.*type <U5"),
        (arrays() | {"locs": np.float64(3)}, "tables"),
        (arrays() | {"image_embeddings": np.zeros((N, 0))}, "tables"),
        (arrays() | {"image_embeddings": np.full((N, 3), 1e300)}, "not finite"),
    ],
)
def test_bad_files_are_refused(home, space, tmp_path, data, message):
    np.savez(tmp_path / "bad.npz", **data)
    with pytest.raises(UserError, match=message):
        import_npz(tmp_path / "bad.npz", f"{home}/database", space)


def test_nothing_good_is_overwritten(home, space, tmp_path):
    np.savez(tmp_path / "db.npz", **arrays())
    card = import_npz(tmp_path / "db.npz", f"{home}/database", space)
    assert import_npz(tmp_path / "db.npz", f"{home}/database", space) == card
    np.savez(tmp_path / "other.npz", **broken("locs", (0, 0), 1.0))
    with pytest.raises(UserError, match="holds another database already"):
        import_npz(tmp_path / "other.npz", f"{home}/database", space)
    with pytest.raises(UserError, match="holds another checkpoint already"):
        import_npz(tmp_path / "db.npz", space, space)
    with pytest.raises(UserError, match=r"db\.npz is there already: name another file, or give --overwrite"):
        export_npz(f"{home}/database", tmp_path / "db.npz")
    export_npz(f"{home}/database", tmp_path / "db.npz", overwrite=True)
    assert open_database(f"{home}/database").card == card


def test_an_unfinished_database_of_another_shape_is_refused(home, space, tmp_path):
    create_database(f"{home}/database", N + 1, DIM, VALUES, rows=10)
    np.savez(tmp_path / "db.npz", **arrays())
    with pytest.raises(UserError, match=r"unfinished product of shape \(26, 8\), not \(25, 8\): delete it"):
        import_npz(tmp_path / "db.npz", f"{home}/database", space)


def test_an_archive_that_expands_beyond_reason_is_refused(home, space, tmp_path):
    np.savez_compressed(tmp_path / "bomb.npz", **arrays() | {"image_embeddings": np.zeros((25, 100_000), "f4")})
    with pytest.raises(UserError, match=r"would expand to 10,\d+,\d+: give a range_db"):
        import_npz(tmp_path / "bomb.npz", f"{home}/database", space)


class Evil:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_code_in_a_published_database_is_refused_and_not_run(home, space, tmp_path, capsys):
    np.savez(tmp_path / "evil.npz", **arrays() | {"locs": np.array([Evil()] * N, object)})
    with pytest.raises(UserError, match=r"no readable \.npz of plain numbers"):
        import_npz(tmp_path / "evil.npz", f"{home}/database", space)
    assert "must not run" not in capsys.readouterr().out


@pytest.mark.parametrize("read", [open_database, lambda url: read_rows(url, slice(0, 10**12))])
def test_metadata_that_claim_a_petabyte_are_refused_before_memory_is_given(home, space, tmp_path, read):
    np.savez(tmp_path / "db.npz", **arrays())
    import_npz(tmp_path / "db.npz", f"{home}/database", space)
    url = f"{home}/database/database.zarr/keys/zarr.json"
    claims = storage.read_json(url)
    storage.write_json(url, claims | {"shape": [10**13, claims["shape"][1]]})
    with pytest.raises(UserError, match=r"claims 320,000,.* bytes and stores .*: it is damaged or forged"):
        read(f"{home}/database")


def test_a_header_that_claims_a_petabyte_is_refused(home, space, tmp_path):
    np.savez(tmp_path / "lies.npz", **{name: a for name, a in arrays().items() if name != "locs"})
    header = io.BytesIO()
    claims = {"descr": "<f8", "fortran_order": False, "shape": (10**14, 2)}
    np.lib.format.write_array_header_1_0(header, claims)
    with zipfile.ZipFile(tmp_path / "lies.npz", "a") as archive:
        archive.writestr("locs.npy", header.getvalue() + bytes(400))
    with pytest.raises(UserError, match=r"no readable \.npz"):
        import_npz(tmp_path / "lies.npz", f"{home}/database", space)


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 cut short", b"text"])
def test_what_is_no_npz_is_refused(home, space, tmp_path, content):
    if content is not None:
        (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"there is no file|no readable \.npz"):
        import_npz(tmp_path / "bad.npz", f"{home}/database", space)
