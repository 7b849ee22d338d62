"""`rangegrid grid`: the versions of the grid, and which one readers open."""

import json
import sys
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, help="The versions of the grid, and which one readers open.")

Grid = Annotated[
    str, typer.Argument(help="latest, previous, a fingerprint or its first digits, or the directory or URL of a Zarr.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
MARKS = {True: "ok  ", False: "FAIL", None: "-   "}


@app.command("list")
def list_versions(as_json: AsJson = False) -> None:
    """List all versions, the newest first."""
    from tasks.versions import versions

    rows = [describe(version) for version in versions()]
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        for row in rows:
            print(f"{row['state']:<11}{row['fingerprint']:<14}{row['finished'] or '':<21}{row['grid']}")


def describe(version: Any) -> dict[str, Any]:
    """A version as JSON has it."""
    when = version.finished and version.finished.strftime("%Y-%m-%d %H:%M:%S")
    return {"fingerprint": version.fingerprint, "state": version.state, "finished": when, "grid": version.grid}


@app.command()
def inspect(grid: Grid = "latest") -> None:
    """Tell what a version was made of, and how large it is, as JSON."""
    from infra.storage import size
    from tasks.cards import read_card
    from tasks.updates import home_of
    from tasks.validation import opened
    from tasks.versions import find

    url = find(grid)
    card = read_card(home_of(url), "grid")
    print(json.dumps({"grid": url, "bytes": size(url), "dimensions": dict(opened(url).sizes), **card}, indent=2))


@app.command()
def validate(grid: Grid = "latest", as_json: AsJson = False) -> None:
    """Check a version: every shard, and some cells computed again; status 1 where a check fails."""
    from infra import clusters
    from tasks.cards import read_card
    from tasks.updates import home_of
    from tasks.validation import validate_grid
    from tasks.versions import find

    url = find(grid)
    card = read_card(home_of(url), "grid")
    with clusters.connect() as client:
        findings = validate_grid(client, url, card)
    report(findings, as_json)


def report(findings: list[Any], as_json: bool) -> None:
    """Prints findings, and ends with status 1 where one failed."""
    if as_json:
        print(json.dumps([vars(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            print(f"{MARKS[finding.passed]}  {finding.check:<38}{finding.detail}")
    raise typer.Exit(1 if any(finding.passed is False for finding in findings) else 0)


@app.command()
def promote(
    grid: Grid,
    unchecked: Annotated[bool, typer.Option("--unchecked", help="Do not validate it first.")] = False,
) -> None:
    """Make a version the latest, after validation."""
    from infra import clusters
    from tasks import versions
    from tasks.cards import read_card
    from tasks.updates import home_of
    from tasks.validation import refuse, validate_grid

    url = versions.find(grid)
    since, card = versions.begin(url), read_card(home_of(url), "grid")
    if not unchecked:
        with clusters.connect() as client:
            refuse(url, validate_grid(client, url, card))
    print(versions.promote(url, since).grid)


@app.command()
def rollback(
    grid: Annotated[str | None, typer.Argument(help="Which version; by default the previous one.")] = None,
) -> None:
    """Go back to the previous version, or to a named earlier one."""
    from tasks import versions

    print(versions.rollback(versions.find(grid) if grid else None).grid)


@app.command()
def prune(
    keep: Annotated[int, typer.Option(min=0, help="How many of the newest versions to keep.")] = 3,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Delete nothing; tell what would be.")] = False,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Also what broken runs left; give it while no run publishes.")
    ] = False,
) -> None:
    """Delete old versions; never the latest, the previous one, or what these need."""
    from tasks import versions

    for version in versions.prune(keep, unfinished=unfinished, dry_run=dry_run):
        print(version.grid)


@app.command("diff")
def compare(
    old: Grid,
    new: Grid,
    output: Annotated[str | None, typer.Option(help="Path or URL of a PNG: the map of the change.")] = None,
) -> None:
    """Tell which cells moved between two versions, and by how much, as JSON."""
    from infra import clusters
    from tasks import comparison
    from tasks.versions import find

    urls = find(old), find(new)
    with clusters.connect() as client:
        difference = comparison.diff(client, *urls)
    print(json.dumps(difference.numbers(), indent=2))
    if output:
        print(comparison.keep(difference, *urls, output), file=sys.stderr)
