"""Defines `rangegrid ls` and `rangegrid prune`: what is stored and why, and what of it nothing needs."""

import json
import sys
from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
FORM = "{:<27}{:>14}  {:<18}{:<12}{}"


def list_products(as_json: AsJson = False) -> None:
    """List every stored product: its size, when it was last written, what it was made from, and what uses it."""
    from tasks.release.inventory import products

    rows = [describe(product) for product in products().values()]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    print(FORM.format("product", "bytes", "written", "state", "made of; used by"))
    for row in rows:
        print(_line(row))
    print(f"{len(rows)} products, {sum(row['bytes'] for row in rows):,} bytes", file=sys.stderr)


def prune(
    keep: Annotated[
        int, typer.Option(min=0, help="Number of newest products of each kind, and of each line of grids, to keep.")
    ] = 3,
    days: Annotated[float, typer.Option(min=1, help="Keep what was written in the last so many days.")] = 30,
    unfinished: Annotated[bool, typer.Option("--unfinished", help="Also delete what failed runs left behind.")] = False,
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete. Without it, only tell what would be deleted.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Tell which products nothing needs, and with --delete delete them. What a grid in use or a run needs stays."""
    from tasks.release.pruning import prune_all

    found = prune_all(keep, days, unfinished=unfinished, delete=delete, running=under_way())
    rows = [describe(product) for product in found]
    print(json.dumps(rows, indent=2) if as_json else "\n".join(_line(row) for row in rows))
    did = "deleted" if delete else "to delete, with --delete"
    print(f"{len(rows)} products, {sum(row['bytes'] for row in rows):,} bytes, {did}", file=sys.stderr)


def under_way() -> list[dict[str, Any]]:
    """Returns the parameters of the runs under way on the Prefect server; none where no server is set.

    Raises:
        UserError: A server is set and does not answer, so that nothing tells what is in use.
    """
    from prefect.settings import PREFECT_API_URL

    if PREFECT_API_URL.value() is None:
        return []
    from infra.reconcile import begun

    return [run.parameters for run in begun().ours]


def describe(product: Any) -> dict[str, Any]:
    """Returns what JSON and the table show of a product."""
    return {
        "product": product.name,
        "url": product.url,
        "bytes": product.bytes,
        "written": product.changed.strftime("%Y-%m-%d %H:%M"),
        "state": product.state,
        "line": product.line,
        "fingerprint": product.card.fingerprint or None,
        "made_of": list(product.made_of),
        "used_by": list(product.used_by),
    }


def _line(row: dict[str, Any]) -> str:
    parts = [", ".join(row["made_of"]) or "-"] + [f"used by {', '.join(row['used_by'])}"] * bool(row["used_by"])
    return FORM.format(row["product"], f"{row['bytes']:,}", row["written"], row["state"], "; ".join(parts))
