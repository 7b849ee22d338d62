"""Each archive has its own access, and keys of one reach no other: by servers that record what they were sent."""

import json
import re

import pytest

from infra import clusters, retries
from infra.errors import UserError
from infra.imagery import signing
from infra.imagery.assets import Access, Asset
from infra.imagery.cogs import read_windows
from infra.settings import settings
from tasks.params import SampleParams
from tasks.patches.store import open_patches
from tasks.sample import sample_patches
from tests import archive
from tests.archive import BANDS, catalog, item, listed, scene, served

PRODUCTS = ("PRODUCTKEY", "productsecret", "producttoken")
PLACE = archive.points([[300, 300]])


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(signing, "_regions", {})
    for name, value in zip(("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN"), PRODUCTS, strict=True):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("RANGEGRID_COLLECTION", "s2")
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", (tmp_path / "home").as_uri())


def in_bucket(files, bucket, endpoint, auth=None):
    """An item whose assets are in a bucket, at an endpoint that it tells in the form of the storage extension."""
    made = item(bucket, {band: f"s3://{bucket}/{band}.tif" for band in files})
    made["properties"]["storage:schemes"] = {"there": {"type": "custom-s3", "platform": endpoint, "region": "there-1"}}
    made["properties"]["auth:schemes"] = {"s3": {"type": "s3"}, "oidc": {"type": "openIdConnect"}}
    for asset in made["assets"].values():
        asset |= {"storage:refs": ["there"], "auth:refs": [auth] if auth else []}
    return made


def sample(folder, made, monkeypatch):
    monkeypatch.setenv("RANGEGRID_STAC_URL", catalog(folder, [made]))
    source = listed(folder, [[300, 300]])
    asked = SampleParams(patches=1, places="list", source=source, patch_pixels=64, bands=BANDS, max_tries=1)
    with clusters.connect("threads") as client:
        return open_patches(sample_patches(client, asked))


def test_keys_of_an_archive_reach_it_alone(tmp_path, monkeypatch):
    """Three archives and the products' endpoint in one installation; what an item tells brings no keys anywhere."""
    files = scene(tmp_path / "first")
    (tmp_path / "open").symlink_to(tmp_path / "first")
    (tmp_path / "second").symlink_to(tmp_path / "first")
    with served(tmp_path) as first, served(tmp_path) as second, served(tmp_path) as told, served(tmp_path) as products:
        (tmp_path / "archives.toml").write_text(
            f'[first]\nendpoint = "{first.url}"\nregion = "one-1"\n'
            'access_key = "FIRSTKEY"\nsecret_key = "firstsecret"\n'
            f'["sec*"]\nendpoint = "{second.url}/"\naccess_key = "SECONDKEY"\nsecret_key = "secondsecret"\n'
            "requester_pays = true\n"
        )
        monkeypatch.setenv("RANGEGRID_ARCHIVES", str(tmp_path / "archives.toml"))
        monkeypatch.setenv("RANGEGRID_S3_ENDPOINT", products.url)
        for bucket in ("first", "second", "open"):
            monkeypatch.setenv("RANGEGRID_STORAGE_URL", (tmp_path / "home" / bucket).as_uri())
            patches = sample(tmp_path, in_bucket(files, bucket, told.url, "s3"), monkeypatch)
            assert patches.manifest["href"].tolist() == [f"s3://{bucket}/B02.tif"]
    assert products.sent == []
    assert all("X-Amz-Credential=FIRSTKEY%2F" in sent and "%2Fone-1%2Fs3" in sent for sent in first.sent)
    assert all("X-Amz-Credential=SECONDKEY%2F" in sent for sent in second.sent)
    assert all("x-amz-request-payer=requester" in sent for sent in second.sent)
    assert all(path.startswith("/open/") and "?" not in path for path in told.asked)
    strange = {first: "secondkey", second: "firstkey", told: "firstkey|secondkey|authorization|signature"}
    for server, others in strange.items():
        assert server.sent
        assert not re.search(f"productkey|producttoken|secret|{others}", " ".join(server.sent).lower())


def test_what_was_stored_holds_no_key(tmp_path, monkeypatch):
    files = scene(tmp_path / "first")
    with served(tmp_path) as first:
        keys = {"endpoint": first.url, "access_key": "FIRSTKEY", "secret_key": "firstsecret"}
        monkeypatch.setenv("RANGEGRID_ARCHIVES", json.dumps({"first": keys}))
        sample(tmp_path, in_bucket(files, "first", first.url), monkeypatch)
    stored = [path.read_bytes() for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert stored
    assert not any(re.search(rb"FIRSTKEY|firstsecret|X-Amz", data) for data in stored)
    assert "firstsecret" not in repr(settings())


@pytest.mark.parametrize(
    ("archives", "asked"),
    [
        ({}, "s3://open/B02.tif"),
        ({"mirror.example": {"unsigned": True}}, "https://mirror.example/B02.tif"),
    ],
)
def test_of_several_ways_the_one_that_we_have_access_to_is_taken(tmp_path, monkeypatch, archives, asked):
    """CDSE tells S3, which needs keys, and HTTPS, which needs an account; settings go before both."""
    from infra.stac.catalogs import Catalog, search

    made = in_bucket(("B02", "SCL"), "open", "https://endpoint.example", "s3")
    for asset in made["assets"].values():
        other = {"href": "https://mirror.example/" + asset["href"][len("s3://open/") :], "auth:refs": ["oidc"]}
        asset["alternate"] = {"https": other | {"storage:refs": []}}
    monkeypatch.setenv("RANGEGRID_ARCHIVES", json.dumps(archives))
    (found,) = search(Catalog(catalog(tmp_path, [made]), "s2"), "2021", PLACE, 100)
    assert found.assets["blue"].href == asked


def test_version_1_of_the_storage_extension_tells_region_and_who_pays(tmp_path, monkeypatch):
    """With keys of AWS in the settings: presigned in the region told, with the consent to pay of the settings."""
    for name in ("RANGEGRID_S3_ENDPOINT", "AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):  # of the sandbox
        monkeypatch.delenv(name, raising=False)
    asset = Asset("s3://sentinel-s2-l2a/B02.jp2", access=Access(region="eu-central-1", requester_pays=True))
    url = signing.signed(asset)
    assert url.startswith("https://s3.eu-central-1.amazonaws.com/sentinel-s2-l2a/B02.jp2?")
    assert "PRODUCTKEY" in url
    assert "request-payer" not in url
    monkeypatch.setenv("RANGEGRID_ARCHIVES", '{"sentinel-s2-*": {"requester_pays": true}}')
    url = signing.signed(asset)
    assert url.startswith("https://s3.eu-central-1.amazonaws.com/sentinel-s2-l2a/B02.jp2?")
    assert "PRODUCTKEY" in url
    assert "x-amz-request-payer=requester" in url


def test_an_account_of_azure_is_not_planetary_computers(monkeypatch):
    """Its hrefs are read as they come, or with the token of the settings; no token is asked for."""
    monkeypatch.setenv("PC_SDK_SAS_URL", "http://127.0.0.1:9/no")
    own = "https://mine.blob.core.windows.net/container/B02.tif"
    assert signing.signed(own) == own
    assert signing.signed(f"{own}?sv=1&sig=a%2Bb") == f"{own}?sv=1&sig=a%2Bb"
    monkeypatch.setenv("RANGEGRID_ARCHIVES", '{"mine.blob.*": {"sas_token": "?sv=2&sig=c%2Bd"}}')
    assert signing.signed(own) == f"{own}?sv=2&sig=c%2Bd"


def test_hosts_of_the_settings_are_presigned(tmp_path, monkeypatch):
    archive.write(tmp_path / "bucket/a b/B02.tif", archive.columns("B02"), 10)
    with served(tmp_path) as server:
        monkeypatch.setenv("RANGEGRID_ARCHIVES", '{"127.0.0.1": {"access_key": "KEY", "secret_key": "hidden"}}')
        read_windows(f"{server.url}/bucket/a%20b/B02.tif", PLACE, 64, 10)
    assert all(path.startswith("/bucket/a%20b/B02.tif?X-Amz-") and "=KEY%2F" in path for path in server.asked)


@pytest.mark.parametrize(
    ("archives", "said"),
    [
        ("nowhere.toml", "RANGEGRID_ARCHIVES is set: FileNotFoundError: give JSON, or the path of a TOML file"),
        ('{"a": ', "RANGEGRID_ARCHIVES is set: JSONDecodeError"),
        ('{"a": {"acces_key": "hidden"}}', "RANGEGRID_ARCHIVES.A.ACCES_KEY is set: Extra inputs are not permitted"),
        ('{"a": {"access_key": "b"}}', "give both, access_key and secret_key"),
        ('{"a": {"secret_key": "hidden"}}', "give both, access_key and secret_key"),
        ('{"a": {"endpoint": "host:1"}}', "give the endpoint with its scheme"),
    ],
)
def test_bad_settings_are_refused_without_their_secrets(monkeypatch, archives, said):
    monkeypatch.setenv("RANGEGRID_ARCHIVES", archives)
    with pytest.raises(UserError) as caught:
        settings()
    assert said in str(caught.value)
    assert "hidden" not in str(caught.value)


def test_keys_without_an_endpoint_do_not_go_where_an_item_says(monkeypatch):
    monkeypatch.setenv("RANGEGRID_ARCHIVES", '{"eodata": {"access_key": "KEY", "secret_key": "hidden"}}')
    told = Access(endpoint="https://elsewhere.example")
    with pytest.raises(UserError, match=r"keys for eodata without an endpoint, and the item's is https://elsewhere"):
        signing.signed(Asset("s3://eodata/B02.jp2", access=told))
    monkeypatch.setenv("RANGEGRID_ARCHIVES", '{"else*": {"access_key": "KEY", "secret_key": "hidden"}}')
    assert signing.signed(Asset("s3://eodata/B02.jp2", access=told)).startswith("https://elsewhere.example/eodata/B02")
