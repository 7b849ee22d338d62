"""What a run shows of where its products are: addresses that a browser opens, else lines that Python runs."""

import json
from contextlib import contextmanager
from urllib.request import urlopen

import pandas as pd
import pytest
import s3fs

from infra import storage
from tasks.artifacts import opening, web_address

URL = "s3://rangegrid/artifacts/open/index.html"


@contextmanager
def readable(sandbox, prefix):
    """Everybody may read what is under a prefix of the products' bucket, as long as the block runs."""
    keys = dict(zip(("key", "secret"), sandbox.keys, strict=True))
    client = s3fs.S3FileSystem(**keys, endpoint_url=sandbox.endpoint, skip_instance_cache=True)
    statement = {"Effect": "Allow", "Principal": "*", "Action": ["s3:GetObject"]}
    policy = {"Statement": [statement | {"Resource": [f"arn:aws:s3:::rangegrid/{prefix}/*"]}]}
    before = client.call_s3("get_bucket_policy", Bucket="rangegrid")["Policy"]
    client.call_s3("put_bucket_policy", Bucket="rangegrid", Policy=json.dumps({"Version": "2012-10-17"} | policy))
    try:
        yield
    finally:
        client.call_s3("put_bucket_policy", Bucket="rangegrid", Policy=before)


def test_an_address_is_given_where_a_browser_may_read_without_keys(sandbox):
    storage.write(URL, b"<!doctype html>a grid")
    assert web_address(URL) is None
    with readable(sandbox, "artifacts/open"):
        address = web_address(URL)
        assert address == URL.replace("s3://", f"{sandbox.endpoint}/")
        with urlopen(address) as answer:
            assert answer.read() == b"<!doctype html>a grid"
            assert answer.headers.get_content_type() == "text/html"  # else a browser would save it
        assert web_address(URL.replace("open", "closed")) is None
    assert web_address(URL) is None


def test_no_address_is_given_of_a_file_or_where_nothing_answers(sandbox, tmp_path, monkeypatch, nobody):
    assert web_address(tmp_path.as_uri()) is None
    monkeypatch.setenv("RANGEGRID_S3_ENDPOINT", f"http://{nobody}")
    assert web_address(URL) is None


@pytest.mark.parametrize("home", ["s3", "file"])
def test_the_lines_open_what_they_name(sandbox, tmp_path, home):
    url = "s3://rangegrid/artifacts/scores.csv" if home == "s3" else (tmp_path / "scores.csv").as_uri()
    table = pd.DataFrame({"embedder": ["RANGE+"], "blocked": [0.5]})
    storage.write(url, table.to_csv(index=False).encode())
    found = {}
    exec(opening("pandas as pd", "scores = pd.read_csv", url), found)
    pd.testing.assert_frame_equal(found["scores"], table)
