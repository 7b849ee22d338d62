"""Runs the demo: the whole pipeline on the demo planet, start to end on one machine."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import typer
from rich.console import Console
from rich.markdown import Markdown

from infra import sandbox, storage
from tasks.artifacts import web_address
from tasks.cards import COMPACT, GRID, home_of, name_of

STAND_IN = "Everything above is NASA Blue Marble at about 7 km standing in for 10 m Sentinel-2."
PICTURES = {
    "patches": ["samples.png"],
    "checkpoint": ["loss.png"],
    "database": ["heads.png"],
    "grid": ["world.png", "evidence.png"],
    "report": ["scores.png", "scores.md", "scores.json", "scorecard.json", "failures.md", "bias.png"],
}
OPTIONS = {
    "--sample-patches": "10000",
    "--sample-patch-pixels": "32",
    "--sample-resolution-m": "5000",
    "--sample-bands": '["B02","B03","B04","B08"]',
    "--train-members": "3",
    "--publish-step": "0.5",
    "--publish-evidence": "true",
    "--evaluate-points": "5000",  # half of the default, and
    "--evaluate-fold-seeds": "2",  # a third fewer splits, since the demo has ten minutes
}
FAREWELL = 20.0  # seconds that an interrupted pipeline has to end by itself, before it is killed


def run(directory: Path, output: Path) -> None:
    """Runs the demo and prints what was made and how to use it.

    Args:
        directory: Where the sandbox keeps its data; a second run goes on from there.
        output: Where the local copies go.
    """
    out = Console(highlight=False, soft_wrap=True)
    with sandbox.running(directory) as box:
        environment = {"RANGEGRID_CLUSTER": "local", "RANGEGRID_WORKERS": "2"} | box.environment()
        made = run_pipeline(environment)
        os.environ.update(environment)
        copies = copy_out(made, output)
        page = web_address(f"{environment['RANGEGRID_STORAGE_URL']}/explorer/index.html")
    out.print(Markdown((output / "scores.md").read_text()))
    out.print(summary(made["grid"], directory, output, copies, page))


def run_pipeline(environment: dict[str, str]) -> dict[str, str]:
    """Runs `rangegrid pipeline` as a user would, and returns the URLs that it prints.

    A process of its own: Prefect sends its last events when the process ends, and the server must still be there.
    """
    command = [str(Path(sys.executable).with_name("rangegrid")), "pipeline"]
    command += [word for option in OPTIONS.items() for word in option]
    print("$", shlex.join(["rangegrid", *command[1:]]), file=sys.stderr)
    with subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            printed, _ = process.communicate()
        except KeyboardInterrupt:
            end(process)
            raise
    if process.returncode:
        raise typer.Exit(process.returncode)
    return dict(line.split() for line in printed.splitlines())


def end(process: subprocess.Popen) -> None:
    """Lets an interrupted child end by itself (a terminal has interrupted it too), else interrupts it, else kills."""
    for how in (None, signal.SIGINT, signal.SIGKILL):
        if how is not None:
            process.send_signal(how)
        try:
            process.wait(FAREWELL if how else FAREWELL / 10)
        except subprocess.TimeoutExpired:
            continue
        return


def copy_out(made: dict[str, str], output: Path) -> list[Path]:
    """Copies the grid and the pictures to `output`, and returns the paths of the pictures."""
    for name in (GRID, COMPACT):
        storage.copy(storage.join(home_of(made["grid"]), name), (output / name).absolute().as_uri())
    copies = []
    for product, names in PICTURES.items():
        for name in names:
            storage.copy(storage.join(home_of(made[product]), name), (output / name).absolute().as_uri())
            copies.append(output / name)
    return copies


def summary(grid: str, directory: Path, output: Path, copies: list[Path], page: str | None) -> str:
    """Returns a text that tells what was made and how to use it.

    Args:
        grid: URL of the grid.
        directory: Where the sandbox keeps its data.
        output: Where the local copies are.
        copies: The pictures.
        page: Address of the explorer in the sandbox, if it was built.
    """
    shown = [f"[bold]Explorer[/]  {page}#grid={name_of(grid)}  (while the sandbox runs)"] if page else []
    lines = [
        f"[bold]Grid[/]      {grid}  (while `rangegrid sandbox up` runs; its data are in {directory})",
        f"[bold]Copy[/]      {output / 'grid.zarr'}",
        "[bold]Pictures[/]  " + ", ".join(str(path) for path in copies if path.suffix == ".png"),
        *shown,
        "",
        "Click through the local copy in the browser:",
        "",
        f"    rangegrid explore {output / 'grid.zarr'}",
        "",
        "Open it with plain xarray:",
        "",
        "    import xarray as xr",
        f'    grid = xr.open_zarr("{output / "grid.zarr"}")',
        '    paris = grid.embedding.sel(lon=2.35, lat=48.86, method="nearest", tolerance=0.25).values',
        "",
        STAND_IN,
    ]
    return "\n".join(lines)
