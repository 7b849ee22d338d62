"""The command as its user meets it: in a process of its own."""

import io
import json
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest

from flows.cli import main
from flows.doctor import seen
from tests.waiting import until

PROGRAM = str(Path(sys.executable).with_name("rangegrid"))


def run(*arguments, **variables):
    return subprocess.run(
        [PROGRAM, *arguments], capture_output=True, text=True, env=os.environ | variables, timeout=300
    )


def run_here(*arguments):
    """The same in this process, without the seconds of its imports; an error that is not told ends the test."""
    out, err = io.StringIO(), io.StringIO()
    argv = mock.patch.object(sys, "argv", ["rangegrid", *map(str, arguments)])
    with (
        argv,
        mock.patch.dict(os.environ),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        main()
    return subprocess.CompletedProcess(arguments, end.value.code or 0, out.getvalue(), err.getvalue())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pipeline", "--sample-north", "95"], "--sample-north '95': Input should be less than or equal to 84"),
        (["publish", "--step", "-1", "a", "b"], "--step '-1'"),
        (
            ["publish", "--step", "0.7", "a", "b"],
            "a step of 0.7 does not divide the box of 360 x 180 degree: use",
        ),
        (["publish", "--tolerance", "0.01", "--keep-sums", "true", "a", "b"], "without a tolerance"),
        (["sandbox", "status", "--directory", "/nowhere"], "there is no sandbox in /nowhere"),
        (["sandbox", "down", "--directory", "/nowhere"], "there is no sandbox in /nowhere"),
        (["sample", "--bogus", "1"], "No such option"),
        (["nonsense"], "No such command"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(arguments, message):
    ran = run_here(*arguments)
    assert ran.returncode == 2
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr


def test_an_interrupt_says_how_to_go_on(tmp_path):
    command = [PROGRAM, "demo", "--directory", tmp_path / "box", "--output", tmp_path / "demo"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        until(lambda: list(tmp_path.glob("box/s3/*")))  # its first server works: the planet is being built
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again to go on from here" in said
    assert "Traceback" not in said
    assert json.loads((tmp_path / "box/state.json").read_text())["processes"] == {}


@pytest.mark.parametrize(
    "command",
    [
        ["sample", "--patches", "3"],
        *(pytest.param([name], marks=pytest.mark.further) for name in ("reconcile", "deploy")),
    ],
)
def test_a_server_that_is_gone_is_told_in_one_sentence(tmp_path, nobody, command):
    ran = run(*command, PREFECT_API_URL=f"http://{nobody}/api", RANGEGRID_STORAGE_URL=tmp_path.as_uri())
    assert ran.returncode == 2
    assert f"no Prefect server answers at http://{nobody}/api" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_what_prefect_needs_may_be_in_the_settings_file(tmp_path, nobody):
    """It counts as set, and is asked."""
    (tmp_path / "own.env").write_text(f"PREFECT_API_URL=http://{nobody}/api\n")
    ran = run("reconcile", RANGEGRID_SETTINGS=str(tmp_path / "own.env"))
    assert ran.returncode == 2
    assert f"no Prefect server answers at http://{nobody}/api" in ran.stderr


def test_the_doctor_tells_what_fails(tmp_path, nobody):
    ran = run(
        "doctor",
        RANGEGRID_STORAGE_URL=tmp_path.as_uri(),
        RANGEGRID_STAC_URL=f"http://{nobody}",
        RANGEGRID_CLUSTER="threads",
    )
    assert ran.returncode == 1
    lines = {line.split()[1]: line for line in ran.stdout.splitlines()}
    assert lines["storage"].startswith("ok")
    assert lines["cluster"].startswith("ok")
    assert lines["catalog"].startswith("FAIL")
    assert f"no STAC API answers at http://{nobody}" in lines["catalog"]


def test_the_doctor_tells_that_profiles_are_not_read(monkeypatch, nobody):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    monkeypatch.setenv("RANGEGRID_STORAGE_URL", "s3://bucket")
    monkeypatch.setenv("RANGEGRID_STAC_URL", f"http://{nobody}")
    monkeypatch.setenv("AWS_PROFILE", "lab")
    found = {name: (said, good) for name, said, good in seen()}
    assert "profiles and SSO are not read" in found["storage"][0]
    assert not found["storage"][1]


def test_the_doctor_is_content_with_the_sandbox(sandbox):
    ran = run("doctor")
    assert ran.returncode == 0, ran.stdout
