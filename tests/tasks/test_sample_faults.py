"""Sampling under faults: whatever happens on the way, the finished store is byte for byte an undisturbed run's."""

import numpy as np
import pandas as pd
import pytest

from infra import clusters, storage
from infra.errors import UserError
from tasks.params import SampleParams
from tasks.sample import sample_patches
from tests.proxy import Proxy, corrupted, dropped, latency, path, status, truncated, wrong_length

RUNS = 4  # at most: what stays broken after a rerun or two is a fault of ours


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    """A small sample of a list of points in France and Germany: 24 patches in three shards."""
    points = tmp_path_factory.mktemp("points") / "points.csv"
    rng = np.random.default_rng(0)
    pd.DataFrame({"lon": rng.uniform(2, 10, 40), "lat": rng.uniform(46, 51, 40)}).to_csv(points, index=False)
    return SampleParams(
        patches=24,
        places="list",
        source=str(points),
        patch_pixels=16,
        resolution_m=5_000,
        bands=("B02", "B08"),
        shard_patches=8,
        max_cloud_percent=95,
        min_clear_fraction=0.5,
    )


@pytest.fixture(scope="module")
def proxies(sandbox):
    """Proxies before the catalog and before S3, and the environment that leads through them."""
    before = sandbox.environment()
    urls = (before["RANGEGRID_STAC_URL"], before["RANGEGRID_S3_ENDPOINT"])
    with Proxy(urls[0]) as stac, Proxy(urls[1]) as s3, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANGEGRID_STAC_URL", stac.url)
        patch.setenv("RANGEGRID_S3_ENDPOINT", s3.url)
        yield stac, s3


@pytest.fixture
def s3(proxies):
    """The proxy before S3, without faults at the start and at the end."""
    yield proxies[1]
    [proxy.heal() for proxy in proxies]


@pytest.fixture
def home(proxies, tmp_path, monkeypatch):
    """Storage of its own for each test, behind the proxy."""
    url = f"s3://rangegrid/{tmp_path.name}"
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", url)
    return url


@pytest.fixture(scope="module")
def undisturbed(proxies, params):
    """Every object of an undisturbed run's store."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANGEGRID_STORAGE_URL", "s3://rangegrid/undisturbed")
        return product(sample(params))


def sample(params, name="threads"):
    with clusters.connect(name) as client:
        return sample_patches(client, params)


def sample_in_spite(params):
    """Runs again where a run gave up."""
    for _ in range(RUNS):
        try:
            return sample(params)
        except UserError as error:
            last = error
    raise last


def product(url):
    """The objects of a finished store by name: all but how it was made."""
    found = {name: storage.read(storage.join(url, name)) for name in ("manifest.parquet", "card.json", "samples.png")}
    for shard in storage.names(storage.join(url, "patches.zarr/pixels/c")):
        name = f"patches.zarr/pixels/c/{shard}/0/0/0"
        found[name] = storage.read(storage.join(url, name))
    return found | {"zarr.json": storage.read(storage.join(url, "patches.zarr/pixels/zarr.json"))}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


def tiles(request):
    return request.method == "GET" and request.path.endswith(".tif")


def reads(request):
    return request.method == "GET"


FAULTS = {
    "latency": (latency(0.02), tiles, {"share": 0.2}),
    "429": (status(429, {"Retry-After": "0"}), path(""), {"share": 0.1}),
    "503": (status(503), path(""), {"share": 0.1}),
    "dropped": (dropped(), reads, {"share": 0.1}),
    "truncated": (truncated(), reads, {"share": 0.1}),
    "too long": (wrong_length(100), reads, {"share": 0.1}),
    "too short": (wrong_length(-100), reads, {"share": 0.1}),
    "corrupt on the way": (corrupted(), tiles, {"share": 0.1, "times": 3}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_passes_leaves_no_trace(name, proxies, s3, home, params, undisturbed):
    fault, when, how = FAULTS[name]
    for proxy in proxies:
        proxy.inject(fault, when=when, **how)
    url = sample_in_spite(params)
    print(name, [dict(p.faults) for p in proxies])
    for proxy in proxies:
        proxy.heal()
    assert_same(product(url), undisturbed)
