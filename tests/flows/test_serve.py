"""One machine as docs/operations.md installs it: its commands word for word, and what is there afterwards."""

import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from infra import serve
from infra.errors import UserError
from infra.sandbox import servers
from infra.settings import settings

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PAGE = (ROOT / "docs/operations.md").read_text()
PATIENCE = 1200  # seconds: a pipeline starts six Pythons, on a machine that may have other work


def blocks(language):
    """The code of the page's section Install, in order."""
    section = PAGE.split("## Install")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


def variables(box, folder, port):
    """A new user's: what the demo planet needs in place of the web, and nothing that says where products go."""
    ours = ("RANGEGRID_", "PREFECT_", "AWS_")
    found = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    planet = {k: v for k, v in box.environment().items() if k not in ("RANGEGRID_STORAGE_URL", "PREFECT_API_URL")}
    port = {"PREFECT_SERVER_API_PORT": str(port)}
    return found | planet | port | {"HOME": str(folder), "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}


class Terminal:
    """`rangegrid serve`, in a terminal of its own."""

    def __init__(self, script, folder, environment):
        self.log = folder / "terminal.log"
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                ["bash", "-ec", script],
                cwd=folder,
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def serving(self):
        """What it printed, once it serves."""
        until = time.monotonic() + PATIENCE
        while "serving; Ctrl-C" not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.5)
        return self.log.read_text()

    def ctrl_c(self):
        """Interrupts what is in the foreground, as a terminal does; how it ended."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(PATIENCE)


@pytest.mark.faults
@pytest.mark.timeout(2 * PATIENCE)
def test_the_pages_commands_end_in_products_that_xarray_opens(sandbox, tmp_path):
    """Fresh server, process worker, empty folder."""
    install, use, opened = blocks("sh")[0], blocks("sh")[1], blocks("python")[0]
    (port,) = servers.free_ports(1)
    environment = variables(sandbox, tmp_path, port)
    terminal = Terminal(install, tmp_path, environment)
    folder = tmp_path / "grids"
    try:
        printed = terminal.serving()
        (export,) = re.findall(r"export PREFECT_API_URL=\S+", printed)
        used = subprocess.run(
            ["bash", "-ec", f"{export}\n{use}"],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert used.returncode == 0, used.stdout + used.stderr + terminal.log.read_text()
        assert f"ok    a run: storage    {(folder / 'products').as_uri()}" in used.stdout
        url = export.partition("=")[2]
        again = Terminal("cd grids && rangegrid serve", tmp_path, environment)  # repeated, beside the first
        assert "is joined" in again.serving()
        assert again.ctrl_c() == 0
        with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
            doctor = client.read_deployment_by_name("doctor/doctor").id
            run = client.create_flow_run_from_deployment(doctor).id
            while not client.read_flow_run(run).state.is_running():
                time.sleep(0.2)
    finally:
        assert terminal.ctrl_c() == 0
    assert not servers.answers(url)
    opens = subprocess.run([sys.executable, "-c", opened], cwd=folder, env=environment, capture_output=True, text=True)
    assert opens.returncode == 0, opens.stderr
    assert "'lat': 90, 'lon': 180" in opens.stdout  # steps of 2 degrees
    terminal = Terminal("cd grids && rangegrid serve", tmp_path, environment)
    try:
        terminal.serving()
        with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
            state = client.read_flow_run(run).state
            assert state.is_crashed()
            assert "run it again" in state.message
            pipeline = client.read_deployment_by_name("pipeline/pipeline")
            (schedule,) = pipeline.schedules
            assert (schedule.schedule.timezone, schedule.active) == ("Europe/Berlin", False)
            assert pipeline.parameters["params"]["sample"]["patches"] == 60
    finally:
        assert terminal.ctrl_c() == 0


def test_serve_refuses_settings_that_would_lose_products(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("RANGEGRID_STORAGE_URL", "RANGEGRID_SETTINGS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"RANGEGRID_STORAGE_URL is not set, .* put it into .*\.env"):
        serve.serve(4200, None, None, print)
    assert list(tmp_path.iterdir()) == []


def test_the_units_are_systemds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", tmp_path.as_uri())
    monkeypatch.delenv("RANGEGRID_SETTINGS", raising=False)
    (tmp_path / ".env").write_text("RANGEGRID_WORKERS=3\n")
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        server, worker = serve.write_units(4321)
    with temporary_settings({PREFECT_API_URL: "https://prefect.example/api"}):
        (joined,) = serve.write_units(4321)
    assert joined == worker
    assert "https://prefect.example/api" in joined.read_text()
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        serve.write_units(4321)
    assert "KillMode=process" in worker.read_text()
    assert "KillMode" not in server.read_text()
    for unit in (server, worker):
        assert f'Environment="RANGEGRID_SETTINGS={tmp_path}/.env"' in unit.read_text()
        assert "http://127.0.0.1:4321/api" in unit.read_text()
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed: the units were not verified")
    checked = subprocess.run(["systemd-analyze", "verify", "--user", server, worker], capture_output=True, text=True)
    ours = [line for line in checked.stderr.splitlines() if "rangegrid" in line]
    assert not ours, checked.stderr


@pytest.fixture
def postgres(tmp_path_factory):
    """The URL of a database of a PostgreSQL server of its own; it refuses to be root's."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found or "postgres" not in {user.pw_name for user in pwd.getpwall()}:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    home, (port,) = tmp_path_factory.mktemp("postgres"), servers.free_ports(1)
    for folder in (home, *home.parents[:2]):
        folder.chmod(0o755)
    shutil.chown(home, "postgres")
    data, own = home / "data", {"user": "postgres", "cwd": home, "check": True, "stdout": subprocess.DEVNULL}
    subprocess.run([found[-1], "-D", data, "-A", "trust"], **own)
    control = [found[-1].with_name("pg_ctl"), "-D", data, "-l", home / "log"]
    subprocess.run([*control, "-w", "-o", f"-p {port} -k {home} -h {servers.HOST}", "start"], **own)
    subprocess.run([found[-1].with_name("createdb"), "-h", servers.HOST, "-p", str(port), "prefect"], **own)
    yield f"postgresql://postgres:secret@{servers.HOST}:{port}/prefect"
    subprocess.run([*control, "-m", "fast", "stop"], **own)


@pytest.mark.faults
@pytest.mark.timeout(PATIENCE)
def test_one_setting_gives_the_server_postgresql(postgres, tmp_path, monkeypatch):
    import asyncpg

    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text(f"RANGEGRID_STORAGE_URL=products\nRANGEGRID_PREFECT_DATABASE={postgres}\n")
    (port,) = servers.free_ports(1)
    given = serve.server_environment(settings(), port)
    log = tmp_path / "logs/server.log"
    process = servers.start(servers.prefect_command(port), log, given, bound=True)
    try:
        servers.wait("Prefect", lambda: servers.answers(f"{given['PREFECT_API_URL']}/health"), process, log, PATIENCE)
        with temporary_settings({PREFECT_API_URL: given["PREFECT_API_URL"]}), get_client(sync_client=True) as client:
            made = client.create_flow_from_name("in-postgresql")
    finally:
        servers.stop(process)

    async def flows():
        connection = await asyncpg.connect(postgres)
        return await connection.fetchval("SELECT id FROM flow WHERE name = 'in-postgresql'")

    import asyncio

    assert asyncio.run(flows()) == made
    assert not list((tmp_path / "prefect").glob("*.db"))
