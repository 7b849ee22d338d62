"""Defines the `rangegrid` command: one subcommand per flow, the demo, the sandbox and the doctor.

Heavy imports happen inside the commands, so that `--help` is quick. Prefect reads its settings at import, and so only
after the command has set them.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from flows import cli_explore, cli_grid, cli_products
from flows.cli_options import with_options
from infra.errors import UserError
from infra.settings import hand_on
from tasks.params import (
    AblateParams,
    Choice,
    EmbedderParams,
    EmbedParams,
    EncodeParams,
    EvaluateParams,
    ImportParams,
    JoinParams,
    Params,
    PipelineParams,
    PublishParams,
    SampleParams,
    Sampling,
    TrainParams,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Make global RANGE geo-embeddings from Sentinel-2.",
)
sandbox_app = typer.Typer(no_args_is_help=True, help="Local STAC, S3 and Prefect servers with the demo planet.")
app.add_typer(sandbox_app, name="sandbox")
sample_app = typer.Typer(invoke_without_command=True, help="Sample Sentinel-2 patches from a STAC catalog.")
app.add_typer(sample_app, name="sample")
checkpoint_app = typer.Typer(no_args_is_help=True, help="Exchange checkpoints with SatCLIP and rangegeo.")
app.add_typer(checkpoint_app, name="checkpoint")
database_app = typer.Typer(no_args_is_help=True, help="Exchange databases with rangegeo, and check them.")
app.add_typer(database_app, name="database")
app.add_typer(cli_grid.app, name="grid")
app.command("explore")(cli_explore.explore)
app.command("ls")(cli_products.list_products)
app.command("prune")(cli_products.prune)


def _url(place: str | None) -> str | None:
    from infra.addresses import as_url

    if place and place.partition(":")[0] != "newest":
        return as_url(place)
    return place


Patches = Annotated[str, typer.Argument(help="Directory or URL of the patches.", callback=_url)]
Checkpoint = Annotated[str, typer.Argument(help="Directory or URL of the checkpoint.", callback=_url)]
Database = Annotated[str, typer.Argument(help="Directory or URL of the database.", callback=_url)]
New = Annotated[str, typer.Argument(help="Directory or URL of the product to make.", callback=_url)]
Output = Annotated[str, typer.Argument(help="Path or URL of the file to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]
Space = Annotated[
    str, typer.Option("--checkpoint", help="Directory or URL of the checkpoint that made its keys.", callback=_url)
]
POINTS = "Path or URL of a table of points with columns lon and lat or a geometry: CSV, Parquet, GeoJSON and others."
Points = Annotated[str, typer.Argument(help=POINTS)]
Lon = Annotated[
    str | None, typer.Option("--lon", help="Column of longitudes in degrees. Unset: recognised by its name.")
]
Lat = Annotated[
    str | None, typer.Option("--lat", help="Column of latitudes in degrees. Unset: recognised by its name.")
]
Directory = Annotated[Path, typer.Option(help="Where the sandbox keeps its data and its state.")]
SANDBOX = Path(".sandbox")


INTERRUPTED = 130  # what a shell reports for SIGINT, and what typer makes of a KeyboardInterrupt


def main() -> None:
    """Runs the command. A user's error is told in one line with exit status 2; an interrupt has status 130."""
    hand_on()
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")  # a server keeps the log instead
    err = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        app()
    except UserError as error:
        err.print("[bold red]error:[/]", escape(str(error)))
        sys.exit(2)
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            err.print("interrupted: run the same command again to go on from here")
        raise
    except Exception as error:  # Prefect's client raises many types where its server does not answer
        if not (type(error).__module__.startswith("httpx") or str(error).startswith("Failed to reach API at")):
            raise
        from prefect.settings import PREFECT_API_URL

        from infra.deployments import silent

        err.print("[bold red]error:[/]", escape(str(silent(PREFECT_API_URL.value(), error))))
        sys.exit(2)


def command(model: type[Params]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a subcommand whose options are the fields of `model`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        app.command(function.__name__, help=function.__doc__)(with_options(model, function))
        return function

    return register


def _sample(context: typer.Context, params: SampleParams) -> None:
    if context.invoked_subcommand is None:
        from flows.sample import sample as flow
        from flows.started import start

        print(start(flow, params))


sample_app.callback()(with_options(SampleParams, _sample))


@sample_app.command()
def explain(
    item: Annotated[str, typer.Argument(help="Path or URL of a STAC item of Sentinel-2 L2A.")],
) -> None:
    """Tell how an item's pixel values are converted to reflectance, and why, as JSON."""
    from tasks.patches.scenes import explain as decision

    print(json.dumps(decision(item), indent=2))


def _plan(params: SampleParams) -> None:
    from infra.settings import settings
    from tasks.patches.estimate import estimate

    for name, value in estimate(params, settings().workers).lines().items():
        print(f"{name:<14}{value:>14}")


sample_app.command("plan", help="Estimate the cost of a run before it runs.")(with_options(SampleParams, _plan))


def _survey(
    params: SampleParams, anew: Annotated[bool, typer.Option("--anew", help="Ask the catalog again.")] = False
) -> None:
    from infra import clusters, storage
    from tasks.patches.survey import survey

    with clusters.connect() as client:
        found = survey(client, params, anew)
    print(storage.read(storage.join(found.url, "survey.md")).decode() + "\n")
    print(found.url)


sample_app.command(
    "survey", help="Count the scenes at the places of a sample, by cell and month, before anything is read."
)(with_options(SampleParams, _survey))


def _import(
    folder: Annotated[str, typer.Argument(help="Directory or URL of the images.", callback=_url)], params: ImportParams
) -> None:
    from infra import clusters
    from tasks.patches.imports import import_patches

    with clusters.connect() as client:
        print(import_patches(client, folder, params))


sample_app.command(
    "import",
    help="Import patches that others made: S2-100K (index.csv and images/), or GeoTIFF chips, as of rslearn.",
)(with_options(ImportParams, _import))


@command(TrainParams)
def train(patches: Patches, params: TrainParams) -> None:
    """Train the location encoder by contrastive learning. Under torchrun it trains in several processes."""
    from flows.train import run

    if url := run(patches, params):
        print(url)


@command(EncodeParams)
def encode(patches: Patches, checkpoint: Checkpoint, params: EncodeParams) -> None:
    """Encode patches into the two-resolution database of RANGE."""
    from flows.encode import encode as flow
    from flows.started import start

    print(start(flow, patches, checkpoint, params))


@command(PublishParams)
def publish(checkpoint: Checkpoint, database: Database, params: PublishParams) -> None:
    """Publish a grid of RANGE+ embeddings as Zarr."""
    from flows.publish import publish as flow
    from flows.started import start

    print(start(flow, checkpoint, database, params))


@command(EvaluateParams)
def evaluate(
    params: EvaluateParams,
    checkpoint: Annotated[
        str | None,
        typer.Argument(help="Directory or URL of the checkpoint. None: other encoders alone.", callback=_url),
    ] = None,
    database: Annotated[
        str | None, typer.Argument(help="Directory or URL of the database encoded with it.", callback=_url)
    ] = None,
    grid: Annotated[
        str | None, typer.Option(help="Path or URL of the grid published from it. It gets a score card.", callback=_url)
    ] = None,
    output: Annotated[
        str | None, typer.Option("--json", help="Path or URL to write the score card to as well.")
    ] = None,
) -> None:
    """Score location embeddings (ours, others' and any grid) by probes, on random and on spatially blocked splits."""
    from flows.evaluate import evaluate as flow
    from flows.started import start
    from infra import storage
    from infra.addresses import as_url
    from tasks.release.gate import CARD

    target = as_url(output) if output else None
    if target:
        storage.check_writable(target.rpartition("/")[0])
    url = start(flow, checkpoint, database, params, grid)
    for name in ("scores", "complementarity", "uncertainty"):
        if storage.exists(table := storage.join(url, f"{name}.md")):
            print(storage.read(table).decode() + "\n")
    if target:
        storage.copy(storage.join(url, CARD), target)
    print(url)


@command(AblateParams)
def ablate(
    choice: Annotated[Choice, typer.Argument(help="Which choice to vary.")],
    checkpoint: Checkpoint,
    database: Database,
    params: AblateParams,
) -> None:
    """Measure what one choice of the retrieval is worth, by the probes of evaluate."""
    from flows.ablate import ablate as flow
    from flows.started import start
    from infra import storage

    url = start(flow, choice, checkpoint, database, params)
    print(storage.read(storage.join(url, "ablation.md")).decode() + "\n")
    print(url)


@command(EmbedderParams)
def geoprior(
    photographs: Annotated[
        str, typer.Argument(help="Path or URL of an .npz with lonlat, labels, train, and log_probs or features.")
    ],
    params: EmbedderParams,
    checkpoint: Annotated[
        str | None, typer.Option(help="Directory or URL of the checkpoint. None: other encoders alone.", callback=_url)
    ] = None,
    database: Annotated[
        str | None, typer.Option(help="Directory or URL of the database encoded with it.", callback=_url)
    ] = None,
) -> None:
    """Measure what location embeddings add to an image classifier (a geographic prior)."""
    from tasks.evaluation.embedders import embedders
    from tasks.evaluation.geoprior import geo_prior, read_photographs

    with read_photographs(photographs) as found:
        table = geo_prior(found, embedders(checkpoint, database, None, params))
    print(table.to_string(index=False, na_rep="-"))


@command(EmbedParams)
def embed(
    points: Points,
    checkpoint: Annotated[str, typer.Option(help="Directory or URL of the checkpoint, or a SatCLIP .ckpt.")],
    database: Annotated[str, typer.Option(help="Directory or URL of the database, or a range_db .npz.")],
    output: Annotated[str, typer.Option(help="Path or URL of the .parquet or .zarr to write.")],
    params: EmbedParams,
    overwrite: Overwrite = False,
    lon: Lon = None,
    lat: Lat = None,
) -> None:
    """Embed a table of points, and write its columns with their embeddings."""
    from tasks.points.embed import embed_file

    print(embed_file(points, checkpoint, database, output, params, overwrite, lon, lat))


@app.command("sample-grid")
def sample_grid(
    points: Points,
    grid: Annotated[str, typer.Option(help="Directory or URL of the grid's Zarr.", callback=_url)],
    output: Annotated[str, typer.Option(help="Path or URL of the .parquet to write.")],
    method: Annotated[
        Sampling, typer.Option(help="The cell that a point is in, or the weighted mean of four.")
    ] = "nearest",
    overwrite: Overwrite = False,
    lon: Lon = None,
    lat: Lat = None,
) -> None:
    """Add the embeddings of a published grid to a table of points, and the reason where a point has none."""
    from tasks.points.sample_grid import sample_file

    print(sample_file(points, grid, output, method, overwrite, lon, lat))


@checkpoint_app.command("import")
def import_checkpoint(
    file: Annotated[str, typer.Argument(help="Path or URL of a satclip-*.ckpt.")], directory: New
) -> None:
    """Import a SatCLIP checkpoint, its location and its image encoder. No code in the file is executed."""
    from tasks.model.satclip import import_satclip

    card = import_satclip(file, directory)
    print(directory)
    print(f"image encoder {card.encoder.name}" if card.encoder else card.image_side, file=sys.stderr)


@checkpoint_app.command("export")
def export_checkpoint(checkpoint: Checkpoint, file: Output, overwrite: Overwrite = False) -> None:
    """Export a checkpoint as a .ckpt that rangegeo loads."""
    from tasks.model.satclip import export_satclip

    print(export_satclip(checkpoint, file, overwrite))


@database_app.command("import")
def import_database(
    file: Annotated[str, typer.Argument(help="Path or URL of a range_db_*.npz.")], directory: New, checkpoint: Space
) -> None:
    """Import a published RANGE database after a check of its numbers. No code in the file is executed."""
    from tasks.database.npz import import_npz

    import_npz(file, directory, checkpoint)
    print(directory)


@database_app.command("export")
def export_database(database: Database, file: Output, overwrite: Overwrite = False) -> None:
    """Export a database as a .npz that rangegeo reads."""
    from tasks.database.npz import export_npz

    print(export_npz(database, file, overwrite))


def _join(
    databases: Annotated[list[str], typer.Argument(help="Directories or URLs of the databases.")], params: JoinParams
) -> None:
    from flows.join import join as flow
    from flows.started import start

    print(start(flow, [str(_url(place)) for place in databases], params))


database_app.command(
    "join", help="Join databases of one checkpoint: each image counts as much as the land that it stands for."
)(with_options(JoinParams, _join))


@database_app.command("audit")
def audit(
    database: Database,
    patches: Annotated[
        str | None, typer.Option(help="Directory or URL of the patches, to encode some of them again.", callback=_url)
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Directory or URL of the checkpoint that made its keys.", callback=_url)
    ] = None,
    sample: Annotated[int, typer.Option(min=2, help="Number of images to encode again.")] = 64,
    as_json: cli_grid.AsJson = False,
) -> None:
    """Check that a database is sound, and that the key, value and place of each row belong to the same image."""
    from tasks.database.audit import audit_database

    findings = audit_database(database, patches, checkpoint, sample)
    cli_grid.report(findings, as_json)


@command(PipelineParams)
def pipeline(params: PipelineParams) -> None:
    """Run sample, train, encode, publish and evaluate in this order."""
    from flows.pipeline import pipeline as flow
    from flows.started import start

    for name, url in start(flow, params).items():
        print(f"{name:<13}{url}")


@app.command()
def demo(
    directory: Directory = SANDBOX,
    output: Annotated[Path, typer.Option(help="Directory of the local copies.")] = Path("demo"),
) -> None:
    """Run the whole pipeline on the demo planet, on this machine, and copy the grid and its pictures."""
    from flows.demo import run

    run(directory, output)


@app.command()
def doctor() -> None:
    """Check what is installed, reachable and writable."""
    from flows.doctor import checks, line

    failed = 0
    for name, found, good in checks():
        print(line(name, found, good), flush=True)
        failed += not good
    raise typer.Exit(1 if failed else 0)


@sandbox_app.command()
def up(directory: Directory = SANDBOX) -> None:
    """Start the servers and print how to use them. The first start builds the demo planet."""
    from infra import sandbox

    box = sandbox.up(directory)
    for name, value in box.environment().items():
        print(f"export {name}={value}")


@sandbox_app.command()
def down(directory: Directory = SANDBOX) -> None:
    """Stop the servers and keep their data."""
    from infra import sandbox

    sandbox.down(directory)


@sandbox_app.command()
def status(directory: Directory = SANDBOX) -> None:
    """Tell which servers are running."""
    from infra import sandbox

    sandbox.require(directory)
    for name, state in sandbox.status(directory).items():
        print(f"{name:<10}{state}")


@app.command()
def reconcile(
    silent_minutes: Annotated[
        float,
        typer.Option(
            min=0, help="Minutes without a heartbeat after which a run counts as dead. A run sends one every 3."
        ),
    ] = 15,
) -> None:
    """End flow runs of rangegrid that were killed and still show as RUNNING. A rerun resumes from what is stored."""
    from infra.reconcile import begun
    from infra.reconcile import reconcile as end

    found = begun()
    print(
        f"{found.server}: {len(found.ours)} runs of rangegrid under way, and {len(found.others)} of others, left alone",
        file=sys.stderr,
    )
    ended = end(silent_minutes)
    for run in ended:
        print(f"{run.id}  {run.name}")
    print(f"{len(ended)} silent for {silent_minutes:g} minutes, and ended", file=sys.stderr)


Schedules = Annotated[
    Path | None, typer.Option(help="YAML file of your schedules. Default: schedules.yaml beside the settings file.")
]
TakeOption = Annotated[
    Literal["ui", "file"] | None,
    typer.Option(help="Where the UI and your schedules differ: ui keeps what the UI has, file replaces it."),
]


@app.command()
def deploy(schedules: Schedules = None, take: TakeOption = None) -> None:
    """Create or update the deployments, with your schedules and parameters, on the Prefect server that is set."""
    from infra.deployments import deploy as lay

    for told in lay(schedules, take):
        print(f"{told.name}: {told.what}")
    print("deployed")


@app.command()
def serve(
    port: Annotated[
        int, typer.Option(min=1, max=65_535, envvar="PREFECT_SERVER_API_PORT", help="Port of the Prefect server.")
    ] = 4200,
    schedules: Schedules = None,
    take: TakeOption = None,
    systemd: Annotated[
        bool, typer.Option("--systemd", help="Write systemd units that serve permanently, and exit.")
    ] = False,
    part: Annotated[
        Literal["server", "worker"] | None, typer.Option(help="Run only this part, as a systemd unit does.")
    ] = None,
) -> None:
    """Serve on this machine until Ctrl-C: a Prefect server, the deployments, your schedules, and a worker."""
    from infra import serve as one

    if part:
        one.become(part, port, schedules)
    elif systemd:
        units = one.write_units(port)
        print(*units, sep="\n")
        print("systemctl --user daemon-reload")
        print(f"systemctl --user enable --now {' '.join(unit.stem for unit in units)}")
        print("loginctl enable-linger    # so that they run while you are not logged in")
    else:
        one.serve(port, schedules, take, lambda line: print(line, flush=True))
