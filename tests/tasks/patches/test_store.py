"""The patch store: a damaged or forged one is refused before it costs memory, and nothing is written outside of it."""

import tracemalloc

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra import storage
from infra.errors import UserError
from tasks.cards import write_card
from tasks.patches.store import MANIFEST, create, open_patches, write_manifest, write_shard
from tasks.products import PatchesCard

N, BANDS, SIDE = 6, ("B02", "B04"), 8
LITTLE = 20_000_000  # bytes that a refusal may take: GeoPandas, when it is first used, has its share of them
META = "patches.zarr/pixels/zarr.json"


@pytest.fixture
def url(tmp_path):
    """A store of six patches."""
    home = (tmp_path / "patches").as_uri()
    create(home, N, BANDS, SIDE, 10.0, 4)
    pixels = np.arange(N * len(BANDS) * SIDE * SIDE, dtype=np.uint16).reshape(N, len(BANDS), SIDE, SIDE)
    for start in (0, 4):
        write_shard(home, start, pixels[start : start + 4])
    write_manifest(home, pd.DataFrame({name: np.zeros(N).astype(kind) for name, kind in MANIFEST.items()}))
    write_card(home, PatchesCard(fingerprint="123456789abc"))
    return home


def forge(change):
    """A fault in the metadata of the pixels."""

    def fault(url):
        found = storage.read_json(storage.join(url, META))
        change(found)
        storage.write_json(storage.join(url, META), found)

    return fault


def shape(*numbers):
    return forge(lambda meta: meta.update(shape=list(numbers)))


def shard(*numbers):
    return forge(lambda meta: meta["chunk_grid"]["configuration"].update(chunk_shape=list(numbers)))


def chunk(*numbers):
    return forge(lambda meta: meta["codecs"][0]["configuration"].update(chunk_shape=list(numbers)))


def everything(side):
    """Patches that are huge, and whose chunks and shards agree."""
    parts = shape(N, 2, side, side), shard(4, 2, side, side), chunk(1, 2, side, side)
    return lambda url: [part(url) for part in parts]


def manifest(url):
    """Millions of rows that are all the same take a few bytes."""
    rows = pa.table({"lon": pa.DictionaryArray.from_arrays(np.zeros(LITTLE, np.int8), [0.0])})
    pq.write_table(rows, f"{url.removeprefix('file://')}/manifest.parquet", row_group_size=LITTLE)
    assert storage.size(url) < 100_000


def test_a_good_store_opens(url):
    patches = open_patches(url)
    assert (patches.shape, patches.bands, len(patches.manifest)) == ((N, 2, SIDE, SIDE), BANDS, N)
    assert patches.pixels(slice(4, 5))[0, 0, 0, 1] == 4 * 2 * SIDE * SIDE + 1


@pytest.mark.parametrize(
    "fault",
    [
        shape(10**13, 2, SIDE, SIDE),
        shape(N, 2, 10**6, 10**6),
        shape(N, 10**9, SIDE, SIDE),
        shape(N, 2),
        chunk(1, 2, 8, 10**9),
        shard(10**12, 2, SIDE, SIDE),
        everything(10**6),
        forge(lambda meta: meta["attributes"].update(bands=["B02"] * 10)),
        forge(lambda meta: meta["attributes"].pop("bands")),
        forge(lambda meta: meta.update(data_type="float64")),
        manifest,
    ],
    ids=["patches", "side", "bands", "flat", "chunk", "shard", "everything", "names", "nameless", "floats", "manifest"],
)
def test_metadata_that_claim_more_than_a_store_can_be_are_refused_before_memory_is_given(url, fault):
    fault(url)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"damaged or forged\. Sample again, or restore it"):
            open_patches(url).pixels(slice(0, N))
        assert tracemalloc.get_traced_memory()[1] < LITTLE
    finally:
        tracemalloc.stop()
