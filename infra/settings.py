"""Reads the settings, where things are and with which secrets, from the environment and one settings file.

The file is the one that `RANGEGRID_SETTINGS` names, else `.env` of the working directory. A relative path in the file
begins at the file's folder, so that a command, a worker and a run with its own directory read the same. Nothing is read
at import.
"""

import json
import os
import re
import tomllib
from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Self
from urllib.parse import unquote, urlsplit

from dotenv import dotenv_values
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from infra.errors import UserError

PREFIX = "RANGEGRID_"
FILE = "RANGEGRID_SETTINGS"  # names the settings file
RUN = ("PREFECT__FLOW_RUN_ID", "PREFECT__RUNTIME__DEPLOYMENT__ID")  # set by Prefect in a run of a deployment
PATHS = (
    "archives",
    "storage_url",
    "stac_url",
    "fallback_stac_url",
    "tls_ca",
    "tls_cert",
    "tls_key",
    "kubernetes_template",
)
OTHERS = ("RANGEGRID_CATALOG", "RANGEGRID_FIXTURES", "RANGEGRID_STATION")  # used by the compose file and the tests
SERVICE = re.compile(r"_(SERVICE_(HOST|PORT)|PORT)(_|$)")  # Kubernetes sets these in pods for a service `rangegrid…`
ENDPOINTS = ("AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")  # read by the S3 client itself
READ = (PREFIX, "AWS_", "PREFECT__")  # prefixes of the variables that the settings depend on
EXAMPLE = """["*.amazonaws.com", "bucket"]"""
SECRET = re.compile("KEY|SECRET|PASSWORD|DATABASE|ARCHIVES")  # names whose values no message repeats


class Archive(BaseModel):
    """Access to the imagery of one archive: of the hosts or buckets of a pattern."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    endpoint: str | None = None
    """URL of its S3 endpoint. Unset: AWS."""
    region: str | None = None
    """Region of the bucket."""
    access_key: SecretStr | None = None
    """S3 access key."""
    secret_key: SecretStr | None = None
    """S3 secret key."""
    sas_token: SecretStr | None = None
    """Token of a container of Azure, for hosts of it."""
    unsigned: bool = False
    """Whether to ask as the public does."""
    requester_pays: bool = False
    """Whether we agree to pay for what is read."""

    @property
    def keys(self) -> tuple[str, str] | None:
        """Returns key and secret in clear, for a client of S3 alone."""
        if self.unsigned or self.access_key is None or self.secret_key is None:
            return None
        return self.access_key.get_secret_value(), self.secret_key.get_secret_value()

    @field_validator("endpoint")
    @classmethod
    def _has_scheme(cls, url: str | None) -> str | None:
        if url and not has_scheme(url):
            raise ValueError("give the endpoint with its scheme, as https://…")
        return url.rstrip("/") if url else None

    @model_validator(mode="after")
    def _has_both(self) -> Self:
        if (self.secret_key is None) != (self.access_key is None):
            raise ValueError("give both, access_key and secret_key")
        return self


class Settings(BaseSettings):
    """Settings of one installation, named `RANGEGRID_…` in the environment or in the settings file.

    *Settings* say where and with which secrets; the flows' *parameters* say what to compute. Without any
    setting the defaults work: local files under `rangegrid-data/`, and threads.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        use_attribute_docstrings=True,
    )

    stac_url: str = "https://earth-search.aws.element84.com/v1"
    """The catalog: root URL of a STAC API, or a file of items (stac-geoparquet or an item collection) as a path or a
    `file://`, `s3://` or `https://` URL."""
    collection: str = "sentinel-2-c1-l2a"
    """Name of the collection of Sentinel-2 L2A items."""
    fallback_stac_url: str | None = None
    """Fallback catalog, used while the first one does not answer."""
    fallback_collection: str | None = None
    """Name of the collection in the fallback catalog. Unset: the same name as in the first."""
    asset_hosts: tuple[str, ...] = ()
    """Hosts and S3 buckets that files of the items may be read from, such as ["*.amazonaws.com", "bucket"]. Empty:
    all."""
    archives: Annotated[dict[str, Archive], NoDecode] = Field(default_factory=dict)
    """Access to archives of imagery: a TOML file with a table for each host or bucket, such as ["eodata"] with
    endpoint, region, access_key, secret_key, sas_token, unsigned or requester_pays; or the same as JSON."""
    storage_url: str = Field(default_factory=lambda: (file().parent / "rangegrid-data").as_uri())
    """Root of every stored product: a directory, `file:///directory` or `s3://bucket[/prefix]`."""
    s3_endpoint: str | None = None
    """URL of an S3 endpoint other than AWS."""
    cluster: str = "threads"
    """Where Dask runs: `threads` of this process, `local` processes, `kubernetes`, `gateway`, or a running scheduler as
    `tcp://host:port` or `tls://host:port`."""
    workers: int = Field(2, ge=1, le=1024)
    """Number of threads, worker processes or pods. A running scheduler has its own workers."""
    worker_memory: str = Field("auto", pattern=r"^(auto|\d+(\.\d+)? ?[kMGT]i?B)$")
    """Memory limit of each worker of `threads` and `local`, such as 4GB. auto: a share of the machine's memory."""
    tls_ca: Path | None = None
    """PEM file of the certificate authority of a `tls://` scheduler."""
    tls_cert: Path | None = None
    """PEM file of this process's certificate."""
    tls_key: Path | None = None
    """PEM file of the key of this process's certificate."""
    image: str = "rangegrid:latest"
    """Container image of the workers of `kubernetes`. Must be the image that this process runs."""
    kubernetes_template: Path | None = None
    """YAML file of the DaskCluster of `kubernetes`. Unset: `infra/kubernetes/daskcluster.yaml`."""
    access_key: SecretStr | None = Field(None, validation_alias="AWS_ACCESS_KEY_ID")
    """S3 access key. Unset: the usual AWS credentials of the environment or the machine."""
    secret_key: SecretStr | None = Field(None, validation_alias="AWS_SECRET_ACCESS_KEY")
    """S3 secret key. Unset: the usual AWS credentials of the environment or the machine."""
    region: str = Field("us-east-1", validation_alias="AWS_REGION")
    """S3 region."""
    prefect_database: SecretStr | None = None
    """Database of the Prefect server of `rangegrid serve`, as `postgresql://user:password@host/name`. Unset: SQLite."""
    alerts: str | None = Field(None, pattern=r"^[\w-]+/[\w-]+$")
    """Prefect notification block to send alerts to, such as `slack-webhook/duty`. Unset: no alerts are sent."""

    @property
    def s3_keys(self) -> tuple[str | None, str | None]:
        """Returns S3 key and secret in clear, for a client of S3 alone."""
        key, secret = (told.get_secret_value() if told else None for told in (self.access_key, self.secret_key))
        return key, secret

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Orders the sources: the environment before the file. Relative paths begin at a place of each source's own."""
        return init_settings, _Environment(settings_cls), _File(settings_cls, env_file=file())

    def archive(self, *names: str | None) -> Archive | None:
        """Returns the access to the first of some hosts or buckets that a pattern has; the first pattern counts."""
        told = [name.lower() for name in names if name]
        return next((a for p, a in self.archives.items() for name in told if fnmatchcase(name, p.lower())), None)

    @field_validator("archives", mode="before")
    @classmethod
    def _of_text(cls, told: Any) -> Any:
        if not isinstance(told, str):
            return told
        try:
            return json.loads(told) if told.lstrip().startswith("{") else tomllib.loads(Path(told).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{type(error).__name__}: give JSON, or the path of a TOML file") from None

    @field_validator("storage_url")
    @classmethod
    def _as_url(cls, place: str) -> str:
        if place.startswith("file:") or "://" in place:
            return place
        return Path(place).absolute().as_uri()

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
    """Resolves a path of the environment from the working directory; a run is refused a relative one.

    A run's working directory is a temporary one, so a relative path would lead nowhere.
    """
    if name not in PATHS or resolve(value, Path("/")) == resolve(value, Path("/nowhere")):
        return value
    if in_run():
        raise UserError(
            f"{PREFIX}{name.upper()} is {value!r} in the environment of a run, whose directory is thrown away: give an "
            f"absolute path, or set it in the file that {FILE} names, where a path is relative to that file"
        )
    return resolve(value, Path.cwd())


def resolve(place: str, folder: Path) -> str:
    """Returns a place with a relative path made absolute from `folder`; URLs and absolute paths stay as they are.

    Args:
        place: A path, which may begin with `~`, or a URL; `file:` may be relative too.
        folder: Where relative paths begin.
    """
    local = place.startswith("file:") and not place.startswith("file:/")
    if place.startswith("file://."):
        local, place = True, place.replace("file://", "file:", 1)
    if local:
        return (folder / unquote(place.removeprefix("file:"))).resolve().as_uri()
    if "://" in place or place.startswith("file:") or place.lstrip().startswith("{"):
        return place
    return str(folder / Path(place).expanduser())


def has_scheme(url: str) -> bool:
    """Tells whether a URL has http or https and a host: the S3 client ends the process at any other."""
    return urlsplit(url).scheme in ("http", "https") and bool(urlsplit(url).netloc)


def in_run() -> bool:
    """Tells whether this process runs a flow for a deployment, in a directory that is not the user's."""
    return any(os.environ.get(name) for name in RUN)


def file() -> Path:
    """Returns the path of the settings file, whether or not the file exists."""
    return Path(os.environ.get(FILE) or ".env").expanduser().absolute()


def settings() -> Settings:
    """Reads the settings anew, so that a worker sees its own environment.

    Raises:
        UserError: A variable has an unfit value or an unknown name, the settings file is missing, or a run would
            store its products in its own temporary directory.
    """
    place = file()
    version = place.stat().st_mtime_ns if place.is_file() else None
    variables = sorted(item for item in os.environ.items() if item[0].upper().startswith(READ))
    return _read(tuple(variables), place, version, os.getcwd())


@lru_cache(maxsize=4)
def _read(*_: Any) -> Settings:
    """Reads the settings once for these variables, this version of the file and this directory: storage asks often."""
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
    """Copies the `PREFECT_…` variables of the settings file into the environment, where they are not set yet.

    Call it before Prefect is imported.
    """
    for name, value in dotenv_values(file()).items() if file().is_file() else ():
        if name.upper().startswith("PREFECT_") and value:
            os.environ.setdefault(name, value)


def origin() -> str:
    """Returns where settings come from, for messages."""
    if file().is_file():
        return f"{file()} and the environment"
    return f"the environment; there is no {file()}"


def _mend() -> str:
    return f". Mend it in the environment or in {file()}"


def _misfit(error: ValidationError) -> UserError:
    first = error.errors()[0]
    name = str(first["loc"][0])
    if not name.isupper():
        name = PREFIX + ".".join(map(str, first["loc"])).upper()
    value = "set" if SECRET.search(name) else repr(first["input"])
    return UserError(f"{name} is {value}: {first['msg'].removeprefix('Value error, ')}{_mend()}.")


def _check_names() -> None:
    """Refuses a missing settings file, unknown names, and endpoints without http or https."""
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
