"""Where things are and with which secrets: read from the environment and one settings file, never at import.

The file is the one that `RANGEGRID_SETTINGS` names, else `.env` of the working directory. A relative path in it is
relative to its folder, so that a command, a worker and a run in a directory of its own read the same.
"""

import os
import re
from collections.abc import Iterable
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from dotenv import dotenv_values
from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from infra.errors import UserError

PREFIX = "RANGEGRID_"
FILE = "RANGEGRID_SETTINGS"  # names the settings file
RUN = ("PREFECT__FLOW_RUN_ID", "PREFECT__RUNTIME__DEPLOYMENT__ID")  # Prefect sets the first in a deployment's run
PATHS = ("storage_url", "stac_url", "fallback_stac_url", "tls_ca", "tls_cert", "tls_key", "kubernetes_template")
OTHERS = ("RANGEGRID_CATALOG", "RANGEGRID_FIXTURES", "RANGEGRID_STATION")  # of the compose file and of the tests
SERVICE = re.compile(r"_(SERVICE_(HOST|PORT)|PORT)(_|$)")  # what Kubernetes tells each pod of a service `rangegrid…`
ENDPOINTS = ("AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")  # what the S3 client takes by itself
READ = (PREFIX, "AWS_", "PREFECT__")  # of the environment, what the settings depend on
EXAMPLE = """["*.amazonaws.com", "bucket"]"""
SECRET = re.compile("KEY|SECRET|PASSWORD|DATABASE")  # names whose values no message repeats


class Settings(BaseSettings):
    """The places of one installation; `RANGEGRID_…` in the environment or in the settings file.

    *Settings* say where and with which secrets; the flows' *parameters* say what to compute. Without any of
    them the embedded defaults work: local files under `rangegrid-data/` and threads.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        use_attribute_docstrings=True,
    )

    stac_url: str = "https://earth-search.aws.element84.com/v1"
    """Root of the STAC API, or a stac-geoparquet or item-collection file: a path, `file://`, `s3://`, `https://`."""
    collection: str = "sentinel-2-c1-l2a"
    """Collection of Sentinel-2 L2A items."""
    fallback_stac_url: str | None = None
    """The catalog that stands in while the first does not answer."""
    fallback_collection: str | None = None
    """Its collection; unset: the same name as the first's."""
    asset_hosts: tuple[str, ...] = ()
    """Hosts, or buckets of s3://, that items may send us to, as ["*.amazonaws.com", "bucket"]; empty: all."""
    storage_url: str = Field(default_factory=lambda: (file().parent / "rangegrid-data").as_uri())
    """Root of every stored product: a directory, `file:///directory` or `s3://bucket[/prefix]`."""
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
    prefect_database: SecretStr | None = None
    """`postgresql://user:password@host/name` for the Prefect server of `rangegrid serve`; unset: SQLite."""
    alerts: str | None = Field(None, pattern=r"^[\w-]+/[\w-]+$")
    """Prefect's notification block that alerts go to, as `slack-webhook/duty`; unset: none are sent."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment wins over the file; each has its own idea of where a relative path begins."""
        return init_settings, _Environment(settings_cls), _File(settings_cls, env_file=file())

    @field_validator("storage_url")
    @classmethod
    def _as_url(cls, place: str) -> str:
        return place if place.startswith("file:") or "://" in place else Path(place).absolute().as_uri()

    @field_validator("s3_endpoint")
    @classmethod
    def _has_scheme(cls, url: str | None) -> str | None:
        if url and not has_scheme(url):
            raise ValueError(f"give it with its scheme, as http://{url.split('://')[-1]} or https://…")
        return url

    @field_validator("prefect_database")
    @classmethod
    def _is_postgresql(cls, url: SecretStr | None) -> SecretStr | None:
        if url and not re.match(r"postgres(ql)?(\+asyncpg)?://.", url.get_secret_value()):
            raise ValueError("give a URL as postgresql://user:password@host/name")
        return url


class _Environment(EnvSettingsSource):
    def __call__(self) -> dict[str, Any]:
        return {name: _in_environment(name, value) for name, value in super().__call__().items()}


class _File(DotEnvSettingsSource):
    def __call__(self) -> dict[str, Any]:
        folder = file().parent
        return {name: resolve(value, folder) if name in PATHS else value for name, value in super().__call__().items()}


def _in_environment(name: str, value: Any) -> Any:
    """A path of the environment, relative to the working directory: which a run has none of its own to be found in."""
    if name not in PATHS or resolve(value, Path("/")) == resolve(value, Path("/nowhere")):
        return value
    if in_run():
        raise UserError(
            f"{PREFIX}{name.upper()} is {value!r} in the environment of a run, whose directory is thrown away: give an "
            f"absolute path, or set it in the file that {FILE} names, where a path is relative to that file"
        )
    return resolve(value, Path.cwd())


def resolve(place: str, folder: Path) -> str:
    """Returns a place whose path begins at `folder` where it is relative; URLs and absolute paths stay as they are.

    Args:
        place: A path, which may begin with `~`, or a URL; `file:` may be relative too.
        folder: Where relative paths begin.
    """
    local = place.startswith("file:") and not place.startswith("file:/")
    if place.startswith("file://."):
        local, place = True, place.replace("file://", "file:", 1)
    if local:
        return (folder / unquote(place.removeprefix("file:"))).resolve().as_uri()
    return place if "://" in place or place.startswith("file:") else str(folder / Path(place).expanduser())


def has_scheme(url: str) -> bool:
    """Whether a URL is one of http or https: the S3 client ends the process at any other."""
    return urlsplit(url).scheme in ("http", "https") and bool(urlsplit(url).netloc)


def in_run() -> bool:
    """Whether this process runs a flow for a deployment, in a directory that is not the user's."""
    return any(os.environ.get(name) for name in RUN)


def file() -> Path:
    """Returns the place of the settings file, whether or not it is there."""
    return Path(os.environ.get(FILE) or ".env").expanduser().absolute()


def settings() -> Settings:
    """Reads the settings anew, so that a worker sees its own environment.

    Raises:
        UserError: A variable has a value that does not fit, or a name that is none; there is no such file; or a run
            would store its products in its own directory.
    """
    place = file()
    version = place.stat().st_mtime_ns if place.is_file() else None
    variables = sorted(item for item in os.environ.items() if item[0].upper().startswith(READ))
    return _read(tuple(variables), place, version, os.getcwd())


@lru_cache(maxsize=4)
def _read(*_: Any) -> Settings:
    """Reads once what depends on these variables, this version of the file and this directory: storage asks often."""
    _check_names()
    try:
        found = Settings()
    except ValidationError as error:
        raise _misfit(error) from None
    except SettingsError as error:
        name = re.findall(r'field "(\w+)"', str(error))[0]
        raise UserError(f"{PREFIX}{name.upper()} is no JSON: give it as {EXAMPLE}{_mend()}") from None
    if in_run() and "storage_url" not in found.model_fields_set:
        raise UserError(
            f"RANGEGRID_STORAGE_URL is not set where this run reads its settings ({origin()}), and what it stored in "
            f"its own directory would be lost. Set it there, or set {FILE} to the file that does"
        )
    return found


def hand_on() -> None:
    """Puts what the settings file says of Prefect into the environment, where it is not set yet.

    To be called before Prefect is imported.
    """
    for name, value in dotenv_values(file()).items() if file().is_file() else ():
        if name.upper().startswith("PREFECT_") and value:
            os.environ.setdefault(name, value)


def origin() -> str:
    """Tells where settings come from, for messages."""
    return f"{file()} and the environment" if file().is_file() else f"the environment; there is no {file()}"


def _mend() -> str:
    return f". Mend it in the environment or in {file()}"


def _misfit(error: ValidationError) -> UserError:
    first = error.errors()[0]
    name = str(first["loc"][0])
    name = name if name.isupper() else PREFIX + ".".join(map(str, first["loc"])).upper()
    value = "set" if SECRET.search(name) else repr(first["input"])
    return UserError(f"{name} is {value}: {first['msg'].removeprefix('Value error, ')}{_mend()}.")


def _check_names() -> None:
    """Refuses a settings file that is not there, names that no setting has, and endpoints that no client can use."""
    if os.environ.get(FILE) and not file().is_file():
        raise UserError(f"{FILE} is {os.environ[FILE]!r}, and there is no such file: make it, or set {FILE} anew")
    _refuse_unknown(os.environ, "the environment")
    if file().is_file():
        _refuse_unknown(dotenv_values(file()), str(file()))
    for name in ENDPOINTS:
        if (url := os.environ.get(name)) and not has_scheme(url):
            raise UserError(f"{name} is {url!r} in the environment: give it with its scheme, as http://{url}")


def _refuse_unknown(names: Iterable[str], place: str) -> None:
    known = [FILE, *OTHERS, *(f"{PREFIX}{name}".upper() for name in Settings.model_fields)]
    for name in names:
        upper = name.upper()
        if upper.startswith(PREFIX) and upper not in known and not SERVICE.search(upper):
            near = get_close_matches(upper, known, 1)
            meant = f": {near[0]} is meant? " if near else ": "
            raise UserError(
                f"{name} in {place} is no setting{meant}Mend the name or take it out; README.md has them all"
            )
