"""The demo: the whole pipeline on the demo planet, start to end on one machine."""

import os
from pathlib import Path

from prefect.settings import PREFECT_API_URL, temporary_settings
from rich.console import Console
from rich.markdown import Markdown

from flows.pipeline import PipelineParams, pipeline
from infra import sandbox, storage
from tasks.publish import PublishParams
from tasks.sample import SampleParams

STAND_IN = "NASA Blue Marble at about 7 km stands in for 10 m Sentinel-2 in everything above."
PICTURES = {
    "patches": ["samples.png"],
    "checkpoint": ["loss.png"],
    "grid": ["world.png"],
    "report": ["scores.png", "scores.md", "scores.json"],
}
PARAMS = PipelineParams(
    sample=SampleParams(patches=10_000, patch_pixels=32, resolution_m=5_000, bands=("B02", "B03", "B04", "B08")),
    publish=PublishParams(step_degrees=0.5),
)


def run(directory: Path, output: Path) -> None:
    """Runs the demo and prints what was made and how to use it.

    Args:
        directory: Where the sandbox keeps its data; a second run goes on from there.
        output: Where the local copies go.
    """
    out = Console(highlight=False, soft_wrap=True)
    with sandbox.running(directory) as box:
        environment = {"RANGEGRID_CLUSTER": "local", "RANGEGRID_WORKERS": "2"} | box.environment()
        os.environ.update(environment)
        with temporary_settings({PREFECT_API_URL: environment["PREFECT_API_URL"]}):  # Prefect has read its own
            made = pipeline(PARAMS)
        copies = copy_out(made, output)
    out.print(Markdown((output / "scores.md").read_text()))
    out.print(summary(made["grid"], directory, output, copies))


def copy_out(made: dict[str, str], output: Path) -> list[Path]:
    """Copies the grid and the pictures to `output`, and returns the paths of the pictures."""
    storage.copy(made["grid"], (output / "grid.zarr").absolute().as_uri())
    copies = []
    for product, names in PICTURES.items():
        home = made[product].removesuffix("/grid.zarr")
        for name in names:
            storage.copy(storage.join(home, name), (output / name).absolute().as_uri())
            copies.append(output / name)
    return copies


def summary(grid: str, directory: Path, output: Path, copies: list[Path]) -> str:
    """What was made and how to use it."""
    lines = [
        f"[bold]Grid[/]      {grid}  (while `rangegrid sandbox up` runs; its data are in {directory})",
        f"[bold]Copy[/]      {output / 'grid.zarr'}",
        "[bold]Pictures[/]  " + ", ".join(str(path) for path in copies if path.suffix == ".png"),
        "",
        "Open it with plain xarray:",
        "",
        "    import xarray as xr",
        f'    grid = xr.open_zarr("{output / "grid.zarr"}")',
        '    paris = grid.embedding.sel(lon=2.35, lat=48.86, method="nearest").values',
        "",
        STAND_IN,
    ]
    return "\n".join(lines)
