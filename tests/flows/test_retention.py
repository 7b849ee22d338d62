"""Prefect's own retention, switched on as docs/operations.md says, on a server of its own."""

import os
import re
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, LogFilter, LogFilterFlowRunId
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed

from infra.sandbox import servers

PAGE = (Path(__file__).parents[2] / "docs/operations.md").read_text()
PATIENCE = 100


@flow(name="sample")
def sample():
    """Never runs here."""


def ended(client, days, database):
    """A run that ended so many days ago, with a log and an artifact; a server lets none end in the past."""
    run = client.create_flow_run(sample, state=Completed()).id
    when = datetime.now(UTC)
    log = {"name": "x", "level": 20, "message": "x", "timestamp": when.isoformat(), "flow_run_id": str(run)}
    client._client.post("/logs/", json=[log]).raise_for_status()
    client.create_artifact(ArtifactCreate(key=f"k{uuid4().hex}", type="markdown", data="x", flow_run_id=run))
    with closing(sqlite3.connect(database, timeout=PATIENCE)) as rows, rows:
        end = (when - timedelta(days=days)).strftime("%Y-%m-%d %H:%M:%S.%f")
        assert rows.execute("UPDATE flow_run SET end_time = ? WHERE id = ?", (end, str(run))).rowcount == 1
    return run


def rows(client, run):
    """How many logs and artifacts of a run are there."""
    logs = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run])))
    artifacts = client.read_artifacts(artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run])))
    return len(logs), len(artifacts)


@pytest.mark.faults
@pytest.mark.timeout(2 * PATIENCE)
def test_old_runs_go_with_their_logs_and_artifacts(tmp_path):
    """The page's lines in a settings file keep the runs of 90 days."""
    (lines,) = re.findall(r"```sh\n(PREFECT_SERVER_SERVICES_DB_VACUUM.*?)```", PAGE, re.S)
    (tmp_path / ".env").write_text(f"RANGEGRID_STORAGE_URL=products\n{lines}")
    (port,) = servers.free_ports(1)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "RANGEGRID_"))}
    environment |= {"HOME": str(tmp_path), "PREFECT_SERVER_SERVICES_DB_VACUUM_LOOP_SECONDS": "1"}
    command = [str(Path(sys.executable).parent / "rangegrid"), "serve", "--part", "server", "--port", str(port)]
    server = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://{servers.HOST}:{port}/api"
    until = time.monotonic() + PATIENCE
    try:
        while not servers.answers(f"{url}/health"):
            assert server.poll() is None
            assert time.monotonic() < until
            time.sleep(0.2)
        with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
            database = tmp_path / "prefect/prefect.db"
            young, old = ended(client, 89, database), ended(client, 91, database)
            while rows(client, old) != (0, 0):
                assert time.monotonic() < until
                time.sleep(0.2)
            with pytest.raises(ObjectNotFound):
                client.read_flow_run(old)
            assert client.read_flow_run(young).id == young
            assert rows(client, young) == (1, 1)
    finally:
        server.terminate()
        server.wait(60)
