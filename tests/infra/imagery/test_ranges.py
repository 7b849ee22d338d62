"""Reading through faults: a proxy before the real S3 server, and pixels equal to those read in peace."""

import json
import logging
import os
import time
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import rasterio
from hypothesis import given
from hypothesis import strategies as st
from planetary_computer import sas
from planetary_computer.settings import Settings
from pyproj import Transformer
from rasterio.transform import from_origin

from infra import retries, storage
from infra.errors import UserError
from infra.imagery import ranges, signing
from infra.imagery.cogs import Traffic, UnavailableAsset, UnreadableAsset, read_scene
from infra.imagery.signing import signed
from tests.proxy import Proxy, corrupted, dropped, latency, named, path, status, truncated, wrong_length

BUCKET, FOLDER = "rangegrid", "reading/scene"
ASSETS = {"B02": 10, "B05": 20, "B01": 60, "SCL": 20}
GEO_KEYS = (34735).to_bytes(2, "little")  # the tag that names the projection
EPSG, LEFT, TOP, SIDE_M = 32631, 399_960, 5_500_020, 14_400


@pytest.fixture(scope="module")
def places():
    x, y = np.random.default_rng(0).uniform(1_500, SIDE_M - 1_500, (2, 5))
    return np.column_stack(Transformer.from_crs(EPSG, 4326, always_xy=True).transform(LEFT + x, TOP - y))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A scene on disk, in the archive's manner but smaller: path by asset."""
    folder, rng = tmp_path_factory.mktemp("scene"), np.random.default_rng(0)
    made = {}
    for name, size in ASSETS.items():
        side = SIDE_M // size
        data = rng.integers(1, 12 if name == "SCL" else 4_000, (side, side)).astype(
            "uint8" if name == "SCL" else "uint16"
        )
        profile = {"driver": "COG", "dtype": data.dtype, "count": 1, "height": side, "width": side, "crs": EPSG}
        options = {"compress": "deflate", "predictor": "yes", "blocksize": 128, "nodata": 0}
        made[name] = str(folder / f"{name}.tif")
        with rasterio.open(
            made[name], "w", transform=from_origin(LEFT, TOP, size, size), **profile, **options
        ) as target:
            target.write(data, 1)
    return made


@pytest.fixture(scope="module")
def peace(files, places):
    """What rasterio reads from disk: nearest, on the 10 m grid."""
    x, y = Transformer.from_crs(4326, EPSG, always_xy=True).transform(places[:, 0], places[:, 1])
    found = {}
    for name, size in ASSETS.items():
        with rasterio.open(files[name]) as source:
            fine = source.read(1).repeat(size // 10, axis=0).repeat(size // 10, axis=1)
        corners = np.rint(np.column_stack([TOP - y, x - LEFT]) / 10 - 64).astype(int)
        found[name] = [fine[row : row + 128, column : column + 128] for row, column in corners]
    return found


@pytest.fixture(scope="module")
def hrefs(sandbox, files):
    """The scene in S3."""
    for name, file in files.items():
        storage.write(f"s3://{BUCKET}/{FOLDER}/{name}.tif", Path(file).read_bytes())
    return {name: f"s3://{BUCKET}/{FOLDER}/{name}.tif" for name in files}


@pytest.fixture
def proxy(sandbox, monkeypatch):
    """Before the real S3 server; it checks the signatures made for the proxy's address."""
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.001)
    with Proxy(sandbox.endpoint) as running:
        monkeypatch.setenv("RANGEGRID_S3_ENDPOINT", running.url)
        yield running


def assert_peace(found, peace):
    for name, windows in peace.items():
        np.testing.assert_array_equal(np.stack(found[name]), np.stack(windows))


def header(request):
    return request.headers.get("range", "").startswith("bytes=0-")


def tile(request):
    return request.method == "GET" and not header(request)


def assert_clean(error):
    """One sentence, and no trace of a URL in it or behind it."""
    assert error.__cause__ is None
    assert error.__context__ is None
    assert not any(sign in repr(error) for sign in ("?", "http:", "Signature", "sig="))


def test_what_is_read_is_counted(proxy, hrefs, places, peace):
    traffic = Traffic()
    assert_peace(read_scene(hrefs, places, 128, 10, traffic), peace)
    assert traffic.requests == sum(proxy.requests.values())
    assert traffic.bytes == proxy.sent
    assert traffic.requests < len(ASSETS) * (1 + 4 * len(places))


PASSING = {
    "latency": latency(0.02),
    "403": status(403),
    "429": status(429),
    "500": status(500),
    "502": status(502),
    "503": status(503, {"Retry-After": "0"}),
    "dropped": dropped(),
    "truncated": truncated(),
    "short": truncated(honest=True),
    "too short": wrong_length(-7),
    "too long": wrong_length(7),
    "corrupted": corrupted(0),
}


@pytest.mark.parametrize("which", [header, tile])
@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_leaves_no_trace(proxy, hrefs, places, peace, fault, which):
    proxy.inject(PASSING[fault], when=which, times=2)
    assert_peace(read_scene(hrefs, places, 128, 10), peace)
    assert sum(proxy.faults.values()) == 2


def test_a_header_that_lost_its_projection_on_the_way_is_read_again(proxy, hrefs, places, peace):
    def without_projection(request, ask):
        reply = ask()
        return replace(reply, body=reply.body.replace(GEO_KEYS, b"\0\0"))

    proxy.inject(named("no projection", without_projection), when=header, times=2)
    assert_peace(read_scene(hrefs, places, 128, 10), peace)
    assert proxy.faults["no projection"] == 2


def test_all_faults_together(proxy, hrefs, places, peace):
    for seed, fault in enumerate(PASSING.values()):
        proxy.inject(fault, share=0.03, seed=seed)
    traffic = Traffic()
    for _ in range(3):
        assert_peace(read_scene(hrefs, places, 128, 10, traffic), peace)
    assert len(proxy.faults) >= 5
    assert traffic.requests == sum(proxy.requests.values())


def test_the_server_says_how_long_to_wait(proxy, hrefs, places, peace):
    asked = []
    proxy.inject(
        status(429, {"Retry-After": "1"}), times=1, when=lambda request: asked.append(time.monotonic()) or True
    )
    assert_peace({"B02": read_scene({"B02": hrefs["B02"]}, places, 128, 10)["B02"]}, {"B02": peace["B02"]})
    assert asked[1] - asked[0] >= 1


FOREVER = {
    "403": (status(403), UnavailableAsset, "access is refused"),
    "429": (status(429), UnavailableAsset, "HTTP 429"),
    "503": (status(503), UnavailableAsset, "HTTP 503"),
    "400": (status(400), UnavailableAsset, "HTTP 400"),
    "dropped": (dropped(), UnavailableAsset, "ServerDisconnectedError"),
    "truncated": (truncated(), UnavailableAsset, "ClientPayloadError"),
    "short": (truncated(honest=True), UnavailableAsset, r"\d+ bytes came for \d+"),
    "too short": (wrong_length(-7), UnavailableAsset, ""),
    "no ranges": (status(200), UnavailableAsset, "knows no byte ranges"),
    "404": (status(404), UnreadableAsset, "HTTP 404"),
    "410": (status(410), UnreadableAsset, "HTTP 410"),
    "corrupted": (corrupted(0), UnreadableAsset, "its bytes are corrupt"),
}


@pytest.mark.parametrize("which", [header, tile])
@pytest.mark.parametrize("fault", FOREVER)
def test_a_fault_that_stays_is_one_sentence(proxy, hrefs, places, fault, which):
    injected, error, message = FOREVER[fault]
    proxy.inject(injected, when=lambda request: which(request) and path("B05.tif")(request))
    with pytest.raises(error, match=rf"the asset scene/B05\.tif cannot be .*{message}") as caught:
        read_scene(hrefs, places, 128, 10)
    assert_clean(caught.value)


def test_a_server_that_is_down_is_unavailable_and_up_again_is_read(proxy, hrefs, places, peace):
    assert_peace(read_scene(hrefs, places, 128, 10), peace)
    proxy.stop()
    with pytest.raises(UnavailableAsset, match="check that its server is up") as caught:
        read_scene(hrefs, places, 128, 10)
    assert_clean(caught.value)
    proxy.start()
    assert_peace(read_scene(hrefs, places, 128, 10), peace)


def test_a_missing_object_is_unreadable(proxy, hrefs, places):
    with pytest.raises(UnreadableAsset, match=r"scene/B03\.tif cannot be read \(HTTP 404\)"):
        read_scene(hrefs | {"B03": f"s3://{BUCKET}/{FOLDER}/B03.tif"}, places, 128, 10)


def test_a_wrong_key_is_unavailable(proxy, hrefs, places, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UnavailableAsset, match="access is refused") as caught:
        read_scene(hrefs, places, 128, 10)
    assert_clean(caught.value)


def test_the_keys_of_an_archive_open_it(proxy, hrefs, places, peace, monkeypatch, nobody):
    """A real S3 server checks what is signed; products have another endpoint, other keys and a session token."""
    sandbox = {name: os.environ[f"AWS_{name.upper()}"] for name in ("access_key_id", "secret_access_key")}
    keys = {"access_key": sandbox["access_key_id"], "secret_key": sandbox["secret_access_key"]}
    monkeypatch.setenv("RANGEGRID_S3_ENDPOINT", f"http://{nobody}")
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN"):
        monkeypatch.setenv(f"AWS_{name}", "of-products")
    monkeypatch.setenv(
        "RANGEGRID_ARCHIVES", json.dumps({BUCKET: {"endpoint": proxy.url, "region": "us-east-1"} | keys})
    )
    assert_peace(read_scene(hrefs, places, 128, 10), peace)


@pytest.fixture
def blobs(sandbox, hrefs, monkeypatch, caplog):
    """The same objects as Planetary Computer serves them: a blob host, reached through the proxy, that wants tokens."""
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.001)
    caplog.set_level(logging.DEBUG)
    with Proxy(f"http://127.0.0.1:{sandbox.ports['s3'][2]}") as running:  # the filer asks for no signature of S3's
        running.require_tokens()
        monkeypatch.setenv("http_proxy", running.url)
        monkeypatch.setenv("PC_SDK_SAS_URL", running.sas_url)
        Settings.get.cache_clear()
        sas.TOKEN_CACHE.clear()
        yield running
        Settings.get.cache_clear()
        sas.TOKEN_CACHE.clear()


@pytest.fixture
def blob_hrefs(hrefs):
    return {name: f"http://sentinel2l2a01.blob.core.windows.net/buckets/{BUCKET}/{FOLDER}/{name}.tif" for name in hrefs}


def test_blobs_are_signed_once(blobs, blob_hrefs, places, peace, caplog):
    assert_peace(read_scene(blob_hrefs, places, 128, 10), peace)
    assert len(blobs.tokens) == 1
    assert not any(token in caplog.text for token in blobs.tokens)


def test_a_token_that_expires_under_way_is_renewed(blobs, blob_hrefs, places, peace, caplog):
    def expire(request, ask):
        seen.extend(blobs.tokens)
        blobs.expire_tokens()
        return ask()

    seen = []
    blobs.inject(expire, when=tile, skip=2, times=1)
    assert_peace(read_scene(blob_hrefs, places, 128, 10), peace)
    assert blobs.faults["token refused"] >= 1
    assert len(blobs.tokens) == 1
    assert not any(token in caplog.text for token in [*seen, *blobs.tokens])


def test_tokens_that_are_all_refused_end_as_unavailable(blobs, blob_hrefs, places, caplog):
    blobs.inject(lambda request, ask: blobs.expire_tokens() or ask(), when=path(".tif"))
    with pytest.raises(UnavailableAsset, match=r"scene/B02\.tif cannot be had now \(access is refused\)") as caught:
        read_scene({"B02": blob_hrefs["B02"]}, places, 128, 10)
    assert_clean(caught.value)
    assert blobs.requests["GET", "/proxy/sas/sentinel2l2a01/buckets"] == ranges.REFUSALS


def test_a_token_endpoint_that_fails_is_unavailable(blobs, blob_hrefs, places):
    blobs.inject(status(403), when=path("/sas/"))
    with pytest.raises(UnavailableAsset, match="HTTPError") as caught:
        read_scene({"B02": blob_hrefs["B02"]}, places, 128, 10)
    assert_clean(caught.value)


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 10**5)), max_size=20))
def test_merged_ranges_cover_all_and_lie_apart(pairs):
    wanted = [(start, start + length) for start, length in pairs]
    found = ranges.merged(wanted)
    assert all(any(a <= start and stop <= b for a, b in found) for start, stop in wanted)
    assert all(second[0] - first[1] > ranges.GAP for first, second in pairwise(found))
    assert {edge for span in found for edge in span} <= {edge for span in wanted for edge in span}


@given(st.lists(st.tuples(st.integers(0, 2_500), st.integers(0, 255)), min_size=1, max_size=8))
def test_no_header_brings_the_reader_down(tmp_path_factory, files, places, changes):
    content = bytearray(Path(files["B05"]).read_bytes())
    for at, byte in changes:
        content[at] = byte
    target = tmp_path_factory.mktemp("corrupt") / "B05.tif"
    target.write_bytes(content)
    with suppress(UserError):
        assert len(read_scene({"B05": str(target)}, places, 128, 10)["B05"]) == len(places)


def test_an_endpoint_of_ones_own_is_asked_for_its_own_buckets_alone(sandbox, monkeypatch):
    public = "s3://public-bucket/folder/B02.tif"
    monkeypatch.setattr(signing, "_regions", {})
    assert signed("s3://rangegrid/x.tif").startswith(sandbox.endpoint)
    assert signed(public).startswith("https://s3.us-east-1.amazonaws.com/public-bucket/")
    assert "Signature" not in signed(public)
