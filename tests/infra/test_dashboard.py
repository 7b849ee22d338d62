"""The Grafana dashboard: what it asks for is what the real endpoints serve, and Prometheus answers it."""

import json
import re
import shutil
import time
import urllib.parse
import urllib.request
from pathlib import Path

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from infra import clusters, metrics
from infra.sandbox import servers

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "infra/grafana/rangegrid.json").read_text())
PANELS = {panel["title"]: [target["expr"] for target in panel["targets"]] for panel in DASHBOARD["panels"]}
CONFIG = re.search(r"```yaml\n# prometheus.yml\n(.*?)```", (ROOT / "docs/operations.md").read_text(), re.DOTALL)[1]
PATIENCE = 60  # seconds


def count():
    """One of everything that workers count."""
    metrics.count(metrics.PATCHES, ["", "nodata"])
    metrics.count(metrics.PLACES, ["", "clouds"])
    metrics.count_retry(metrics.Cause.HTTP_503)
    metrics.BYTES.inc(1000)
    metrics.CELLS.inc(10)


@pytest.fixture
def served(tmp_path, monkeypatch):
    """host:port of the scheduler and of a worker that has counted something and has a task."""
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", tmp_path.as_uri())
    with clusters.connect("threads", 1) as client:
        held = client.submit(count)
        held.result()
        (worker,) = client.cluster.workers.values()
        yield [f"{servers.HOST}:{node.http_server.port}" for node in (client.cluster.scheduler, worker)]


def labels(target):
    """The labels of each metric that an endpoint serves, beside those that Prometheus adds."""
    with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {sample.name: {"instance", "job", *sample.labels} for family in families for sample in family.samples}


def asked(node):
    """The metrics of a query, each with the labels that it matches or that are kept around it."""
    match node:
        case promql_parser.VectorSelector():
            return [(node.name, {matcher.name for matcher in node.matchers.matchers})]
        case promql_parser.MatrixSelector():
            return asked(node.vector_selector)
        case promql_parser.AggregateExpr():
            kept = set(node.modifier.labels) if node.modifier else set()
            return [(name, labels | kept) for name, labels in asked(node.expr)]
        case promql_parser.Call():
            return [found for argument in node.args for found in asked(argument)]
        case promql_parser.BinaryExpr():
            return asked(node.lhs) + asked(node.rhs)
        case promql_parser.ParenExpr():
            return asked(node.expr)
        case promql_parser.NumberLiteral():
            return []
    raise AssertionError(f"{node!r} is not looked into")


def test_every_query_asks_for_metrics_and_labels_that_are_served(served):
    known = {name: found for target in served for name, found in labels(target).items()}
    queries = [query for expressions in PANELS.values() for query in expressions]
    wanted = [found for query in queries for found in asked(promql_parser.parse(query))]
    assert wanted
    for name, used in wanted:
        assert used <= known.get(name, set()), name
    ours = {name for name in known if name.startswith("rangegrid_") and name.endswith("_total")}
    assert ours <= {name for name, _ in wanted}  # no counter is without a panel


def test_the_dashboard_asks_the_prometheus_that_is_chosen_at_its_import():
    (source,) = DASHBOARD["templating"]["list"]
    assert (source["type"], source["query"]) == ("datasource", "prometheus")
    targets = [target for panel in DASHBOARD["panels"] for target in (panel, *panel["targets"])]
    assert {target["datasource"]["uid"] for target in targets} == {"${source}"}
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(PANELS)


@pytest.fixture
def prometheus(served, tmp_path):
    """The address of a Prometheus that reads the endpoints each second, set up as the page tells."""
    if shutil.which("prometheus") is None:
        pytest.skip("Prometheus is not installed: apt-get install prometheus")
    config = yaml.safe_load(CONFIG)
    config["scrape_configs"][0] |= {"scrape_interval": "1s", "static_configs": [{"targets": served}]}
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    (port,) = servers.free_ports(1)
    places = {"config.file": "prometheus.yml", "storage.tsdb.path": "data", "web.listen-address": f":{port}"}
    command = ["prometheus", *(f"--{name}={value}" for name, value in places.items())]
    url, log = f"http://{servers.HOST}:{port}", tmp_path / "logs/prometheus.log"
    process = servers.start(command, log, {}, bound=True)
    servers.wait("Prometheus", lambda: servers.answers(f"{url}/-/ready"), process, log)
    yield url
    servers.stop(process)


@pytest.mark.faults
def test_prometheus_answers_every_query_with_numbers(prometheus):
    def answer(query):
        url = f"{prometheus}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
        with urllib.request.urlopen(url, timeout=10) as reply:
            return json.load(reply)["data"]["result"]

    until = time.monotonic() + PATIENCE
    waiting = [query for expressions in PANELS.values() for query in expressions]
    while waiting and time.monotonic() < until:
        waiting = [query for query in waiting if not answer(query)]
        time.sleep(0.5)
    assert waiting == []
