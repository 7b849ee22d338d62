"""Settings by environment and `.env`."""

import pytest

from infra import clusters
from infra.errors import UserError
from infra.settings import settings
from infra.stac.catalogs import Catalog, catalogs


def test_defaults_are_local(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANGEGRID_STORAGE_URL", raising=False)
    monkeypatch.delenv("RANGEGRID_CLUSTER", raising=False)
    assert settings().storage_url == (tmp_path / "rangegrid-data").as_uri()
    assert settings().cluster == "threads"


def test_dot_env_is_read_and_the_environment_wins(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("RANGEGRID_CLUSTER=local\nRANGEGRID_WORKERS=3\n")
    monkeypatch.delenv("RANGEGRID_CLUSTER", raising=False)
    monkeypatch.setenv("RANGEGRID_WORKERS", "4")
    assert (settings().cluster, settings().workers) == ("local", 4)


RELATIVE = """
RANGEGRID_STORAGE_URL=products
RANGEGRID_STAC_URL=catalog/items.parquet
RANGEGRID_FALLBACK_STAC_URL=file:catalog/items.json
RANGEGRID_TLS_CA=tls/ca.pem
RANGEGRID_KUBERNETES_TEMPLATE=../cluster.yaml
"""


def test_one_file_says_the_same_wherever_it_is_read(monkeypatch, tmp_path):
    """As a command beside it, a worker elsewhere and a run in a directory of its own read it."""
    home, run = tmp_path / "home", tmp_path / "run"
    home.mkdir()
    run.mkdir()
    (home / ".env").write_text(RELATIVE)
    monkeypatch.delenv("RANGEGRID_STORAGE_URL", raising=False)
    monkeypatch.delenv("RANGEGRID_STAC_URL", raising=False)
    monkeypatch.chdir(home)
    beside = settings()
    monkeypatch.setenv("RANGEGRID_SETTINGS", str(home / ".env"))
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "1")
    monkeypatch.chdir(run)
    assert settings() == beside
    assert beside.storage_url == (home / "products").as_uri()
    assert beside.stac_url == str(home / "catalog/items.parquet")
    assert beside.fallback_stac_url == (home / "catalog/items.json").as_uri()
    assert beside.tls_ca == home / "tls/ca.pem"
    assert beside.kubernetes_template.resolve() == tmp_path / "cluster.yaml"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "RANGEGRID_STORAGE_URL is not set where this run reads its settings"),
        ({"STORAGE_URL": "products"}, "RANGEGRID_STORAGE_URL is 'products' in the environment of a run"),
        ({"STORAGE_URL": "file:products"}, "RANGEGRID_STORAGE_URL is 'file:products' in the environment of a run"),
        (
            {"STORAGE_URL": "s3://bucket", "TLS_CA": "ca.pem"},
            "RANGEGRID_TLS_CA is 'ca.pem' in the environment of a run",
        ),
    ],
)
def test_a_run_keeps_nothing_in_its_own_directory(monkeypatch, tmp_path, variables, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANGEGRID_STORAGE_URL", raising=False)
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "1")
    for name, value in variables.items():
        monkeypatch.setenv(f"RANGEGRID_{name}", value)
    with pytest.raises(UserError, match=message):
        settings()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "RANGEGRID_STORAGE_URI",
            "s3://b",
            "RANGEGRID_STORAGE_URI in .* is no setting: RANGEGRID_STORAGE_URL is meant",
        ),
        ("rangegrid_worker", "3", "rangegrid_worker in .* is no setting: RANGEGRID_WORKERS is meant"),
        ("RANGEGRID_QQQ", "3", "RANGEGRID_QQQ in .* is no setting"),
        (
            "RANGEGRID_S3_ENDPOINT",
            "localhost:8333",
            "RANGEGRID_S3_ENDPOINT is 'localhost:8333': .* http://localhost:8333",
        ),
        ("RANGEGRID_S3_ENDPOINT", "s3://localhost", "RANGEGRID_S3_ENDPOINT is 's3://localhost': .* http://localhost"),
        ("RANGEGRID_ASSET_HOSTS", "*.amazonaws.com", "RANGEGRID_ASSET_HOSTS is no JSON"),
        ("RANGEGRID_PREFECT_DATABASE", "mysql://me:hush@host/db", "RANGEGRID_PREFECT_DATABASE is set: give a URL"),
    ],
)
@pytest.mark.parametrize("where", ["environment", "file"])
def test_what_is_no_setting_is_refused_by_name(monkeypatch, tmp_path, name, value, message, where):
    monkeypatch.chdir(tmp_path)
    if where == "file":
        (tmp_path / ".env").write_text(f"{name}={value}\n")
        monkeypatch.delenv(name, raising=False)
    else:
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message) as raised:
        settings()
    assert "hush" not in str(raised.value)


def test_the_s3_clients_own_endpoint_needs_a_scheme_too(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:8333")
    with pytest.raises(UserError, match="AWS_ENDPOINT_URL is 'localhost:8333'"):
        settings()


def test_what_kubernetes_tells_of_services_is_no_setting_of_ours(monkeypatch):
    monkeypatch.setenv("RANGEGRID_ABC123_SCHEDULER_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("RANGEGRID_ABC123_SCHEDULER_PORT_8786_TCP_ADDR", "10.0.0.1")
    monkeypatch.setenv("RANGEGRID_CLUSTER", "")  # as compose hands on what is not set
    assert settings().cluster == "threads"


def test_a_settings_file_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("RANGEGRID_SETTINGS", str(tmp_path / "lost.env"))
    with pytest.raises(UserError, match="there is no such file"):
        settings()


def test_a_bad_value_names_the_variable(monkeypatch):
    monkeypatch.setenv("RANGEGRID_WORKERS", "many")
    with pytest.raises(UserError, match="RANGEGRID_WORKERS is 'many'"):
        settings()


def test_the_second_catalog_is_there_only_where_it_is_set(monkeypatch):
    monkeypatch.setenv("RANGEGRID_STAC_URL", "https://first.example")
    monkeypatch.setenv("RANGEGRID_COLLECTION", "a")
    assert catalogs() == [Catalog("https://first.example", "a")]
    monkeypatch.setenv("RANGEGRID_FALLBACK_STAC_URL", "s3://bucket/items.parquet")
    assert catalogs()[1] == Catalog("s3://bucket/items.parquet", "a")
    monkeypatch.setenv("RANGEGRID_FALLBACK_COLLECTION", "b")
    assert catalogs()[1] == Catalog("s3://bucket/items.parquet", "b")


def test_secrets_do_not_show(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    assert "hush-hush" not in repr(settings())


def test_an_unknown_cluster_lists_the_known():
    with (
        pytest.raises(UserError, match="threads, local, kubernetes, gateway, tcp://host:port"),
        clusters.connect("slurm"),
    ):
        pass


def test_a_scheduler_that_is_not_there(nobody, monkeypatch):
    monkeypatch.setattr(clusters, "ANSWER", 1)
    with pytest.raises(UserError, match="no Dask scheduler"), clusters.connect(f"tcp://{nobody}"):
        pass
