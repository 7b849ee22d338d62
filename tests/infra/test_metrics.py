"""Counters: what a worker did is what its /metrics says."""

import re
import urllib.request

import pytest

from infra import clusters, metrics, storage
from infra.imagery.cogs import Traffic
from infra.imagery.ranges import Ranges, run
from tests.proxy import Proxy, status, truncated


def served(worker):
    """The counters that a worker of this process serves, by name and label."""
    with urllib.request.urlopen(f"http://127.0.0.1:{worker.http_server.port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, value in (re.fullmatch(r"(.+) (\S+)", x).groups() for x in lines if ours(x))}


def ours(line):
    return line.startswith("rangegrid_") and "_created" not in line


@pytest.fixture
def worker(tmp_path, monkeypatch):
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", tmp_path.as_uri())
    with clusters.connect("threads", 1) as client:
        yield client.cluster.workers[0]


def test_verdicts_are_served_beside_dasks_own_numbers(worker):
    before = served(worker)
    metrics.count(metrics.PATCHES, ["", "nodata", ""])
    after = served(worker)
    gained = {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}
    assert gained == {'rangegrid_patches_total{verdict="good"}': 2, 'rangegrid_patches_total{verdict="nodata"}': 1}


def test_retries_are_counted_by_cause(worker, sandbox):
    storage.write("s3://rangegrid/metrics/asset", bytes(1000))
    before = served(worker)
    with Proxy(sandbox.endpoint) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANGEGRID_S3_ENDPOINT", proxy.url)
        run(
            Ranges("s3://rangegrid/metrics/asset", Traffic()).read(0, 1)
        )  # the endpoint has told that the bucket is its
        proxy.inject(status(503), times=2)
        proxy.inject(truncated(honest=True), skip=2, times=1)
        assert run(Ranges("s3://rangegrid/metrics/asset", Traffic()).read(0, 1000)) == bytes(1000)
    after = served(worker)
    causes = {name.split('"')[1]: after[name] - before.get(name, 0) for name in after if "retries_total{" in name}
    assert {cause: n for cause, n in causes.items() if n} == {"HTTP 503": 2, "a short body": 1}
