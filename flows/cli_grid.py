"""Defines `rangegrid grid`: the versions of the grid, and which one readers open."""

import json
import sys
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, help="Manage the versions of the grid, and which one readers open.")

Grid = Annotated[
    str,
    typer.Argument(
        help="latest, previous, latest.LINE, previous.LINE, a fingerprint or its first digits, or the URL of a Zarr."
    ),
]
Line = Annotated[str, typer.Option(help="Product line. `rangegrid grid list` shows them.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
PLACED, STORED = ("step", "crs", "box"), ("dtype", "dims")
COLUMNS = {"state": 11, "fingerprint": 14, "finished": 21, "line": 32} | {"step": 8, "crs": 11, "box": 18}
COLUMNS |= {"dtype": 9, "dims": 6, "resolution_km": 15}  # columns of the table, with their widths in letters
LONGEST = 60  # letters; longest text in a cell of the table, since WKT has thousands
MARKS = {True: "ok  ", False: "FAIL", None: "-   "}


@app.command("list")
def list_versions(as_json: AsJson = False) -> None:
    """List all versions of the grid, the newest first."""
    from tasks.release.versions import versions

    rows = [describe(version) for version in versions()]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    print("".join(f"{name:<{width}}" for name, width in COLUMNS.items()) + "grid")
    for row in rows:
        print("".join(f"{_told(row[name]):<{width}}" for name, width in COLUMNS.items()) + row["grid"])


def describe(version: Any) -> dict[str, Any]:
    """Returns what JSON and the table show of a version."""
    when = version.finished and version.finished.strftime("%Y-%m-%d %H:%M:%S")
    row = {"state": version.state, "fingerprint": version.fingerprint, "finished": when, "line": version.line}
    layout = version.layout
    if layout:
        about = {"step": layout.step, "crs": layout.crs, "box": layout.place}
    else:
        about = dict.fromkeys(PLACED)
    about |= {"dtype": layout.dtype, "dims": layout.dims} if layout else dict.fromkeys(STORED)
    return row | about | {"resolution_km": version.told.card.resolution_km, "grid": version.grid}


def _told(value: Any) -> str:
    """Returns the text of a cell of the table, with a space to the next one."""
    if isinstance(value, float):
        text = f"{value:g}"
    else:
        text = str(value if value is not None else "")
    return f"{text[:LONGEST]} "


@app.command()
def inspect(grid: Grid = "latest") -> None:
    """Tell what a version of the grid was made from, and how large it is, as JSON."""
    from infra.storage import size
    from tasks.cards import home_of, read_card
    from tasks.products import GridCard
    from tasks.release.validation import opened
    from tasks.release.versions import find

    url = find(grid)
    card = read_card(home_of(url), GridCard)
    print(
        json.dumps({"grid": url, "bytes": size(url), "dimensions": dict(opened(url).sizes), **card.stored()}, indent=2)
    )


@app.command()
def validate(grid: Grid = "latest", as_json: AsJson = False) -> None:
    """Check every shard of a version, and compute some cells again. The exit status is 1 where a check fails."""
    from infra import clusters
    from tasks.cards import home_of, read_card
    from tasks.products import GridCard
    from tasks.release.validation import validate_grid
    from tasks.release.versions import find

    url = find(grid)
    card = read_card(home_of(url), GridCard)
    with clusters.connect() as client:
        findings = validate_grid(client, url, card)
    report(findings, as_json)


def report(findings: list[Any], as_json: bool) -> None:
    """Prints findings, and exits with status 1 where one failed."""
    if as_json:
        print(json.dumps([vars(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            print(f"{MARKS[finding.passed]}  {finding.check:<38}{finding.detail}")
    raise typer.Exit(1 if any(finding.passed is False for finding in findings) else 0)


@app.command()
def promote(
    grid: Grid,
    unchecked: Annotated[bool, typer.Option("--unchecked", help="Skip the validation.")] = False,
) -> None:
    """Make a version the latest of its line, after validation."""
    from infra import clusters
    from tasks.cards import home_of, read_card
    from tasks.products import GridCard
    from tasks.release import versions
    from tasks.release.validation import refuse, validate_grid

    url = versions.find(grid)
    since, card = versions.begin(url), read_card(home_of(url), GridCard)
    if not unchecked:
        with clusters.connect() as client:
            refuse(url, validate_grid(client, url, card))
    print(versions.promote(url, since).grid)


@app.command()
def rollback(
    grid: Annotated[str | None, typer.Argument(help="Version to go back to. Default: the previous one.")] = None,
    line: Line = "",
) -> None:
    """Go back to the previous version of a line, or to an earlier version that is named. Default: the first line."""
    from tasks.release import versions

    print(versions.rollback(versions.find(grid) if grid else None, line).grid)


@app.command()
def prune(
    keep: Annotated[int, typer.Option(min=0, help="Number of newest versions of each line to keep.")] = 3,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would be deleted.")] = False,
    unfinished: Annotated[
        bool,
        typer.Option(
            "--unfinished", help="Also delete what failed runs left behind. Use it only while no run is publishing."
        ),
    ] = False,
    line: Line = "",
) -> None:
    """Delete old versions of each line. The latest and the previous version, and what they need, stay."""
    from tasks.release import versions

    for version in versions.prune(keep, unfinished=unfinished, dry_run=dry_run, line=line):
        print(version.grid)


@app.command("diff")
def compare(
    old: Grid,
    new: Grid,
    output: Annotated[str | None, typer.Option(help="Path or URL of a PNG to write: a map of the change.")] = None,
) -> None:
    """Tell which cells changed between two versions, and by how much, as JSON."""
    from infra import clusters
    from tasks.release import diff
    from tasks.release.versions import find

    urls = find(old), find(new)
    with clusters.connect() as client:
        difference = diff.diff(client, *urls)
    print(json.dumps(difference.numbers(), indent=2))
    if output:
        print(diff.keep(difference, *urls, output), file=sys.stderr)
