"""Clusters by name: schedulers and workers that were started elsewhere, fit and unfit, with TLS and without."""

import datetime
import ipaddress
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from distributed import Client
from distributed.security import Security

import infra
from infra import clusters, storage, workers
from infra.errors import UserError
from infra.sandbox import servers
from infra.settings import Settings
from tasks.units import run_units

ROOT = Path(infra.__file__).parents[1]
PEM = serialization.Encoding.PEM
NAMES = ("one", "two", "three")


class Authority:
    """A certificate authority for the length of a test."""

    def __init__(self, folder):
        self.folder, self.key = folder, ec.generate_private_key(ec.SECP256R1())
        folder.mkdir()
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, folder.name)])
        self.ca = self._write("ca.pem", self._certificate(self.name, self.key, True).public_bytes(PEM))

    def issue(self, name):
        """Paths of a new certificate and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        plain = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        return (
            self._write(f"{name}.pem", self._certificate(subject, key, False).public_bytes(PEM)),
            self._write(f"{name}.key", key.private_bytes(PEM, *plain)),
        )

    def _certificate(self, subject, key, ca):
        now = datetime.datetime.now(datetime.UTC)
        here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(servers.HOST))])
        builder = x509.CertificateBuilder(self.name, subject, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(days=1))
        builder = builder.not_valid_after(now + datetime.timedelta(days=1)).add_extension(here, False)
        return builder.add_extension(x509.BasicConstraints(ca, None), True).sign(self.key, hashes.SHA256())

    def _write(self, name, data):
        path = self.folder / name
        path.write_bytes(data)
        return path


class Fleet:
    """A scheduler, and workers that join it, each a process of its own in a directory of its own."""

    def __init__(self, folder, authority=None):
        (port,) = servers.free_ports(1)
        self.folder, self.flags = folder, []
        self.address = f"{'tls' if authority else 'tcp'}://{servers.HOST}:{port}"
        self.security = None
        if authority:
            cert, key = authority.issue("dask")
            self.flags = ["--tls-ca-file", authority.ca, "--tls-cert", cert, "--tls-key", key]
            files = {"tls_ca_file": authority.ca, "tls_client_cert": cert, "tls_client_key": key}
            self.security = Security(require_encryption=True, **{name: str(path) for name, path in files.items()})
        self.started = {}
        self.open()

    def open(self):
        """Starts the scheduler, at the same address as before."""
        place, _, port = self.address.rpartition(":")
        self.started["scheduler"] = self._start("scheduler", "scheduler", "--host", place, "--port", port)

    def join(self, name, **variables):
        alone = ["--nthreads", "1", "--no-nanny", "--name", name]
        self.started[name] = self._start(name, "worker", self.address, *alone, **variables)

    def _start(self, name, *command, **variables):
        home = self.folder / name
        home.mkdir(parents=True, exist_ok=True)
        return subprocess.Popen(
            [sys.executable, "-m", "dask", *command, "--no-dashboard", *self.flags],
            cwd=home,
            env=os.environ | {"DASK_CONFIG": str(clusters.CONFIG)} | variables,
            stderr=subprocess.DEVNULL,
        )

    def leave(self, name):
        process = self.started.pop(name)
        process.kill()
        process.wait(20)

    def close(self):
        for name in reversed(list(self.started)):
            self.leave(name)


def has(fleet, count, patience=300):
    """Waits until as many workers are there."""
    with Client(fleet.address, timeout=60, security=fleet.security) as client:
        until = time.monotonic() + patience
        while len(client.scheduler_info(n_workers=-1)["workers"]) != count:
            assert time.monotonic() < until, "workers neither came nor went"
            time.sleep(0.05)


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("tls") / "authority")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory, authority):
    """A scheduler and three workers, with TLS; `tests.conftest.cluster` is one without."""
    made = Fleet(tmp_path_factory.mktemp("tls"), authority)
    try:
        for name in NAMES:
            made.join(name)
        has(made, 3)
        yield made
    finally:
        made.close()


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", tmp_path.as_uri())
    return tmp_path


@pytest.fixture
def proven(authority, monkeypatch):
    """The settings name this process's certificate."""
    cert, key = authority.issue("client")
    for name, path in {"CA": authority.ca, "CERT": cert, "KEY": key}.items():
        monkeypatch.setenv(f"RANGEGRID_TLS_{name}", str(path))


def test_three_workers_in_their_own_directories_do_the_units(fleet, home, proven):
    with clusters.connect(fleet.address) as client:
        assert sorted(client.run(os.getcwd).values()) == sorted(str(fleet.folder / name) for name in NAMES)
        urls = [f"{home.as_uri()}/{unit}" for unit in range(12)]
        storage.write(urls[3], b"")
        assert run_units(client, storage.exists, urls, label="found") == [unit == 3 for unit in range(12)]
        pause = client.run(lambda dask_worker: dask_worker.memory_manager.memory_pause_fraction)
        assert set(pause.values()) == {0.85}
        profiled = client.run(lambda dask_worker: "profile" in dask_worker.periodic_callbacks)
        assert set(profiled.values()) == {False}
    assert [path.name for path in home.iterdir()] == ["3"]


@pytest.mark.parametrize("name", ["threads", "local"])
def test_no_profiler_runs_beside_the_garbage_collector(name, home):
    """Before Python 3.11.12 the two can deadlock."""
    with clusters.connect(name, workers=1) as client:
        profiled = client.run(lambda dask_worker: "profile" in dask_worker.periodic_callbacks)
    assert set(profiled.values()) == {False}


def test_a_stranger_is_not_let_in(fleet, home, proven, tmp_path, monkeypatch):
    stranger = Authority(tmp_path / "stranger")
    cert, key = stranger.issue("client")
    monkeypatch.setenv("RANGEGRID_TLS_CERT", str(cert))
    monkeypatch.setenv("RANGEGRID_TLS_KEY", str(key))
    monkeypatch.setattr(clusters, "ANSWER", 3)
    with pytest.raises(UserError, match="no Dask scheduler with workers answers at tls://"):
        clusters.connect(fleet.address).__enter__()


@pytest.mark.parametrize(("value", "said"), [(None, "not set"), ("/nowhere/key.pem", "/nowhere/key.pem")])
def test_tls_without_a_key_says_which_file(home, proven, monkeypatch, value, said):
    monkeypatch.delenv("RANGEGRID_TLS_KEY")
    if value:
        monkeypatch.setenv("RANGEGRID_TLS_KEY", value)
    with pytest.raises(UserError, match=f"RANGEGRID_TLS_KEY is {said}"), clusters.connect("tls://127.0.0.1:9"):
        pass


def test_workers_that_are_not_fit_are_named(sandbox, tmp_path):
    """One has another torch, one runs other code, one has no keys to the storage."""
    unfit = {
        "old": ({"PYTHONPATH": str(_other_torch(tmp_path))}, r"has torch 1\.0 and not 2\."),
        "other": ({"PYTHONPATH": str(_other_code(tmp_path))}, r"runs other rangegrid code \("),
        "poor": ({"AWS_SECRET_ACCESS_KEY": "wrong"}, r"cannot use the storage \(access to .* forbidden"),
    }
    fleet = Fleet(tmp_path / "fleet")
    try:
        for name, (variables, _) in unfit.items():
            fleet.join(name, **sandbox.environment() | variables)
        has(fleet, 3)
        for name, (_, said) in unfit.items():
            with pytest.raises(UserError, match=f"worker {name} at tcp://.* {said}"):
                clusters.connect(fleet.address).__enter__()
            fleet.leave(name)
    finally:
        fleet.close()


def _other_code(folder):
    copy = folder / "other"
    for room in ("infra", "tasks"):
        for path in (ROOT / room).rglob("*.py"):
            target = copy / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    with (copy / "tasks" / "units.py").open("a") as file:
        file.write("# changed\n")
    return copy


def _other_torch(folder):
    (folder / "old" / "torch-1.0.dist-info").mkdir(parents=True)
    (folder / "old" / "torch-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.0")
    return folder / "old"


def test_another_disk_under_the_same_name_is_found_out(home):
    probe = f"{home.as_uri()}/probe"
    assert workers.reach(probe, "token") == "it sees another one under the same URL"
    storage.write(f"{probe}/client", b"another run's")
    assert workers.reach(probe, "token") == "it sees another one under the same URL"
    storage.write(f"{probe}/client", b"token")
    assert workers.reach(probe, "token") == ""


def test_the_memory_of_a_worker_is_the_settings(home, monkeypatch):
    monkeypatch.setenv("RANGEGRID_WORKER_MEMORY", "3GB")
    with clusters.connect("threads", 2) as client:
        assert workers.room(client) == 1.5e9


def test_an_error_in_a_shared_cluster_is_the_users(home):
    """The inner connect passes a failed step's error on."""
    with clusters.connect("threads", 1) as outer:
        assert _inner() is outer
        with pytest.raises(UserError, match="mine"):
            _inner(fails=True)


def _inner(fails=False):
    with clusters.connect() as client:
        if fails:
            raise UserError("mine")
        return client


@pytest.mark.parametrize("name", ["kubernetes", "gateway"])
def test_an_extra_that_is_not_installed_is_one_sentence(home, name, monkeypatch):
    for module in ("dask_kubernetes", "dask_kubernetes.operator", "dask_gateway"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"the cluster '{name}' needs dask.*'\.\[{name}\]'"), clusters.connect(name):
        pass


def test_the_dask_cluster_takes_image_and_replicas_from_the_settings(tmp_path):
    template = yaml.safe_load(clusters.TEMPLATE.read_text())
    template["spec"]["worker"]["spec"]["nodeSelector"] = {"pool": "big"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(template))
    made = clusters.dask_cluster(Settings(workers=7, image="mine:1", kubernetes_template=tmp_path / "mine.yaml"))
    spec = made["spec"]
    assert spec["worker"]["replicas"] == 7
    assert {spec[part]["spec"]["containers"][0]["image"] for part in ("worker", "scheduler")} == {"mine:1"}
    assert spec["worker"]["spec"]["nodeSelector"] == {"pool": "big"}
    assert spec["scheduler"]["service"]["selector"]["dask.org/cluster-name"] == made["metadata"]["name"]
    with pytest.raises(UserError, match=r"nothing\.yaml cannot be read"):
        clusters.dask_cluster(Settings(kubernetes_template=tmp_path / "nothing.yaml"))
