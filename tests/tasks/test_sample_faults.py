"""Sampling under faults: whatever happens on the way, the finished store is byte for byte an undisturbed run's."""

import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL

from infra import clusters, retries, storage
from infra.errors import UserError, may_pass
from infra.sandbox import servers
from tasks.params import SampleParams
from tasks.patches import store
from tasks.patches.store import open_patches
from tasks.sample import sample_patches
from tests.proxy import Proxy, corrupted, dropped, latency, named, path, status, truncated, wrong_length

POINTS = 48  # in the list, all screened in one round
RUNS = 4  # at most: what stays broken after a rerun or two is a fault of ours


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    """A small sample of a list of points in France and Germany: 24 patches in three shards."""
    points = tmp_path_factory.mktemp("points") / "points.csv"
    rng = np.random.default_rng(0)
    pd.DataFrame({"lon": rng.uniform(2, 10, POINTS), "lat": rng.uniform(46, 51, POINTS)}).to_csv(points, index=False)
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
def stac(proxies):
    """The proxy before the catalog, without faults at the start."""
    yield reset(proxies[0])
    proxies[0].heal()


@pytest.fixture
def s3(proxies):
    """The proxy before S3, without faults at the start."""
    yield reset(proxies[1])
    proxies[1].heal()


def reset(proxy):
    proxy.heal()
    proxy.faults.clear()
    return proxy


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


@pytest.fixture(scope="module")
def clear(undisturbed, params):
    """Every clear place of the list, in its order."""
    found = json.loads(undisturbed["card.json"])["tried"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANGEGRID_STORAGE_URL", "s3://rangegrid/undisturbed")
        url = sample(params)
    assert found == POINTS
    names = storage.names(storage.join(url, "screen/0"))
    cells = [int(name.partition(".")[0]) for name in names]
    screened = pd.concat(store.read_parts(url, "screen", 0, cells, ["row_id", "item_id", "reason"]))
    return screened[screened["reason"] == ""].sort_values("row_id", ignore_index=True)


def manifest(objects):
    return gpd.read_parquet(io.BytesIO(objects["manifest.parquet"]))


def sample(params):
    with clusters.connect("threads") as client:
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


def behind_header(request):
    """Only tiles carry checksums; the header's protection on the way is TLS."""
    return tiles(request) and not request.headers.get("range", "").startswith("bytes=0-")


def reads(request):
    return request.method == "GET"


def searches(request):
    return request.path.endswith("/search")


FAULTS = {
    "latency": (latency(0.02), tiles, {"share": 0.2}),
    "429": (status(429, {"Retry-After": "0"}), path(""), {"share": 0.1}),
    "503": (status(503), path(""), {"share": 0.1}),
    "dropped": (dropped(), reads, {"share": 0.1}),
    "truncated": (truncated(), reads, {"share": 0.1}),
    "too long": (wrong_length(100), reads, {"share": 0.1}),
    "too short": (wrong_length(-100), reads, {"share": 0.1}),
    "a tile corrupt on the way": (
        corrupted(),
        behind_header,
        {"share": 0.6, "times": 2},
    ),  # 3 of one asset: corrupt for good
}
ALIKE = {"503", "truncated", "too long"}  # others of which are as these


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.further if name in ALIKE else ()) for name in FAULTS]
)
def test_what_passes_leaves_no_trace(name, stac, s3, home, params, undisturbed):
    fault, when, how = FAULTS[name]
    s3.inject(fault, when=when, **how)
    stac.inject(fault, when=searches, times=1)
    assert_same(product(sample_in_spite(params)), undisturbed)
    assert s3.faults.total() >= 2
    assert stac.faults.total() == 1


GONE = {"gone": status(404), "corrupt": corrupted()}


@pytest.mark.parametrize("name", GONE)
def test_only_the_patches_of_a_lost_item_are_read_elsewhere(name, s3, home, params, undisturbed, clear):
    """From the next scene of their places, or else at the next places of the stream that are clear."""
    before = manifest(undisturbed)
    lost = before["item_id"].value_counts().index[0]
    s3.inject(GONE[name], when=lambda r: tiles(r) and lost in r.path and "SCL" not in r.path)
    url = sample(params)
    after, same = manifest(product(url)), before["item_id"] != lost
    pd.testing.assert_frame_equal(after[same], before[same])
    assert (after["item_id"] != lost).all()
    there = set(before.loc[~same, "row_id"]) & set(after["row_id"])
    assert there, "no place of the lost item has another scene"
    after_them = clear.loc[(clear["row_id"] > before["row_id"].max()) & (clear["item_id"] != lost), "row_id"]
    assert set(after["row_id"]) - set(before["row_id"]) <= set(after_them)
    s3.heal()
    patches = open_patches(url)
    assert (patches.pixels(slice(None)).reshape(len(after), -1).min(1) > 0).all()
    for row in after[after["row_id"].isin(there)].itertuples():
        assert row.sha256 != before.set_index("row_id").loc[row.row_id, "sha256"]
        assert row.item_id in row.href
    assert storage.size(storage.join(url, "held")) == 0


def test_an_item_that_is_refused_while_others_are_served_is_gone(s3, home, params, undisturbed):
    """As S3 answers for what is not there where it may not be listed; another scene serves, and a rerun ends."""
    before = manifest(undisturbed)
    lost = before["item_id"].iloc[0]
    s3.inject(status(403), when=lambda r: tiles(r) and lost in r.path and "SCL" not in r.path)
    after = manifest(product(sample(params)))
    same = before["item_id"] != lost
    pd.testing.assert_frame_equal(after[same], before[same])
    assert (after["item_id"] != lost).all()


def test_where_all_is_refused_the_run_stops_and_goes_on_later(s3, home, params, undisturbed, monkeypatch):
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.001)
    s3.inject(status(403), when=tiles, skip=20)  # the bands are known by then
    with pytest.raises(UserError, match=r"had now .access is refused.* run again, and only the rest is done") as caught:
        sample(params)
    assert may_pass(caught.value)
    s3.heal()
    assert_same(product(sample(params)), undisturbed)


@pytest.mark.faults
def test_two_runs_at_once_do_no_harm(s3, home, params, undisturbed):
    program = [sys.executable, "-c", RUN, params.model_dump_json()]
    runs = [subprocess.Popen(program, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    first, second = (run.communicate()[0].strip() for run in runs)
    assert first == second
    assert_same(product(first), undisturbed)


RUN = """
import sys
from infra import clusters
from tasks.params import SampleParams
from tasks.sample import sample_patches
with clusters.connect("threads") as client:
    print(sample_patches(client, SampleParams.model_validate_json(sys.argv[1])))
"""


def stored(request):
    return request.method == "PUT" and "/pixels/c/" in request.path


@pytest.mark.faults
def test_a_killed_worker_costs_its_unit_alone(s3, home, params, cluster, undisturbed):
    """One of two worker processes is killed (kill -9) when the first shard arrives, while both are at work."""
    with clusters.connect(cluster) as client:
        client.wait_for_workers(2)
        killed, _ = client.run(os.getpid).values()
        s3.inject(once_more(lambda: os.kill(killed, signal.SIGKILL)), when=stored, times=1)
        assert_same(product(sample_patches(client, params)), undisturbed)
        assert s3.faults["act"] == 1


def once_more(act):
    """A fault that does something, and lets the request through."""
    return named("act", lambda request, ask: (act(), ask())[1])


@pytest.fixture
def blobs(sandbox, proxies, monkeypatch):
    """The imagery as Planetary Computer serves it: a host that wants tokens, which end under way.

    The catalog's hrefs lead there, and carry a signature of the catalog's own. `blobs.shown` has every signature.
    """
    filer = f"http://{servers.HOST}:{sandbox.ports['s3'][2]}"  # asks for no signature of S3's
    with Proxy(filer) as running:
        running.require_tokens()
        running.shown, issue = ["of-the-catalog"], running.issue
        running.issue = lambda: running.shown.append((token := issue())["token"].rpartition("sig=")[2]) or token
        monkeypatch.setenv("http_proxy", running.url)
        monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
        monkeypatch.setenv("PC_SDK_SAS_URL", running.sas_url)
        monkeypatch.setenv("PREFECT_LOGGING_LEVEL", "DEBUG")
        proxies[0].inject(as_blobs, when=searches)
        yield running
        proxies[0].heal()


def as_blobs(request, ask):
    body = (reply := ask()).body.replace(b"s3://", b"http://sentinel2l2a01.blob.core.windows.net/buckets/")
    return replace(reply, body=body.replace(b'.tif"', b'.tif?sig=of-the-catalog"'))


@pytest.mark.faults
def test_a_killed_flow_goes_on_with_new_tokens_and_shows_none(blobs, s3, home, params, prefect, undisturbed, tmp_path):
    """`rangegrid sample`, its tokens ended after some tiles, killed (kill -9) at its first shard, and run again."""
    options = [f"--{name.replace('_', '-')}={option(value)}" for name, value in params.model_dump().items()]
    command = [Path(sys.executable).with_name("rangegrid"), "sample", *options]
    environment = os.environ | {"PREFECT_API_URL": PREFECT_API_URL.value()}
    blobs.inject(once_more(blobs.expire_tokens), when=tiles, skip=6, times=1)
    with (tmp_path / "shown").open("w+") as shown:
        run = subprocess.Popen(command, stdout=shown, stderr=shown, env=environment, cwd=tmp_path)
        s3.inject(once_more(run.kill), when=stored, times=1)
        assert run.wait() == -signal.SIGKILL
        again = subprocess.run(command, stdout=subprocess.PIPE, stderr=shown, env=environment, cwd=tmp_path, text=True)
        shown.seek(0)
        texts = [shown.read(), again.stdout, *recorded()]
    assert again.returncode == 0, texts[0]
    assert blobs.faults["token refused"] >= 1
    assert len(blobs.shown) >= 3
    found, url = product(again.stdout.strip()), again.stdout.strip()
    assert {n: v for n, v in found.items() if "zarr" in n} == {n: v for n, v in undisturbed.items() if "zarr" in n}
    assert manifest(found)["href"].str.startswith("http://sentinel2l2a01.blob.core.windows.net/").all()
    pd.testing.assert_series_equal(manifest(found)["sha256"], manifest(undisturbed)["sha256"])
    texts += [storage.read(name).decode("latin1") for name in objects(url)]
    texts += [read_part.to_csv() for read_part in parts(url)]
    assert not [signature for signature in blobs.shown for text in texts if signature in text]


def option(value):
    return json.dumps(value) if isinstance(value, tuple) or value is None else value


def recorded():
    """What Prefect keeps: its logs and artifacts."""
    with get_client(sync_client=True) as client:
        logs, artifacts = client.read_logs(), client.read_artifacts()
    assert any(log.name == "prefect.flow_runs" for log in logs)
    assert {"sample-map", "sample-run"} <= {artifact.key for artifact in artifacts}
    return [log.message for log in logs] + [str(artifact.data) for artifact in artifacts]


def objects(url):
    """Every object of a store."""
    return [storage.join(url, meta["path"].partition(f"{url.rpartition('/')[2]}/")[2]) for meta in storage._list(url)]


def parts(url):
    """Every table of a store: Parquet compresses what it holds."""
    names = [name for name in objects(url) if name.endswith(".parquet")]
    return [pd.read_parquet(io.BytesIO(storage.read(name))) for name in names]
