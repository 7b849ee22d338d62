"""Where things are and with which secrets: read from the environment and `.env`, never at import."""

from pathlib import Path

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from infra.errors import UserError


class Settings(BaseSettings):
    """The places of one installation; `RANGEGRID_…` in the environment or in `.env`.

    *Settings* say where and with which secrets; the flows' *parameters* say what to compute. Without any of
    them the embedded defaults work: local files under `rangegrid-data/` and threads.
    """

    model_config = SettingsConfigDict(
        env_prefix="RANGEGRID_",
        env_file=".env",
        extra="ignore",
        frozen=True,
        use_attribute_docstrings=True,
    )

    stac_url: str = "https://earth-search.aws.element84.com/v1"
    """Root of the STAC API, or a stac-geoparquet or item-collection file: a path, `file://` or `s3://`."""
    collection: str = "sentinel-2-c1-l2a"
    """Collection of Sentinel-2 L2A items."""
    fallback_stac_url: str | None = None
    """The catalog that stands in while the first does not answer."""
    fallback_collection: str | None = None
    """Its collection; unset: the same name as the first's."""
    asset_hosts: tuple[str, ...] = ()
    """Hosts, or buckets of s3://, that items may send us to, as ["*.amazonaws.com", "bucket"]; empty: all."""
    storage_url: str = Field(default_factory=lambda: Path("rangegrid-data").absolute().as_uri())
    """Root of every stored product: `file:///directory` or `s3://bucket[/prefix]`."""
    s3_endpoint: str | None = None
    """URL of an S3 endpoint other than AWS."""
    cluster: str = "threads"
    """Where Dask runs: `threads`, `local`, a scheduler's `tcp://host:port` or `tls://…`, `kubernetes` or `gateway`."""
    workers: int = Field(2, ge=1, le=1024)
    """Threads, worker processes or pods, where the cluster is made here."""
    worker_memory: str = Field("auto", pattern=r"^(auto|\d+(\.\d+)? ?[kMGT]i?B)$")
    """Memory of each worker of `threads` and `local`, as 4GB; auto: a share of the machine's."""
    tls_ca: Path | None = None
    """PEM file of the authority of a `tls://` scheduler."""
    tls_cert: Path | None = None
    """PEM file of this process's certificate."""
    tls_key: Path | None = None
    """PEM file of its key."""
    image: str = "rangegrid:latest"
    """Container image of the workers of `kubernetes`: the one that this process runs."""
    kubernetes_template: Path | None = None
    """The DaskCluster of `kubernetes`, as YAML; unset, `infra/kubernetes/daskcluster.yaml`."""
    access_key: SecretStr | None = Field(None, validation_alias="AWS_ACCESS_KEY_ID")
    """S3 key; unset: the ambient chain of credentials."""
    secret_key: SecretStr | None = Field(None, validation_alias="AWS_SECRET_ACCESS_KEY")
    """S3 secret; unset: the ambient chain of credentials."""
    region: str = Field("us-east-1", validation_alias="AWS_REGION")
    """S3 region."""


def settings() -> Settings:
    """Reads the settings anew, so that a worker sees its own environment.

    Raises:
        UserError: A variable has a value that does not fit.
    """
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        name = "RANGEGRID_" + ".".join(map(str, first["loc"])).upper()
        raise UserError(
            f"{name} is {first['input']!r}: {first['msg']}. Mend it in the environment or in .env."
        ) from None
