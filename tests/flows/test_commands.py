"""What a command does on the server that is set, and without one; and what it imports."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, LogFilter
from prefect.settings import get_current_settings

from tests.tasks.test_faults import make_inputs

PROGRAM = str(Path(sys.executable).with_name("rangegrid"))
GRID = ["--step", "15", "--tile-cells", "4", "--promote", "false"]
HEAVY = {
    "torch",
    "dask",
    "distributed",
    "prefect",
    "matplotlib",
    "geopandas",
    "sklearn",
    "xarray",
    "rasterio",
    "pystac",
}
LOADED = """
import sys
from flows.cli import main
try:
    main()
except SystemExit:
    pass
print(*{name.partition(".")[0] for name in sys.modules}, file=sys.stderr)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("storage").as_uri()
    make_inputs(home)
    return home


def run(home, *arguments, **variables):
    """Runs the command with its output in files, as `nohup` does."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "RANGEGRID_"))}
    places = {"RANGEGRID_STORAGE_URL": home, "RANGEGRID_CLUSTER": "threads"}
    return subprocess.run(
        [PROGRAM, *arguments], capture_output=True, text=True, env=kept | places | variables, timeout=280
    )


def publish(home, *more, **variables):
    return run(home, "publish", f"{home}/checkpoint", f"{home}/database", *GRID, *more, **variables)


def test_without_a_server_a_command_starts_none_and_tells_how_far_it_is(home, tmp_path):
    ran = publish(home, PREFECT_HOME=str(tmp_path / "prefect"))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip().endswith("/grid.zarr")
    told = [line for line in ran.stderr.splitlines() if line.startswith("publish: ")]
    assert told[0].startswith("publish: 0 of ")
    assert told[-1].endswith(" left")
    assert not list(tmp_path.glob("prefect/*.db"))


def test_on_a_server_it_is_a_run_with_our_tag_a_name_of_its_own_and_logs(home, prefect):
    url = get_current_settings().api.url
    ran = publish(home, "--method", "range+", "--beta", "0.25", PREFECT_API_URL=url)
    assert ran.returncode == 0, ran.stderr
    with get_client(sync_client=True) as client:
        wanted = FlowRunFilter.model_validate({"tags": {"all_": ["rangegrid"]}})
        (seen,) = [
            one for one in client.read_flow_runs(flow_run_filter=wanted) if one.state.message == ran.stdout.strip()
        ]
        logs = client.read_logs(LogFilter.model_validate({"flow_run_id": {"any_": [seen.id]}}))
    assert seen.name == f"publish range+ in steps of 15 of {home}/database"
    assert [log for log in logs if "tiles of land" in log.message]
    assert "INFO" not in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        (["--help"], set()),
        (["publish", "--help"], set()),
        (["grid", "list"], set()),
        (["sample-grid", __file__, "--grid", "grid.zarr", "--output", "/vectors.parquet"], {"xarray"}),
    ],
)
def test_a_command_imports_no_more_than_it_needs(home, arguments, needed):
    """No test holds a time: this holds what takes it."""
    program = LOADED.replace("main()", f"sys.argv = ['rangegrid', *{arguments}]; main()", 1)
    ran = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | {"RANGEGRID_STORAGE_URL": home},
    )
    loaded = set(ran.stderr.splitlines()[-1].split())
    assert "flows" in loaded
    assert HEAVY & loaded == needed
