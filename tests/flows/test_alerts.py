"""The automations on a real Prefect server: what goes wrong reaches who is on duty, as docs/operations.md tells."""

import os
import queue
import re
import socketserver
import subprocess
import sys
import threading
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.events.schemas.automations import AutomationCore
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Running

from infra.deployments import deploy, on_server
from infra.sandbox import servers
from tests.tasks.test_faults import make_inputs

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/operations.md").read_text().split("## Alerts")[1].split("\n## ")[0]
PATIENCE = 120  # seconds: the server looks for events some times a minute
SHORTEST = timedelta(seconds=10)  # in which Prefect misses an event

RUNS = """
import sys
from prefect import flow, tags
from flows.publish import publish
from infra import storage
from infra.errors import UserError
from tasks.cards import home_of
from tasks.params import PublishParams
from tasks.steps import promote_evaluated

checkpoint, database = sys.argv[1:]

@flow
def gate(grid):
    card = {"product": "range+", "n": 100, "block_degrees": 10, "folds": 2, "labels": "x", "scores": [
        {"task": "biome", "embedder": "range+", "metric": "accuracy", "blocked": 0.4, "blocked_low": 0.3},
        {"task": "biome", "embedder": "coordinates", "metric": "accuracy", "blocked": 0.5, "blocked_low": 0.4},
    ]}
    storage.write_json(storage.join(home_of(grid), "scorecard.json"), card)
    promote_evaluated(grid, 0.0, 0.1)

with tags("rangegrid"):
    for beta in (1.0, 0.0):
        grid = publish(checkpoint, database, PublishParams(step=10.0, tile_cells=5, method="range+", beta=beta))
        print(grid)
    for wrong in (lambda: publish(checkpoint, database + "-lost"), lambda: gate(grid)):
        try:
            wrong()
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
def mail():
    """The place of a mail server, and what it was sent."""
    received = queue.Queue()

    class Mail(socketserver.StreamRequestHandler):
        def handle(self):
            self.wfile.write(b"220 ready\r\n")
            for line in self.rfile:
                if line.lower().startswith(b"data"):
                    self.wfile.write(b"354 go on\r\n")
                    received.put(b"".join(iter(self.rfile.readline, b".\r\n")).decode())
                self.wfile.write(b"250 good\r\n")

    with socketserver.ThreadingTCPServer((servers.HOST, 0), Mail) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"{servers.HOST}:{server.server_address[1]}", received
        server.shutdown()


def walk(webhook="https://duty.example.org/alerts", smtp="user:PASSWORD@smtp.example.org:587"):
    """What the page's lines of Python define, at other addresses."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    for theirs, ours in (
        ("https://duty.example.org/alerts", webhook),
        ("mailtos://user:PASSWORD@smtp.example.org:587", f"mailto://{smtp}"),
    ):
        assert theirs in code
        code = code.replace(theirs, ours)
    defined = {}
    exec(code.split("\nwebhook.save")[0], defined)
    return defined, code


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


def hurry(client):
    """Plans ten seconds for a sample, in the automation that tells of one that takes longer."""
    (slow,) = client.read_automations_by_name("rangegrid, a sample that takes longer than planned")
    assert slow.trigger.within == timedelta(hours=12)  # a quarter of the flow's timeout
    slow.trigger.within = SHORTEST
    client.update_automation(slow.id, AutomationCore.model_validate(slow.model_dump(exclude={"id", "owner_resource"})))


def test_the_pages_blocks_reach_a_webhook_and_a_mailbox(told, mail):
    blocks, _ = walk(told[0], mail[0])
    blocks["webhook"].notify(subject="publish: Failed", body="mend it")
    assert told[1].get(timeout=10) == '{"text":"publish: Failed: mend it"}'
    blocks["mail"].notify(subject="publish: Failed", body="mend it")
    letter = mail[1].get(timeout=10)
    assert "Subject: publish: Failed" in letter
    assert "To: duty@example.org" in letter
    assert "mend it" in letter
    (slack,) = blocks["slack"]._apprise_client.servers  # nothing but Slack itself takes what goes there
    assert slack.url().startswith("slack://T0AAAAAAA/B0AAAAAAA/")


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_who_is_on_duty_is_told_of_drift_a_refusal_a_failed_run_and_one_that_takes_long(
    server, told, tmp_path, monkeypatch
):
    url, messages = told
    home = tmp_path.as_uri()
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", home)
    monkeypatch.setenv("RANGEGRID_ALERTS", re.search(r"RANGEGRID_ALERTS=(custom-webhook/\S+)", PAGE)[1])
    exec(walk(url)[1], {})
    deploy(tmp_path / "schedules.yaml")
    with get_client(sync_client=True) as client:
        hurry(client)
        run = client.create_flow_run_from_deployment(on_server(client, "sample").id, name="long", state=Running())
    make_inputs(home)
    inputs = [f"{home}/checkpoint", f"{home}/database"]
    variables = os.environ | server | {"RANGEGRID_STORAGE_URL": home, "RANGEGRID_CLUSTER": "threads"}
    ran = subprocess.run(
        [sys.executable, "-c", RUNS, *inputs], env=variables, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    old, new = ran.stdout.split()
    heard = set()
    while len(heard) < 5:
        heard.add(messages.get(timeout=PATIENCE))
    heard |= set(messages.queue)  # Prefect tells at least once
    assert len(heard) == 5, heard  # nothing of the first version, before which there was none

    def the(*words):
        (one,) = [message for message in heard if all(word in message for word in words)]
        return one

    assert f"its vectors turned from those of {old} (visual mean " in the(f"{new} drifted")
    assert "there is no finished database" in the("publish: Failed")
    assert f"`rangegrid grid promote {new}`" in the(f"{new} was refused")
    assert "is not promoted" in the("gate: Failed")
    assert "long still runs: http" in the("sample takes longer than planned")
    assert str(run.id) in the("sample takes longer than planned")
