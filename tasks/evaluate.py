"""Runs the evaluate step: the paper's comparison for a database, a grid or any encoder, and where they fail."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from infra import storage
from infra.addresses import as_url, is_web, shown
from infra.errors import UserError
from tasks.artifacts import keep_picture, keep_table, markdown_table, opening, show_places, slugs
from tasks.cards import fingerprint, home_of, is_finished, product_url, whole_of, write_card
from tasks.core.conformal import COVERAGE
from tasks.core.evidence import distance_km, evidence
from tasks.database.heads import HEAD_DIMS
from tasks.database.store import read_pair
from tasks.evaluation import fusion
from tasks.evaluation.coordbench import markdown as leaderboards
from tasks.evaluation.coordbench import read_suite, score_suite, versions
from tasks.evaluation.embedders import Lonlat, Named, beside_grids, dtype_costs, embedders, retrieval_of
from tasks.evaluation.failures import losses, spread, where_it_fails
from tasks.evaluation.label_tables import UNTOLD, counted, label_sets
from tasks.evaluation.labels import LabelSet
from tasks.evaluation.score_tables import keep_scores, named_apart, records
from tasks.evaluation.scoring import Scored, digest, find_references, score_all
from tasks.evaluation.uncertainty import Uncertainty, uncertainty
from tasks.evaluation.uncertainty import markdown as uncertainty_tables
from tasks.grid.tiles import load
from tasks.params import EvaluateParams
from tasks.plots.charts import bias_chart, score_chart
from tasks.plots.maps import error_map, place_map
from tasks.products import DatabaseCard, ReportCard
from tasks.release.gate import CARD
from tasks.release.stac import COMPACT_CARD, ITEM, write_item
from tasks.tables.regions import decides, find_region
from tasks.units import log, progress

CAPTION = (
    "Linear probes; wide pale bars: random split; narrow full bars: whole blocks held out, deviation over splits; "
    "▲ ▼: beyond noise above or below the reference."
)
PRODUCTS = ("grid", "multi-head", "RANGE+", "RANGE", "location encoder")  # the card is about the first that is scored


def evaluate_database(
    checkpoint: str | None, database: str | None, params: EvaluateParams, grid: str | None = None
) -> str:
    """Scores every embedder on every task, and stores the report.

    Args:
        checkpoint: URL of the checkpoint. None: only other encoders or grids are evaluated.
        database: URL of the database encoded with it.
        params: Which labels, embedders and splits.
        grid: URL of the grid published from them. It is scored too; its score card is stored beside it and named by its
            STAC item.

    Returns:
        The URL of the report: `scorecard.json`, `scores.json`, `scores.md`, `scores.csv`, `scores.png`, for fused
        embedders `complementarity.csv` and `.md`, and for the product `failures.csv`, `failures.md`, `bias.png`,
        `errors-TASK.png`, `uncertainty.csv`, `uncertainty.md`, `signals.csv` and `uncertainty-TASK.png`.

    Raises:
        UserError: Labels, embedders or products do not exist or do not fit.
    """
    if params.suite:
        return evaluate_suite(checkpoint, database, params, grid)
    params, card = counted(params), read_inputs(checkpoint, database)
    if grid:
        check_grid(grid)
    scored_by = embedders(checkpoint, database, grid, params)
    find_references(scored_by, params.reference)
    sets = label_sets(params)
    beside = beside_grids(checkpoint, database, grid, scored_by, params)
    made_of = made_from(card, scored_by, sets, params, grid)
    if grid:
        made_of["beside"] = [one.name for one in beside]  # which the reports of former versions lack
    url = product_url("reports", made_of)
    if not is_finished(url):
        with progress("evaluate", len(scored_by)) as advance:
            scored = score_all(sets, scored_by, params, advance, beside)
        attribution = card.attribution if card else ""
        report(url, scored, f"{CAPTION}\n{attribution}")
        product, scores = product_of(scored.table), records(scored.table)
        content = {"kind": "scorecard", "product": product, "made_of": made_of, "scores": scores}
        content |= about_all(url, card, scored, scored_by)
        content["geographic_bias"] = explain(url, scored, product, distances(checkpoint, database), attribution)
        evidence_at = layers(checkpoint, database, grid, product)
        content["uncertainty"] = tell_uncertainty(url, scored, product, evidence_at, attribution)
        storage.write_json(storage.join(url, CARD), content)
        write_card(url, ReportCard(fingerprint=fingerprint(made_of), made_of=made_of, scores=tuple(scores)))
    places = {"score card": storage.join(url, CARD), "table": storage.join(url, "scores.md")}
    if grid:
        home = home_of(whole_of(grid))
        places["score card beside the grid"] = kept = storage.join(home, card_name(grid))
        storage.copy(places["score card"], kept)
        if storage.exists(storage.join(home, ITEM)):
            write_item(home)  # again, since it names the score card now
    opens = opening("pandas as pd", "scores = pd.read_csv", storage.join(url, "scores.csv"))
    show_places(places, opens, "score-card", "The score card, and the table of scores")
    return url


def evaluate_suite(checkpoint: str | None, database: str | None, params: EvaluateParams, grid: str | None) -> str:
    """Scores every embedder on CoordBench by its protocol, and stores the report.

    Args:
        checkpoint: URL of the checkpoint. None: only other encoders or grids are evaluated.
        database: URL of the database encoded with it.
        params: The suite's folder, and the embedders.
        grid: URL of a published grid. It is scored too.

    Returns:
        The URL of the report: `scorecard.json`, `scores.csv`, in CoordBench's own columns, and `scores.md`, its
        leaderboards.

    Raises:
        UserError: Tables, embedders or products do not exist or do not fit.
    """
    card = read_inputs(checkpoint, database)
    scored_by = embedders(checkpoint, database, grid, params)
    folder = as_url(params.data or "")
    made_of = {
        "suite": versions(folder),
        "interpolation": params.interpolation,
        "database": card.fingerprint if card else None,
        "grid": grid,
        "embedders": {one.name: one.version if one.embed else None for one in scored_by},
    }
    url = product_url("reports", made_of)
    if not is_finished(url):
        suite = read_suite(folder)
        with progress("evaluate", len(scored_by)) as advance:
            scores = score_suite(suite, scored_by, advance)
        storage.write(storage.join(url, "scores.csv"), scores.to_csv(index=False).encode())
        keep_table(storage.join(url, "scores.md"), leaderboards(scores), "coordbench", "CoordBench")
        content = {"kind": "coordbench", "made_of": made_of, "scores": records(scores)}
        storage.write_json(storage.join(url, CARD), content)
        write_card(url, ReportCard(fingerprint=fingerprint(made_of), made_of=made_of, scores=tuple(records(scores))))
    places = {"score card": storage.join(url, CARD), "table": storage.join(url, "scores.md")}
    opens = opening("pandas as pd", "scores = pd.read_csv", storage.join(url, "scores.csv"))
    show_places(places, opens, "score-card", "The score card, and the leaderboards")
    return url


def read_inputs(checkpoint: str | None, database: str | None) -> DatabaseCard | None:
    """Returns the database's card; None where no database is evaluated.

    Raises:
        UserError: Only one of the two is given, or they do not belong together.
    """
    if checkpoint and database:
        return read_pair(checkpoint, database)
    if checkpoint or database:
        raise UserError("a checkpoint and a database are evaluated together: give both, or neither")
    return None


def card_name(grid: str) -> str:
    """Returns the name of the score card beside a grid: a compact product has its own, which no gate reads."""
    return CARD if whole_of(grid) == as_url(grid).rstrip("/") else COMPACT_CARD


def check_grid(grid: str) -> None:
    """Refuses, before any work, a grid beside which no score card can be stored."""
    if is_web(grid):
        raise UserError(f"no score card can be stored beside {shown(grid)}: score it by --embedder {shown(grid)}")
    storage.check_writable(home_of(whole_of(grid)))


def made_from(
    card: DatabaseCard | None, found: list[Named], sets: list[LabelSet], params: EvaluateParams, grid: str | None
) -> dict[str, Any]:
    """Returns everything that decides the scores, with labels and weights by their content."""
    return {
        **params.model_dump(mode="json", exclude=UNTOLD),
        **decides(find_region(params.region, params.buffer_km)),
        "database": card.fingerprint if card else None,
        "grid": grid,
        "embedders": {one.name: one.version if one.embed else None for one in found},
        "labels": {labels.name: digest(labels) for labels in sets},
    }


def report(url: str, scored: Scored, caption: str) -> None:
    """Stores the scores as JSON, CSV, Markdown and a picture."""
    keep_scores(url, "scores", scored.table, "scores", "Scores of linear probes")
    picture = score_chart(named_apart(scored.table), "What the embeddings know", caption)
    keep_picture(storage.join(url, "scores.png"), picture, "score-chart", "Scores of linear probes")
    for section in scored.sections:
        for made in section.trials:
            facts = made.facts
            log().info(
                "%s, %s: %d places, %d left out; near-duplicates across the split: %d random, %d blocked",
                *(made.labels.name, section.name, facts["n"], facts["left_out"]),
                *(facts["near_random"], facts["near_blocked"]),
            )


def about_all(url: str, card: DatabaseCard | None, scored: Scored, scored_by: list[Named]) -> dict[str, Any]:
    """Returns what the score card tells of more than the product, as far as there is any."""
    told: dict[str, Any] = {}
    if card and card.images <= min(card.value_dim, HEAD_DIMS):
        told["few_images"] = True
    if costs := dtype_costs(records(scored.table)):
        told["dtype_costs"] = costs
    if parts := {one.name: one.parts for one in scored_by if one.parts}:
        told["complementarity"] = compare_fused(url, scored.table, parts)
    return told


def compare_fused(url: str, table: pd.DataFrame, parts: dict[str, tuple[str, ...]]) -> list[dict[str, Any]]:
    """Stores what fused embedders have above their best part, and returns it as rows."""
    indices = fusion.complementarity(table, parts)
    storage.write(storage.join(url, "complementarity.csv"), indices.to_csv(index=False).encode())
    title = "Complementarity of fused embedders"
    keep_table(storage.join(url, "complementarity.md"), fusion.markdown(indices), "complementarity", title)
    return records(indices)


def product_of(table: pd.DataFrame) -> str:
    """Returns the embedder that the score card is about: one of ours, else the last that was scored."""
    there = table.loc[table["blocked"].notna(), "embedder"].unique()
    return next((name for name in PRODUCTS if name in there), str(there[-1]))


def distances(checkpoint: str | None, database: str | None) -> Callable[[Lonlat], NDArray[np.float64]] | None:
    """Returns a function from places to the distance in km to the database's nearest image; None without a database."""
    if checkpoint and database:
        return partial(distance_km, load(checkpoint, database)[1])
    return None


def explain(
    url: str,
    scored: Scored,
    product: str,
    distance: Callable[[Lonlat], NDArray[np.float64]] | None,
    attribution: str,
) -> dict[str, float]:
    """Stores where the product fails, and returns its geographic bias by task."""
    table = where_it_fails(scored, product, distance)
    storage.write(storage.join(url, "failures.csv"), table.to_csv(index=False).encode())
    keep_table(storage.join(url, "failures.md"), _pivot(table), "failures", f"Where {product} fails")
    caption = f"Blocks held out. {attribution}"
    picture = bias_chart(table, f"Geographic bias of {product}", f"Bars are standard errors. {caption}")
    keep_picture(storage.join(url, "bias.png"), picture, "geographic-bias", f"Where {product} fails")
    files = slugs(made.labels.name for made in scored.trials_of(product))
    for made in scored.trials_of(product):
        name = made.labels.name
        lost = losses(made, scored.predicted[product, name])
        _error_map(url, f"errors-{files[name]}", made.labels.lonlat, lost, f"Errors of {product}: {name}", caption)
    return spread(table)


def layers(
    checkpoint: str | None, database: str | None, grid: str | None, product: str
) -> Callable[[Lonlat], dict[str, NDArray]] | None:
    """Returns a function from places to the evidence of their embeddings by name; None without a database."""
    if not checkpoint or not database:
        return None
    encoder, index, method = retrieval_of(product, checkpoint, database, grid)

    def layers_at(lonlat: Lonlat) -> dict[str, NDArray]:
        if method.name == "none":
            return {"distance_km": distance_km(index, lonlat)}
        found = evidence(index, encoder.embed(lonlat), lonlat, method)
        return {"effective_images": found.images, "largest_weight": found.largest, "distance_km": found.distance_km}

    return layers_at


def tell_uncertainty(
    url: str,
    scored: Scored,
    product: str,
    layers_at: Callable[[Lonlat], dict[str, NDArray]] | None,
    attribution: str,
) -> dict[str, Any]:
    """Stores how far predictions from the product can be trusted, and returns it as rows.

    Args:
        url: Directory of the files.
        scored: The scores.
        product: Name of the embedder.
        layers_at: Gives the evidence of embeddings of places, by name; None without a database.
        attribution: Below the maps.
    """
    vectors = scored.vectors[product]()
    assert vectors is not None, "the product was scored"
    found = []
    for made in scored.trials_of(product):
        told = layers_at(made.labels.lonlat) if layers_at else {}
        found.append(uncertainty(made, vectors[made.places], told))
    tables = {
        "uncertainty": pd.DataFrame([row for one in found for row in one.coverage]),
        "signals": pd.DataFrame([row for one in found for row in one.signals]),
    }
    for name, table in tables.items():
        storage.write(storage.join(url, f"{name}.csv"), table.to_csv(index=False).encode())
    title = f"How far predictions from {product} can be trusted"
    keep_table(storage.join(url, "uncertainty.md"), uncertainty_tables(**tables), "uncertainty", title)
    files = slugs(one.labels.name for one in found)
    for one in found:
        _uncertainty_map(url, f"uncertainty-{files[one.labels.name]}", one, product, attribution)
    return {name: records(table.replace(np.inf, np.nan)) for name, table in tables.items()}


def _uncertainty_map(url: str, name: str, found: Uncertainty, product: str, attribution: str) -> None:
    title = f"Uncertainty of {product}: {found.labels.name}"
    numbers = found.labels.kind == "regression"
    size, unit = (found.size / 2, "± units of the label") if numbers else (found.size, "classes in the set")
    caption = f"Conformal regions of {COVERAGE:.0%} coverage, calibrated on held-out blocks by distance. {attribution}"
    keep_picture(
        storage.join(url, f"{name}.png"), place_map(found.labels.lonlat, size, title, caption, unit), name, title
    )


def _error_map(url: str, name: str, lonlat: NDArray[np.float64], lost: NDArray, title: str, caption: str) -> None:
    picture = error_map(
        lonlat, lost, title, f"Grey: right; dark: wrong class, or off by a standard deviation. {caption}"
    )
    keep_picture(storage.join(url, f"{name}.png"), picture, name, title)


def _pivot(table: Any) -> str:
    """Returns a Markdown table of groups by tasks, with scores and numbers of places."""
    tasks = list(table["task"].unique())
    lines = []
    for (by, group), rows in table.groupby(["by", "group"], sort=False):
        cells = {row.task: f"{row.score:.2f} ± {row.std:.2f} ({row.n})" for row in rows.itertuples()}
        lines.append([f"{by}: {group}", *(cells.get(task, "") for task in tasks)])
    return markdown_table(["group", *tasks], lines)
