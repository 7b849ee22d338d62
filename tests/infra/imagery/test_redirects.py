"""Addresses on the way to an asset: every hop is held to what the settings allow, and is written as URLs are."""

import pytest
from planetary_computer import sas
from planetary_computer.settings import Settings as TokenSettings

from infra import clusters, retries
from infra.errors import UserError
from infra.imagery import ranges, signing
from infra.imagery.cogs import RefusedAsset, Traffic, UnreadableAsset, read_scene
from infra.imagery.ranges import Ranges, is_gone, run, sendable
from infra.imagery.signing import signed
from tasks.params import SampleParams
from tasks.sample import sample_patches
from tests import archive
from tests.archive import served

CONTENT = bytes(range(256)) * 8


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.001)


@pytest.fixture
def home(tmp_path):
    (tmp_path / "a.bin").write_bytes(CONTENT)
    return tmp_path


def read(href, stop=16):
    return run(Ranges(href, Traffic()).read(0, stop))


def leads(location, status=302):
    """A server's answer: all of `/to` is elsewhere."""
    return lambda path: (status, {"Location": location}) if path.startswith("/to") else None


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_within_a_host_is_followed(home, monkeypatch, status):
    monkeypatch.setenv("RANGEGRID_ASSET_HOSTS", '["archive.example"]')
    with served(home, leads("/a.bin", status)) as server:
        assert read(f"{server.url}/to") == CONTENT[:16]
        assert server.asked == ["/to", "/a.bin"]


def test_a_refused_host_is_never_asked(home, monkeypatch):
    """Neither by an asset nor by one hop of several; an allowed one is."""
    with served(home) as other:
        elsewhere = other.url.replace("127.0.0.1", "localhost")
        with served(home, leads(f"{elsewhere}/a.bin")) as last, served(home, leads(f"{last.url}/to")) as first:
            monkeypatch.setenv("RANGEGRID_ASSET_HOSTS", '["127.0.0.1"]')
            with pytest.raises(UnreadableAsset, match="a redirect leads to localhost, where nothing may be read from"):
                read(f"{first.url}/to")
            assert other.asked == []
            assert last.asked == ["/to"]
            monkeypatch.setenv("RANGEGRID_ASSET_HOSTS", '["127.0.0.1", "local*"]')
            assert read(f"{first.url}/to") == CONTENT[:16]
            assert other.asked == ["/a.bin"]


@pytest.mark.parametrize(
    "location",
    [
        "file:///etc/hostname",
        "http://169.254.169.254/latest/meta-data",
        "http://0xA9FEA9FE/",
        "http://[::ffff:169.254.169.254]/",
        "http://metadata.google.internal/",
        "ftp://127.0.0.1/a.bin",
        "s3://bucket/key",
        "//169.254.169.254/x",
    ],
)
def test_a_redirect_to_what_nobody_may_read_is_refused(home, location):
    with served(home, leads(location)) as server:
        with pytest.raises(UnreadableAsset, match="where nothing may be read from"):
            read(f"{server.url}/to")
        assert server.asked == ["/to"]


def test_redirects_in_a_circle_end(home):
    with served(home, leads("/to")) as server:
        with pytest.raises(UnreadableAsset, match="it redirects without end"):
            read(f"{server.url}/to")
        assert len(server.asked) == ranges.HOPS + 1


def test_a_sample_whose_assets_lead_to_a_refused_host_is_refused_before_work(tmp_path, monkeypatch):
    files = archive.scene(tmp_path / "a")
    monkeypatch.setenv("RANGEGRID_COLLECTION", "s2")
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", (tmp_path / "home").as_uri())
    monkeypatch.setenv("RANGEGRID_ASSET_HOSTS", '["127.0.0.1"]')
    source = archive.listed(tmp_path, [[300, 300]])
    params = SampleParams(patches=1, places="list", source=source, patch_pixels=64, bands=archive.BANDS)
    with served(tmp_path) as other:
        elsewhere = other.url.replace("127.0.0.1", "localhost")
        with served(tmp_path, lambda path: (302, {"Location": elsewhere + path})) as server:
            made = archive.item("a", {band: f"{server.url}/a/{band}.tif" for band in files})
            monkeypatch.setenv("RANGEGRID_STAC_URL", archive.catalog(tmp_path, [made]))
            with clusters.connect("threads") as client, pytest.raises(UserError, match="leads to localhost"):
                sample_patches(client, params)
        assert other.asked == []


@pytest.fixture
def tokens(monkeypatch):
    """Sends token requests to an endpoint of the test's."""

    def at(url):
        monkeypatch.setenv("PC_SDK_SAS_URL", url)
        TokenSettings.get.cache_clear()
        sas.TOKEN_CACHE.clear()

    yield at
    TokenSettings.get.cache_clear()
    sas.TOKEN_CACHE.clear()


def test_a_token_endpoint_that_leads_to_a_refused_host_is_refused(home, tokens, monkeypatch):
    monkeypatch.setenv("RANGEGRID_ASSET_HOSTS", '["*.blob.core.windows.net"]')
    monkeypatch.setenv("PC_SDK_SUBSCRIPTION_KEY", "secret")
    with served(home) as other:
        elsewhere = other.url.replace("127.0.0.1", "localhost")
        with served(home, leads(f"{elsewhere}/token")) as server:
            tokens(f"{server.url}/to")
            with pytest.raises(UnreadableAsset, match="a redirect leads to localhost"):
                read("https://sentinel2l2a01.blob.core.windows.net/container/B02.tif")
            assert len(server.asked) == 1
        assert other.asked == []


@pytest.mark.parametrize(
    ("href", "sent"),
    [
        ("http://h/a b.tif", "http://h/a%20b.tif"),
        ("http://h/größe.tif", "http://h/gr%C3%B6%C3%9Fe.tif"),
        ("http://h/a%20b%2520c+d.tif?x=%2B&y=a+b", "http://h/a%20b%2520c+d.tif?x=%2B&y=a+b"),
        ("http://h/100%.tif", "http://h/100%25.tif"),
        ("http://[::1]:80/a'(b).tif", "http://[::1]:80/a'(b).tif"),
    ],
)
def test_what_may_not_stand_in_a_url_is_escaped_and_nothing_twice(href, sent):
    assert sendable(href) == sent


@pytest.mark.parametrize("name", ["a b", "größe", "a+b", "a%20b", "a#b", "a?b", "100%"])
def test_local_names_are_read_as_they_are_written(tmp_path, name):
    (tmp_path / name).write_bytes(CONTENT)
    assert read(f"file://{tmp_path}/{name}") == CONTENT[:16]
    assert read((tmp_path / name).as_uri()) == CONTENT[:16]


def test_403_for_a_while_is_waited_for(home):
    busy = []
    with served(home, lambda path: busy.append(path) or ((403, {}) if len(busy) < ranges.REFUSALS else None)) as server:
        assert read(f"{server.url}/a.bin") == CONTENT[:16]


def test_what_is_refused_is_gone_where_a_neighbour_is_served(tmp_path):
    files = archive.scene(tmp_path / "a")
    closed = []
    with served(tmp_path, lambda path: (403, {}) if closed or "B05" in path else None) as server:
        hrefs = {band: f"{server.url}/a/{band}.tif" for band in files}
        with pytest.raises(RefusedAsset, match=r"a/B05\.tif .*access is refused") as caught:
            read_scene(hrefs, archive.points([[300, 300]]), 64, 10)
        assert is_gone(caught.value)
        closed.append(True)
        assert not is_gone(caught.value)


PUBLIC = "s3://public-bucket/folder/grö ße/B02.tif"


@pytest.fixture
def no_keys(monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "RANGEGRID_S3_ENDPOINT", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(signing, "_regions", {})


def test_a_public_bucket_is_read_without_keys_in_its_own_region(no_keys):
    assert signed(PUBLIC) == "https://s3.us-east-1.amazonaws.com/public-bucket/folder/gr%C3%B6%20%C3%9Fe/B02.tif"
    assert signing.learn_region(PUBLIC, {"x-amz-bucket-region": "af-south-1"})
    assert not signing.learn_region(PUBLIC, {"x-amz-bucket-region": "af-south-1"})
    assert signed(PUBLIC).startswith("https://s3.af-south-1.amazonaws.com/public-bucket/")
