"""The automations on a real Prefect server: a failed run and a drifting grid reach who is on duty, with what to do."""

import os
import queue
import subprocess
import sys
import threading
import uuid
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import get_client
from prefect.events.schemas.automations import AutomationCore
from prefect.settings import PREFECT_API_URL, temporary_settings

from infra.sandbox import servers
from tests.tasks.test_faults import make_inputs

ROOT = Path(__file__).parents[2]
NOWHERE = str(uuid.UUID(int=0))  # stands in the file for the block of whoever installs it
PATIENCE = 120  # seconds: the server looks for events some times a minute
pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

RUNS = """
import sys
from prefect import tags
from flows.publish import publish
from infra.errors import UserError
from tasks.params import PublishParams

checkpoint, database = sys.argv[1:]
with tags("rangegrid"):
    for beta in (1.0, 0.0):
        print(publish(checkpoint, database, PublishParams(step=10.0, tile_cells=5, beta=beta)))
    try:
        publish(checkpoint, database + "-lost")
    except UserError:
        pass
"""


@pytest.fixture
def told():
    """A webhook's URL, and the messages that it was sent."""
    messages = queue.Queue()

    class Webhook(BaseHTTPRequestHandler):
        def do_POST(self):
            messages.put(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            """Says nothing."""

    server = HTTPServer((servers.HOST, 0), Webhook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://{servers.HOST}:{server.server_port}", messages
    server.shutdown()


@pytest.fixture
def server(tmp_path):
    """The variables of a Prefect server of its own."""
    (port,) = servers.free_ports(1)
    variables = {"PREFECT_API_URL": f"http://{servers.HOST}:{port}/api", "PREFECT_HOME": str(tmp_path / "prefect")}
    log = tmp_path / "logs/server.log"
    process = servers.start(servers.prefect_command(port), log, variables, bound=True)
    servers.wait("prefect", lambda: servers.answers(variables["PREFECT_API_URL"] + "/health"), process, log)
    with temporary_settings({PREFECT_API_URL: variables["PREFECT_API_URL"]}):
        yield variables
    servers.stop(process)


def install(webhook):
    """Makes the automations of the file, which tell the webhook."""
    block = CustomWebhookNotificationBlock(name="duty", url=webhook, json_data={"text": "{{subject}} | {{body}}"})
    known = block.save("duty")
    text = (ROOT / "infra/automations.yaml").read_text().replace(NOWHERE, str(known))
    with get_client(sync_client=True) as client:
        for automation in yaml.safe_load(text)["automations"]:
            client.create_automation(AutomationCore.model_validate(automation))


def test_who_is_on_duty_is_told_of_a_drifting_grid_and_of_a_failed_run(server, told, tmp_path):
    webhook, messages = told
    install(webhook)
    home = tmp_path.as_uri()
    make_inputs(home)
    inputs = [f"{home}/checkpoint", f"{home}/database"]
    variables = os.environ | server | {"RANGEGRID_STORAGE_URL": home, "RANGEGRID_CLUSTER": "threads"}
    ran = subprocess.run(
        [sys.executable, "-c", RUNS, *inputs], env=variables, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    old, new = ran.stdout.split()
    heard = set()
    while len(heard) < 2:
        heard.add(messages.get(timeout=PATIENCE))
    heard |= set(messages.queue)  # Prefect tells at least once
    assert len(heard) == 2, heard  # nothing of the first version, before which there was none
    failed, drifted = sorted(heard, key=lambda text: "drifted" in text)
    assert f"{new} drifted" in drifted
    assert f"its vectors turned from those of {old} (visual mean " in drifted
    assert "publish: Failed" in failed
    assert "there is no finished database" in failed
