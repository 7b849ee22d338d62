"""Settings by environment and `.env`."""

import pytest

from infra import clusters
from infra.catalogs import Catalog, catalogs
from infra.errors import UserError
from infra.settings import settings


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


def test_a_scheduler_that_is_not_there():
    with pytest.raises(UserError, match="no Dask scheduler"), clusters.connect("tcp://127.0.0.1:9"):
        pass
